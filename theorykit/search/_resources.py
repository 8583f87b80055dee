"""What a long build owes its caller: a refusal before the work if memory cannot suffice, and a line of progress."""

from tqdm import tqdm

from theorykit._memory import free_bytes
from theorykit.search._nn_descent import AROUND

LONG_BUILD = 50_000  # rows from which a build shows its progress: seconds on two cores


def build_bytes(n: int, d: int, degree: int, candidates: int) -> int:
    """Estimate of the bytes that a build holds at its peak, rows and result included.

    Rows twice (as given, and centred or with one more coordinate) and their codes; four lists of neighbours with their
    distances: old and new ones, and blocks while they are put together, with room for what a block computes; and the
    edges that are sorted for the reverse lists, twice, with two numbers each.
    """
    edges = max(2 * AROUND, degree)
    return n * (4 * d + 4 * (d + 1) + d + 4 * 8 * candidates + 2 * 8 * edges)


def check_memory(where: str, n: int, d: int, degree: int, candidates: int, memory: int | None) -> None:
    """Raise MemoryError, with numbers, if a build needs more than `memory`, or by default than what is free."""
    needed = build_bytes(n, d, degree, candidates)
    have = free_bytes() if memory is None else memory
    if have is not None and needed > have:
        raise MemoryError(
            f"{where}: {n:,} rows of dimension {d} with degree {degree} need about {needed / 2**30:.2f} GiB and "
            f"{have / 2**30:.2f} GiB are {'free' if memory is None else 'allowed'}; build graphs of parts of the rows, "
            "take a smaller degree, or a machine with more memory"
        )


class Stages:
    """A line that counts the stages of a build of n rows and names the one at work; shown for long builds."""

    def __init__(self, title: str, n: int, progress: bool | None):
        shown = n >= LONG_BUILD if progress is None else progress
        self.bar = tqdm(desc=title, unit=" stages", disable=not shown)

    def __enter__(self):
        return self.tell

    def tell(self, what: str) -> None:
        """Say what begins now."""
        self.bar.set_postfix_str(what, refresh=False)
        self.bar.update()

    def __exit__(self, *_):
        self.bar.close()
