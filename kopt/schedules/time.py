"""The moment that a schedule is asked for, and lengths of time. Positions are integers: float32 is off past 2**24.

A formula of time is written once, for tensors of a compiled step and for Python's numbers and NumPy's arrays alike:
`arithmetic` gives it the functions for what it has, which have the same names in `keras.ops` and NumPy.
"""

import copy
from dataclasses import dataclass

import numpy as np
from keras import ops

from kopt import checks

CLOCK = (  # what a fit tells a schedule
    "origin",  # the optimizer's count of updates at time 0
    "epoch",  # which one it is
    "start",  # the count when it began
    "begun",  # the batches done when it began
    "batches",  # of an epoch; 0 if nobody knows
    "accumulation",  # batches of an update
    "total",  # batches until the end of the fit
    "is_fresh",  # whether no epoch has begun
)
END = 2**31 - 1  # of time: what an integer of a compiled step can be
UNTOLD = (
    "it counts epochs, or leaves its length open, and nobody has told it what they are: count in steps (`steps=`, "
    "`every_steps=`, ...), or give `fit` any callback of kopt, such as `kopt.callbacks.RateMonitor()`"
)
UNKNOWN = (
    "it needs to know how many batches an epoch has, and the data do not say: give `fit` `steps_per_epoch`, or count "
    "in steps (`steps=`, `every_steps=`, ...)"
)
UNSEEN = "counts epochs: give `steps_per_epoch`, too"


@dataclass(frozen=True)
class Length:
    """So many epochs, or so many steps; with neither, as long as the whole `fit`."""

    epochs: float | None = None
    steps: int | None = None

    @classmethod
    def of(cls, epochs=None, steps=None, prefix="", needed=False) -> "Length":
        """Judge the arguments `epochs` and `steps` of a schedule, which are called so after a prefix."""
        names = f"{prefix}epochs", f"{prefix}steps"
        epochs = checks.optional(checks.epochs)(names[0], epochs)
        epochs = epochs and whole(epochs)
        steps = checks.optional(checks.count(1))(names[1], steps)
        if epochs is not None and steps is not None:
            checks.refuse(names[1], f"None beside `{names[0]}` ({epochs!r})", steps)
        if needed and epochs is None and steps is None:
            checks.refuse(names[0], f"given, or `{names[1]}`", None)
        return cls(epochs, steps)

    @property
    def is_open(self) -> bool:
        return self.epochs is None and self.steps is None

    def __add__(self, other) -> "Length | None":
        """The sum of two lengths in one unit."""
        if None not in (self.epochs, other.epochs):
            return Length(epochs=whole(self.epochs + other.epochs))
        return Length(steps=self.steps + other.steps) if None not in (self.steps, other.steps) else None

    def __mul__(self, times: int) -> "Length":
        return Length(self.epochs and whole(self.epochs * times), self.steps and self.steps * times)

    def __str__(self):
        return f"epochs={self.epochs}" if self.steps is None else f"steps={self.steps}"


def whole(number: float) -> float:
    """A number as an integer where it is one."""
    return int(number) if number == int(number) else number


def arithmetic(*values):
    """`keras.ops` for tensors, NumPy for anything else."""
    return ops if any(map(ops.is_tensor, values)) else np


def real(x):
    """An integer as a float."""
    return ops.cast(x, checks.held_dtype()) if ops.is_tensor(x) else x * 1.0


def at_least(x, bound=0):
    return arithmetic(x, bound).maximum(x, _like(bound, x))


def at_most(x, bound):
    return arithmetic(x, bound).minimum(x, _like(bound, x))


def _like(bound, x):
    """A bound in the dtype of a tensor: Keras takes an integer beside one for a float where floats have 16 bits."""
    return ops.convert_to_tensor(bound, x.dtype) if ops.is_tensor(x) and not ops.is_tensor(bound) else bound


class Time:
    """A moment. Asked for what it was not told, it refuses.

    Args:
        steps: How many updates have been done.
        done: How many batches have been done, in whole epochs and in this one.
        epoch: How many epochs have been done.
        batches: How many batches an epoch has.
        total: How many batches there are from the first epoch to the end of the fit.
        accumulation: How many batches an update has.
        lacking: Why something may be missing, and what to do.
    """

    def __init__(self, steps, done=None, epoch=None, batches=None, total=None, accumulation=1, lacking=UNTOLD):
        self._steps, self._done, self._epoch, self._batches, self._total = steps, done, epoch, batches, total
        self.accumulation, self.lacking = accumulation, lacking

    @classmethod
    def told(cls, steps, clock) -> "Time":
        """What the optimizer's count of updates is, by the clock of a fit.

        Of one that does not know how many batches an epoch has, it is asked for nothing but steps and whole epochs.
        """
        origin, epoch, start, begun, batches, accumulation, total, is_fresh = clock
        gone, xp = (steps - start) * accumulation, arithmetic(steps)
        runs_on = xp.not_equal(is_fresh, 0)  # in a fit that nobody tells, after one that was told
        within = at_least(xp.where(runs_on, gone, at_most(gone, batches)))
        more = xp.where(xp.logical_and(runs_on, batches > 0), gone // at_least(batches, 1), 0 * gone)
        return cls(steps - origin, begun + within, epoch + more, batches, total, accumulation)

    @classmethod
    def of_steps(cls, steps, total, batches=None, whose="it") -> "Time":
        """What it is after so many steps, of so many in all, if an epoch has so many."""
        epoch = None if batches is None else steps // batches
        return cls(steps, steps, epoch, batches, total, lacking=f"{whose} {UNSEEN}")

    def _told(self, name):
        value = getattr(self, name)
        if value is None:
            raise ValueError(self.lacking)
        return value

    steps = property(lambda self: self._told("_steps"))
    done = property(lambda self: self._told("_done"))
    batches = property(lambda self: self._told("_batches"))
    total = property(lambda self: self._told("_total"))

    @property
    def epoch(self):
        if self._epoch is None and self._done is not None and self._batches is not None:
            return self._done // self._batches
        return self._told("_epoch")

    def measure(self, length):
        """Where this moment is in a time of some length, and how long that is: two integers of one unit."""
        if length.steps is not None:
            return self.steps, length.steps
        return self.done, self.batches_in(length)

    def batches_in(self, length):
        """How many batches it is."""
        if length.is_open:
            return self.total
        if length.steps is not None:
            return length.steps * self.accumulation
        if isinstance(length.epochs, int):
            batches = length.epochs * self.batches
        else:
            batches = arithmetic(self.batches).round(length.epochs * real(self.batches))
            batches = at_least(ops.cast(batches, "int32") if ops.is_tensor(batches) else int(batches), 1)
        if isinstance(batches, int) and batches > END:
            raise ValueError(f"{length} of {self.batches} batches are more than the {END} steps that can be counted")
        return batches

    def must_hold(self, schedule, *lengths) -> None:
        """Refuse a fit, of which this is the first moment, that is shorter than these lengths together."""
        if self._total is None:
            return
        needed = sum(self.batches_in(length) for length in lengths)
        if needed > self.total:
            raise ValueError(f"{schedule} takes {needed} batches, but there are only {self.total} for it.")

    def must_go_on(self, schedule) -> None:
        """Refuse a fit that is over before the last part of a schedule begins."""
        if self._total == 0:
            raise ValueError(f"{schedule} leaves no time for its last part: the fit is over before it.")

    def is_over(self, length):
        """Whether so much time has passed."""
        if isinstance(length.epochs, int):  # needs no count of batches
            return self.epoch >= length.epochs
        position, end = self.measure(length)
        return position >= end

    def share(self, length):
        """How much of it has passed, from 0 to 1."""
        position, end = self.measure(length)
        return real(at_most(position, end)) / real(at_least(end, 1))  # 0 where the fit ends before it begins

    def cycles(self, length):
        """How many such cycles have passed, an integer, and how much of this one, below 1."""
        position, end = self.measure(length)
        return position // end, real(position % end) / real(end)

    def units(self, per="step", unit_steps=None):
        """The time in units, of an epoch or of so many steps: whole ones if `per` is "epoch", and otherwise exactly."""
        if unit_steps is not None:
            whole, part, unit = self.steps // unit_steps, self.steps % unit_steps, unit_steps
        elif per == "epoch":
            return real(self.epoch)
        else:
            whole, part, unit = self.epoch, self.done - self.epoch * self.batches, self.batches
        return real(whole) if per == "epoch" else real(whole) + real(part) / real(unit)

    def since(self, length, times=1):
        """This moment, counted from the end of so many such times; 0 before that."""
        return self._moved(length, lambda number, by: at_least(number - by * times), ["_total"])

    def ahead(self, length):
        """The moment so much later, in a fit that is so much longer."""
        return self._moved(length, lambda number, by: at_most(number, END - by) + by, ["_total"])

    def until(self, length):
        """The same moment, but no later than the end of so long a time."""
        return self._moved(length, at_most)

    def _moved(self, length, change, also=()):
        """The moment with `change(number, length in the same unit)` in place of each number; None if not known."""
        steps = batches = None
        if length.steps is not None:
            steps, batches = length.steps, length.steps * self.accumulation
        elif self._batches is not None:
            batches = self.batches_in(length)
            steps = batches // self.accumulation
        epochs = length.epochs if isinstance(length.epochs, int) else None
        lengths = {"_steps": steps, "_done": batches, "_epoch": epochs} | dict.fromkeys(also, batches)
        moved = copy.copy(self)
        for name, by in lengths.items():
            number = getattr(self, name)
            setattr(moved, name, None if number is None or by is None else change(number, by))
        return moved

    def within(self, length):
        """The same moment of a fit of this length."""
        moved = copy.copy(self)
        known = length.steps is not None or self._batches is not None
        moved._total = self.batches_in(length) if known else None
        if length.steps is not None:  # then `done` must count the same
            moved._done = self.steps * self.accumulation
        return moved
