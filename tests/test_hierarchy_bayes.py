"""Bayes losses against enumeration, their estimated means against exact risks, blocks, devices, and paired excess."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from compilation import quickly

from theorykit.surrogate import _bayes, hierarchy, risk
from theorykit.surrogate.hierarchy import Hierarchy, Losses

CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of a few hundred products
# Standard errors that one estimate in 1.7 million exceeds; keys are fixed, so no test has noise.
FIVE = 5.0
SIGMA = 0.8
PRIOR = (0.5, 0.2, 0.3)


def small(noise=0.4):
    return hierarchy.random_hierarchy(jax.random.key(1), 3, 2, 2, noise, prior=jnp.asarray(PRIOR))


def draw(h, key):
    for_sample, for_noise = jax.random.split(key)
    drawn = hierarchy.sample(h, for_sample, 12)
    return drawn, drawn.image.astype(float) + SIGMA * jax.random.normal(for_noise, drawn.image.shape)


def losses_of(h, drawn, noisy, sigma):
    return hierarchy.bayes_losses(h, drawn, noisy, sigma, candidates=4)


def risks_at(noise, key):
    return hierarchy.bayes_risks(small(noise), key, 3000, sigma=jnp.asarray(SIGMA), block=256)


def risks_at_all(levels, key):
    return jax.lax.map(lambda noise: risks_at(noise, key), levels)


@pytest.mark.slow
def test_losses_of_samples_are_those_of_enumeration(x64):
    h, joint = small(), np.asarray(hierarchy.enumerate_joint(small()))
    leaves = np.asarray(hierarchy.all_leaves(3, 4))
    drawn, z = quickly(draw, h, jax.random.key(0))
    found = quickly(losses_of, h, drawn, z, jnp.asarray(SIGMA))
    x, y = (np.ravel_multi_index(np.asarray(part).T, (3,) * 4) for part in drawn[1:])
    s = np.log(joint / joint.sum(axis=1, keepdims=True) / joint.sum(axis=0, keepdims=True))[np.ix_(x, y)]
    for group in range(3):
        of = slice(4 * group, 4 * group + 4)
        e = np.exp(s[of, of])
        both = np.log(e.sum(axis=0)) + np.log(e.sum(axis=1)) - 2 * np.diag(s[of, of])
        np.testing.assert_allclose(found.contrastive[group], both.mean(), **CLOSE)
    texts = joint[x].reshape(12, 3, 3, 3, 3)
    first = texts.sum(axis=(2, 3, 4))
    np.testing.assert_allclose(
        found.zero_shot, -np.log(first[np.arange(12), drawn.text[:, 0]] / first.sum(axis=1)), **CLOSE
    )
    # The chain rule: the sum over tokens is -ln P(y | x).
    np.testing.assert_allclose(found.next_token, -np.log(joint[x, y] / joint[x].sum(axis=1)) / 4, **CLOSE)
    squares = ((np.asarray(z)[:, None] - leaves[None]) ** 2).sum(axis=2) / (2 * SIGMA**2)
    weights = joint[:, y].T * np.exp(-squares)
    mean = weights @ leaves / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.denoising, ((mean - np.asarray(drawn.image)) ** 2).mean(axis=1), **CLOSE)


@pytest.mark.slow
def test_estimated_risks_agree_with_the_exact_ones(x64):
    levels = jnp.asarray([0.05, 0.4])
    found = quickly(risks_at_all, levels, jax.random.key(2))
    for i, noise in enumerate((0.05, 0.4)):
        joint = hierarchy.enumerate_joint(small(noise))
        table = np.asarray(joint)
        first = table.reshape(81, 3, 27).sum(axis=2)

        def entropy(p):
            return -np.sum(p * np.log(p))

        exact = {
            "contrastive": float(risk.minimal_risk(joint, 4, side="both")),
            "zero_shot": entropy(first) - entropy(table.sum(axis=1)),
            "next_token": (entropy(table) - entropy(table.sum(axis=1))) / 4,
        }
        for name, value in exact.items():
            estimate = getattr(found, name)
            assert abs(float(estimate.value[i]) - value) < FIVE * float(estimate.standard_error[i]), name


@pytest.mark.slow
def test_at_zero_p_the_contrastive_risk_counts_collisions():
    # Negatives with the root of the positive look the same: 2 E ln(1 + Bin(K - 1, 1/S)), and the other risks vanish.
    h = hierarchy.random_hierarchy(jax.random.key(3), 10, 2, 2, 0.0)
    found = quickly(many_risks, h, jax.random.key(4))
    k = np.arange(4)
    limit = 2 * np.sum(scipy.stats.binom.pmf(k, 3, 0.1) * np.log1p(k))
    assert abs(float(found.contrastive.value) - limit) < FIVE * float(found.contrastive.standard_error)
    assert float(found.contrastive.standard_error) < limit / 50
    assert float(found.zero_shot.value) == float(found.next_token.value) == 0
    # The text fixes the root, and the root the image.
    assert float(found.denoising.value) == 0


def many_risks(h, key):
    return hierarchy.bayes_risks(h, key, 20_000, sigma=jnp.asarray(0.1, jnp.float32))


@pytest.mark.slow
def test_the_last_block_counts_only_what_is_asked_for(x64):
    h, key, sigma = small(), jax.random.key(5), jnp.asarray(SIGMA)
    found = quickly(nineteen, h, key, sigma)
    losses = [quickly(block_losses, h, jax.random.fold_in(key, i), sigma) for i in range(3)]
    for name, used in Losses([8, 8, 0], [8, 8, 3], [8, 8, 3], [8, 8, 3])._asdict().items():
        parts = [np.asarray(getattr(one, name)) for one in losses]
        if name == "contrastive":  # groups of four
            used = [count // 4 for count in used]
        every = np.concatenate([part[:count] for part, count in zip(parts, used, strict=True)])
        estimate = getattr(found, name)
        np.testing.assert_allclose(estimate.value, every.mean(), **CLOSE)
        np.testing.assert_allclose(estimate.standard_error, every.std(ddof=1) / math.sqrt(every.size), **CLOSE)


def nineteen(h, key, sigma):
    return hierarchy.bayes_risks(h, key, 19, sigma=sigma, block=7)  # rounded up to 8, a multiple of K = 4


def block_losses(h, key, sigma):
    for_sample, for_noise = jax.random.split(key)
    drawn = hierarchy.sample(h, for_sample, 8)
    return losses_of(
        h, drawn, drawn.image.astype(float) + sigma * jax.random.normal(for_noise, drawn.image.shape), sigma
    )


@pytest.mark.slow
def test_memory_is_that_of_a_block(x64):
    # Beyond the block: number, count and 4 x 3 moments of each block, 8 bytes or less each.
    memory = {}
    for samples in (2**10, 2**16):
        lowered = _bayes._risks.lower(small(), jax.random.key(0), jnp.asarray(1.0), samples, 4, 64, None)
        memory[samples] = lowered.compile().memory_analysis().temp_size_in_bytes
    per_block = 8 * (2 + 12)
    # Twice: the result of a loop is copied once.
    assert memory[2**16] - memory[2**10] <= 2 * per_block * (2**16 - 2**10) // 64


PROGRAM = """
import json

import jax
import numpy as np
from jax.sharding import Mesh

from theorykit.surrogate import hierarchy

h = hierarchy.random_hierarchy(jax.random.key(1), 4, 2, (2, 1), 0.3)
found = {}
meshes = {"eight": jax.make_mesh((8,), ("blocks",)), "three": Mesh(jax.devices()[2:5], "samples")}
for name, mesh in ({"one": None} | meshes).items():
    # Ten blocks, the last one of 6 samples, are shared out as 8 x 2 or 3 x 4.
    risks = hierarchy.bayes_risks(h, jax.random.key(2), 150, block=16, mesh=mesh)
    found[name] = np.asarray(jax.tree.leaves(risks)).tolist()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_mesh_of_devices_gives_the_result_of_one():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("eight", "three"):
        # The same blocks: rounding differs where programs add up in another order, over up to 600 terms in float32.
        np.testing.assert_allclose(found[name], found["one"], rtol=600**0.5 * np.finfo(np.float32).eps)


# Paired excess --------------------------------------------------------------------------------------------------------


def test_the_paired_excess_is_the_mean_difference_with_its_error(x64):
    generator = np.random.default_rng(0)
    bayes = generator.uniform(size=40)
    trained = bayes + generator.uniform(size=40)
    found = hierarchy.paired_excess(jnp.asarray(trained), jnp.asarray(bayes))
    np.testing.assert_allclose(found.value, np.mean(trained - bayes), **CLOSE)
    np.testing.assert_allclose(found.standard_error, scipy.stats.sem(trained - bayes), **CLOSE)


@pytest.mark.parametrize(("shift", "warned"), [(-5.0, True), (-3.0, False), (0.0, False)])
def test_a_risk_below_bayes_by_more_than_four_errors_warns_and_is_not_clipped(shift, warned, recwarn):
    bayes = jnp.full(100, 2.0, jnp.float32)
    noise = jnp.asarray(np.tile([-1.0, 1.0], 50), jnp.float32)
    error = float(scipy.stats.sem(noise))
    found = hierarchy.paired_excess(bayes + noise + shift * error, bayes)
    np.testing.assert_allclose(found.value, shift * error, rtol=1e-4, atol=1e-6)
    assert len(recwarn) == warned
    if warned:
        text = str(recwarn.pop(RuntimeWarning).message)
        assert "standard errors: no model can be" in text
        assert "target among its inputs" in text


def test_rounding_alone_does_not_warn(recwarn):
    bayes = jnp.full(1000, 2.0, jnp.float32)
    hierarchy.paired_excess(bayes * (1 - 4 * float(jnp.finfo(jnp.float32).eps)), bayes)
    assert not recwarn


# Bad input ------------------------------------------------------------------------------------------------------------

KERNEL = jnp.full((1, 2, 2, 2), 0.5, jnp.float32)
GOOD, KEY = Hierarchy(KERNEL, KERNEL), jax.random.key(0)
DRAWN = hierarchy.Sample(jnp.zeros(5, jnp.int32), *(jnp.zeros((5, 2), jnp.int32),) * 2)
NOISY = jnp.zeros((5, 2), jnp.float32)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: hierarchy.bayes_risks(GOOD, KEY, 7), "7 samples are less than two groups of 4.*at least 8"),
        (lambda: hierarchy.bayes_risks(GOOD, KEY, 70, candidates=0), "candidates is 0.*at least 1"),
        (lambda: hierarchy.bayes_risks(GOOD, KEY, 70, block=0), "block 0"),
        (lambda: hierarchy.bayes_risks(GOOD, KEY, 70, sigma=0.0), "sigma is 0.0; give the positive"),
        (lambda: hierarchy.bayes_risks(GOOD._replace(text=KERNEL * 0.9), KEY, 70), "text sums to 0.89.*not to 1"),
        (lambda: hierarchy.bayes_risks(GOOD, KEY, 70, mesh=jax.make_mesh((1, 1), ("a", "b"))), "reshape it to one"),
        (lambda: hierarchy.bayes_losses(GOOD, DRAWN, NOISY, 1.0, candidates=6), "candidates is 6; give 1 to 5"),
        (lambda: hierarchy.bayes_losses(GOOD, DRAWN, NOISY, -1.0), "sigma is -1.0"),
        (
            lambda: hierarchy.bayes_losses(GOOD, DRAWN._replace(image=DRAWN.image + 2), NOISY, 1.0),
            "image holds symbols 2",
        ),
        (
            lambda: hierarchy.bayes_losses(GOOD, DRAWN._replace(image=DRAWN.image[:4]), NOISY, 1.0),
            "4 images and 5 texts",
        ),
        (lambda: hierarchy.paired_excess(NOISY[0], NOISY[:, 0]), r"shapes \(2,\) and \(5,\); give both"),
        (lambda: hierarchy.paired_excess(NOISY[0, :1], NOISY[0, :1]), "two or more samples"),
    ],
)
def test_bad_input_is_refused_with_cause_and_remedy(as_users_run, call, words):
    with pytest.raises(ValueError, match=words):
        call()
