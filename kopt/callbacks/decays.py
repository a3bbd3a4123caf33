"""The learning rate goes one way: a callback for each schedule of that kind, with its arguments."""

from collections.abc import Sequence

from kopt import schedules
from kopt.callbacks.schedule import Schedule


class StepDecay(Schedule):
    """Drop the learning rate every few epochs or steps: `factor ** (t // every)`.

    Args:
        factor: What the rate is multiplied by each time.
        every_epochs: After how many epochs; 10 if nothing is said.
        every_steps: After how many steps, instead.
        name: What the callback is called in a file and in messages.

    Example:
        >>> import keras, kopt, numpy as np
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", loss="mse")
        >>> decay = kopt.callbacks.StepDecay(0.5, every_epochs=1)
        >>> history = model.fit(np.ones((4, 1)), np.ones(4), epochs=3, verbose=0, callbacks=[decay])
        >>> [round(rate, 4) for rate in history.history["learning_rate"]]
        [0.01, 0.005, 0.0025]
    """

    def __init__(
        self,
        factor: float = 0.5,
        every_epochs: int | None = None,
        every_steps: int | None = None,
        *,
        name: str | None = None,
    ):
        super().__init__("learning_rate", schedules.StepDecay(factor, every_epochs, every_steps), name=name)


class ExponentialDecay(Schedule):
    """Let the learning rate decay as `e ** (-rate t)`, or `base ** t`.

    Args:
        rate: How fast it decays; 0.05 if nothing is said.
        per: "epoch": the rate changes when a unit of time begins, "step": at every step.
        base: What it is multiplied by in a unit of time, instead of `rate`.
        unit_steps: Time in units of so many steps, instead of epochs.
        name: What the callback is called in a file and in messages.

    Example:
        >>> import kopt
        >>> kopt.callbacks.ExponentialDecay(base=0.95).schedule.preview(3, steps_per_epoch=1).round(4).tolist()
        [1.0, 0.95, 0.9025]
    """

    def __init__(
        self,
        rate: float | None = None,
        per: str = "epoch",
        *,
        base: float | None = None,
        unit_steps: int | None = None,
        name: str | None = None,
    ):
        schedule = schedules.ExponentialDecay(rate, per, base=base, unit_steps=unit_steps)
        super().__init__("learning_rate", schedule, name=name)


class InverseTimeDecay(Schedule):
    """Let the learning rate decay as `1 / (1 + rate t)`.

    Args:
        rate: How fast it decays.
        per: "epoch": the rate changes when a unit of time begins, "step": at every step.
        unit_steps: Time in units of so many steps, instead of epochs.
        name: What the callback is called in a file and in messages.

    Example:
        >>> import kopt
        >>> kopt.callbacks.InverseTimeDecay(1.0).schedule.preview(4, steps_per_epoch=1, base=0.2).round(3).tolist()
        [0.2, 0.1, 0.067, 0.05]
    """

    def __init__(
        self, rate: float = 1.0, per: str = "epoch", *, unit_steps: int | None = None, name: str | None = None
    ):
        super().__init__("learning_rate", schedules.InverseTimeDecay(rate, per, unit_steps=unit_steps), name=name)


class InverseSqrtDecay(Schedule):
    """Let the learning rate decay as `scale / sqrt(1 + t)`.

    Args:
        scale: The factor at the beginning.
        per: "epoch": the rate changes when a unit of time begins, "step": at every step.
        unit_steps: Time in units of so many steps, instead of epochs.
        name: What the callback is called in a file and in messages.

    Example:
        >>> import kopt
        >>> kopt.callbacks.InverseSqrtDecay().schedule.preview(4, steps_per_epoch=1).round(3).tolist()
        [1.0, 0.707, 0.577, 0.5]
    """

    def __init__(
        self, scale: float = 1.0, per: str = "epoch", *, unit_steps: int | None = None, name: str | None = None
    ):
        super().__init__("learning_rate", schedules.InverseSqrtDecay(scale, per, unit_steps=unit_steps), name=name)


class Staircase(Schedule):
    """Let the learning rate go down stairs: from each boundary on, its factor of the rate at the beginning.

    Args:
        boundaries: Epochs or steps in ascending order.
        factors: For each boundary what the rate is multiplied by from there on (not by all before it, too).
        per: What the boundaries count: "epoch" or "step".
        name: What the callback is called in a file and in messages.

    Example:
        >>> import kopt
        >>> kopt.callbacks.Staircase([2, 4], [0.5, 0.1], per="step").schedule.preview(6).tolist()
        [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]
    """

    def __init__(
        self, boundaries: Sequence[int], factors: Sequence[float], per: str = "epoch", *, name: str | None = None
    ):
        super().__init__("learning_rate", schedules.Staircase(boundaries, factors, per), name=name)


class PolynomialDecay(Schedule):
    """Let the learning rate decay as `final + (1 - final) (1 - t / length) ** power`.

    Args:
        power: How bent it is; 1 is a straight line.
        final: The factor at the end, and from then on.
        epochs: How long it takes; the whole `fit`, if nothing is said.
        steps: The same in steps.
        name: What the callback is called in a file and in messages.

    Example:
        >>> import kopt
        >>> kopt.callbacks.PolynomialDecay(2.0).schedule.preview(4).tolist()
        [1.0, 0.5625, 0.25, 0.0625]
    """

    def __init__(
        self,
        power: float = 2.0,
        final: float = 0.0,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        name: str | None = None,
    ):
        schedule = schedules.PolynomialDecay(power, final, epochs=epochs, steps=steps)
        super().__init__("learning_rate", schedule, name=name)


class CosineDecay(Schedule):
    """Let the learning rate fall along half a wave, from its own value to `final` times that.

    Args:
        final: The factor at the end, and from then on.
        epochs: How long it takes; the whole `fit`, if nothing is said.
        steps: The same in steps.
        name: What the callback is called in a file and in messages.

    Example:
        >>> import keras, kopt, numpy as np
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(kopt.Adam(0.1), loss="mse")
        >>> callbacks = [kopt.callbacks.WarmUp(epochs=1), kopt.callbacks.CosineDecay()]
        >>> history = model.fit(np.ones((4, 1)), np.ones(4), batch_size=1, epochs=3, verbose=0, callbacks=callbacks)
        >>> [round(rate, 3) for rate in history.history["learning_rate"]]
        [0.064, 0.037, 0.002]
    """

    def __init__(
        self, final: float = 0.0, *, epochs: float | None = None, steps: int | None = None, name: str | None = None
    ):
        super().__init__("learning_rate", schedules.CosineDecay(final, epochs=epochs, steps=steps), name=name)


class WarmUp(Schedule):
    """Let the learning rate rise to its own value in a straight line; what else drives it is warmed up, too.

    Args:
        epochs: How long it takes.
        steps: The same in steps.
        start: The factor at the first step.
        name: What the callback is called in a file and in messages.

    Example:
        >>> import kopt
        >>> kopt.callbacks.WarmUp(epochs=2).schedule.preview(5, steps_per_epoch=2).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    def __init__(
        self,
        epochs: float | None = None,
        steps: int | None = None,
        *,
        start: float = 0.0,
        name: str | None = None,
    ):
        super().__init__("learning_rate", schedules.WarmUp(epochs, steps, start=start), name=name)
