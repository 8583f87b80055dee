"""Bad input to every public function of finite joints and of hierarchies: none lets through what another refuses."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorykit.surrogate import (
    bounds,
    denoisers,
    downstream,
    hierarchy,
    information_loss,
    joint,
    mutual_information,
    pair_hierarchy,
    risk,
)
from theorykit.surrogate.hierarchy import Hierarchy

KEY = jax.random.key(0)
TABLE = jnp.full((2, 3), 1 / 6, jnp.float32)
SCORE = jnp.zeros((2, 3), jnp.float32)
POINTS = jnp.asarray([0.0, 1.0], jnp.float32)
X, Y = jnp.zeros(2, jnp.int32), jnp.zeros(3, jnp.int32)
ONE = jnp.asarray(1.0, jnp.float32)


def takers(modules, wanted):
    """Names of the public functions, as the modules define or export them, that take all the parameters."""
    found = set()
    for module in modules:
        names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
        for name in names:
            value = getattr(module, name)
            if inspect.isfunction(value) and value.__module__.startswith("theorykit.surrogate"):
                found |= {name} if wanted <= set(inspect.signature(value).parameters) else set()
    return found


# A joint and a score --------------------------------------------------------------------------------------------------

ON_JOINTS = (risk, bounds, information_loss, downstream, denoisers, mutual_information, joint)
SCORED = {
    "contrastive_risk": lambda p, s: risk.contrastive_risk(p, s, 2),
    "contrastive_risk_by_enumeration": lambda p, s: risk.contrastive_risk_by_enumeration(p, s, 2),
    "contrastive_risk_by_sampling": lambda p, s: risk.contrastive_risk_by_sampling(p, s, 2, key=KEY, samples=2),
    "excess_risk": lambda p, s: risk.excess_risk(p, s, 2),
    "chain": lambda p, s: bounds.chain(p, s, 2),
    "extremes": bounds.extremes,
    "model_ratio": information_loss.model_ratio,
    "model_conditional": information_loss.model_conditional,
    "sufficiency": information_loss.sufficiency,
    "limiting_risk": information_loss.limiting_risk,
    "variational_risk": information_loss.variational_risk,
    "pair_sufficiency": lambda p, s: information_loss.pair_sufficiency(p, X, Y, s),
    "next_token": lambda p, s: downstream.next_token(p, s, (3,)),
    "zero_shot": lambda p, s: downstream.zero_shot(TABLE, p, s),
    "zero_shot_with_prompts": lambda p, s: downstream.zero_shot_with_prompts(TABLE, p, s, 1, key=KEY, samples=2),
    "prompt_coefficient": lambda p, s: downstream.prompt_coefficient(TABLE, p, s),
    "retrieval": lambda p, s: downstream.retrieval(p, s, 2),
    "denoising": lambda p, s: denoisers.denoising(p, s, POINTS, 1.0),
    "integrated_denoising": lambda p, s: denoisers.integrated_denoising(p, s, POINTS),
    "info_nce": lambda p, s: mutual_information.info_nce(p, s, 2),
    "donsker_varadhan": mutual_information.donsker_varadhan,
    "donsker_varadhan_slack": mutual_information.donsker_varadhan_slack,
    "nwj": mutual_information.nwj,
    "nwj_slack": mutual_information.nwj_slack,
    "interpolated": lambda p, s: mutual_information.interpolated(p, s, 2, 0.5),
}
UNSCORED = {
    "minimal_risk": lambda p: risk.minimal_risk(p, 2),
    "optimal_score": risk.optimal_score,
    "encoder_ratio": lambda p: information_loss.encoder_ratio(p, X),
    "encoder_sufficiency": lambda p: information_loss.encoder_sufficiency(p, X),
    "marginals": joint.marginals,
    "density_ratio": joint.density_ratio,
    "mutual_information": joint.mutual_information,
    "chi_square": joint.chi_square,
    "f_information": lambda p: joint.f_information(p, jnp.square),
    "check_joint": joint.check_joint,
    "nwj_variance": lambda p: mutual_information.nwj_variance(p, 2),
}
# Said to leave the checks to their callers.
UNCHECKED = {"log_model_ratio", "check_score"}


def test_every_function_of_a_joint_and_a_score_is_listed_here():
    assert takers(ON_JOINTS, {"joint", "score"}) - UNCHECKED == set(SCORED)
    assert takers(ON_JOINTS, {"joint"}) - UNCHECKED == set(SCORED) | set(UNSCORED)


@pytest.mark.parametrize("name", SCORED)
def test_bad_scores_are_refused_by_every_function(as_users_run, name):
    for shape in ((3,), (1, 3), (2, 1), (3, 2), ()):
        with pytest.raises(ValueError, match=r"score has shape.*give one score to each cell"):
            SCORED[name](TABLE, jnp.zeros(shape, jnp.float32))
    for value in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match=r"score holds NaN or \+inf"):
            SCORED[name](TABLE, SCORE.at[1, 2].set(value))
    with pytest.raises(TypeError, match=r"score has dtype float16.*cast"):
        SCORED[name](TABLE, SCORE.astype(jnp.float16))
    with pytest.raises(TypeError, match=r"score is a ndarray.*jnp\.asarray"):
        SCORED[name](TABLE, np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("name", SCORED | UNSCORED)
def test_bad_joints_are_refused_by_every_function(as_users_run, name):
    def call(table):
        return SCORED[name](table, SCORE) if name in SCORED else UNSCORED[name](table)

    for table, words in (
        (2 * TABLE, r"joint sums to 2\S*, not to 1"),
        (TABLE.at[0, 0].set(-1 / 6), "joint holds entries that are negative"),
        (TABLE.at[0, 0].set(jnp.nan), "joint holds entries that are negative or not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            call(table)


# Numbers of candidates ------------------------------------------------------------------------------------------------

KERNELS = jnp.full((1, 2, 3, 3), 1 / 3, jnp.float32)
GOOD = Hierarchy(KERNELS, KERNELS, jnp.full(3, 1 / 3, jnp.float32))
LEAVES, NOISY = jnp.zeros((4, 2), jnp.int32), jnp.zeros((4, 2), jnp.float32)
DRAWN = hierarchy.Sample(jnp.zeros(4, jnp.int32), LEAVES, LEAVES)

COUNTED = {
    "contrastive_risk": lambda k: risk.contrastive_risk(TABLE, SCORE, k),
    "contrastive_risk_by_enumeration": lambda k: risk.contrastive_risk_by_enumeration(TABLE, SCORE, k),
    "contrastive_risk_by_sampling": lambda k: risk.contrastive_risk_by_sampling(TABLE, SCORE, k, key=KEY, samples=2),
    "minimal_risk": lambda k: risk.minimal_risk(TABLE, k),
    "excess_risk": lambda k: risk.excess_risk(TABLE, SCORE, k),
    "chain": lambda k: bounds.chain(TABLE, SCORE, k),
    "ceiling_factor": lambda k: bounds.ceiling_factor(ONE, k),
    "floor_factor": lambda k: bounds.floor_factor(ONE, ONE, k),
    "retrieval": lambda k: downstream.retrieval(TABLE, SCORE, k),
    "info_nce": lambda k: mutual_information.info_nce(TABLE, SCORE, k),
    "interpolated": lambda k: mutual_information.interpolated(TABLE, SCORE, k, 0.5),
    "bayes_losses": lambda k: hierarchy.bayes_losses(GOOD, DRAWN, NOISY, 1.0, candidates=k),
    "bayes_risks": lambda k: hierarchy.bayes_risks(GOOD, KEY, 8, candidates=k),
}


def test_every_function_of_a_number_of_candidates_is_listed_here():
    assert takers((*ON_JOINTS, hierarchy), {"candidates"}) == set(COUNTED)


@pytest.mark.parametrize("name", COUNTED)
def test_fewer_than_one_candidate_is_refused_by_every_function(as_users_run, name):
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"candidates is {number}.*give"):
            COUNTED[name](number)


# Leaves and noise -----------------------------------------------------------------------------------------------------

SEEING = {
    ("root_posterior", "image"): lambda bad: hierarchy.root_posterior(GOOD, image=bad, text=LEAVES),
    ("root_posterior", "text"): lambda bad: hierarchy.root_posterior(GOOD, image=LEAVES, text=bad),
    ("beliefs", "leaves"): lambda bad: hierarchy.beliefs(KERNELS, bad),
    ("similarity", "image"): lambda bad: hierarchy.similarity(GOOD, bad, LEAVES),
    ("similarity", "text"): lambda bad: hierarchy.similarity(GOOD, LEAVES, bad),
    ("similarities", "image"): lambda bad: hierarchy.similarities(GOOD, bad, LEAVES),
    ("similarities", "text"): lambda bad: hierarchy.similarities(GOOD, LEAVES, bad),
    ("leaf_posterior", "given"): lambda bad: hierarchy.leaf_posterior(GOOD, NOISY, 1.0, given=bad),
    ("denoise", "given"): lambda bad: hierarchy.denoise(GOOD, NOISY, 1.0, given=bad),
    ("next_token", "text"): lambda bad: hierarchy.next_token(GOOD, bad, image=LEAVES),
    ("next_token", "image"): lambda bad: hierarchy.next_token(GOOD, LEAVES, image=bad),
    ("zero_shot", "image"): lambda bad: hierarchy.zero_shot(GOOD, bad),
    ("zero_shot", "prompts"): lambda bad: hierarchy.zero_shot(GOOD, LEAVES, prompts=jnp.stack([LEAVES, LEAVES, bad])),
    ("bayes_losses", "samples.image"): lambda bad: hierarchy.bayes_losses(
        GOOD, DRAWN._replace(image=bad), NOISY, 1.0, candidates=2
    ),
    ("bayes_losses", "samples.text"): lambda bad: hierarchy.bayes_losses(
        GOOD, DRAWN._replace(text=bad), NOISY, 1.0, candidates=2
    ),
}
NOISED = {
    "leaf_posterior": lambda sigma: hierarchy.leaf_posterior(GOOD, NOISY, sigma),
    "denoise": lambda sigma: hierarchy.denoise(GOOD, NOISY, sigma),
    "bayes_losses": lambda sigma: hierarchy.bayes_losses(GOOD, DRAWN, NOISY, sigma, candidates=2),
    "bayes_risks": lambda sigma: hierarchy.bayes_risks(GOOD, KEY, 8, sigma=sigma),
}


def test_every_function_of_leaves_or_noise_is_listed_here():
    for kind in ("image", "text", "given", "leaves"):
        assert takers((hierarchy,), {kind}) == {name for name, own in SEEING if own == kind}
    assert takers((hierarchy,), {"prompts"}) == {"zero_shot", "sample_prompts"}  # texts, and a number of them
    assert takers((hierarchy,), {"samples", "noisy"}) == {"bayes_losses"}
    assert takers((hierarchy,), {"sigma"}) == set(NOISED)


@pytest.mark.parametrize(("name", "kind"), SEEING)
def test_leaves_outside_the_alphabet_are_refused_by_every_function(as_users_run, name, kind):
    for symbol in (-1, 3):
        with pytest.raises(ValueError, match=r"outside the alphabet 0\.\.2; recode"):
            SEEING[name, kind](LEAVES.at[3, 1].set(symbol))


@pytest.mark.parametrize("name", NOISED)
def test_noise_without_a_positive_deviation_is_refused_by_every_function(as_users_run, name):
    for sigma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"sigma is {sigma}; give the positive"):
            NOISED[name](sigma)


# Hierarchies ----------------------------------------------------------------------------------------------------------

ON_HIERARCHIES = {
    "check_hierarchy": hierarchy.check_hierarchy,
    "sample": lambda h: hierarchy.sample(h, KEY, 2),
    "enumerate_joint": hierarchy.enumerate_joint,
    "root_posterior": lambda h: hierarchy.root_posterior(h, image=LEAVES),
    "similarity": lambda h: hierarchy.similarity(h, LEAVES, LEAVES),
    "similarities": lambda h: hierarchy.similarities(h, LEAVES, LEAVES),
    "leaf_posterior": lambda h: hierarchy.leaf_posterior(h, NOISY, 1.0),
    "denoise": lambda h: hierarchy.denoise(h, NOISY, 1.0),
    "next_token": lambda h: hierarchy.next_token(h, LEAVES),
    "zero_shot": lambda h: hierarchy.zero_shot(h, LEAVES),
    "sample_prompts": lambda h: hierarchy.sample_prompts(h, KEY, 2),
    "bayes_losses": lambda h: hierarchy.bayes_losses(h, DRAWN, NOISY, 1.0, candidates=2),
    "bayes_risks": lambda h: hierarchy.bayes_risks(h, KEY, 8),
}
NO_PRIOR = jnp.asarray([0.5, 0.5, 0.0], jnp.float32)
PAIRS = pair_hierarchy.PairHierarchy(jnp.full((1, 3, 3, 3), 1 / 9, jnp.float32), GOOD.prior)
EVIDENCE = jnp.zeros((4, 2, 3), jnp.float32)
ON_PAIRS = {
    "sample": lambda h: pair_hierarchy.sample(h, KEY, 2),
    "enumerate_joint": pair_hierarchy.enumerate_joint,
    "root_posterior": lambda h: pair_hierarchy.root_posterior(h, EVIDENCE),
    "leaf_posterior": lambda h: pair_hierarchy.leaf_posterior(h, EVIDENCE),
}


def test_every_function_of_a_hierarchy_is_listed_here():
    assert takers((hierarchy,), {"h"}) == set(ON_HIERARCHIES)
    assert takers((pair_hierarchy,), {"h"}) == set(ON_PAIRS)
    assert takers((hierarchy,), {"kernels"}) == {"beliefs"}
    assert takers((hierarchy,), {"prior"}) == {"random_hierarchy"}


@pytest.mark.parametrize("name", ON_HIERARCHIES)
def test_bad_hierarchies_are_refused_by_every_function(as_users_run, name):
    for h, words in (
        (GOOD._replace(prior=NO_PRIOR), "prior is zero at symbol 2"),
        (GOOD._replace(prior=0.9 * GOOD.prior), "prior sums to 0.9"),
        (GOOD._replace(image=KERNELS.at[0, 1, 2].mul(0.9)), r"row \(0, 1, 2\) of image sums to 0.9"),
        (GOOD._replace(text=KERNELS.at[0, 1, 2].mul(0.9)), r"row \(0, 1, 2\) of text sums to 0.9"),
        (GOOD._replace(text=KERNELS.at[0, 0, 0, 0].set(jnp.nan)), "text holds entries that are negative or not"),
    ):
        with pytest.raises(ValueError, match=words):
            ON_HIERARCHIES[name](h)


@pytest.mark.parametrize("name", ON_PAIRS)
def test_bad_pair_hierarchies_are_refused_by_every_function(as_users_run, name):
    for h, words in (
        (PAIRS._replace(prior=NO_PRIOR), "prior is zero at symbol 2"),
        (PAIRS._replace(kernels=PAIRS.kernels.at[0, 1].mul(0.9)), "kernels are no laws.*divide by the sum"),
        (PAIRS._replace(kernels=PAIRS.kernels.at[0, 1, 0, 0].set(jnp.nan)), "kernels are no laws"),
    ):
        with pytest.raises(ValueError, match=words):
            ON_PAIRS[name](h)


def test_bad_kernels_and_priors_alone_are_refused(as_users_run):
    with pytest.raises(ValueError, match=r"row \(0, 1, 2\) of kernels sums to 0.9"):
        hierarchy.beliefs(KERNELS.at[0, 1, 2].mul(0.9), LEAVES)
    with pytest.raises(ValueError, match="prior is zero at symbol 2"):
        hierarchy.random_hierarchy(KEY, 3, 1, 2, 0.5, prior=NO_PRIOR)
