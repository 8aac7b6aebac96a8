"""Self-corrected flow distillation: consistency, an adversarial term, reflow on own pairs, one step beside few."""

from __future__ import annotations

from collections.abc import Callable

import jax

from fmjax import paths, times
from fmjax.methods import common as c
from fmjax.sampling.explicit import runge_kutta, tableau
from fmjax.types import Costed, FlowMapMethod, LogitNet, Net, expand, network, over_batch

PARTS = ("adversarial", "reflow", "bidirectional")


def self_corrected(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = times.uniform,
    critic: LogitNet | None = None,
    steps: int = 16,
    solver: str = "euler",
    few: int = 2,
    adversarial: float = 0.1,
    reflow: float = 1.0,
    bidirectional: float = 1.0,
) -> FlowMapMethod:
    """Distil a flow into one step that few steps agree with, with a critic (arXiv 2412.16906); five terms in one sum.

    The map is ``F(x, t) = x + (1 - t) u(x, t, 1)``, and a few steps are Euler steps of ``u(x, t, 1)``. With ``sg`` for
    a stopped gradient, ``z`` the source and ``x_t`` the interpolant of data,

    ========================  =====================================================================================
    ``consistency``           ``|F(x_t, t) - sg F_ema(x_{t+h}, t + h)|^2``, one step of the frozen teacher between
    ``adversarial``           ``-log sigmoid(D(F(z, 0)))`` for the map
    ``critic``                ``-log sigmoid(D(x1)) - log sigmoid(-D(sg F(z, 0)))`` for the critic ``D``
    ``reflow``                ``|F(x_t, t) - sg F(z, 0)|^2`` on the line from ``z`` to ``sg F(z, 0)``
    ``bidirectional``         ``|F(z, 0) - sg X(z)|^2 + |sg F(z, 0) - X(z)|^2``, ``X`` the few steps
    ========================  =====================================================================================

    The critic is trained in the same step: each term stops the gradient of the other network. At the exact map of a
    *straight* flow all terms but those with the critic are zero; a flow of independent pairs is not straight, and the
    reflow term then pulls it to straight lines, with the drift of any reflow on its own samples. Written from the
    abstract and a summary: the weights, the losses of the critic and the times are choices.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, evaluated at ``t = 1`` for the student and on its
            diagonal for the teacher.
        path: the linear path, or another without a latent for the interpolant.
        time: distribution of ``t``, ``key: [B] -> [B]``, scaled to ``[0, 1 - 1 / steps]`` for the consistency.
        critic: the logit ``D(params, x, s, t, cond, key)``, evaluated at ``s = t = 1``, of the same parameters as
            ``net``; by default the second network of ``net`` (``nets.with_encoder(model, critic, name="critic")``, in a
            config the option ``"critic"`` of the net).
        steps: ``h = 1 / steps``.
        solver: solver of the teacher's step.
        few: number of Euler steps of ``X``.
        adversarial: weight of the adversarial term; the critic has the weight one.
        reflow: weight of the reflow term.
        bidirectional: weight of both bidirectional terms.

    Returns:
        A method with ``velocity``, ``u(x, t, 1)``, and ``flow_map``, its Euler step, one step from ``t`` to 1 being
        ``F``. ``target`` holds the frozen teacher and the average: train with ``target="both"``. ``aux`` has ``t`` and
        every term.

    Raises:
        ValueError: no critic, fewer than two steps, a negative weight, and in the loss a target that is not of both.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> critic = lambda params, x, s, t, cond=None, key=None: x.sum(-1)
    >>> method = methods.self_corrected(lambda params, x, s, t, cond=None, key=None: params * x, critic=critic)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.5, 1.0)
    Array([[2., 2.]], dtype=float32)
    """
    critic = critic or network(net).encoder
    if critic is None:
        raise ValueError(
            "critic=None: the adversarial term needs one. Use nets.with_encoder(model, critic, name='critic'), in a "
            "config net = {'name': ..., 'critic': {'name': 'mlp'}}."
        )
    if steps < 2 or few < 1:
        raise ValueError(f"steps={steps}, few={few}: too few. Give at least 2 and 1.")
    for name, weight in zip(PARTS, (adversarial, reflow, bidirectional), strict=True):
        if not weight >= 0:
            raise ValueError(f"{name}={weight}: a negative weight. Give 0 or more.")
    paths.refuse_latent("self-corrected distillation", path)
    tableau(solver)
    h, stop = 1 / steps, jax.lax.stop_gradient

    def velocity(params):
        return lambda x, t, cond=None: net(params, x, over_batch(t, x), over_batch(1.0, x), cond)

    def end(params, x, t, cond):
        return x + expand(1 - over_batch(t, x), x) * velocity(params)(x, t, cond)

    def logit(params, x, cond, key=None):
        out = critic(params, x, over_batch(1.0, x), over_batch(1.0, x), cond, key)
        if out.shape != (len(x),):
            raise ValueError(f"critic={list(out.shape)}: not one logit for each of {len(x)} examples. Set logit=True.")
        return out

    @c.keyed
    def loss(params, target, batch, key):
        if not isinstance(target, c.Teachers):
            raise ValueError("target: a frozen teacher and an average are needed. Train with target='both'.")
        k_t, k_z, k_line = c.split(key, 3)
        t, cond = (1 - h) * time(k_t), batch.cond
        z = c.draw_source(k_z, batch)
        frozen = lambda x, t, cond=None: net(target.frozen, x, over_batch(t, x), over_batch(t, x), cond)
        x = paths.with_velocity(path, z, batch.x1, t)[0]
        later = stop(runge_kutta(frozen, tableau(solver))(x, t, t + h, cond))
        terms = {"consistency": c.mse(end(params, x, t, cond), stop(end(target.ema, later, t + h, cond)))}
        final = end(params, z, 0.0, cond)
        real, fake = logit(params, batch.x1, cond), logit(params, stop(final), cond)
        terms["adversarial"] = jax.nn.softplus(-logit(stop(params), final, cond))
        terms["critic"] = jax.nn.softplus(-real) + jax.nn.softplus(fake)
        r = time(k_line)
        line = paths.with_velocity(paths.linear(), z, stop(final), r)[0]
        terms["reflow"] = c.mse(end(params, line, r, cond), stop(final))
        y = z
        for i in range(few):
            y = y + velocity(params)(y, i / few, cond) / few
        terms["bidirectional"] = c.mse(final, stop(y)) + c.mse(stop(final), y)
        weights = {"adversarial": adversarial, "reflow": reflow, "bidirectional": bidirectional}
        return c.reduce(sum(weights.get(name, 1.0) * term for name, term in terms.items()), t=t, **terms)

    def flow_map(params):
        def jump(x, s, t, cond=None, key=None):
            s, t = over_batch(s, x), over_batch(t, x)
            return x + expand(t - s, x) * velocity(params)(x, s, cond)

        return Costed(jump, nfe=1)

    return FlowMapMethod(loss, velocity=velocity, flow_map=flow_map)
