"""The benchmarks: their values, their bookkeeping and the layout of their JSON; never their times."""

import importlib
import importlib.util
import itertools
import json
import math
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

# They live beside the tests, not in the installed package.
sys.path.insert(0, str(Path(__file__).parent.parent))
_timing = importlib.import_module("benchmarks._timing")
contestants = importlib.import_module("benchmarks._contestants")
benchmark = importlib.import_module("benchmarks.ntk")
imports = importlib.import_module("benchmarks.imports")

needs_peers = pytest.mark.skipif(
    importlib.util.find_spec("neural_tangents") is None, reason="neural-tangents, an optional extra, is not installed"
)
CASE = contestants.Case(depth=3, width=5, n=5, z=2)
BUDGET = _timing.Budget(visits=3, visit_seconds=0.0, patience=math.inf)


def with_durations(monkeypatch, durations):
    """Calls take these seconds, whatever the machine does."""
    durations = iter(durations)
    monkeypatch.setattr(_timing, "_call", lambda function: (function(), next(durations), 0.5))


def test_contestants_take_turns_after_a_warm_up():
    order = []
    functions = {name: lambda name=name: order.append(name) or name for name in "ab"}
    samples = _timing.interleave(functions, BUDGET, "test")
    assert "".join(order) == "aabb" + "ab" * 2
    assert {name: (len(s.wall), len(s.cpu), s.value) for name, s in samples.items()} == {
        "a": (3, 3, "a"),
        "b": (3, 3, "b"),
    }


def test_a_visit_repeats_what_is_fast_and_its_sample_is_the_median(monkeypatch):
    with_durations(monkeypatch, [5.0, 1.0, 7.0, 2.0])  # a warm-up, and three calls to fill ten seconds
    budget = _timing.Budget(visits=1, visit_seconds=10.0, patience=math.inf)
    assert _timing.interleave({"a": int}, budget, "test") == {"a": _timing.Samples([2.0], [0.5], 0)}
    counted = []
    with_durations(monkeypatch, itertools.repeat(0.0))
    _timing.interleave({"a": lambda: counted.append(0)}, budget, "test")
    assert len(counted) == 1 + _timing.MOST_CALLS


def test_who_uses_up_the_patience_gets_no_more_visits_and_the_others_go_on(monkeypatch):
    # Warm-up and first visit of each: one loses patience in its warm-up, which counts then, the other in its visit.
    with_durations(monkeypatch, [6.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0])
    budget = _timing.Budget(visits=3, visit_seconds=0.0, patience=5.0)
    samples = _timing.interleave({"slowest": int, "slow": int, "fast": int}, budget, "test")
    assert {name: found.wall for name, found in samples.items()} == {
        "slowest": [6.0],
        "slow": [4.0],
        "fast": [1.0, 1.0, 1.0],
    }


def test_ratio_is_of_medians_with_the_extremes_within_a_round():
    assert _timing.ratio([10.0, 30.0, 20.0], [1.0, 2.0, 1.0]) == {"median": 20.0, "low": 10.0, "high": 20.0}
    assert _timing.ratio([8.0], [2.0, 4.0]) == {"median": 8.0 / 3.0, "low": 2.0, "high": 4.0}


def test_a_target_is_met_from_its_own_side():
    measured = {"median": 2.0, "low": 1.0, "high": 3.0}
    assert _timing.target("s", 2.0, measured, at_least=True)["met"]
    assert not _timing.target("s", 2.1, measured, at_least=True)["met"]
    assert not _timing.target("s", 1.9, measured, at_least=False)["met"]


@pytest.mark.slow
def test_peak_memory_of_a_fresh_interpreter_sees_its_own_arrays_only():
    size = 2**27
    np.ones(2 * size, np.uint8)  # this process has held more than the fresh one will
    before, after = map(
        int,
        imports.interpret(
            "import numpy as np; from benchmarks._timing import peak_resident as peak; "
            f"before = peak(); np.ones({size}, np.uint8); print(before, peak())"
        ).split(),
    )
    # The array's pages, all touched, are gone again when the peak is read; numpy and JAX alone hold about 150 MB.
    assert 0.9 * size <= after - before <= 1.1 * size
    assert before < 3 * size


@pytest.mark.slow
@needs_peers
@pytest.mark.parametrize("name", contestants.PEERS)
def test_every_peer_computes_the_same_kernel_in_one_piece_and_in_blocks(name):
    ours = contestants.build(CASE, "theorykit")
    whole = contestants.build(CASE, name)
    # The limit that one piece just misses; 5 points then go in blocks of 3 or fewer, of which the last is filled up.
    blocked = contestants.build(CASE, name, whole.compiled_bytes - 1)
    assert whole.block == 5 and blocked.block < 5 and blocked.compiled_bytes < whole.compiled_bytes
    reference = np.asarray(ours.run())
    assert reference.shape == (5, 5, 2, 2)
    for contestant in (whole, blocked):
        kernel = np.asarray(contestant.run())
        assert kernel.shape == reference.shape
        assert contestants.difference(kernel, reference) <= contestants.TOLERANCE


def test_a_peer_that_cannot_fit_is_an_error():
    with pytest.raises(MemoryError, match="jacrev needs more than"):
        contestants.build(CASE, "jacrev", 1)


@needs_peers
def test_kernels_that_differ_stop_the_benchmark(monkeypatch):
    monkeypatch.setattr(contestants, "neural_tangents_kernel", lambda *_: lambda p, a, b: 1.0001 * kernel(p, a, b))
    kernel = contestants.jacrev_kernel(contestants.inputs(CASE)[0])
    with pytest.raises(contestants.ValuesDiffer, match=r"nt jacobian and theorykit differ by 0\.0001 "):
        benchmark.measure(CASE._replace(peers=("nt jacobian",)), BUDGET)
    with pytest.raises(contestants.ValuesDiffer, match="nan"):
        contestants.check(math.nan, "it", CASE)


def test_presets_measure_the_figures_to_reach():
    for preset in ("quick", "full"):
        plan = benchmark.PLANS[preset]
        wanted = {(case.depth, case.width, case.n, case.z): case.least for case in plan.cases if case.least}
        assert wanted == {(2, 8192, 128, 4): 100, (4, 2048, 32, 4): 20, (4, 2048, 128, 4): 20}
        assert plan.large[:4] == (2, 65_536, 1000, 8)
        changed = [{case[i] for case in plan.cases} for i in range(4)]  # depths, widths, n, z
        assert all(len(values) >= 3 for values in changed)


@pytest.mark.slow
@needs_peers
def test_the_kernel_benchmark_writes_what_it_measured(monkeypatch, tmp_path):
    plan = benchmark.PLANS["smoke"]
    small = plan._replace(cases=(plan.cases[1]._replace(least=1e9, peers=("nt jacobian", "nt products")),))
    monkeypatch.setitem(benchmark.PLANS, "smoke", small)
    benchmark.main("smoke", tmp_path)
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(r"ntk-cpu-[a-z0-9-]+-cores-smoke\.json", path.name)
    content = json.loads(path.read_text())
    assert content["benchmark"] == "ntk" and content["preset"] == "smoke"
    assert content["machine"]["backend"] == jax.default_backend() and content["machine"]["versions"]["jax"]
    assert "/" not in json.dumps(content["machine"])
    (case,) = content["cases"]
    assert (case["depth"], case["width"], case["n"], case["z"]) == small.cases[0][:4] and len(case["load"]) == 2
    assert case["contestants"].keys() == {"theorykit", "nt jacobian", "nt products"}
    for found in case["contestants"].values():
        assert 0 < found["seconds"]["low"] <= found["seconds"]["median"] <= found["seconds"]["high"]
        assert (
            found["difference"] <= contestants.TOLERANCE and found["compiled_bytes"] > 0 and found["block"] == case["n"]
        )
    assert case["times_faster"].keys() == case["times_less_cpu"].keys() == {"nt jacobian", "nt products"}
    assert case["best_neural_tangents"] in case["times_faster"]
    assert content["scaling"]["all"].keys() >= {"exponent", "low", "high", "widths"}
    large = content["large"]
    assert large["peak_bytes"] > large["increase_bytes"] > 0 and large["seconds"] > 0
    assert 0 < large["difference"] <= contestants.TOLERANCE
    assert content["sharded"]["difference"] <= contestants.TOLERANCE
    met = {target["statement"]: target["met"] for target in content["targets"]}
    # Nothing is a thousand million times faster; the small kernel fits.
    assert [met[statement] for statement in sorted(met)] == [True, False]


def test_the_import_benchmark_writes_what_it_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(imports.VISITS, "smoke", 1)
    monkeypatch.setattr(imports, "STATEMENTS", imports.STATEMENTS | {"jax": "pass", "theorykit kernel": "pass"})
    imports.main("smoke", tmp_path)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert content["seconds"].keys() == {"interpreter", "jax", "theorykit", "theorykit kernel"}
    assert content["ratio_to_jax"].keys() == {"interpreter", "theorykit", "theorykit kernel"}
    assert content["unwanted"] == {"theorykit": [], "theorykit kernel": []}
    assert content["targets"][0]["limit"] == 1.25


def test_an_import_that_fails_or_is_unwanted_is_reported():
    with pytest.raises(RuntimeError, match=r"failed in a fresh interpreter: [\s\S]*No module named 'nowhere'"):
        imports.interpret("import nowhere")
    assert imports.loaded("import sys; sys.modules['sklearn'] = sys") == ["sklearn"]
