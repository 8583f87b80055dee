"""Independent cells of an experiment two at a time: while one is compiled, which takes one core, another computes."""

import contextvars
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps

import jax

# Compiler options of programs that run for a moment only: without LLVM's optimisations they compile in half the time.
BRIEFLY = {"xla_backend_optimization_level": 0}
# More than two would compete for memory at large widths, and XLA's own threads already share a computation.
WORKERS = 2


def side_by_side(function: Callable, cells: Iterable[Sequence]) -> list:
    """[function(*cell) for cell in cells]; the results do not depend on the order in which cells end.

    No cell may depend on another. The first error stops what has not begun. Threads start with jax's defaults, so the
    caller's precision is set again in each.
    """
    x64 = jax.config.jax_enable_x64

    def call(context, cell):
        with jax.enable_x64(x64):
            return context.run(function, *cell)

    with ThreadPoolExecutor(WORKERS) as pool:
        begun = [pool.submit(call, contextvars.copy_context(), cell) for cell in cells]
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
