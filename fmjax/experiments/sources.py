"""The source of a config: the distribution at ``t = 0`` for training, for the search of strengths, and for samples."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from fmjax.checks import Refusal, check_choice
from fmjax.experiments import build, places, specs, workdir
from fmjax.paths import Path
from fmjax.sources import Source, rows_of
from fmjax.types import Method

DATA = "data"  # a source that is a data set
STORED = ("source_dir", "data_dir")  # options of a data set: where files lie
KIND = specs.Kind("source", "sources", (), "Source")
WAY_OUT = "Take another one, or set source.name='gaussian_noise'"


class Origin(NamedTuple):
    """The source of a run.

    Attributes:
        training: what training batches, marginals and trajectories start from; of a data set the training examples.
        tuning: what samples start from while strengths are chosen; of a data set the validation examples.
        sampling: what samples start from; of a data set the examples of ``split``.
    """

    training: Source
    tuning: Source
    sampling: Source


def origin(spec: Any, *, field: str = "source") -> Origin:
    """Build the source of a config: ``{"name": "uniform_noise"}``, ``{"name": "data", "data": "two_moons"}``.

    Args:
        spec: a source of ``fmjax.sources``, ``"data"`` with a data set, a place outside the package, or a ``Source``.
        field: the config field, for messages.

    Returns:
        The source by purpose; only of a data set they differ.

    Raises:
        ValueError: an unknown name or option, or a factory that does not return a ``Source``.
    """
    if _is_data(spec):
        options = specs.parse(spec, field=field)[1]
        if "data" not in options:
            raise ValueError(f"{field}: 'data' needs the option 'data', a data set. Add {field}.data.")
        return specs.call(_of_data, options, field=field)
    if specs.is_spec(spec):
        name, _ = specs.parse(spec, field=field)
        known = [*specs.offers(KIND), DATA]
        if isinstance(name, str) and not places.is_outside(name):
            check_choice(field, name, sorted(known), "source")
    try:
        source = specs.build(KIND, spec, field=field)
    except ValueError as error:  # two options that do not fit each other
        raise error if str(error).startswith(field) else ValueError(f"{field}.{error}") from error
    if not isinstance(source, Source):
        wrong = f"gives {type(source).__name__}, not Source"
        raise Refusal(field, specs.name_of(spec), wrong, "Return a sources.Source; a data set is {'name': 'data', ...}")
    return Origin(source, source, source)


def is_normal(spec: Any) -> bool:
    """Return whether the source of a config is N(0, I); no data set is read.

    Args:
        spec: the source.

    Returns:
        Whether everything that needs the source N(0, I) applies.
    """
    return not _is_data(spec) and origin(spec).sampling.normal


def recorded(spec: Any) -> Any:
    """Return the part of the source of a config on which a training depends.

    Args:
        spec: the source.

    Returns:
        The spec; of a data set without ``split``, which only samples depend on, and without the folders of files that
        are verified.

    >>> recorded({"name": "data", "data": "two_moons", "split": "train"})
    {'name': 'data', 'data': 'two_moons'}
    """
    if not _is_data(spec):
        return spec
    kept = {name: value for name, value in spec.items() if name != "split"}
    if hasattr(kept["data"], "items") and kept["data"].get("verify"):
        kept["data"] = {name: value for name, value in kept["data"].items() if name not in STORED}
    return kept


def same(first: Any, second: Any) -> bool:
    """Return whether two configs have the same source; no data set is read, and no code outside the package runs.

    Args:
        first: the source of a config.
        second: the source of the other config.

    Returns:
        Whether the specs are equal, or both are N(0, I).
    """
    outside = any(places.outside_places([first, second]))
    plain = [workdir.plain({"source": recorded(spec)}) for spec in (first, second)]
    return plain[0] == plain[1] or (not outside and is_normal(first) and is_normal(second))


def _is_data(spec: Any) -> bool:
    return specs.is_spec(spec) and specs.parse(spec, field="source")[0] == DATA


def _of_data(*, data: Any, split: Literal["train", "validation", "test"] = "test") -> Origin:
    """Return the source of a data set; ``split`` has the examples that samples start from."""
    data = build.data(data, field="source.data")
    of = lambda examples: rows_of(examples.x, name=data.name or DATA)
    return Origin(of(data.train), of(data.validation), of(getattr(data, split)))


def limited(method: Method, spec: Any, *, name: str, path: Path) -> Method:
    """Return a method for a source other than N(0, I), without the score that its velocity would contain for N(0, I).

    Args:
        method: the method.
        spec: the source of the config.
        name: name of the method, for messages.
        path: the interpolant; with a latent, the score of a method is learned and stays.

    Returns:
        The method.

    Raises:
        ValueError: the method is valid for the source N(0, I) alone.
    """
    if method.normal_source:
        raise Refusal("source", specs.name_of(spec), f"the method {name!r} needs the source N(0, I)", WAY_OUT)
    return method if path.gamma is not None else method._replace(score=None)
