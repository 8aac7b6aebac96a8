import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths

PATHS = [paths.linear, paths.trigonometric]
ALL = {
    "linear": paths.linear(),
    "trigonometric": paths.trigonometric(),
    "vp": paths.vp(),
    "sub_vp": paths.sub_vp(),
    "ve": paths.ve(),
    "target_conditional": paths.target_conditional(sigma_min=0.02),
}
every_path = pytest.mark.parametrize("path", ALL.values(), ids=ALL)


def law(name, path):
    if name == "gaussian":
        return oracles.gaussian(jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0]), path=path)
    means = jnp.array([[2.0, 0.5], [-1.5, 1.0], [0.3, -2.0]])
    return oracles.mixture(means, jnp.array([0.3, 0.2, 1.0]), jnp.array([0.5, 0.2, 0.3]), path=path)


def per_time(f, t):
    """``f`` and its derivative at every time of ``t``."""
    return jax.jvp(f, (t,), (jnp.ones_like(t),))


def snr(path, t):
    alpha, beta = path.coefficients(jnp.asarray(t, float))
    return beta / alpha


@pytest.mark.parametrize("make", PATHS)
def test_end_points_of_the_path_are_source_and_data(make, x64):
    x0, x1 = jnp.arange(6.0).reshape(3, 2), -jnp.ones((3, 2))
    np.testing.assert_allclose(paths.with_velocity(make(), x0, x1, 0.0)[0], x0, atol=1e-15)
    np.testing.assert_allclose(paths.with_velocity(make(), x0, x1, 1.0)[0], x1, atol=1e-15)


@pytest.mark.parametrize("make", PATHS)
def test_velocity_is_the_time_derivative(make, x64, key):
    x0, x1 = jax.random.normal(key, (2, 5, 3))
    t = jnp.linspace(0.1, 0.9, 5)
    h = 1e-6
    _, u = paths.with_velocity(make(), x0, x1, t)
    numeric = (paths.with_velocity(make(), x0, x1, t + h)[0] - paths.with_velocity(make(), x0, x1, t - h)[0]) / (2 * h)
    np.testing.assert_allclose(u, numeric, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", PATHS)
def test_endpoints_invert_with_velocity(make, x64, key):
    x0, x1 = jax.random.normal(key, (2, 7, 2, 2, 1))
    t = jnp.linspace(0.0, 1.0, 7)
    got0, got1 = paths.endpoints(make(), *paths.with_velocity(make(), x0, x1, t), t)
    np.testing.assert_allclose(got0, x0, atol=1e-13)
    np.testing.assert_allclose(got1, x1, atol=1e-13)


@pytest.mark.parametrize("make", PATHS)
@pytest.mark.parametrize("law", ["gaussian", "mixture"])
def test_score_of_the_velocity_is_the_gradient_of_the_log_density(make, law, x64, key):
    path = make()
    if law == "gaussian":
        oracle = oracles.gaussian(jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0]), path=path)
    else:
        oracle = oracles.mixture(jax.random.normal(key, (4, 2)) * 2, jnp.array([0.3, 0.2, 1.0, 0.7]), path=path)
    x = jax.random.normal(jax.random.key(1), (6, 2)) * 1.5
    t = jnp.array([0.0, 0.2, 0.5, 0.8, 0.95, 0.99])
    from_density = jax.grad(lambda x: oracle.log_density(x, t).sum())(x)
    np.testing.assert_allclose(oracle.score(x, t), from_density, rtol=1e-10)
    np.testing.assert_allclose(paths.score(path, x, oracle.velocity(x, t), t), from_density, rtol=1e-9, atol=1e-9)


# what every schedule is at its ends: (alpha_0, beta_0), (alpha_1, beta_1), worked out from the published formulas
ENDS = {
    "linear": ((1, 0), (0, 1)),
    "trigonometric": ((1, 0), (0, 1)),
    "vp": ((np.sqrt(1 - np.exp(-10.05)), np.exp(-5.025)), (0, 1)),
    "sub_vp": ((1 - np.exp(-10.05), np.exp(-5.025)), (0, 1)),
    "ve": ((50, 1), (0.01, 1)),
    "target_conditional": ((1, 0), (0.02, 1)),
}


@pytest.mark.parametrize("name", ALL)
def test_the_ends_of_a_schedule_are_the_stated_ones(name, x64):
    for t, want in zip((0.0, 1.0), ENDS[name], strict=True):
        np.testing.assert_allclose(ALL[name].coefficients(jnp.asarray(t)), want, rtol=1e-13, atol=1e-15)
    ratio = snr(ALL[name], np.linspace(0, 1, 101)[:-1])
    assert np.all(np.diff(ratio) > 0)


def test_the_defaults_are_those_of_the_sources(x64):
    t = jnp.linspace(0.1, 0.9, 5)
    for default, written in [
        (paths.vp(), paths.vp(beta_min=0.1, beta_max=20.0)),
        (paths.sub_vp(), paths.sub_vp(beta_min=0.1, beta_max=20.0)),
        (paths.ve(), paths.ve(sigma_min=0.01, sigma_max=50.0)),
    ]:
        np.testing.assert_array_equal(default.coefficients(t), written.coefficients(t))
    alpha, _ = paths.target_conditional().coefficients(t)
    np.testing.assert_allclose(alpha, 1 - (1 - 1e-4) * t, rtol=1e-15)


@pytest.mark.parametrize("name", ["vp", "sub_vp"])
def test_the_noise_level_keeps_its_relative_precision_in_float32_near_the_data(name):
    tau = 2.0 ** -np.arange(4, 21, 4)  # 1 - tau is exact in float32
    one_minus_square = -np.expm1(-(tau**2) * 19.9 / 2 - tau * 0.1)
    want = np.sqrt(one_minus_square) if name == "vp" else one_minus_square
    alpha, _ = ALL[name].coefficients(jnp.asarray(1 - tau, jnp.float32))
    np.testing.assert_allclose(alpha, want, rtol=1e-6)


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve"])
def test_coefficients_solve_the_moment_equations_of_their_sde(name, x64):
    # dx = f x d tau + g dW: mean' = f mean and variance' = 2 f variance + g^2, in tau = 1 - t
    tau = jnp.linspace(0.01, 1.0, 12)
    nu = 0.1 + tau * 19.9
    f, g2 = {
        "vp": (-nu / 2, nu),
        "sub_vp": (-nu / 2, nu * (1 - jnp.exp(-0.2 * tau - 19.9 * tau**2))),
        "ve": (0 * tau, (0.01 * 5000**tau) ** 2 * 2 * jnp.log(5000)),
    }[name]
    (alpha, mean), (d_alpha, d_mean) = per_time(lambda tau: ALL[name].coefficients(1 - tau), tau)
    np.testing.assert_allclose(d_mean, f * mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(2 * alpha * d_alpha, 2 * f * alpha**2 + g2, rtol=1e-11)


def test_the_target_conditional_velocity_is_the_published_one(x64, key):
    x0, x1 = jax.random.normal(key, (2, 5, 3))
    t = jnp.linspace(0.0, 1.0, 5)
    x, u = paths.with_velocity(ALL["target_conditional"], x0, x1, t)
    want = (x1 - 0.98 * x) / (1 - 0.98 * t[:, None])  # arXiv 2210.02747, eq. 21
    np.testing.assert_allclose(u, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (paths.vp, {"beta_min": 0.0}, "0 < beta_min <= beta_max, got beta_min=0.0"),
        (paths.sub_vp, {"beta_min": 3.0, "beta_max": 2.0}, "got beta_min=3.0, beta_max=2.0"),
        (paths.ve, {"sigma_min": 0.0}, "0 < sigma_min < sigma_max, got sigma_min=0.0"),
        (paths.ve, {"sigma_min": 2.0, "sigma_max": 2.0}, "got sigma_min=2.0, sigma_max=2.0"),
        (paths.target_conditional, {"sigma_min": 1.0}, "0 <= sigma_min < 1, got sigma_min=1.0"),
        (paths.target_conditional, {"sigma_min": -0.1}, "got sigma_min=-0.1"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def rows(path, noise, data, t):
    """Every prediction by its definition; the velocity of the pair by the derivative of the interpolant."""
    alpha, beta = (c[:, None] for c in path.coefficients(t))
    x, velocity = paths.with_velocity(path, noise, data, t)
    v = beta * noise - alpha * data
    return x, {"velocity": velocity, "noise": noise, "data": data, "score": -noise / alpha, "v_prediction": v}


@every_path
def test_every_prediction_converts_to_every_other(path, x64, key):
    noise, data = jax.random.normal(key, (2, 5, 3))
    t = jnp.array([0.01, 0.3, 0.5, 0.8, 0.99])
    x, values = rows(path, noise, data, t)
    assert tuple(values) == paths.PREDICTIONS
    # the worst determinant is the smallest coefficient, down to 0.0066, against alpha up to 50 for ve
    for given in values:
        for to in values:
            got = paths.convert(path, x, values[given], t, kind=given, to=to)
            np.testing.assert_allclose(got, values[to], rtol=1e-10, atol=1e-10, err_msg=f"{given} to {to}")


@every_path
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_predictions_of_a_law_are_its_conditional_means(path, name, x64, key):
    oracle = law(name, path)
    t = jnp.array([0.05, 0.3, 0.6, 0.95])
    alpha, beta = (c[:, None] for c in path.coefficients(t))
    x = beta * oracle.sample(key, 4) + alpha * jax.random.normal(jax.random.key(1), (4, 2))
    score = jax.grad(lambda x: oracle.log_density(x, t).sum())(x)
    v = oracle.velocity(x, t)
    convert = lambda value, given, to: paths.convert(path, x, value, t, kind=given, to=to)
    np.testing.assert_allclose(convert(score, "score", "velocity"), v, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(convert(v, "velocity", "score"), score, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(convert(v, "velocity", "data"), (x + alpha**2 * score) / beta, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "sub_vp", "ve", "target_conditional"])
def test_conversions_at_the_ends_say_what_they_can_and_nothing_else(name, x64, key):
    noise, data = jax.random.normal(key, (2, 2, 3))
    path, ends = ALL[name], jnp.array([0.0, 1.0])
    x, values = rows(path, noise, data, ends)
    for end, (alpha, beta) in enumerate(zip(*path.coefficients(ends), strict=True)):
        open_ = set()  # the (given, to) that the system leaves open
        if beta == 0:
            open_ |= {(g, to) for g in ("noise", "score") for to in ("velocity", "data", "v_prediction")}
        if alpha == 0:
            open_ |= {("data", to) for to in ("velocity", "noise", "v_prediction")}
            open_ |= {(g, "score") for g in values} | {("score", to) for to in values}
        for given in values:
            for to in values:
                got = paths.convert(path, x, values[given], ends, kind=given, to=to)[end]
                if alpha == 0 and given == to == "score":  # handed through as it came
                    np.testing.assert_array_equal(got, values["score"][end])
                elif (given, to) in open_:
                    assert not np.isfinite(got).any(), (end, given, to, got)
                else:  # the smallest determinant is 0.0066 of sub_vp at its start
                    np.testing.assert_allclose(got, values[to][end], rtol=1e-12, atol=1e-12)


def test_an_unknown_prediction_is_refused():
    x = jnp.ones((2, 1))
    with pytest.raises(ValueError, match="no prediction 'epsilon'; there are velocity, noise"):
        paths.convert(paths.linear(), x, x, 0.5, kind="epsilon", to="data")
    with pytest.raises(ValueError, match="no prediction 'x1'"):
        paths.convert(paths.linear(), x, x, 0.5, kind="data", to="x1")


def common_times(old, new, n=400):
    """Times of ``new`` from 1e-5 to 1 - 1e-5, dense at both ends, whose ratio ``old`` has; a few evenly chosen."""
    ends = np.geomspace(1e-5, 0.5, n)
    t = np.concatenate([ends, 1 - ends[::-1]])
    low, high = snr(old, 1e-6), snr(old, 1 - 1e-6)
    t = t[(snr(new, t) >= low) & (snr(new, t) <= high)]
    return jnp.asarray(t[np.linspace(0, len(t) - 1, 24).astype(int)])


@pytest.mark.parametrize("name", ["gaussian", "mixture"])
@pytest.mark.parametrize("old", ALL)
def test_a_changed_velocity_is_the_velocity_of_the_law_on_the_new_path(old, name, x64, key):
    source = law(name, ALL[old])
    for new, path in ALL.items():
        target = law(name, path)
        t = common_times(ALL[old], path)
        alpha, beta = (c[:, None] for c in path.coefficients(t))
        x = beta * source.sample(key, len(t)) + alpha * jax.random.normal(jax.random.key(1), (len(t), 2))
        got = paths.change(source.velocity, ALL[old], path)(x, t)
        # rounding of s near 1 (1e-16 of 1e-6) reaches the level of noise as 1e-10; alpha' of ve is up to 426
        want = target.velocity(x, t)
        scale = 1 + jnp.abs(want)
        np.testing.assert_allclose(got / scale, want / scale, atol=1e-9, err_msg=f"{old} to {new}")


@pytest.mark.parametrize("old", ALL)
def test_matched_times_and_scales_are_those_of_equal_ratios_and_round_trip(old, x64):
    for new, path in ALL.items():
        t = common_times(ALL[old], path)
        s, c = paths.match_snr(ALL[old], path, t)
        np.testing.assert_allclose(c * jnp.stack(ALL[old].coefficients(s)), path.coefficients(t), rtol=1e-9)
        back, inverse = paths.match_snr(path, ALL[old], s)
        np.testing.assert_allclose(back, t, rtol=1e-9, err_msg=f"{old} to {new}")
        np.testing.assert_allclose(inverse * c, 1, rtol=1e-9)


@pytest.mark.parametrize("path", [ALL["linear"], ALL["vp"], ALL["target_conditional"]])
def test_the_change_of_a_path_to_itself_keeps_its_ends_to_the_bit(path):
    ends = jnp.array([0.0, 1.0])
    s, c = paths.match_snr(path, path, ends)
    np.testing.assert_array_equal(s, ends)
    np.testing.assert_array_equal(c, 1.0)


@pytest.mark.parametrize(("old", "new"), [("vp", "linear"), ("linear", "vp")])
def test_a_change_from_or_to_vp_holds_in_float32_until_the_stated_end_and_has_no_value_at_one(old, new, key):
    x = jax.random.normal(key, (3, 2))
    t = jnp.array([0.5, 1 - 1e-3, 1.0])
    got = paths.change(law("mixture", ALL[old]).velocity, ALL[old], ALL[new])(x, t)
    want = law("mixture", ALL[new]).velocity(x, t)
    # the time on vp of a linear 1 - 1e-3 is 1 - 1e-5, whose last bit, 6e-8, is 3e-3 of alpha = 1e-3
    np.testing.assert_allclose(got[:2], want[:2], rtol=1e-4, atol=1e-4)
    assert not np.isfinite(got[2]).any()


INVERSES = {  # time on the path at noise level sigma = alpha / beta, in closed form
    "linear": lambda sigma: 1 / (1 + sigma),
    "trigonometric": lambda sigma: 2 / np.pi * jnp.arctan(1 / sigma),
    "vp": lambda sigma: 1 - (jnp.sqrt(0.01 + 2 * 19.9 * jnp.log1p(sigma**2)) - 0.1) / 19.9,  # arXiv 2206.00364
    "ve": lambda sigma: 1 - jnp.log(sigma / 0.01) / jnp.log(5000.0),
    "target_conditional": lambda sigma: 1 / (sigma + 0.98),
}


@pytest.mark.parametrize("old", INVERSES)
def test_the_matched_time_and_its_derivatives_are_those_of_the_closed_form(old, x64):
    t = jnp.array([0.1, 0.35, 0.6, 0.9])
    matched = lambda t: paths.match_snr(ALL[old], paths.linear(), t)[0]
    closed = lambda t: INVERSES[old]((1 - t) / t)
    np.testing.assert_allclose(matched(t), closed(t), rtol=1e-13)
    forward = lambda f: per_time(f, t)[1]
    np.testing.assert_allclose(forward(matched), forward(closed), rtol=1e-12)
    second = lambda f: jax.vmap(jax.grad(jax.grad(f)))(t)
    np.testing.assert_allclose(jax.jit(second, static_argnums=0)(matched), second(closed), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("old", "new"), [("trigonometric", "linear"), ("ve", "vp"), ("vp", "target_conditional")])
def test_a_changed_velocity_is_the_rule_with_the_jacobians_of_time_and_scale(old, new, x64, key):
    v = law("mixture", ALL[old]).velocity
    x = jax.random.normal(key, (5, 2))
    t = jnp.array([0.2, 0.4, 0.6, 0.8, 0.9])
    (s, c), (ds, dc) = per_time(lambda t: paths.match_snr(ALL[old], ALL[new], t), t)
    rule = (dc / c)[:, None] * x + (c * ds)[:, None] * v(x / c[:, None], s)
    np.testing.assert_allclose(paths.change(v, ALL[old], ALL[new])(x, t), rule, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("old", "new"), [("vp", "linear"), ("linear", "ve")])
def test_trajectories_correspond_at_equal_ratios(old, new, x64, key):
    x = jax.random.normal(key, (3, 2))
    (r, c_r), (s, c_s) = (paths.match_snr(ALL[old], ALL[new], jnp.full(3, t)) for t in (0.3, 0.8))
    by_old = c_s[:, None] * law("gaussian", ALL[old]).flow_map(x / c_r[:, None], r, s)
    np.testing.assert_allclose(by_old, law("gaussian", ALL[new]).flow_map(x, 0.3, 0.8), rtol=1e-11)


REACH = {0.0: ("linear", "trigonometric", "target_conditional"), 1.0: ("linear", "trigonometric", "sub_vp")}
PAIRS = [(end, *pair) for end, names in REACH.items() for pair in itertools.permutations(names, 2)]


@pytest.mark.parametrize(("end", "old", "new"), PAIRS)
def test_a_changed_velocity_and_its_derivatives_hold_at_the_ends_that_both_paths_reach(end, old, new, x64, key):
    x = jax.random.normal(key, (1, 2))
    ends = jnp.array([end])
    changed = paths.change(law("mixture", ALL[old]).velocity, ALL[old], ALL[new])
    want = law("mixture", ALL[new]).velocity
    tangents = (jnp.ones_like(x), jnp.ones_like(ends))
    for a, b in zip(jax.jvp(changed, (x, ends), tangents), jax.jvp(want, (x, ends), tangents), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    loss = lambda f: jax.grad(lambda t: (f(x, t) ** 2).sum())(ends)
    np.testing.assert_allclose(loss(changed), loss(want), rtol=1e-10, atol=1e-10)


def test_before_the_start_of_the_old_path_its_data_prediction_is_held(x64, key):
    # at t = 0 the exact velocity of the linear path is mean - x; with C = 1 + r^2 std^2 at the ratio r = 1 / sigma_max
    # the held data prediction for y = sigma_max x is mean + r std^2 (x - r mean) / C
    x = jax.random.normal(key, (4, 2))
    mean, std, linear = jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0]), paths.linear()
    for sigma_max in (50.0, 500.0):
        old, r = paths.ve(sigma_max=sigma_max), 1 / sigma_max
        got = paths.change(law("gaussian", old).velocity, old, linear)(x, 0.0)
        held = mean + r * std**2 * (x - r * mean) / (1 + r**2 * std**2)
        np.testing.assert_allclose(got, held - x, rtol=1e-10, atol=1e-10)
    start, scale = paths.match_snr(linear, paths.ve(sigma_max=80.0), jnp.zeros(()))
    np.testing.assert_allclose((start, scale), (1 / 81, 81), rtol=1e-13)  # arXiv 2206.00364: sigma = 80


def test_beyond_the_end_of_the_old_path_its_noise_prediction_is_held(x64, key):
    x = jax.random.normal(key, (4, 2))
    mean, std, linear = jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0]), paths.linear()
    old, sigma = paths.target_conditional(sigma_min=0.02), 0.02
    noise = sigma * (x - mean) / (sigma**2 + std**2)  # E[x0 | I_1 = x] on the old path
    got = paths.change(law("gaussian", old).velocity, old, linear)(x, 1.0)
    np.testing.assert_allclose(got, x - noise, rtol=1e-11, atol=1e-12)
    s, ds = per_time(lambda t: paths.match_snr(old, linear, t)[0], jnp.array([0.5, 0.99, 1.0]))
    np.testing.assert_array_equal(s[1:], 1.0)
    np.testing.assert_array_equal(ds[1:], 0.0)
    assert ds[0] > 0.9


def test_a_change_in_float32_keeps_its_dtype_and_its_condition(key):
    seen = []
    velocity = lambda x, t, cond=None: seen.append(cond) or law("mixture", paths.vp()).velocity(x, t)
    x = jax.random.normal(key, (3, 2))
    t = jnp.array([0.1, 0.5, 0.9])
    got = paths.change(velocity, paths.vp(), paths.linear())(x, t, "labels")
    assert seen == ["labels"] and got.dtype == jnp.float32
    np.testing.assert_allclose(got, law("mixture", paths.linear()).velocity(x, t), rtol=2e-4, atol=2e-4)


@every_path
def test_renoising_is_the_kernel_of_the_path(path, x64):
    """Mean and variance of the law at the earlier time; twice is once in law; to where it is, it is the identity."""
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))

    def kernel(t, s):
        return tuple(float(paths.renoise(path, a, b, t, s)[0, 0]) for a, b in ((one, zero), (zero, one)))

    for t, m, s in ((0.9, 0.6, 0.2), (0.5, 0.4, 0.1), (0.99, 0.3, 0.0)):
        (alpha, beta), (alpha_s, beta_s) = (map(float, path.coefficients(jnp.asarray(r))) for r in (t, s))
        kept, noise = kernel(t, s)
        assert kept * beta == pytest.approx(beta_s, abs=1e-12)
        assert (kept * alpha) ** 2 + noise**2 == pytest.approx(alpha_s**2, rel=1e-12)
        (first, early), (second, late) = kernel(t, m), kernel(m, s)
        assert first * second == pytest.approx(kept, abs=1e-12)
        assert (second * early) ** 2 + late**2 == pytest.approx(noise**2, rel=1e-9)
        assert kernel(t, t) == pytest.approx((1, 0), abs=1e-7)
