"""Views of a network: as a velocity, a flow map or a score."""

from __future__ import annotations

from collections.abc import Callable

from fmjax import paths
from fmjax.types import Costed, FlowMapFn, FlowMapMethod, LossFn, Net, Params, VelocityFn, expand, network, over_batch


def two_time(net: Net, loss: LossFn) -> FlowMapMethod:
    """Make a method of a loss over a network whose diagonal is a velocity and whose jumps are a flow map.

    Args:
        net: average velocity from ``s`` to ``t``.
        loss: loss of the parameters of ``net``.

    Returns:
        A method with ``velocity`` and ``flow_map``.
    """
    return FlowMapMethod(loss, velocity=velocity_view(net), flow_map=flow_map_view(net))


def velocity_view(net: Net) -> Callable[[Params], VelocityFn]:
    """Return the diagonal of a network as a velocity, ``v(x, t) = u(x, t, t)``.

    Args:
        net: average velocity from ``s`` to ``t``.

    Returns:
        ``params -> v``; ``v(x, t, cond)`` is ``[B, ...]``, and ``t`` is a number or ``[B]``.
    """

    def bind(params):
        def velocity(x, t, cond=None):
            t = over_batch(t, x)
            return net(params, x, t, t, cond)

        return velocity

    return bind


def flow_map_view(net: Net) -> Callable[[Params], FlowMapFn]:
    """Return the jumps of a network as a flow map, ``X_{s,t}(x) = x + (t - s) u(x, s, t)``.

    Args:
        net: average velocity from ``s`` to ``t``.

    Returns:
        ``params -> X``; ``X(x, s, t, cond, key)`` is ``[B, ...]``, and ``s`` and ``t`` are numbers or ``[B]``. A jump
        is deterministic: ``key`` is ignored.
    """

    def bind(params):
        def flow_map(x, s, t, cond=None, key=None):
            s, t = over_batch(s, x), over_batch(t, x)
            return x + expand(t - s, x) * net(params, x, s, t, cond)

        return Costed(flow_map, nfe=1)

    return bind


def score_view(path: paths.Path, velocity: Callable[[Params], VelocityFn]) -> Callable[[Params], VelocityFn]:
    """Return the score that a velocity contains if its source is N(0, I) and independent of the data.

    Args:
        path: interpolant of the velocity, without a latent.
        velocity: ``params -> v``.

    Returns:
        ``params -> score``; ``score(x, t, cond)`` is ``[B, ...]``.
    """

    def bind(params):
        v = velocity(params)
        return lambda x, t, cond=None: paths.score(path, x, v(x, t, cond), t)

    return bind


def for_jvp(net: Net) -> Net:
    """Return the network to use inside ``jax.jvp``: of the same parameters, without kernels that have no jvp.

    Args:
        net: a network; ``jax.jit`` and ``functools.partial`` around it are seen through.

    Returns:
        The field ``for_jvp`` of the network, with the arguments of a ``functools.partial`` around it, or ``net``
        itself where the network has no such field.
    """
    return network(net).for_jvp or net
