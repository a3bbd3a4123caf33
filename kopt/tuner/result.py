"""What a search for a learning rate has found, as a record of plain data: a table, a Markdown report."""

import csv
import dataclasses
import math

from kopt import checks
from kopt.range_test import RangeTest


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The trials of a `kopt.tuner.LearningRateSearch`, and what follows from them.

    `str` of it is a table; `kopt.plot.search(result)` draws it.

    Args:
        objective: What was looked at.
        direction: "min" or "max".
        learning_rate: The rate to train with; None if every one diverged.
        batch_size: The batch size to train with, if several were tried.
        interval: The rates that are as good, as far as is known.
        stable_max: The highest rate below `cliff` that did not diverge.
        cliff: The lowest rate above `learning_rate` that diverged.
        score: The mean objective over the fresh seeds at the rate; without confirmation, of the one training.
        error: Its standard error.
        trials: A dict for each trial: `kind`, `learning_rate`, `batch_size`, `epochs`, `seed`, `score`, `diverged` and
            `status`.
        notes: Why ranges were widened, and what else happened.
        range_tests: The records of the range tests.
        is_complete: Whether the search has ended.

    Example:
        >>> import kopt.tuner
        >>> row = {"kind": "stage 1", "learning_rate": 0.01, "batch_size": None, "epochs": 2, "seed": 0,
        ...        "score": 0.25, "diverged": False, "status": "COMPLETED"}
        >>> print(kopt.tuner.SearchResult(
        ...     "val_loss", "min", 0.01, None, (0.01, 0.01), 0.01, None, 0.25, None, [row], []))
        trial              rate        epochs  val_loss
        stage 1        1.00e-02             2  0.25
        <BLANKLINE>
        Learning rate 0.01: val_loss 0.25.
        No higher rate diverged.
    """

    objective: str
    direction: str
    learning_rate: float | None
    batch_size: int | None
    interval: tuple[float, float] | None
    stable_max: float | None
    cliff: float | None
    score: float | None
    error: float | None
    trials: list[dict]
    notes: list[str]
    range_tests: list[RangeTest] = dataclasses.field(default_factory=list)
    is_complete: bool = True

    def table(self) -> str:
        """The trials in lines, each kind by rate."""
        kinds = list(dict.fromkeys(row["kind"] for row in self.trials))
        rows = sorted(self.trials, key=lambda row: (kinds.index(row["kind"]), row["learning_rate"]))
        has_sizes = any(row["batch_size"] for row in rows)
        lines = [f"{'trial':12s} {'rate':>10s} {'batch' if has_sizes else '':>6s} {'epochs':>6s}  {self.objective}"]
        for row in rows:
            rate = "" if row["kind"] == "range test" else f"{row['learning_rate']:.2e}"
            size = f"{row['batch_size'] or ''}" if has_sizes else ""
            lines.append(f"{row['kind']:12s} {rate:>10s} {size:>6s} {row['epochs'] or '':>6}  {_value(row)}".rstrip())
        return "\n".join(lines)

    def verdict(self) -> list[str]:
        """The answer in sentences."""
        if self.learning_rate is None:
            return ["No learning rate was found." if self.is_complete else "The search has not ended."]
        size = f", batch size {self.batch_size}" if self.batch_size else ""
        spread = f" ± {self.error:.2g}" if self.error else ""
        lines = [f"Learning rate {self.learning_rate:.3g}{size}: {self.objective} {self.score:.4g}{spread}."]
        low, high = self.interval
        if high > low:
            within = ", within a standard error" if self.error is not None else ""
            lines.append(f"The rates from {low:.2g} to {high:.2g} are as good{within}.")
        if self.cliff:
            times = self.cliff / self.learning_rate
            lines.append(f"The lowest rate above it that diverged is {self.cliff:.2g}, {times:.1f} times as high.")
        else:
            lines.append("No higher rate diverged.")
        return lines

    def report(self, path=None) -> str:
        """A report in Markdown, written to a file if `path` says where."""
        lines = ["# Search for a learning rate", "", *self.verdict(), ""]
        lines += [f"- {note}" for note in self.notes]
        lines += ["", "| trial | learning rate | batch size | epochs | seed | " + self.objective + " |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in self.trials:
            rate = "" if row["kind"] == "range test" else f"{row['learning_rate']:.3e}"
            cells = row["kind"], rate, row["batch_size"] or "", row["epochs"] or "", row["seed"]
            lines.append("| " + " | ".join(map(str, (*cells, _value(row)))) + " |")
        lines += ["", *(f"{record}." for record in self.range_tests)]
        text = "\n".join(lines).rstrip() + "\n"
        if path is not None:
            with open(checks.path("path", path), "w", encoding="utf-8") as file:
                file.write(text)
        return text

    def to_csv(self, path) -> None:
        """The trials as a table for other programs."""
        with open(checks.path("path", path), "w", newline="", encoding="utf-8") as file:
            names = ["kind", "learning_rate", "batch_size", "epochs", "seed", "score", "diverged", "status"]
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.trials)

    def __str__(self):
        return "\n".join([self.table(), "", *self.notes, *self.verdict()])

    def __repr__(self):
        return f"<SearchResult of {len(self.trials)} trials: {' '.join(self.verdict())}>"


def _value(row) -> str:
    if row["status"] != "COMPLETED":
        return row["status"].lower()
    if row["kind"] == "range test":
        return ""
    score = row["score"]
    return "diverged" if row["diverged"] else f"{score:.4g}" if score is not None and math.isfinite(score) else "-"
