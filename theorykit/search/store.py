"""Search graphs on disk: one file in the safetensors format, which other programs can read too.

The file holds the graph's arrays by the names of its fields, and the format's version and the metric as metadata. On a
processor the rows of a loaded graph stay in the file and are read as they are needed, so that loading takes no time and
graphs larger than memory can be searched.
"""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from theorykit import _files
from theorykit.search._transform import entry_table
from theorykit.search.graph import Graph

FORMAT, VERSION = "theorykit.search.Graph", 1
DERIVED = "table"  # made anew from codes and entries by load
# XLA uses an array of the host in place if it begins at such a multiple of bytes, and copies it otherwise.
ALIGNMENT = 64
# A safetensors file begins with the length of its header, little-endian, and the header, which is JSON.
LENGTH = 8
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


def save(path: str | os.PathLike, graph: Graph) -> None:
    """Write a graph to one file.

    The file is written under a temporary name and renamed, so that it is there complete or not at all, and a graph that
    was loaded from the old file keeps it.

    Parameters
    ----------
    path
        The file; an existing one is replaced. Its folder must exist.
    graph
        As `build_graph` or `extend` gives it.

    Raises
    ------
    TypeError
        If it is no graph, or traced.
    OSError
        If the file cannot be written.
    """
    if not isinstance(graph, Graph):
        raise TypeError(
            f"save: got a {type(graph).__name__}; save takes the Graph that build_graph returns without a mesh"
        )
    tensors, metadata = {}, {"format": FORMAT, "version": str(VERSION)}
    for field in dataclasses.fields(graph):
        value = getattr(graph, field.name)
        if field.name == DERIVED:
            continue
        if isinstance(value, jax.core.Tracer):
            raise TypeError("save: the graph is traced; call save outside jax.jit")
        if isinstance(value, str):
            metadata[field.name] = value
        else:
            tensors[field.name] = np.asarray(value, order="C")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save: the folder {path.parent} does not exist; make it first")
    with _files.replacing(path) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata)
        off = -_start_of_base(*_header(temporary)) % ALIGNMENT
        if off:  # the header is padded by its metadata; all of its lengths are multiples of 8
            safetensors.numpy.save_file(tensors, temporary, metadata | {"padding": " " * ((off - _QUOTES) % ALIGNMENT)})
            if -_start_of_base(*_header(temporary)) % ALIGNMENT:
                raise RuntimeError("save: the rows could not be aligned; please report this with the graph's shapes")
        _files.sync(temporary)


def load(path: str | os.PathLike) -> Graph:
    """Read a graph that `save` wrote.

    Parameters
    ----------
    path
        The file. Where JAX computes on the processor it must stay as it is while the graph is in use (`save` replaces
        files, it does not change them).

    Returns
    -------
    Graph
        On the default device; there the rows are those of the file, mapped into memory, if it is a processor.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is truncated, none of `save`, or of a newer version.
    """
    path = Path(path)
    length, header = _header(path)
    metadata = header.get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise ValueError(f"load: {path} is a safetensors file without a search graph; give a file that save wrote")
    version = metadata.get("version", "")
    if not version.isdecimal() or int(version) != VERSION:
        raise ValueError(
            f"load: {path} has version {version!r} of the format and this theorykit reads version {VERSION}; "
            "update theorykit, or build the graph again"
        )
    try:
        with safetensors.safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys() if name != "base"}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, str(error)) from error
    names = {field.name for field in dataclasses.fields(Graph)} - {DERIVED}
    if names - set(arrays) - set(metadata) != {"base"} or "base" not in header:
        raise _damaged(path, f"its fields are {sorted(header)}")
    base = (
        np.memmap(
            path, np.float32, mode="r", offset=_start_of_base(length, header), shape=tuple(header["base"]["shape"])
        )
        if 0 not in header["base"]["shape"]
        else np.zeros(header["base"]["shape"], np.float32)
    )
    placed = {name: jnp.asarray(values) for name, values in arrays.items() if name in names}
    # Not jnp.asarray, which copies.
    placed["base"] = jax.device_put(base, may_alias=True)
    placed[DERIVED] = entry_table(placed["codes"], placed["entries"])
    return Graph(**placed, **{name: value for name, value in metadata.items() if name in names})


_QUOTES = len(',"padding":""')  # what an entry of the metadata takes beside its value


def _header(path):
    """Length of the header and its content; the errors of a file that is no safetensors file, or a part of one."""
    try:
        size = os.path.getsize(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"load: there is no file {path}; save writes one") from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        if size < LENGTH or length > LONGEST_HEADER:
            raise ValueError(f"load: {path} is no safetensors file; give a file that save wrote")
        text = file.read(length)
    try:
        header = json.loads(text)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if len(text) < length:
            raise _damaged(path, "it ends within the header") from error
        raise ValueError(f"load: {path} is no safetensors file; give a file that save wrote") from error
    if size != LENGTH + length + end:
        raise _damaged(path, f"it has {size} bytes in place of {LENGTH + length + end}")
    return length, header


def _start_of_base(length, header):
    return LENGTH + length + header["base"]["data_offsets"][0]


def _damaged(path, why):
    return ValueError(f"load: {path} is damaged ({why}); copy it again, or build and save the graph again")
