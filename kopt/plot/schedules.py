"""Pictures of rates over time."""

import keras
import numpy as np

from kopt import callbacks, checks, schedules
from kopt.plot.axes import axes


def schedule(*shown, steps: int | None = None, steps_per_epoch: int | None = None, base: float = 1.0, ax=None):
    """Draw schedules beside each other, or the rates that a callback has kept.

    Args:
        shown: Schedules of kopt or Keras, callbacks of kopt that follow one, and callbacks `RateMonitor`.
        steps: How many steps to draw; 1000 if nothing is said.
        steps_per_epoch: How many of them an epoch has, for schedules that count epochs.
        base: What factors multiply.
        ax: The axes of matplotlib to draw in; None makes a new figure.

    Returns:
        The axes. `ax.figure.savefig("rates.png")` writes the picture.

    Example:
        >>> import kopt
        >>> ax = kopt.plot.schedule(kopt.schedules.CosineDecay(), kopt.schedules.OneCycle(), steps=100)
        >>> [line.get_label() for line in ax.lines]
        ['CosineDecay()', 'OneCycle()']
    """
    if not shown:
        checks.refuse("shown", "one schedule or callback at least", shown)
    steps = checks.optional(checks.count(1))("steps", steps) or 1000
    curves = [curve for one in shown for curve in _curves(one, steps, steps_per_epoch, base)]
    ax = axes(ax)
    for label, values in curves:
        ax.plot(values, label=label, drawstyle="steps-post" if len(np.unique(values)) < 30 else "default")
    ax.set_xlabel("step")
    ax.set_ylabel("value" if len(curves) > 1 else curves[0][0])
    ax.grid(alpha=0.3)
    if len(curves) > 1:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)  # above, where no curve is
    return ax


def _curves(one, steps, steps_per_epoch, base):
    if isinstance(one, callbacks.RateMonitor):
        if not one.history:
            checks.refuse("shown", "a callback that has seen a `fit`", one)
        return list(one.history.items())
    if isinstance(one, callbacks.OneCycle) and one.other_way is not None:
        both = one.schedule, one.other_way
        return [curve for each in both for curve in _curves(each, steps, steps_per_epoch, base)]
    if isinstance(one, callbacks.Schedule):
        one = one.schedule
    if isinstance(one, schedules.Schedule):
        return [(repr(one), one.preview(steps, steps_per_epoch=steps_per_epoch, base=base))]
    if isinstance(one, keras.optimizers.schedules.LearningRateSchedule):
        return [(type(one).__name__, np.array([float(one(step)) for step in range(steps)]))]
    return checks.refuse("shown", "schedules, callbacks that follow one, and RateMonitor", one)
