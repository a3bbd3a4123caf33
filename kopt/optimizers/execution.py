"""How one rule runs over many variables: what is kept for each, what they share, and the update of one.

Today there is one way, the plain one; a faster way must be proven equal to it.
"""

from dataclasses import dataclass
from typing import Any

from keras import ops

from kopt import _keras, backends
from kopt.numerics import lerp
from kopt.optimizers.rule import MASTER, At


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


def hold(optimizer, variable, decayed: bool) -> Held:
    """Make what the optimizer keeps for a variable."""
    dtype = _keras.dtype_of(variable)
    wide = backends.wide(dtype)

    def add(name, initializer="zeros"):
        return optimizer.add_variable_from_reference(variable, name, initializer, wide)

    total = None if optimizer.gradient_accumulation_steps is None else add("gradient_sum")
    if getattr(variable, "overwrite_with_gradient", False):
        return Held(wide, sum=total, overwritten=True)
    slots = tuple(add(slot.name, _keras.constant(slot.initial)) for slot in optimizer.slots_in_use)
    master = None if wide == dtype else add(MASTER.name, lambda shape, dtype: backends.read(variable, dtype))
    average = add("average") if optimizer.use_ema else None
    return Held(wide, slots, master, average, total, decayed)


def scalars(optimizer, learning_rate) -> dict[str, Shared]:
    """What all variables share in this step, for each dtype of the arithmetic: nothing is computed for each anew."""
    dtypes = dict.fromkeys(optimizer.held(variable).dtype for variable in optimizer.trained)
    return {dtype: _scalars(optimizer, learning_rate, dtype) for dtype in dtypes}


def _scalars(optimizer, learning_rate, dtype) -> Shared:
    rate, done = backends.read(learning_rate, dtype), backends.read(optimizer.iterations, "int32")
    numbers = {name: backends.read(variable, dtype) for name, variable in optimizer.hyper_variables.items()}
    share = overwrite = None
    if optimizer.use_ema:  # the first weight is all of the average
        first, later = (ops.convert_to_tensor(share, dtype) for share in (1.0, 1 - optimizer.ema_momentum))
        share = ops.where(done == 0, first, later)
        if optimizer.ema_overwrite_frequency is not None:
            overwrite = (done + 1) % optimizer.ema_overwrite_frequency == 0
    return Shared(
        at=At(ops.cast(done, dtype) + 1, rate),
        arguments=optimizer.rule_arguments(numbers),
        l2=numbers.get("l2"),
        decay=rate * numbers["weight_decay"] if "weight_decay" in numbers else None,
        share=share,
        overwrite=overwrite,
    )


def plain(rule, gradient, variable, held: Held, shared: Shared, constraint, assign) -> None:
    """Read one variable's weight and slots, run the rule, write them back."""
    weight = _weight(variable, held)
    gradient = backends.read(gradient, held.dtype)
    if held.decayed and shared.l2 is not None:
        gradient = gradient + shared.l2 * weight
    slots = [backends.read(slot, held.dtype) for slot in held.slots]
    step, *slots = rule(gradient, weight, *slots, at=shared.at, **shared.arguments)
    if held.decayed and shared.decay is not None:
        step = step + shared.decay * weight  # 1 - learning rate * weight decay would round the decay away
    weight = weight - step
    if constraint is not None:
        weight = constraint(weight)

    for slot, value in zip(held.slots, slots, strict=True):
        assign(slot, value)
    if held.master is not None:
        assign(held.master, weight)
    assign(variable, weight)


def average(optimizer, shared, variable, _) -> None:
    """Move one variable's average towards the weight, and where it is time the weight to the average."""
    held = optimizer.held(variable)
    if held.average is None:
        return
    shared, weight = shared[held.dtype], _weight(variable, held)
    moved = lerp(backends.read(held.average, held.dtype), weight, shared.share)
    optimizer.assign(held.average, moved)
    if shared.overwrite is not None:
        weight = ops.where(shared.overwrite, moved, weight)
        if held.master is not None:
            optimizer.assign(held.master, weight)
        optimizer.assign(variable, weight)


def _weight(variable, held: Held):
    """The weight in the dtype of the arithmetic: the master, but where the variable was assigned from outside."""
    if held.master is None:
        return backends.read(variable, held.dtype)
    dtype = _keras.dtype_of(variable)
    master, weight = backends.read(held.master, held.dtype), backends.read(variable, dtype)
    return ops.where(ops.equal(ops.cast(master, dtype), weight), master, ops.cast(weight, held.dtype))
