"""Channels and autocorrelations: POT in one dimension, and processes whose autocorrelation is known."""

import numpy as np
import pytest

from fmjax import metrics

pytestmark = pytest.mark.usefixtures("as_users_call")


def autoregressive(phi, n=600, length=24, seed=0):
    """Stationary AR(1) series of one channel for each phi: r(k) = phi^k."""
    rng, phi = np.random.default_rng(seed), np.asarray(phi)
    x = [rng.standard_normal((n, len(phi)))]
    for _ in range(length - 1):
        x.append(phi * x[-1] + np.sqrt(1 - phi**2) * rng.standard_normal((n, len(phi))))
    return np.stack(x, 1)


def test_the_autocorrelation_of_an_autoregressive_process():
    x = autoregressive([0.9, -0.5, 0.0], n=6000) * [1, 5, 2] + [0, 3, -1]  # scale and mean do not matter
    r = metrics.autocorrelation(x, lags=6)
    np.testing.assert_allclose(r, np.array([0.9, -0.5, 0.0]) ** np.arange(7)[:, None], atol=0.04)
    assert (r[0] == 1).all()


def test_the_autocorrelation_of_a_cosine_is_a_cosine():
    phase = np.random.default_rng(0).uniform(0, 2 * np.pi, (4000, 1))
    x = np.cos(2 * np.pi * np.arange(32) / 8 + phase)[..., None]
    np.testing.assert_allclose(metrics.autocorrelation(x, lags=8)[:, 0], np.cos(np.pi * np.arange(9) / 4), atol=0.02)


def test_the_error_of_autocorrelations_sees_order_in_time_alone():
    x, y = autoregressive([0.8, 0.2]), autoregressive([0.8, 0.2], seed=1)
    shuffled = np.random.default_rng(2).permuted(y, axis=0)  # the values of every time are dealt to other series
    floor, broken = (metrics.autocorrelation_error(s, x, lags=5) for s in (y, shuffled))
    expected = np.sqrt(np.mean((np.array([0.8, 0.2]) ** np.arange(1, 6)[:, None]) ** 2))
    assert floor < 0.03 and broken == pytest.approx(expected, abs=0.06)
    np.testing.assert_allclose(metrics.channel_w2(shuffled, x), metrics.channel_w2(y, x), rtol=1e-9)


def test_channels_are_compared_as_pot_does_in_one_dimension():
    ot = pytest.importorskip("ot")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 6, 2)), rng.exponential(size=(25, 6, 2))
    theirs = [np.sqrt(ot.wasserstein_1d(x[..., c].ravel(), y[..., c].ravel(), p=2)) for c in range(2)]
    np.testing.assert_allclose(metrics.channel_w2(x, y), theirs, rtol=1e-9)


def test_channels_of_images_and_vectors():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 4, 4, 3))
    np.testing.assert_allclose(metrics.channel_w2(x, x + [0.0, 1.0, -2.0]), [0, 1, 2], atol=1e-12)
    np.testing.assert_allclose(metrics.channel_w2(x[:, 0, 0], x[:, 0, 0] + [0.0, 1.0, -2.0]), [0, 1, 2], atol=1e-12)


def test_a_constant_channel_is_left_out_and_wrong_shapes_are_refused():
    x = autoregressive([0.8, 0.2], n=50)
    constant = np.concatenate([x, np.full((50, 24, 1), 3.0)], 2)
    assert np.isnan(metrics.autocorrelation(constant, lags=2)[:, 2]).all()
    error = metrics.autocorrelation_error(constant, constant[::-1], lags=2)
    assert error == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="^lags=24: .*23 or less"):
        metrics.autocorrelation(x, lags=24)
    with pytest.raises(ValueError, match=r"^x=\[50, 24\]: "):
        metrics.autocorrelation(x[..., 0], lags=2)
    with pytest.raises(ValueError, match=r"^x=\[50\]: .*no channel"):
        metrics.channel_w2(x[:, 0, 0], x[:, 0, 0])
