"""Read a config once into typed and checked records; after ``read`` no part of the library uses a config."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from fmjax import checks
from fmjax.checks import NonNegative, Positive, PositiveFloat, Range, Refusal, Seed
from fmjax.experiments import places, sources, specs

Count = Annotated[int, Range(1, 1e9)]
Decay = Annotated[float, Range(0, 1, open_high=True)]


@dataclasses.dataclass(frozen=True)
class Common:
    """Fields common to all stages; ``configs/base.py`` explains each field of the same name."""

    seed: Seed
    data: Any
    flip: bool
    conditional: bool
    label_dropout: Decay
    guidance: Annotated[float, Range(-1000, 1000)]
    negatives: Literal[None, "any", "other_label"]
    path: Any
    init: str | None
    teacher: str | None
    fsdp: bool
    log_every: Positive
    save_every: Positive
    sample_every: NonNegative
    keep: Positive
    source: Any = "gaussian_noise"  # of run folders that do not have the field

    @functools.cached_property
    def origin(self) -> sources.Origin:
        """The source, built once; a data set is read here."""
        return sources.origin(self.source)

    @functools.cached_property
    def normal_source(self) -> bool:
        """Whether the source is N(0, I)."""
        return sources.is_normal(self.source)

    def source_field(self) -> dict[str, Any]:
        """Return what a training depends on of the field ``source``, for its record; nothing for N(0, I)."""
        return {} if self.normal_source else {"source": sources.recorded(self.source)}


@dataclasses.dataclass(frozen=True)
class Training:
    """Fields of one training stage; ``configs/base.py`` explains each field of the same name.

    ``net=None`` stands for the network of the flow.
    """

    net: Any
    method: Any
    weighting: Any
    coupling: Any
    batch_size: Annotated[int, Range(1, 1e7)]
    steps: Count
    target: Literal["self", "ema", "frozen", "both"]
    learning_rate: Annotated[float, Range(0, 100, open_low=True)]
    warmup: Annotated[int, Range(0, 1e9)]
    schedule: Literal["constant", "cosine"]
    clip: PositiveFloat | None
    beta2: Annotated[float, Range(0, 1, open_low=True, open_high=True)]
    weight_decay: Annotated[float, Range(0, 100)]
    ema: Decay


@dataclasses.dataclass(frozen=True)
class MarginalSets:
    """Fields of the marginals p_n and q_n; ``configs/base.py`` explains each field of the same name."""

    solver: str
    solver_steps: Annotated[int, Range(1, 1e5)]
    backward_map: str
    forward_examples: Annotated[int, Range(2, 1e9)]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Number of samples that are compared.

    Attributes:
        seeds: number of runs; standard errors are over runs.
        samples: samples per run.
        bootstrap: number of resamples that give the standard error of a single run; 0 for no error.
    """

    seeds: Annotated[int, Range(1, 1e6)]
    samples: Annotated[int, Range(2, 1e9)]
    bootstrap: Annotated[int, Range(0, 1e5)] = 0


@dataclasses.dataclass(frozen=True)
class Straighten:
    """Fields of half-straightening in addition to the fields of a training stage; ``configs/base.py`` explains them."""

    seed: Seed
    bounds: Sequence[float]
    parts: Any
    sharing: Sequence[str]
    full: bool
    grid: Literal["even", "edm"]
    grid_steps: Annotated[int, Range(1, 1e5)]
    solver: str
    examples: Annotated[int, Range(2, 1e9)]
    allocations: Sequence[Sequence[int]]
    reference_steps: Annotated[int, Range(1, 1e5)]
    baselines: Sequence[Annotated[int, Range(1, 1e5)]]
    probes: Annotated[int, Range(2, 1e9)]


class Settings(NamedTuple):
    """A checked config, one record per section.

    Attributes:
        common: fields common to all stages.
        flow: training of the flow.
        correctors: training of each corrector, by name.
        flow_map: training of the flow map, or ``None``.
        marginals: fields of the marginals.
        sampling: number of samples that are compared.
        samplers: solvers and their numbers of steps, or samplers by name.
        corrections: corrected samplers by name.
        metrics: specs of the distances; empty for the defaults of the data's kind.
        straighten: training of the students and fields of the comparison, or ``None``.
        config: the whole config as plain values.
    """

    common: Common
    flow: Training
    correctors: dict[str, Training]
    flow_map: Training | None
    marginals: MarginalSets
    sampling: Sampling
    samplers: dict[str, Any]
    corrections: dict[str, Any]
    metrics: tuple[Any, ...]
    straighten: tuple[Training, Straighten] | None
    config: dict[str, Any]


SECTIONS = ("correctors", "flow_map", "sampling", "samplers", "corrections", "metrics", "straighten")


def read(config: Any) -> Settings:
    """Read and check a config.

    Args:
        config: a ``ConfigDict`` or a mapping with the fields of ``configs/base.py``.

    Returns:
        The records; every value is checked by type and range.

    Raises:
        ValueError: a field that is unknown, missing, of another type or out of range; one line that names it.
    """
    tree = places.with_metric_paths(places.with_data_path(places.absolute(config)))
    flat = {name: value for name, value in tree.items() if name not in SECTIONS}
    common, flow, marginals = (_take(kind, flat) for kind in (Common, Training, MarginalSets))
    if flat:
        name, known = next(iter(flat)), [*tree, *SECTIONS]
        raise Refusal(name, flat[name], f"no such field{checks.nearest(name, set(known) - {name})}", "Take it out")
    for name in _mapping(tree, "correctors"):
        if not name.isidentifier():
            raise Refusal(
                f"correctors.{name}", "", "a corrector's name is part of flags and folders", "Use letters, digits and _"
            )
    flow_map, straighten = _mapping(tree, "flow_map"), _mapping(tree, "straighten")
    return Settings(
        common=common,
        flow=flow,
        correctors={n: _training(f"correctors.{n}", part) for n, part in _mapping(tree, "correctors").items()},
        flow_map=_training("flow_map", flow_map) if flow_map else None,
        marginals=marginals,
        sampling=Sampling(**specs.checked(Sampling, _mapping(tree, "sampling"), field="sampling")),
        samplers=_mapping(tree, "samplers"),
        corrections=_mapping(tree, "corrections"),
        metrics=_sequence(tree, "metrics"),
        straighten=_straighten(straighten) if straighten else None,
        config=tree,
    )


def _take(kind: type, fields: dict[str, Any]) -> Any:
    """Remove the fields of the record ``kind`` from ``fields`` and return the record."""
    required = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in fields]:
        raise ValueError(f"{missing[0]}: the config has no such field. Start from configs/base.py, which has them all.")
    names = [field.name for field in dataclasses.fields(kind) if field.name in fields]
    return _make(kind, {name: fields.pop(name) for name in names}, "")


def _training(field: str, part: Any) -> Training:
    if not hasattr(part, "items"):
        raise Refusal(field, part, "not the fields of a training stage", "Give a mapping, as configs/base.py's stage()")
    return _make(Training, {"net": None, **part}, field)


def _straighten(part: Any) -> tuple[Training, Straighten]:
    training = {field.name for field in dataclasses.fields(Training)}
    first = {name: value for name, value in part.items() if name in training}
    rest = {name: value for name, value in part.items() if name not in training}
    parts = rest.get("parts")
    if not hasattr(parts, "items") or not all(isinstance(part, (list, tuple)) for part in parts.values()):
        raise Refusal("straighten.parts", parts, "not segments by name", "Give {'late': (1,)}")
    for name in ("allocations", "bounds"):
        if isinstance(rest.get(name), (list, tuple)) and not rest[name]:
            raise Refusal(f"straighten.{name}", rest[name], "is empty", "Give some, as configs/base.py")
    return _training("straighten", first), _make(Straighten, rest, "straighten")


def _make(kind: type, values: dict[str, Any], field: str) -> Any:
    try:
        return kind(**specs.checked(kind, values, field=field or "config"))
    except ValueError as error:
        raise ValueError(str(error).removeprefix("config.")) if not field else error from None


def _mapping(tree: dict[str, Any], name: str) -> dict[str, Any]:
    value = {} if tree.get(name) is None else tree[name]
    if not hasattr(value, "items"):
        raise Refusal(name, value, "not a mapping", "Give {name: options}")
    return dict(value.items())


def _sequence(tree: dict[str, Any], name: str) -> tuple[Any, ...]:
    value = () if tree.get(name) is None else tree[name]
    if not isinstance(value, (list, tuple)):
        raise Refusal(name, value, "not a sequence", "Give ('name', ...)")
    return tuple(value)
