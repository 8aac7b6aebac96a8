"""Views of a network and its companions, through ``jax.jit`` and ``functools.partial``; the types of methods."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import methods, paths
from fmjax.methods import views
from fmjax.types import CorrectorMethod, DiffusionMethod, FlowMapMethod, FlowMethod, Method, ScoreCorrectorMethod


def field(params, x, s, t, cond=None, key=None):
    return params * x


class Carrying:
    """A callable network with companions."""

    def __call__(self, params, x, s, t, cond=None, key=None):
        return field(params, x, s, t)

    def for_jvp(self, params, x, s, t, cond=None, key=None):
        return 2 * params * x if cond is None else cond * x

    def encoder(self, params, x, s, t, cond=None, key=None):
        return jnp.concatenate([x, x], -1)


X, HALF = jnp.ones((2, 3)), jnp.full(2, 0.5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: jax.jit(functools.partial(f))])
def test_companions_are_seen_through_jit_and_partial(wrap):
    net = Carrying()
    np.testing.assert_array_equal(views.for_jvp(wrap(net))(1.5, X, HALF, HALF), 3 * X)
    assert views.encoder_of(wrap(net)) == net.encoder


def test_a_partial_keeps_its_arguments_in_the_companion():
    net = functools.partial(Carrying(), cond=7.0)
    np.testing.assert_array_equal(views.for_jvp(net)(1.5, X, HALF, HALF), 7 * X)


def test_a_network_without_companions_is_used_as_it_is():
    jitted = jax.jit(field)
    assert views.for_jvp(field) is field and views.for_jvp(jitted) is jitted
    assert views.encoder_of(field) is None and views.encoder_of(jitted) is None


def test_a_decorator_is_never_dropped_from_the_network_of_the_jvp():
    @functools.wraps(field)
    def doubled(*args):
        return 2 * field(*args)

    np.testing.assert_array_equal(views.for_jvp(doubled)(1.5, X, HALF, HALF), 3 * X)


def test_a_method_says_in_its_type_what_it_offers():
    logit = lambda params, x, s, t, cond=None, key=None: x.sum(-1)
    kinds = {
        FlowMethod: methods.flow_matching(field),
        FlowMapMethod: methods.lagrangian(field),
        DiffusionMethod: methods.denoising(field),
        CorrectorMethod: methods.classifier_corrector(logit),
        ScoreCorrectorMethod: methods.score_corrector(field, sigma=0.1),
    }
    for kind, method in kinds.items():
        assert type(method) is kind and type(method._replace(loss=None)) is kind
    assert repr(methods.lagrangian(field)) == "FlowMapMethod(loss, velocity, flow_map)"
    assert repr(methods.flow_matching(field, path=paths.two_sided(), time=len)) == "FlowMethod(loss, velocity)"
    assert repr(Method(loss=None, direction=abs)) == "Method(direction)"
    assert pickle.loads(pickle.dumps(FlowMethod(abs, velocity=len))) == FlowMethod(abs, velocity=len)
