"""Command line of the figures: ``python -m paper_figures`` writes ``paper_figures/output/*.pdf`` and ``*.png``."""

import importlib
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import tyro

from theorykit import results
from theorykit._command_line import Names, Preset, chosen

# Neither the date nor the version of Matplotlib goes into a file, so that the same results give the same bytes.
METADATA = {"pdf": {"CreationDate": None}, "png": {"Software": None}}


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
    folder = output or Path(home.__file__).parent / "output"

    def draw_all(preset: Preset = "quick", names: Names = ()) -> int:
        """Draw figures from stored results."""
        taken = chosen("figure", names, figures)
        if taken is None:
            return 2
        matplotlib.use("Agg")
        if importlib.util.find_spec(f"{package}.style"):
            importlib.import_module(f"{package}.style").use()
        folder.mkdir(parents=True, exist_ok=True)
        failures = {}
        for name in taken:
            start = time.perf_counter()
            try:
                _draw(f"{package}.{name}", preset, experiments, folder / name)
                print(f"{name} {preset}: drawn, {time.perf_counter() - start:.1f} s", flush=True)
            except Exception as error:  # whatever it is, the other figures are still drawn
                if not isinstance(error, results.EXPLAINED):
                    traceback.print_exc()
                failures[name] = f"{type(error).__name__}: {error}"
        for name, why in failures.items():
            print(f"FAILED {name}: {why}", file=sys.stderr)
        return 1 if failures else 0

    return tyro.cli(draw_all, prog="python -m paper_figures", args=arguments)


def _draw(module: str, preset: str, experiments: str, target: Path) -> None:
    """Draw one figure as PDF and PNG; each file is replaced whole."""
    script = importlib.import_module(module)
    names = script.EXPERIMENTS if hasattr(script, "EXPERIMENTS") else (script.EXPERIMENT,)
    figure = script.draw(*(results.load(name, preset, package=experiments) for name in names))
    for kind, metadata in METADATA.items():
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{kind}")
        try:
            figure.savefig(temporary, format=kind, metadata=metadata)
            os.replace(temporary, target.with_name(f"{target.name}.{kind}"))
        finally:
            temporary.unlink(missing_ok=True)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
