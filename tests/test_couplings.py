"""Couplings against brute force, POT, and the plans from which they draw."""

import itertools
import warnings

import numpy as np
import pytest

from fmjax import couplings, transport


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
    np.testing.assert_allclose(transport.squared_cost(x0, x1), direct, rtol=1e-5, atol=1e-5)


def test_centred_costs_differ_by_constants_of_rows_and_columns():
    x0, x1 = (a.astype(np.float64) for a in batch(7))
    gap = transport.squared_cost(x0, x1 + 5) - transport.squared_cost(x0, x1 + 3, centred=True)
    table = gap - gap.mean(0) - gap.mean(1, keepdims=True) + gap.mean()
    np.testing.assert_allclose(table, 0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"method": "sinkhorn", "replacement": True}])
def test_an_offset_of_the_data_changes_no_pairs(options):
    """Data at 1e4, float32: the means are subtracted, so that the differences of the costs keep their digits."""
    x0, x1 = batch(64)
    x1 = np.round(x1 * 64) / 64  # so that x1 + 2^13 is exact
    pairs = lambda x1: couplings.minibatch_ot(**options)(np.random.default_rng(0), x0, x1)
    (y0, y1, _), (z0, z1, _) = pairs(x1), pairs(x1 + np.float32(2**13))
    np.testing.assert_array_equal(z0, y0)
    np.testing.assert_array_equal(z1 - np.float32(2**13), y1)


@pytest.mark.parametrize("cost", [np.ones((1, 1)), np.full((3, 3), 0.1), np.zeros((2, 4)), np.full((5, 5), 1e6)])
def test_the_plan_of_constant_costs_is_the_product(cost):
    plan = transport.sinkhorn_plan(cost.astype(np.float32))
    np.testing.assert_allclose(plan, 1 / cost.size, rtol=1e-5)


def test_sinkhorn_pairs_a_batch_of_one():
    x0, x1 = batch(1)
    y0, y1, _ = couplings.minibatch_ot(method="sinkhorn", replacement=True)(np.random.default_rng(0), x0, x1)
    assert (y0 == x0).all() and (y1 == x1).all()


def test_the_independent_coupling_changes_nothing():
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


@pytest.mark.parametrize("more", [{"by_class": False}, {"by_class": True}, {"condition_weight": 0.3}])
@pytest.mark.parametrize("kwargs", [{}, {"replacement": True}, {"method": "sinkhorn", "replacement": True}])
def test_the_condition_follows_its_target(kwargs, more):
    x0, x1 = batch(40)
    kwargs = kwargs | more
    cond = {"label": np.arange(40), "more": (x1[:, :2] * 3,)}
    y0, y1, c = couplings.minibatch_ot(**kwargs)(np.random.default_rng(0), x0, x1, cond)
    assert (c["label"] == rows_of(y1, x1)).all() and (c["more"][0] == y1[:, :2] * 3).all()
    assert len(y0) == len(y1) == 40 and set(rows_of(y0, x0)) <= set(range(40))


@pytest.mark.parametrize("method", couplings.METHODS)
def test_drawn_pairs_have_the_plans_frequencies(method):
    b, repeats = 8, 800
    x0, x1 = batch(b, d=2)
    cost = transport.squared_cost(x0, x1)
    if method == "sinkhorn":
        plan = transport.sinkhorn_plan(cost, epsilon=0.5)
    else:
        plan = np.zeros((b, b))
        plan[transport.assignment(cost), np.arange(b)] = 1 / b
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
    cost = transport.squared_cost(x0, x1).astype(np.float64)
    exact, random = cost[transport.assignment(cost), np.arange(64)].mean(), cost.mean()
    epsilons, paid = np.array([1.0, 0.3, 0.1, 0.05]), []
    for epsilon in epsilons:
        plan = transport.sinkhorn_plan(cost.astype(np.float32), epsilon=float(epsilon))
        # ott stops when the marginals' l1 error is below 1e-3; no target is favoured
        np.testing.assert_allclose(plan.sum(0), 1 / 64, rtol=1e-12)
        assert np.abs(plan.sum(1) - 1 / 64).sum() < 2e-3
        paid.append((plan * cost).sum())
    assert paid == sorted(paid, reverse=True) and exact <= paid[-1] < paid[0] < random
    # <P, C> - eps H(P) is least at P, and H <= 2 log B, H(exact) = log B: the excess is at most eps log B.
    slack = 1e-3 * cost.max()
    assert (np.array(paid) - exact <= epsilons * cost.std() * np.log(64) + slack).all()


def test_sinkhorn_plan_has_the_gibbs_form():
    x0, x1 = batch(16)
    cost = transport.squared_cost(x0, x1)
    plan = transport.sinkhorn_plan(cost, epsilon=0.5)
    log_scaling = np.log(plan) + cost / (
        0.5 * cost.std()
    )  # = f_i + g_j: an additive table, so doubly centred it is zero
    centred = log_scaling - log_scaling.mean(0) - log_scaling.mean(1, keepdims=True) + log_scaling.mean()
    assert np.abs(centred).max() < 1e-4


def test_epsilon_is_relative_to_the_spread_of_the_cost():
    x0, x1 = batch(32)
    cost = transport.squared_cost(x0, x1)
    plan = transport.sinkhorn_plan(cost)
    # Both runs stop at an l1 marginal error of 1e-3.
    assert np.abs(transport.sinkhorn_plan(7 * cost + 20) - plan).sum() < 4e-3


def test_with_replacement_repeats_examples():
    x0, x1 = batch(256)
    y0, y1, _ = couplings.minibatch_ot(replacement=True)(np.random.default_rng(0), x0, x1)
    distinct = len(set(rows_of(y1, x1)))
    # Mean 256 (1 - 1/e) = 161.9, standard deviation sqrt(256 (1/e - 2/e^2)) = 5.0.
    assert abs(distinct - 161.9) < 5 * 5.0
    z0, z1, _ = couplings.minibatch_ot()(np.random.default_rng(0), x0, x1)
    partner = dict(zip(rows_of(z1, x1), rows_of(z0, x0), strict=True))
    assert all(partner[j] == i for i, j in zip(rows_of(y0, x0), rows_of(y1, x1), strict=True))


def test_by_class_the_pairing_is_best_within_each_class():
    x0, x1 = batch(14)
    cond = {"a": np.array([0, 1] * 7), "b": np.array([True] * 9 + [False] * 5), "c": x1[:, :1]}
    y0, y1, _ = couplings.minibatch_ot(by_class=True)(np.random.default_rng(0), x0, x1, cond)
    source = rows_of(y0, x0)
    assert (y1 == x1).all() and sorted(source) == list(range(14))
    groups = [np.flatnonzero((cond["a"] == a) & (cond["b"] == b)) for a in (0, 1) for b in (False, True)]
    assert sorted(map(len, groups)) == [2, 3, 4, 5]
    for rows in groups:
        assert set(source[rows]) == set(rows)
        best = min(paired_cost(x0[list(p)], x1[rows]) for p in itertools.permutations(rows))
        assert paired_cost(y0[rows], x1[rows]) == pytest.approx(best, rel=1e-6)


def test_by_class_with_one_class_or_with_all_classes_distinct():
    x0, x1 = batch(40)
    rng, couple = np.random.default_rng(0), couplings.minibatch_ot(by_class=True)
    assert (couple(rng, x0, x1, np.full(40, 7))[0] == couplings.minibatch_ot()(rng, x0, x1)[0]).all()
    assert (couple(rng, x0, x1, np.arange(40))[0] == x0).all()


def test_the_condition_weight_adds_its_distance_to_the_cost():
    """The permutation is the best of all for ``|x0_i - x1_j|^2 + w |c_i - c_j|^2``; w = 3 changes it, 1e9 ends it."""
    x0, x1 = batch(7)
    cond = {"c": np.random.default_rng(5).standard_normal((7, 2, 1)), "d": np.arange(7) / 7, "label": np.arange(7)}
    flat = np.concatenate([cond["c"][..., 0], cond["d"][:, None]], 1)
    best = {}
    for weight in (0.0, 0.5, 1e9):
        objective = lambda p, w=weight: paired_cost(x0[list(p)], x1) + w * paired_cost(flat[list(p)], flat)
        best[weight] = min(itertools.permutations(range(7)), key=objective)
        couple = couplings.minibatch_ot(condition_weight=weight, by_class=None if weight else False)
        y0, y1, _ = couple(np.random.default_rng(0), x0, x1, cond)
        assert (y1 == x1).all() and tuple(rows_of(y0, x0)) == best[weight]
    assert len(set(best.values())) == 3 and best[1e9] == tuple(range(7))


@pytest.mark.parametrize(
    ("kwargs", "threshold"),
    [({"by_class": False}, 0.0), ({"condition_weight": 1.0}, 0.5), ({"by_class": True}, np.inf)],
)
@pytest.mark.parametrize("replacement", [False, True])
def test_the_source_given_the_condition_has_its_closed_form(kwargs, threshold, replacement):
    """Pairs of one example of either class, x1 = -1 and 1, c = 0 and 1, in one dimension.

    The sources a, b are swapped where ``D = a - b > h``, ``h = w |c - c'|^2 / 2``; so ``E[x0 | first class] =
    -E[D; D > h] = -sqrt(2) phi(h / sqrt(2))``, which is ``-1 / sqrt(pi)`` for plain OT and 0 for OT by class; whatever
    the coupling, ``x0^2`` has mean 1 over both classes, and by class in each.
    """
    n = 2000
    rng, couple = np.random.default_rng(0), couplings.minibatch_ot(replacement=replacement, **kwargs)
    x1, cond = np.array([[-1.0], [1.0]]), {"label": np.array([0, 1]), "c": np.array([0.0, 1.0])}
    drawn = [couple(rng, rng.standard_normal((2, 1)), x1, cond) for _ in range(n)]
    x0, label = np.concatenate([d[0] for d in drawn])[:, 0], np.concatenate([d[2]["label"] for d in drawn])
    want = np.sqrt(2) * np.exp(-(threshold**2) / 4) / np.sqrt(2 * np.pi)
    # Standard deviations are at most 1 and sqrt(2) for x0 and x0^2, and pairs may repeat within a batch: a factor
    # sqrt(2) at most. 4.5 standard errors.
    for y, sign in ((0, -1), (1, 1)):
        mine = x0[label == y]
        assert abs(mine.mean() - sign * want) < 4.5 * np.sqrt(2 / len(mine))
        if kwargs.get("by_class"):
            assert abs((mine**2).mean() - 1) < 4.5 * np.sqrt(4 / len(mine))
    assert abs((x0**2).mean() - 1) < 4.5 * np.sqrt(4 / n)
    assert want > 10 * np.sqrt(2 / n) or threshold == np.inf


def test_sinkhorn_by_class_is_the_plan_of_each_class():
    """No mass between classes; within one, uniform marginals and the Gibbs form, which only the entropic plan has."""
    x0, x1 = batch(24)
    label = np.arange(24) % 3
    cost, groups = transport.squared_cost(x0, x1), couplings._groups(label)
    plan, same = transport.sinkhorn_plan(couplings._within(groups, cost)), label[:, None] == label
    assert (plan[~same] == 0).all()
    for rows in groups:
        block = np.ix_(rows, rows)
        log_scaling = np.log(plan[block]) + cost[block] / (0.05 * cost[same].std())
        centred = log_scaling - log_scaling.mean(0) - log_scaling.mean(1, keepdims=True) + log_scaling.mean()
        assert np.abs(centred).max() < 1e-3
        assert all(np.abs(plan[block].sum(axis) - 1 / 24).sum() < 2e-3 for axis in (0, 1))
    couple = couplings.minibatch_ot(method="sinkhorn", replacement=True, by_class=True)
    y0, y1, y = couple(np.random.default_rng(0), x0, x1, label)
    assert (label[rows_of(y0, x0)] == y).all() and (label[rows_of(y1, x1)] == y).all()


def test_a_condition_that_ot_ignores_gives_one_warning():
    x0, x1 = batch(8)
    rng, label = np.random.default_rng(0), np.arange(8) % 2
    couple = couplings.minibatch_ot()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        couple(rng, x0, x1)
        for kwargs in ({"by_class": False}, {"by_class": True}, {"condition_weight": 1.0}):
            couplings.minibatch_ot(**kwargs)(rng, x0, x1, {"label": label, "c": x0})
        couplings.independent()(rng, x0, x1, label)
    with pytest.warns(UserWarning, match="x0 given the condition is not N"):
        couple(rng, x0, x1, label)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        couple(rng, x0, x1, label)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"condition_weight": -1.0}, "condition_weight=-1.0"),
        ({"condition_weight": float("inf")}, "condition_weight=inf.*by_class=True"),
        ({"method": "sinkhron"}, "method='sinkhron'.*'sinkhorn'"),
        ({"method": "exakt"}, "method='exakt'.*'exact'"),
        ({"method": "sinkhorn"}, "method='sinkhorn'.*replacement=True"),
        ({"method": "sinkhorn", "replacement": True, "epsilon": 0.0}, "epsilon=0.0"),
    ],
)
def test_bad_options_are_refused_by_the_factory(kwargs, words):
    with pytest.raises(ValueError, match=words):
        couplings.minibatch_ot(**kwargs)


def test_bad_batches_are_refused():
    x0, x1 = batch(8)
    couple, rng = couplings.minibatch_ot(), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"x1\[3\]: .*1 example"):
        couple(rng, x0, np.where(np.arange(8)[:, None] == 3, np.float32("nan"), x1))
    with pytest.raises(ValueError, match="cost=float32.*overflow"):
        couple(rng, x0 * np.float32(1e30), x1)
    with pytest.raises(ValueError, match=r"x0.shape=\(4, 4\).*\(8, 4\)"):
        couple(rng, x0[:4], x1)
    with pytest.raises(ValueError, match="B=8"):
        couple(rng, x0, x1, {"label": np.arange(7)})
    with pytest.raises(ValueError, match=r"by_class=True.*integer leaf.*\['float32'\]"):
        couplings.minibatch_ot(by_class=True)(rng, x0, x1, x0)
    with pytest.raises(ValueError, match=r"by_class=True.*integer leaf.*\[\]"):
        couplings.minibatch_ot(by_class=True)(rng, x0, x1)
    with pytest.raises(ValueError, match=r"condition_weight=1.0.*floating leaf.*\['int64'\]"):
        couplings.minibatch_ot(condition_weight=1.0)(rng, x0, x1, np.arange(8))
    with pytest.raises(ValueError, match=r"cond\[0\]: .*8 example"):
        couplings.minibatch_ot(condition_weight=1.0)(rng, x0, x1, np.full(8, np.nan))


def test_sinkhorn_without_convergence_raises_an_error():
    x0, x1 = batch(64)
    couple = couplings.minibatch_ot(method="sinkhorn", replacement=True, epsilon=1e-3, max_iterations=20)
    with pytest.raises(RuntimeError, match="max_iterations=20"):
        couple(np.random.default_rng(0), x0, x1)


def test_an_absolute_epsilon_is_in_units_of_the_cost():
    rng = np.random.default_rng(5)
    x0, x1 = rng.standard_normal((2, 32, 3)).astype(np.float32)
    cost = transport.squared_cost(x0, x1, centred=True)
    eps = float(cost.std())
    plan = lambda **kw: transport.sinkhorn_plan(cost, **kw)
    np.testing.assert_allclose(plan(epsilon=0.5 * eps, absolute=True), plan(epsilon=0.5), rtol=1e-3, atol=1e-6)
    assert np.abs(plan(epsilon=0.5, absolute=True) - plan(epsilon=0.5)).sum() > 0.1
    pairs = lambda **kw: couplings.minibatch_ot(method="sinkhorn", replacement=True, **kw)(
        np.random.default_rng(0), x0, x1
    )[1]
    np.testing.assert_array_equal(pairs(epsilon=0.5 * eps, absolute=True), pairs(epsilon=0.5))
    assert (pairs(epsilon=0.5, absolute=True) != pairs(epsilon=0.5)).any()
