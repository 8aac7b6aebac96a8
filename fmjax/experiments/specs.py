"""Names in a config become objects, by module path: no registries.

A spec is a name, or a mapping (dict or ``ConfigDict``) ``{"name": ..., **options}``. ``("methods", "lagrangian")`` is
the function ``lagrangian`` of ``fmjax/methods/lagrangian.py``, ``("nets", "unet")`` the class ``UNet`` of
``fmjax/nets/unet.py``, ``("paths", "linear")`` the function ``linear`` of ``fmjax/paths.py``. Options are keyword-only
arguments (fields, for a Linen module). What a module offers here is told from its helpers by positional arguments: a
path takes none, a method ``net``, a step ``velocity``, a law of times ``key``.

Everything is checked here, before anything is compiled; every error is a ``ValueError`` of one sentence.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fmjax import couplings, paths, transport
from fmjax.checks import nearest
from fmjax.data import arrays
from fmjax.nets import adapters, preconditioning
from fmjax.sampling import guidance
from fmjax.types import Cond, FlowMapFn, LogitNet, Method, Net, VelocityFn

Spec = Any  # a ConfigDict is no Mapping; what a spec may be is checked where it is opened
Names = tuple[str, ...]
SCHEDULES = ("constant", "cosine")


def resolve(package: str, name: str, *, takes: Names | None = None, like: Callable | None = None, also: Names = ()):
    """The callable ``name`` of ``fmjax.package``; with ``takes`` only one whose positional arguments are these.

    With ``like`` it must have the positional arguments and the return annotation of that function. ``also`` are names
    that the caller knows itself, for the error.

    Raises ``ValueError`` for an unknown name, with the nearest and all valid ones.

    >>> resolve("sampling.solvers", "heun").__name__, resolve("nets", "mlp").__name__
    ('heun', 'MLP')
    """
    offered = _offered(package, name, takes, like)
    if name not in offered:
        offered = sorted([*_offered(package, None, takes, like), *also])
        raise ValueError(f"fmjax.{package} has no {name!r}{nearest(name, offered)} (there are {', '.join(offered)})")
    return offered[name]


def call(function: Callable, options: Any, *args: Any) -> Any:
    """``function(*args, **options)`` after ``check_options``."""
    return function(*args, **check_options(function, options))


def check_options(function: Callable, options: Any) -> dict[str, Any]:
    """The options a function takes, checked by name and type; whole numbers become floats, lists tuples, where asked.

    Where the default is a function of ``fmjax`` (a law of times), a spec is resolved in its module. Raises
    ``ValueError`` for an unknown option (with the nearest), a missing one and a value of another type.
    """
    what, known, hints = _label(function), _options(function), typing.get_type_hints(function)
    for name in options:
        if name not in known:
            takes = f" (it takes {', '.join(known)})" if known else " (it takes none)"
            raise ValueError(f"{what} has no option {name!r}{nearest(name, known)}{takes}")
    missing = [name for name, default in known.items() if default is inspect.Parameter.empty and name not in options]
    if missing:
        raise ValueError(f"{what} needs {', '.join(repr(name) for name in missing)}")
    checked = {}
    for name, value in options.items():
        default = getattr(known[name], "func", known[name])  # of a functools.partial
        if inspect.isfunction(default) and (isinstance(value, str) or hasattr(value, "items")):
            checked[name] = _partial(default.__module__.removeprefix("fmjax."), value, like=default)
        else:
            checked[name] = _convert(f"{name} of {what}", value, hints.get(name, Any))
    return checked


def from_spec(package: str, spec: Spec, *args: Any, takes: Names | None = None, **given: Any) -> Any:
    """``resolve`` and ``call`` in one; ``given`` are options from elsewhere, passed to what takes them.

    Raises ``ValueError`` for a spec without a name or that repeats what is given.
    """
    name, options = _open(package, spec)
    function = resolve(package, name, takes=takes)
    given = {key: value for key, value in given.items() if key in _options(function)}
    if repeated := sorted(given.keys() & options.keys()):
        raise ValueError(
            f"{_label(function)} is given {repeated[0]!r} from a field of its own; take it out of its options"
        )
    return call(function, {**options, **given}, *args)


def net(spec: Spec, *, classes: int = 0) -> adapters.Model:
    """A network: ``{"name": "unet", "channels": 64}`` is ``from_linen(UNet(channels=64))``.

    ``classes`` goes to the network's own; ``ValueError`` where it takes no labels. With ``"preconditioning"``, a spec
    of ``nets.preconditioning`` (``"edm"``), any network is the denoiser of that name, as a velocity. With
    ``"noise_encoder"``, a spec of ``nets``, it has that network of two heads beside it (``adapters.with_encoder``).
    """
    name, options = _open("nets", spec)
    how, encoder = options.pop("preconditioning", None), options.pop("noise_encoder", None)
    if classes and "classes" not in _options(resolve("nets", name)):
        raise ValueError(f"classes={classes} needs a network that takes labels, which {name!r} does not")
    given = {"classes": classes} if classes else {}
    model = adapters.from_linen(from_spec("nets", {"name": name, **options}, **given))
    how = how and from_spec("nets.preconditioning", how, takes=())
    model = model._replace(net=preconditioning.preconditioned(model.net, how)) if how else model
    if not encoder:
        return model
    if "outputs" not in _options(resolve("nets", _open("nets", encoder)[0])):
        raise ValueError(f"a noise_encoder needs a network with outputs, two heads, which {encoder!r} is not")
    return adapters.with_encoder(model, adapters.from_linen(from_spec("nets", encoder, outputs=2)))


def path(spec: Spec) -> paths.Path:
    """An interpolant by its factory's name in ``fmjax.paths``: ``"linear"``, ``{"name": "vp", "beta_max": 16.0}``."""
    return from_spec("paths", spec, takes=())


def method(
    spec: Spec, net: Net, *, path: paths.Path | None = None, mean: Callable | None = None, null: int | None = None
) -> Method:
    """A method over ``net``; ``path``, and the data's ``mean()``, go to those that take one.

    ``null``, where the net is told the scale of guidance, goes to what guides itself; others get a guided teacher.
    Raises ``ValueError`` for a net that gives a logit to a method that does not classify.
    """
    function = resolve("methods", _open("methods", spec)[0], takes=("net",))
    if getattr(net, "logit", False) and typing.get_type_hints(function).get("net") is not LogitNet:
        raise ValueError(f"{_label(function)} needs a net of x's shape, not a logit's: logit=False, or net 'unet'")
    options = _options(function)
    teacher = None if null is None or "null" in options else guidance.guided_teacher(net, null=null)
    given = {"path": path, "null": null, "teacher": teacher, "mean": mean() if mean and "mean" in options else None}
    return from_spec("methods", spec, net, takes=("net",), **{k: v for k, v in given.items() if v is not None})


def data(spec: Spec) -> arrays.Splits:
    """A data set in memory: ``"digits"``, ``{"name": "digits", "held_out": 0.1}``."""
    return from_spec("data", spec, takes=())


def coupling(
    spec: Spec, x: arrays.Rows | None = None, y: Cond = None, *, flip: bool = False, seed: int = 0
) -> couplings.Coupling:
    """A coupling: ``"independent"``, ``{"name": "minibatch_ot", "replacement": True}``, ``"semidiscrete"``.

    The last one is fitted to the data set ``x: [n, ...]`` with conditions ``y`` (with ``flip`` to the mirrored images
    too), here and now; its options are those of ``transport.fit_semidiscrete``. ``ValueError`` where ``x`` is no array.
    """
    name, options = _open("couplings", spec)
    if name != "semidiscrete":
        return call(resolve("couplings", name, takes=(), also=("semidiscrete",)), options)
    import jax

    if not isinstance(x, np.ndarray):
        raise ValueError("the semidiscrete coupling is fitted to a data set in memory, and this one is not (stream)")
    if flip:
        x, y = np.concatenate([x, x[:, :, ::-1]]), jax.tree.map(lambda a: np.concatenate([a, a]), y)
    options = check_options(transport.fit_semidiscrete, options)
    potentials = transport.fit_semidiscrete(jax.random.key(seed), x, y, **options)
    return couplings.semidiscrete(x, potentials, y, by_class=options.get("by_class"))


def step(
    spec: Spec, *, path: paths.Path | None = None, score: VelocityFn | None = None
) -> Callable[[VelocityFn], FlowMapFn]:
    """A step of ``solvers`` or ``diffusion`` without its velocity: ``"rk4"``, ``{"name": "ddim", "eta": 1.0}``.

    ``path`` goes to those that take one; along a path with a latent SDE steps find no score and get ``score``.
    """
    diffusion = tuple(_offered("sampling.diffusion", None, ("velocity",), None))
    room = "sampling.diffusion" if _open("sampling.solvers", spec)[0] in diffusion else "sampling.solvers"
    made = _partial(room, spec, takes=("velocity",), also=diffusion)
    if path is None or "path" not in _options(made):
        return made
    latent = path.gamma is not None and "score" in _options(made)
    return functools.partial(made, **({"score": score} if latent else {"path": path}))


def optimiser(
    *,
    learning_rate: float,
    steps: int,
    warmup: int = 0,
    schedule: str = "constant",
    clip: float | None = None,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
):
    """Adam, or AdamW with ``weight_decay`` (on leaves of two axes and more), after a clip of the global gradient norm.

    The rate of step ``n = 0 ..`` is ``learning_rate min(1, (n + 1) / warmup)``, with ``"cosine"`` times
    ``(1 + cos(pi (n - warmup) / (steps - warmup))) / 2`` after the warm-up. The clip sees the gradients it is given:
    they must be whole, not one device's shard. Raises ``ValueError`` for values that make no sense, by name.
    """
    options = check_options(optimiser, dict(locals()))
    import jax
    import optax

    finite = all(math.isfinite(v) for v in options.values() if isinstance(v, float))
    wrong = {
        f"learning_rate={learning_rate} must be positive": learning_rate > 0,
        f"steps={steps} must be at least 1": steps >= 1,
        f"warmup={warmup} cannot be negative": warmup >= 0,
        f"schedule={schedule!r} must be one of {', '.join(SCHEDULES)}{nearest(schedule, SCHEDULES)}": schedule
        in SCHEDULES,
        f"clip={clip} must be positive, or None for no clipping": clip is None or clip > 0,
        f"beta2={beta2} must lie strictly between 0 and 1": 0 < beta2 < 1,
        f"weight_decay={weight_decay} cannot be negative": weight_decay >= 0,
        f"the optimiser's numbers must be finite, got {options}": finite,
    }
    for sentence, right in wrong.items():
        if not right:
            raise ValueError(sentence)
    rate = functools.partial(learning_rate_at, peak=learning_rate, steps=steps, warmup=warmup, schedule=schedule)
    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    adam = optax.adamw(rate, b2=beta2, weight_decay=weight_decay, mask=matrices) if weight_decay else None
    parts = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(*parts, adam or optax.adam(rate, b2=beta2))


def learning_rate_at(n, *, peak: float, steps: int, warmup: int, schedule: str):
    """The rate of step ``n`` (see ``optimiser``); traceable in ``n``."""
    import jax.numpy as jnp

    ramp = jnp.minimum(1.0, (n + 1) / max(warmup, 1))
    if schedule == "constant":
        return peak * ramp
    progress = jnp.clip((n - warmup) / max(steps - warmup, 1), 0.0, 1.0)
    return peak * ramp * (1 + jnp.cos(jnp.pi * progress)) / 2


def _partial(package: str, spec: Spec, **wanted: Any) -> Callable:
    name, options = _open(package, spec)
    function = resolve(package, name, **wanted)
    options = check_options(function, options)
    return functools.partial(function, **options) if options else function


def _open(package: str, spec: Spec) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    options = dict(spec.items()) if hasattr(spec, "items") else {}
    if type(options.get("name")) is not str:
        raise ValueError(f"a spec of fmjax.{package} is a name or a mapping with a 'name', got {spec!r}")
    return options.pop("name"), options


def _offered(package: str, name: str | None, takes, like) -> dict[str, Callable]:
    """What a package offers by name: the functions of one file, or the main one of each file (only of ``name``'s)."""
    module = importlib.import_module(f"fmjax.{package}")
    if hasattr(module, "__path__"):
        files = [m.name for m in pkgutil.iter_modules(module.__path__) if name in (None, m.name)]
        found = {file: _main(importlib.import_module(f"{module.__name__}.{file}"), file) for file in files}
    else:
        members = inspect.getmembers(module, inspect.isfunction)
        found = {key: f for key, f in members if not key.startswith("_") and f.__module__ == module.__name__}

    def fits(f):
        if like is not None and inspect.signature(f).return_annotation != inspect.signature(like).return_annotation:
            return False
        wanted = takes if like is None else _positional(like)
        return wanted is None or _positional(f) == wanted

    return {key: f for key, f in found.items() if f is not None and fits(f)}


def _main(module: types.ModuleType, file: str) -> Callable | None:
    """The function of the file's name, or the class of it (``song_unet`` -> ``SongUNet``)."""
    for key, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if key == file and inspect.isfunction(value):
            return value
        if inspect.isclass(value) and key.lower() == file.replace("_", ""):
            return value
    return None


def _options(function: Callable) -> dict[str, Any]:
    """Options and their defaults: keyword-only arguments, or a Linen module's own fields."""
    if inspect.isclass(function):
        fields = (f for f in dataclasses.fields(function) if f.init and f.name not in ("parent", "name"))
        empty = inspect.Parameter.empty
        return {f.name: empty if f.default is dataclasses.MISSING else f.default for f in fields}
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _positional(function: Callable) -> tuple[str, ...]:
    if inspect.isclass(function):
        return ()
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty)


def _label(function: Callable) -> str:
    module, name = function.__module__.removeprefix("fmjax."), function.__name__
    same = module.rpartition(".")[2].replace("_", "") == name.replace("_", "").lower()
    return module if same else f"{module}.{name}"


def _convert(what: str, value: Any, hint: Any) -> Any:
    """The value as its annotation wants it; what is not annotated is not judged."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for kind in kinds:
        origin = typing.get_origin(kind)
        if kind is float and type(value) is int:
            return float(value)
        if origin in (Sequence, tuple, list):
            if isinstance(value, (list, tuple)):  # a tuple, since Linen modules are hashed
                return tuple(_convert(f"an entry of {what}", v, typing.get_args(kind)[0]) for v in value)
        elif kind in (int, float, str, bool):
            if type(value) is kind:
                return value
        elif origin is Callable or getattr(kind, "_is_protocol", False):
            if callable(value):
                return value
        elif kind is Any or not inspect.isclass(kind) or isinstance(value, kind):
            return value
    names = " or ".join(kind.__name__ if inspect.isclass(kind) else str(kind) for kind in kinds)
    raise ValueError(f"{what} must be {names.replace('NoneType', 'None')}, got {value!r}")
