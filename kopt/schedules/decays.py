"""Schedules without an end. `t` is the time, in the unit that the arguments name."""

import math

from kopt import _keras, checks
from kopt.schedules.base import Schedule
from kopt.schedules.time import arithmetic, real

per_what = checks.one_of("epoch", "step")
start = checks.optional(checks.nonnegative)


@_keras.register
class Constant(Schedule):
    """The same at all times.

    Args:
        factor: The factor.
        initial: What it is a factor of; None leaves that to whoever uses it.

    Example:
        >>> import kopt
        >>> kopt.schedules.Constant(0.5, initial=0.2).preview(2).tolist()
        [0.1, 0.1]
    """

    def __init__(self, factor: float = 1.0, *, initial: float | None = None):
        self.factor = checks.nonnegative("factor", factor)
        self.initial = start("initial", initial)

    def formula(self, time):
        return self.factor


@_keras.register
class StepDecay(Schedule):
    """A drop every few epochs or steps: `factor ** (t // every)`.

    Args:
        factor: What the value is multiplied by each time.
        every_epochs: After how many epochs; 10 if nothing is said.
        every_steps: After how many steps, instead.
        initial: The value at the beginning; None makes a factor.

    Example:
        >>> import kopt
        >>> kopt.schedules.StepDecay(0.5, every_steps=2, initial=0.8).preview(6).tolist()
        [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    """

    def __init__(
        self,
        factor: float = 0.5,
        every_epochs: int | None = None,
        every_steps: int | None = None,
        *,
        initial: float | None = None,
    ):
        self.factor = checks.share("factor", factor)
        self.every_epochs = checks.optional(checks.count(1))("every_epochs", every_epochs)
        self.every_steps = checks.optional(checks.count(1))("every_steps", every_steps)
        if every_epochs is not None and every_steps is not None:
            checks.refuse("every_steps", f"None beside `every_epochs` ({every_epochs!r})", every_steps)
        if every_epochs is None and every_steps is None:
            self.every_epochs = 10
        self.initial = start("initial", initial)

    def formula(self, time):
        drops = time.steps // self.every_steps if self.every_steps else time.epoch // self.every_epochs
        return arithmetic(drops).power(self.factor, real(drops))


@_keras.register
class ExponentialDecay(Schedule):
    """`e ** (-rate t)`, or `base ** t`.

    Args:
        rate: How fast it decays; 0.05 if nothing is said.
        per: "epoch": the value changes when a unit of time begins, "step": at every step.
        base: What the value is multiplied by in a unit of time, instead of `rate`.
        unit_steps: Time in units of so many steps, instead of epochs.
        initial: The value at the beginning; None makes a factor.

    Example:
        >>> import kopt
        >>> kopt.schedules.ExponentialDecay(base=0.5, initial=1.0, unit_steps=2).preview(5).tolist()
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    def __init__(
        self,
        rate: float | None = None,
        per: str = "epoch",
        *,
        base: float | None = None,
        unit_steps: int | None = None,
        initial: float | None = None,
    ):
        self.rate = checks.optional(checks.nonnegative)("rate", rate)
        self.base = checks.optional(checks.share)("base", base)
        if rate is not None and base is not None:
            checks.refuse("base", f"None beside `rate` ({rate!r})", base)
        if rate is None and base is None:
            self.rate = 0.05
        self.per = per_what("per", per)
        self.unit_steps = checks.optional(checks.count(1))("unit_steps", unit_steps)
        self.initial = start("initial", initial)

    def formula(self, time):
        t = time.units(self.per, self.unit_steps)
        rate = self.rate if self.base is None else -math.log(self.base)
        return arithmetic(t).exp(-rate * t)


@_keras.register
class InverseTimeDecay(Schedule):
    """`1 / (1 + rate t)`.

    Args:
        rate: How fast it decays.
        per: "epoch": the value changes when a unit of time begins, "step": at every step.
        unit_steps: Time in units of so many steps, instead of epochs.
        initial: The value at the beginning; None makes a factor.

    Example:
        >>> import kopt
        >>> kopt.schedules.InverseTimeDecay(1.0, initial=0.2).preview(4, steps_per_epoch=1).round(3).tolist()
        [0.2, 0.1, 0.067, 0.05]
    """

    def __init__(
        self, rate: float = 1.0, per: str = "epoch", *, unit_steps: int | None = None, initial: float | None = None
    ):
        self.rate = checks.nonnegative("rate", rate)
        self.per = per_what("per", per)
        self.unit_steps = checks.optional(checks.count(1))("unit_steps", unit_steps)
        self.initial = start("initial", initial)

    def formula(self, time):
        return 1 / (1 + self.rate * time.units(self.per, self.unit_steps))


@_keras.register
class InverseSqrtDecay(Schedule):
    """`scale / sqrt(1 + t)`.

    Args:
        scale: The factor at the beginning.
        per: "epoch": the value changes when a unit of time begins, "step": at every step.
        unit_steps: Time in units of so many steps, instead of epochs.
        initial: What it is a factor of; None leaves that to whoever uses it.

    Example:
        >>> import kopt
        >>> kopt.schedules.InverseSqrtDecay(unit_steps=1, initial=1.0).preview(4).round(3).tolist()
        [1.0, 0.707, 0.577, 0.5]
    """

    def __init__(
        self, scale: float = 1.0, per: str = "epoch", *, unit_steps: int | None = None, initial: float | None = None
    ):
        self.scale = checks.positive("scale", scale)
        self.per = per_what("per", per)
        self.unit_steps = checks.optional(checks.count(1))("unit_steps", unit_steps)
        self.initial = start("initial", initial)

    def formula(self, time):
        t = time.units(self.per, self.unit_steps)
        return self.scale / arithmetic(t).sqrt(1 + t)


@_keras.register
class Staircase(Schedule):
    """1 until the first boundary, then from each boundary on its factor.

    Args:
        boundaries: Epochs or steps in ascending order.
        factors: For each boundary what the value is multiplied by from there on (not by all before it, too).
        per: What the boundaries count: "epoch" or "step".
        initial: The value before the first boundary; None makes a factor.

    Example:
        >>> import kopt
        >>> kopt.schedules.Staircase([2, 4], [0.5, 0.1], per="step", initial=1.0).preview(6).tolist()
        [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]
    """

    def __init__(self, boundaries, factors, per: str = "epoch", *, initial: float | None = None):
        ascending = "a list of integers of 1 or more, in ascending order"
        self.boundaries = checks.several(checks.count(1), ascending)("boundaries", boundaries)
        if self.boundaries != sorted(set(self.boundaries)):
            checks.refuse("boundaries", ascending, boundaries)
        self.factors = checks.several(checks.nonnegative, "a list of numbers of 0 or more")("factors", factors)
        if len(self.factors) != len(self.boundaries):
            checks.refuse("factors", f"a list of {len(self.boundaries)}, one for each boundary", factors)
        self.per = per_what("per", per)
        self.initial = start("initial", initial)

    def formula(self, time):
        t, value = time.epoch if self.per == "epoch" else time.steps, 1.0
        for boundary, factor in zip(self.boundaries, self.factors, strict=True):
            value = arithmetic(t).where(t >= boundary, factor, value)
        return value
