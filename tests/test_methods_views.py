"""Views of a network and its companions, through ``jax.jit`` and ``functools.partial``; the types of methods."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import methods, paths
from fmjax.methods import views, weighting
from fmjax.nets.adapters import Model
from fmjax.types import (
    Batch,
    CorrectorMethod,
    DiffusionMethod,
    FlowMapMethod,
    FlowMethod,
    Method,
    Network,
    ScoreCorrectorMethod,
    stated,
)


def field(params, x, s, t, cond=None, key=None):
    return params * x


def smooth(params, x, s, t, cond=None, key=None):
    return 2 * params * x if cond is None else cond * x


X, HALF = jnp.ones((2, 3)), jnp.full(2, 0.5)
FUSED = Network(field, for_jvp=smooth)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: jax.jit(functools.partial(f))])
def test_the_network_of_the_jvp_is_seen_through_jit_and_partial(wrap):
    np.testing.assert_array_equal(views.for_jvp(wrap(FUSED))(1.5, X, HALF, HALF), 3 * X)
    partial = functools.partial(FUSED, cond=7.0)
    np.testing.assert_array_equal(views.for_jvp(wrap(partial))(1.5, X, HALF, HALF), 7 * X)


def test_wrapped_networks_keep_the_network_of_the_jvp():
    weighted = weighting.with_log_variance(Model(None, FUSED)).net
    np.testing.assert_array_equal(views.for_jvp(weighted)({"log_variance": 0.0}, X, HALF, HALF, 5.0), 5 * X)
    no_jvp = jax.custom_vjp(lambda x: x)
    no_jvp.defvjp(lambda x: (x, None), lambda _, g: (g,))
    kernel = lambda params, x, s, t, cond=None, key=None: no_jvp(params * x * t[:, None])
    net = Network(kernel, for_jvp=lambda params, x, s, t, cond=None, key=None: params * x * t[:, None])
    loss = methods.terminal_velocity_matching(net).loss
    jax.jit(loss).lower(1.5, 1.5, Batch(X), jax.random.key(0))


def test_views_state_their_cost():
    logit = lambda params, x, s, t, cond=None, key=None: x.sum(-1)
    assert stated(methods.lagrangian(field).flow_map(1.0)).nfe == 1
    assert stated(methods.classifier_corrector(logit).direction(1.0)).nfe == 2
    assert stated(methods.score_corrector(field, sigma=0.1).direction(1.0)).nfe == 1


def test_a_network_without_companions_is_used_as_it_is():
    jitted = jax.jit(field)
    assert views.for_jvp(field) is field and views.for_jvp(jitted) is jitted


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
