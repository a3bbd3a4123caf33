"""Paths on a map, and losses beside it: what a still picture and a moving one have in common."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from kopt.plot.picture import COLORS, INK, LINES, label_of

COLOR_OF = {  # of the rules by name, the same in every picture
    "SGD": "#000000", "momentum": "#E69F00", "Nesterov": "#D55E00", "Adagrad": "#009E73", "RMSprop": "#CC79A7",
    "Adam": "#0072B2", "AdamW": "#56B4E9", "L-BFGS": "#882255",
}  # fmt: skip
BANDS = 14  # of equal area, from the lowest losses to the highest
PAPER, SLATE, EDGE = "#FFFFFF", "#A9B7C6", "#8894A0"  # the lowest band, the highest, and what parts them
FLOOR = 1e-10  # of what there is to gain: nothing below is told apart on a logarithmic axis


class Path(NamedTuple):
    """A run as it is drawn: until it ends, and what stands for it."""

    run: Any
    points: np.ndarray
    losses: np.ndarray
    heads: np.ndarray  # where the mark is after each step: in the view
    last_seen: int  # the last step that there is something to see of
    on_map: Any
    head: Any
    line: Any


class Losses:
    """The axis of the losses: logarithmic above the lowest value, or as they are where they fall for ever."""

    def __init__(self, record):
        self.record = record
        self.gain = float(record.runs[0].losses[0] - record.lowest)
        self.is_log = self.gain > 0 and not any(run.left_at is not None for run in record.runs)
        self.scale = "log" if self.is_log else "linear"
        self.label = "loss" if record.lowest == 0 or not self.is_log else f"loss, above {record.lowest:.3g}"

    def shown(self, losses) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.maximum(losses - self.record.lowest, FLOOR * self.gain) if self.is_log else np.asarray(losses)

    def span(self) -> tuple[float, float]:
        runs, z = self.record.runs, self.record.z[np.isfinite(self.record.z)]
        if not self.is_log:
            high = max(run.losses[0] for run in runs)
            low = z.min(initial=high)
            return float(low), float(high + (0.15 * (high - low) or 1.0))
        found = np.concatenate([self.shown(run.losses[: run.last + 1]) for run in runs])
        found = found[np.isfinite(found)]
        top = min(found.max(), z.max(initial=self.record.lowest) - self.record.lowest)
        return float(max(found.min() / 2, FLOOR * self.gain)), float(2 * max(top, self.gain))


def title_of(record) -> str:
    return f"{record.steps} step{'s' * (record.steps != 1)} on {record.surface.name}"


def name_of(run) -> str:
    """A line of the legend: who, at which rate, and whether it diverged."""
    rate = f"rate {run.learning_rate:g}" if run.learning_rate is not None else "line search" * run.is_search
    end = run.end if run.diverged_at is not None else ""
    return ", ".join(part for part in (label_of(run.label), rate, end) if part)


def draw_map(ax, record, title) -> None:
    from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap

    z = np.where(np.isfinite(record.z), record.z, np.nan)
    levels = np.unique(np.nanquantile(z, np.linspace(0, 1, BANDS + 1)))
    if len(levels) > 2:
        shades = LinearSegmentedColormap.from_list("slate", [PAPER, SLATE], len(levels) - 1)
        ax.contourf(record.x, record.y, z, levels, cmap=shades, norm=BoundaryNorm(levels, shades.N))
        ax.contour(record.x, record.y, z, levels[1:-1], colors=EDGE, linewidths=0.4, linestyles="-")
    minima = [at for at in record.surface.minima if _is_in(np.array([at]), record.view)[0]]
    if minima:
        ax.plot(*zip(*minima, strict=True), "*", color=PAPER, markeredgecolor=INK, markersize=11, zorder=5)
    ax.plot(*record.surface.start, "o", color=PAPER, markeredgecolor=INK, markersize=6, zorder=5)
    ax.set(xlim=record.view[0], ylim=record.view[1], xlabel="first weight", ylabel="second weight")
    ax.set_title(label_of(title), loc="left", fontsize=11)


def drawn_paths(axes, record, losses) -> list[Path]:
    """The runs, drawn on the map and beside it."""
    from matplotlib import patheffects

    drawn, edge = [], [patheffects.withStroke(linewidth=2.8, foreground=PAPER, alpha=0.7)]
    used: Counter[str] = Counter()
    widths = np.linspace(2.2, 1.5, len(record.runs))  # what lies under another is seen on both sides of it
    for run, color, width in zip(record.runs, colors(record.runs), widths, strict=True):
        style = {"color": color, "linestyle": LINES[used[color] % len(LINES)], "linewidth": width}
        used[color] += 1
        points, values = run.points[: run.last + 1], run.losses[: run.last + 1]
        heads = _heads(points, record.view)
        (on_map,) = axes[0].plot(*points.T, **style, path_effects=edge, zorder=3)
        mark = {"marker": "X" if run.diverged_at is not None else "o", "markersize": 7, "markeredgecolor": PAPER}
        (head,) = axes[0].plot(*heads[-1:].T, color=color, linestyle="", zorder=4, clip_on=False, **mark)
        (line,) = axes[1].plot(losses.shown(values), **style, label=name_of(run))
        is_seen = np.flatnonzero(_is_in(points, record.view))
        last_seen = run.last if losses.is_log or not len(is_seen) else min(run.last, int(is_seen[-1]) + 1)
        drawn.append(Path(run, points, values, heads, last_seen, on_map, head, line))
    return drawn


def colors(runs) -> list[str]:
    """A color for each, that of its rule where it has one."""
    own = [COLOR_OF.get(run.label) for run in runs]
    spare = [color for color in COLORS if color not in own] or [INK]
    return [color or spare[own[:place].count(None) % len(spare)] for place, color in enumerate(own)]


def _is_in(points, view) -> np.ndarray:
    low, high = np.transpose(view)
    return ((low <= points) & (points <= high)).all(1)


def _heads(points, view) -> np.ndarray:
    """The points, and in place of those out of view where the path has left it."""
    low, high = np.transpose(view)
    found = points.copy()
    for place in np.flatnonzero(~_is_in(points, view)):
        start, step = found[place - 1] if place else np.clip(points[0], low, high), np.zeros(2)
        if place and _is_in(points[place - 1 : place], view)[0] and np.isfinite(points[place]).all():
            step = points[place] - start
        with np.errstate(all="ignore"):
            shares = np.where(step > 0, (high - start) / step, np.where(step < 0, (low - start) / step, 1.0))
        found[place] = start + min(1.0, shares.min()) * step
    return found
