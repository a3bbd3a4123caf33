"""What trainings have recorded, read out of what users have, and bands over several of them."""

import csv
import os
from typing import NamedTuple

import keras
import numpy as np

from kopt import checks

RUN = (
    "trainings: a keras History, a dict of lists like its `history`, or the path of a file that "
    "keras.callbacks.CSVLogger has written"
)


class Curve(NamedTuple):
    """What was recorded of one metric; epochs count from 1, numbers may be infinite or NaN."""

    epochs: np.ndarray
    values: np.ndarray
    is_guess: bool = False  # whether nothing says which epochs these were


class Band(NamedTuple):
    """The mean of several curves where they are finite, and what lies around it; NaN where there is too little."""

    epochs: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray  # how many are finite there


def numbers(series) -> np.ndarray | None:
    """An array of what is a list of numbers, with NaN for None; None if it is something else, or empty."""
    if isinstance(series, (str, bytes, dict, os.PathLike)):
        return None
    try:
        array = np.asarray([np.nan if one is None else one for one in series])
    except (TypeError, ValueError):
        return None
    return array.astype("float64") if array.ndim == 1 and array.size and array.dtype.kind in "iuf" else None


def is_run(value) -> bool:
    """Whether it is one training; a dict of which nothing is a list of numbers names several."""
    if isinstance(value, dict):
        return any(numbers(series) is not None for series in value.values())
    return isinstance(value, (keras.callbacks.History, str, os.PathLike))


def read(name, run) -> dict[str, Curve]:
    """The curves of one training, by metric."""
    if isinstance(run, (str, os.PathLike)):
        return _logged(name, run)
    if not is_run(run):
        checks.refuse(name, RUN, run)
    history, epochs = (
        (run, None) if isinstance(run, dict) else (run.history, np.array(vars(run).get("epoch", ()), int) + 1)
    )
    found = {metric: values for metric, series in history.items() if (values := numbers(series)) is not None}
    if not found:
        checks.refuse(name, f"{RUN}; this one has recorded nothing", run)
    longest = max(map(len, found.values()))
    if epochs is None or len(epochs) != longest:
        epochs = np.arange(1, longest + 1)
    return {
        metric: Curve(_placed(epochs, len(values)), values, len(values) < len(epochs))
        for metric, values in found.items()
    }


def _placed(epochs, count) -> np.ndarray:
    """At which of the epochs so many numbers stand: all, or as rarely as fits of every second, third, ..."""
    if count < len(epochs):
        for every in range(epochs[-1], 1, -1):
            if (epochs % every == 0).sum() == count:
                return epochs[epochs % every == 0]
    return epochs[:count]


def _logged(name, path) -> dict[str, Curve]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        checks.refuse(name, f"{RUN} ({error})", path)
    separator = lines[0][5:6] if lines and lines[0].startswith("epoch") else ""
    if not separator:
        checks.refuse(name, f"{RUN}, with a first line `epoch,loss,...`", path)
    rows = [row for row in csv.DictReader(lines, delimiter=separator) if None not in row.values()]  # not a cut line
    try:
        by_epoch = {int(row["epoch"]) + 1: row for row in rows}  # the last of those that were trained again
        by_epoch = {epoch: by_epoch[epoch] for epoch in sorted(by_epoch)}
    except ValueError:
        checks.refuse(name, f"{RUN}, with whole numbers as epochs", path)
    metrics = [metric for metric in (rows[0] if rows else ()) if metric != "epoch"]
    found = {metric: _column(by_epoch, metric) for metric in metrics}
    found = {metric: curve for metric, curve in found.items() if curve is not None}
    return found or checks.refuse(name, f"{RUN}; no metric is in this file", path)


def _column(rows, metric) -> Curve | None:
    """The numbers of a column, without the epochs at which there was none; None if it has others than numbers."""
    shown = {epoch: row[metric] for epoch, row in rows.items() if row[metric] not in ("NA", "")}
    try:
        return Curve(np.array([*shown]), np.array([float(text) for text in shown.values()])) if shown else None
    except ValueError:
        return None


def grouped(name, runs) -> dict[str, list[dict[str, Curve]]]:
    """Trainings by the name of what they belong to, "" if there is none."""
    named = {"": [one for run in runs for one in listed(run)]}
    if len(runs) == 1 and isinstance(runs[0], dict) and not is_run(runs[0]):
        named = {checks.sentence(name, key): listed(value) for key, value in runs[0].items()}
    if not named or not all(named.values()):
        checks.refuse(name, f"{RUN}; or a dict from names to these, or to lists of these", runs)
    return {key: [read(name, run) for run in listed] for key, listed in named.items()}


def listed(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def band(curves, is_range: bool) -> Band:
    """The mean of curves, and around it their range or their standard deviation, which wants three."""
    epochs = np.unique(np.concatenate([curve.epochs for curve in curves]))
    table = np.full((len(curves), len(epochs)), np.nan)
    for row, curve in zip(table, curves, strict=True):
        row[np.searchsorted(epochs, curve.epochs)] = np.where(np.isfinite(curve.values), curve.values, np.nan)
    n, least = np.isfinite(table).sum(0), 2 if is_range else 3
    there, low, high = n >= least, *np.full((2, len(epochs)), np.nan)
    mean = np.where(n > 0, np.nansum(table, 0) / np.maximum(n, 1), np.nan)
    if is_range:
        low[there], high[there] = np.nanmin(table[:, there], 0), np.nanmax(table[:, there], 0)
    elif there.any():
        spread = np.nanstd(table[:, there], 0, ddof=1)
        low[there], high[there] = mean[there] - spread, mean[there] + spread
    return Band(epochs, mean, low, high, n)


def ends(curve) -> int | None:
    """The place of the first number that is not finite."""
    bad = np.flatnonzero(~np.isfinite(curve.values))
    return int(bad[0]) if len(bad) else None


def draw(ax, shown: Band, color, **style) -> None:
    """The mean as a line, or as dots where it has no neighbor, and the band around it."""
    ax.plot(shown.epochs, shown.mean, color=color, **style)
    there = np.pad(np.isfinite(shown.mean), 1)
    alone = there[1:-1] & ~there[:-2] & ~there[2:]
    if alone.any():
        ax.plot(shown.epochs[alone], shown.mean[alone], "o", color=color, markersize=4, label="_")
    if np.isfinite(shown.low).any():
        ax.fill_between(shown.epochs, shown.low, shown.high, color=color, alpha=0.2, linewidth=0)


def held(name: str, shown: Band) -> dict:
    """The arrays of a band, each with its name."""
    return {f"{name} {part}".strip(): array for part, array in shown._asdict().items()}
