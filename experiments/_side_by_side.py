"""Independent cells of an experiment two at a time: while one is compiled, which takes one core, another computes."""

import contextvars
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial, wraps

import jax

from theorykit import results

# Compiler options of programs that run for a moment only: without LLVM's optimisations they compile in half the time.
BRIEFLY = {"xla_backend_optimization_level": 0}
# More than two would compete for memory at large widths, and XLA's own threads already share a computation.
WORKERS = 2


def side_by_side(function: Callable, cells: Iterable[Sequence]) -> list:
    """[function(*cell) for cell in cells]; the results do not depend on the order in which cells end.

    No cell may depend on another. The first error stops what has not begun. Threads start with jax's defaults, so the
    caller's precision is set again in each.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        return _results(pool, [_begin(pool, partial(function, *cell)) for cell in cells])


def side_by_side_after(cells: Mapping[str, tuple[Callable, Sequence[str]]], workers: int = WORKERS) -> dict:
    """Values {label: function(*values of the labels it needs)} of cells {label: (function, labels)}.

    A cell comes after those that it needs. Cells begin in the order given, so one that waits for another waits for a
    cell that has begun: give first what others need. Where each cell takes all devices, let one worker do them in turn.
    """
    begun = {}

    def call(function, needed):
        return function(*(future.result() for future in needed))

    with ThreadPoolExecutor(workers) as pool:
        for label, (function, labels) in cells.items():
            begun[label] = _begin(pool, partial(call, function, [begun[needed] for needed in labels]))
        return dict(zip(begun, _results(pool, list(begun.values())), strict=True))


def kept(label: str, function: Callable) -> Callable:
    """The function of a cell, its value kept as a part of the result."""
    return lambda *needed: results.part(label, partial(function, *needed))


def _begin(pool, function):
    x64, context = jax.config.jax_enable_x64, contextvars.copy_context()

    def call():
        with jax.enable_x64(x64):
            return context.run(function)

    return pool.submit(call)


def _results(pool, begun):
    try:
        return [future.result() for future in begun]
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def one_object(function: Callable) -> Callable:
    """functools.cache that makes each object once, also when two threads ask: compiled programs are kept per object."""
    cached, lock = cache(function), threading.RLock()

    @wraps(function)
    def locked(*args, **kwargs):
        with lock:
            return cached(*args, **kwargs)

    return locked
