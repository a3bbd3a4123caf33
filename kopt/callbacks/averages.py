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

    def current(self) -> list:
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

    def state(self) -> dict:
        return {"count": int(_keras.to_numpy(self.count)), "means": weights.arrays(self.slots)}

    def set_state(self, state) -> None:
        self.count.assign(state["count"])
        weights.assign(self.slots, state["means"])

    def reset(self) -> None:
        """Begin anew. From zeros, the first weights that come in are there to the bit."""
        self.count.assign(0)
        weights.assign(self.slots, [np.zeros(tuple(slot.shape), "float32") for slot in self.slots])


class Averaging:
    """What is averaged of one optimizer, in its step.

    Args:
        part: The `InStep` callback, in its `install`.
        optimizer: The optimizer.
        share: As for `Average`.
        every: Average each so many updates.
        is_late: Whether it begins only when it is told.
        in_segments: Whether there is a second mean, since the last segment was closed.
    """

    def __init__(self, part, optimizer, share, every=1, is_late=False, in_segments=False):
        self.every = every
        self.average = Average(part, optimizer, "average", share)
        self.segment = Average(part, optimizer, "segment", uniform) if in_segments else None
        self.going = part.add_variable(optimizer, dtype="int32", name="averaging") if is_late else None
        self.seen = part.add_variable(optimizer, dtype="int32", name="seen") if every > 1 else None
        self.variables = self.average.variables

    def tell(self, is_going) -> None:
        """Tell, when an epoch begins, whether averaging goes on in it."""
        if self.going is not None:
            self.going.assign(int(is_going))

    def update(self, happened) -> None:
        """After a step: tensor code."""
        due = happened
        if self.going is not None:
            due = backends.both(due, backends.number(self.going, "int32") > 0)
        if self.seen is not None:
            backends.when(due, lambda: backends.count_up(self.seen), [self.seen])
            due = backends.both(due, backends.number(self.seen, "int32") % self.every == 0)
        means = [mean for mean in (self.average, self.segment) if mean]
        now = self.average.current()  # here, for a loop would carry what is read in it
        written = [variable for mean in means for variable in (mean.count, *mean.slots)]
        backends.when(due, lambda: [mean.take_in(now) for mean in means], written)

    def count(self) -> int:
        return int(_keras.to_numpy(self.average.count))

    def means(self) -> list:
        """The averages; where nothing is in them yet, the weights as they are."""
        return [backends.copied(one) for one in (self.average.slots if self.count() else self.variables)]

    def state(self) -> dict:
        found = {"average": self.average.state(), "segment": self.segment and self.segment.state()}
        return found | {"seen": None if self.seen is None else int(_keras.to_numpy(self.seen))}

    def set_state(self, state) -> None:
        self.average.set_state(state["average"])
        if self.segment:
            self.segment.set_state(state["segment"])
        if self.seen is not None:
            self.seen.assign(state["seen"])

    def stretch(self) -> dict:
        """The mean of the open segment, and how many updates it stands for."""
        return _stretch(self.segment.state(), self.every)


class Averaged:
    """The same, when the training is over: what it was, without the optimizer's variables."""

    def __init__(self, averaging):
        self.variables, self.every, self.kept = averaging.variables, averaging.every, averaging.state()
        self.found = self.kept["average"]["means"] if self.count() else weights.arrays(self.variables)

    def count(self) -> int:
        return self.kept["average"]["count"]

    def means(self) -> list:
        return self.found

    def stretch(self) -> dict:
        return _stretch(self.kept["segment"], self.every)


def _stretch(state, every) -> dict:
    return {"updates": state["count"] * every, "means": state["means"]}


def is_averaged(variable) -> bool:
    """Whether it is a weight that a mean can be made of: not an integer, nor what is overwritten with its gradient."""
    return "float" in _keras.dtype_of(variable) and not getattr(variable, "overwrite_with_gradient", False)


def _in_place() -> bool:
    """Whether torch's tensors may be changed in place, all in one operation."""
    return backends.BACKEND == "torch" and not _keras.is_stateless()
