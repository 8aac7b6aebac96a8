"""The smoothest push in closed form: exact fractions on Gaussians, its linear system, its noise, its invariances."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from scipy import special

from fmjax import correction, metrics, sampling
from fmjax.correction import features
from fmjax.keys import as_keys
from fmjax.methods.classifier_corrector import classifier_corrector
from fmjax.types import Batch

HERMITE = (lambda x: x**0, lambda x: x, lambda x: x**2 - 1, lambda x: x**3 - 3 * x)
LINEAR = {"products": 0, "cosines": 0, "ridge": 0.0}
SMALL = {"products": 4, "cosines": 60}
apply = jax.jit(lambda push, x, cond=None: correction.sobolev_drift(push, ts=[1.0])(x, jnp.ones(len(x)), cond))


def moved(push, x, cond=None):
    """The states after a push at the end, at its natural strength."""
    x = np.asarray(x, np.float32)
    return x + np.asarray(apply(push, x, cond))


def fit(p, q, *labels, **options):
    """The push between two sets ``[m, d]`` at the end."""
    return correction.fit_push(p[:, None], q[:, None], *labels, **options)


def density(x):
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


def mode(n, k, size):
    """Quantiles of ``N(0, 1) (1 + size He_k / sqrt(k!))``, by Newton's method on the distribution function."""
    level, size = (np.arange(n) + 0.5) / n, size / np.sqrt(special.factorial(k))
    x = special.ndtri(level)
    for _ in range(10):
        x = x - (special.ndtr(x) - size * HERMITE[k - 1](x) * density(x) - level) / (
            density(x) * (1 + size * HERMITE[k](x))
        )
    return x


@pytest.mark.parametrize(("k", "b", "lam"), [(1, 1.0, 0.1), (2, 0.5, 0.1), (3, 1.0, 1.0)])
def test_a_push_repairs_its_fraction_of_every_hermite_mode(k, b, lam):
    """``8 lam k / (b^2 + 8 lam k)`` of a small difference of degree ``k``, of quantiles."""
    n, size = 60_000, 1e-3
    p, q = b * special.ndtri((np.arange(n) + 0.5) / n), b * mode(n, k, size)
    push = fit(p[:, None], q[:, None], lam=lam, products=1, cosines=45, gram=n, ridge=1e-9)
    amplitude = lambda x: HERMITE[k](x / b).mean()
    # the displacement in float64: it is 1e-4 of the states
    h = np.asarray(apply(push, p[::4, None].astype(np.float32)), np.float64)[:, 0]
    grow = (HERMITE[k - 1](p[::4] / b) * k * h / b).mean()
    fraction = grow / (amplitude(q) - amplitude(p))
    assert fraction == pytest.approx(8 * lam * k / (b**2 + 8 * lam * k), abs=1.5e-3)


def test_linear_features_give_the_linear_solution(key):
    """``(I + C_m / (8 lam)) w = m_q - m_p`` with the covariance of the mixture, half each whatever the numbers."""
    rng, lam = np.random.default_rng(0), 0.3
    shape = np.array([[1.0, 0.4, 0], [0, 0.5, 0.2], [0, 0, 0.1]])
    p, q = rng.standard_normal((3000, 3)) @ shape, 0.5 + rng.standard_normal((500, 3)) @ shape.T
    push = fit(p, q, lam=lam, gram=3000, **LINEAR)
    gap = q.mean(0) - p.mean(0)
    second = (p.T @ p / len(p) + q.T @ q / len(q)) / 2
    centre = (p.mean(0) + q.mean(0)) / 2
    w = np.linalg.solve(np.eye(3) + (second - np.outer(centre, centre)) / (8 * lam), gap)
    np.testing.assert_allclose(np.asarray(apply(push, np.zeros((4, 3), np.float32))), np.tile(w, (4, 1)), rtol=1e-5)


def test_the_matrices_are_those_of_the_features_derivatives(x64):
    rng = np.random.default_rng(0)
    phi = features.PushFeatures(3, rng.standard_normal((5, 4)), rng.uniform(0, 6, 5))
    z = rng.standard_normal((50, 4))
    i, j = np.triu_indices(3)
    one = lambda z: jnp.concatenate([z, z[i] * z[j], jnp.cos(phi.waves @ z + phi.phases)])
    values, slopes = jax.vmap(one)(z), jax.vmap(jax.jacrev(one))(z)
    np.testing.assert_allclose(phi.values(z), values, rtol=1e-12)
    np.testing.assert_allclose(phi.sums(z), values.sum(0), rtol=1e-12)
    mean, products, gradients = phi.grams(z)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(products, values.T @ values / 50, atol=1e-12)
    np.testing.assert_allclose(gradients, jnp.einsum("mid,mjd->ij", slopes, slopes) / 50, atol=1e-12)


def test_a_push_is_the_gradient_of_its_features(x64):
    """By autodiff of ``w . phi`` in the coordinates of the space."""
    rng = np.random.default_rng(0)
    p, q = rng.standard_normal((400, 3)), 0.4 + 0.8 * rng.standard_normal((300, 3))
    push = fit(p, q, products=2, cosines=6)
    x = rng.standard_normal((7, 3))
    at = jax.tree.map(lambda a: np.asarray(a[0], np.float64), push._replace(labels=None))

    def f(x):
        z = at.basis @ (x - at.centre)
        y = z[:2]
        wave = at.amplitudes[0] @ jnp.cos(at.waves @ z + at.phases)
        return at.linear[0] @ z + y @ at.quadratic[0] @ y / 2 + wave

    h = correction.sobolev_drift(push, ts=[1.0])(jnp.asarray(x), 1.0)
    np.testing.assert_allclose(h, jax.vmap(jax.grad(f))(x), rtol=1e-6, atol=1e-8)


def test_the_penalised_classifier_and_the_closed_form_agree(x64):
    """Same features, small differences: ``8 lam grad f`` of the classifier's minimum (by Newton) is the push."""
    rng, lam = np.random.default_rng(0), 0.2
    p = rng.standard_normal((1500, 2))
    q = rng.standard_normal((1500, 2)) * [1.0, 1.03] + [0.05, 0.0]
    push = fit(p, q, lam=lam, products=2, cosines=6, ridge=0.0, gram=1500)
    at = jax.tree.map(lambda a: np.asarray(a[0], np.float64), push._replace(labels=None))
    i, j = np.triu_indices(2)

    def net(params, x, s, t, cond=None, key=None):
        z = (x - at.centre) @ at.basis.T
        return (
            jnp.concatenate([z, z[:, i] * z[:, j], jnp.cos(z @ at.waves.T + at.phases), 0 * z[:, :1] + 1], 1) @ params
        )

    method = classifier_corrector(net, gradient_penalty=lam)
    batch, keys = Batch(jnp.asarray(q), x0=jnp.asarray(p), t=jnp.ones(1500)), as_keys(jax.random.key(0), 1500)
    loss = lambda w: method.loss(w, w, batch, keys)[0]
    w = jnp.zeros(12)
    newton = jax.jit(lambda w: w - jnp.linalg.solve(jax.hessian(loss)(w), jax.grad(loss)(w)))
    for _ in range(4):
        w = newton(w)
    assert jnp.abs(jax.grad(loss)(w)).max() < 1e-12
    x = rng.standard_normal((200, 2))
    strength = correction.preset("transport", lam=lam)
    step = correction.marginal_matching(method.direction(w), **strength)
    exact = correction.marginal_matching(correction.sobolev_drift(push, ts=[1.0]), alpha=1.0)
    a, b = (fix(None, jnp.asarray(x), 1.0)[0] - x for fix in (step, exact))
    assert np.sqrt((b**2).mean()) > 0.03
    assert np.sqrt(((a - b) ** 2).mean()) < 0.02 * np.sqrt((b**2).mean())


def test_a_perfect_model_is_moved_by_no_more_than_the_noise():
    """Fresh states move by the stated noise, which falls with the number of examples; their moments by ``tr C / M``."""
    rng, d, squares = np.random.default_rng(0), 6, []
    for m in (1000, 16_000):
        p, q, x = (rng.standard_normal((n, d)) for n in (m, 4 * m, 20_000))
        push = fit(p, q, **SMALL)
        h = moved(push, x) - x
        squares.append((h**2).sum(1).mean())
        stated = float(push.noise[0, 0].sum())
        assert 0.5 < squares[-1] / stated < 2.5
        assert abs(float(push.signal[0, 0])) < 2 * stated
        before, after = (metrics.frechet(y, rng.standard_normal((100_000, d))) for y in (x, x + h))
        assert after - before < 3 * d / m
        assert 2 < push.noise[0, 0, 0] / push.noise[0, 0, 1] < 8  # four times as many data
    assert 8 < squares[0] / squares[1] < 32


@pytest.mark.parametrize("options", [{"affine": True, "smooth": False}, {"affine": True}, {}], ids=str)
def test_sixteen_dimensions_are_shifted_scaled_and_rotated_back(options):
    """Fresh samples: the Frechet distance falls to a tenth, its floor for 20,000 samples included."""
    rng, d = np.random.default_rng(1), 16
    std, turn = np.linspace(1.5, 0.5, d), rng.standard_normal((d, d))
    rotation = scipy.linalg.expm(0.08 * (turn - turn.T))
    draw = lambda n: rng.standard_normal((n, d)) * std
    for change in (lambda x: x + 0.3, lambda x: 1.3 * x, lambda x: x @ rotation.T):
        push = fit(draw(6000), change(draw(6000)), lam=4.0, products=d, cosines=30, **options)
        x, y = draw(20_000), change(draw(20_000))
        before, after = metrics.frechet(x, y), metrics.frechet(moved(push, x), y)
        assert after < 0.1 * before


def test_the_order_of_the_examples_does_not_matter():
    rng = np.random.default_rng(0)
    p, q = rng.standard_normal((700, 3)), 0.3 + rng.standard_normal((600, 3)) ** 3 / 2
    x = rng.standard_normal((50, 3))
    options = {"gram": 200, "affine": True, **SMALL}
    ordered, shuffled = fit(p, q, **options), fit(rng.permutation(p), rng.permutation(q), **options)
    np.testing.assert_allclose(moved(ordered, x), moved(shuffled, x), atol=1e-5)
    np.testing.assert_allclose(ordered.noise, shuffled.noise, rtol=1e-4)


def test_a_fit_is_made_in_float64():
    """Far from the origin, where sums of float32 lose the shift."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((20_000, 2)).astype(np.float32)
    p, q = base + np.float32(1000), base + np.float32(1000.125)
    assert jnp.zeros(1).dtype == jnp.float32
    push = fit(p, q, lam=1e6, **LINEAR)
    np.testing.assert_allclose(push.basis[0].T @ push.linear[0, 0], [0.125, 0.125], rtol=1e-5)
    tail = {"affine": True, "smooth": False}
    np.testing.assert_allclose(moved(fit(p, q, **tail), p[:9]) - p[:9], 0.125, atol=2e-4)


def test_the_affine_map_is_the_transport_between_gaussians():
    rng = np.random.default_rng(0)
    p = rng.standard_normal((5000, 3)) @ np.array([[1.0, 0.3, 0], [0, 0.6, 0], [0, 0, 0.4]])
    q = 1 + rng.standard_normal((4000, 3)) @ np.array([[0.5, 0, 0], [0.5, 1.2, 0], [0, 0, 0.7]])
    push = fit(p, q, affine=True, smooth=False)
    y = moved(push, p)
    np.testing.assert_allclose(y.mean(0), q.mean(0), atol=1e-5)
    np.testing.assert_allclose(np.cov(y.T, bias=True), np.cov(q.T, bias=True), atol=1e-5)
    np.testing.assert_allclose(push.stretch[0, 0], push.stretch[0, 0].T)
    assert np.linalg.eigvalsh(push.stretch[0, 0] + np.eye(3)).min() > 0  # the gradient of a convex function
    fixed = np.concatenate([q, np.full((4000, 1), -1.0)], 1)  # a pixel that never varies
    noisy = np.concatenate([p, -1 + 0.01 * rng.standard_normal((5000, 1))], 1)
    assert np.abs(moved(fit(noisy, fixed, affine=True, smooth=False), noisy)[:, 3] + 1).max() < 1e-3


def test_every_label_has_its_own_push_and_every_time(key):
    """Of linear features: the labelled push is the unlabelled push of the label's rows; unknown ones are nan."""
    rng = np.random.default_rng(0)
    labels, others = np.arange(900) % 3 * 2, rng.integers(0, 3, 600) * 2
    p, q = rng.standard_normal((900, 2, 2)), rng.standard_normal((600, 2, 2)) + others[:, None, None]
    options = {"lam": 1.0, "gram": 900, **LINEAR}
    push, ts = correction.fit_push(p, q, labels, others, **options), [0.5, 1.0]
    x, cond = jnp.asarray(rng.standard_normal((8, 2)), jnp.float32), jnp.array([0, 2, 4, 0, 2, 4, 6, 1])
    t = jnp.array([0.5, 1.0, 0.5, 1.0, 0.5, 1.0, 1.0, 1.0])
    h = jax.jit(lambda push, x, t, c: correction.sobolev_drift(push, ts=ts)(x, t, c))(push, x, t, cond)
    for i in range(6):
        n = ts.index(float(t[i]))
        part = fit(p[labels == cond[i], n], q[others == cond[i], n], **options)
        np.testing.assert_allclose(h[i], apply(part, x[i : i + 1])[0], rtol=1e-4)
    assert np.isnan(h[6:]).all()
    whole = correction.fit_push(p, q, **options)
    free = correction.sobolev_drift(whole, ts=ts)
    np.testing.assert_array_equal(free(x, 1.0, cond), free(x, 1.0))
    with pytest.raises(ValueError, match="cond=NoneType"):
        correction.sobolev_drift(push, ts=ts)(x, 1.0)


def test_a_push_is_an_argument_and_its_times_are_checked(key):
    rng = np.random.default_rng(0)
    push = correction.fit_push(rng.standard_normal((300, 2, 2)), rng.standard_normal((300, 2, 2)), **SMALL)
    ts, grid, x = [0.5, 1.0], np.linspace(0, 1, 5), jnp.zeros((4, 2))

    def run(push, x, at=(2, 4)):
        fix = correction.marginal_matching(correction.sobolev_drift(push, ts=ts), alpha=1.0)
        return sampling.sample(lambda x, s, t, cond=None, key=None: x, x, grid, key=key, corrector=fix, at=at)

    assert max((np.size(c) for c in jax.make_jaxpr(run)(push, x).consts), default=0) < 20
    assert np.isfinite(jax.jit(run)(push, x)).all()
    with pytest.raises(ValueError, match="t=0.25: not among these 2 times"):
        jax.jit(functools.partial(run, at=(1,)))(push, x)
    assert np.isnan(correction.sobolev_drift(push, ts=ts)(x, 0.25)).all()
    assert correction.sobolev_drift(push, ts=ts).nfe == 0
    with pytest.raises(ValueError, match="push=2 times"):
        correction.sobolev_drift(push, ts=[1.0])


def test_a_fit_that_is_mostly_noise_is_said(caplog):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.standard_normal((n, 1, 4))
    with caplog.at_level(logging.WARNING):
        correction.fit_push(draw(200), draw(200) + 0.5, **SMALL)
        assert not caplog.records
        correction.fit_push(draw(200), draw(200), **SMALL)
    assert "noise of the 200 generated examples" in caplog.text


def test_many_dimensions_have_a_space_of_leading_directions(monkeypatch):
    rng = np.random.default_rng(0)
    std = np.array([3.0, 0.01, 2.0, 0.01, 1.0, 0.01])
    p, q = rng.standard_normal((4000, 6)) * std, rng.standard_normal((4000, 6)) * std
    q[:, 2] += 0.5
    exact = features.subspace(p, q)
    monkeypatch.setattr(features, "SQUARE", 4)
    monkeypatch.setattr(features, "WIDEST", 3)
    few = features.subspace(p, q)
    np.testing.assert_allclose(few.spread, exact.spread[:3], rtol=1e-6)
    np.testing.assert_allclose(np.abs(few.basis @ exact.basis[:3].T), np.eye(3), atol=1e-4)
    push = fit(p, q, affine=True, smooth=False)
    assert abs(moved(push, p)[:, 2].mean() - q[:, 2].mean()) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": 0.0}, "lam=0.0"), ({"smooth": False}, "affine=False, smooth=False"), ({"cosines": 4}, ".*cosines=4"),
        ({"products": -1}, "products=-1"), ({"gram": 1}, "gram=1"), ({"ridge": -1.0}, ".*ridge=-1.0"),
        ({"p": np.zeros((8, 1, 2))}, "p="), ({"q": np.zeros((20, 2, 2))}, r"p=.*, q=\(20, 2, 2\)"),
        ({"q_labels": np.zeros(20, int)}, "p_labels=None"), ({"p_labels": np.zeros(9, int)}, r"p_labels=int64\(9,\)"),
        ({"p_labels": np.zeros(20, int), "q_labels": np.arange(20) // 10}, "labels: 0 has 20 examples of p and 10"),
    ],
)  # fmt: skip
def test_bad_fits_are_refused(options, message):
    p = np.zeros((20, 1, 2))
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        correction.fit_push(**{"p": p, "q": p, **options})
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300
