r"""gap_K of a score by sampling, for any number of candidates: what S is beyond Excess_K, by no formula for S or R_K.

With candidates y_1..y_K of x, r = P / (p q) and w = e^s / sum_y q e^s, truth and model give the candidates densities
T = mean_j r(x, y_j) and M = mean_j w(x, y_j) against independent draws from q. gap_K is the divergence of the two,

    gap_K = E_T[ln T - ln M] = E_T[u - 1 - ln u],      u = M / T,

since E_T[u] = 1. Under T one candidate, the first without loss, is the partner of x and the others are independent. The
terms of the second form are of second order in the error of the score and positive, so that a small gap takes no more
draws than a large one. NumPy in float64, with nothing in common with `theorykit.surrogate` but the law and the score.
"""

import numpy as np


def both_directions(laws: np.ndarray, tables: np.ndarray, counts: tuple[int, ...], drawn: int, batches: int):
    """gap_K of x and of y added, from independent batches; gap, half (laws, tables, counts, batches).

    half: of half as many candidates, from a quarter of the draws. laws (laws, nx, ny), tables (laws, tables, nx, ny);
    drawn is the number of candidates in a batch.
    """
    found = {name: np.zeros((*tables.shape[:2], len(counts), batches)) for name in ("gap", "half")}
    for at in np.ndindex(*found["gap"].shape):
        law, table, k = laws[at[0]], tables[at[:2]], counts[at[2]]
        for side, both in enumerate([(law, table), (law.T, table.T)]):
            found["gap"][at] += gap(*both, k, drawn // k, [*at, side])
            found["half"][at] += gap(*both, k // 2, drawn // (4 * k), [*at, side])
    return found


def gap(law: np.ndarray, table: np.ndarray, candidates: int, draws: int, seed: list[int]):
    """Mean of the terms of gap_K over independent draws, scalar.

    Parameters
    ----------
    law, table : (nx, ny)
        P(x, y), without empty cells, and scores; gap_K gives x and seeks y.
    seed : whole numbers
        Equal seeds draw equal numbers.
    """
    law, table = law / law.sum(dtype=np.float64), np.asarray(table, np.float64)
    p, q = law.sum(axis=1), law.sum(axis=0)
    r = law / (p[:, None] * q[None, :])
    w = np.exp(table - table.max(axis=1, keepdims=True))
    w /= (w @ q)[:, None]
    random = np.random.default_rng(seed)
    # Pairs are stratified: one in each of equal parts of the distribution.
    x, first = np.divmod(_of(law.ravel(), (np.arange(draws) + random.random(draws)) / draws), q.size)
    y = _of(q, random.random((draws, candidates)))
    y[:, 0] = first
    u = w[x[:, None], y].mean(axis=1) / r[x[:, None], y].mean(axis=1)
    return np.mean(u - 1 - np.log(u))


def _of(law, uniform):
    """Places of uniform numbers by the distribution function."""
    ends = np.cumsum(law)
    # The last end may be a rounding below 1.
    return np.minimum(np.searchsorted(ends / ends[-1], uniform, side="right"), law.size - 1)
