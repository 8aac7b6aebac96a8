"""Label dropout, random scales and guided teachers against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import NULL, conditional
from scipy import stats

from fmjax import sampling
from fmjax.keys import example_keys
from fmjax.sampling import guidance
from fmjax.types import Batch, Method, expand


def dropped(rate, n, seed=0, null=NULL):
    """A method whose loss tells the conditions it saw and the keys it got, under label dropout."""

    def loss(params, target, batch, key):
        seen = batch.cond["label"].astype(float)
        return seen.mean(), {"per_example": seen, "words": batch.cond["words"], "key": jax.random.key_data(key)}

    wrapped = sampling.label_dropout(Method(loss), rate=rate, null={"label": null, "words": 0.0})
    cond = {"label": jnp.arange(n) % NULL, "words": jnp.ones((n, 3))}
    keys = example_keys(jax.random.key(seed), jnp.arange(n))
    return wrapped.loss(None, None, Batch(jnp.zeros((n, 1)), cond=cond), keys)[1], cond, keys


def test_label_dropout_hides_the_whole_condition_of_its_fraction():
    n, rate = 20_000, 0.3
    aux, cond, keys = dropped(rate, n)
    null = np.asarray(aux["is_unconditional"])
    assert abs(null.mean() - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
    np.testing.assert_array_equal(aux["per_example"], np.where(null, NULL, cond["label"]))
    np.testing.assert_array_equal(aux["words"], np.where(null[:, None], 0.0, cond["words"]))
    assert abs(np.corrcoef(null, np.asarray(cond["label"]))[0, 1]) < 4 / n**0.5
    assert (aux["key"] != jax.random.key_data(keys)).any(1).all(), "the draw's key is used again by the loss"


def test_label_dropout_belongs_to_the_example_and_changes_with_its_key():
    whole, half, other = (np.asarray(dropped(0.5, *a)[0]["is_unconditional"]) for a in ((64,), (32,), (64, 1)))
    np.testing.assert_array_equal(whole[:32], half)
    assert (whole != other).any()


def test_no_label_dropout_is_the_method_itself_and_a_bad_one_is_refused():
    method = Method(lambda *a: (0.0, {}))
    assert sampling.label_dropout(method, rate=0.0, null=NULL) is method
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"label_dropout={rate}: "):
            sampling.label_dropout(method, rate=rate, null=NULL)
    keys = example_keys(jax.random.key(0), jnp.arange(2))
    with pytest.raises(ValueError, match="cond=None: label dropout"):
        sampling.label_dropout(method, rate=0.1, null=NULL).loss(None, None, Batch(jnp.zeros((2, 1))), keys)


def test_label_dropout_of_a_pair_drops_the_label_and_keeps_the_scale():
    seen = []
    method = Method(lambda params, target, batch, key: seen.append(batch.cond) or (0.0, {}))
    cond, keys = (jnp.arange(64) % NULL, jnp.linspace(1, 8, 64)), example_keys(jax.random.key(0), jnp.arange(64))
    _, aux = sampling.label_dropout(method, rate=0.4, null=NULL).loss(
        None, None, Batch(jnp.zeros((64, 1)), cond=cond), keys
    )
    null, ((label, scale),) = np.asarray(aux["is_unconditional"]), seen
    assert 0 < null.sum() < 64
    np.testing.assert_array_equal(label, np.where(null, NULL, cond[0]))
    np.testing.assert_array_equal(scale, cond[1])


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_a_random_scale_has_its_density_and_belongs_to_the_example(power):
    """``P(w < a) = (a^{1-b} - 1) / (8^{1-b} - 1)``, or ``log a / log 8``; the labels stay, the key is another."""
    seen, n = [], 20_000
    method = Method(lambda params, target, batch, key: seen.append((batch.cond, key)) or (0.0, {}))
    loss = sampling.random_scale(method, power=power).loss
    keys, labels = example_keys(jax.random.key(0), jnp.arange(n)), jnp.arange(n) % 3
    for rows in (slice(None), slice(0, 10)):
        loss(None, None, Batch(jnp.zeros((n, 1))[rows], cond=labels[rows]), keys[rows])
    ((label, scale), key), ((_, few), _) = seen
    np.testing.assert_array_equal(label, labels)
    np.testing.assert_array_equal(few, scale[:10])
    assert (jax.random.key_data(key) != jax.random.key_data(keys)).any(1).all()
    cdf = lambda a: np.log(a) / np.log(8) if power == 1 else (a ** (1 - power) - 1) / (8 ** (1 - power) - 1)
    assert stats.kstest(np.asarray(scale, np.float64), cdf).pvalue > 1e-4
    assert scale.min() >= 1 and scale.max() <= 8


def test_a_guided_teacher_has_the_velocity_of_each_rows_scale(key):
    velocity = conditional([-1.0, 2.0, 0.4], [0.5, 0.7, 1.0])
    teacher = sampling.guided_teacher(
        lambda params, x, s, t, cond=None, key=None: params * velocity(x, t, cond), null=NULL
    )
    x, t, label, scale = jax.random.normal(key, (6, 1)), 0.3, jnp.arange(6) % 3, jnp.array([1.0, 2.5, 3, 0.5, 4, 2])
    got = teacher(2.0, x, t, t, (label, scale))
    for i in range(6):
        want = guidance.classifier_free(velocity, null=NULL, scale=float(scale[i]))(x, t, label)
        np.testing.assert_allclose(got[i], 2 * want[i], rtol=1e-5)
    np.testing.assert_array_equal(got[2], 2 * velocity(x, t, label)[2])  # of the null label
    with pytest.raises(ValueError, match="cond: .*random_scale"):
        teacher(2.0, x, t, t, label)


def test_bad_ranges_of_scales_are_refused():
    method = Method(lambda *a: (0.0, {}))
    for options in ({"low": 0.0}, {"low": 2.0, "high": 2.0}, {"high": float("inf")}, {"power": float("nan")}):
        with pytest.raises(ValueError, match="low=.*, high=.*: "):
            sampling.random_scale(method, **options)
    keys = example_keys(jax.random.key(0), jnp.arange(2))
    with pytest.raises(ValueError, match="cond=None: a guidance scale"):
        sampling.random_scale(method).loss(None, None, Batch(jnp.zeros((2, 1))), keys)


def test_an_autoguided_teacher_is_autoguidance_on_the_diagonal(key):
    from fmjax.methods.lagrangian import lagrangian

    net = lambda params, x, s, t, cond=None, key=None: params * jnp.sin(x) + expand(s + 2 * t, x)
    weak = lambda params, x, s, t, cond=None, key=None: params * x
    x, t, target = jax.random.normal(key, (4, 2)), jnp.linspace(0.1, 0.7, 4), {"strong": 2.0, "weak": 0.5}
    for second, scale in ((None, 1.7), (weak, 1.7), (weak, guidance.interval(3.0, low=0.0)), (weak, 1.0)):
        teacher = sampling.autoguided_teacher(net, second, scale=scale)
        strong = lambda x, t, cond=None: net(2.0, x, t, t)
        other = lambda x, t, cond=None, second=second: (second or net)(0.5, x, t, t)
        want = guidance.autoguidance(strong, other, scale=scale)(x, t)
        np.testing.assert_allclose(teacher(target, x, t, t), want, rtol=1e-6)
    teacher = sampling.autoguided_teacher(net, weak, scale=1.7)
    pair = lambda key: (t, t)  # of no length: the residual is u - v
    loss = lagrangian(net, diagonal=0.0, teacher=teacher, pair=pair).loss
    _, aux = loss(1.0, target, Batch(x, x0=jnp.zeros_like(x)), example_keys(key, jnp.arange(4)))
    x = expand(t, x) * x
    want = jnp.mean((net(1.0, x, t, t) - teacher(target, x, t, t)) ** 2, 1)
    np.testing.assert_allclose(aux["per_example"], want, rtol=1e-5)
    with pytest.raises(ValueError, match="finite"):
        sampling.autoguided_teacher(net, scale=float("nan"))
