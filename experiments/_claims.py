"""A claim together with its controls."""

from collections.abc import Callable

from theorykit import verify


def pair(check: Callable, name: str, statement: str, source: str, sides: tuple, *broken: tuple) -> list[verify.Verdict]:
    """Verdicts of a claim and of its controls, by one check of the arguments `sides`.

    broken : (why, sides) of each control: what is broken, and the arguments then.
    """
    found = [check(verify.Claim(name, statement, source), *sides)]
    for i, (why, other) in enumerate(broken):
        control = f"{name}.control{i + 1 if len(broken) > 1 else ''}"
        found.append(check(verify.Claim(control, f"{statement}: {why}", source, "control", name), *other))
    return found
