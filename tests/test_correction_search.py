"""The tuner on objectives whose minimum is known, and on a Gaussian whose best alpha has a closed form."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import sampling
from fmjax.correction import correctors, search
from fmjax.correction.search import Placement, Space
from fmjax.keys import as_keys, normal
from fmjax.oracles import mismatch
from fmjax.sampling import grids

TUNING, REPORTING = jax.random.split(jax.random.key(0), 2), jax.random.split(jax.random.key(1), 3)
BEST = {0: 0.2, 3: 0.6, 5: 0.1}  # alpha of every step that helps
WORTH = {0: 1.0, 3: 2.0, 5: 4.0}


def bowl(placement, key):
    """``10 - sum_n [worth_n (best_n^2 - (alpha_n - best_n)^2)] + sum beta^2``, a step that is not there costs 0.1."""
    value = 10.0
    for step, alpha, beta in zip(*placement, strict=True):
        best = BEST.get(step, 0.0)
        value += WORTH.get(step, 1.0) * ((alpha - best) ** 2 - best**2) + (beta - 0.05 * (step == 3)) ** 2
    return value


def opened(evaluate=bowl, **options):
    return search.Evaluations(evaluate, **({"tuning": TUNING, "reporting": REPORTING} | options))


SPACE = Space(n=5, steps=(0, 1, 3, 5), alpha=search.value_grid(0, 1, 0.1), beta=(0.0, 0.05))


def test_grids_are_those_of_the_paper():
    assert search.value_grid(0, 0.3, 0.1) == (0.0, 0.1, 0.2, 0.3)
    space = search.score_space(10, sigma=0.1)
    assert space.steps == tuple(range(11)) and space.alpha[:3] == (0.0, 0.05, 0.1) and space.alpha[-1] == 1.5
    assert space.beta == tuple(i / 100 for i in range(21)) and space.alphas(10) == space.alpha
    space = search.classifier_space(10, steps=(10, 0))
    assert space.steps == (0, 10) and space.beta == (0.0,)
    assert space.alphas(0) == search.value_grid(0, 1.5, 0.05) and space.alphas(10) == tuple(i / 100 for i in range(31))


def test_single_steps_and_shared_grids_find_their_minima():
    value = opened()
    single = {trial.placement.at[0]: trial for trial in search.influence(value, SPACE)}
    assert {n: t.placement.alpha[0] for n, t in single.items()} == {0: 0.2, 1: 0.0, 3: 0.6, 5: 0.1}
    assert single[3].placement.beta == (0.05,) and single[0].placement.beta == (0.0,)
    assert single[3].value == pytest.approx(10 - 2 * 0.36)
    # one alpha for 0 and 3: the mean of the best weighted with their worth, (0.2 + 1.2) / 3, rounded to the grid
    assert search.grid_search(value, SPACE, (3, 0)).placement.alpha == (0.5, 0.5)
    own = SPACE._replace(last=(0.0, 0.1, 0.2))
    assert search.grid_search(value, own, (5, 3)).placement.alpha == (0.6, 0.1)
    assert search.grid_search(value, own, (5,)).placement == Placement((5,), (0.1,), (0.0,))


def test_greedy_search_begins_at_the_end_adds_what_gains_most_and_stops():
    value = opened()
    path = search.greedy(value, SPACE)
    assert [t.placement.at for t in path] == [(), (5,), (3, 5), (0, 3, 5)]  # step 1 gains nothing and is never added
    assert path[-1].placement == Placement((0, 3, 5), (0.2, 0.6, 0.1), (0.0, 0.05, 0.0))
    assert [t.value for t in path] == pytest.approx([10, 9.96, 9.24, 9.20])
    assert len(search.greedy(value, SPACE, most=1)) == 2
    idle = lambda placement, key: 10.0 + sum(placement.alpha) * (5 in placement.at) - (3 in placement.at)
    assert [t.placement.at for t in search.greedy(opened(idle), SPACE)] == [(), (3,)]  # the end hurts: begin elsewhere


def test_a_single_step_that_beats_the_greedy_search_is_chosen():
    value_of = {(): 1.0, (0,): 0.1, (3,): 0.9, (0, 3): 0.5}
    space = Space(n=3, steps=(0, 3), alpha=(1.0,))
    choice = search.choose(opened(lambda placement, key: value_of[placement.at]), space)
    assert [trial.placement.at for trial in choice.path] == [(), (3,), (0, 3)]
    assert choice.chosen.placement.at == (0,) == choice.reported.placement.at and choice.reported.mean == pytest.approx(
        0.1
    )


def test_greedy_search_refits_earlier_steps():
    """Steps that compound, ``(1 - sum alpha)^2 + 0.1 sum alpha^2``: one step wants 0.9, two steps split it."""
    compound = lambda placement, key: (1 - sum(placement.alpha)) ** 2 + 0.1 * sum(a**2 for a in placement.alpha)
    space = Space(n=1, steps=(0, 1), alpha=search.value_grid(0, 1, 0.1))
    path = search.greedy(opened(compound), space)
    assert path[1].placement.alpha == (0.9,)
    assert max(path[2].placement.alpha) < 0.9 and sum(path[2].placement.alpha) == pytest.approx(1.0)


def test_sensitivity_and_transfer_scale_every_alpha():
    value = opened()
    placement = Placement((3, 5), (0.6, 0.1), (0.05, 0.0))
    result = search.sensitivity(value, placement)
    assert result["1"] == pytest.approx(9.24)
    assert result["0.9"] == pytest.approx(9.24 + 2 * 0.06**2 + 4 * 0.01**2) == result["1.1"]
    assert placement.moved(5, 20).at == (12, 20) and Placement((0, 2), (1.0, 1.0), (0.0, 0.0)).moved(4, 2).at == (0, 1)
    scaled = lambda placement, key: sum((a - b) ** 2 for a, b in zip(placement.alpha, (0.24, 0.04), strict=True))
    assert search.transfer(opened(scaled), placement, 5, 20).placement.alpha == pytest.approx((0.24, 0.04))
    with pytest.raises(ValueError, match="to=8: no step 3 of 5"):
        placement.moved(5, 8)


def test_what_is_reported_was_never_tuned_on(tmp_path):
    """Noise of the key alone: the search picks the luckiest alpha on its keys, the report is free of it."""
    seen = {}

    def noisy(placement, key):
        name = str(jax.random.key_data(key))
        seen.setdefault(name, set()).add(placement)
        rng = np.random.default_rng([*np.asarray(jax.random.key_data(key)), *(int(1e6 * a) for a in placement.alpha)])
        return float(rng.normal())

    space = Space(n=0, steps=(0,), alpha=search.value_grid(0, 2, 0.01))
    value = opened(noisy, tuning=TUNING[:1], reporting=jax.random.split(jax.random.key(1), 30))
    choice = search.choose(value, space, record=tmp_path / "tuning.json")
    assert choice.chosen.value < -2  # the least of 201 standard normal draws
    assert abs(choice.reported.mean) < 4 * choice.reported.error and 0.1 < choice.reported.error < 0.3
    ours = {str(jax.random.key_data(k)) for k in TUNING[:1]}
    assert all(len(placements) == (2 if name not in ours else len(placements)) for name, placements in seen.items())
    record = json.loads((tmp_path / "tuning.json").read_text())
    assert record["reported"]["runs"] == list(choice.reported.runs) and len(record["keys"]["reporting"]) == 30
    assert record["chosen"]["placement"] == {"alpha": list(choice.chosen.placement.alpha), "at": [0], "beta": [0.0]}
    assert record["space"]["n"] == 0 and set(record["sensitivity"]) == {"0.9", "1", "1.1"}


def test_overlapping_few_or_repeated_keys_are_refused():
    with pytest.raises(ValueError, match="reporting=threefry2x32:.*1 keys are tuning keys"):
        opened(reporting=jnp.concatenate([REPORTING, TUNING[1:]]))
    with pytest.raises(ValueError, match="reporting=2 keys"):
        opened(reporting=REPORTING[:2])
    with pytest.raises(ValueError, match="tuning=.*a key twice"):
        opened(tuning=TUNING[jnp.array([0, 1, 0])])
    for bad in (jax.random.key(0), jnp.arange(3)):
        with pytest.raises(TypeError, match="tuning=.*typed keys"):
            opened(tuning=bad)
    assert opened(tuning=jax.random.split(jax.random.key(0, impl="rbg"), 2)).tuning  # another generator, other keys


def test_a_killed_search_goes_on_where_it_was_and_ends_the_same(tmp_path):
    """Killed in the midst of an evaluation, with a torn line; what was evaluated is not again."""

    def killed_after(n, calls):
        def evaluate(placement, key):
            if len(calls) == n:
                raise KeyboardInterrupt
            calls.append(placement)
            return bowl(placement, key)

        return evaluate

    whole, first, second = [], [], []
    expected = search.choose(opened(killed_after(None, whole)), SPACE)
    identity = {"flow": "abc", "ts": (0.0, 1.0)}
    with pytest.raises(KeyboardInterrupt):
        search.choose(opened(killed_after(50, first), directory=tmp_path, identity=identity), SPACE)
    with (tmp_path / "tuning.jsonl").open("a") as file:
        file.write('{"placement": [[0], [0.')
    result = search.choose(opened(killed_after(None, second), directory=tmp_path, identity=identity), SPACE)
    assert result == expected and len(first) + len(second) == len(whole) == 2 * len(set(whole)) + 2 * 3
    again = []
    assert (
        search.choose(opened(killed_after(0, again), directory=tmp_path, identity=identity), SPACE) == expected
        and not again
    )
    with pytest.raises(ValueError, match="identity=.*abd.* has evaluations of .*abc"):
        opened(directory=tmp_path, identity=identity | {"flow": "abd"})


def test_a_placement_that_diverges_is_the_worst_and_stays_so_in_the_file(tmp_path):
    value = opened(
        lambda placement, key: np.nan if placement.alpha[0] > 0.5 else -placement.alpha[0], directory=tmp_path
    )
    assert search.grid_search(value, SPACE, (3,)).placement.alpha == (0.5,)
    assert opened(lambda placement, key: 0.0, directory=tmp_path)(Placement((3,), (0.6,), (0.0,))) == np.inf


def test_one_compilation_serves_all_strengths():
    """The corrected sampler with dense, traced strengths is the one with numbers, and traces once."""
    ts, traces = grids.uniform_grid(4), []
    m = mismatch.scaled(0.5, 0.3, dim=2)
    push = lambda x, t, cond=None: -x / 4
    x, key = normal(as_keys(jax.random.key(0), 16), (2,)), jax.random.key(1)

    @jax.jit
    def draw(alpha, beta):
        traces.append(1)
        fix = correctors.marginal_matching(push, alpha=grids.per_step(ts, alpha), beta=grids.per_step(ts, beta))
        return sampling.sample(sampling.rk4(m.velocity), x, ts, key=key, corrector=fix, at=range(5))

    for at in ((), (0,), (1, 4)):
        placement = Placement(at, (0.3,) * len(at), (0.2,) * len(at))
        fix = correctors.marginal_matching(push, alpha=0.3, beta=0.2)
        expected = sampling.sample(sampling.rk4(m.velocity), x, ts, key=key, corrector=fix, at=at)
        np.testing.assert_allclose(draw(*placement.dense(4)), expected, atol=2e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("eps", [0.2, -0.2])
def test_the_best_classifier_step_of_a_gaussian_is_the_closed_one(eps):
    """``alpha* = a b^2 / (a + b)``, found on the distance to the data's deviation and rounded to the grid."""
    m, n = mismatch.scaled(0.5, eps, dim=1), 4096
    ts, push = grids.uniform_grid(10), mismatch.gradient(m.logit)

    @jax.jit
    def std(key, alpha):
        x = normal(as_keys(key, n), (1,))
        fix = correctors.marginal_matching(push, alpha=grids.per_step(ts, alpha))
        y = sampling.sample(sampling.rk4(m.velocity), x, ts, key=key, corrector=fix, at=range(11))
        return y.std() / x.std()

    value = opened(lambda placement, key: abs(float(std(key, placement.dense(10)[0])) - 0.5))
    a, b = 0.5 * np.exp(eps), 0.5
    space = Space(n=10, steps=(10,), alpha=search.value_grid(0, 0.3, 0.01))
    choice = search.choose(value, space)
    assert abs(choice.chosen.placement.alpha[0] - a * b**2 / (a + b)) <= 0.0051
    assert choice.reported.mean < 0.1 * choice.plain.mean
    assert choice.sensitivity["0.9"] > choice.sensitivity["1"] < choice.sensitivity["1.1"]
