"""Build the parts of a run from their specs: network, method, path, coupling, data, metrics, solver, optimiser."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmjax import couplings, paths, sampling, transport
from fmjax.checks import NonNegative, NonNegativeFloat, PositiveFloat, Range, Refusal, check_choice, check_hints
from fmjax.data import Dataset, Rows
from fmjax.experiments import places, specs
from fmjax.experiments.specs import Spec
from fmjax.keys import from_seed
from fmjax.metrics import Metric
from fmjax.nets import adapters, preconditioning
from fmjax.tokens import TokenPath
from fmjax.types import Cond, FlowMapFn, LogitNet, Method, Multistep, Net, VelocityFn

SEMIDISCRETE = "semidiscrete"  # a coupling that is fitted to the data set


def net(spec: Spec, *, classes: int = 0, floats: bool = False, field: str = "net") -> adapters.Model:
    """Build a network: ``{"name": "unet", "channels": 64}`` is ``from_linen(UNet(channels=64))``.

    Args:
        spec: a network of ``fmjax.nets``, a place outside the package, a Flax module or a ``Model``. A mapping may also
            have ``preconditioning`` (a spec of ``nets.preconditioning``, which makes the network a denoiser seen as a
            velocity) and ``noise_encoder`` (a network with two heads that is trained beside it) or ``critic``
            (a network of logits that is).
        classes: number of label classes; 0 for a network without labels.
        floats: whether the network is conditioned on float arrays; passed to factories that have this option.
        field: the config field, for messages.

    Returns:
        The network and its initialiser.

    Raises:
        ValueError: an unknown name or option, or labels for a network that takes none.
    """
    specs.check_spec(specs.NET, spec, field=field)
    name, options = specs.parse(spec, field=field) if specs.is_spec(spec) else (spec, {})
    denoiser, encoder = options.pop("preconditioning", None), options.pop("noise_encoder", None)
    critic = options.pop("critic", None)
    spec = {"name": name, **options} if specs.is_spec(spec) else spec
    if specs.is_spec(spec):
        factory, _ = specs.resolve(specs.NET, spec, field=field)
        if classes and "classes" not in specs.options_of(factory):
            raise Refusal(field, name, f"takes no labels, and the data have {classes} classes", "Set conditional=False")
    context = {name: value for name, value in (("classes", classes), ("floats", floats)) if value}
    model = _model(specs.build(specs.NET, spec, field=field, **context), field)
    if denoiser:
        denoiser = specs.build(specs.PRECONDITIONER, denoiser, field=f"{field}.preconditioning")
        model = model._replace(net=preconditioning.preconditioned(model.net, denoiser))
    if critic:
        logits = specs.build(specs.NET, critic, field=f"{field}.critic", logit=True)
        return adapters.with_encoder(model, _model(logits, f"{field}.critic"), name="critic")
    if not encoder:
        return model
    where = f"{field}.noise_encoder"
    if "outputs" not in specs.options_of(specs.resolve(specs.NET, encoder, field=where)[0]):
        raise Refusal(where, encoder, "has one output, and an encoder needs two heads", "Take a network with 'outputs'")
    return adapters.with_encoder(model, _model(specs.build(specs.NET, encoder, field=where, outputs=2), where))


def check_net(spec: Spec, data: Dataset, *, conditional: bool = False, field: str = "net") -> None:
    """Refuse a network of this package for data of a shape, or with conditions, that the network does not take.

    Args:
        spec: the network.
        data: the data set.
        conditional: whether the network is conditioned on the conditions of the data.
        field: the config field, for messages.

    Raises:
        ValueError: a network of images for other data, or a network of labels for other conditions.
    """
    specs.check_spec(specs.NET, spec, field=field)
    name = specs.name_of(specs.parse(spec, field=field)[0] if specs.is_spec(spec) else spec)
    module = specs.offers(specs.NET).get(name)
    if module is None:
        return
    if name in ("token_net", "temporal_net"):  # of discrete data, and of whole trajectories
        raise Refusal(field, name, "belongs to methods that are trained in Python", "Take 'mlp' or another network")
    axes = getattr(typing.get_type_hints(module.__call__, include_extras=True).get("x"), "dim_str", "...").split()
    shape = list(data.train.x.shape[1:])
    grid = "*grid" in axes
    if "..." not in axes and not (len(shape) in (2, 3) if grid else len(axes) == len(shape) + 1):
        takes = "takes images and series" if grid else "takes images"
        raise Refusal(field, name, f"{takes}, and the data are {data.kind} {shape}", "Take 'mlp', or your own")
    if conditional and not data.classes and "floats" not in specs.options_of(module):
        wrong = f"the conditions of {data.name!r} are arrays, and {field}={name!r} takes no arrays"
        raise Refusal("conditional", True, wrong, "Take 'mlp', 'unet' or 'dit', or set conditional=False")


def path(spec: Spec, *, field: str = "path") -> paths.Path:
    """Build an interpolant, such as ``"linear"`` or ``{"name": "vp", "beta_max": 16.0}``.

    Args:
        spec: an interpolant of ``fmjax.paths``, a place outside the package, or a ``Path``.
        field: the config field, for messages.

    Returns:
        The interpolant.

    Raises:
        ValueError: an unknown name or option.
    """
    return specs.build(specs.PATH, spec, field=field)


def method(
    spec: Spec,
    net: Net,
    *,
    path: paths.Path | None = None,
    mean: Callable[[], np.ndarray] | None = None,
    null: int | None = None,
    field: str = "method",
) -> Method:
    """Build a method over a network.

    Args:
        spec: a method of ``fmjax.methods``, a place outside the package, or a ``Method``.
        net: the network.
        path: interpolant, for methods that take one.
        mean: returns the mean of the training data, for methods that take the mean.
        null: the null label where the network takes the guidance scale as an input; methods with
            the option ``null`` get the label, all other methods get a guided teacher.
        field: the config field, for messages.

    Returns:
        The method.

    Raises:
        ValueError: an unknown name or option, or a network of logits for a method that does not classify.
    """
    if isinstance(spec, Method):
        return spec
    specs.check_spec(specs.METHOD, spec, field=field)
    factory = specs.resolve(specs.METHOD, spec, field=field)[0] if specs.is_spec(spec) else spec
    if getattr(net, "logit", False) and typing.get_type_hints(factory).get("net") is not LogitNet:
        raise Refusal(field, specs.label(factory), "needs a network of x's shape, not of logits", "Set net.logit=False")
    options = specs.options_of(factory)
    teacher = None if null is None or "null" in options else sampling.guided_teacher(net, null=null)
    path = None if typing.get_type_hints(factory).get("path") is TokenPath else path  # refused by its batches
    context = {"path": path, "null": null, "teacher": teacher, "mean": mean() if mean and "mean" in options else None}
    context = {name: value for name, value in context.items() if value is not None}
    if not specs.is_spec(spec):
        return spec(net, **{name: value for name, value in context.items() if name in options})
    return _checked_kind(specs.build(specs.METHOD, spec, net, field=field, **context), Method, spec, field)


def data(spec: Spec, *, field: str = "data") -> Dataset:
    """Build a data set, such as ``"digits"`` or ``{"name": "arrays", "path": "x.npz"}``.

    Args:
        spec: a data set of ``fmjax.data``, a place outside the package, or a ``Dataset``.
        field: the config field, for messages.

    Returns:
        The data set.

    Raises:
        ValueError: an unknown name or option, or a factory that does not return a ``Dataset``.
    """
    data_set = specs.build(specs.DATA, spec, field=field)
    data_set = data_set() if inspect.isfunction(data_set) else data_set
    return _checked_kind(data_set, Dataset, spec, field)


def metric(spec: Spec, data: Dataset, reference, *, field: str = "metrics") -> Metric:
    """Build a distance from samples to reference examples, such as ``"sliced_w2_to"``.

    Args:
        spec: a metric of ``fmjax.metrics``, a place outside the package, or a ``Metric``.
        data: the data set.
        reference: the examples of ``data`` that samples are compared with.
        field: the config field, for messages.

    Returns:
        The metric.

    Raises:
        ValueError: an unknown name or option.
    """
    return _checked_kind(specs.build(specs.METRIC, spec, data, reference, field=field), Metric, spec, field)


def coupling(
    spec: Spec, x: Rows | None = None, y: Cond = None, *, flip: bool = False, seed: int = 0, field: str = "coupling"
) -> couplings.Coupling | None:
    """Build a coupling: ``"independent"``, ``{"name": "minibatch_ot", "replacement": True}``, ``"semidiscrete"``.

    Args:
        spec: a coupling of ``fmjax.couplings``, a place outside the package, or the object; ``"semidiscrete"`` is
            fitted here and takes the options of ``transport.fit_semidiscrete``.
        x: the training examples ``[n, ...]``.
        y: conditions of the training examples.
        flip: whether training mirrors the images.
        seed: seed of the fit.
        field: the config field, for messages.

    Returns:
        The coupling; ``None`` for the independent coupling, for which the loss draws the source.

    Raises:
        ValueError: an unknown name or option, or a semidiscrete coupling of streamed data.
    """
    if specs.is_spec(spec):
        name, options = specs.parse(spec, field=field)
        if name == "independent" and not options:
            return None
        if name == SEMIDISCRETE:
            return _semidiscrete(options, x, y, flip, seed, field)
        if isinstance(name, str) and not places.is_outside(name):
            known = [*specs.offers(specs.COUPLING), SEMIDISCRETE]
            check_choice(field, name, sorted(known), "coupling")
    return specs.build(specs.COUPLING, spec, field=field)


def check_coupling(spec: Spec, *, field: str = "coupling") -> None:
    """Check the spec of a coupling that no batch is drawn with, and fit nothing.

    Args:
        spec: the coupling.
        field: the config field, for messages.

    Raises:
        ValueError: an unknown name or option.
    """
    name, options = specs.parse(spec, field=field) if specs.is_spec(spec) else (None, {})
    if name == SEMIDISCRETE:
        specs.checked(transport.fit_semidiscrete, options, field=field)
    else:
        coupling(spec, field=field)


def step(
    spec: Spec, *, path: paths.Path | None = None, score: VelocityFn | None = None, field: str = "solver"
) -> Callable[[VelocityFn], FlowMapFn | Multistep]:
    """Build a solver step without a velocity, such as ``"rk4"`` or ``{"name": "ddim", "eta": 1.0}``.

    Args:
        spec: a step of ``fmjax.sampling``, or a place outside the package.
        path: the flow's interpolant, for steps that take one.
        score: the score of the flow, for stochastic steps along a path with a latent.
        field: the config field, for messages.

    Returns:
        ``make(velocity)``, which returns the step.

    Raises:
        ValueError: an unknown name or option.
    """
    specs.check_spec(specs.SOLVER, spec, field=field)
    if not specs.is_spec(spec):
        return spec
    factory, options = specs.resolve(specs.SOLVER, spec, field=field)
    options, known = specs.checked(factory, options, field=field), specs.options_of(factory)
    if path is not None and "path" in known:
        latent = path.gamma is not None and "score" in known
        options = options | ({"score": score} if latent else {"path": path})
    return functools.partial(factory, **options) if options else factory


def uses_noise(spec: Spec, path: paths.Path) -> bool:
    """Return whether a solver step is valid for the source N(0, I) alone, as a step of diffusion models is.

    Args:
        spec: a step of ``fmjax.sampling``, or a place outside the package.
        path: the flow's interpolant; with a latent, stochastic steps take a score that was learned.

    Returns:
        Whether the step takes the path, from which the step knows the noise and the score in a state.

    >>> uses_noise("ddim", paths.linear()), uses_noise("heun", paths.linear())
    (True, False)
    """
    known = specs.options_of(specs.resolve(specs.SOLVER, spec, field="solver")[0] if specs.is_spec(spec) else spec)
    return "path" in known and not (path.gamma is not None and "score" in known)


def optimiser(
    *,
    learning_rate: PositiveFloat,
    steps: Annotated[int, Range(1, 1e9)],
    warmup: NonNegative = 0,
    schedule: Literal["constant", "cosine"] = "constant",
    clip: PositiveFloat | None = None,
    beta2: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.999,
    weight_decay: NonNegativeFloat = 0.0,
) -> optax.GradientTransformation:
    """Build Adam, or AdamW with ``weight_decay`` on leaves of two axes and more, after a clip of the gradient norm.

    The rate of step ``n = 0 ..`` is ``learning_rate min(1, (n + 1) / warmup)``, multiplied for ``"cosine"`` by
    ``(1 + cos(pi (n - warmup) / (steps - warmup))) / 2`` after the warm-up. The clip sees whole gradients, not one
    device's part.

    Args:
        learning_rate: the peak rate.
        steps: steps of the training.
        warmup: steps of the linear warm-up.
        schedule: what follows the warm-up.
        clip: largest global gradient norm; ``None`` clips nothing.
        beta2: decay of the second moment.
        weight_decay: decoupled weight decay.

    Returns:
        The optimiser.
    """
    check_hints(optimiser, dict(locals()))
    rate = functools.partial(learning_rate_at, peak=learning_rate, steps=steps, warmup=warmup, schedule=schedule)
    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    adam = optax.adamw(rate, b2=beta2, weight_decay=weight_decay, mask=matrices) if weight_decay else None
    first = optax.clip_by_global_norm(clip) if clip else optax.identity()  # both have a state: a fork may set clip
    return optax.chain(first, adam or optax.adam(rate, b2=beta2))


def unfrozen(tx: optax.GradientTransformation, frozen: tuple[str, ...]) -> optax.GradientTransformation:
    """Return an optimiser that leaves some entries of the parameters as they are.

    Args:
        tx: the optimiser of the other entries.
        frozen: names of entries of the parameters, a dictionary (``Method.frozen``).

    Returns:
        ``tx`` itself where nothing is frozen.
    """
    if not frozen:
        return tx
    label = lambda params: {name: "frozen" if name in frozen else "trained" for name in params}
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, label)


def learning_rate_at(n, *, peak: float, steps: int, warmup: int, schedule: str):
    """Return the learning rate of a step (see ``optimiser``).

    Args:
        n: number of the step, from 0; may be traced.
        peak: the peak rate.
        steps: steps of the training.
        warmup: steps of the linear warm-up.
        schedule: ``"constant"`` or ``"cosine"``.

    Returns:
        The rate, a scalar.
    """
    ramp = jnp.minimum(1.0, (n + 1) / max(warmup, 1))
    if schedule == "constant":
        return peak * ramp
    progress = jnp.clip((n - warmup) / max(steps - warmup, 1), 0.0, 1.0)
    return peak * ramp * (1 + jnp.cos(jnp.pi * progress)) / 2


def _model(built: Any, field: str) -> adapters.Model:
    if isinstance(built, adapters.Model):
        return built
    module = type(built).__module__
    if hasattr(built, "init") and hasattr(built, "apply"):
        return adapters.from_linen(built)
    raise Refusal(field, built, f"is {module}.{type(built).__name__}, no network", "Return a Flax module or a Model")


def _checked_kind(built: Any, kind: type, spec: Spec, field: str) -> Any:
    """Return what a factory returned; refuse another kind of object."""
    if not isinstance(built, kind):
        wrong = f"gives {type(built).__name__}, not {kind.__name__}"
        raise Refusal(field, specs.name_of(spec), wrong, f"Return a {kind.__name__}")
    return built


def _semidiscrete(options, x, y, flip: bool, seed: int, field: str) -> couplings.Coupling:
    if not isinstance(x, np.ndarray):
        raise Refusal(
            field, SEMIDISCRETE, "is fitted to data in memory, and these are streamed", "Set data.stream=False"
        )
    if flip:
        x, y = np.concatenate([x, x[:, :, ::-1]]), jax.tree.map(lambda a: np.concatenate([a, a]), y)
    options = specs.checked(transport.fit_semidiscrete, options, field=field)
    potentials = transport.fit_semidiscrete(from_seed(seed), x, y, **options)
    return couplings.semidiscrete(x, potentials, y, by_class=options.get("by_class"))
