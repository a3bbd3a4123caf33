"""Pictures of trainings: what was recorded after each epoch."""

from kopt import checks
from kopt.callbacks.polyak import OWN
from kopt.plot import runs as reading
from kopt.plot.picture import (
    COLORS,
    INK,
    QUIET,
    Picture,
    finished,
    in_own_style,
    label_of,
    panels,
    saves,
    tidy,
)


@in_own_style
def history(*runs, metrics=("loss",), ax=None, save=None, show: bool = False) -> Picture:
    """Draw what trainings have recorded after each epoch: a curve for one, a band for several that differ by seed.

    A metric has a panel, in which validation is solid and training dashed. Around the mean of three trainings or more
    is their standard deviation, around that of two their range. Where trainings end at different epochs or lose a
    finite number, mean and band are of those that have one; the legend says how many are left and `data` how many there
    are at each epoch ("n"); a cross is the last number before one that is not finite.

    Args:
        runs: Trainings, which are seeds of the same: a keras History, a dict of lists like `history.history`, or the
            path of a file that `keras.callbacks.CSVLogger` has written, in which of an epoch that is there twice the
            last counts. Or one dict, from names to a training or a list of them, for a band each, at most 8. A metric
            with fewer numbers than the training has epochs stands at every second, third, ... (`validation_freq`);
            where several would fit, at the rarest: only files say at which epochs it was taken.
        metrics: The names of what to draw, as in `compile`, without "val_".
        ax: The axes of matplotlib to draw in, as many as metrics; None makes a new figure.
        save: A path to write to, or several: .png, .svg, .pdf or .jpg.
        show: Whether to open a window.

    Returns:
        A `Picture`.

    Example:
        >>> import kopt
        >>> runs = {"SGD": {"loss": [2.0, 1.0]}, "Adam": [{"loss": [1.0, 0.5]}, {"loss": [2.0, 0.5]}]}
        >>> picture = kopt.plot.history(runs)
        >>> [line.get_label() for line in picture.axes[0].lines]
        ['SGD', 'Adam: mean and range of 2']
        >>> picture.data["Adam loss mean"]
        array([1.5, 0.5])
    """
    files = saves(save, ax, show)
    metrics = checks.one_or_several(checks.sentence, "the name of a metric, or a list of them")("metrics", metrics)
    found = reading.grouped("runs", runs)
    if len(found) > len(COLORS):
        checks.refuse("runs", f"at most {len(COLORS)} groups, as many as there are colors", list(found))
    there = sorted({metric for group in found.values() for run in group for metric in run})
    for metric in metrics:
        if not {metric, f"val_{metric}"} & set(there):
            checks.refuse("metrics", f"of those that were recorded, {', '.join(there)}", metric)
    axes, data = panels(ax, len(metrics), 1, (7.5, 0.6 + 2.8 * len(metrics)), show), {}
    for panel, metric in zip(axes, metrics, strict=True):
        data |= _panel(panel, found, metric, has_legend=panel is axes[0])
        if ax is None and panel is not axes[-1]:
            panel.set_xlabel("")
    return finished(axes, data, files, show)


def _panel(ax, found, metric, has_legend) -> dict:
    """Draw one metric of each group."""
    runs = [run for group in found.values() for run in group]
    kinds = [kind for kind in ("val_", "") if any(kind + metric in run for run in runs)]
    data, guessed = {}, False
    for (name, group), color in zip(found.items(), COLORS, strict=False):
        label = None
        for kind in kinds:
            curves = [run[kind + metric] for run in group if kind + metric in run]
            if curves:
                guessed |= kind == "val_" and any(curve.is_guess for curve in curves)
                style = "-" if kind == kinds[0] else "--"
                shown = reading.band(curves, len(curves) < 3)
                label = _said(name, curves, shown) if label is None else "_"
                reading.draw(ax, shown, color, linestyle=style, label=label or "_")
                _mark_ends(ax, curves, color)
                data |= reading.held(f"{name} {kind}{metric}", shown)
    if len(kinds) == 2:
        for label, style in ((f"validation{', epochs guessed' * guessed}", "-"), ("training", "--")):
            ax.plot([], [], style, color=INK, label=label)
    is_training = kinds == [""] and not metric.startswith("val_")
    _tidy(ax, f"training {metric}" if is_training else metric, "above" if has_legend else None)
    return data


def _tidy(ax, y, legend) -> None:
    from matplotlib.ticker import MaxNLocator

    tidy(ax, "epoch", y, legend)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _said(name, curves, shown) -> str:
    """A group in the legend: its name, what is drawn of it, and how many of it are left in the end."""
    many, lost = len(curves), sum(reading.ends(curve) is not None for curve in curves)
    how = f"mean {'and range' if many < 3 else '± sd'} of {many}" if many > 1 else ""
    last = sum(int(curve.epochs[-1] == shown.epochs[-1]) for curve in curves)
    how += f", {last} to the end" * (last < many) + f", {lost} not finite" * (many > 1 and lost > 0)
    how += "not finite" * (many == 1 and lost > 0)
    return label_of(f"{name}: {how}" if name and how else name or how)


def _mark_ends(ax, curves, color) -> None:
    """A cross at the last number before the first that is not finite."""
    for curve in curves:
        last = reading.ends(curve)
        if last:
            ax.plot(curve.epochs[last - 1], curve.values[last - 1], "x", color=color, label="_")


@in_own_style
def average(history, *, metric: str = "loss", ax=None, save=None, show: bool = False) -> Picture:
    """Draw what averaging the weights was worth: the raw weights and the averaged ones on the validation data.

    It wants a `fit` with validation data and `kopt.callbacks.PolyakAveraging(validate="both", validation_data=...)`,
    which then logs `val_averaged_loss` beside `val_loss`. Before its `start_epoch` both are of the raw weights. What
    was logged in training is faint: it is of the raw weights, while they move, and of other data.

    Args:
        history: A training: a keras History, a dict of lists like `history.history`, or the path of a file that
            `keras.callbacks.CSVLogger` has written. A list of them, which differ by their seed, gives bands, as in
            `kopt.plot.history`.
        metric: What to draw, as in `compile`.
        ax: The axes of matplotlib to draw in; None makes a new figure.
        save: A path to write to, or several: .png, .svg, .pdf or .jpg.
        show: Whether to open a window.

    Returns:
        A `Picture`.

    Example:
        >>> import kopt
        >>> logged = {"loss": [2.0, 1.0], "val_loss": [2.0, 1.5], "val_averaged_loss": [2.0, 1.2]}
        >>> picture = kopt.plot.average(logged)
        >>> [line.get_label() for line in picture.axes[0].lines]
        ['training, raw weights', 'validation, raw weights', 'validation, averaged weights']
    """
    files = saves(save, ax, show)
    checks.sentence("metric", metric)
    found = [reading.read("history", run) for run in reading.listed(history)]
    if not found:
        checks.refuse("history", reading.RUN, history)
    raw, averaged = f"val_{metric}", f"{OWN}{metric}"
    for name in (raw, averaged):
        if not all(name in run for run in found):
            way = "PolyakAveraging(validate='both', validation_data=...)"
            allowed = f"of a `fit` with `validation_data` and kopt.callbacks.{way}, so that it has `{name}`"
            checks.refuse("history", allowed, history)
    (ax,), data = panels(ax, 1, 1, (7.5, 3.5), show), {}
    shown = {metric: ("training, raw weights", QUIET, 1.2), raw: ("validation, raw weights", COLORS[0], 1.5),
             averaged: ("validation, averaged weights", COLORS[1], 2.2)}  # fmt: skip
    for name, (label, color, width) in shown.items():
        curves = [run[name] for run in found if name in run]
        if curves:
            drawn = reading.band(curves, len(curves) < 3)
            reading.draw(ax, drawn, color, linewidth=width, label=_said(label, curves, drawn))
            _mark_ends(ax, curves, color)
            data |= reading.held(name, drawn)
    _tidy(ax, metric, "above")
    return finished([ax], data, files, show)
