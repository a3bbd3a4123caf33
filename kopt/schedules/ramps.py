"""Schedules that take a while; what they have reached then, they keep. `t` is the time."""

import math

from kopt import _keras, checks
from kopt.schedules.base import Schedule
from kopt.schedules.decays import start
from kopt.schedules.time import Length, arithmetic, real


class Ramp(Schedule):
    """A schedule with an end."""

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
        both = self.up + self.down
        if both and (both + self.length) and (both.epochs or both.steps) > (self.epochs or self.steps):
            allowed = f"no less than the ways up and down together, {both}"
            checks.refuse("steps" if self.steps else "epochs", allowed, self.steps or self.epochs)

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
