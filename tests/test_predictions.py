"""Conversions of predictions and of paths, against closed forms and the definitions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_paths import ALL, snr

from fmjax import oracles, paths

every_path = pytest.mark.parametrize("path", ALL.values(), ids=ALL)
PATHS = [paths.linear, paths.trigonometric]
MEANS = np.array([[2.0, 0.5], [-1.5, 1.0], [0.3, -2.0]])


def oracle_of(name, path):
    if name == "gaussian":
        return oracles.gaussian(jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0]), path=path)
    return oracles.mixture(jnp.asarray(MEANS, float), jnp.array([0.3, 0.2, 1.0]), jnp.array([0.5, 0.2, 0.3]), path=path)


def per_time(f, t):
    """``f`` and its derivative at every time of ``t``."""
    return jax.jit(lambda t: jax.jvp(f, (t,), (jnp.ones_like(t),)))(t)


@pytest.mark.parametrize("make", PATHS)
def test_endpoints_invert_with_velocity(make, x64, key):
    x0, x1 = jax.random.normal(key, (2, 7, 2, 2, 1))
    t = jnp.linspace(0.0, 1.0, 7)
    noise, data = jax.jit(lambda x0, x1: paths.endpoints(make(), *paths.with_velocity(make(), x0, x1, t), t))(x0, x1)
    np.testing.assert_allclose(noise, x0, atol=1e-13)
    np.testing.assert_allclose(data, x1, atol=1e-13)


def gradient_of_density(oracle, x, t):
    return jax.grad(lambda x: oracle.log_density(x, t).sum())(x)


@pytest.mark.parametrize("make", PATHS)
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_the_score_is_the_gradient_of_the_log_density(make, name, x64, key):
    path = make()
    if name == "gaussian":
        oracle = oracles.gaussian(jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0]), path=path)
    else:
        oracle = oracles.mixture(jax.random.normal(key, (4, 2)) * 2, jnp.array([0.3, 0.2, 1.0, 0.7]), path=path)
    x = jax.random.normal(jax.random.key(1), (6, 2)) * 1.5
    t = jnp.array([0.0, 0.2, 0.5, 0.8, 0.95, 0.99])

    @jax.jit
    def fields(x):
        v = oracle.velocity(x, t)
        return gradient_of_density(oracle, x, t), oracle.score(x, t), paths.score(path, x, v, t)

    from_density, score, from_velocity = fields(x)
    np.testing.assert_allclose(score, from_density, rtol=1e-10)
    np.testing.assert_allclose(from_velocity, from_density, rtol=1e-9, atol=1e-9)


def rows(path, noise, data, t):
    """Every prediction by its definition; the velocity of the pair by the derivative of the interpolant."""
    alpha, beta = (c[:, None] for c in path.coefficients(t))
    x, velocity = paths.with_velocity(path, noise, data, t)
    v = beta * noise - alpha * data
    return x, {"velocity": velocity, "noise": noise, "data": data, "score": -noise / alpha, "v_prediction": v}


def converted(path, noise, data, t):
    """Every prediction, and the conversions from every kind to every other, in one program."""

    @jax.jit
    def table(noise, data):
        x, values = rows(path, noise, data, t)
        convert = lambda kind, to: paths.convert(path, x, values[kind], t, kind=kind, to=to)
        return values, {(kind, to): convert(kind, to) for kind in values for to in values}

    return table(noise, data)


@every_path
def test_every_prediction_converts_to_every_other(path, x64, key):
    noise, data = jax.random.normal(key, (2, 5, 3))
    values, conversions = converted(path, noise, data, jnp.array([0.01, 0.3, 0.5, 0.8, 0.99]))
    assert set(values) == set(paths.PREDICTIONS)
    # the worst determinant is the smallest coefficient, down to 0.0066, against alpha up to 50 for ve
    for (kind, to), result in conversions.items():
        np.testing.assert_allclose(result, values[to], rtol=1e-10, atol=1e-10, err_msg=f"{kind} to {to}")


@every_path
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_predictions_of_an_oracle_are_its_conditional_means(path, name, x64, key):
    oracle = oracle_of(name, path)
    t = jnp.array([0.05, 0.3, 0.6, 0.95])

    @jax.jit
    def fields(key):
        alpha, beta = (c[:, None] for c in path.coefficients(t))
        x = beta * oracle.sample(key, 4) + alpha * jax.random.normal(jax.random.key(1), (4, 2))
        score, v = gradient_of_density(oracle, x, t), oracle.velocity(x, t)
        convert = lambda value, kind, to: paths.convert(path, x, value, t, kind=kind, to=to)
        results = convert(score, "score", "velocity"), convert(v, "velocity", "score"), convert(v, "velocity", "data")
        return results, (v, score, (x + alpha**2 * score) / beta)

    for result, expected in zip(*fields(key), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "sub_vp", "ve", "target_conditional"])
def test_conversions_at_the_ends_are_finite_where_determined(name, x64, key):
    noise, data = jax.random.normal(key, (2, 2, 3))
    path, ends = ALL[name], jnp.array([0.0, 1.0])
    values, conversions = converted(path, noise, data, ends)
    for end, (alpha, beta) in enumerate(zip(*path.coefficients(ends), strict=True)):
        undetermined = set()  # the (kind, to) that the system leaves open
        if beta == 0:
            undetermined |= {(k, to) for k in ("noise", "score") for to in ("velocity", "data", "v_prediction")}
        if alpha == 0:
            undetermined |= {("data", to) for to in ("velocity", "noise", "v_prediction")}
            undetermined |= {(k, "score") for k in values} | {("score", to) for to in values}
        for (kind, to), result in conversions.items():
            if alpha == 0 and kind == to == "score":  # returned unchanged
                np.testing.assert_array_equal(result[end], values["score"][end])
            elif (kind, to) in undetermined:
                assert not np.isfinite(result[end]).any(), (end, kind, to, result[end])
            else:  # the smallest determinant is 0.0066 of sub_vp at its start
                np.testing.assert_allclose(result[end], values[to][end], rtol=1e-12, atol=1e-12)


def test_an_unknown_prediction_is_refused():
    x = jnp.ones((2, 1))
    with pytest.raises(ValueError, match="kind='epsilon'.*velocity, noise"):
        paths.convert(paths.linear(), x, x, 0.5, kind="epsilon", to="data")
    with pytest.raises(ValueError, match="to='x1'"):
        paths.convert(paths.linear(), x, x, 0.5, kind="data", to="x1")


def common_times(old, new, n=400):
    """Times of ``new`` from 1e-5 to 1 - 1e-5, dense at both ends, whose ratio ``old`` has; a few evenly chosen."""
    ends = np.geomspace(1e-5, 0.5, n)
    t = np.concatenate([ends, 1 - ends[::-1]])
    low, high = snr(old, 1e-6), snr(old, 1 - 1e-6)
    ratio = snr(new, t)
    t = t[(ratio >= low) & (ratio <= high)]
    return jnp.asarray(t[np.linspace(0, len(t) - 1, 24).astype(int)])


@functools.cache
def velocity_of(name, path):
    """The exact velocity on a path of ``ALL``, compiled once for all tests."""
    return jax.jit(oracle_of(name, ALL[path]).velocity)


@pytest.mark.parametrize("old", ALL)
def test_a_changed_velocity_is_the_velocity_on_the_new_path(old, x64, key):
    """Of a Gaussian and of a mixture, from ``old`` to every path; and matched times have equal ratios and return."""
    noise = np.asarray(jax.random.normal(jax.random.key(1), (24, 2)))
    data = {name: np.asarray(oracle_of(name, ALL[old]).sample(key, 24)) for name in ("gaussian", "mixture")}
    for new, path in ALL.items():
        t = common_times(ALL[old], path)
        alpha, beta = np.asarray(path.coefficients(t))[..., None]
        for name, x1 in data.items():
            x = jnp.asarray(beta * x1 + alpha * noise)
            changed = paths.change(velocity_of(name, old), ALL[old], path)(x, t)
            expected = np.asarray(velocity_of(name, new)(x, t))
            # rounding of s near 1 (1e-16 of 1e-6) reaches the level of noise as 1e-10; alpha' of ve is up to 426
            scale = 1 + np.abs(expected)
            np.testing.assert_allclose(changed / scale, expected / scale, atol=1e-9, err_msg=f"{old} to {new}: {name}")
        s, c = paths.match_snr(ALL[old], path, t)
        np.testing.assert_allclose(c * jnp.stack(ALL[old].coefficients(s)), path.coefficients(t), rtol=1e-9)
        back, inverse = paths.match_snr(path, ALL[old], s)
        np.testing.assert_allclose(back, t, rtol=1e-9, err_msg=f"{old} to {new}")
        np.testing.assert_allclose(inverse * c, 1, rtol=1e-9)


@pytest.mark.parametrize("path", [ALL["linear"], ALL["vp"], ALL["target_conditional"]])
def test_a_path_matched_with_itself_keeps_its_ends_to_the_bit(path):
    ends = jnp.array([0.0, 1.0])
    s, c = paths.match_snr(path, path, ends)
    np.testing.assert_array_equal(s, ends)
    np.testing.assert_array_equal(c, 1.0)


@pytest.mark.parametrize(("old", "new"), [("vp", "linear"), ("linear", "vp")])
def test_a_change_with_vp_holds_in_float32_up_to_its_span(old, new, key):
    x = jax.random.normal(key, (3, 2))
    t = jnp.array([0.5, paths.vp().span[1], 1.0])
    changed = jax.jit(paths.change(oracle_of("mixture", ALL[old]).velocity, ALL[old], ALL[new]))(x, t)
    expected = jax.jit(oracle_of("mixture", ALL[new]).velocity)(x, t)
    # the time on vp of a linear 1 - 1e-3 is 1 - 1e-5, whose last bit, 6e-8, is 3e-3 of alpha = 1e-3
    np.testing.assert_allclose(changed[:2], expected[:2], rtol=1e-4, atol=1e-4)
    assert not np.isfinite(changed[2]).any()


INVERSES = {  # time on the path at noise level sigma = alpha / beta, in closed form
    "linear": lambda sigma: 1 / (1 + sigma),
    "trigonometric": lambda sigma: 2 / np.pi * jnp.arctan(1 / sigma),
    "vp": lambda sigma: 1 - (jnp.sqrt(0.01 + 2 * 19.9 * jnp.log1p(sigma**2)) - 0.1) / 19.9,  # arXiv 2206.00364
    "ve": lambda sigma: 1 - jnp.log(sigma / 0.01) / jnp.log(5000.0),
    "target_conditional": lambda sigma: 1 / (sigma + 0.98),
}


@pytest.mark.parametrize("old", INVERSES)
def test_the_matched_time_and_its_derivatives_are_the_closed_form(old, x64):
    t = jnp.array([0.1, 0.35, 0.6, 0.9])
    matched = lambda t: paths.match_snr(ALL[old], paths.linear(), t)[0]
    closed = lambda t: INVERSES[old]((1 - t) / t)

    @jax.jit
    def derivatives(t):
        first = lambda f: jax.jvp(f, (t,), (jnp.ones_like(t),))
        second = lambda f: jax.vmap(jax.grad(jax.grad(f)))(t)
        return [(*first(f), second(f)) for f in (matched, closed)]

    for result, expected, rtol, atol in zip(*derivatives(t), (1e-13, 1e-12, 1e-10), (0, 0, 1e-10), strict=True):
        np.testing.assert_allclose(result, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("old", "new"), [("trigonometric", "linear"), ("ve", "vp"), ("vp", "target_conditional")])
def test_a_changed_velocity_follows_the_chain_rule(old, new, x64, key):
    v = oracle_of("mixture", ALL[old]).velocity
    t = jnp.array([0.2, 0.4, 0.6, 0.8, 0.9])

    @jax.jit
    def both(x):
        match = lambda t: paths.match_snr(ALL[old], ALL[new], t)
        (s, c), (ds, dc) = jax.jvp(match, (t,), (jnp.ones_like(t),))
        rule = (dc / c)[:, None] * x + (c * ds)[:, None] * v(x / c[:, None], s)
        return paths.change(v, ALL[old], ALL[new])(x, t), rule

    np.testing.assert_allclose(*both(jax.random.normal(key, (5, 2))), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("old", "new"), [("vp", "linear"), ("linear", "ve")])
def test_trajectories_correspond_at_equal_ratios(old, new, x64, key):
    @jax.jit
    def both(x):
        (r, c_r), (s, c_s) = (paths.match_snr(ALL[old], ALL[new], jnp.full(3, t)) for t in (0.3, 0.8))
        by_old = c_s[:, None] * oracle_of("gaussian", ALL[old]).flow_map(x / c_r[:, None], r, s)
        return by_old, oracle_of("gaussian", ALL[new]).flow_map(x, 0.3, 0.8)

    np.testing.assert_allclose(*both(jax.random.normal(key, (3, 2))), rtol=1e-11)


REACH = {0.0: ("linear", "trigonometric", "target_conditional"), 1.0: ("linear", "trigonometric", "sub_vp")}


@pytest.mark.parametrize("end", REACH)
def test_a_changed_velocity_and_its_derivatives_hold_at_the_ends(end, x64, key):
    """At an end that both paths reach: value, derivative along ``x`` and ``t``, and gradient of a loss in ``t``."""
    x, ends = jax.random.normal(key, (1, 2)), jnp.array([end])

    @jax.jit
    def derivatives(x, ends):
        tangents = (jnp.ones_like(x), jnp.ones_like(ends))
        loss = lambda f: jax.grad(lambda t: (f(x, t) ** 2).sum())(ends)
        results = {}
        for old, new in itertools.permutations(REACH[end], 2):
            changed = paths.change(oracle_of("mixture", ALL[old]).velocity, ALL[old], ALL[new])
            results[old, new] = *jax.jvp(changed, (x, ends), tangents), loss(changed)
        exact = {new: oracle_of("mixture", ALL[new]).velocity for new in REACH[end]}
        return results, {new: (*jax.jvp(f, (x, ends), tangents), loss(f)) for new, f in exact.items()}

    results, exact = derivatives(x, ends)
    for (old, new), result in results.items():
        for a, b, tolerance in zip(result, exact[new], (1e-9, 1e-9, 1e-10), strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=f"{old} to {new}")


def test_before_the_start_of_the_old_path_the_data_prediction_is_held(x64, key):
    # at t = 0 the exact velocity of the linear path is mean - x; with C = 1 + r^2 std^2 at the ratio r = 1 / sigma_max
    # the held data prediction for y = sigma_max x is mean + r std^2 (x - r mean) / C
    x = np.asarray(jax.random.normal(key, (4, 2)))
    mean, std, linear = np.array([1.0, -2.0]), np.array([0.5, 2.0]), paths.linear()
    for sigma_max in (50.0, 500.0):
        old, r = paths.ve(sigma_max=sigma_max), 1 / sigma_max
        changed = jax.jit(paths.change(oracle_of("gaussian", old).velocity, old, linear))(x, 0.0)
        held = mean + r * std**2 * (x - r * mean) / (1 + r**2 * std**2)
        np.testing.assert_allclose(changed, held - x, rtol=1e-10, atol=1e-10)
    start, scale = paths.match_snr(linear, paths.ve(sigma_max=80.0), jnp.zeros(()))
    np.testing.assert_allclose((start, scale), (1 / 81, 81), rtol=1e-13)  # arXiv 2206.00364: sigma = 80


def test_beyond_the_end_of_the_old_path_the_noise_prediction_is_held(x64, key):
    x = np.asarray(jax.random.normal(key, (4, 2)))
    mean, std, linear = np.array([1.0, -2.0]), np.array([0.5, 2.0]), paths.linear()
    old, sigma = paths.target_conditional(sigma_min=0.02), 0.02
    noise = sigma * (x - mean) / (sigma**2 + std**2)  # E[x0 | I_1 = x] on the old path
    changed = jax.jit(paths.change(oracle_of("gaussian", old).velocity, old, linear))(x, 1.0)
    np.testing.assert_allclose(changed, x - noise, rtol=1e-11, atol=1e-12)
    s, ds = per_time(lambda t: paths.match_snr(old, linear, t)[0], jnp.array([0.5, 0.99, 1.0]))
    np.testing.assert_array_equal(s[1:], 1.0)
    np.testing.assert_array_equal(ds[1:], 0.0)
    assert ds[0] > 0.9


def test_a_change_in_float32_keeps_the_type_and_the_condition(key):
    conditions = []
    velocity = lambda x, t, cond=None: conditions.append(cond) or oracle_of("mixture", paths.vp()).velocity(x, t)
    x = jax.random.normal(key, (3, 2))
    t = jnp.array([0.1, 0.5, 0.9])
    changed = jax.jit(lambda x: paths.change(velocity, paths.vp(), paths.linear())(x, t, "labels"))(x)
    assert conditions == ["labels"] and changed.dtype == jnp.float32
    expected = jax.jit(oracle_of("mixture", paths.linear()).velocity)(x, t)
    np.testing.assert_allclose(changed, expected, rtol=2e-4, atol=2e-4)
