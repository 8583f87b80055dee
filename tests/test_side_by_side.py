"""Cells of an experiment that run two at a time, and those that wait for others."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from experiments._side_by_side import side_by_side, side_by_side_after


def test_values_come_in_the_order_of_the_cells_whichever_ends_first():
    def slow(i):
        time.sleep(0.02 * (3 - i))
        return i

    assert side_by_side(slow, [(i,) for i in range(4)]) == [0, 1, 2, 3]


def test_cells_compute_in_the_precision_of_the_caller():
    with jax.enable_x64(True):
        assert side_by_side(lambda: jnp.ones(1).dtype, [()]) == [jnp.float64]
        assert side_by_side_after({"a": (lambda: jnp.ones(1).dtype, ())}) == {"a": jnp.float64}
    assert side_by_side(lambda: jnp.ones(1).dtype, [()]) == [jnp.float32]


def test_a_cell_gets_the_values_that_it_needs_and_comes_after_them():
    ended = []

    def cell(name, seconds):
        def function(*needed):
            time.sleep(seconds)
            ended.append(name)
            return name + "".join(needed)

        return function

    cells = {"a": (cell("a", 0.05), ()), "b": (cell("b", 0.0), ()), "c": (cell("c", 0.0), ("a", "b"))}
    cells |= {"d": (cell("d", 0.0), ("c", "a"))}
    assert side_by_side_after(cells) == {"a": "a", "b": "b", "c": "cab", "d": "dcaba"}
    assert ended == ["b", "a", "c", "d"]


def test_one_worker_takes_the_cells_in_turn():
    running, most = [], []

    def cell(*_):
        running.append(None)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()

    side_by_side_after({"a": (cell, ()), "b": (cell, ()), "c": (cell, ("a",))}, workers=1)
    assert most == [1, 1, 1]


def test_two_cells_run_at_a_time():
    both = threading.Barrier(2, timeout=30)
    cells = {name: (lambda *_: both.wait() >= 0, needed) for name, needed in (("a", ()), ("b", ()))}
    assert side_by_side_after(cells) == {"a": True, "b": True}


def test_an_error_reaches_the_caller_and_stops_what_has_not_begun():
    begun = []

    def fails():
        raise RuntimeError("the first cell failed")

    def waits():
        begun.append("waits")
        time.sleep(0.05)

    cells = {"a": (fails, ()), "b": (lambda _: begun.append("needs a failed cell"), ("a",))}
    cells |= {f"{i}": (waits, ()) for i in range(40)}  # a second of two workers
    with pytest.raises(RuntimeError, match="the first cell failed"):
        side_by_side_after(cells)
    assert "needs a failed cell" not in begun and len(begun) < 40


def test_a_cell_that_needs_a_later_one_is_an_error():
    with pytest.raises(KeyError, match="later"):
        side_by_side_after({"a": (lambda _: None, ("later",)), "later": (lambda: None, ())})
