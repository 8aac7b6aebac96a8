"""Marginals between their ends: exact there and for straight flows, and as far as the straightness defect elsewhere."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_correction_marginals import SCALED, build_read, data

from fmjax import correction, sampling
from fmjax.types import expand

TS = np.array([0, 0.1, 0.5, 0.7, 1.0], np.float32)
CURVED = {"params": jnp.float32(0.3), "direction": "backward", "data": data(90, 3), "shard_size": 32}


def build(folder, view=SCALED, **changes):
    options = CURVED | {"solver": "flow_map"} | changes
    return build_read(folder, lambda params: sampling.rk4(view(params)), options.pop("params"), TS, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return build(tmp_path_factory.mktemp("whole"))


def test_ends_are_exact_and_the_defect_is_the_distance_between(whole, tmp_path):
    """From both ends stored, and from the start beside the data; on disk and in memory."""
    build(tmp_path / "ends", steps=(0, 4))
    build(tmp_path / "start", steps=(0,))
    k = TS[:, None]
    expected = (1 - k) * whole.x[:, :1] + k * whole.x[:, -1:]
    for stream in (False, True):
        ends, start = (correction.read_marginals(tmp_path / name, stream=stream) for name in ("ends", "start"))
        for m in (correction.interpolate_marginals(ends), correction.interpolate_marginals(start, data=data(90, 3))):
            np.testing.assert_array_equal(m.ts, TS)
            assert m.x.shape == whole.x.shape and m.manifest.steps == (0, 1, 2, 3, 4)
            np.testing.assert_array_equal(m.x[:, 0], whole.x[:, 0])
            np.testing.assert_array_equal(m.x[:, 4], data(90, 3))
            np.testing.assert_allclose(m.x[:], expected, atol=1e-6)
            rows, n = np.array([5, 80, -1]), np.array([3, 0, 1])
            for at in ((rows, n), (rows, 2), 7, (7, 2), slice(80, None), (slice(3), slice(1, 3)), rows):
                np.testing.assert_allclose(m.x[at], expected[at], atol=1e-6)
            gap = np.sqrt(((m.x[:] - whole.x) ** 2).sum(-1).mean(0))
            np.testing.assert_allclose(gap, correction.straightness_defect(whole), atol=1e-6)
            assert gap[2] > 0.05
            batch = correction.marginal_batches(m, batch_size=8, seed=0, steps=(2,))(0)
            assert all(np.abs(expected[:, 2] - x).sum(1).min() < 1e-5 for x in batch.x1)


def test_a_straight_flow_loses_nothing(tmp_path):
    """Constant motion of every example, its speed a function of where it started: ``x_t = (1 + t / 2) x_0``."""
    straight = lambda params: lambda x, t, cond=None: 0.5 * x / (1 + 0.5 * expand(t, x))
    whole = build(tmp_path / "whole", straight)
    build(tmp_path / "start", straight, steps=(0,))
    m = correction.interpolate_marginals(correction.read_marginals(tmp_path / "start", stream=True), data=data(90, 3))
    np.testing.assert_allclose(m.x[:], whole.x, atol=1e-5)
    np.testing.assert_allclose(correction.straightness_defect(whole), 0, atol=1e-5)


def test_missing_ends_and_other_data_are_refused(whole, tmp_path):
    start, middle = build(tmp_path / "start", steps=(0,)), build(tmp_path / "middle", steps=(1, 4))
    other = data(90, 3)
    other[17, 1] += 1e-3
    for m, end, message in (
        (start, None, r"steps=\(0,\), data=None.* 0 and 4"),
        (middle, None, r"steps=\(1, 4\), data=None"),
        (whole, data(90, 3), r"steps=\(0, 1, 2, 3, 4\), data=given"),
        (start, other, r"data=\(90, 3\).*other data"),
        (start, data(91, 3), r"data=\(91, 3\).*other data"),
    ):
        with pytest.raises(ValueError, match=message):
            correction.interpolate_marginals(m, data=end)
