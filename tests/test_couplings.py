"""Couplings against brute force, POT, and the laws of the plans they draw from."""

import itertools

import numpy as np
import pytest

from fmjax import couplings


def batch(b, d=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((b, d), dtype=np.float32), rng.uniform(-1, 1, (b, d)).astype(np.float32)


def paired_cost(x0, x1):
    return float(((x0.astype(np.float64) - x1) ** 2).reshape(len(x0), -1).sum(1).mean())


def rows_of(x, table):
    """The index in ``table`` of every row of ``x``."""
    index = {row.tobytes(): i for i, row in enumerate(table)}
    return np.array([index[row.tobytes()] for row in x])


def test_squared_cost_is_the_definition():
    x0, x1 = batch(7)
    direct = ((x0[:, None].astype(np.float64) - x1[None]) ** 2).sum(-1)
    np.testing.assert_allclose(couplings.squared_cost(x0, x1), direct, rtol=1e-5, atol=1e-5)


def test_independent_keeps_everything():
    x0, x1 = batch(5)
    y0, y1, cond = couplings.independent()(np.random.default_rng(0), x0, x1, {"label": np.arange(5)})
    assert y0 is x0 and y1 is x1 and (cond["label"] == np.arange(5)).all()


def test_exact_is_the_best_of_all_permutations():
    x0, x1 = batch(6)
    y0, y1, _ = couplings.minibatch_ot()(np.random.default_rng(0), x0, x1)
    best = min(paired_cost(x0[list(p)], x1) for p in itertools.permutations(range(6)))
    assert paired_cost(y0, y1) == pytest.approx(best, rel=1e-6)
    assert (y1 == x1).all() and sorted(rows_of(y0, x0)) == list(range(6))


@pytest.mark.parametrize("shape", [(64, 8), (128, 8, 8, 1)])
def test_exact_cost_equals_pot(shape):
    ot = pytest.importorskip("ot")
    rng = np.random.default_rng(1)
    x0, x1 = rng.standard_normal(shape, dtype=np.float32), rng.uniform(-1, 1, shape).astype(np.float32)
    y0, y1, _ = couplings.minibatch_ot()(rng, x0, x1)
    flat0, flat1 = x0.reshape(len(x0), -1).astype(np.float64), x1.reshape(len(x1), -1).astype(np.float64)
    assert paired_cost(y0, y1) == pytest.approx(ot.emd2([], [], ot.dist(flat0, flat1)), rel=1e-5)


def test_an_optimal_pairing_is_left_alone():
    x0, _ = batch(32)
    x1 = 2 * x0 + 1  # the gradient of a convex function: optimal between its marginals, whatever the points
    y0, y1, _ = couplings.minibatch_ot()(np.random.default_rng(0), x0, x1)
    assert (y0 == x0).all() and (y1 == x1).all()


def test_permuting_the_batch_permutes_the_pairs():
    x0, x1 = batch(50)
    rng = np.random.default_rng(0)
    p, q = rng.permutation(50), rng.permutation(50)
    couple = couplings.minibatch_ot()
    y0, _, _ = couple(rng, x0, x1)
    z0, z1, _ = couple(rng, x0[p], x1[q])
    assert (z1 == x1[q]).all() and (z0 == y0[q]).all()


@pytest.mark.parametrize("kwargs", [{}, {"replacement": True}, {"method": "sinkhorn", "replacement": True}])
def test_the_condition_follows_its_target(kwargs):
    x0, x1 = batch(40)
    cond = {"label": np.arange(40), "more": (x1[:, :2] * 3,)}
    y0, y1, c = couplings.minibatch_ot(**kwargs)(np.random.default_rng(0), x0, x1, cond)
    assert (c["label"] == rows_of(y1, x1)).all() and (c["more"][0] == y1[:, :2] * 3).all()
    assert len(y0) == len(y1) == 40 and set(rows_of(y0, x0)) <= set(range(40))


@pytest.mark.parametrize("method", couplings.METHODS)
def test_drawn_pairs_have_the_plans_frequencies(method):
    b, repeats = 8, 800
    x0, x1 = batch(b, d=2)
    cost = couplings.squared_cost(x0, x1)
    if method == "sinkhorn":
        plan = couplings.sinkhorn_plan(cost, epsilon=0.5)
    else:
        plan = np.zeros((b, b))
        plan[couplings.assignment(cost), np.arange(b)] = 1 / b
    couple = couplings.minibatch_ot(method=method, replacement=True, epsilon=0.5)
    rng, counts = np.random.default_rng(3), np.zeros((b, b))
    for _ in range(repeats):
        y0, y1, _ = couple(rng, x0, x1)
        np.add.at(counts, (rows_of(y0, x0), rows_of(y1, x1)), 1)
    n = b * repeats
    assert (counts[plan == 0] == 0).all()
    # Pairs are independent across and within batches: counts are multinomial. Largest of 64 z-scores: 4.5 is 4e-4.
    z = (counts - n * plan) / np.sqrt(np.maximum(n * plan * (1 - plan), 1e-12))
    assert np.abs(z[n * plan > 5]).max() < 4.5


def test_sinkhorn_plan_has_uniform_marginals_and_tends_to_exact():
    x0, x1 = batch(64)
    cost = couplings.squared_cost(x0, x1).astype(np.float64)
    exact, random = cost[couplings.assignment(cost), np.arange(64)].mean(), cost.mean()
    epsilons, paid = np.array([1.0, 0.3, 0.1, 0.05]), []
    for epsilon in epsilons:
        plan = couplings.sinkhorn_plan(cost.astype(np.float32), epsilon=float(epsilon))
        # ott stops when the marginals' l1 error is below 1e-3
        assert np.abs(plan.sum(0) - 1 / 64).sum() < 2e-3 and np.abs(plan.sum(1) - 1 / 64).sum() < 2e-3
        paid.append((plan * cost).sum())
    assert paid == sorted(paid, reverse=True) and exact <= paid[-1] < paid[0] < random
    # <P, C> - eps H(P) is least at P, and H <= 2 log B, H(exact) = log B: the excess is at most eps log B.
    slack = 1e-3 * cost.max()
    assert (np.array(paid) - exact <= epsilons * cost.std() * np.log(64) + slack).all()


def test_sinkhorn_plan_has_the_gibbs_form():
    x0, x1 = batch(16)
    cost = couplings.squared_cost(x0, x1)
    plan = couplings.sinkhorn_plan(cost, epsilon=0.5)
    log_scaling = np.log(plan) + cost / (
        0.5 * cost.std()
    )  # = f_i + g_j: an additive table, so doubly centred it is zero
    centred = log_scaling - log_scaling.mean(0) - log_scaling.mean(1, keepdims=True) + log_scaling.mean()
    assert np.abs(centred).max() < 1e-4


def test_epsilon_is_relative_to_the_spread_not_to_the_level_or_unit_of_the_cost():
    x0, x1 = batch(32)
    cost = couplings.squared_cost(x0, x1)
    plan = couplings.sinkhorn_plan(cost)
    # Both runs stop at an l1 marginal error of 1e-3.
    assert np.abs(couplings.sinkhorn_plan(7 * cost + 20) - plan).sum() < 4e-3


def test_with_replacement_repeats_examples():
    x0, x1 = batch(256)
    y0, y1, _ = couplings.minibatch_ot(replacement=True)(np.random.default_rng(0), x0, x1)
    distinct = len(set(rows_of(y1, x1)))
    # Mean 256 (1 - 1/e) = 161.9, standard deviation sqrt(256 (1/e - 2/e^2)) = 5.0.
    assert abs(distinct - 161.9) < 5 * 5.0
    z0, z1, _ = couplings.minibatch_ot()(np.random.default_rng(0), x0, x1)
    partner = dict(zip(rows_of(z1, x1), rows_of(z0, x0), strict=True))
    assert all(partner[j] == i for i, j in zip(rows_of(y0, x0), rows_of(y1, x1), strict=True))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"method": "sinkhron"}, "did you mean 'sinkhorn'"),
        ({"method": "exakt"}, "did you mean 'exact'"),
        ({"method": "sinkhorn"}, "replacement=True"),
        ({"method": "sinkhorn", "replacement": True, "epsilon": 0.0}, "epsilon=0.0"),
    ],
)
def test_bad_options_are_refused_when_made(kwargs, words):
    with pytest.raises(ValueError, match=words):
        couplings.minibatch_ot(**kwargs)


def test_bad_batches_are_refused():
    x0, x1 = batch(8)
    couple, rng = couplings.minibatch_ot(), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"x1 has NaN or infinity in 1 example\(s\), first at row 3"):
        couple(rng, x0, np.where(np.arange(8)[:, None] == 3, np.float32("nan"), x1))
    with pytest.raises(ValueError, match="overflows float32"):
        couple(rng, x0 * np.float32(1e30), x1)
    with pytest.raises(ValueError, match="one shape"):
        couple(rng, x0[:4], x1)
    with pytest.raises(ValueError, match="B=8"):
        couple(rng, x0, x1, {"label": np.arange(7)})


def test_sinkhorn_that_does_not_converge_says_so():
    x0, x1 = batch(64)
    couple = couplings.minibatch_ot(method="sinkhorn", replacement=True, epsilon=1e-3, max_iterations=20)
    with pytest.raises(RuntimeError, match="max_iterations=20"):
        couple(np.random.default_rng(0), x0, x1)
