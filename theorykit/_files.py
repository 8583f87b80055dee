"""Files of the results store: arrays bit for bit, and writes that are seen whole or not at all."""

import contextlib
import hashlib
import os
import secrets
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.lib.format as npy

# What reading a truncated or altered file of arrays raises.
DAMAGE = (FileNotFoundError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)


def dict_of_arrays(value: Any, where: str) -> dict[str, np.ndarray]:
    """Check that a value is a dict of arrays and make each NumPy's; ``where`` names it in errors."""
    if not isinstance(value, dict) or not value:
        raise TypeError(f"{where} must give a dict of arrays with at least one entry, got {type(value).__name__}")
    for key in value:
        if not isinstance(key, str) or not key or ":" in key:
            raise TypeError(f"{where}: the array name {key!r} must be a string, not empty and without a colon")
    return {key: array(item, f"{where}[{key!r}]") for key, item in value.items()}


def array(value: Any, where: str) -> np.ndarray:
    """Check that a value is an array or a number and make it NumPy's."""
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{where} is a random key: store jax.random.key_data(key)")
    # Not np.ndarray's subclasses: a masked array would lose its mask.
    if type(value) is not np.ndarray and not isinstance(value, jax.Array | np.generic | bool | int | float | complex):
        raise TypeError(
            f"{where} must be an array, got {type(value).__name__}: flatten containers into a dict of arrays"
        )
    result = np.asarray(value)
    if result.dtype.hasobject:
        raise TypeError(f"{where} holds Python objects: convert it to numbers or fixed-length strings")
    return result


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz file that NumPy can read; types that are not NumPy's own (bfloat16) go as bits, named in the key."""
    with open(path, "wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            for key, values in arrays.items():
                if npy.descr_to_dtype(npy.dtype_to_descr(values.dtype)) != values.dtype:
                    key, values = f"{key}:{values.dtype.name}", values.view(f"u{values.dtype.itemsize}")
                with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as stream:
                    npy.write_array(stream, values, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read what `write_arrays` wrote; a damaged file raises one of `DAMAGE`."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as stream:
                values = npy.read_array(stream, allow_pickle=False)
            key, _, dtype = member.removesuffix(".npy").partition(":")
            arrays[key] = values.view(np.dtype(dtype)) if dtype else values
    return arrays


def write_file(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path):
    """A temporary name beside ``path`` that takes its place when the block ends well."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Bring a folder's entries to disk; where folders cannot be opened (Windows) the system's own order must do."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file so that at any moment its old or its new text is there, never a part; leave an equal file alone."""
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return
    with replacing(path) as temporary:
        write_file(temporary, text.encode())


def digest(path: str | Path) -> str:
    """SHA-256 of a file's content, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
