"""A rule on torch as the list of its operations, noted once a step and then done on one tile of weights after another.

To call a rule for each tile would cost Python's time and, on a CPU, new memory for each result. Once noted it is known
how long each result is needed: the next one takes its room, and the new value of a slot goes where the old one was.
"""

from dataclasses import dataclass, replace
from typing import Any

from kopt import backends

SAMPLE = 3  # entries of the tensors that a rule is noted with

if backends.BACKEND == "torch":
    import torch
    from torch.utils import _pytree as trees

    INTO = {name: getattr(torch, name) for name in (
        "abs", "add", "div", "lerp", "maximum", "minimum", "mul", "neg", "sign", "sqrt", "square", "sub",
    )} | {"__rsub__": lambda x, y, out: torch.neg(x, out=out).add_(y)}  # fmt: skip
    ON_LISTS = {name: getattr(torch, f"_foreach_{name}") for name in (
        "abs", "add", "div", "lerp", "maximum", "minimum", "mul", "neg", "sign", "sqrt", "sub",
    )} | {
        "square": lambda x: torch._foreach_mul(x, x),
        "__rsub__": lambda x, y: torch._foreach_add(torch._foreach_neg(x), y),
    }  # fmt: skip

    class Symbol(torch.Tensor):
        """Stands for a tensor of any size while a rule is noted."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            name, kwargs = function.__name__, kwargs or {}
            in_place = name.endswith("_") and not name.endswith("__")
            if in_place:  # `x += y` is `x.add_(y)`; it is noted as `x.add(y)`, and `x` stands for that from then on
                name = name.removesuffix("_")
                function = getattr(torch, name, None)
            if name == "__setitem__" or function is None:
                raise TypeError("A rule that is declared `elementwise` must not write into a tensor")
            with torch._C.DisableTorchFunctionSubclass():
                result = function(*args, **kwargs)
            if name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
                raise TypeError(f"A rule that is declared `elementwise` must not look at values: `{name}`")
            program = next(x for x in trees.tree_leaves((args, kwargs)) if isinstance(x, cls)).program
            if isinstance(result, (tuple, list)) and any(map(torch.is_tensor, result)):
                parts = enumerate(result)
                return type(result)([program.note(_part(function, i), args, kwargs, part) for i, part in parts])
            if not torch.is_tensor(result) or isinstance(result, cls):  # a shape, a dtype; `to` the same dtype
                return result
            noted = program.note(function, args, kwargs, result)
            if in_place:
                args[0].value = noted.value
            return args[0] if in_place else noted

    def _part(function, i):
        def part(*args, **kwargs):
            return function(*args, **kwargs)[i]

        return part


@dataclass(frozen=True)
class Value:
    """A value of a program by its place: the inputs come first, then the results of the operations."""

    place: int


@dataclass(frozen=True)
class Operation:
    """A call. `simple` is one of numbers and values of the weight's dtype, which can put its result into given room."""

    function: Any
    leaves: list  # of the arguments
    form: Any
    simple: bool
    room: Any = None  # its number, or the `Value` of the slot that takes the result; None: new memory

    def __call__(self, values):
        args, kwargs = trees.tree_unflatten(_filled(self.leaves, values), self.form)
        return self.function(*args, **kwargs)


class Program:
    """The operations of `rule(gradient, weight, *slots) -> (step, *slots)` for tensors like this one."""

    def __init__(self, rule, slots, like):
        self.operations, self.inputs, self.dtype = [], 2 + slots, like.dtype
        self.regular = set()  # the values of this dtype with an entry for each of the weight
        sample = torch.ones(SAMPLE, dtype=like.dtype, device=like.device)
        symbols = [self._symbol(sample.clone(), place) for place in range(self.inputs)]
        self.results = [self._leaf(result) for result in rule(*symbols)]
        self.rooms = self._find_rooms()
        used = [*self.results, *(x for operation in self.operations for x in [operation.room, *operation.leaves])]
        self.used = {x.place for x in used if isinstance(x, Value)}

    def note(self, function, args, kwargs, result):
        leaves, form = trees.tree_flatten((args, kwargs))
        leaves = [self._leaf(x) for x in leaves]
        symbol = self._symbol(result, self.inputs + len(self.operations))
        simple = function.__name__ in INTO and not kwargs and isinstance(leaves[0], Value)
        simple = simple and all(x in self.regular or isinstance(x, (float, int)) for x in [symbol.value, *leaves])
        self.operations.append(Operation(function, leaves, form, simple))
        return symbol

    def _symbol(self, sample, place):
        symbol, value = sample.as_subclass(Symbol), Value(place)
        if sample.dtype is self.dtype and sample.shape == (SAMPLE,):
            self.regular.add(value)
        symbol.program, symbol.value = self, value
        return symbol

    def _leaf(self, x):
        if isinstance(x, Symbol):
            return x.value
        if torch.is_tensor(x) and x.shape == (SAMPLE,):  # made by the rule in the shape that it saw
            if not ((x == x[0]) | (x.isnan() & x[0].isnan())).all():
                raise ValueError("A rule that is declared `elementwise` must not make tensors of entries that differ")
            return x[0]
        return x

    def _find_rooms(self) -> int:
        """Give each simple operation a room for its result; how many there are."""
        end, first = len(self.operations), self.inputs
        last = [-1] * first + list(range(end))  # the operation that reads a value last
        for result in self.results:
            if isinstance(result, Value):
                last[result.place] = end
        for i, operation in reversed(list(enumerate(self.operations))):
            until = i if operation.simple else last[first + i]  # else the result may be a view of what was read
            for leaf in operation.leaves:
                if isinstance(leaf, Value):
                    last[leaf.place] = max(last[leaf.place], until)
        rooms, free, count = {}, [], 0
        for slot, result in enumerate(self.results[1:], start=2):
            if isinstance(result, Value) and result.place >= max(first, first + last[slot]):
                rooms.setdefault(result.place, Value(slot))
        for i, operation in enumerate(self.operations):
            if not operation.simple:
                continue
            read = {leaf.place for leaf in operation.leaves if isinstance(leaf, Value)}
            free += [rooms[place] for place in read if last[place] == i and isinstance(rooms.get(place), int)]
            if first + i not in rooms:
                count += not free
                rooms[first + i] = free.pop() if free else count - 1
            self.operations[i] = replace(operation, room=rooms[first + i])
        return count

    def run(self, inputs, rooms) -> list:
        """The results for these tensors; `rooms` are tensors of the same size."""
        values = list(inputs)
        for operation in self.operations:
            room = operation.room
            if room is None:
                values.append(operation(values))
            else:
                out = inputs[room.place] if isinstance(room, Value) else rooms[room]
                values.append(INTO[operation.function.__name__](*_filled(operation.leaves, values), out=out))
        return _filled(self.results, values)

    def run_on_lists(self, inputs) -> list:
        """The results for these lists of tensors: lists, but of what is the same for all entries."""
        values = list(inputs)
        for operation in self.operations:
            name = operation.function.__name__
            if operation.simple and name in ON_LISTS:
                values.append(ON_LISTS[name](*_filled(operation.leaves, values)))
            else:
                values.append([operation(part) for part in zip(*values, strict=True)])
        return _filled(self.results, values)


def _filled(leaves, values) -> list:
    return [values[leaf.place] if isinstance(leaf, Value) else leaf for leaf in leaves]
