"""Time of ``import theorykit`` beside ``import jax``, in fresh interpreters that take turns.

python -m benchmarks.imports --preset quick
"""

import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import _timing

STATEMENTS = {
    "interpreter": "pass",
    "jax": "import jax",
    "theorykit": "import theorykit",
    "theorykit kernel": "import theorykit; theorykit.ntk.empirical_ntk",
}
# Heavy packages that neither theorykit nor its kernel may pull in.
UNWANTED = ("neural_tangents", "tensorflow", "sklearn", "matplotlib")
VISITS = {"smoke": 2, "quick": 15, "full": 50}
MOST = 1.25  # times `import jax`


def interpret(code: str) -> str:
    """Run one line in a fresh interpreter at the repository's root and return what it prints."""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{code}` failed in a fresh interpreter: {done.stderr.strip()}")
    return done.stdout


def loaded(statement: str) -> list[str]:
    """Which of the unwanted packages a statement brings along."""
    return interpret(f"{statement}; import sys; print(*[n for n in {UNWANTED} if n in sys.modules])").split()


def measure(visits: int) -> dict[str, Any]:
    """Wall time of every statement, the ratios to ``import jax``, and the unwanted packages that came along."""
    before = _timing.load()
    # One call per visit: each starts an interpreter. The warm-up writes bytecode and fills the disk's cache.
    budget = _timing.Budget(visits, visit_seconds=0.0, patience=math.inf)
    contestants = {name: partial(interpret, code) for name, code in STATEMENTS.items()}
    times = {name: samples.wall for name, samples in _timing.interleave(contestants, budget, "imports").items()}
    ratios = {name: _timing.ratio(times[name], times["jax"]) for name in STATEMENTS if name != "jax"}
    statement = f"import theorykit takes at most {MOST} times as long as import jax"
    target = _timing.target(statement, MOST, ratios["theorykit"], at_least=False)
    return {
        "statements": STATEMENTS,
        "seconds": {name: _timing.summary(values) for name, values in times.items()},
        "ratio_to_jax": ratios,
        "unwanted": {name: loaded(STATEMENTS[name]) for name in ("theorykit", "theorykit kernel")},
        "load": [before, _timing.load()],
        "targets": [target],
    }


def main(preset: Literal["smoke", "quick", "full"] = "quick", output: Path = _timing.RESULTS) -> None:
    """Time the imports and write the JSON file.

    Parameters
    ----------
    preset
        Number of rounds: smoke 2, quick 15, full 50.
    output
        Folder of the JSON file.
    """
    content = measure(VISITS[preset])
    path = _timing.write("imports", preset, output, content)
    for name, seconds in content["seconds"].items():
        print(f"{STATEMENTS[name]:50s} {seconds['median']:.3f} s ({seconds['low']:.3f} to {seconds['high']:.3f})")
    _timing.print_targets(content["targets"])
    print(f"written to {path}")
    unwanted = {package for packages in content["unwanted"].values() for package in packages}
    if unwanted:
        sys.exit(f"importing theorykit also imports {', '.join(sorted(unwanted))}: make that import lazy")


if __name__ == "__main__":
    tyro.cli(main)
