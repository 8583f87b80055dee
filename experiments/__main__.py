"""Command line of the experiments: ``python -m experiments run|verify|list``."""

import importlib
import sys
import time
import traceback
from collections.abc import Sequence

import jax
import tyro

from theorykit import results, verify
from theorykit._command_line import Names, Preset, chosen


def main(arguments: Sequence[str] | None = None, *, package: str = "experiments") -> int:
    """Run the command line and return the exit status: 0 if all went well and every verdict is as expected.

    Parameters
    ----------
    arguments
        Words of the command line; by default those of the process.
    package
        Package that holds the experiments, with a tuple ``ORDER`` of their names.
    """
    order: tuple[str, ...] = importlib.import_module(package).ORDER

    def run(preset: Preset = "quick", names: Names = ()) -> int:
        """Compute what the store lacks, cheapest first; a failure does not stop the others."""
        taken = chosen("experiment", names, order)
        if taken is None:
            return 2
        _, failed = _results(taken, preset, package)
        return 1 if failed else 0

    def verify_all(preset: Preset = "quick") -> int:
        """Print all verdicts and write them to verdicts.json in the store; fail if one is not as expected."""
        found, failed = _results(order, preset, package)
        verdicts = [verdict for result in found for verdict in result.verdicts]
        print(verify.table(verdicts))
        if failed:  # a list that lacks an experiment would look complete
            print("verdicts.json was not written, since experiments failed", file=sys.stderr)
            return 1
        results.write_verdicts(verdicts)
        return 0 if all(verdict.as_expected for verdict in verdicts) else 1

    def list_all() -> int:
        """List the experiments and their presets."""
        for name in order:
            presets = importlib.import_module(f"{package}.{name}").PRESETS
            print(f"{name}: {', '.join(presets)}")
        return 0

    return tyro.extras.subcommand_cli_from_dict(
        {"run": run, "verify": verify_all, "list": list_all}, prog="python -m experiments", args=arguments
    )


def _results(names: Sequence[str], preset: str, package: str) -> tuple[list[results.Result], list[str]]:
    """Results of the named experiments, and the names of those that failed."""
    found, failures = [], {}
    for name in names:
        start = time.perf_counter()
        try:
            try:
                result = results.load(name, preset, package=package)
                how = "from the store"
            except results.MissingResult:
                print(f"{name} {preset}: computing", flush=True)
                result = results.run(name, preset, package=package)
                how = "computed"
                # The programs of thirty experiments together take more memory maps than Linux allows a process.
                jax.clear_caches()
            found.append(result)
            print(f"{name} {preset}: {how}, {time.perf_counter() - start:.1f} s", flush=True)
        except Exception as error:  # whatever it is, the other experiments still run
            if not isinstance(error, results.EXPLAINED):
                traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {error}"
            print(f"{name} {preset}: failed", flush=True)
    for name, why in failures.items():
        print(f"FAILED {name}: {why}", file=sys.stderr)
    return found, list(failures)


if __name__ == "__main__":
    sys.exit(main())
