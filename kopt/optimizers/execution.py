"""How one rule runs over many variables. Today in one way, plainly; a faster way must be proven equal to it."""

from dataclasses import dataclass
from typing import Any

from keras import ops

from kopt import _keras
from kopt.optimizers import gradients
from kopt.optimizers.rule import At


@dataclass(frozen=True)
class Shared:
    """The scalars of one step in one dtype, the same for every variable."""

    at: At
    arguments: dict[str, Any]  # of the rule
    l2: Any = None
    decay: Any = None  # learning rate * weight decay


@dataclass(frozen=True)
class Held:
    """What the optimizer keeps for one variable."""

    dtype: str  # of the arithmetic
    slots: tuple
    master: Any  # a float32 weight where the variable has 16 bits, else None
    decayed: bool


def plain(rule, gradient, variable, held: Held, shared: Shared, assign) -> None:
    """Read one variable's weight and slots, run the rule, write them back."""
    weight = _weight(variable, held)
    gradient = _keras.read(gradient, held.dtype)
    if held.decayed:
        gradient = gradients.coupled_decay(gradient, weight, shared.l2)
    slots = [_keras.read(slot, held.dtype) for slot in held.slots]
    step, *slots = rule(gradient, weight, *slots, at=shared.at, **shared.arguments)
    if held.decayed and shared.decay is not None:
        step = step + shared.decay * weight  # 1 - learning rate * weight decay would round the decay away
    weight = weight - step

    for slot, value in zip(held.slots, slots, strict=True):
        assign(slot, value)
    if held.master is not None:
        assign(held.master, weight)
    assign(variable, weight)


def _weight(variable, held: Held):
    """The weight in the dtype of the arithmetic: the master, but where the variable was assigned from outside."""
    if held.master is None:
        return _keras.read(variable, held.dtype)
    dtype = _keras.dtype_of(variable)
    master, weight = _keras.read(held.master, held.dtype), _keras.read(variable, dtype)
    return ops.where(ops.equal(ops.cast(master, dtype), weight), master, ops.cast(weight, held.dtype))
