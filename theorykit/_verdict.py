"""Claims and verdicts, and how they are written: JSON and the text table."""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# The table points out a bound that stays an order of magnitude away at every point.
LOOSE = 10.0
EXPECTED = {"claim": "supported", "control": "refuted", "finding": "refuted"}
OUTCOMES = ("supported", "refuted", "inconclusive")


class _Claim(NamedTuple):
    name: str
    statement: str
    source: str
    role: str = "claim"
    control_of: str | None = None


class Claim(_Claim):
    """What is checked: a name such as "N1.slope", the statement, its source, and the role of the check.

    Raises
    ------
    ValueError
        An empty text, an unknown role, a control that names no claim, or another role that names one.
    """

    __slots__ = ()

    def __new__(cls, name: str, statement: str, source: str, role: str = "claim", control_of: str | None = None):
        for field, text in (("name", name), ("statement", statement), ("source", source)):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"the {field} of claim {name!r} is {text!r}: give a text that is not empty")
        if role not in EXPECTED:
            raise ValueError(f"claim {name!r} has the role {role!r}: use one of {sorted(EXPECTED)}")
        if role == "control" and (not control_of or control_of == name):
            raise ValueError(f"control {name!r} has control_of={control_of!r}: name the claim that it controls")
        if role != "control" and control_of is not None:
            raise ValueError(f"{role} {name!r} has control_of={control_of!r}: leave it out, or use role='control'")
        return super().__new__(cls, name, statement, source, role, control_of)


class Verdict(NamedTuple):
    """The outcome of one check; `experiment` and `preset` are filled by the results store."""

    claim: str
    statement: str
    source: str
    kind: str
    role: str
    control_of: str | None
    outcome: str
    as_expected: bool
    measured: float
    low: float
    high: float
    predicted: float
    margin: float
    experiment: str | None
    preset: str | None
    details: dict[str, Any]


def to_json(verdicts: Sequence[Any]) -> str:
    """Write a list of verdicts as standard JSON; a number that is not finite becomes {"non_finite": "nan"}."""
    if isinstance(verdicts, Verdict):
        raise TypeError("to_json takes a list of verdicts: write to_json([verdict])")
    return json.dumps([_tag(verdict._asdict()) for verdict in verdicts], indent=1, allow_nan=False)


def from_json(text: str) -> list[Verdict]:
    """Read what `to_json` wrote.

    Raises
    ------
    ValueError
        A text that is not a list of verdicts.
    """
    try:
        rows = json.loads(text, object_hook=_untag)
        verdicts = [Verdict(**row) for row in rows]
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"the text is not a list of verdicts ({error}): recompute the verdicts") from error
    for verdict in verdicts:
        if verdict.outcome not in OUTCOMES or verdict.as_expected != (EXPECTED.get(verdict.role) == verdict.outcome):
            raise ValueError(f"the stored verdict {verdict.claim!r} contradicts itself: recompute the verdicts")
    return verdicts


def table(verdicts: Sequence[Verdict]) -> str:
    """Verdicts as aligned text of at most 120 columns, then what failed and why, what is noteworthy, and a count."""
    if not verdicts:
        return "no verdicts"
    head = ("", "claim", "role", "outcome", "measured [low, high]", "predicted")
    rows = [
        ("ok" if v.as_expected else "FAIL", v.claim, v.role, v.outcome, _measured_text(v), _predicted_text(v))
        for v in verdicts
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    widths[1] = min(widths[1], 120 - sum(widths) + widths[1] - 2 * (len(head) - 1))
    lines, place = [_line(head, widths), "-" * (sum(widths) + 2 * (len(head) - 1))], None
    for verdict, row in zip(verdicts, rows, strict=True):
        if verdict.experiment and (verdict.experiment, verdict.preset) != place:
            place = (verdict.experiment, verdict.preset)
            lines.append(f"{verdict.experiment} ({verdict.preset})")
        lines.append(_line(row, widths))
    lines.append("")
    failed = [verdict for verdict in verdicts if not verdict.as_expected]
    for v in failed:
        lines.append(f"FAIL {v.claim}: {v.outcome}, expected {EXPECTED[v.role]}: {v.statement} ({v.source})")
    lines += [f"note {v.claim}: {note}" for v in verdicts for note in _notes(v)]
    lines.append(f"{len(verdicts)} verdicts, {len(verdicts) - len(failed)} as expected, {len(failed)} not")
    return "\n".join(lines)


def _tag(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tag(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_tag(item) for item in value]
    return {"non_finite": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _untag(row: dict[str, Any]) -> Any:
    return float(row["non_finite"]) if row.keys() == {"non_finite"} else row


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    short = (c if len(c) <= width else c[: width - 1] + "…" for c, width in zip(cells, widths, strict=True))
    return "  ".join(c.ljust(width) for c, width in zip(short, widths, strict=True)).rstrip()


def _measured_text(v: Verdict) -> str:
    return f"{v.measured:.4g}" if v.low == v.high else f"{v.measured:.4g} [{v.low:.4g}, {v.high:.4g}]"


def _predicted_text(v: Verdict) -> str:
    side = v.details["side"]
    if side == "more_than":
        return f"> {v.margin:.4g}"
    if side == "equal":
        return f"{v.predicted:.4g} ± {v.margin:.4g}"
    relation, sign, end = ("<=", "+", v.margin) if side == "at_most" else (">=", "-", 0.0 - v.margin)
    if not v.predicted:
        return f"{relation} {end:.4g}"
    return f"{relation} {v.predicted:.4g}" + (f" {sign} {v.margin:.4g}" if v.margin else "")


def _notes(v: Verdict) -> list[str]:
    notes = [v.details["reason"]] if "reason" in v.details else []
    if v.details.get("zero_spread"):
        notes.append("identical replicates: one deterministic measurement, or one key used for all seeds")
    if (v.details.get("loose") or 0) >= LOOSE:
        notes.append(f"the bound is loose by {v.details['loose']:.3g} at its tightest point")
    return notes


def plain(value: Any) -> Any:
    """NumPy values as the plain ones that JSON gives back."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
