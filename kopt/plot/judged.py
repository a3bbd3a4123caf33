"""The picture of what a learning rate does to a loss curve."""

import re

import numpy as np

from kopt import checks
from kopt.plot import runs as reading
from kopt.plot.picture import Picture, finished, imported, in_own_style, panels, saves, tidy

AS_GOOD = 0.02  # of the fall of the best curve
RISING = r"acc|auc|precision|recall|f1|r2|iou"  # in the names of metrics that are better if higher
TOP = 10  # times the first loss of the curves that are not too high: more is above the picture
CURVES = (
    "a dict from two learning rates or more to what was recorded at each: a list of losses, a training (a keras "
    "History, a dict of lists like its `history`, or the path of a file that keras.callbacks.CSVLogger has written), "
    "or a list of either, one for each seed"
)


@in_own_style
def rates(curves, *, metric: str = "loss", ax=None, save=None, show: bool = False) -> Picture:
    """Draw loss curves at several learning rates, and judge the rates by them: too low, good, too high, diverged.

    How a rate is judged: the end of a curve is its last number, or the mean of its last tenth if it has 20 or more;
    with several seeds, the mean of their ends. The rate with the lowest end is good. A rate is as good if its end is
    higher by no more than 2 % of what that curve has fallen by, from its first number to its end; so are those between
    two good ones. Lower rates are too low, higher ones too high. Where a number is not finite the rate has diverged,
    whatever else. That is a judgement of this loss at this length: the best one is not known to be the best there is,
    and what is too low may be good for a longer training.

    Colors go from low rates to high ones, good ones are thick. Several seeds are drawn as their mean and their range.
    The loss is on a log scale if it is positive; what is above ten times the first loss of a rate that is not too high
    is cut off, and a cross at the upper edge is where a rate has diverged.

    Args:
        curves: A dict from learning rates to what was recorded at each, epoch by epoch: a list of losses, a keras
            History, a dict of lists like `history.history`, the path of a file that `keras.callbacks.CSVLogger` has
            written, or a list of these, one for each seed.
        metric: What to take of a training: a loss, which is the better the lower it is.
        ax: The axes of matplotlib to draw in; None makes a new figure.
        save: A path to write to, or several: .png, .svg, .pdf or .jpg.
        show: Whether to open a window.

    Returns:
        A `Picture`. Its data have the rates (`rates`), what is said of them (`judgements`), and a band for each.

    Example:
        >>> import kopt
        >>> curves = {0.001: [2.3, 2.2, 2.1], 0.1: [1.5, 0.5, 0.2], 1: [2.5, 1.9, 2.0], 30: [9.9, float("nan")]}
        >>> picture = kopt.plot.rates(curves)
        >>> [text.get_text() for text in picture.axes[0].get_legend().get_texts()]
        ['0.001: too low', '0.1: good', '1: too high', '30: diverged in epoch 2']
    """
    files = saves(save, ax, show)
    if re.search(RISING, checks.sentence("metric", metric)):
        checks.refuse("metric", "one that is the better the lower it is, as a loss", metric)
    found = _read(curves, metric)
    said = judged(found)
    (ax,) = panels(ax, size=(7.5, 3.8), show=show)
    shades = imported().colormaps["plasma"](np.linspace(0, 0.85, len(found)))
    data, shown = {"rates": [*found], "judgements": said}, {}
    for (rate, seeds), judgement, color in zip(found.items(), said, shades, strict=True):
        shown[rate] = drawn = reading.band(seeds, is_range=True)
        reading.draw(ax, drawn, color, label=f"{rate:g}: {judgement}", linewidth=2.8 if judgement == "good" else 1.5)
        for place, seed in ((reading.ends(seed), seed) for seed in seeds):
            if place is not None:
                at_edge = {"transform": ax.get_xaxis_transform(), "clip_on": False, "label": "_"}
                ax.plot(seed.epochs[place], 1, "x", color=color, **at_edge)
        data |= reading.held(f"{rate:g}", drawn)
    _scale(ax, found, said)
    tidy(ax, "epoch", metric, "beside")
    counts = {len(seeds) for seeds in found.values()}
    many = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
    ax.get_legend().set_title("learning rate" + f"\n({many} seeds: mean, range)" * (max(counts) > 1))
    return finished([ax], data, files, show)


def _read(curves, metric) -> dict[float, list]:
    """The curves of the seeds at each rate, by rate."""
    if not isinstance(curves, dict) or len(curves) < 2:
        checks.refuse("curves", CURVES, curves)
    found = {checks.positive("curves", rate): _seeds(recorded, metric) for rate, recorded in curves.items()}
    return dict(sorted(found.items()))


def _seeds(recorded, metric) -> list:
    is_one = reading.numbers(recorded) is not None or reading.is_run(recorded)
    seeds = [recorded] if is_one or not isinstance(recorded, (list, tuple, np.ndarray)) else recorded
    return [_curve(one, metric) for one in seeds] if len(seeds) else checks.refuse("curves", CURVES, recorded)


def _curve(one, metric):
    losses = reading.numbers(one)
    if losses is not None:
        return reading.Curve(np.arange(1, len(losses) + 1), losses)
    if not reading.is_run(one):
        checks.refuse("curves", CURVES, one)
    run = reading.read("curves", one)
    return run[metric] if metric in run else checks.refuse("metric", f"one of {', '.join(sorted(run))}", metric)


def judged(found) -> list[str]:
    """What the curves say of each rate."""
    falls = {rate: np.mean([_fall(seed) for seed in seeds], 0) for rate, seeds in found.items()}
    falls = {rate: fall for rate, fall in falls.items() if np.isfinite(fall).all() and not _lost(found[rate])}
    if not falls:
        return [_lost(seeds) for seeds in found.values()]
    start, end = min(falls.values(), key=lambda fall: fall[1])
    good = [rate for rate, fall in falls.items() if fall[1] <= end + AS_GOOD * max(0.0, start - end)]
    words = {rate: "too low" if rate < min(good) else "too high" if rate > max(good) else "good" for rate in falls}
    return [words.get(rate) or _lost(seeds) for rate, seeds in found.items()]


def _fall(seed) -> tuple[float, float]:
    """Where a curve begins and ends."""
    values = seed.values
    return float(values[0]), float(np.mean(values[-max(1, len(values) // 10) :]))


def _lost(seeds) -> str:
    """When, and how many of the seeds, have diverged; nothing if none has."""
    lost = sorted(seed.epochs[place] for seed in seeds if (place := reading.ends(seed)) is not None)
    if not lost:
        return ""
    share = f"{len(lost)} of {len(seeds)} " * (len(lost) < len(seeds))
    when = f"epoch {lost[0]}" if lost[0] == lost[-1] else f"epochs {lost[0]} to {lost[-1]}"
    return f"{share}diverged in {when}"


def _scale(ax, found, said) -> None:
    """A log scale where there can be one, up to where the curves are that have not exploded."""
    from matplotlib.ticker import MaxNLocator

    every = {rate: np.concatenate([seed.values for seed in seeds]) for rate, seeds in found.items()}
    every = {rate: values[np.isfinite(values)] for rate, values in every.items()}
    values = np.concatenate([*every.values()])
    sound = [found[rate] for rate, word in zip(found, said, strict=True) if word in ("too low", "good")]
    first = [seed.values[0] for seeds in sound for seed in seeds]
    is_log = len(values) > 0 and values.min() > 0
    if is_log:
        ax.set_yscale("log")
    if first and len(values) and max(first) > 0:
        top, low = min(values.max(), TOP * max(first)), values.min()
        room = (top / low) ** 0.05 if is_log else 0.05 * (top - low)
        if top > low:
            ax.set_ylim(*((low / room, top * room) if is_log else (low - room, top + room)))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
