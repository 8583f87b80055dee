"""The k smallest of a row: the first of all pairs (value, position), in every dtype and at every length."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from benchmarks.search_gpu import longest_sort_of
from theorykit.search import select

DTYPES = ["float32", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "uint32"]


def first(values, k):
    """The oracle: a stable sort."""
    ids = np.argsort(np.asarray(values), axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(np.asarray(values), ids, axis=-1), ids


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(DTYPES), st.sampled_from([(1,), (3, 7), (2, 2, 33)]), st.integers(0, 2**31), st.data())
def test_the_smallest_are_the_first_of_a_stable_sort(dtype, shape, seed, data):
    k = data.draw(st.sampled_from([0, 1, shape[-1] // 2, shape[-1]]))
    # Few values: many ties. Unsigned dtypes wrap, so that their largest numbers occur.
    numbers = np.random.default_rng(seed).integers(-3, 4, size=shape).astype(np.dtype(jnp.dtype(dtype)))
    values, ids = select.smallest(jnp.asarray(numbers), k)
    assert values.dtype == jnp.dtype(dtype) and ids.dtype == jnp.int32
    expected, where = first(numbers, k)
    np.testing.assert_array_equal(np.asarray(values), expected)
    np.testing.assert_array_equal(ids, where)


def test_wide_integers_are_not_rounded():
    numbers = jnp.array([[2**24 + 1, 2**24, 2**31 - 1, -(2**31)]], jnp.int32)
    assert select.smallest(numbers, 4)[1].tolist() == [[3, 1, 0, 2]]


def test_doubles_are_not_rounded(x64):
    numbers = jnp.array([1.0 + 1e-12, 1.0, jnp.inf, -jnp.inf])
    assert select.smallest(numbers, 4)[1].tolist() == [3, 1, 0, 2]


def test_infinities_are_values_and_zeros_have_no_sign():
    numbers = jnp.array([jnp.inf, 0.0, -0.0, -jnp.inf, jnp.inf], jnp.float32)
    assert select.smallest(numbers, 5)[1].tolist() == [3, 1, 2, 0, 4]


@pytest.mark.parametrize("kind", ["random", "few values", "equal", "descending", "infinite"])
def test_two_stages_are_exact_with_ties(kind):
    # Accelerators take this way; the number of columns is no multiple of the block.
    generator = np.random.default_rng(0)
    rows = {
        "random": generator.normal(size=(4, 1000)),
        "few values": generator.integers(0, 40, size=(4, 1000)),
        "equal": np.ones((4, 1000)),
        "descending": -np.sort(-generator.normal(size=(4, 1000)), axis=1),
        "infinite": np.where(np.arange(1000) % 300 == 7, generator.normal(size=(4, 1000)), np.inf),
    }[kind].astype(np.float32)
    ids = jax.jit(select._stages, static_argnums=1)(jnp.asarray(rows), 9)
    np.testing.assert_array_equal(ids, first(rows, 9)[1])


def test_merging_the_lists_of_parts_gives_that_of_the_whole():
    rows = np.random.default_rng(1).integers(0, 6, size=(5, 12)).astype(np.float32)
    a, b = (select.smallest(jnp.asarray(part), 4) for part in (rows[:, :5], rows[:, 5:]))
    values, ids = select.merge(*a, b[0], b[1] + 5, 4)
    expected, where = first(rows, 4)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(ids, where)


@pytest.mark.parametrize("k", [-1, 4])
def test_a_k_beyond_the_row_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k} for rows of 3 numbers; it lies between 0 and 3"):
        select.smallest(jnp.zeros((2, 3)), k)


def test_no_full_sort_stands_where_a_selection_should():
    def lowest(rows):
        # What the search does: a slice of the selection, which the compiler likes to merge with it into a sort.
        values, ids = select.smallest(rows, 9)
        return values[:, 8], ids[:, :8]

    text = jax.jit(lowest).lower(jnp.zeros((16, 4096))).compile().as_text()
    assert " sort(" not in text and "TopK" in text


def text_of(function, shape):
    return jax.jit(function).lower(jnp.zeros(shape)).compile().as_text()


@pytest.mark.parametrize(("function", "longest"), [
    (lambda x: jnp.sort(x, axis=1), 37),
    (lambda x: jnp.sort(x, axis=0), 5),
    # One sort of numbers together with their places.
    (lambda x: jnp.argsort(x, axis=1), 37),
    (lambda x: (jnp.sort(x[:, :9], axis=1), jnp.sort(x, axis=0)), 9),
    (lambda x: x + 1, 0),
])  # fmt: skip
def test_the_longest_sort_of_a_compiled_program_is_found(function, longest):
    assert longest_sort_of(text_of(function, (5, 37))) == longest


def test_a_sort_by_radix_counts_and_a_selection_does_not():
    # As programs for GPUs name them.
    radix = '%s = (f32[64,4096]{1,0}, u8[767]{0}) custom-call(%x), custom_call_target="__cub$DeviceRadixSort"'
    selection = '%t = (f32[64,16]{1,0}, s32[64,16]{1,0}) custom-call(%x), custom_call_target="__gpu$TopK"'
    assert longest_sort_of(f"{selection}\n{radix}") == 4096
    assert longest_sort_of(selection) == 0
    assert longest_sort_of(text_of(lambda x: select.smallest(x, 9)[0], (16, 4096))) == 0
