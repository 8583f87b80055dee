"""What `make figures` runs: each experiment, its figure as soon as it is computed, at the end the table of verdicts.

The experiments and the figures know nothing of each other beyond the results store; this script knows both.
"""

import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments.__main__ import main as experiments_main
from paper_figures.__main__ import experiments_of, made, output_folder
from paper_figures.__main__ import main as figures_main
from theorykit import results, verify
from theorykit._command_line import Names, Preset, chosen


def main(
    arguments: Sequence[str] | None = None,
    *,
    figures: str = "paper_figures",
    experiments: str = "experiments",
    output: Path | None = None,
) -> int:
    """Compute, draw and verify; the exit status is 0 if all worked and every verdict is as expected.

    Parameters
    ----------
    arguments
        Words of the command line; by default those of the process.
    figures, experiments
        Packages that hold the figures and the experiments.
    output
        Folder of the pictures, as for ``python -m paper_figures``.
    """
    known: tuple[str, ...] = importlib.import_module(figures).FIGURES

    def regenerate(preset: Preset = "quick", names: Names = ()) -> int:
        """Compute what the store lacks, draw each figure once its results are there, print the verdicts."""
        taken = chosen("figure", names, known)
        if taken is None or not made(output_folder(figures, output)):
            return 2
        words = ("--preset", preset, "--names")
        failed, used = False, {}
        for name in taken:
            try:
                needed = experiments_of(importlib.import_module(f"{figures}.{name}"))
            except Exception:  # whatever it is, the other figures are still made
                traceback.print_exc()
                failed = True
                continue
            used |= dict.fromkeys(needed)
            # A status of 0 is success; a figure whose experiment failed is not drawn.
            failed |= bool(
                experiments_main(("run", *words, *needed), package=experiments)
                or figures_main((*words, name), package=figures, experiments=experiments, output=output)
            )
        print()
        if not names:
            return experiments_main(("verify", "--preset", preset), package=experiments) or int(failed)
        if failed:
            return 1
        verdicts = [v for name in used for v in results.load(name, preset, package=experiments).verdicts]
        print(verify.table(verdicts))
        return 0 if all(verdict.as_expected for verdict in verdicts) else 1

    return tyro.cli(regenerate, prog="python regenerate.py", args=arguments)


if __name__ == "__main__":
    sys.exit(main())
