"""Pictures of what was found about learning rates."""

import numpy as np

from kopt import checks
from kopt.plot.picture import BAD, COLORS, GOOD, INK, QUIET, Picture, finished, in_own_style, panels, saves, tidy
from kopt.range_test import RangeTest

MARKS = {"valley": COLORS[0], "steepest": COLORS[2], "minimum/10": COLORS[4]}
STAGES = [COLORS[5], COLORS[0], "#004466", INK]


@in_own_style
def rate_range(record, *, ax=None, save=None, show: bool = False) -> Picture:
    """Draw a range test: the loss at each rate, smoothed too, the rates that are suggested, and where it diverges.

    Args:
        record: What `kopt.find_learning_rate` returns.
        ax: The axes of matplotlib to draw in; None makes a new figure.
        save: A path to write to, or several: .png, .svg, .pdf or .jpg.
        show: Whether to open a window.

    Returns:
        A `Picture`.

    Example:
        >>> import numpy as np, kopt
        >>> rates = np.geomspace(1e-4, 10, 60)
        >>> record = kopt.RangeTest(rates, 1 / (1 + 100 * rates) + rates**2, initial_loss=1.0)
        >>> picture = kopt.plot.rate_range(record)
        >>> picture.axes[0].get_xscale()
        'log'
    """
    files = saves(save, ax, show)
    if not isinstance(record, RangeTest):
        checks.refuse("record", "a kopt.RangeTest, as kopt.find_learning_rate returns it", record)
    (ax,) = panels(ax, size=(8, 3.5), show=show)
    data = {name: getattr(record, name) for name in ("learning_rates", "losses")}
    data |= {name: getattr(record, name) for name in ("smoothed_learning_rates", "smoothed_losses")}
    ax.plot(record.learning_rates, record.losses, ".", color=QUIET, markersize=4, label="loss of a batch")
    ax.plot(record.smoothed_learning_rates, record.smoothed_losses, color=INK, label="smoothed")
    for name, rate in record.suggestions.items():
        if rate is not None:
            data[f"suggestion/{name}"] = rate
            ax.axvline(rate, color=MARKS[name], linestyle="--", label=f"{name}: {rate:.2g}")
    if record.diverged_at is not None:
        data["diverges"] = _diverges(record)
        label = f"above its start,\nexploded at {record.diverged_at:.2g}"
        ax.axvspan(*data["diverges"], color=BAD, alpha=0.2, linewidth=0, label=label)
    if record.finite:
        low = min(record.smoothed_losses.min(), record.losses[: record.finite].min())
        high = max(record.start, np.median(record.smoothed_losses))
        ax.set_ylim(low - 0.08 * (high - low), high + 0.6 * (high - low) + 1e-12)
    ax.set_xscale("log")
    tidy(ax, "learning rate", "loss", "beside")
    return finished([ax], data, files, show)


def _diverges(record) -> np.ndarray:
    """From where on every loss is above what it was at first, to beyond the last rate."""
    below = np.flatnonzero(record.losses <= record.start)
    place = below[-1] + 1 if len(below) else 0
    return np.array([record.learning_rates[min(place, len(record.losses) - 1)], 1.2 * record.diverged_at])


@in_own_style
def search(result, *, ax=None, save=None, show: bool = False) -> Picture:
    """Draw a search for a learning rate: the trials of each stage, what diverged, and the answer.

    Where several batch sizes were tried, the trials are those of the one that was chosen.

    Args:
        result: The `result` of a `kopt.tuner.LearningRateSearch`.
        ax: The axes of matplotlib to draw in; None makes a new figure.
        save: A path to write to, or several: .png, .svg, .pdf or .jpg.
        show: Whether to open a window.

    Returns:
        A `Picture`.

    Example:
        >>> import kopt, kopt.tuner
        >>> rows = [{"kind": "stage 1", "learning_rate": 10.0**-i, "score": abs(i - 2.0), "diverged": i == 0,
        ...          "epochs": 1, "batch_size": None, "seed": 0, "status": "COMPLETED"} for i in range(5)]
        >>> result = kopt.tuner.SearchResult(
        ...     "val_loss", "min", 0.01, None, (0.01, 0.01), 0.1, 1.0, 0.0, 0.0, rows, [], [])
        >>> [line.get_label() for line in kopt.plot.search(result).axes[0].lines]
        ['stage 1: 1 epoch', 'diverged', 'answer: 0.01']
    """
    files = saves(save, ax, show)
    if not hasattr(result, "trials") or not hasattr(result, "cliff"):
        checks.refuse("result", "the `result` of a kopt.tuner.LearningRateSearch", result)
    rows = [row for row in result.trials if row["kind"] != "range test" and row["status"] == "COMPLETED"]
    if result.learning_rate is not None:
        rows = [row for row in rows if row["batch_size"] == result.batch_size]
    (ax,) = panels(ax, size=(8, 3.5), show=show)
    good = [row for row in rows if row["score"] is not None and not row["diverged"]]
    data = {}
    for place, kind in enumerate(dict.fromkeys(row["kind"] for row in good)):
        shown = sorted((row["learning_rate"], row["score"]) for row in good if row["kind"] == kind)
        epochs = next(row["epochs"] for row in good if row["kind"] == kind)
        style = "-" if kind.startswith("stage") else ""
        label = f"{kind}: {epochs} epoch{'s' * (epochs != 1)}"
        ax.plot(*zip(*shown, strict=True), style + "o", color=STAGES[place % 4], markersize=5, label=label)
        data[kind] = shown
    data["diverged"] = bad = [row["learning_rate"] for row in rows if row["diverged"]]
    if bad:
        scores = [row["score"] for row in good] or [1.0]
        worst = max(scores) if result.direction == "min" else min(scores)
        ax.plot(bad, [worst] * len(bad), "x", color=BAD, label="diverged")
    if result.learning_rate is not None:
        data |= {"answer": result.learning_rate, "interval": result.interval}
        ax.axvline(result.learning_rate, color=GOOD, linestyle="--", label=f"answer: {result.learning_rate:.2g}")
        if result.interval[1] > result.interval[0]:
            ax.axvspan(*result.interval, color=GOOD, alpha=0.2, linewidth=0)
    if result.cliff is not None:
        data["cliff"] = result.cliff
        ax.axvspan(result.cliff, max([result.cliff, *bad]) * 1.5, color=BAD, alpha=0.15, linewidth=0)
    ax.set_xscale("log")
    tidy(ax, "learning rate", result.objective, "beside")
    return finished([ax], data, files, show)
