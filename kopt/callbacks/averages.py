"""Running means of the weights in an optimizer's step."""

import math

import numpy as np
from keras import ops

from kopt import _keras, backends, checks, weights
from kopt._keras import stepping
from kopt.numerics import lerp
from kopt.schedules.time import arithmetic


def uniform(n):
    """How much of the mean of n weights is the last one."""
    return 1.0 / n


def exponential(momentum, bias_correction=True, warmup=0.0):
    """The same for an exponentially weighted average, as a function of n.

    Corrected, it is a mean whose weights are `momentum**age` and add up to one from the first update on; not corrected,
    the first weights count as if they had been there for ever. In a warm-up the window, `1 / (1 - momentum)`, grows in
    proportion to n, so that the average forgets the beginning at any scale of time.
    """
    if momentum == 0:
        return lambda n: 1.0
    window = 1 / (1 - momentum)

    def warm(n):
        return arithmetic(n).maximum(1.0 / (1.0 + (n - 1) * ((window - 1) / warmup)), 1.0 / window)

    def corrected(n):
        return -(1 - momentum) / arithmetic(n).expm1(n * math.log(momentum))

    def uncorrected(n):
        return arithmetic(n).where(n > 1, 1 - momentum, 1.0)

    return warm if warmup else corrected if bias_correction else uncorrected


class Average:
    """A mean of the variables that an optimizer trains, in slots of at least float32, with the count of what is in it.

    Args:
        part: The `InStep` callback, in its `install`.
        optimizer: The optimizer.
        name: What the variables are called.
        share: A function of the count n: how much of the mean the n-th weights are.
    """

    def __init__(self, part, optimizer, name, share):
        self.share = share
        self.variables = [one for one in stepping.trained_by(optimizer) if is_averaged(one)]
        self.dtypes = [backends.wide(_keras.dtype_of(one)) for one in self.variables]
        self.slots = [
            part.add_slot(optimizer, one, name, dtype=dtype)
            for one, dtype in zip(self.variables, self.dtypes, strict=True)
        ]
        self.count = part.add_variable(optimizer, dtype="int32", name=f"{name}_count")

    def weights(self) -> list:
        """The weights as they are now, as tensors of the dtypes of the slots."""
        if _in_place():
            return backends.cast_all(map(_keras.memory, self.variables), self.dtypes)
        firsts = map(backends.first_copy, self.variables)
        return [backends.read(one, dtype) for one, dtype in zip(firsts, self.dtypes, strict=True)]

    def take_in(self, now) -> None:
        """Take in these weights: tensor code."""
        backends.count_up(self.count)
        number = backends.number(self.count, checks.held_dtype())
        share = self.share(number)
        if _in_place():
            backends.lerp_in_place(map(_keras.memory, self.slots), now, float(share))
            return
        for slot, weight, dtype in zip(self.slots, now, self.dtypes, strict=True):
            before = backends.read(backends.first_copy(slot), dtype)
            slot.assign(lerp(before, weight, ops.cast(share, dtype)))

    def written(self) -> list:
        return [self.count, *self.slots]

    def state(self) -> dict:
        return {"count": int(_keras.to_numpy(self.count)), "means": weights.arrays(self.slots)}

    def set_state(self, state) -> None:
        self.count.assign(state["count"])
        weights.assign(self.slots, state["means"])

    def reset(self) -> None:
        """Begin anew. From zeros, the first weights that come in are there to the bit."""
        self.count.assign(0)
        weights.assign(self.slots, [np.zeros(tuple(slot.shape), "float32") for slot in self.slots])


def is_averaged(variable) -> bool:
    """Whether it is a weight that a mean can be made of: not an integer, nor what is overwritten with its gradient."""
    return "float" in _keras.dtype_of(variable) and not getattr(variable, "overwrite_with_gradient", False)


def _in_place() -> bool:
    """Whether torch's tensors may be changed in place, all in one operation."""
    return backends.BACKEND == "torch" and not _keras.is_stateless()
