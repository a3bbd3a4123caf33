"""How torch runs a rule: its kernels and its operations on lists of tensors take many variables at once.

To collect those lists is most of what a step of many small variables costs in Python, so they are kept while the
variables stay where they are. tests/test_execution.py proves a step on lists equal to its rule.
"""

import itertools
import operator
from dataclasses import dataclass

from kopt import _keras, backends
from kopt.optimizers import kernels, slabs

if backends.BACKEND == "torch":
    import torch

TILE = 2**18  # entries that a processor keeps in its cache while a rule works on them


@dataclass(frozen=True)
class Group:
    """Variables that are updated together: their places among all, their weights, and a list for each slot."""

    places: list
    dtype: str
    decayed: bool
    weights: list
    slots: list


class Plan:
    """How to update some variables: in groups, and `left` over those that only the plain way can update."""

    def __init__(self, optimizer, variables):
        self.variables, self.left, alike = list(variables), [], {}
        for i, variable in enumerate(variables):
            held = optimizer.held(variable)
            if held.master is not None or variable.constraint is not None or not _whole(_keras.memory(variable)):
                self.left.append(i)
            else:
                alike.setdefault((held.dtype, held.decayed, _keras.memory(variable).device), []).append(i)
        self.groups = [self._group(optimizer, *key[:2], places) for key, places in alike.items()]
        self.constraints = [variable.constraint for variable in variables]
        slots = (slot for variable in variables for slot in optimizer.held(variable).slots)
        self.read = list({id(v): v for v in [*variables, *(getattr(s, "whole", s) for s in slots)]}.values())
        self.tensors = list(map(_keras.memory, self.read))
        self.pointers = list(map(_pointer, self.tensors))

    def _group(self, optimizer, dtype, decayed, places):
        chosen = [self.variables[i] for i in places]
        slots = [[_memory(slot) for slot in optimizer.held(variable).slots] for variable in chosen]
        slots = [list(column) for column in zip(*slots, strict=True)]
        return Group(places, dtype, decayed, list(map(_keras.memory, chosen)), slots)

    def holds(self, variables) -> bool:
        """Whether it is a plan for these variables, and they and their slots are where they were."""
        return (
            len(variables) == len(self.variables)
            and all(map(operator.is_, variables, self.variables))
            and all(map(operator.is_, map(_keras.memory, self.read), self.tensors))
            and list(map(_pointer, self.tensors)) == self.pointers
            and all(map(_whole, self.tensors))
            and all(map(operator.is_, map(_constraint, variables), self.constraints))
        )


def update(optimizer, variables, gradients, shared) -> tuple[list, list]:
    """Update what can be updated together; the variables that are left, and their gradients."""
    if not optimizer.traits.elementwise or _keras.is_stateless():  # there nothing may be changed in place
        return variables, gradients
    plan = optimizer.plan
    if plan is None or not plan.holds(variables):
        plan = optimizer.__dict__["plan"] = Plan(optimizer, variables)
    for group in plan.groups:
        _update(optimizer, group, [gradients[i].contiguous() for i in group.places], shared[group.dtype])
    return [variables[i] for i in plan.left], [gradients[i] for i in plan.left]


def _update(optimizer, group, gradients, shared) -> None:
    """By torch's kernel, or else by the rule on lists of as much as stays in the cache."""
    l2, decay = (shared.l2 or 0.0, shared.decay or 0.0) if group.decayed else (0.0, 0.0)
    kernel = kernels.find(optimizer.traits.kernel, shared.at, shared.arguments)
    if kernel and (not decay or (not l2 and kernels.takes_decay(kernel, decay))):
        decays = {"decay": decay} if decay else {}
        kernel(group.weights, gradients, *group.slots, at=shared.at, l2=l2, **decays, **shared.arguments)
        return
    step = _step_of_kernel if kernel else _step_of_rule
    for weights, those, *slots in tiles(group.weights, gradients, *group.slots):
        step(kernel or optimizer.used_rule, weights, those, slots, l2, decay, shared)


def _step_of_kernel(kernel, weights, gradients, slots, l2, decay, shared) -> None:
    """The kernel's step and the decay come together before they are rounded to the precision of the weight."""
    moved = [torch.zeros_like(weight) for weight in weights]
    if l2:
        gradients = torch._foreach_add(gradients, weights, alpha=l2)
    kernel(moved, gradients, *slots, at=shared.at, **shared.arguments)
    torch._foreach_add_(moved, weights, alpha=-decay)
    torch._foreach_add_(weights, moved)


def _step_of_rule(rule, weights, gradients, slots, l2, decay, shared) -> None:
    alone = len(weights) == 1
    weight, gradient, *values = (x[0] if alone else TensorList(x) for x in (weights, gradients, *slots))
    gradient = gradient + l2 * weight if l2 else gradient
    step, *values = rule(gradient, weight, *values, at=shared.at, **shared.arguments)
    step = step + decay * weight if decay else step
    step, *values = ([x] if alone else x.parts for x in (step, *values))
    values = [backends.apart(parts, [*weights, *itertools.chain(*slots)]) for parts in values]
    torch._foreach_sub_(weights, step)
    for slot, value in zip(slots, values, strict=True):
        torch._foreach_copy_(slot, value)


def tiles(*lists):
    """Parts of tensors, taken from several lists alike, so many at a time as stay in the cache of a processor."""
    size = TILE if lists[0][0].device.type == "cpu" else None
    tile, filled = [], 0
    for tensors in zip(*lists, strict=True):
        n = tensors[0].numel()
        parts = [tensors]
        if size and n > size:
            parts = zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
        for part in parts:
            n = part[0].numel()
            if size and tile and filled + n > size:
                yield [list(column) for column in zip(*tile, strict=True)]
                tile, filled = [], 0
            tile.append(part)
            filled += n
    yield [list(column) for column in zip(*tile, strict=True)]


def _memory(slot):
    return slot.view() if isinstance(slot, slabs.Piece) else _keras.memory(slot)


_constraint = operator.attrgetter("constraint")
_pointer, _whole = operator.methodcaller("data_ptr"), operator.methodcaller("is_contiguous")


if backends.BACKEND == "torch":

    class TensorList(torch.Tensor):
        """Several tensors that go through arithmetic as one, by torch's operations on lists where it has them.

        A rule is called with lists as with tensors; an operation that torch has for single tensors only is done on
        one after the other.
        """

        lists = {
            "add": torch._foreach_add,
            "sub": torch._foreach_sub,
            "mul": torch._foreach_mul,
            "div": torch._foreach_div,
            "lerp": torch._foreach_lerp,
            "sqrt": torch._foreach_sqrt,
            "neg": torch._foreach_neg,
            "square": lambda x: torch._foreach_mul(x, x),
            "__rsub__": lambda x, y: torch._foreach_sub(y, x) if isinstance(y, list) else _negative_plus(x, y),
        }

        @staticmethod
        def __new__(cls, parts):
            n = sum(part.numel() for part in parts)
            made = torch.Tensor._make_wrapper_subclass(cls, (n,), dtype=parts[0].dtype, device=parts[0].device)
            made.parts = parts
            return made

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            name = function.__name__
            if name == "__get__":  # device, dtype
                with torch._C.DisableTorchFunctionSubclass():
                    return function(*args)
            if name == "to" and args[1:] == (str(args[0].device),) and not kwargs:
                return args[0]
            if name in cls.lists and not kwargs and all(isinstance(x, (TensorList, float, int)) for x in args):
                return TensorList(list(cls.lists[name](*(x.parts if isinstance(x, TensorList) else x for x in args))))
            leaves, form = torch.utils._pytree.tree_flatten((args, kwargs or {}), lambda x: isinstance(x, TensorList))
            parts = []
            for i in range(len(next(x for x in leaves if isinstance(x, TensorList)).parts)):
                own = [x.parts[i] if isinstance(x, TensorList) else x for x in leaves]
                args, kwargs = torch.utils._pytree.tree_unflatten(own, form)
                parts.append(function(*args, **kwargs))
            return TensorList(parts)

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError(f"{function} on a list of tensors")

    def _negative_plus(x, y):
        negative = torch._foreach_neg(x)
        torch._foreach_add_(negative, y)
        return negative
