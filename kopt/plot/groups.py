"""The picture of how much each group of weights moves."""

from itertools import groupby

import numpy as np

from kopt import checks
from kopt.callbacks import ratios, unfreeze
from kopt.plot import runs
from kopt.plot.picture import (
    GOOD,
    Picture,
    axes_of,
    columns_of,
    finished,
    in_own_style,
    panels,
    plain,
    saves,
    styles,
    tidy,
)

HEALTHY, AROUND = 1e-3, (1e-3 / 3, 3e-3)
RATIO, MULTIPLIER, RATE = ratios.PREFIX, unfreeze.PREFIX, "learning_rate"
BESIDE = 12  # names that a legend beside the picture has room for
ROW = 0.045  # of the height of the axes, for the bar of a group that rests


@in_own_style
def groups(history, *, ax=None, save=None, show: bool = False) -> Picture:
    """Draw how much of itself each group of weights moves at an update, and the rate that each group has.

    Above is what `kopt.callbacks.UpdateRatio` has measured, with a band from a third of 1e-3 to three times that: about
    1e-3 is healthy. While a group does not move its line has a gap, a bar in its color lies at the bottom, and the
    legend says in which epochs that was. What is infinite or NaN is not drawn.

    Below, if the history has them, are the learning rate, which `kopt.callbacks.RateMonitor` logs, and times it the
    multipliers, which `kopt.callbacks.StagedUnfreeze` logs. Multipliers without a learning rate are drawn as they are.

    Args:
        history: A keras History, a dict of lists like its `history`, or the path of a file that
            `keras.callbacks.CSVLogger` has written.
        ax: The axes of matplotlib to draw in: one for the ratios alone, or two; None makes a new figure.
        save: A path to write to, or several: .png, .svg, .pdf or .jpg.
        show: Whether to open a window.

    Returns:
        A `Picture`, whose data are the epochs, what was drawn by the names that the logs have, and `rate/<group>` for
        a learning rate times a multiplier.

    Example:
        >>> import kopt
        >>> picture = kopt.plot.groups({"update_ratio/base": [0.0, 1e-4], "update_ratio/head": [2e-3, 1e-3]})
        >>> [text.get_text() for text in picture.axes[0].get_legend().get_texts()]
        ['base (0 in epoch 1)', 'head', 'about 1e-3 is healthy']
    """
    files = saves(save, ax, show)
    epochs, moved, rates, quantity = _read(history)
    if ax is not None and len(axes_of(ax)) == 1:
        rates = {}
    count = 1 + bool(rates)
    labels = list(dict.fromkeys(_label(name) for name in moved | rates))
    styled = dict(zip(labels, styles(len(labels)), strict=True))
    below = max(len(moved), len(rates)) > BESIDE and ax is None  # where all names are in one legend
    axes = panels(ax, count, size=(7.6, 0.8 + 2.5 * count + 0.12 * len(labels) * below), show=show, sharex=True)
    axes[0].axhspan(*AROUND, color=GOOD, alpha=0.15, linewidth=0)
    _draw(axes[0], epochs, moved, styled, AROUND)
    axes[0].axhline(HEALTHY, color=GOOD, linewidth=1, alpha=0.6, label="about 1e-3 is healthy")
    tidy(axes[0], "" if rates else "epoch", "|change| / |weights|", None if below else "beside")
    if rates:
        _draw(axes[1], epochs, rates, styled)
        tidy(axes[1], "epoch", quantity, None if below else "beside")
    if below:
        handles, names = axes[0].get_legend_handles_labels()
        look = {"loc": "outside lower center", "ncols": columns_of(names, 110), "frameon": False, "fontsize": 8}
        axes[0].figure.legend(handles, names, **look)
    return finished(axes, {"epochs": epochs} | moved | rates, files, show)


def _read(history) -> tuple:
    """The epochs, the ratios, the rates, and what is drawn of the latter."""
    read = runs.read("history", history)
    if not any(name.startswith(RATIO) for name in read):
        allowed = f"of a fit with `callbacks=[kopt.callbacks.UpdateRatio()]`, which logs `{RATIO}<group>`"
        checks.refuse("history", f"{allowed}; this one has {', '.join(read)}", history)
    chosen = {name: curve for name, curve in read.items() if name.startswith((RATIO, MULTIPLIER, RATE))}
    epochs = max((curve.epochs for curve in chosen.values()), key=len)
    lengths = {name: len(curve.values) for name, curve in chosen.items()}
    if len(set(lengths.values())) > 1:
        checks.refuse("history", f"of a fit that has logged all of them at each epoch, not {lengths}", history)
    moved, multipliers, rates = (
        {name: curve.values for name, curve in chosen.items() if name.startswith(prefix)}
        for prefix in (RATIO, MULTIPLIER, RATE)
    )
    if RATE in rates:
        times = {f"rate/{name.removeprefix(MULTIPLIER)}": rates[RATE] * values for name, values in multipliers.items()}
        return epochs, moved, rates | times, "learning rate × multiplier" if times else "learning rate"
    return epochs, moved, rates or multipliers, "learning rate" if rates else "multiplier"


def _label(name) -> str:
    """What a curve is called: its group, or "learning rate"."""
    return name.split("/", 1)[1] if "/" in name else name.replace(RATE, "learning rate")


def _draw(ax, epochs, curves, styled, seen=()) -> None:
    """The curves on a log axis that shows `seen`, too; a bar at the bottom, and words in the legend, where one is 0."""
    from matplotlib.ticker import MaxNLocator

    lines = {name: np.where(np.isfinite(values) & (values > 0), values, np.nan) for name, values in curves.items()}
    still = {name: values == 0 for name, values in curves.items()}
    _scale(ax, np.concatenate([*lines.values(), seen]), sum(rests.any() for rests in still.values()))
    row = 0
    for name, line in lines.items():
        style, rests, lost = styled[_label(name)], still[name], ~np.isfinite(curves[name])
        notes = [
            f"{said} in {_spans(epochs, when)}" for said, when in (("0", rests), ("not finite", lost)) if when.any()
        ]
        label = plain(_label(name)) + (f" ({'; '.join(notes)})" if notes else "")
        ax.plot(epochs, line, marker="o", markersize=3, label=label, **style)
        if rests.any():
            row += 1
            ends = [(run[0] - 0.4, run[-1] + 0.4, np.nan) for run in _stretches(epochs[rests])]
            bars = {"transform": ax.get_xaxis_transform(), "linewidth": 4, "solid_capstyle": "butt", "label": "_bar"}
            ax.plot(np.ravel(ends), np.full(3 * len(ends), ROW * (row - 0.3)), color=style["color"], **bars)
    if row:
        place = {"transform": ax.transAxes, "va": "bottom", "fontsize": 8}
        ax.text(0.01, ROW * (row + 0.3), "does not move:", **place)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _scale(ax, shown, bars) -> None:
    """A log axis with room for so many bars below all that is shown."""
    shown = np.log10(shown[np.isfinite(shown)]) if np.isfinite(shown).any() else np.array([-4.0, -2.0])
    margin = max(0.06 * np.ptp(shown), 0.5 - np.ptp(shown) / 2)  # one decade at least
    low, high = shown.min() - margin, shown.max() + margin
    room = ROW * (bars + 1.7) * bool(bars)
    ax.set_yscale("log")
    ax.set_ylim(10 ** (low - (high - low) * room / (1 - min(room, 0.6))), 10**high)


def _stretches(epochs) -> list[list]:
    """The epochs that follow each other."""
    together = groupby(enumerate(epochs.tolist()), lambda pair: pair[1] - pair[0])
    return [[epoch for _, epoch in run] for _, run in together]


def _spans(epochs, still) -> str:
    """The epochs in which something holds, as words."""
    if still.all() and len(epochs) > 1:
        return "all epochs"
    said = ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in _stretches(epochs[still]))
    return f"epoch{'s' * bool(still.sum() > 1)} {said}"
