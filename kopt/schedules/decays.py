"""Schedules that go one way: down, up, or nowhere. `t` is the time, in the unit that the arguments name."""

import math

from kopt import _keras, checks
from kopt.schedules.base import Schedule
from kopt.schedules.time import Length, arithmetic, real

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


class Ramp(Schedule):
    """A schedule that takes a while; what it has reached then, it keeps."""

    def _lasts(self, epochs, steps, initial, needed=False):
        self.length = Length.of(epochs, steps, needed=needed)
        self.epochs, self.steps = self.length.epochs, self.length.steps
        self.initial = start("initial", initial)


@_keras.register
class Linear(Ramp):
    """A straight line: `start + (end - start) t / length`.

    Args:
        start: The factor at the beginning.
        end: The factor at the end, and from then on.
        epochs: How long it takes; the whole `fit`, if nothing is said.
        steps: The same in steps.
        initial: What these are factors of; None leaves that to whoever uses it.

    Example:
        >>> import kopt
        >>> kopt.schedules.Linear(0.5, 1.0, steps=2, initial=1.0).preview(4).tolist()
        [0.5, 0.75, 1.0, 1.0]
    """

    def __init__(
        self,
        start: float = 1.0,
        end: float = 0.0,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        initial: float | None = None,
    ):
        self.start, self.end = checks.nonnegative("start", start), checks.nonnegative("end", end)
        self._lasts(epochs, steps, initial)

    def formula(self, time):
        return self.start + (self.end - self.start) * time.share(self.length)


@_keras.register
class WarmUp(Ramp):
    """From `start` up to 1 in a straight line; a factor for the beginning of anything.

    Args:
        epochs: How long it takes.
        steps: The same in steps.
        start: The factor at the first step.
        initial: What it is a factor of; None leaves that to whoever uses it.

    Example:
        >>> import kopt
        >>> (kopt.schedules.WarmUp(steps=2) * kopt.schedules.Constant(initial=0.1)).preview(4).tolist()
        [0.0, 0.05, 0.1, 0.1]
    """

    def __init__(
        self,
        epochs: float | None = None,
        steps: int | None = None,
        *,
        start: float = 0.0,
        initial: float | None = None,
    ):
        self.start = checks.closed_fraction("start", start)
        self._lasts(epochs, steps, initial, needed=True)

    def formula(self, time):
        return self.start + (1 - self.start) * time.share(self.length)

    def validate(self, time):
        time.must_hold(self, self.length)


@_keras.register
class PolynomialDecay(Ramp):
    """`final + (1 - final) (1 - t / length) ** power`.

    Args:
        power: How bent it is; 1 is a straight line.
        final: The factor at the end, and from then on.
        epochs: How long it takes; the whole `fit`, if nothing is said.
        steps: The same in steps.
        initial: The value at the beginning; None makes a factor.

    Example:
        >>> import kopt
        >>> kopt.schedules.PolynomialDecay(2.0, steps=2, initial=1.0).preview(4).tolist()
        [1.0, 0.25, 0.0, 0.0]
    """

    def __init__(
        self,
        power: float = 2.0,
        final: float = 0.0,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        initial: float | None = None,
    ):
        self.power, self.final = checks.positive("power", power), checks.closed_fraction("final", final)
        self._lasts(epochs, steps, initial)

    def formula(self, time):
        left = 1 - time.share(self.length)
        return self.final + (1 - self.final) * arithmetic(left).power(left, self.power)


def half_wave(x):
    """From 1 at 0 to 0 at 1, level at both ends."""
    return (1 + arithmetic(x).cos(math.pi * x)) / 2


@_keras.register
class CosineDecay(Ramp):
    """Half a wave down: `final + (1 - final) (1 + cos(pi t / length)) / 2`.

    Args:
        final: The factor at the end, and from then on.
        epochs: How long it takes; the whole `fit`, if nothing is said.
        steps: The same in steps.
        initial: The value at the beginning; None makes a factor.

    Example:
        >>> import kopt
        >>> kopt.schedules.CosineDecay(steps=4, initial=1.0).preview(6).round(3).tolist()
        [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """

    def __init__(
        self,
        final: float = 0.0,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        initial: float | None = None,
    ):
        self.final = checks.closed_fraction("final", final)
        self._lasts(epochs, steps, initial)

    def formula(self, time):
        return self.final + (1 - self.final) * half_wave(time.share(self.length))


@_keras.register
class WarmUpStableDecay(Ramp):
    """Up in a straight line, level for as long as there is time, and down at the end.

    Args:
        warmup_epochs: How long the way up takes.
        warmup_steps: The same in steps.
        decay_epochs: How long the way down takes.
        decay_steps: The same in steps.
        shape: Of the way down: "linear", "cosine", or "sqrt", which is `1 - sqrt(x)`.
        final: The factor at the end, and from then on.
        epochs: How long all takes; the whole `fit`, if nothing is said.
        steps: The same in steps.
        initial: The value in the middle; None makes a factor.

    Example:
        >>> import kopt
        >>> wsd = kopt.schedules.WarmUpStableDecay(warmup_steps=2, decay_steps=2, steps=6, initial=1.0)
        >>> wsd.preview(7).tolist()
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        *,
        warmup_epochs: float | None = None,
        warmup_steps: int | None = None,
        decay_epochs: float | None = None,
        decay_steps: int | None = None,
        shape: str = "linear",
        final: float = 0.0,
        epochs: float | None = None,
        steps: int | None = None,
        initial: float | None = None,
    ):
        self.up = Length.of(warmup_epochs, warmup_steps, "warmup_", needed=True)
        self.down = Length.of(decay_epochs, decay_steps, "decay_", needed=True)
        self.warmup_epochs, self.warmup_steps = self.up.epochs, self.up.steps
        self.decay_epochs, self.decay_steps = self.down.epochs, self.down.steps
        self.shape = checks.one_of("linear", "cosine", "sqrt")("shape", shape)
        self.final = checks.closed_fraction("final", final)
        self._lasts(epochs, steps, initial)
        for part in (self.up, self.down):
            both = part + self.length
            if both is not None and (part.epochs or part.steps) > (self.epochs or self.steps):
                checks.refuse("steps" if self.steps else "epochs", f"no less than {part}", self.steps or self.epochs)

    def formula(self, time):
        done = time.within(self.length)
        up = done.share(self.up)
        left = done.total - done.done
        length = done.batches_in(self.down)
        xp = arithmetic(left, length)
        x = 1 - real(xp.clip(left, 0, length)) / real(length)
        down = {"linear": lambda: 1 - x, "cosine": lambda: half_wave(x), "sqrt": lambda: 1 - xp.sqrt(x)}[self.shape]()
        return arithmetic(up, down).minimum(up, self.final + (1 - self.final) * down)

    def validate(self, time):
        time.within(self.length).must_hold(self, self.up, self.down)
