"""Data sets read from files: MNIST-style IDX, CIFAR-10 python batches, npz and npy. Nothing is downloaded.

The files lie in the folder named by the environment variable THEORYKIT_DATA, or by ``folder``:

    mnist          train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..., each plain or .gz, in mnist/, MNIST/raw/
                   or the folder itself
    fashion-mnist  the same names in fashion-mnist/, FashionMNIST/raw/ or the folder itself
    cifar10        data_batch_1 ... data_batch_5, test_batch in cifar10/, cifar-10-batches-py/ or the folder itself
    any other name a path inside the folder: a folder with the four IDX files, an .npz with arrays x and y (or images
                   and labels), or an .npy with inputs only

Every set comes as float32 rows and int32 labels. A file that is missing, truncated or not what its name says is an
error that names the file, what was expected and the remedy.
"""

import gzip
import io
import math
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from theorykit.data.digits import digits, digits_file
from theorykit.data.normalise import Labelled

VARIABLE = "THEORYKIT_DATA"
SYNTHETIC = {"gaussian": "gaussian_pairs", "clusters": "latent_clusters"}
# Where each set may lie inside the folder, the first that exists winning: its own name, then the name that its
# archive or torchvision unpacks to, then the folder itself.
IDX_SETS = {"mnist": ("mnist", "MNIST/raw", "."), "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw", ".")}
CIFAR_SETS = {"cifar10": ("cifar10", "cifar-10-batches-py", ".")}
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CIFAR_FILES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
# The third byte of an IDX file; entries are stored most significant byte first.
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
CIFAR_SHAPE = (3, 32, 32)  # colours, rows, columns: the order within a stored row


class DataError(ValueError):
    """A data file, or the way to it, is not as expected; the message names the file and the remedy."""


def _error(path: Path | str, expected: str, found: str, remedy: str) -> DataError:
    return DataError(f"{path}: expected {expected}, found {found}. Remedy: {remedy}.")


AGAIN = "copy the file again from its source, for this one is damaged or incomplete"


def _bytes(path: Path) -> bytes:
    """The content of a file, unpacked if it is gzip, which its first two bytes tell (browsers unpack but keep .gz)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Remedy: put it there by hand; nothing is downloaded.")
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _error(path, "a whole gzip file", f"a damaged one ({error})", AGAIN) from error


def _finite(path: Path, array: np.ndarray) -> np.ndarray:
    if np.issubdtype(array.dtype, np.inexact) and not np.all(np.isfinite(array)):
        bad = np.argwhere(~np.isfinite(array))
        where = f"{len(bad)} non-finite values, the first at index {tuple(bad[0].tolist())}"
        raise _error(path, "finite values", where, "remove or repair these examples and save the file again")
    return array


def read_idx(path: Path | str) -> Shaped[np.ndarray, "..."]:
    """Read one IDX file, plain or gzip, of any of its six entry types and any number of dimensions.

    Bytes 0, 0, type, number of dimensions m; then m sizes as big-endian uint32; then the entries, big-endian, the last
    index fastest.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    array
        The stored array, its own shape and type (uint8, int8, int16, int32, float32 or float64), native byte order.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    DataError
        If the magic number or the entry type is not IDX, bytes are missing or left over, or a value is not finite.

    Source
    ------
    LeCun, Cortes, Burges, The MNIST database of handwritten digits, "the IDX file format".
    """
    path = Path(path)
    content = _bytes(path)
    if len(content) < 4:
        raise _error(path, "an IDX header of 4 bytes or more", f"{len(content)} bytes, so it is truncated", AGAIN)
    if content[:2] != b"\0\0" or content[3] == 0:
        magic = "the magic number of IDX, which is 00 00, a type, a number of dimensions above 0"
        remedy = "check that this is the data file, not a web page or an archive saved under its name"
        raise _error(path, magic, f"wrong magic {content[:4].hex(' ')}", remedy)
    if content[2] not in IDX_TYPES:
        known = f"an IDX type code among {bytes(IDX_TYPES).hex(' ')}"
        raise _error(path, known, f"{content[2]:02x}", "write the file as one of these types")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise _error(path, f"an IDX header of {start} bytes", f"{len(content)} bytes, so it is truncated", AGAIN)
    shape = tuple(np.frombuffer(content, ">u4", content[3], 4).tolist())
    dtype = np.dtype(IDX_TYPES[content[2]])
    # Python integers: the product of header sizes may exceed 64 bits in a damaged file.
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        state = "truncated" if len(content) < expected else f"followed by {len(content) - expected} trailing bytes"
        raise _error(path, f"{expected} bytes for shape {shape}", f"{len(content)} bytes, so it is {state}", AGAIN)
    try:
        array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    except ValueError as error:  # more dimensions or, around a zero, larger ones than NumPy can hold
        raise _error(path, "a shape that NumPy can hold", f"{shape}", AGAIN) from error
    return _finite(path, array.astype(dtype.newbyteorder("=")))


class _StoredType:
    """What a pickle says of a dtype: the code it was made with."""

    def __init__(self, code, *_):
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state):
        """Byte order and alignment, which single bytes do not have."""


class _StoredArray:
    """What a pickle says of an array: (version, shape, dtype, column-major, entries)."""

    def __setstate__(self, state):
        _, self.shape, self.type, self.column_major, self.entries = state

    def array(self) -> np.ndarray:
        if self.type.code != "u1":
            raise ValueError(f"entries of type {self.type.code} where uint8 belongs")
        return np.frombuffer(self.entries, np.uint8).reshape(self.shape, order="F" if self.column_major else "C")


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that builds numbers, bytes, lists, dicts and the description of arrays, and calls nothing else.

    The names that an array's pickle uses are answered by the two classes above; NumPy itself is never handed out.
    """

    def find_class(self, module: str, name: str):
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda *_: _StoredArray()
        if (module, name) == ("numpy", "ndarray"):
            return _StoredArray
        if (module, name) == ("numpy", "dtype"):
            return _StoredType
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes into a pickle of protocol 2
            return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch contains")


def read_cifar_batch(path: Path | str) -> Labelled:
    """Read one CIFAR-10 python batch, without running anything that the pickle may contain.

    A pickle is a program: one that asks for more than arrays, bytes, numbers, lists and dicts is refused, not run.

    Parameters
    ----------
    path : path
        A file data_batch_1 ... data_batch_5 or test_batch.

    Returns
    -------
    Labelled
        ``inputs`` (n, 3072) float32 in [0, 1], ``x.reshape(n, 32, 32, 3)`` being images with colours last; ``labels``
        (n,) int32 in 0..9.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    DataError
        If the pickle is damaged, asks for anything but array data, or lacks uint8 rows of 3072 pixels with labels.

    Source
    ------
    Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images.
    """
    path = Path(path)
    stream = io.BytesIO(_bytes(path))
    remedy = "copy the file again from its source, the CIFAR-10 *python* version"
    try:
        batch = _ArraysOnly(stream, encoding="bytes").load()
        rows, labels = batch[b"data"].array(), batch[b"labels"]
    except Exception as error:  # each instruction of a damaged pickle fails with an exception of its own
        found = f"a damaged, foreign or refused pickle ({type(error).__name__}: {error})"
        raise _error(path, "a CIFAR-10 python batch with data and labels", found, remedy) from error
    if rest := stream.read():
        raise _error(path, "the end of the file after the pickle", f"{len(rest)} trailing bytes", remedy)
    if rows.ndim != 2 or rows.shape[1] != math.prod(CIFAR_SHAPE):
        raise _error(path, f"data of shape (n, {math.prod(CIFAR_SHAPE)})", f"{rows.shape}", remedy)
    if not (isinstance(labels, list) and all(type(label) is int for label in labels)):
        raise _error(path, "labels as a list of integers", f"{labels!r:.60}", remedy)
    images = rows.reshape(-1, *CIFAR_SHAPE).transpose(0, 2, 3, 1)
    return _labelled(path, images, path, np.asarray(labels), classes=10)


def _read_npy(path: Path, content: bytes) -> np.ndarray:
    stream = io.BytesIO(content)
    try:
        array = np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python: what a damaged one raises is not documented
        remedy = "copy the file again, or save it anew by numpy.save as an array of numbers"
        raise _error(path, "a whole npy array of numbers", f"{error}", remedy) from error
    if rest := stream.read():
        raise _error(path, "the end of the file after the array", f"{len(rest)} trailing bytes", AGAIN)
    return array


def _read_npz(path: Path) -> Labelled:
    content = _bytes(path)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    except Exception as error:  # zipfile and zlib raise half a dozen kinds, for damage and for features they lack
        raise _error(path, "a whole npz file", f"{error}", AGAIN) from error
    for inputs, labels in (("x", "y"), ("images", "labels")):
        if inputs in members:
            classes = _read_npy(path, members[labels]) if labels in members else None
            return _labelled(path, _read_npy(path, members[inputs]), path, classes)
    found = ", ".join(sorted(members)) or "no array"
    raise _error(path, "an array x (and y) or images (and labels)", found, "save it by numpy.savez(path, x=..., y=...)")


def _labelled(
    inputs_path: Path,
    inputs: Shaped[np.ndarray, "..."],
    labels_path: Path,
    labels: Shaped[np.ndarray, "..."] | None,
    classes: int | None = None,
) -> Labelled:
    """Rows of float32 and labels of int32; uint8 means pixels, 0..255, which become [0, 1]."""
    if inputs.ndim < 2 or 0 in inputs.shape or inputs.dtype.kind not in "uifb":
        found = f"{inputs.dtype} of shape {inputs.shape}"
        raise _error(inputs_path, "numbers of shape (n, ...), n >= 1", found, "save one example a row")
    # Finite in float32 as well: a larger float64 would become infinite unseen.
    with np.errstate(over="ignore"):
        rows = _finite(inputs_path, inputs.reshape(len(inputs), -1).astype(np.float32))
    if inputs.dtype == np.uint8:
        rows /= np.float32(255)
    if labels is None:
        return Labelled(rows, None)
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        found = f"{labels.dtype} of shape {labels.shape}"
        raise _error(labels_path, "labels as integers of shape (n,)", found, "save one integer class for each example")
    if len(labels) != len(rows):
        found = f"{len(labels)} labels for {len(rows)} examples in {inputs_path}"
        raise _error(labels_path, f"{len(rows)} labels", found, "take both from the same set and split")
    most = np.iinfo(np.int32).max if classes is None else classes - 1
    if labels.min() < 0 or labels.max() > most:
        found = f"{labels.min()} to {labels.max()}"
        raise _error(labels_path, f"labels between 0 and {most}", found, "number the classes from 0")
    return Labelled(rows, labels.astype(np.int32))


def _root(folder: Path | str | None) -> Path:
    named = folder if folder is not None else os.environ.get(VARIABLE)
    if not named:
        raise DataError(
            f"{VARIABLE} is not set: expected the folder that holds the data sets. Remedy: export {VARIABLE}=<folder> "
            'or pass folder=...; name="digits" needs no folder.'
        )
    root = Path(named).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: no such folder. Remedy: create it and put the data files there, or name another in {VARIABLE}."
        )
    return root


def _among(folders: list[Path], names: tuple[str, ...]) -> list[Path]:
    """The named files, plain or .gz, in the first folder that holds any of them."""
    options = [
        [next((p for p in (folder / n, folder / f"{n}.gz") if p.is_file()), folder / n) for n in names]
        for folder in folders
    ]
    found = next((paths for paths in options if any(p.is_file() for p in paths)), options[0])
    for path in found:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file. Expected {', '.join(names)}, plain or .gz, together in "
                f"{' or '.join(str(folder) for folder in folders)}. Remedy: put them there; nothing is downloaded."
            )
    return found


def source_files(name: str, *, folder: Path | str | None = None, split: str = "train") -> list[Path]:
    """Name the files that a set is read from, for the digests that a results store keeps.

    Parameters
    ----------
    name : str
        As in ``load``; or "gaussian", "clusters", which are drawn and have no file.
    folder : path, optional
        As in ``load``.
    split : "train" or "test"
        As in ``load``.

    Returns
    -------
    list of Path
        In the order they are read. "digits" is the file inside scikit-learn, found without importing it.

    Raises
    ------
    FileNotFoundError, DataError
        As in ``load``, as far as seen without opening files.
    """
    if split not in IDX_FILES:
        raise DataError(f'split is "{split}": expected "train" or "test". Remedy: choose one of them.')
    if name in SYNTHETIC:
        return []
    if name in IDX_SETS or name in CIFAR_SETS:
        root = _root(folder)
        places = IDX_SETS[name] if name in IDX_SETS else CIFAR_SETS[name]
        return _among([root / p for p in places], (IDX_FILES if name in IDX_SETS else CIFAR_FILES)[split])
    path = None if name == "digits" else _root(folder) / name
    if path is not None and path.is_dir():
        return _among([path], IDX_FILES[split])
    if split != "train":
        raise DataError(f"{name}: has no test split. Remedy: load it once and split its rows.")
    if path is None:
        return [digits_file()]
    if not path.is_file():
        known = ", ".join(["digits", *IDX_SETS, *CIFAR_SETS])
        raise FileNotFoundError(
            f"{path}: no such file. Expected a set ({known}) or a path inside the folder. "
            "Remedy: correct the name, or put the file there; nothing is downloaded."
        )
    return [path]


def load(name: str, *, folder: Path | str | None = None, split: str = "train") -> Labelled:
    """Load a data set by name, or from a file inside the data folder.

    Parameters
    ----------
    name : str
        "digits"; "mnist", "fashion-mnist", "cifar10"; else a path inside the folder: a folder with IDX files under
        MNIST's names, an .npz or an .npy.
    folder : path, optional
        The data folder; by default the one that the environment variable THEORYKIT_DATA names.
    split : "train" or "test"
        Which part of a set that comes in two; "train" for one that does not.

    Returns
    -------
    Labelled
        ``inputs`` (n, d) float32, an example a row; entries stored as uint8 are pixels and are divided by 255.
        ``labels`` (n,) int32; None where the file has none. Images keep their order within a row: colours last.

    Raises
    ------
    FileNotFoundError
        If the folder or a file is missing.
    DataError
        If no folder is named, or a file is not what it should be.
    """
    if name in SYNTHETIC:
        raise DataError(f"{name}: is drawn, not read. Remedy: call theorykit.data.{SYNTHETIC[name]} with a key.")
    paths = source_files(name, folder=folder, split=split)
    if name == "digits":
        return digits()
    if name in CIFAR_SETS:
        batches = [read_cifar_batch(path) for path in paths]
        return Labelled(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
    if len(paths) == 2:
        return _labelled(paths[0], read_idx(paths[0]), paths[1], read_idx(paths[1]))
    (path,) = paths
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".npy":
        return _labelled(path, _read_npy(path, _bytes(path)), path, None)
    raise _error(path, "a name that ends in .npz or .npy", path.name, "convert it, or use read_idx or read_cifar_batch")
