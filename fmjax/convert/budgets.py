"""Bounds on what the pickle of a stranger may cost: units of work, bytes of tensors, and the size of its result."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from typing import Any

BUDGET = 400_000  # units of work and of about 100 bytes of memory; an EDM snapshot takes about 100,000
DEEPEST = 500  # containers inside containers
LARGEST_TREE = 2**22  # parts of the result, where shared parts count each time
CONTAINERS = (dict, list, tuple, set, frozenset)


class Fixed:
    """An object that a pickle may hold and whose state it may not set."""

    __slots__ = ()

    def __setstate__(self, state):
        """Refuse the state."""
        raise ValueError("it changes a function that rebuilds its tensors")


class Call(Fixed):
    """A function that a pickle may call.

    Attributes:
        function: the replacement, which gets the pickled arguments.
    """

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function


@typing.no_type_check  # called once an opcode
class Budget:
    """What a file may still spend while it is read.

    Attributes:
        units: units of work and memory.
        bytes: bytes of all tensors together; a storage may be seen by several tensors.
    """

    def __init__(self, size: int):
        """Allow a file of ``size`` bytes ``BUDGET`` units, and tensors of twice its size."""
        self.units, self.bytes = BUDGET, 2 * size + 2**20

    def spend(self, units: int) -> None:
        """Take units away; ``ValueError`` where there are not enough."""
        self.units -= units
        if self.units < 0:
            raise ValueError(f"it takes more work than weights do (over {BUDGET} units)")

    def spend_bytes(self, count: int) -> None:
        """Take bytes of tensors away; ``ValueError`` where there are not enough."""
        self.bytes -= count
        if self.bytes < 0:
            raise ValueError("its tensors together are more than twice as large as the file")


@typing.no_type_check
def _parts(value: Any) -> Iterator[Any]:
    return iter(value.values() if isinstance(value, dict) else value)


@typing.no_type_check
def check_result(value: Any) -> None:
    """Refuse a result that contains itself, is nested too deep, repeats its parts too often, or holds a function.

    Args:
        value: what a pickle built.

    Raises:
        ValueError: one of these.

    >>> check_result({"w": [1, 2]})
    """
    done: dict[int, tuple[int, int]] = {}  # size and depth of the containers that were followed, by id
    frames = [[None, iter([value]), 0, 0]]  # container, parts that are left, size and depth so far
    inside: set[int] = set()
    while frames:
        frame = frames[-1]
        for part in frame[1]:
            if isinstance(part, Fixed):
                raise ValueError("it holds a function that rebuilds tensors, not called")
            size, depth = 1, 0
            if isinstance(part, CONTAINERS) and part:
                if id(part) in inside:
                    raise ValueError("it holds a container that contains itself")
                if id(part) not in done:
                    inside.add(id(part))
                    frames.append([part, _parts(part), 1, 1])
                    break
                size, depth = done[id(part)]
            frame[2], frame[3] = frame[2] + size, max(frame[3], depth + 1)
        else:
            container, _, size, depth = frames.pop()
            if container is None:
                return
            inside.remove(id(container))
            done[id(container)] = size, depth
            if size > LARGEST_TREE:
                raise ValueError(f"it repeats its parts until they are more than {LARGEST_TREE}")
            frames[-1][2] += size
            frames[-1][3] = max(frames[-1][3], depth + 1)
        if len(frames) > DEEPEST or frames[-1][3] > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
