"""The learning rate goes up and down, and momentum the other way."""

from kopt import checks, schedules
from kopt.callbacks.schedule import Schedule


class CosineRestarts(Schedule):
    """Let the learning rate fall along half a wave, and begin again (SGDR).

    Args:
        cycle_epochs: How long the first wave takes.
        cycle_steps: The same in steps.
        growth: How many times longer each is than the one before, an integer.
        peak_decay: How many times as high each begins as the one before.
        final: The factor at the end of each.
        name: What the callback is called in a file and in messages.

    Example:
        >>> import kopt
        >>> kopt.callbacks.CosineRestarts(cycle_steps=2).schedule.preview(5).round(3).tolist()
        [1.0, 0.5, 1.0, 0.5, 1.0]
    """

    def __init__(
        self,
        cycle_epochs: float | None = None,
        cycle_steps: int | None = None,
        *,
        growth: int = 1,
        peak_decay: float = 1.0,
        final: float = 0.0,
        name: str | None = None,
    ):
        schedule = schedules.CosineRestarts(
            cycle_epochs, cycle_steps, growth=growth, peak_decay=peak_decay, final=final
        )
        super().__init__("learning_rate", schedule, name=name)


class CyclicalRate(Schedule):
    """Let the learning rate rise from its own value to a higher one and fall again, in triangles.

    Args:
        max_learning_rate: The highest rate.
        cycle_epochs: How long a cycle takes, up and down.
        cycle_steps: The same in steps.
        mode: "triangular": all cycles alike, "triangular2": each half as high as the one before, "exp_range": lower at
            each step by `gamma`.
        gamma: What the height is multiplied by at each step, for "exp_range".
        name: What the callback is called in a file and in messages.

    Example:
        >>> import kopt
        >>> kopt.callbacks.CyclicalRate(1.0, cycle_steps=4).schedule.preview(5, base=0.2).round(3).tolist()
        [0.2, 0.6, 1.0, 0.6, 0.2]
    """

    def __init__(
        self,
        max_learning_rate: float,
        cycle_epochs: float | None = None,
        cycle_steps: int | None = None,
        *,
        mode: str = "triangular",
        gamma: float | None = None,
        name: str | None = None,
    ):
        schedule = schedules.CyclicalRate(max_learning_rate, cycle_epochs, cycle_steps, mode=mode, gamma=gamma)
        super().__init__("learning_rate", schedule, name=name)


class OneCycle(Schedule):
    """One cycle for the whole `fit`: the learning rate goes up, then down to almost nothing; momentum the other way.

    Momentum is `momentum`, of `kopt.SGD(momentum=0.9)` for instance, or `beta_1`. Keras's optimizers fix their
    `momentum` when the step is compiled: use kopt's, or `momentum=None`.

    Args:
        max_learning_rate: The highest rate. None: the optimizer's own.
        momentum: A pair: at the highest rate, and at the beginning and the end. None leaves it alone.
        start: The rate at the beginning, as a factor of the highest.
        final: The rate at the end, as a factor of the highest.
        peak_at: Where the highest rate is, as a share of the whole.
        shape: Of both ways: "cosine" or "linear".
        epochs: How long it takes; the whole `fit`, if nothing is said.
        steps: The same in steps.
        name: What the callback is called in a file and in messages.

    Example:
        >>> import keras, kopt, numpy as np
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(kopt.SGD(0.01, momentum=0.9), loss="mse")
        >>> cycle = kopt.callbacks.OneCycle(0.1, peak_at=0.5)
        >>> history = model.fit(np.ones((9, 1)), np.ones(9), batch_size=1, epochs=3, verbose=0, callbacks=[cycle])
        >>> [round(rate, 3) for rate in history.history["learning_rate"]]
        [0.066, 0.084, 0.001]
        >>> [round(momentum, 3) for momentum in history.history["momentum"]]
        [0.886, 0.866, 0.949]
    """

    def __init__(
        self,
        max_learning_rate: float | None = None,
        *,
        momentum: tuple[float, float] | None = (0.85, 0.95),
        start: float = 0.04,
        final: float = 4e-6,
        peak_at: float = 0.3,
        shape: str = "cosine",
        epochs: float | None = None,
        steps: int | None = None,
        name: str | None = None,
    ):
        common = {"peak_at": peak_at, "shape": shape, "epochs": epochs, "steps": steps}
        rate = schedules.OneCycle(max_learning_rate, start=start, final=final, **common)
        super().__init__("learning_rate", rate, name=name)
        self.momentum = self.other_way = None
        if momentum is not None:
            allowed = "a pair of numbers in (0, 1): at the highest rate, and no less at the ends"
            pair = checks.several(checks.inner, allowed)("momentum", momentum)
            if len(pair) != 2 or pair[0] > pair[1]:
                checks.refuse("momentum", allowed, momentum)
            self.momentum = tuple(pair)
            ends = pair[1] / pair[0]
            self.other_way = schedules.OneCycle(pair[0], start=ends, final=ends, **common)

    def driven(self, optimizer):
        if self.other_way is None:
            return {"learning_rate": self.schedule}
        has_beta = not hasattr(optimizer, "momentum") and hasattr(optimizer, "beta_1")
        return {"learning_rate": self.schedule, "beta_1" if has_beta else "momentum": self.other_way}


class MomentumAnneal(Schedule):
    """Let momentum go from one value to another in a straight line; for optimizers of kopt that have one.

    Args:
        start: The momentum at the beginning.
        end: The momentum at the end, and from then on.
        epochs: How long it takes; the whole `fit`, if nothing is said.
        steps: The same in steps.
        name: What the callback is called in a file and in messages.

    Example:
        >>> import keras, kopt, numpy as np
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(kopt.SGD(0.01, momentum=0.5), loss="mse")
        >>> anneal = kopt.callbacks.MomentumAnneal(0.5, 0.9, epochs=2)
        >>> history = model.fit(np.ones((4, 1)), np.ones(4), batch_size=2, epochs=3, verbose=0, callbacks=[anneal])
        >>> [round(momentum, 3) for momentum in history.history["momentum"]]
        [0.6, 0.8, 0.9]
    """

    def __init__(
        self,
        start: float = 0.5,
        end: float = 0.99,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        name: str | None = None,
    ):
        start, end = checks.fraction("start", start), checks.fraction("end", end)
        line = schedules.Linear(start, end, epochs=epochs, steps=steps, initial=1.0)
        super().__init__("momentum", line, name=name)
