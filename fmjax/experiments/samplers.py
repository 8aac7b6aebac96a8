"""Read the samplers of a config into records, and check every sampler before anything is drawn."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmjax import correction, paths
from fmjax.checks import Refusal
from fmjax.correction import correctors
from fmjax.experiments import build, places, specs
from fmjax.experiments.specs import Kind
from fmjax.sampling import grids
from fmjax.storage import files
from fmjax.types import stated

FLOW, FLOW_MAP, DRIFT, NOISE, PUSH = "flow", "flow_map", "drift", "noise", "push"
PUSHES = {  # fitted on samples of the sampler that they correct: the arguments of ``correction.fit_push``
    PUSH: {"affine": False, "smooth": True},
    "affine": {"affine": True, "smooth": False},
    "affine_push": {"affine": True, "smooth": True},
}
PUSH_OPTIONS = {"alpha": 1.0, "beta": 0.0, "lam": None, "examples": 15_000, "per_class": False, "target": "backward"}
TARGETS = ("backward", "interpolant")
GRID = Kind("time grid", "sampling", ("n",))
OPTIONS = ("solver", "steps", "grid", "at", "by", "parallel")  # fields of a correction that are not options of 'by'
SOURCES = ("direction", "score", "step", "velocity", "log_density")  # positional arguments of a corrector's factory


class Sampler(NamedTuple):
    """One way to draw samples: ``steps`` of a solver along a grid, corrected at some steps.

    Attributes:
        name: unique among the samplers that are compared.
        family: samplers that differ only in their number of steps have the same family.
        solver: spec of a step of ``fmjax.sampling``, or ``"flow_map"`` for jumps of the learned map.
        steps: number of steps.
        grid: spec of a time grid; ``None`` for the uniform one.
        at: the steps before which the state is corrected; ``steps`` itself corrects the end.
        by: a trained corrector's name, ``"drift"`` (kernel drift between the marginals), ``"push"``, ``"affine"`` or
            ``"affine_push"`` (fitted on samples of the plain sampler), ``"noise"`` (the noise of a correction alone, a
            control) or a corrector of ``fmjax.correction``.
        options: options of the corrector; ``alpha`` and ``beta`` may have one number per corrected step.
        parallel: evaluate step and correction on the same input.
        baseline: name of the sampler that this sampler is compared with.
    """

    name: str
    family: str
    solver: Any
    steps: int
    grid: Any = None
    at: tuple[int, ...] = ()
    by: str | None = None
    options: Mapping[str, Any] = {}
    parallel: bool = False
    baseline: str | None = None

    def fields(self) -> dict[str, Any]:
        """Return what the samples depend on, as plain values: all but name, family and baseline."""
        return {k: v for k, v in self._asdict().items() if k not in ("name", "family", "baseline")}


def plain_samplers(samplers: Mapping[str, Any]) -> list[Sampler]:
    """Return the samplers of a config's ``samplers``, without corrections.

    Args:
        samplers: solver -> numbers of steps, or name -> ``{"solver": ..., "steps": ..., "grid": ...}``.

    Returns:
        A sampler for each number of steps.

    Raises:
        ValueError: a solver or grid that does not exist, or steps that are not positive whole numbers.
    """
    plain = []
    for name, entry in samplers.items():
        field = f"samplers.{name}"
        spec = dict(entry.items()) if hasattr(entry, "items") else {"solver": name, "steps": entry}
        if extra := sorted(spec.keys() - {"solver", "steps", "grid"}):
            raise Refusal(f"{field}.{extra[0]}", spec[extra[0]], "no such field", "A sampler has solver, steps, grid")
        if "steps" not in spec:
            raise ValueError(f"{field}: has no steps. Give numbers of steps, such as (4, 8).")
        solver, steps = spec.get("solver", name), spec["steps"]
        _check_solver(solver, field=f"{field}.solver" if hasattr(entry, "items") else field)
        for n in steps if isinstance(steps, (list, tuple)) else (steps,):
            grid = spec.get("grid")
            time_grid(grid, _count(n, field), field=f"{field}.grid")
            plain.append(Sampler(_words(solver, n, grid), _family(solver, grid), solver, int(n), grid))
    return plain


def corrected_samplers(
    corrections: Mapping[str, Any], plain: Sequence[Sampler], trained: Sequence[str]
) -> list[Sampler]:
    """Return the corrected samplers of a config's ``corrections``, and their controls.

    A correction that adds noise is compared with a control, the same noise without the corrector, because noise alone
    can help a flow that is too narrow. The control, and a correction without noise, are compared with the plain
    sampler.

    Args:
        corrections: name -> ``{"solver", "steps", "grid", "at", "by", "parallel"}`` and the options of the corrector.
        plain: the plain samplers; the sampler that is corrected must be among them.
        trained: names of the trained correctors.

    Returns:
        The corrected samplers and controls, fewer corrections first.

    Raises:
        ValueError: an unknown solver or corrector, steps ``at`` outside ``0 .. steps``, options of another corrector, a
            correction without effect, or a plain sampler that is not drawn.
    """
    corrected: list[Sampler] = []
    for key, entry in corrections.items():
        if not hasattr(entry, "items"):
            raise Refusal(f"corrections.{key}", entry, "not a mapping", "Give solver, steps, at, by and options")
        for sampler in _corrected(f"corrections.{key}", dict(entry.items()), plain, trained):
            if sampler not in corrected:
                corrected.append(sampler)
    names = [s.name for s in (*plain, *corrected)]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise Refusal("corrections", repeated[0], "two samplers have this name", "Drop one of them")
    return sorted(corrected, key=lambda s: (str(s.solver), str(s.by), len(s.at), s.at, s.baseline is None))


def _check_solver(spec: Any, *, field: str) -> None:
    """Refuse a solver that does not exist, or an unknown option; ``"flow_map"`` is a solver."""
    if spec != FLOW_MAP:
        build.step(spec, field=field)


def time_grid(spec: Any, n: int, path: paths.Path = paths.linear(), *, field: str = "grid") -> np.ndarray:
    """Return the time grid of a spec.

    Args:
        spec: a grid of ``fmjax.sampling``; ``None`` for the uniform grid, which starts where the velocity is finite.
        n: number of steps.
        path: the flow's interpolant.
        field: the config field, for messages.

    Returns:
        Times ``[n + 1]``, float32.

    Raises:
        ValueError: an unknown grid or option.
    """
    if spec is None:
        return grids.default_grid(path, n)
    return np.asarray(specs.build(GRID, spec, n, field=field, path=path))


def _corrected(field: str, c: dict[str, Any], plain: Sequence[Sampler], trained: Sequence[str]) -> list[Sampler]:
    """Return the sampler of one correction, after the control if the correction adds noise."""
    if missing := [name for name in ("solver", "steps", "at", "by") if name not in c]:
        raise ValueError(f"{field}: has no {missing[0]!r}. A correction has solver, steps, at, by and options.")
    _check_solver(c["solver"], field=f"{field}.solver")
    n, grid = _count(c["steps"], field), c.get("grid")
    at = _steps(f"{field}.at", c["at"], n)
    base = next((s for s in plain if (s.solver, s.steps, s.grid) == (c["solver"], n, grid)), None)
    if base is None:
        raise Refusal(field, _words(c["solver"], n, grid), "this plain sampler is not drawn", "Add it to samplers")
    by, inner = specs.parse(c["by"], field=f"{field}.by")
    options = {name: value for name, value in c.items() if name not in OPTIONS} | inner
    options = _options(f"{field}", by, options, at, trained, time_grid(grid, n)[list(at)])
    where = "at every step" if len(at) == n + 1 else f"at {', '.join(map(str, at))}"
    parallel = c.get("parallel", False)
    if not isinstance(parallel, bool):
        raise Refusal(f"{field}.parallel", parallel, "neither True nor False", "Give one of them")
    family = f"{base.family} + corrections"
    words = f"{specs.name_of(by)} {where}" + (" (parallel)" if parallel else "")
    push = Sampler(f"{base.name}, {words}", family, base.solver, n, grid, at, by, options, parallel, baseline=base.name)
    if not np.any(options.get("beta", 0.0)):
        return [push]
    strengths = ", ".join(f"{beta:g}" for beta in np.atleast_1d(options["beta"]))
    noise = push._replace(
        name=f"{base.name}, noise {strengths} {where}", by=NOISE, options={"alpha": 0.0, "beta": options["beta"]}
    )
    return [noise, push._replace(baseline=noise.name)]


def _options(field: str, by: Any, options: dict[str, Any], at, trained: Sequence[str], ts) -> dict[str, Any]:
    """Return the options of a correction with defaults, checked against the corrector."""
    if by in PUSHES:
        return _push_options(field, by, options, at)
    if by in (*trained, DRIFT):
        known = {"alpha", "beta"} | ({"bandwidth"} if by == DRIFT else set())
        required = known - {"beta"}
        options = {"beta": 0.0, **options}
    else:
        factory = corrector_factory(field, by, trained)
        known = set(specs.options_of(factory)) - {"path"}
        required = {k for k, v in specs.options_of(factory).items() if v is inspect.Parameter.empty} & known
    if extra := sorted(options.keys() - known):
        raise Refusal(f"{field}.{extra[0]}", options[extra[0]], f"{by!r} has no such option", f"It has {_list(known)}")
    if missing := sorted(required - options.keys()):
        raise ValueError(f"{field}.{missing[0]}: {by!r} needs it. Give {missing[0]}.")
    if not at:
        raise Refusal(f"{field}.at", tuple(at), "names no step", "Give steps, such as (0, 4)")
    plain = lambda value: places.is_outside(by) and isinstance(value, (str, bool))
    options = {n: v if plain(v) else _strength(f"{field}.{n}", v, at) for n, v in options.items()}
    if by in (*trained, DRIFT):
        if not np.any(options["alpha"]):
            raise Refusal(f"{field}.alpha", options["alpha"], "corrects nothing", "Give a number other than 0")
        if np.min(options["beta"]) < 0:
            raise Refusal(f"{field}.beta", options["beta"], "a standard deviation is not negative", "Give 0 or more")
    elif "to" in known:
        identity = lambda x, s, t, cond=None, key=None: x
        scalars = {name: value for name, value in options.items() if name != "path"}
        try:
            stated(correctors.restart(identity, **scalars)).check(ts)
        except ValueError as error:
            raise ValueError(f"{field}.{error}") from error
    return options


def _push_options(field: str, by: str, options: dict[str, Any], at) -> dict[str, Any]:
    """Return the options of a fitted push with defaults, checked."""
    if extra := sorted(options.keys() - PUSH_OPTIONS.keys()):
        raise Refusal(
            f"{field}.{extra[0]}", options[extra[0]], f"{by!r} has no such option", f"It has {_list(PUSH_OPTIONS)}"
        )
    if not at:
        raise Refusal(f"{field}.at", tuple(at), "names no step", "Give steps, such as (0, 4)")
    options = {**PUSH_OPTIONS, **options}
    for name in ("alpha", "beta"):
        options[name] = _strength(f"{field}.{name}", options[name], at)
    if not np.any(options["alpha"]):
        raise Refusal(f"{field}.alpha", options["alpha"], "corrects nothing", "Give a number other than 0")
    if np.min(options["beta"]) < 0:
        raise Refusal(f"{field}.beta", options["beta"], "a standard deviation is not negative", "Give 0 or more")
    lam, count = options["lam"], options["examples"]
    if lam is not None and not _strength(f"{field}.lam", lam, ()) > 0:
        raise Refusal(f"{field}.lam", lam, "not a squared length", "Give a positive number, or None")
    if isinstance(count, bool) or not isinstance(count, int) or count < 500:
        wrong = "too few examples for a fit: its noise falls as their number grows"
        raise Refusal(f"{field}.examples", count, wrong, "Give 15000, at least 500")
    if not isinstance(options["per_class"], bool):
        raise Refusal(f"{field}.per_class", options["per_class"], "neither True nor False", "Give one of them")
    if options["target"] not in TARGETS:
        raise Refusal(f"{field}.target", options["target"], "no such target", f"Give one of {', '.join(TARGETS)}")
    return options


def push_key(sampler: Sampler) -> str:
    """Return the name of the push of a sampler among the parameters: a digest of what its samples depend on.

    Args:
        sampler: the sampler.

    Returns:
        12 hexadecimal digits.
    """
    fields = json.dumps(sampler.fields(), sort_keys=True, default=files.as_json)
    return hashlib.sha256(fields.encode()).hexdigest()[:12]


def corrector_factory(field: str, by: Any, trained: Sequence[str]) -> Callable:
    """Return the factory of a training-free corrector.

    Args:
        field: the config field of the correction, for messages.
        by: a corrector of ``fmjax.correction``, or a place outside the package.
        trained: names of the trained correctors, for messages.

    Returns:
        The factory; its positional arguments are among ``SOURCES``.

    Raises:
        ValueError: no such corrector, with the nearest.
    """
    if places.is_outside(by):
        factory = places.load_factory(by, field=f"{field}.by")
        if not _sources(factory):
            takes = f"a corrector factory takes some of ({', '.join(SOURCES)}, *, options)"
            raise Refusal(f"{field}.by", by, takes, "Change its arguments")
        return factory
    offered = {
        name: getattr(correction, name)
        for name in correction.__all__
        if inspect.isfunction(getattr(correction, name)) and _takes(getattr(correction, name))
    }
    offered.pop("marginal_matching", None)
    if by not in offered:
        specs.checks.check_choice(f"{field}.by", by, (*trained, DRIFT, *PUSHES, *sorted(offered)), "corrector")
    return offered[by]


def _takes(function: Callable) -> bool:
    hint = str(inspect.signature(function).return_annotation).rpartition(".")[2]
    return hint in ("Corrector", "Costed") and _sources(function)


def _sources(function: Callable) -> bool:
    """Return whether the positional arguments of a factory are some that a flow has."""
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return bool(names) and set(names) <= set(SOURCES)


def _strength(field: str, value: Any, at: Sequence[int]) -> Any:
    """Return a number, or a tuple with one number per corrected step."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, (list, tuple)):
        if len(value) != len(at):
            raise Refusal(field, value, f"has {len(value)} numbers for {len(at)} corrected steps", "Give one per step")
        return tuple(_strength(field, v, ()) for v in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise Refusal(field, value, "is not a finite number", "Give a number, or one per corrected step")
    return value


def _steps(field: str, value: Any, n: int) -> tuple[int, ...]:
    at = tuple(value) if isinstance(value, (list, tuple, range)) else (value,)
    for i in at:
        if isinstance(i, bool) or not isinstance(i, (int, np.integer)) or not 0 <= i <= n:
            raise Refusal(field, i, f"not a step: {n} steps can be corrected at 0 .. {n}", "Give whole numbers")
    if sorted(set(at)) != list(at):
        raise Refusal(field, at, "the steps do not rise", "Give each step once, in order")
    return tuple(int(i) for i in at)


def _count(n: Any, field: str) -> int:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 1 <= n <= 100_000:
        raise Refusal(f"{field}.steps", n, "not a number of steps", "Give a whole number in 1 .. 100000")
    return int(n)


def _words(solver: Any, n: int, grid: Any) -> str:
    along = "" if grid is None else f" of {_title(grid)}"
    return f"{_title(solver)}, {n} step{'s' if n > 1 else ''}{along}"


def _family(solver: Any, grid: Any) -> str:
    return _title(solver) + ("" if grid is None else f" on {_title(grid)}")


def _title(spec: Any) -> str:
    name = specs.name_of(spec)
    options = {k: v for k, v in spec.items() if k != "name"} if hasattr(spec, "items") else {}
    text = ", ".join(f"{k}={v}" for k, v in options.items())
    return {FLOW_MAP: "flow map"}.get(name, name) + (f" ({text})" if text else "")


def _list(names) -> str:
    return ", ".join(sorted(names)) or "none"
