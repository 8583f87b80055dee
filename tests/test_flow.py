"""The function-space gradient flow: identities, closed forms, and the training that it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from theorykit.losses import info_nce
from theorykit.ntk.gradient_flow import FINISHED, flow, flow_stacked

N, Z, M = 4, 2, 3  # points in each view, outputs, held-out points


def jacobians(dtype=jnp.float64, parameters=30):
    """Jacobians (points, outputs, parameters) of a random linear model at 2 N training and M held-out points."""
    return jax.random.normal(jax.random.key(1), (2 * N + M, Z, parameters), dtype) / parameters**0.5


def gram(j1, j2):
    return jnp.einsum("iou,jpu->ijop", j1, j2, precision="highest")


def problem(dtype=jnp.float64):
    """Return kernel, initial views, cross kernel and held-out embeddings, with full blocks."""
    a, b, h = jnp.split(jacobians(dtype), [N, 2 * N])
    fa, fb, fh = jnp.split(jax.random.normal(jax.random.key(2), (2 * N + M, Z), dtype), [N, 2 * N])
    return (gram(a, a), gram(a, b), gram(b, b)), (fa, fb), (gram(h, a), gram(h, b)), fh


def scalar_problem():
    """Return the same with (n, n) blocks."""
    rows = jacobians()[:, 0]
    a, b, h = jnp.split(rows, [N, 2 * N])
    _, views, _, fh = problem()
    return (a @ a.T, a @ b.T, b @ b.T), views, (h @ a.T, h @ b.T), fh


def upcast(arrays):
    return jax.tree.map(lambda x: x.astype(jnp.float64), arrays)


def stack(kernel):
    """Assemble the kernel of the stacked views from its blocks."""
    aa, ab, bb = kernel
    ba = ab.T if ab.ndim == 2 else ab.transpose(1, 0, 3, 2)
    return jnp.concatenate([jnp.concatenate([aa, ab], 1), jnp.concatenate([ba, bb], 1)], 0)


def matrix(kernel, outputs=Z):
    """Return the stacked kernel as a matrix of (point, output) pairs."""
    kernel = np.asarray(stack(kernel) if isinstance(kernel, tuple) else kernel)
    if kernel.ndim == 2:
        return np.kron(kernel, np.eye(outputs))
    points = kernel.shape[0]
    return kernel.transpose(0, 2, 1, 3).reshape(points * outputs, points * outputs)


def contrast(fa, fb):
    """The spectral loss over all pairs, made lopsided: not quadratic, and it couples points, outputs and views."""
    return -2 * jnp.mean(jnp.sum(fa * fb, 1)) + jnp.mean((fa @ fb.T) ** 2) + jnp.mean(fa**4)


def half_square(f):
    return jnp.sum(f**2) / 2


def quadratic_form():
    a = jax.random.normal(jax.random.key(3), (2 * N * Z, 2 * N * Z), jnp.float64)
    return a + a.T


def quadratic(fa, fb):
    f = jnp.concatenate([fa, fb]).reshape(-1)
    return f @ quadratic_form() @ f / 2


def linear_flow(kernel, form, f0, t):
    """The oracle: exp(-K A t) f0 for L = f^T A f / 2."""
    return (scipy.linalg.expm(-matrix(kernel) @ np.asarray(form) * t) @ np.asarray(f0).reshape(-1)).reshape(f0.shape)


def error_bound(path, values, amplification=1.0):
    """Bound the global error of an entry: each step may err by the tolerance, and the flow amplifies that.

    The root mean square of a step's error over d entries is at most atol + rtol max|f|, so an entry errs by at most
    sqrt(d) times that.
    """
    unit = float(path.atol) + float(path.rtol) * float(np.nanmax(np.abs(values)))
    return int(path.accepted) * np.sqrt(values[0].size) * unit * amplification


# One loss, one shape and one number of times wherever the statement allows: each other combination compiles anew.
TIMES = np.array([0.0, 0.3, 1.0, 2.5])


@pytest.mark.slow
def test_time_zero_returns_the_initial_values_exactly(x64):
    kernel, views, cross, fh = problem()
    path = flow(kernel, contrast, views, TIMES, cross=cross, heldout0=fh)
    for start, values in zip((*views, fh), (path.fa, path.fb, path.heldout), strict=True):
        np.testing.assert_array_equal(values[0], start)


def test_flows_compose(x64):
    kernel, views, cross, fh = problem()
    there = flow(kernel, contrast, views, np.array([0.0, 0.3, 0.7, 2.0]), cross=cross, heldout0=fh)
    direct = flow(kernel, contrast, views, np.array([0.5, 1.0, 1.5, 2.0]), cross=cross, heldout0=fh)
    middle = (there.fa[2], there.fb[2])
    onwards = flow(kernel, contrast, middle, np.array([0.1, 0.2, 0.9, 1.3]), cross=cross, heldout0=there.heldout[2])
    for name in ("fa", "fb", "heldout"):
        bound = error_bound(direct, getattr(direct, name)) + error_bound(onwards, getattr(onwards, name))
        np.testing.assert_allclose(getattr(onwards, name)[-1], getattr(direct, name)[-1], rtol=0, atol=bound)
        np.testing.assert_allclose(getattr(there, name)[-1], getattr(direct, name)[-1], rtol=0, atol=bound)


@pytest.mark.slow
@pytest.mark.parametrize("rtol", [1e-4, 1e-7, 1e-10])
@pytest.mark.parametrize("make", [problem, scalar_problem])
def test_quadratic_loss_gives_the_matrix_exponential_to_the_tolerance(x64, make, rtol):
    kernel, views, _, _ = make()
    times = np.array([0.0, 0.2, 0.5])
    path = flow(kernel, quadratic, views, times, rtol=rtol)
    f0, values = jnp.concatenate(views), jnp.concatenate([path.fa, path.fb], axis=1)
    generator = -matrix(kernel) @ np.asarray(quadratic_form())
    worst = max(np.linalg.norm(scipy.linalg.expm(generator * s), 2) for s in np.linspace(0, times[-1], 20))
    expected = np.stack([linear_flow(kernel, quadratic_form(), f0, t) for t in times])
    np.testing.assert_allclose(values, expected, rtol=0, atol=error_bound(path, values, worst))
    assert int(path.status) == FINISHED
    assert np.max(np.abs(expected[-1] - expected[0])) > 0.1, "the flow must have moved"


@pytest.mark.slow
def test_least_squares_on_one_view_has_its_closed_form_on_both(x64):
    kernel, (fa0, fb0), cross, fh = scalar_problem()
    target = jax.random.normal(jax.random.key(4), (N, Z), jnp.float64)
    path = flow(kernel, lambda fa, fb: half_square(fa - target), (fa0, fb0), TIMES, cross=cross, heldout0=fh)
    aa, ab, _ = (np.asarray(block) for block in kernel)
    gap = np.asarray(fa0 - target)
    for i, t in enumerate(TIMES):
        decay = scipy.linalg.expm(-aa * t)
        used = np.linalg.solve(aa, (np.eye(N) - decay) @ gap)  # the integral of the gradient of view a
        for got, want in (
            (path.fa, target + decay @ gap),
            (path.fb, fb0 - ab.T @ used),
            (path.heldout, fh - np.asarray(cross[0]) @ used),
        ):
            np.testing.assert_allclose(got[i], want, rtol=0, atol=error_bound(path, got))


@pytest.mark.slow
def test_a_block_of_numbers_means_that_kernel_times_the_identity(x64):
    kernel, views, cross, fh = scalar_problem()
    identity = jnp.eye(Z)

    def full(block):
        return block[:, :, None, None] * identity[None, None]

    path = flow(tuple(map(full, kernel)), contrast, views, TIMES, cross=tuple(map(full, cross)), heldout0=fh)
    mixed = (kernel[0], full(kernel[1]), kernel[2])
    short = flow(mixed, contrast, views, TIMES, cross=(full(cross[0]), cross[1]), heldout0=fh)
    for name in ("fa", "fb", "heldout"):
        bound = error_bound(path, getattr(path, name))
        np.testing.assert_allclose(getattr(short, name), getattr(path, name), rtol=0, atol=bound)


@pytest.mark.slow
def test_swapping_the_views_swaps_the_outputs(x64):
    (aa, ab, bb), (fa, fb), (ha, hb), fh = problem()
    path = flow((aa, ab, bb), contrast, (fa, fb), TIMES, cross=(ha, hb), heldout0=fh)
    swapped = flow(
        (bb, ab.transpose(1, 0, 3, 2), aa),
        lambda fb, fa: contrast(fa, fb),
        (fb, fa),
        TIMES,
        cross=(hb, ha),
        heldout0=fh,
    )
    for got, want in ((swapped.fb, path.fa), (swapped.fa, path.fb), (swapped.heldout, path.heldout)):
        np.testing.assert_allclose(got, want, rtol=0, atol=error_bound(path, want))


@pytest.mark.slow
def test_the_loss_falls_by_the_integral_of_the_kernel_norm_of_its_gradient(x64):
    kernel, views, _, _ = problem()
    loss = functools.partial(info_nce, temperature=0.5)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    horizon = 1.0
    path = flow(kernel, loss, views, np.concatenate([[0.0], (nodes + 1) * horizon / 2, [horizon]]))
    values, (ga, gb) = jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=(0, 1))))(path.fa, path.fb)
    g = np.concatenate([ga, gb], axis=1).reshape(len(nodes) + 2, -1)
    speed = np.einsum("tu,uv,tv->t", g, matrix(kernel), g)
    losses = np.asarray(values)
    assert np.all(speed > 0) and np.all(np.diff(losses) < 0)
    # The quadrature of 20 nodes is exact far below this on a path that is smooth over the horizon.
    bound = error_bound(path, path.fa) * np.abs(g).sum(1).max()
    assert losses[0] - losses[-1] == pytest.approx(horizon / 2 * weights @ speed[1:-1], rel=0, abs=bound)


def test_heldout_copies_of_training_points_follow_them(x64):
    (aa, ab, bb), (fa, fb), _, _ = problem()
    ba = ab.transpose(1, 0, 3, 2)
    cross = (jnp.concatenate([aa[:2], ba[3:]]), jnp.concatenate([ab[:2], bb[3:]]))
    path = flow((aa, ab, bb), contrast, (fa, fb), TIMES, cross=cross, heldout0=jnp.concatenate([fa[:2], fb[3:]]))
    training = jnp.concatenate([path.fa[:, :2], path.fb[:, 3:]], axis=1)
    # The same sums in another order: rounding of every stage of every step (Tsit5 has six).
    rounding = 6 * int(path.accepted) * np.finfo(np.float64).eps * float(jnp.abs(training).max())
    np.testing.assert_allclose(path.heldout, training, rtol=0, atol=rounding)


def test_heldout_points_do_not_act_on_training_points(x64):
    kernel, views, cross, fh = problem()
    alone = flow(kernel, contrast, views, TIMES)
    far = flow(kernel, contrast, views, TIMES, cross=jax.tree.map(lambda k: 100 * k, cross), heldout0=fh)
    assert alone.heldout is None
    np.testing.assert_allclose(far.fa, alone.fa, rtol=0, atol=error_bound(far, alone.fa))
    np.testing.assert_allclose(far.fb, alone.fb, rtol=0, atol=error_bound(far, alone.fb))


def test_no_heldout_points_is_allowed(x64):
    kernel, views, cross, fh = problem()
    path = flow(kernel, contrast, views, TIMES, cross=tuple(k[:0] for k in cross), heldout0=fh[:0])
    assert path.heldout.shape == (len(TIMES), 0, Z) and int(path.status) == FINISHED


@pytest.mark.slow
def test_stacked_points_follow_the_two_views(x64):
    kernel, views, cross, fh = problem()
    path = flow(kernel, contrast, views, TIMES, cross=cross, heldout0=fh)
    stacked = flow_stacked(
        stack(kernel),
        lambda f: contrast(f[:N], f[N:]),
        jnp.concatenate(views),
        TIMES,
        cross=jnp.concatenate(cross, axis=1),
        heldout0=fh,
    )
    both = jnp.concatenate([path.fa, path.fb], axis=1)
    np.testing.assert_allclose(stacked.f, both, rtol=0, atol=error_bound(path, both))
    np.testing.assert_allclose(stacked.heldout, path.heldout, rtol=0, atol=error_bound(path, path.heldout))


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-8])
def test_halving_the_tolerance_changes_less_than_the_stated_error(x64, rtol):
    kernel, views, _, _ = problem()
    coarse, fine = (flow(kernel, contrast, views, TIMES, rtol=r) for r in (rtol, rtol / 2))
    assert float(jnp.abs(coarse.fa - fine.fa).max()) < error_bound(coarse, coarse.fa)
    assert float(coarse.rtol) == rtol and int(fine.accepted) >= int(coarse.accepted)


@pytest.mark.slow
def test_the_default_tolerance_follows_the_dtype(x64):
    kernel, views, _, _ = problem()
    exact = flow(kernel, contrast, views, TIMES)
    kernel, views, _, _ = problem(jnp.float32)
    single = flow(kernel, contrast, views, TIMES)
    assert single.fa.dtype == jnp.float32 and exact.fa.dtype == jnp.float64
    assert float(single.rtol) == pytest.approx(np.finfo(np.float32).eps ** (2 / 3), rel=1e-6)
    assert float(exact.rtol) == pytest.approx(np.finfo(np.float64).eps ** (2 / 3), rel=1e-12)
    # The random numbers of the two dtypes differ, so compare with the float64 flow of the float32 problem.
    wide = flow(upcast(kernel), contrast, upcast(views), TIMES)
    np.testing.assert_allclose(single.fa, wide.fa, rtol=0, atol=error_bound(single, single.fa))


def test_the_unit_of_the_embeddings_does_not_matter(x64):
    # A power of two scales without rounding, and a quadratic loss gives a linear flow: the same steps, scaled.
    kernel, views, _, _ = problem()
    path = flow(kernel, quadratic, views, TIMES[:3])
    large = flow(kernel, quadratic, jax.tree.map(lambda f: 1024 * f, views), TIMES[:3])
    np.testing.assert_allclose(large.fa, 1024 * path.fa, rtol=1e-14)
    assert int(large.accepted) == int(path.accepted)


def test_zero_embeddings_can_start_the_flow(x64):
    path = flow_stacked(jnp.eye(3), lambda f: half_square(f - 1), jnp.zeros((3, 1)), TIMES)
    np.testing.assert_allclose(path.f[:, 0, 0], 1 - np.exp(-TIMES), rtol=0, atol=error_bound(path, path.f))


def test_gradient_descent_on_a_linear_model_converges_to_the_flow_at_first_order(x64):
    # Linear in its parameters, so its kernel is constant: only the finite learning rate separates it from the flow.
    ja, jb, jh = jnp.split(jacobians(), [N, 2 * N])
    kernel, _, cross, _ = problem()
    theta0 = jax.random.normal(jax.random.key(5), (ja.shape[-1],), jnp.float64)

    def model(j, theta):
        return j @ theta

    horizon, rates = 1.0, 0.5 ** np.arange(4, 9)
    start = tuple(model(j, theta0) for j in (ja, jb))
    path = flow(kernel, contrast, start, TIMES * horizon / TIMES[-1], cross=cross, heldout0=model(jh, theta0))
    gradient = jax.grad(lambda theta: contrast(model(ja, theta), model(jb, theta)))
    descend = jax.jit(
        lambda rate, steps: jax.lax.fori_loop(0, steps, lambda _, theta: theta - rate * gradient(theta), theta0)
    )
    gaps = []
    for rate in rates:
        theta = descend(rate, round(horizon / rate))
        trained = (model(ja, theta), model(jb, theta), model(jh, theta))
        flowed = (path.fa[-1], path.fb[-1], path.heldout[-1])
        gaps.append([float(jnp.linalg.norm(x - y)) for x, y in zip(trained, flowed, strict=True)])
    slopes = np.diff(np.log(gaps), axis=0) / np.log(0.5)
    # First order: gap = c eta + c' eta^2, so the local slope is 1 + O(eta), closer to 1 at each halving of the rate.
    assert np.all(np.abs(slopes[-1] - 1) < 0.02)
    assert np.all(np.abs(slopes[-1] - 1) < np.abs(slopes[0] - 1))


def test_another_kernel_of_the_same_shape_compiles_nothing(x64):
    kernel, views, _, _ = problem()
    traces = []

    def counted(fa, fb):
        traces.append(None)
        return contrast(fa, fb)

    first = flow(kernel, counted, views, TIMES)
    once = len(traces)
    other = tuple(2 * k for k in kernel)
    second = flow(other, counted, jax.tree.map(lambda f: f + 1, views), 2 * TIMES, rtol=1e-6)
    assert len(traces) == once > 0
    assert not np.allclose(first.fa[-1], second.fa[-1])


def test_the_flow_lowers_for_accelerators_without_host_callbacks():
    run = jax.jit(lambda k, f0: flow_stacked(k, half_square, f0, jnp.array([0.5, 1.0])).f)
    exported = jax.export.export(run, platforms=["cuda", "tpu"])(jnp.eye(3), jnp.ones((3, 2)))
    assert exported.platforms == ("cuda", "tpu")  # a host callback cannot be exported: it would have raised
