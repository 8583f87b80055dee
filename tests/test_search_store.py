"""Saved search graphs: the same answers, rows left in the file, whole files only, and errors that say what is wrong."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from theorykit.search import build_graph, load, query_graph, save


def rows(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


@pytest.fixture(scope="module")
def graph():
    return build_graph(rows(300, 7), degree=8, metric="cosine", key=jax.random.key(0), progress=False)


@pytest.mark.slow
def test_a_loaded_graph_is_the_saved_one_bit_for_bit(graph, tmp_path):
    save(tmp_path / "g", graph)
    found = load(tmp_path / "g")
    for field in dataclasses.fields(graph):
        old, new = getattr(graph, field.name), getattr(found, field.name)
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old), strict=True)
    queries = rows(5, 7, 1)
    for old, new in zip(query_graph(graph, queries, 3), query_graph(found, queries, 3), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("storage", ["int8", "bfloat16"])
@pytest.mark.parametrize(("n", "d"), [(0, 3), (1, 1), (2, 5)])
def test_small_graphs_of_every_storage_survive(tmp_path, n, d, storage):
    graph = build_graph(rows(n, d), degree=2, key=jax.random.key(0), storage=storage)
    save(tmp_path / "g", graph)
    found = load(tmp_path / "g")
    assert found.codes.dtype == graph.codes.dtype and found.metric == "l2"
    np.testing.assert_array_equal(found.base, graph.base)


@pytest.mark.slow
def test_other_programs_can_read_the_file(graph, tmp_path):
    save(tmp_path / "g", graph)
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "g")["base"], graph.base)


@pytest.mark.slow  # a process of its own
def test_the_rows_of_a_loaded_graph_stay_in_the_file(tmp_path):
    # 64 MiB of rows, in a process that counts the memory that no file backs.
    program = """
import sys, dataclasses, jax, jax.numpy as jnp, numpy as np
from theorykit.search import Graph, build_graph, load, save
small = build_graph(np.ones((2, 64), np.float32), degree=2, key=jax.random.key(0))
save(sys.argv[1], dataclasses.replace(small, base=jnp.ones((2**18, 64))))
own = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) // 1024
load(sys.argv[1]).base.block_until_ready()
before = own()
graph = load(sys.argv[1])
graph.base.block_until_ready()
print(own() - before, float(jax.jit(lambda rows: rows[-1].sum())(graph.base)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "g")], capture_output=True, text=True, check=True
    )
    grown, total = map(float, done.stdout.split())
    assert grown < 16 and total == 64


def test_a_graph_in_use_keeps_the_file_that_was_replaced(graph, tmp_path):
    save(tmp_path / "g", graph)
    found = load(tmp_path / "g")
    save(tmp_path / "g", dataclasses.replace(graph, base=graph.base + 1))
    np.testing.assert_array_equal(found.base, graph.base)
    np.testing.assert_array_equal(load(tmp_path / "g").base, graph.base + 1)


def test_a_failed_save_leaves_the_old_file_and_no_other(graph, tmp_path, monkeypatch):
    save(tmp_path / "g", graph)

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "g", dataclasses.replace(graph, base=graph.base + 1))
    assert [path.name for path in tmp_path.iterdir()] == ["g"]
    np.testing.assert_array_equal(load(tmp_path / "g").base, graph.base)


def test_every_truncation_is_reported(graph, tmp_path):
    save(tmp_path / "g", graph)
    content = (tmp_path / "g").read_bytes()
    for length in (0, 3, 8, 50, len(content) // 2, len(content) - 1):
        (tmp_path / "part").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"damaged|no safetensors file"):
            load(tmp_path / "part")


def test_foreign_and_newer_files_are_reported(graph, tmp_path):
    save(tmp_path / "g", graph)
    content = (tmp_path / "g").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])

    def written(change):
        new = json.loads(json.dumps(header))
        change(new)
        text = json.dumps(new).encode()
        text += b" " * (-len(text) % 8)
        (tmp_path / "new").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        return tmp_path / "new"

    with pytest.raises(ValueError, match="update theorykit"):
        load(written(lambda h: h["__metadata__"].update(version="2")))
    with pytest.raises(ValueError, match="without a search graph"):
        load(written(lambda h: h["__metadata__"].update(format="other")))
    with pytest.raises(ValueError, match="is damaged"):
        load(written(lambda h: h["__metadata__"].pop("metric")))
    (tmp_path / "text").write_text("an ordinary text that is long enough to have a length")
    with pytest.raises(ValueError, match="no safetensors file"):
        load(tmp_path / "text")
    safetensors.numpy.save_file({"x": np.ones(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="without a search graph"):
        load(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no file"):
        load(tmp_path / "absent")


def test_what_is_no_graph_and_where_no_folder_is_are_refused(graph, tmp_path, as_users_run):
    with pytest.raises(TypeError, match="save takes the Graph"):
        save(tmp_path / "g", {"base": jnp.ones((2, 2))})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save(tmp_path / "none" / "g", graph)
    with pytest.raises(TypeError, match=r"outside jax\.jit"):
        jax.jit(lambda g: save(tmp_path / "g", g))(graph)
    assert not list(tmp_path.iterdir())
