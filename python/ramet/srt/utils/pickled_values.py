"""Owns reading a pickle as data: what it would call is written down, and nothing is called, imported or looked up.

A pickle is a program for a stack machine. This one knows the few operations that tensors and plain containers need,
and a list of the names that they may mention; everything else ends it, before anything has been made of it. What comes
out is plain values and records of calls, which tensor_pickles.py checks again, by what each call needs.
"""

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import IO, Any

MAX_OPERATIONS = 4_000_000
MAX_INT = 1 << 63


class PickleError(ValueError):
    """A pickle is broken, or has something in it that tensors don't need."""


@dataclass(frozen=True)
class Name:
    """Something in a module, which is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """A call of a function or class, which is not made."""

    function: Name
    args: tuple[Any, ...]
    state: Any = None  # what a new object would get


@dataclass(frozen=True)
class Reference:
    """Something that lies outside of the pickle."""

    key: Any


ORDERED = Name("collections", "OrderedDict")


class _Machine:
    """Does one operation at a time."""

    def __init__(self, is_known: Callable[[Name], bool], has_references: bool):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._is_known = is_known
        self._has_references = has_references

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise PickleError("it takes more than there is")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise PickleError("it has no mark")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def pop_some(self, count: int) -> tuple[Any, ...]:
        return tuple([self.pop() for _ in range(count)][::-1])

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def extend(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def update(self, flat: list[Any]) -> None:
        self._top(dict).update(_items(flat))

    def note(self, place: int | None) -> None:
        self._memo[len(self._memo) if place is None else place] = self._top(object)

    def recall(self, place: int) -> None:
        if place not in self._memo:
            raise PickleError("it remembers what it has not noted")
        self.stack.append(self._memo[place])

    def name(self, module: Any, name: Any) -> None:
        found = Name(str(module)[:200], str(name)[:200])
        if not isinstance(module, str) or not isinstance(name, str) or not self._is_known(found):
            raise PickleError(f"it names {found}, which no tensor needs")
        self.stack.append(found)

    def call(self, function: Any, args: Any) -> None:
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise PickleError("it calls what is no function")
        self.stack.append({} if function == ORDERED and not args else Call(function, args))

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, Call) and target.state is None:
            target.state = state
        elif not isinstance(target, dict):  # a state_dict bears versions of its modules, which say nothing of tensors
            raise PickleError("it changes what it has not just made")
        self.stack.append(target)

    def refer(self, key: Any) -> None:
        if not self._has_references:
            raise PickleError("it refers to something outside")
        self.stack.append(Reference(key))

    def _top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise PickleError(f"it adds to what is no {kind.__name__}")
        return self.stack[-1]


def _items(flat: list[Any]) -> dict[Any, Any]:
    if len(flat) % 2 or not all(isinstance(key, str | int) for key in flat[::2]):
        raise PickleError("it has a dict with other keys than texts and numbers")
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _number(value: Any) -> int:
    if not -MAX_INT <= value < MAX_INT:
        raise PickleError("it has a number beyond 64 bits")
    return int(value)


def _push(make: Callable[[_Machine, Any], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, arg: machine.stack.append(make(machine, arg))


OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda _machine, _arg: None,
    "FRAME": lambda _machine, _arg: None,
    "MARK": lambda machine, _: machine.mark(),
    "NONE": _push(lambda _machine, _arg: None),
    "NEWTRUE": _push(lambda _machine, _arg: True),
    "NEWFALSE": _push(lambda _machine, _arg: False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _push(lambda _, arg: _number(arg))),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _push(lambda _, arg: arg)),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), _push(lambda _, arg: arg)),
    "EMPTY_TUPLE": _push(lambda _machine, _arg: ()),
    "EMPTY_LIST": _push(lambda _machine, _arg: []),
    "EMPTY_DICT": _push(lambda _machine, _arg: {}),
    "TUPLE": _push(lambda machine, _: tuple(machine.pop_mark())),
    "TUPLE1": _push(lambda machine, _: machine.pop_some(1)),
    "TUPLE2": _push(lambda machine, _: machine.pop_some(2)),
    "TUPLE3": _push(lambda machine, _: machine.pop_some(3)),
    "LIST": _push(lambda machine, _: machine.pop_mark()),
    "DICT": _push(lambda machine, _: _items(machine.pop_mark())),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.update(list(machine.pop_some(2))),
    "SETITEMS": lambda machine, _: machine.update(machine.pop_mark()),
    **dict.fromkeys(("MEMOIZE", "BINPUT", "LONG_BINPUT"), lambda machine, arg: machine.note(arg)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, arg: machine.recall(arg)),
    "GLOBAL": lambda machine, arg: machine.name(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.pop_some(2)),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda machine, _: machine.call(*machine.pop_some(2))),
    "BUILD": lambda machine, _: machine.build(*machine.pop_some(2)),
    "BINPERSID": lambda machine, _: machine.refer(machine.pop()),
}


def read_values(file: IO[bytes], is_known: Callable[[Name], bool], *, has_references: bool = False) -> Any:
    """What one pickle says, from where the file stands; the file stands behind it afterwards.

    Args:
        is_known: whether a name may be mentioned.
        has_references: whether it may refer to something outside.

    Returns:
        None, bool, int, str, bytes, tuple, list, dict, Name, Call or Reference, or such in each other.

    Raises:
        PickleError: if it is no pickle, or has something else in it.
    """
    machine = _Machine(is_known, has_references)
    try:
        for count, (operation, arg, _) in enumerate(pickletools.genops(file)):
            if operation.name == "STOP":
                result = machine.pop()
                if machine.stack or machine.marks:
                    raise PickleError("it leaves something behind")
                return result
            if count == MAX_OPERATIONS:
                raise PickleError(f"it has more than {MAX_OPERATIONS} operations")
            if operation.name not in OPERATIONS:
                raise PickleError(f"it has the operation {operation.name}, which no tensor needs")
            OPERATIONS[operation.name](machine, arg)
    except PickleError:
        raise
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise PickleError(f"it is broken: {error}") from None
    raise PickleError("it has no end")


def is_named(value: Any, names: Collection[Name]) -> bool:
    """Whether a value is a call of one of these."""
    return isinstance(value, Call) and value.function in names
