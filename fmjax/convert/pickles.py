"""Read a pickle as data: nothing is executed, and the work is counted.

A pickle is a program for a small machine. Python's own machine calls every function that the program names, and a few
bytes can keep it busy for hours: they build tuples of tuples as keys, or keys that collide. This machine has the same
stack and memo, but a name stands for a replacement that only stores data, every opcode has a price, and a program that
spends more than its budget (``convert.budgets``) is refused.
"""

from __future__ import annotations

import codecs
import io
import struct
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from fmjax.convert.budgets import CONTAINERS, Budget, Call, Fixed, check_result

LONGEST_TEXT = 2**20  # bytes of one string
LONGEST_NUMBER = 128  # bytes of one integer
CALL = 8  # units of a call, which may build a tensor


def load_pickle(
    file: io.IOBase,
    end: int,
    known: Mapping[str, Any],
    budget: Budget,
    *,
    fetch: Callable[[Any], Any] | None = None,
) -> Any:
    """Read one pickle.

    Args:
        file: the pickle from the present place on.
        end: the number of bytes of the file.
        known: what a name (``"module.name"``) stands for: a function that is called in its place, a ``Fixed`` object or
            a string.
        budget: what the pickle may spend.
        fetch: returns what a persistent reference refers to; ``None`` refuses all of them.

    Returns:
        Dictionaries, lists, tuples, sets, numbers, strings, bytes, and what the replacements return.

    Raises:
        ValueError: the pickle is damaged, names something else, is nested too deep, contains itself, or costs too much.
    """
    try:
        value = _Machine(file, end, known, budget, fetch).run()
    except IndexError as error:
        raise ValueError("it takes more from the stack than is there") from error
    check_result(value)
    return value


@typing.no_type_check  # called once an opcode
class _Machine:
    def __init__(self, file, end, known, budget, fetch):
        self.file, self.end, self.known, self.budget, self.fetch = file, end, known, budget, fetch
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.count = 0

    def run(self) -> Any:
        read, spend = self.file.read, self.budget.spend
        while True:
            code = read(1)
            if code == b".":
                return self.stack.pop()
            if code not in STEPS:
                raise ValueError(f"its opcode {code!r} is unknown" if code else "it ends before its last opcode")
            step, price = STEPS[code]
            spend(price)
            self.count += 1
            step(self)

    def take(self, count: int) -> bytes:
        """Read exactly ``count`` bytes."""
        if count > self.end - self.file.tell():
            raise ValueError("it ends before its last opcode")
        return self.file.read(count)

    def number(self, width: int) -> int:
        return int.from_bytes(self.file.read(width), "little")

    def line(self) -> str:
        text = self.file.readline(4400)
        if text[-1:] != b"\n":
            raise ValueError("a line of it is too long")
        return text[:-1].decode("latin1")

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    # numbers, text and bytes

    def text(self, width: int) -> None:
        self.push(self.bounded(width, LONGEST_TEXT).decode("utf-8", "surrogatepass"))

    def bounded(self, width: int, most: int) -> bytes:
        count = self.number(width)
        if count > most:
            raise ValueError(f"it holds a text of {count} bytes")
        self.budget.spend(count // 25)  # a character takes up to four bytes
        return self.take(count)

    def raw(self, width: int) -> None:
        self.push(self.take(self.number(width)))

    def long(self, width: int) -> None:
        count = self.number(width)
        if count > LONGEST_NUMBER:
            raise ValueError(f"it holds an integer of {count} bytes")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def decimal(self) -> None:
        text = self.line().removesuffix("L")
        if len(text) > 2 * LONGEST_NUMBER:
            raise ValueError(f"it holds an integer of {len(text)} digits")
        self.push({"00": False, "01": True}.get(text) if text in ("00", "01") else int(text))

    def quoted(self) -> None:
        text = self.line().strip()
        if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
            raise ValueError("it holds a string without quotes")
        self.push(codecs.escape_decode(text[1:-1].encode("latin1"))[0].decode())

    # containers

    def put(self, place: int) -> None:
        if place > self.count:
            raise ValueError(f"its opcode {self.count - 1} writes to place {place} of the memo")
        self.memo[place] = self.stack[-1]

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise ValueError("it reads a place of the memo to which nothing was written")
        self.push(self.memo[place])

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def group(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to something that is not a list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("it sets items of something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.key(key, len(target))] = value

    def add_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not set:
            raise ValueError("it adds items to something that is not a set")
        for item in items:
            target.add(self.key(item, len(target)))

    def key(self, key: Any, count: int) -> Any:
        """Return a key of a container of ``count`` keys, at the price of the collisions that a number can cause."""
        kind = type(key)
        if kind in (str, bytes):  # Python draws their hash at random
            return key
        flat = kind is tuple and len(key) <= 8 and all(map(_simple, key))
        if not flat and not _simple(key):
            raise ValueError(f"it has a key of type {kind.__name__}, and keys are text or numbers of 64 bits")
        self.budget.spend(count // (10 if flat else 100))
        return key

    def new_set(self, items: Any) -> set[Any]:
        self.budget.spend(2 * len(items))
        self.stack.append(set())
        self.add_items(items)
        return self.stack.pop()

    def new_dict(self, pairs: Any = ()) -> dict[Any, Any]:
        """Return a dictionary of the pairs of an ``OrderedDict`` or the counts of a ``Counter``."""
        self.budget.spend(2 * len(pairs))
        self.stack.append({})
        for key, value in pairs.items() if type(pairs) is dict else pairs:
            self.set_items([key, value])
        return self.stack.pop()

    # names and calls

    def find(self, module: Any, name: Any) -> None:
        whole = f"{module:.60}.{name:.60}" if type(module) is type(name) is str else "no name"
        known = self.known.get(whole)
        if known is None and whole in BUILT_IN:
            built_in = BUILT_IN[whole]
            known = lambda *args: built_in(self, *args)
        if known is None:
            raise ValueError(
                f"it names {whole:.80}, which does not rebuild tensors or dictionaries. "
                "Save the state dict alone, or give a replacement in extra"
            )
        self.push(known if isinstance(known, (Fixed, str)) else Call(known))

    def global_name(self) -> None:
        self.find(self.line(), self.line())

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.find(module, name)

    def call(self, function: Any, args: Any) -> None:
        if type(function) is not Call or type(args) is not tuple:
            raise ValueError("it calls something that is not a function")
        self.budget.spend(len(args))
        self.push(function.function(*args))

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.call(function, args)

    def instance(self) -> None:
        module, name = self.line(), self.line()
        args = tuple(self.to_mark())
        self.find(module, name)
        self.call(self.stack.pop(), args)

    def call_marked(self) -> None:
        function, *args = self.to_mark() or [None]
        self.call(function, tuple(args))

    def new_with_names(self) -> None:
        if self.stack.pop() != {}:
            raise ValueError("it calls a function with named arguments")
        self.reduce()

    def build(self) -> None:
        """Set the state of an object; attributes of an ``OrderedDict``, as PyTorch's ``_metadata``, are left out."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(getattr(type(target), "__setstate__", None), types.FunctionType):  # a replacement's own
            self.budget.spend(len(state) if isinstance(state, CONTAINERS) else 0)
            target.__setstate__(state)
        elif type(target) is not dict or type(state) is not dict:
            raise ValueError("it sets the state of something that has none")

    def persistent(self, reference: Any) -> None:
        if self.fetch is None:
            raise ValueError("it refers to something outside of it")
        self.push(self.fetch(reference))


@typing.no_type_check
def _simple(key: Any) -> bool:
    kind = type(key)
    if kind is int:
        return -(2**63) <= key < 2**64
    return kind in (str, bytes, float, bool, type(None))


def _to_bytes(machine: _Machine, text: Any, encoding: Any = "latin1") -> bytes:
    """Protocol 2 has no bytes and encodes a text."""
    if type(text) is not str or encoding != "latin1":
        raise ValueError("it encodes a text in a way that is not read here")
    machine.budget.spend(len(text) // 50)
    return text.encode("latin1")


def _to_bytearray(machine: _Machine, content: Any = b"", *encoding: Any) -> bytes:
    if type(content) is str and encoding == ("latin-1",):
        content = _to_bytes(machine, content)
    if type(content) is not bytes:
        raise ValueError("it holds a bytearray that is not made of bytes")
    return content


def _complex(machine: _Machine, *parts: Any) -> complex:
    if any(type(part) is not float for part in parts):
        raise ValueError("it holds a complex number that is not made of floats")
    return complex(*parts)


def _size(machine: _Machine, sizes: Any = ()) -> tuple:
    if type(sizes) not in (tuple, list):
        raise ValueError("it holds a size that is not a tuple")
    machine.budget.spend(len(sizes))
    return tuple(sizes)


BUILT_IN = {
    "_codecs.encode": _to_bytes,
    "builtins.bytearray": _to_bytearray,
    "builtins.complex": _complex,
    "builtins.set": _Machine.new_set,
    "builtins.frozenset": _Machine.new_set,
    "__builtin__.set": _Machine.new_set,
    "__builtin__.complex": _complex,
    "__builtin__.bytearray": _to_bytearray,
    "collections.Counter": _Machine.new_dict,
    "collections.OrderedDict": _Machine.new_dict,
    "torch.Size": _size,
}
STEPS: dict[bytes, tuple[Callable[[_Machine], None], int]] = {
    # numbers, text, bytes
    b"N": (lambda m: m.push(None), 1),
    b"\x88": (lambda m: m.push(True), 1),
    b"\x89": (lambda m: m.push(False), 1),
    b"I": (_Machine.decimal, 2),
    b"L": (_Machine.decimal, 2),
    b"F": (lambda m: m.push(float(m.line())), 1),
    b"G": (lambda m: m.push(struct.unpack(">d", m.take(8))[0]), 1),
    b"J": (lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)), 1),
    b"K": (lambda m: m.push(m.number(1)), 1),
    b"M": (lambda m: m.push(m.number(2)), 1),
    b"\x8a": (lambda m: m.long(1), 2),
    b"\x8b": (lambda m: m.long(4), 2),
    b"S": (_Machine.quoted, 2),
    b"V": (lambda m: m.push(codecs.raw_unicode_escape_decode(m.line().encode("latin1"))[0]), 2),
    b"T": (lambda m: m.text(4), 2),
    b"U": (lambda m: m.text(1), 2),
    b"X": (lambda m: m.text(4), 2),
    b"\x8c": (lambda m: m.text(1), 2),
    b"\x8d": (lambda m: m.text(8), 2),
    b"B": (lambda m: m.raw(4), 1),
    b"C": (lambda m: m.raw(1), 1),
    b"\x8e": (lambda m: m.raw(8), 1),
    b"\x96": (lambda m: m.raw(8), 1),
    # containers
    b"(": (_Machine.mark, 1),
    b")": (lambda m: m.push(()), 1),
    b"]": (lambda m: m.push([]), 3),
    b"}": (lambda m: m.push({}), 4),
    b"\x8f": (lambda m: m.push(set()), 5),
    b"\x85": (lambda m: m.group(1), 3),
    b"\x86": (lambda m: m.group(2), 3),
    b"\x87": (lambda m: m.group(3), 3),
    b"t": (lambda m: m.push(tuple(m.to_mark())), 3),
    b"l": (lambda m: m.push(m.to_mark()), 3),
    b"d": (lambda m: (lambda items: (m.push({}), m.set_items(items)))(m.to_mark()), 4),
    b"\x91": (lambda m: m.push(frozenset(m.new_set(m.to_mark()))), 10),
    b"a": (lambda m: m.append([m.stack.pop()]), 1),
    b"e": (lambda m: m.append(m.to_mark()), 1),
    b"s": (lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]), 2),
    b"u": (lambda m: m.set_items(m.to_mark()), 1),
    b"\x90": (lambda m: m.add_items(m.to_mark()), 1),
    b"0": (lambda m: m.stack.pop() if m.stack else m.to_mark(), 1),
    b"1": (_Machine.to_mark, 1),
    b"2": (lambda m: m.push(m.stack[-1]), 1),
    # the memo
    b"p": (lambda m: m.put(int(m.line())), 2),
    b"q": (lambda m: m.put(m.number(1)), 1),
    b"r": (lambda m: m.put(m.number(4)), 1),
    b"\x94": (lambda m: m.put(len(m.memo)), 1),
    b"g": (lambda m: m.get(int(m.line())), 1),
    b"h": (lambda m: m.get(m.number(1)), 1),
    b"j": (lambda m: m.get(m.number(4)), 1),
    # names, calls, state
    b"c": (_Machine.global_name, 2),
    b"\x93": (_Machine.stack_global, 2),
    b"R": (_Machine.reduce, CALL),
    b"\x81": (_Machine.reduce, CALL),
    b"\x92": (_Machine.new_with_names, CALL),
    b"i": (_Machine.instance, CALL),
    b"o": (_Machine.call_marked, CALL),
    b"b": (_Machine.build, 2),
    b"P": (lambda m: m.persistent(m.line()), 2),
    b"Q": (lambda m: m.persistent(m.stack.pop()), 2),
    # the beginning, and lengths that only a stream needs
    b"\x80": (lambda m: m.take(1), 1),
    b"\x95": (lambda m: m.take(8), 1),
}
