"""Pictures of what was found about learning rates."""

import numpy as np

from kopt import checks
from kopt.plot.axes import axes
from kopt.range_test import RangeTest

MARKS = {"valley": "#0072B2", "steepest": "#009E73", "minimum/10": "#E69F00"}
STAGES = ["#56B4E9", "#0072B2", "#004466", "#000000"]


def range_test(record, *, ax=None):
    """Draw a range test: each loss, the smoothed ones, and the rates that are suggested.

    Args:
        record: What `kopt.find_learning_rate` returns.
        ax: The axes of matplotlib to draw in; None makes a new figure.

    Returns:
        The axes.

    Example:
        >>> import numpy as np, kopt
        >>> rates = np.geomspace(1e-4, 10, 60)
        >>> ax = kopt.plot.range_test(kopt.RangeTest(rates, 1 / (1 + 100 * rates) + rates**2, initial_loss=1.0))
        >>> ax.get_xscale()
        'log'
    """
    if not isinstance(record, RangeTest):
        checks.refuse("record", "a kopt.RangeTest, as kopt.find_learning_rate returns it", record)
    ax = axes(ax)
    ax.plot(record.learning_rates, record.losses, ".", color="#BBBBBB", markersize=4, label="loss of a batch")
    ax.plot(record.smoothed_learning_rates, record.smoothed_losses, color="#000000", label="smoothed")
    for name, rate in record.suggestions.items():
        if rate is not None:
            ax.axvline(rate, color=MARKS[name], linestyle="--", label=f"{name}: {rate:.2g}")
    if record.diverged_at is not None:
        ax.axvspan(record.diverged_at, record.diverged_at * 1.5, color="#D55E00", alpha=0.3, label="exploded")
    if record.finite:
        low, high = record.smoothed_losses.min(), max(record.start, np.median(record.smoothed_losses))
        ax.set_ylim(low - 0.15 * (high - low), high + 0.6 * (high - low) + 1e-12)
    ax.set_xscale("log")
    _finish(ax, "loss")
    return ax


def search(result, *, ax=None):
    """Draw a search for a learning rate: the trials of each stage, what diverged, and the answer.

    Where several batch sizes were tried, the trials are those of the one that was chosen.

    Args:
        result: The `result` of a `kopt.tuner.LearningRateSearch`.
        ax: The axes of matplotlib to draw in; None makes a new figure.

    Returns:
        The axes.

    Example:
        >>> import kopt, kopt.tuner
        >>> rows = [{"kind": "stage 1", "learning_rate": 10.0**-i, "score": abs(i - 2.0), "diverged": i == 0,
        ...          "epochs": 1, "batch_size": None, "seed": 0, "status": "COMPLETED"} for i in range(5)]
        >>> result = kopt.tuner.SearchResult(
        ...     "val_loss", "min", 0.01, None, (0.01, 0.01), 0.1, 1.0, 0.0, 0.0, rows, [], [])
        >>> [line.get_label() for line in kopt.plot.search(result).lines]
        ['stage 1: 1 epoch', 'diverged', 'answer: 0.01']
    """
    if not hasattr(result, "trials") or not hasattr(result, "cliff"):
        checks.refuse("result", "the `result` of a kopt.tuner.LearningRateSearch", result)
    rows = [row for row in result.trials if row["kind"] != "range test" and row["status"] == "COMPLETED"]
    if result.learning_rate is not None:
        rows = [row for row in rows if row["batch_size"] == result.batch_size]
    ax = axes(ax)
    good = [row for row in rows if row["score"] is not None and not row["diverged"]]
    kinds = list(dict.fromkeys(row["kind"] for row in good))
    for place, kind in enumerate(kinds):
        shown = sorted((row["learning_rate"], row["score"]) for row in good if row["kind"] == kind)
        epochs = next(row["epochs"] for row in good if row["kind"] == kind)
        style = "-" if kind.startswith("stage") else ""
        label = f"{kind}: {epochs} epoch{'s' * (epochs != 1)}"
        ax.plot(*zip(*shown, strict=True), style + "o", color=STAGES[place % 4], markersize=5, label=label)
    bad = [row["learning_rate"] for row in rows if row["diverged"]]
    if bad:
        scores = [row["score"] for row in good] or [1.0]
        worst = max(scores) if result.direction == "min" else min(scores)
        ax.plot(bad, [worst] * len(bad), "x", color="#D55E00", label="diverged")
    if result.learning_rate is not None:
        ax.axvline(result.learning_rate, color="#009E73", linestyle="--", label=f"answer: {result.learning_rate:.2g}")
        if result.interval[1] > result.interval[0]:
            ax.axvspan(*result.interval, color="#009E73", alpha=0.2)
    if result.cliff is not None:
        ax.axvspan(result.cliff, max([result.cliff, *bad]) * 1.5, color="#D55E00", alpha=0.15)
    ax.set_xscale("log")
    _finish(ax, result.objective)
    return ax


def _finish(ax, quantity) -> None:
    ax.set_xlabel("learning rate")
    ax.set_ylabel(quantity)
    ax.grid(alpha=0.3)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)  # beside, where no curve is
