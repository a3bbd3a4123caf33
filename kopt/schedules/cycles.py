"""Schedules that come back: restarts, triangles, one cycle."""

import math

from kopt import _keras, checks
from kopt.schedules.base import Schedule
from kopt.schedules.decays import start
from kopt.schedules.ramps import Ramp, half_wave
from kopt.schedules.time import Length, arithmetic, at_least, real


@_keras.register
class CosineRestarts(Schedule):
    """Half waves down, one after the other (SGDR).

    Args:
        cycle_epochs: How long the first one takes.
        cycle_steps: The same in steps.
        growth: How many times longer each is than the one before, an integer.
        peak_decay: How many times as high each begins as the one before.
        final: The factor at the end of each.
        initial: The value at the beginning; None makes a factor.

    Example:
        >>> import kopt
        >>> restarts = kopt.schedules.CosineRestarts(cycle_steps=2, growth=2, peak_decay=0.5, initial=1.0)
        >>> restarts.preview(7).round(3).tolist()
        [1.0, 0.5, 0.5, 0.427, 0.25, 0.073, 0.25]
    """

    def __init__(
        self,
        cycle_epochs: float | None = None,
        cycle_steps: int | None = None,
        *,
        growth: int = 1,
        peak_decay: float = 1.0,
        final: float = 0.0,
        initial: float | None = None,
    ):
        self.cycle = Length.of(cycle_epochs, cycle_steps, "cycle_", needed=True)
        self.cycle_epochs, self.cycle_steps = self.cycle.epochs, self.cycle.steps
        self.growth = checks.count(1)("growth", growth)
        self.peak_decay = checks.share("peak_decay", peak_decay)
        self.final = checks.closed_fraction("final", final)
        self.initial = start("initial", initial)

    def formula(self, time):
        cycle, x = time.cycles(self.cycle)  # in cycles of the first one's length
        if self.growth > 1:
            number, begin, length, after = 0, 0, 1, 1
            for i in range(1, math.ceil(31 / math.log2(self.growth)) + 1):  # the i-th begins at cycle `after`
                if after >= 2**31:
                    break
                is_in = cycle >= after
                xp = arithmetic(is_in)
                number = xp.where(is_in, i, number)
                begin = xp.where(is_in, after, begin)
                length = xp.where(is_in, float(self.growth**i), length)
                after += self.growth**i
            x = (real(cycle - begin) + x) / length
            cycle = number
        peak = arithmetic(cycle).power(self.peak_decay, real(cycle))
        return self.final + (1 - self.final) * peak * half_wave(x)


@_keras.register
class CyclicalRate(Schedule):
    """Up and down again, in triangles: `low + (max - low) (1 - |2x - 1|)`, where `x` is the share of the cycle.

    What is low is the optimizer's own rate in a callback, and `initial` otherwise.

    Args:
        max_learning_rate: The highest value.
        cycle_epochs: How long a cycle takes, up and down.
        cycle_steps: The same in steps.
        mode: "triangular": all cycles alike, "triangular2": each half as high as the one before, "exp_range": lower at
            each step by `gamma`.
        gamma: What the height is multiplied by at each step, for "exp_range".
        initial: The lowest value; None leaves that to whoever uses it.

    Example:
        >>> import kopt
        >>> kopt.schedules.CyclicalRate(1.0, cycle_steps=4, mode="triangular2", initial=0.0).preview(8).tolist()
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.25, 0.5, 0.25]
    """

    def __init__(
        self,
        max_learning_rate: float,
        cycle_epochs: float | None = None,
        cycle_steps: int | None = None,
        *,
        mode: str = "triangular",
        gamma: float | None = None,
        initial: float | None = None,
    ):
        self.max_learning_rate = checks.positive("max_learning_rate", max_learning_rate)
        self.cycle = Length.of(cycle_epochs, cycle_steps, "cycle_", needed=True)
        self.cycle_epochs, self.cycle_steps = self.cycle.epochs, self.cycle.steps
        self.mode = checks.one_of("triangular", "triangular2", "exp_range")("mode", mode)
        self.gamma = checks.optional(checks.share)("gamma", gamma)
        if (self.gamma is None) == (mode == "exp_range"):
            checks.refuse("gamma", f"{'a number' if gamma is None else 'None'} with mode={mode!r}", gamma)
        self.initial = start("initial", initial)
        if initial is not None and self.initial > self.max_learning_rate:
            checks.refuse("initial", f"at most `max_learning_rate`, which is {self.max_learning_rate:g}", initial)

    is_factor = property(lambda self: False)
    stands_alone = property(lambda self: self.initial is not None)

    def check_base(self, base):
        if base > self.max_learning_rate:
            allowed = f"at least the lowest value, which is {base:g} here"
            checks.refuse("max_learning_rate", allowed, self.max_learning_rate)

    def value(self, time, base):
        low = base if self.initial is None else self.initial
        cycle, x = time.cycles(self.cycle)
        height = 1 - arithmetic(x).abs(2 * x - 1)
        if self.mode == "triangular2":
            height = height * arithmetic(cycle).power(0.5, real(cycle))
        elif self.mode == "exp_range":
            height = height * arithmetic(time.steps).exp(math.log(self.gamma) * real(time.steps))
        return low + (self.max_learning_rate - low) * height


@_keras.register
class OneCycle(Ramp):
    """Up from `start` to 1, then down to `final`, as factors of the highest value.

    Args:
        max_learning_rate: The highest value; None leaves that to whoever uses it.
        start: The factor at the beginning.
        final: The factor at the end, and from then on.
        peak_at: Where the highest value is, as a share of the length.
        shape: Of both ways: "cosine" or "linear".
        epochs: How long it takes; the whole `fit`, if nothing is said.
        steps: The same in steps.

    Example:
        >>> import kopt
        >>> kopt.schedules.OneCycle(1.0, peak_at=0.5, shape="linear", steps=4).preview(6).round(2).tolist()
        [0.04, 0.52, 1.0, 0.5, 0.0, 0.0]
    """

    def __init__(
        self,
        max_learning_rate: float | None = None,
        *,
        start: float = 0.04,
        final: float = 4e-6,
        peak_at: float = 0.3,
        shape: str = "cosine",
        epochs: float | None = None,
        steps: int | None = None,
    ):
        self.start, self.final = checks.nonnegative("start", start), checks.nonnegative("final", final)
        self.peak_at = checks.inner("peak_at", peak_at)
        self.shape = checks.one_of("cosine", "linear")("shape", shape)
        self._lasts(epochs, steps, None)
        self.max_learning_rate = checks.optional(checks.positive)("max_learning_rate", max_learning_rate)
        self.initial = self.max_learning_rate

    def formula(self, time):
        x = time.share(self.length)
        xp = arithmetic(x)
        up, down = xp.minimum(x / self.peak_at, 1), at_least(x - self.peak_at) / (1 - self.peak_at)
        if self.shape == "cosine":
            up, down = 1 - half_wave(up), 1 - half_wave(down)
        return xp.where(x < self.peak_at, self.start + (1 - self.start) * up, 1 + (self.final - 1) * down)
