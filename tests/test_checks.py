"""Ranges and choices in type hints, and one wording of what is refused."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import pytest

from fmjax import checks
from fmjax.checks import Fraction, NonNegative, Positive, PositiveFloat, Range


@pytest.mark.parametrize("allowed", [Range(), Range(0, 1), Range(low=0, open_low=True), Range(high=3)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), "0.5", None, True, [0.5]])
def test_no_range_holds_non_finite_values_or_non_numbers(allowed, value):
    with pytest.raises(ValueError, match="strength="):
        checks.check_range("strength", value, allowed)


@pytest.mark.parametrize(
    "allowed, inside, outside",
    [
        (Range(0, 1), (0, 1, 0.5, np.float32(1)), (-1e-9, 1 + 1e-9)),
        (Range(0, 1, open_low=True), (1e-9, 1), (0, 1.1)),
        (Range(0, 1, open_high=True), (0, 0.999), (1, -1)),
        (Range(low=1), (1, 10**12), (0, -3)),
        (Range(high=3, open_high=True), (-1e9, 2.9), (3,)),
    ],
)
def test_ends_belong_to_a_range_unless_they_are_open(allowed, inside, outside):
    for value in inside:
        checks.check_range("x", value, allowed)
    for value in outside:
        with pytest.raises(ValueError, match=re.escape(f"x={value}")):
            checks.check_range("x", value, allowed)


def options(
    *,
    width: Positive = 1,
    size: Annotated[int, Range(1, 64)] | None = None,
    dropout: Fraction = 0.0,
    multipliers: Sequence[Positive] = (1,),
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: NonNegative | Literal["random"] = 0,
    name: str = "",
    scale: PositiveFloat = 1.0,
): ...


@pytest.mark.parametrize(
    "name, value, where",
    [
        ("width", 0, "width=0:"),
        ("width", 2.5, "width=2.5:"),
        ("size", 65, "size=65:"),
        ("dropout", 1.5, "dropout=1.5:"),
        ("multipliers", (1, 0), r"multipliers\[1\]=0:"),
        ("dtype", "float23", "dtype='float23': .*did you mean 'float32'"),
        ("scale", 0, "scale=0:"),
        ("size", "7", "size='7':"),
        ("seed", -1, "seed=-1:"),
        ("seed", "rand", "seed='rand':"),
    ],
)
def test_a_value_outside_its_hint_is_refused_by_name(name, value, where):
    with pytest.raises(ValueError, match=f"^net.{where}") as error:
        checks.check_hints(options, {name: value}, label="net.")
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


def test_values_that_fit_their_hints_pass():
    checks.check_hints(options, {"width": np.int64(3), "size": None, "multipliers": [1, 2], "name": 3, "other": 4})
    checks.check_hints(options, {"size": 64, "seed": "random", "dropout": 0, "dtype": "bfloat16", "scale": 1e-9})


def test_long_values_are_cut_in_messages():
    with pytest.raises(ValueError) as error:
        checks.check_hints(options, {"dtype": "x" * 5000})
    assert len(str(error.value)) <= 300


def test_fields_of_a_class_are_checked_and_inherited():
    @dataclasses.dataclass
    class Grid:
        steps: Positive = 8

        def __post_init__(self):
            checks.check_fields(self)

    @dataclasses.dataclass
    class Finer(Grid):
        power: Fraction = 0.5

    Finer(steps=3, power=1.0)
    for bad in ({"steps": 0}, {"power": -1.0}):
        with pytest.raises(ValueError, match="=".join(map(str, *bad.items()))):
            Finer(**bad)


def test_a_fraction_outside_its_range_is_refused_by_name():
    checks.check_fraction(diagonal=0.0, warmup=1.0)
    for value in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"warmup={value}"):
            checks.check_fraction(diagonal=0.5, warmup=value)


def test_an_unknown_choice_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="solver='rk5'.*'rk4'"):
        checks.check_choice("solver", "rk5", ("euler", "rk4"))


@pytest.mark.parametrize("bounds", [(0.0,), (0.0, 0.5, 0.5), (0.5, 0.0), (-0.1, 1.0), (0.0, 1.1)])
def test_bounds_that_do_not_rise_within_the_unit_interval_are_refused(bounds):
    with pytest.raises(ValueError, match=re.escape(f"bounds={bounds}")):
        checks.check_bounds(bounds)
    assert checks.check_bounds([0.0, 0.25, 1.0]).tolist() == [0.0, 0.25, 1.0]
