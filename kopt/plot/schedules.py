"""Pictures of rates over time."""

import itertools
from typing import NamedTuple

import keras
import numpy as np

from kopt import callbacks, checks, schedules
from kopt.callbacks import stages
from kopt.callbacks.snapshots import split, waves
from kopt.plot.picture import Picture, finished, in_own_style, panels, plain, saves, styles, tidy
from kopt.schedules.time import Time

RATE = "learning_rate"
UNKNOWN = (
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ReduceLROnPlateau,
    callbacks.LearningRateFinder,
)
RESTARTING, MOST = ("learning rate", "value"), 40  # what has restarts, and of one curve the most that are marked
SHOWN = "schedules, callbacks that follow one, StagedUnfreeze, SnapshotEnsemble, RateMonitor, and lists of callbacks"


class Line(NamedTuple):
    """The values of one quantity, step by step."""

    quantity: str
    label: str
    values: np.ndarray


class Span(NamedTuple):
    """The fit that is drawn: its steps, those of an epoch, the optimizer's own learning rate, and the model."""

    steps: int
    steps_per_epoch: int | None
    base: float
    model: keras.Model | None

    @property
    def time(self):
        return Time.of_steps(np.arange(self.steps), self.steps, self.steps_per_epoch)


@in_own_style
def schedule(
    *shown,
    steps: int | None = None,
    steps_per_epoch: int | None = None,
    base: float = 1.0,
    model=None,
    ax=None,
    save=None,
    show: bool = False,
) -> Picture:
    """Draw schedules beside each other, what callbacks make of a fit, or the rates that a callback has kept.

    A list of callbacks is drawn as `fit` would have it: what multiplies is multiplied, and where `StagedUnfreeze` is
    among them, there is a line for each group of weights, its multiplier times the rate. Learning rate, momentum and
    whatever else has a panel each. Dotted lines mark the first 40 restarts of a rate, where it turns up after it fell.

    Args:
        shown: Schedules of kopt or Keras, callbacks of kopt that follow one, `StagedUnfreeze`, `SnapshotEnsemble` and
            `RateMonitor`, each drawn by itself; lists of callbacks, each drawn as one fit.
        steps: How many steps to draw; 1000 if nothing is said.
        steps_per_epoch: How many of them an epoch has, for schedules that count epochs.
        base: The optimizer's own learning rate, which factors multiply.
        model: The model whose weights `StagedUnfreeze` picks, needed where it does so by pattern.
        ax: The axes of matplotlib to draw in, one for each quantity; None makes a new figure.
        save: A path to write to, or several: .png, .svg, .pdf or .jpg.
        show: Whether to open a window.

    Returns:
        A `Picture`, whose data are the values by label, and `<label>/restarts` where there are any.

    Example:
        >>> import kopt
        >>> picture = kopt.plot.schedule(kopt.schedules.CosineDecay(), kopt.schedules.OneCycle(), steps=100)
        >>> list(picture.data)
        ['CosineDecay()', 'OneCycle()']
        >>> fit = [kopt.callbacks.WarmUp(steps=10), kopt.callbacks.OneCycle(0.1, steps=100)]
        >>> list(kopt.plot.schedule(fit, steps=100).data)
        ['learning rate', 'momentum']
    """
    files = saves(save, ax, show)
    if not shown:
        checks.refuse("shown", "one schedule or callback at least", shown)
    steps = checks.optional(checks.count(1))("steps", steps) or 1000
    steps_per_epoch = checks.optional(checks.count(1))("steps_per_epoch", steps_per_epoch)
    if model is not None and not isinstance(model, keras.Model):
        checks.refuse("model", "a keras.Model or None", model)
    span = Span(steps, steps_per_epoch, checks.finite("base", base), model)
    curves = _told_apart([curve for one in shown for curve in _curves(one, span)])
    quantities = list(dict.fromkeys(curve.quantity for curve in curves))
    axes = panels(ax, len(quantities), 1, (7, 1.6 + 2.2 * len(quantities)), show, sharex=True)
    data = {}
    for one, quantity in zip(axes, quantities, strict=True):
        drawn = [curve for curve in curves if curve.quantity == quantity]
        data |= _draw(one, quantity, drawn)
        one.set_xlabel("step" if one is axes[-1] else "")
    if steps_per_epoch and ax is None:
        ways = (lambda x: x / steps_per_epoch, lambda x: x * steps_per_epoch)
        below = axes[-1].secondary_xaxis("bottom", functions=ways)
        below.spines["bottom"].set_position(("outward", 36))
        below.set_xlabel("epoch")
    return finished(axes, data, files, show)


def _draw(ax, quantity, curves) -> dict:
    data = {}
    for curve, style in zip(curves, styles(len(curves)), strict=True):
        values = data[curve.label] = curve.values
        stepped = "steps-post" if len(np.unique(values)) < 30 else "default"
        ax.plot(values, label=curve.label, drawstyle=stepped, marker="o" * (len(values) == 1) or None, **style)
        turns = restarts(values) if quantity in RESTARTING else []
        if len(turns):
            data[f"{curve.label}/restarts"] = turns
        for turn in turns[:MOST]:
            ax.axvline(turn, color=style["color"], linestyle=":", linewidth=0.8, alpha=0.7, zorder=1)
    alone = len(curves) == 1
    tidy(ax, "", quantity, None if alone else "above")
    if alone and curves[0].label != quantity:
        ax.set_title(curves[0].label, loc="left", fontsize=10)
    return data


def restarts(values) -> np.ndarray:
    """The steps at which the values turn up after they have fallen: after a jump, or from a lowest point."""
    changes = np.sign(np.diff(values))
    moving = np.flatnonzero(changes)
    turns = [b for a, b in itertools.pairwise(moving) if changes[a] < 0 < changes[b]]
    jumps = [values[turn + 1] - values[turn] > 0.2 * np.ptp(values) for turn in turns]
    return np.array(turns, int) + np.array(jumps, int)


def _told_apart(curves) -> list[Line]:
    """The curves with labels of which there is one each."""
    seen: dict[str, int] = {}
    found = []
    for curve in curves:
        seen[curve.label] = seen.get(curve.label, 0) + 1
        found.append(curve._replace(label=f"{curve.label} ({seen[curve.label]})") if seen[curve.label] > 1 else curve)
    return found


def _curves(one, span) -> list[Line]:
    """The curves of what is drawn by itself."""
    if isinstance(one, (list, tuple)):
        return _of_fit(list(one), span)
    if isinstance(one, callbacks.RateMonitor):
        if not one.history:
            checks.refuse("shown", "a callback that has seen a `fit`", one)
        return [Line(_words(name), _words(name), values) for name, values in one.history.items()]
    if isinstance(one, callbacks.StagedUnfreeze):
        return [Line("multiplier", plain(track.name), _of_track(track, span)) for track in _tracks(one, span)]
    if driven := _driven(one, span):
        labels = [repr(each) if len(driven) == 1 else f"{one.name}: {_words(name)}" for name, each in driven.items()]
        values = [_preview(each, name, span) for name, each in driven.items()]
        return [Line(_words(name), *rest) for name, *rest in zip(driven, labels, values, strict=True)]
    if isinstance(one, schedules.Schedule):
        return [Line("value", repr(one), _preview(one, RATE, span))]
    if isinstance(one, keras.optimizers.schedules.LearningRateSchedule):
        return [Line("value", type(one).__name__, np.array([float(one(step)) for step in range(span.steps)]))]
    return checks.refuse("shown", SHOWN, one)


def _words(name) -> str:
    return name.replace("_", " ") if name == RATE else name


def _driven(one, span) -> dict:
    """The schedules that a callback follows, by what they drive; none of anything else."""
    if isinstance(one, callbacks.SnapshotEnsemble):
        if not span.steps_per_epoch:
            checks.refuse("steps_per_epoch", f"given for {one.name}, whose cycles end with epochs", None)
        epochs = span.steps // span.steps_per_epoch
        if epochs < one.cycles:
            checks.refuse("steps", f"{one.cycles} epochs of {span.steps_per_epoch} at least", span.steps)
        lengths = split(epochs, one.cycles, one.cycle_mult)
        return {RATE: waves(lengths, one.max_learning_rate or span.base, one.min_learning_rate)}
    if isinstance(one, callbacks.OneCycle) and one.other_way is not None:
        return {RATE: one.schedule, "momentum": one.other_way}
    return {one.hyperparameter: one.schedule} if isinstance(one, callbacks.Schedule) else {}


def _preview(one, name, span) -> np.ndarray:
    base = span.base if name == RATE else 1.0
    return one.preview(span.steps, steps_per_epoch=span.steps_per_epoch, base=base)


def _of_fit(listed, span) -> list[Line]:
    """What all of these callbacks make of one fit: the product for each number, the rate for each group of weights."""
    if not listed:
        checks.refuse("shown", SHOWN, listed)
    together: dict[str, list] = {}
    tracks = []
    for one in listed:
        if isinstance(one, callbacks.StagedUnfreeze):
            tracks += _tracks(one, span)
            continue
        if isinstance(one, UNKNOWN):
            checks.refuse("shown", "without what nobody knows before the fit what it does to the rate", one)
        driven = _driven(one, span)
        if not driven and not isinstance(one, keras.callbacks.Callback):
            checks.refuse("shown", SHOWN, one)
        for name, each in driven.items():
            together.setdefault(name, []).append(each)
    if not together and not tracks:
        checks.refuse("shown", "a list with a callback that drives a number of the optimizer", listed)
    if tracks:
        together.setdefault(RATE, [])
    curves = []
    for name, parts in together.items():
        values, has_groups = _product(name, parts, span), name == RATE and bool(tracks)
        curves.append(Line(_words(name), "all others" if has_groups else _words(name), values))
        if has_groups:
            curves += [Line(_words(name), plain(track.name), values * _of_track(track, span)) for track in tracks]
    return curves


def _product(name, parts, span) -> np.ndarray:
    own = [part for part in parts if not part.is_factor]
    if len(own) > 1:
        checks.refuse("shown", f"such that only one gives `{name}` a value of its own", own)
    values = np.full(span.steps, span.base if name == RATE else 1.0)
    if own:
        values = _preview(own[0], name, span)
    for part in parts:
        if part.is_factor:
            values = values * part.preview(span.steps, steps_per_epoch=span.steps_per_epoch)
    return values


def _of_track(track, span) -> np.ndarray:
    return np.broadcast_to(np.asarray(track.value(span.time), "float64"), span.steps).copy()


def _tracks(staged, span) -> list:
    """The multipliers of groups of weights as formulas of time."""
    if not span.steps_per_epoch:
        checks.refuse("steps_per_epoch", f"given for {staged.name}, whose stages begin with epochs", None)
    keys = [key for stage in staged.stages for group in stage.groups for key in group.keys]
    if span.model is not None:
        variables = span.model.trainable_variables
    elif any(isinstance(key, str) for key in keys):
        return checks.refuse("model", f"given where {staged.name} picks weights by pattern", None)
    else:
        variables = [variable for key in keys for variable in getattr(key, "weights", [key])]
    return stages.tracks(staged.stages, list({id(variable): variable for variable in variables}.values()))
