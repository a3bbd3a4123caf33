"""How one rule runs over many variables. Today in one way, plainly; a faster way must be proven equal to it."""

from dataclasses import dataclass
from typing import Any

from keras import ops

from kopt import _keras, backends
from kopt.numerics import lerp
from kopt.optimizers import gradients
from kopt.optimizers.rule import At


@dataclass(frozen=True)
class Shared:
    """The scalars of one step in one dtype, the same for every variable."""

    at: At
    arguments: dict[str, Any]  # of the rule
    l2: Any = None
    decay: Any = None  # learning rate * weight decay
    share: Any = None  # of the newest weight in the moving average
    overwrite: Any = None  # whether the average replaces the weight at this step


@dataclass(frozen=True)
class Held:
    """What the optimizer keeps for one variable."""

    dtype: str  # of the arithmetic
    slots: tuple = ()
    master: Any = None  # a float32 weight where the variable has 16 bits
    average: Any = None  # of the weights, if asked for
    sum: Any = None  # of the gradients, where they are accumulated
    decayed: bool = True
    overwritten: bool = False  # by its gradient, as Keras's float8 scales are


def plain(rule, gradient, variable, held: Held, shared: Shared, constraint, assign) -> None:
    """Read one variable's weight and slots, run the rule, write them back."""
    weight = _weight(variable, held)
    gradient = backends.read(gradient, held.dtype)
    if held.decayed:
        gradient = gradients.coupled_decay(gradient, weight, shared.l2)
    slots = [backends.read(slot, held.dtype) for slot in held.slots]
    step, *slots = rule(gradient, weight, *slots, at=shared.at, **shared.arguments)
    if held.decayed and shared.decay is not None:
        step = step + shared.decay * weight  # 1 - learning rate * weight decay would round the decay away
    weight = weight - step
    if constraint is not None:
        weight = constraint(weight)
    if held.average is not None:
        average = lerp(backends.read(held.average, held.dtype), weight, shared.share)
        assign(held.average, average)
        if shared.overwrite is not None:
            weight = ops.where(shared.overwrite, average, weight)

    for slot, value in zip(held.slots, slots, strict=True):
        assign(slot, value)
    if held.master is not None:
        assign(held.master, weight)
    assign(variable, weight)


def _weight(variable, held: Held):
    """The weight in the dtype of the arithmetic: the master, but where the variable was assigned from outside."""
    if held.master is None:
        return backends.read(variable, held.dtype)
    dtype = _keras.dtype_of(variable)
    master, weight = backends.read(held.master, held.dtype), backends.read(variable, dtype)
    return ops.where(ops.equal(ops.cast(master, dtype), weight), master, ops.cast(weight, held.dtype))
