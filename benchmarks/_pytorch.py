"""PyTorch as a peer: whether it is there, its version, and on how many threads it is timed."""

import importlib.util
import os

# All and one: small operations are often faster on one.
THREADS = tuple(sorted({1, os.cpu_count() or 1}))
MISSING = "PyTorch is not installed, so there is nothing to compare with: pip install torch (CPU), then run again"


def about() -> dict | str:
    """Version and threads, or that it is missing."""
    if not available():
        return MISSING
    import torch

    return {"torch": torch.__version__, "threads": THREADS}


def available() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("torch") is not None


def name(threads: int) -> str:
    """Of the contestant with this number of threads."""
    return f"PyTorch, {threads} thread{'s' * (threads > 1)}"
