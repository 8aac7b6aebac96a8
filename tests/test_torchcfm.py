"""Couplings and paths against torchcfm (atong01/conditional-flow-matching) on the same inputs, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import paths, transport

torch = pytest.importorskip("torch", reason="pip install -e '.[torch]' brings torch and torchcfm to compare with")
torchcfm = pytest.importorskip("torchcfm", reason="pip install -e '.[torch]' brings torch and torchcfm to compare with")

pytestmark = pytest.mark.usefixtures("x64")

B, SHAPE = 64, (4, 4, 2)
SIGMAS = (0.05, 0.5, 1.0, 2.0)
TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def batch(b=B, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((b, *shape)), rng.uniform(-1, 1, (b, *shape))


def times(b=B):
    """Times in [0.01, 0.99]: away from the ends, where torchcfm divides by zero or adds 1e-8 (see below)."""
    return np.random.default_rng(1).uniform(0.01, 0.99, b)


def seed():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (pairs are drawn from numpy's global state there)


def pairs(matcher, x0, x1):
    """The pairs ``i, j`` that ``theirs`` will draw, and the source of every target in our plan."""
    seed()
    plan = matcher.ot_sampler.get_map(torch.from_numpy(x0), torch.from_numpy(x1))
    i, j = matcher.ot_sampler.sample_map(plan, batch_size=len(x0))
    return i, j, transport.assignment(transport.squared_cost(x0, x1))


def theirs(matcher, x0, x1, t):
    """``x_t``, ``u_t`` and the noise that torchcfm drew, as numpy."""
    x0, x1, t = map(torch.from_numpy, (x0, x1, t))
    seed()
    _, xt, ut, eps = matcher.sample_location_and_conditional_flow(x0, x1, t=t, return_noise=True)
    return xt.numpy(), ut.numpy(), eps.numpy()


def ours(path, x0, x1, t, z=None):
    z = None if z is None else jnp.asarray(z)
    return [np.asarray(a) for a in paths.with_velocity(path, *map(jnp.asarray, (x0, x1, t)), z=z)]


def over(t, x):
    return np.reshape(t, (-1, *[1] * (x.ndim - 1)))


@pytest.mark.parametrize("shape", [(3,), SHAPE])
@pytest.mark.parametrize("seed", range(3))
def test_exact_plans_are_equal(shape, seed):
    x0, x1 = batch(128, shape, seed)
    plan = torchcfm.OTPlanSampler("exact").get_map(torch.from_numpy(x0), torch.from_numpy(x1))
    source = transport.assignment(transport.squared_cost(x0, x1))
    mine = np.zeros((128, 128))
    mine[source, np.arange(128)] = 1 / 128
    np.testing.assert_allclose(plan, mine, rtol=0, atol=1e-15)


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_sinkhorn_plans_of_equal_regularisation_are_equal(sigma):
    """``reg = 2 sigma^2`` is absolute in torchcfm (and POT), in units of the cost's standard deviation here.

    Both are ``a_i exp(-cost_ij / reg) b_j``, so their ratio is of rank one, to rounding; and the marginals agree to
    1e-3 in l1, where ott stops (POT stops at 1e-9): then so do the plans, to the few times 1e-3 allowed.
    """
    x0, x1 = batch(shape=(3,))
    matcher = torchcfm.SchrodingerBridgeConditionalFlowMatcher(sigma=sigma, ot_method="sinkhorn")
    assert matcher.ot_sampler.reg == 2 * sigma**2
    plan = matcher.ot_sampler.get_map(torch.from_numpy(x0), torch.from_numpy(x1))
    cost = transport.squared_cost(x0, x1)
    mine = transport.sinkhorn_plan(cost, epsilon=2 * sigma**2, absolute=True)
    assert np.abs(mine - plan).sum() < 4e-3
    ratio = np.log(mine / plan)
    assert np.abs(ratio - ratio.mean(0) - ratio.mean(1, keepdims=True) + ratio.mean()).max() < 1e-9
    # and the plan is one of its own: the entropic one of another sigma is far away
    other = transport.sinkhorn_plan(cost, epsilon=float(sigma**2 / cost.std()))
    assert np.abs(other - plan).sum() > 0.05


@pytest.mark.parametrize("sigma", [0.0, *SIGMAS])
def test_conditional_flow_matching(sigma):
    """A constant ``sigma`` is the linear path between pairs that are both moved by one ``sigma eps``."""
    x0, x1 = batch()
    t = times()
    xt, ut, eps = theirs(torchcfm.ConditionalFlowMatcher(sigma=sigma), x0, x1, t)
    x, u = ours(paths.linear(), x0 + sigma * eps, x1 + sigma * eps, t)
    np.testing.assert_allclose(x, xt, **TIGHT)
    np.testing.assert_allclose(u, ut, **TIGHT)


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_optimal_transport_pairs_are_drawn_from_our_permutation(sigma):
    """torchcfm draws B pairs from the plan with replacement; labels follow their target, as conditions here do."""
    x0, x1 = batch()
    t = times()
    label = np.arange(B)
    matcher = torchcfm.ExactOptimalTransportConditionalFlowMatcher(sigma=sigma)
    i, j, source = pairs(matcher, x0, x1)
    assert (source[j] == i).all() and len(set(j)) < B
    xt, ut, eps = theirs(matcher, x0, x1, t)
    x, u = ours(paths.linear(), x0[i] + sigma * eps, x1[j] + sigma * eps, t)
    np.testing.assert_allclose(x, xt, **TIGHT)
    np.testing.assert_allclose(u, ut, **TIGHT)
    _, _, found, _, y1 = matcher.guided_sample_location_and_conditional_flow(
        *map(torch.from_numpy, (x0, x1)), y1=torch.from_numpy(label)
    )
    np.testing.assert_allclose(found.numpy(), x1[y1.numpy()] - x0[source[y1.numpy()]], **TIGHT)


@pytest.mark.parametrize("sigma", [0.0, *SIGMAS[:2]])
def test_target_conditional_flow_matching(sigma):
    """torchcfm ignores ``x0`` and draws the noise; it divides by ``1 - (1 - sigma) t``, where ours has no quotient.

    So at ``sigma = 0``, ``t = 1`` its target is 0 / 0 and ours the limit ``x1 - x0``.
    """
    x0, x1 = batch()
    t = times()
    matcher = torchcfm.TargetConditionalFlowMatcher(sigma=sigma)
    xt, ut, eps = theirs(matcher, x0, x1, t)
    x, u = ours(paths.target_conditional(sigma_min=sigma), eps, x1, t)
    np.testing.assert_allclose(x, xt, **TIGHT)
    np.testing.assert_allclose(u, ut, rtol=1e-12, atol=1e-12)  # the quotient loses two digits at t = 0.99
    if sigma == 0:
        _, ut, eps = theirs(matcher, x0, x1, np.ones(B))
        assert np.isnan(ut).all()
        np.testing.assert_allclose(ours(paths.target_conditional(sigma_min=0.0), eps, x1, np.ones(B))[1], x1 - eps)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_schroedinger_bridge_flow_matching(sigma):
    """torchcfm adds 1e-8 to ``2 t (1 - t)``: its bridge term is smaller by the relative ``1e-8 / (2 t (1 - t))``.

    With that undone the targets agree. At ``t = 0`` its bridge term is 0, where the true one is infinite, as ours is.
    Pairs come from the exact plan by default, not from the entropic one for which the bridge is Schroedinger's
    (arXiv 2302.00482); and the standard deviation is ``sigma sqrt(t (1 - t))``, as in the paper, not with
    ``sigma^2`` as torchcfm's docstring has it.
    """
    x0, x1 = batch()
    t = times()
    matcher = torchcfm.SchrodingerBridgeConditionalFlowMatcher(sigma=sigma)
    path = paths.schroedinger_bridge(sigma=sigma)
    i, j, source = pairs(matcher, x0, x1)
    assert (source[j] == i).all()
    xt, ut, eps = theirs(matcher, x0, x1, t)
    x, u = ours(path, x0[i], x1[j], t, z=eps)
    np.testing.assert_allclose(x, xt, **TIGHT)
    straight, shrink = x1[j] - x0[i], 1 + 1e-8 / (2 * over(t * (1 - t), x0))
    np.testing.assert_allclose((ut - straight) * shrink, u - straight, rtol=1e-11, atol=1e-12)
    _, ut, eps = theirs(matcher, x0, x1, np.zeros(B))
    np.testing.assert_array_equal(ut, straight)
    assert np.isinf(ours(path, x0[i], x1[j], np.zeros(B), z=eps)[1]).all()


@pytest.mark.parametrize("sigma", [0.0, *SIGMAS])
def test_variance_preserving_flow_matching(sigma):
    """A constant ``sigma`` adds ``sigma eps`` to ``x_t`` and nothing to the target."""
    x0, x1 = batch()
    t = times()
    xt, ut, eps = theirs(torchcfm.VariancePreservingConditionalFlowMatcher(sigma=sigma), x0, x1, t)
    x, u = ours(paths.trigonometric(), x0, x1, t)
    np.testing.assert_allclose(x + sigma * eps, xt, **TIGHT)
    np.testing.assert_allclose(u, ut, **TIGHT)


@pytest.mark.parametrize("sigma", SIGMAS[:3])
def test_the_score_weight_is_that_of_half_the_diffusion_times_the_score(sigma):
    """[SF]2M (arXiv 2307.03672): ``|lambda s + eps|^2`` is least at ``s = -eps / lambda = (sigma^2 / 2) grad log p``.

    ``lambda_t = 2 sigma_t / sigma^2``; torchcfm has ``sigma^2 + 1e-8`` for it. The conditional score is ours:
    ``-z / gamma`` on the bridge, ``-x0 / alpha`` on the target-conditional path.
    """
    x0, x1 = batch()
    t = times()
    eps = np.random.default_rng(2).standard_normal(x0.shape)
    bridge, target = paths.schroedinger_bridge(sigma=sigma), paths.target_conditional(sigma_min=min(sigma, 0.9))
    scores = {
        "SchrodingerBridge": (sigma, paths.latent_score(bridge, jnp.asarray(eps), jnp.asarray(t))),
        "Target": (min(sigma, 0.9), paths.score(target, *map(jnp.asarray, ours(target, eps, x1, t)), jnp.asarray(t))),
    }
    for name, (s, score) in scores.items():
        weight = getattr(torchcfm, f"{name}ConditionalFlowMatcher")(sigma=s).compute_lambda(torch.from_numpy(t)).numpy()
        correct = 1 / (1 + 1e-8 / s**2)
        np.testing.assert_allclose(-eps / over(weight, eps) * correct, s**2 / 2 * np.asarray(score), rtol=1e-10)
    gamma = np.asarray(paths.latent(bridge, jnp.asarray(x0), jnp.asarray(t))[0]).ravel()
    weight = torchcfm.SchrodingerBridgeConditionalFlowMatcher(sigma=sigma).compute_lambda(torch.from_numpy(t)).numpy()
    np.testing.assert_allclose(weight, 2 * gamma / (sigma**2 + 1e-8), rtol=1e-12)
