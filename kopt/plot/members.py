"""Pictures of snapshot ensembles: what each member adds, and how they differ."""

import numpy as np

from kopt import checks
from kopt.callbacks.snapshots import SnapshotEnsemble
from kopt.plot.picture import COLORS, GOOD, QUIET, Picture, finished, imported, in_own_style, panels, saves, tidy

MOST = 8  # of members whose differences are written into the cells


@in_own_style
def snapshots(snap, *, output=None, ax=None, save=None, show: bool = False) -> Picture:
    """Draw what snapshots are worth on the validation data: each, the first ones together, and how any two differ.

    Where the outputs are classes, the bars are the 95 % interval of the accuracy of the first so many together
    (Wilson's), and two members differ on the rows on which they name different classes. Where they are numbers, it is
    the root mean square of the difference.

    Args:
        snap: A `kopt.callbacks.SnapshotEnsemble` after a `fit` with validation data, or its `results_`.
        output: The name of an output, or its place if it has none, where there are several; the first by default.
        ax: Two axes of matplotlib to draw in; None makes a new figure.
        save: A path to write to, or several: .png, .svg, .pdf or .jpg.
        show: Whether to open a window.

    Returns:
        A `Picture`.

    Example:
        >>> import kopt
        >>> results = [{  # a part of what `snap.results_` is
        ...     "output": None, "ensemble": {"rmse": 0.3}, "members": [{"rmse": 0.5}, {"rmse": 0.4}],
        ...     "so_far": [{"rmse": 0.5}, {"rmse": 0.3}], "differences": [[0.0, 0.6], [0.6, 0.0]]}]
        >>> picture = kopt.plot.snapshots(results)  # or `snapshots(snap)`
        >>> [line.get_label() for line in picture.axes[0].lines]
        ['the best one: 0.4000', 'the first ones together: 0.3000', 'each snapshot']
    """
    files = saves(save, ax, show)
    found = _chosen(_results(snap), output)
    score, is_classes = next(iter(found["ensemble"])), "interval" in found
    data = {
        "members": [one[score] for one in found["members"]],
        "so_far": [one[score] for one in found["so_far"]],
        "differences": found["differences"],
    }
    if is_classes:
        data["intervals"] = [one["interval"] for one in found["so_far"]]
    axes = panels(ax, 1, 2, (8.2, 3.8), show, width_ratios=[1.3, 1])
    of = "" if found["output"] is None else f" of {found['output']}"
    _draw_scores(axes[0], data, f"{score}{of}", max if is_classes else min)
    what = "disagreement of two, % of rows" if is_classes else "difference of two, root mean square"
    _draw_differences(axes[1], np.array(data["differences"]), what, 100 if is_classes else 1)
    return finished(axes, data, files, show)


def _results(snap) -> list:
    """What the validation data say of each output."""
    if isinstance(snap, SnapshotEnsemble):
        if not snap.snapshots_:
            checks.refuse("snap", "one that has taken a snapshot: it does when a cycle of `fit` has ended", snap)
        if not (found := snap.results_):
            checks.refuse("snap", "one that could judge its snapshots: give `validation_data` to it or to `fit`", snap)
        return found
    is_right = isinstance(snap, (list, tuple)) and all(isinstance(one, dict) and "so_far" in one for one in snap)
    if not is_right or not snap:
        checks.refuse("snap", "a kopt.callbacks.SnapshotEnsemble, or its `results_`, which are not empty", snap)
    return list(snap)


def _chosen(results, output) -> dict:
    there = [one["output"] for one in results]
    if output is None:
        return results[0]
    if not isinstance(output, (str, int)) or output not in there:
        names = ", ".join(repr(name) for name in there if name is not None)
        checks.refuse("output", f"None or one of {names}" if names else "None, for there is one output", output)
    return results[there.index(output)]


def _draw_scores(ax, data, score, best) -> None:
    """Each member as a point, the first so many together as a curve, the best member as a line."""
    places, top = np.arange(1, len(data["members"]) + 1), best(data["members"])
    ax.axhline(top, color=QUIET, linestyle="--", label=f"the best one: {top:#.4g}")
    together = f"the first ones together: {data['so_far'][-1]:#.4g}"
    ax.plot(places, data["so_far"], "-s", color=GOOD, markersize=8, label=together)
    ax.plot(places, data["members"], "o", color=COLORS[1], markersize=5, label="each snapshot")
    if "intervals" in data:
        low, high = np.transpose(data["intervals"])
        ax.vlines(places, low, high, color=GOOD, alpha=0.4, linewidth=3, label="95 % interval")
    tidy(ax, "snapshot", score, "above")
    ax.set_xticks(places if len(places) <= 12 else places[:: len(places) // 10])


def _draw_differences(ax, table, what, times) -> None:
    """A heat map, with the numbers in its cells or beside it."""
    matplotlib = imported()
    from matplotlib.ticker import MaxNLocator

    if len(table) == 1:
        ax.text(0.5, 0.5, "one snapshot:\nnothing to compare", ha="center", va="center", transform=ax.transAxes)
    shown = np.where(np.eye(len(table), dtype=bool), np.nan, times * table)
    edges = 0.5, len(table) + 0.5
    top = np.nanmax(shown) if np.isfinite(shown).any() else 1.0
    shades = matplotlib.colormaps["Blues"].with_extremes(bad="#EEEEEE")
    image = ax.imshow(shown, cmap=shades, vmin=0, vmax=top or 1.0, extent=(*edges, *edges), origin="lower")
    if len(table) > MOST:
        ax.figure.colorbar(image, ax=ax)
    else:
        for row, column in np.argwhere(np.isfinite(shown)):
            value = shown[row, column]
            ink = "white" if value > 0.6 * (top or 1.0) else "black"
            size = "medium" if len(table) < 6 else "small"
            ax.text(column + 1, row + 1, f"{value:.3g}", ha="center", va="center", color=ink, fontsize=size)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title(what, fontsize="medium")
    ax.set_xlabel("snapshot")
    ax.set_ylabel("snapshot")
