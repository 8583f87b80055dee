"""What the command lines of experiments, figures and `make figures` share: their options and the refusal of names."""

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

Preset = Annotated[str, tyro.conf.arg(help="size of the computation: smoke, quick, full or paper")]
Names = Annotated[tuple[str, ...], tyro.conf.arg(help="those to take; all of them when absent")]


def chosen(kind: str, names: Sequence[str], known: Sequence[str]) -> list[str] | None:
    """The names to take in the order of the known ones, all of them if none is named.

    A name that is not known is reported on stderr beside the known ones, and None returned: the exit status is then 2.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"no {kind} {', '.join(unknown)}: choose from {', '.join(known)}", file=sys.stderr)
        return None
    return [name for name in known if not names or name in names]
