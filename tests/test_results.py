"""The results store: what is stored comes back the same, and what is missing or damaged is said."""

import dataclasses
import importlib
import json
import re
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from theorykit import _files, results

pytest_plugins = ("toy_experiment",)

# --- what is stored comes back ---------------------------------------------------------------------------------------


def test_a_result_is_computed_once_and_then_read(toy):
    first, second, third = toy.run(), toy.run(), toy.load()
    assert toy.computed() == 3
    for result in (second, third):
        assert result.path == first.path and result.environment == first.environment
        np.testing.assert_array_equal(result.arrays["squares"], first.arrays["squares"])
        assert result.verdicts == first.verdicts
    assert [v.outcome for v in first.verdicts] == ["supported", "refuted"]
    assert {(v.experiment, v.preset) for v in first.verdicts} == {("toy", "smoke")}


def test_the_folder_holds_config_with_reasons_arrays_verdicts_and_environment_and_nothing_else_is_left(toy):
    path = toy.run().path
    assert sorted(file.name for file in path.iterdir()) == [
        "arrays.npz",
        "config.json",
        "environment.json",
        "verdicts.json",
    ]
    config = json.loads((path / "config.json").read_text())
    assert config["config"] == {"parts": 3}
    assert config["thresholds"] == {"margin": {"value": 0.5, "reason": "half of the distance to the control"}}
    environment = json.loads((path / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__ and environment["seconds"] >= 0
    with np.load(path / "arrays.npz") as plain:
        assert plain["values"].dtype == np.float32
    assert [file.name for file in toy.root.iterdir()] == [path.name]


def test_arrays_of_a_result_cannot_be_changed(toy):
    with pytest.raises(ValueError, match="read-only"):
        toy.run().arrays["values"][0] = 1.0


def test_a_changed_threshold_or_verdict_retrains_nothing_and_its_new_verdicts_are_stored(toy):
    old = toy.run()
    toy.edit("results.threshold(0.5", "results.threshold(2.5")
    new = toy.load()
    assert toy.computed() == 3 and new.path == old.path
    assert new.config.margin == 2.5
    assert [v.outcome for v in new.verdicts] == ["supported", "supported"]
    toy.edit("mean + 1.0", "mean + 4.0")
    assert [v.outcome for v in toy.run().verdicts] == ["supported", "refuted"]
    assert toy.computed() == 3
    stored = json.loads((new.path / "verdicts.json").read_text())
    assert [v["outcome"] for v in stored] == ["supported", "refuted"]
    assert json.loads((new.path / "config.json").read_text())["thresholds"]["margin"]["value"] == 2.5


def test_unchanged_verdicts_are_not_written_again(toy):
    path = toy.run().path / "verdicts.json"
    before = path.stat().st_mtime_ns, path.stat().st_ino
    toy.load()
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


def test_an_edit_of_used_code_computes_again_beside_the_old_result(toy):
    old = toy.run()
    toy.edit("np.float32(i)", "np.float32(i) / 2")
    assert toy.run().path != old.path
    assert toy.computed() == 6 and old.path.exists()


def test_a_changed_data_file_makes_a_result_stale(toy):
    data = toy.folder / "data.bin"
    data.write_bytes(b"one")
    toy.edit("def run(config)", f"def data_files(config):\n    return [Path({str(data)!r})]\n\ndef run(config)")
    toy.run()
    toy.load()
    data.write_bytes(b"two")
    with pytest.raises(results.MissingResult, match=r"stale.*data file 0, data.bin"):
        toy.load()


def test_the_named_data_set_of_a_config_counts(toy):
    toy.edit("parts: int = 3", "parts: int = 3\n    data: str = 'digits'")
    record = json.loads((toy.run().path / "config.json").read_text())
    assert [key for key in record["ingredients"] if key.startswith("data file")]


def test_run_cannot_use_a_threshold(toy):
    toy.edit("range(config.parts)", "range(int(config.parts * config.margin))")
    with pytest.raises(TypeError, match="Sealed"):
        toy.run()


def test_run_may_be_called_without_a_store(toy):
    module = importlib.import_module("toyexperiments.toy")
    arrays = module.run(module.Config(parts=2))
    np.testing.assert_array_equal(arrays["values"], np.array([0, 1], np.float32))
    assert not toy.root.exists()


# --- errors that name cause and remedy -------------------------------------------------------------------------------


def test_a_missing_result_names_the_command(toy):
    with pytest.raises(results.MissingResult, match=r"make figure NAME=toy PRESET=smoke"):
        toy.load()
    assert toy.computed() == 0


def test_a_stale_result_says_what_changed(toy, monkeypatch):
    toy.run()
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    toy.edit("parts: int = 3", "parts: int = 2")
    with pytest.raises(results.MissingResult, match=r"stale.*changed: config, jax \S+ -> 0.0.1\. .*make figure"):
        toy.load()


def test_an_unknown_experiment_or_preset_lists_the_known_ones(toy):
    with pytest.raises(results.UnknownName, match="no experiment 'tow' in toyexperiments: choose one of toy"):
        results.load("tow", "smoke", package="toyexperiments")
    with pytest.raises(results.UnknownName, match="no preset 'tiny': choose one of smoke, quick"):
        toy.load("tiny")
    with pytest.raises(ModuleNotFoundError, match="no package 'nowhere': run from the repository's root"):
        results.load("toy", "smoke", package="nowhere")


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_computed(toy):
    (toy.folder / "file").write_text("")
    with pytest.raises(results.UnwritableStore, match=r"file/store cannot be written .*THEORYKIT_RESULTS"):
        toy.run(root=toy.folder / "file" / "store")
    assert toy.computed() == 0


def test_a_result_in_a_store_that_cannot_be_written_is_read_with_a_warning(toy, monkeypatch):
    result = toy.run()
    before = {file.name: file.read_bytes() for file in result.path.iterdir()}
    toy.edit("results.threshold(0.5", "results.threshold(2.5")  # other verdicts than those stored

    def refuse(path, text):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(_files, "write_text", refuse)
    for call in (toy.load, toy.run):
        with pytest.warns(UserWarning, match=re.escape(str(result.path)) + " keeps its earlier verdicts.*Read-only"):
            again = call()
        assert [v.outcome for v in again.verdicts] == ["supported", "supported"]
        np.testing.assert_array_equal(again.arrays["squares"], result.arrays["squares"])
    assert toy.computed() == 3
    assert {file.name: file.read_bytes() for file in result.path.iterdir()} == before


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("arrays.npz", truncate),
        ("arrays.npz", flip),
        ("arrays.npz", Path.unlink),
        ("config.json", truncate),
        ("config.json", lambda path: path.write_text("[]")),
        ("config.json", lambda path: path.write_text('{"hash": "0"}')),
        ("environment.json", truncate),
        ("environment.json", lambda path: path.write_bytes(b"\xff\xfe")),
        ("environment.json", Path.unlink),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy_and_never_recomputed_silently(toy, file, damage):
    path = toy.run().path
    damage(path / file)
    for call in (toy.load, toy.run):
        with pytest.raises(results.CorruptResult, match=re.escape(str(path / file)) + ".*delete the folder.*make"):
            call()
    assert toy.computed() == 3


def test_damaged_verdicts_are_written_anew_since_they_follow_from_the_arrays(toy):
    result = toy.run()
    good = (result.path / "verdicts.json").read_bytes()
    truncate(result.path / "verdicts.json")
    assert toy.load().verdicts == result.verdicts
    assert (result.path / "verdicts.json").read_bytes() == good


def test_a_damaged_part_is_named(toy):
    toy.edit('return {"values"', 'raise RuntimeError\n    return {"values"')
    with pytest.raises(RuntimeError):
        toy.run()
    (part,) = toy.root.glob(".partial-*/part=1.npz")
    truncate(part)
    with pytest.raises(results.CorruptResult, match=re.escape(str(part)) + ".*delete this file"):
        toy.run()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (', check("T1.shifted", "control", "T1", mean + 1.0)', "", "no control for T1"),
        ('"control", "T1", mean', '"control", "T2", mean', "no control for T1"),
        ("return [check", "return [] and [check", "no verdicts"),
        ("mean + 1.0)]", "mean + 1.0)] * 2", "T1, T1.shifted occurs twice"),
        ('return [check("T1", "claim", None, mean), ', "return [", "a control names 'T1', which is none"),
    ],
)
def test_verdicts_that_could_not_fail_are_refused(toy, old, new, message):
    toy.edit(old, new)
    with pytest.raises(ValueError, match=message):
        toy.run()


def test_an_experiment_that_lacks_something_is_told_what(toy):
    toy.edit("def verdicts(", "def verdict(")
    with pytest.raises(ValueError, match=r"toy.py is not an experiment: define verdicts"):
        toy.run()


def test_code_edited_under_a_running_process_is_not_stored_under_the_new_hash(toy):
    toy.run()
    path = toy.folder / "toyexperiments/toy.py"
    path.write_text(path.read_text().replace("np.float32(i)", "np.float32(2 * i)"))
    with pytest.raises(RuntimeError, match=r"toyexperiments.toy was edited after.*restart Python"):
        toy.run()
    toy.forget()
    np.testing.assert_array_equal(toy.run().arrays["values"], np.array([0, 2, 4], np.float32))


# --- arrays, bit for bit ---------------------------------------------------------------------------------------------

DTYPES = ["?", "i1", "u8", "i4", "f2", "f4", "f8", "c8", "c16", ">f8", "U5", "S3", "M8[s]", "bfloat16", "float8_e4m3fn"]


def example(dtype, shape):
    bits = np.random.default_rng(0).integers(0, 2, (int(np.prod(shape)) * np.dtype(dtype).itemsize,), np.uint8)
    return bits.view(np.dtype(dtype)).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_come_back_bit_for_bit(tmp_path, dtype):
    arrays = {f"x/{shape}": example(dtype, shape) for shape in [(), (1,), (0, 3), (2, 3, 4)]}
    arrays["turned"] = example(dtype, (4, 3)).T
    arrays["strided"] = example(dtype, (6, 3))[::2]
    _files.write_arrays(tmp_path / "a.npz", arrays)
    back = _files.read_arrays(tmp_path / "a.npz")
    assert list(back) == list(arrays)
    for key, array in arrays.items():
        assert back[key].dtype == array.dtype and back[key].shape == array.shape
        assert back[key].tobytes() == array.tobytes()


def test_special_floats_keep_their_bits(tmp_path):
    array = np.array([np.nan, -np.nan, np.inf, -0.0, 5e-324])
    _files.write_arrays(tmp_path / "a.npz", {"file": array})
    assert _files.read_arrays(tmp_path / "a.npz")["file"].tobytes() == array.tobytes()


def test_a_part_is_the_same_computed_read_back_or_without_a_store(toy):
    toy.edit(
        "def run(config):",
        textwrap.dedent("""
        SEEN = []

        def run(config):
            import jax.numpy as jnp
            for value in (jnp.float32(2), {"a": jnp.arange(3), "b": np.float64(0.1)}, 7):
                SEEN.append(results.part(f"kind-{len(SEEN) % 3}", lambda: value))
            if len(SEEN) == 3:
                raise RuntimeError("killed")
        """),
    )
    with pytest.raises(RuntimeError):
        toy.run()
    toy.run()
    module = sys.modules["toyexperiments.toy"]
    module.run(module.Config())
    seen = [jax.tree.map(lambda x: (type(x), x.dtype, x.shape, x.tobytes()), value) for value in module.SEEN]
    assert seen[:3] == seen[3:6] == seen[6:]


def test_a_folder_lasts_until_the_run_is_finished_and_there_is_none_outside(toy):
    toy.edit(
        "def run(config):",
        textwrap.dedent("""
        FOUND = []

        def run(config):
            FOUND.append(results.folder("checkpoints"))
            if len(FOUND) == 1:
                (FOUND[0] / "state").write_text("half-way")
                raise RuntimeError("killed")
            if len(FOUND) == 2:
                assert (FOUND[1] / "state").read_text() == "half-way"
        """),
    )
    with pytest.raises(RuntimeError, match="killed"):
        toy.run()
    toy.run()
    module = sys.modules["toyexperiments.toy"]
    assert module.FOUND[0] == module.FOUND[1] and not module.FOUND[1].exists()
    module.run(module.Config())
    assert module.FOUND[2] is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], "flatten containers into a dict of arrays"),
        ({}, "at least one entry"),
        ({"a": {"b": np.ones(1)}}, r"part 'x'\['a'\] must be an array, got dict"),
        ({"a:b": np.ones(1)}, "without a colon"),
        ({1: np.ones(1)}, "must be a string"),
        (np.array([None]), "Python objects"),
        (np.ma.masked_array([1.0], [True]), "got MaskedArray"),
        (jax.random.key(0), "jax.random.key_data"),
    ],
)
def test_a_value_that_would_not_come_back_the_same_is_refused(value, message):
    with pytest.raises(TypeError, match=message):
        results.part("x", lambda: value)


def test_two_parts_of_one_name_are_an_error(toy):
    toy.edit('f"part={i}"', '"part"')
    with pytest.raises(ValueError, match="two parts of one run are called 'part'"):
        toy.run()
    with pytest.raises(ValueError, match="becomes a file name"):
        results.part("a/b", lambda: 1.0)


def test_a_run_that_returns_no_dict_of_arrays_is_an_error(toy):
    toy.edit('return {"values"', 'return list(parts)\n    return {"values"')
    with pytest.raises(TypeError, match=r"run of toy must give a dict of arrays .*got list"):
        toy.run()


def test_thresholds_keep_their_reason():
    @dataclasses.dataclass(frozen=True)
    class Config:
        margin: float = results.threshold(0.1, "why")

    assert Config().margin == 0.1
    assert dataclasses.fields(Config)[0].metadata["threshold"] == "why"
