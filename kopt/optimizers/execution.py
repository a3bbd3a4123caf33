"""How one rule runs over many variables: what is kept for each, what they share, and the ways to update them.

`update` gives each variable to the fastest way that its rule, its gradient and its place allow. The plain way is the
definition; tests/test_execution.py proves the others equal to it.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from keras import ops

from kopt import _keras, backends
from kopt.numerics import behind, lerp
from kopt.optimizers import factors, kernels, lists, slabs
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
    multipliers: tuple = ()  # of the groups of variables


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
    group: int | None = None  # whose multiplier it has

    @property
    def parts(self) -> list:
        """All that is kept, in the order of a file."""
        return [part for part in (self.sum, *self.slots, self.master, self.average) if part is not None]


def hold(optimizer, variables, excluded, owner) -> tuple[Held, ...]:
    """Make what the optimizer keeps for its variables.

    Those at the places `excluded` do not decay; `owner` has for each the position of its group, or None.
    """
    pieces = {}
    if optimizer.slots_in_use and optimizer.traits.elementwise:
        for places in slabs.layout(variables, optimizer.home):
            members = [variables[i] for i in places]
            slab = slabs.Slab(optimizer, optimizer.slots_in_use, members, backends.wide(_keras.dtype_of(members[0])))
            pieces |= dict(zip(places, slab.pieces, strict=True))
    return tuple(_hold(optimizer, v, i not in excluded, owner[i], pieces.get(i)) for i, v in enumerate(variables))


def _hold(optimizer, variable, decayed: bool, group: int | None, slots) -> Held:
    dtype = _keras.dtype_of(variable)
    wide = backends.wide(dtype)

    def add(name, initializer="zeros"):
        return optimizer.add_variable_from_reference(variable, name, initializer, wide)

    total = None if optimizer.gradient_accumulation_steps is None else add("gradient_sum")
    if getattr(variable, "overwrite_with_gradient", False):
        return Held(wide, sum=total, overwritten=True)
    if slots is None:
        slots = tuple(add(slot.name, _keras.constant(slot.initial)) for slot in optimizer.slots_in_use)
    master = None if wide == dtype else add(MASTER.name, lambda shape, dtype: backends.read(variable, dtype))
    average = add("average") if optimizer.use_ema else None
    return Held(wide, slots, master, average, total, decayed, group=group)


def scalars(optimizer, learning_rate) -> dict[str, Shared]:
    """What all variables share in this step, for each dtype of the arithmetic: nothing is computed for each anew."""
    return {dtype: _scalars(optimizer, learning_rate, dtype) for dtype in optimizer.dtypes}


def _scalars(optimizer, learning_rate, dtype) -> Shared:
    rate, done = backends.number(learning_rate, dtype), backends.number(optimizer.iterations, "int32")
    numbers = {name: backends.number(variable, dtype) for name, variable in optimizer.hyper_variables.items()}
    share = overwrite = None
    if optimizer.use_ema:  # the first weight is all of the average
        first, later = (ops.convert_to_tensor(share, dtype) for share in (1.0, 1 - optimizer.ema_momentum))
        share = ops.where(done == 0, first, later)
        if optimizer.ema_overwrite_frequency is not None:
            overwrite = (done + 1) % optimizer.ema_overwrite_frequency == 0
    return Shared(
        at=At(backends.cast_number(done, dtype) + 1, rate),
        arguments=optimizer.rule_arguments(numbers),
        l2=numbers.get("l2"),
        decay=rate * numbers["weight_decay"] if "weight_decay" in numbers else None,
        share=share,
        overwrite=overwrite,
        multipliers=() if optimizer.factors is None else backends.numbers(optimizer.factors.variable, dtype),
    )


def afresh(shared: Shared) -> Shared:
    return replace(shared, at=shared.at.afresh())


# The update


def update(optimizer, variables, gradients, shared: dict[str, Shared]) -> None:
    """Update the variables; those in a group take so much of it as the multiplier of the group says."""
    if optimizer.factors is None:
        _update_all(optimizer, variables, gradients, shared)
        return
    with factors.blending(optimizer, _taken(optimizer, variables, gradients, shared)):
        _update_all(optimizer, variables, gradients, shared)


def _taken(optimizer, variables, gradients, shared):
    """The variables in a group, each with its multiplier and, if only rows of it move, their indices."""
    for variable, gradient in zip(variables, gradients, strict=True):
        held = optimizer.held(variable)
        if held.group is not None:
            of_dtype = shared[held.dtype]
            way, _ = _way(optimizer, variable, gradient, held, of_dtype)
            is_part = way is rows and getattr(variable, "constraint", None) is None
            yield variable, of_dtype.multipliers[held.group], gradient.indices if is_part else None


def _update_all(optimizer, variables, gradients, shared) -> None:
    """Update the variables, each in the fastest way that there is for it."""
    left = list(zip(variables, gradients, strict=True))
    if left and backends.BACKEND == "torch":
        left = lists.update(optimizer, variables, gradients, shared)
    together: dict[tuple, list] = {}
    for variable, gradient in left:
        held = optimizer.held(variable)
        way, key = _way(optimizer, variable, gradient, held, shared[held.dtype])
        together.setdefault((way, held.dtype, key), []).append((variable, gradient, held))
    for (way, dtype, _), found in together.items():
        way(optimizer, found, shared[dtype])
    for variable in variables:
        _constrain(optimizer, variable)


def _way(optimizer, variable, gradient, held, shared):
    """How to update a variable, and what those must have in common that are updated together."""
    if not optimizer.traits.elementwise or backends.strategy() is not None:
        return plain, None
    decays = held.decayed and (shared.l2 is not None or shared.decay is not None)
    if backends.has_rows(gradient) and (optimizer.sparse == "lazy" or (optimizer.traits.rests and not decays)):
        return rows, None
    if held.slots and isinstance(held.slots[0], slabs.Piece):
        return flat, held.slots[0].slab
    if backends.BACKEND != "tensorflow" or held.master is not None:
        return plain, None
    if not decays and kernels.find(optimizer.traits.kernel, shared.at, shared.arguments):
        return kernel, None
    return (island if backends.is_on_cpu(variable) else plain), None


def plain(optimizer, found, shared) -> None:
    """Read each weight and its slots, run the rule, write them back."""
    for variable, gradient, held in found:
        _update(optimizer, variable, gradient, held, shared, backends.read, optimizer.assign)


def rows(optimizer, found, shared) -> None:
    """The same for the rows of a variable that have a gradient, of TensorFlow's `IndexedSlices`."""
    for variable, gradient, held in found:
        gradient = backends.repeated_sums(gradient)
        read = partial(_read_rows, gradient.indices)
        assign = partial(_assign_rows, gradient.indices)
        _update(optimizer, variable, gradient.values, held, shared, read, assign)


def flat(optimizer, found, shared) -> None:
    """The rule once for all variables of a slab."""
    found = sorted(found, key=lambda one: one[2].slots[0].place)
    weights, gradients = [], []
    for variable, gradient, held in found:
        weights.append(_weight(variable, held, backends.read))
        gradients.append(_with_l2(backends.read(gradient, held.dtype), weights[-1], held, shared))
    slots = found[0][2].slots
    slab, members, dtype = slots[0].slab, [held.slots[0].place for _, _, held in found], found[0][2].dtype
    values = [slab.read(slot.whole, members, dtype) for slot in slots]
    weight = _joined(weights)
    results = optimizer.used_rule(_joined(gradients), weight, *values, at=shared.at, **shared.arguments)
    results = [backends.spread(result, weight) for result in backends.apart(results, values)]
    for slot, value in zip(slots, results[1:], strict=True):
        slab.write(slot.whole, members, value)
    steps = backends.split(results[0], [slab.sizes[i] for i in members])
    for (variable, _, held), weight, step in zip(found, weights, steps, strict=True):
        step = _shaped(step, variable.shape)
        if held.master is None and not _decays(held, shared):
            backends.subtract(variable, step)
        else:
            _move(optimizer, variable, weight, _with_decay(step, weight, held, shared), held, optimizer.assign)


def kernel(optimizer, found, shared) -> None:
    """TensorFlow's kernel, in one pass over each weight and its slots."""
    weights = [backends.native(variable) for variable, _, _ in found]
    gradients = [backends.read(gradient, held.dtype) for _, gradient, held in found]
    slots = zip(*([backends.native(slot) for slot in held.slots] for _, _, held in found), strict=True)
    run = kernels.find(optimizer.traits.kernel, shared.at, shared.arguments)
    run(weights, gradients, *slots, at=shared.at, **shared.arguments)


def island(optimizer, found, shared) -> None:
    """The plain way, compiled by XLA within a TensorFlow graph that is not."""
    if backends.is_eager() or not kernels.compiles():
        plain(optimizer, found, shared)
    else:  # dense gradients, since it is compiled anew for each number of rows
        found = [(variable, backends.read(gradient, held.dtype), held) for variable, gradient, held in found]
        kernels.island(lambda: plain(optimizer, found, afresh(shared)))


def average(optimizer, shared, variable, _) -> None:
    """Move one variable's average towards the weight, and where it is time the weight to the average."""
    held = optimizer.held(variable)
    if held.average is None:
        return
    shared, weight = shared[held.dtype], _weight(variable, held, backends.read)
    moved = lerp(backends.read(held.average, held.dtype), weight, shared.share)
    optimizer.assign(held.average, moved)
    if shared.overwrite is not None:
        weight = ops.where(shared.overwrite, moved, weight)
        if held.master is not None:
            optimizer.assign(held.master, weight)
        optimizer.assign(variable, weight)


def _update(optimizer, variable, gradient, held, shared, read, assign) -> None:
    weight = _weight(variable, held, read)
    gradient = _with_l2(backends.read(gradient, held.dtype), weight, held, shared)
    slots = [read(slot, held.dtype) for slot in held.slots]
    step, *values = optimizer.used_rule(gradient, weight, *slots, at=shared.at, **shared.arguments)
    values = backends.apart(values, [weight, *slots])
    _move(optimizer, variable, weight, _with_decay(step, weight, held, shared), held, assign)
    for slot, value in zip(held.slots, values, strict=True):
        assign(slot, value)


def _read_rows(indices, variable, dtype):
    return backends.read_rows(indices, variable.value if isinstance(variable, slabs.Piece) else variable, dtype)


def _assign_rows(indices, variable, values) -> None:
    if isinstance(variable, slabs.Piece):
        variable.assign(backends.with_rows(indices, variable.value, values))
    else:
        backends.assign_rows(indices, variable, values)


def _with_l2(gradient, weight, held, shared):
    return gradient if shared.l2 is None or not held.decayed else gradient + shared.l2 * weight


def _with_decay(step, weight, held, shared):
    # Not as 1 - learning rate * weight decay, which would round the decay away.
    return step + shared.decay * weight if _decays(held, shared) else step


def _decays(held, shared) -> bool:
    return held.decayed and shared.decay is not None


def _move(optimizer, variable, weight, step, held, assign) -> None:
    weight = weight - step
    if held.master is not None:
        assign(held.master, weight)
    assign(variable, weight)


def _constrain(optimizer, variable) -> None:
    constraint = factors.constraint_of(optimizer, variable)
    if constraint is not None:
        held = optimizer.held(variable)
        weight = constraint(_weight(variable, held, backends.read))
        if held.master is not None:
            optimizer.assign(held.master, weight)
        optimizer.assign(variable, weight)


def _weight(variable, held: Held, read):
    """The weight in the dtype of the arithmetic."""
    if held.master is None:
        return read(variable, held.dtype)
    return behind(read(variable, _keras.dtype_of(variable)), read(held.master, held.dtype))


def _joined(tensors):
    return ops.concatenate([_shaped(tensor, (math.prod(tensor.shape),)) for tensor in tensors])


def _shaped(tensor, shape):
    return tensor if tuple(tensor.shape) == tuple(shape) else ops.reshape(tensor, shape)
