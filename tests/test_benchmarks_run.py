"""Every benchmark at its smallest: it runs, and writes what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Those of the kernel and of the import are tested piece by piece in test_benchmarks.
BENCHMARKS = [
    "hierarchy",
    "learned_gpu",
    "search_exact",
    "search_gpu",
    "search_graph",
    "spectral",
    "surrogate_risk",
    "training",
]
NEEDED = {"search_exact": "faiss"}  # without this peer nothing is measured


def test_every_benchmark_is_here_or_has_tests_of_its_own():
    modules = {path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py")}
    assert modules == {*BENCHMARKS, "imports", "ntk"}


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_and_names_its_machine(name, tmp_path):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    command = [sys.executable, "-m", f"benchmarks.{name}", "--preset", "smoke", "--output", str(tmp_path)]
    # Nothing is read off these times, and most of the run is compilation.
    cheaply = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=cheaply)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert content["benchmark"] == name and content["preset"] == "smoke"
    assert content["machine"]["versions"]["jax"] and "/" not in json.dumps(content["machine"])
    for target in content["targets"]:
        assert {"statement", "met"} <= target.keys()
        assert target["statement"] in done.stdout + done.stderr
