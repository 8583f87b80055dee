"""Command line of the figures: ``python -m paper_figures`` writes ``paper_figures/output/*.pdf`` and ``*.png``."""

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import matplotlib
import matplotlib.pyplot as plt
import tyro

import theorykit
from theorykit import results
from theorykit._command_line import Names, Preset, chosen

# Neither the date nor the version of Matplotlib goes into a file, so that the same results give the same bytes. What a
# picture was drawn from does.
METADATA = {"pdf": {"CreationDate": None}, "png": {"Software": None}}
ORIGIN = {"pdf": "Subject", "png": "Description"}


def main(
    arguments: Sequence[str] | None = None,
    *,
    package: str = "paper_figures",
    experiments: str = "experiments",
    output: Path | None = None,
) -> int:
    """Draw figures from stored results and return the exit status: 0 if all were drawn.

    Parameters
    ----------
    arguments
        Words of the command line; by default those of the process.
    package
        Package that holds the figures, with a tuple ``FIGURES`` of their names.
    experiments
        Package that holds the experiments.
    output
        Folder of the pictures; by default ``output`` in the package's folder.
    """
    home = importlib.import_module(package)
    figures: tuple[str, ...] = home.FIGURES
    folder = output_folder(package, output)

    def draw_all(preset: Preset = "quick", names: Names = ()) -> int:
        """Draw figures from stored results; those whose results and code are as they were stay."""
        taken = chosen("figure", names, figures)
        if taken is None:
            return 2
        matplotlib.use("Agg")
        if importlib.util.find_spec(f"{package}.style"):
            importlib.import_module(f"{package}.style").use()
        if not made(folder):
            return 2
        code = _code(package, experiments)
        failures = {}
        for name in taken:
            start = time.perf_counter()
            try:
                script = importlib.import_module(f"{package}.{name}")
                found = [results.load(one, preset, package=experiments) for one in experiments_of(script)]
                origin = f"theorykit {_digest(code, *map(_identity, found))}"
                if _is_drawn(folder / name, origin):
                    print(f"{name} {preset}: as it was", flush=True)
                    continue
                _draw(script, found, folder / name, origin)
                print(f"{name} {preset}: drawn, {time.perf_counter() - start:.1f} s", flush=True)
            except Exception as error:  # whatever it is, the other figures are still drawn
                if not isinstance(error, results.EXPLAINED):
                    traceback.print_exc()
                failures[name] = f"{type(error).__name__}: {error}"
        for name, why in failures.items():
            print(f"FAILED {name}: {why}", file=sys.stderr)
        return 1 if failures else 0

    return tyro.cli(draw_all, prog="python -m paper_figures", args=arguments)


def experiments_of(script: ModuleType) -> tuple[str, ...]:
    """Names of the experiments whose results a figure reads."""
    return script.EXPERIMENTS if hasattr(script, "EXPERIMENTS") else (script.EXPERIMENT,)


def output_folder(package: str, output: Path | None = None) -> Path:
    """Where the pictures of a package go."""
    return output or Path(importlib.import_module(package).__file__).parent / "output"


def made(folder: Path) -> bool:
    """Whether the folder is there; says why if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"the folder of the figures cannot be made: {error}; remove what is in its way", file=sys.stderr)
        return False
    return True


def _code(*packages: str) -> str:
    """Digest of all that decides how a result is drawn: the sources of the packages, and Matplotlib."""
    folders = [Path(module.__file__).parent for module in (theorykit, *map(importlib.import_module, packages))]
    sources = (path.read_bytes() for folder in folders for path in sorted(folder.rglob("*.py")))
    return _digest(matplotlib.__version__, *sources)


def _identity(result: results.Result) -> str:
    """What is drawn of a result: which arrays, and verdicts and sizes for marks and captions."""
    verdicts = [repr(verdict) for verdict in result.verdicts]
    parts = result.name, result.preset, dataclasses.asdict(result.config), result.environment["sha256"], verdicts
    return json.dumps(parts, default=repr)


def _digest(*parts: str | bytes) -> str:
    return hashlib.sha256(b"\0".join(p.encode() if isinstance(p, str) else p for p in parts)).hexdigest()


def _files(target: Path) -> dict[str, Path]:
    return {kind: target.with_name(f"{target.name}.{kind}") for kind in METADATA}


def _is_drawn(target: Path, origin: str) -> bool:
    """Whether both files are there and say that they come from this."""
    return all(path.is_file() and origin.encode() in path.read_bytes() for path in _files(target).values())


def _draw(script: ModuleType, found: Sequence[results.Result], target: Path, origin: str) -> None:
    """Draw one figure as PDF and PNG; each file is replaced whole."""
    figure = script.draw(*found)
    for kind, path in _files(target).items():
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{kind}")
        try:
            figure.savefig(temporary, format=kind, metadata=METADATA[kind] | {ORIGIN[kind]: origin})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
