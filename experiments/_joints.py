"""Random finite joints and scores for the experiments on the surrogate, in one shape, and means over all candidates.

Alphabets of several sizes are parts of one table whose other rows and columns are empty, so that one compiled program
serves them all. What is drawn and enumerated here is NumPy: it shares no code with the library that it is held against.
"""

import functools
import itertools
import math

import numpy as np
from scipy.special import gammaln, xlogy

SHAPE = (6, 4)
SIZES = ((2, 2), (3, 4), (6, 3), (4, 4), (5, 2))  # taken in turn
DEVIATIONS = (0.3, 1.0, 2.0)  # of the scores, in nats, taken in turn
# Added to a kept cell, whose mean is 1/2 to 2: it keeps sufficiencies above about 1e-4 of a risk, so that a difference
# of two risks, exact to 1e-14, has ten digits.
_LEAST = 0.02
_ZEROS = 0.3  # share of empty cells, in every other joint


def table(rng, nx, ny, concentration, *, zeros, least=0.0):
    """A joint (nx, ny) from gamma weights, `least` added, with a share of its cells empty but no row or column."""
    weights = rng.gamma(concentration, size=(nx, ny)) + least
    kept = rng.uniform(size=(nx, ny)) >= zeros
    longest = np.arange(max(nx, ny))
    kept[rng.permutation(nx)[longest % nx], rng.permutation(ny)[longest % ny]] = True
    return weights * kept / np.sum(weights * kept)


def draw(rng, count):
    """Joints and scores (count, *SHAPE), and codes of x (count, nx), two encoders for each joint."""
    joints, scores = np.zeros((count, *SHAPE)), np.zeros((count, *SHAPE))
    codes = np.zeros((2, count, SHAPE[0]), int)
    for i in range(count):
        nx, ny = SIZES[i % len(SIZES)]
        concentration = (0.5, 1.0, 2.0)[(i // 5) % 3]
        joints[i, :nx, :ny] = table(rng, nx, ny, concentration, zeros=_ZEROS if i % 2 else 0.0, least=_LEAST)
        scores[i] = DEVIATIONS[(i // 7) % len(DEVIATIONS)] * rng.standard_normal(SHAPE)
        codes[:, i] = rng.integers(0, 2, (2, SHAPE[0]))
        codes[:, i, :nx] = [rng.permutation(np.arange(nx) % max(1, nx // 2)) for _ in range(2)]
    return joints, scores, codes


def ratios(joint, score):
    """p, q, r = P/(p q) and w = e^s / E_q e^s of a table without empty rows or columns."""
    p, q = joint.sum(axis=1), joint.sum(axis=0)
    shifted = np.exp(score - score.max(axis=1, keepdims=True))
    return p, q, joint / (p[:, None] * q[None, :]), shifted / (shifted @ q)[:, None]


def candidate_means(joint, score, candidates, *, normalised=True):
    """Chance (T,), m_r and m_w (nx, T) of every multiset of K candidates drawn from q, and p (nx,)."""
    p, q, r, w = ratios(joint, score)
    if not normalised:
        w = np.exp(score)
    counts = _counts(candidates, len(q))
    log_chance = gammaln(candidates + 1) - gammaln(counts + 1).sum(axis=1) + counts @ np.log(q)
    return p, np.exp(log_chance), r @ counts.T / candidates, w @ counts.T / candidates


def gap(joint, score, candidates, *, normalised=True):
    """gap_K = KL(M_K^P || M_K^s) as a sum over all multisets of candidates."""
    p, chance, m_r, m_w = candidate_means(joint, score, candidates, normalised=normalised)
    # Where m_w = 0 the score rules out what never happens, and m_r = 0 too.
    quotient = np.divide(m_r, m_w, out=np.ones_like(m_r), where=(m_r > 0) & (m_w > 0))
    return float(p @ (xlogy(m_r, quotient) - m_r + m_w) @ chance)


def sets(candidates, symbols):
    """Number of multisets."""
    return math.comb(candidates + symbols - 1, symbols - 1)


@functools.cache
def _counts(candidates, symbols):
    """How often each symbol is among K candidates, (T, symbols), by stars and bars."""
    places = candidates + symbols - 1
    bars = np.array(list(itertools.combinations(range(places), symbols - 1)), int).reshape(-1, symbols - 1)
    ends = np.full((len(bars), 1), -1), np.full((len(bars), 1), places)
    return np.diff(np.concatenate([ends[0], bars, ends[1]], axis=1), axis=1) - 1
