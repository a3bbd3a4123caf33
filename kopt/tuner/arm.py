"""What was tried in a search for a learning rate, with one batch size, and where it looks next."""

import dataclasses
import math

import numpy as np

FLAT = 0.01  # of the untrained score, by which somebody must have moved
TIE = 1e-6  # of a score, by which rates of the whole first range must differ if they have moved anything
NEAR = 0.2  # decades within which rates count as neighbours


@dataclasses.dataclass(frozen=True)
class Item:
    """One trial."""

    kind: str  # "range test", "stage 1", "confirm", "cliff"
    learning_rate: float
    epochs: int
    seed: int
    batch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of it."""

    score: float
    diverged: bool = False
    failed: bool = False
    untrained: float | None = None
    suggestion: float | None = None  # of a range test, as is the next
    diverged_at: float | None = None

    @property
    def is_good(self) -> bool:
        return not (self.diverged or self.failed) and math.isfinite(self.score)

    @property
    def is_flat(self) -> bool:
        """Whether the training has not changed the score of the untrained model."""
        known = self.untrained is not None and math.isfinite(self.untrained)
        return known and abs(self.score - self.untrained) <= FLAT * abs(self.untrained)


class Arm:
    """The search for one batch size."""

    def __init__(self, batch_size, low, high):
        self.batch_size, self.low, self.high = batch_size, low, high
        self.bottom = low  # below which nothing has asked to look
        self.carried: float | None = None  # the best of the last stage, which the next one tries again
        self.is_within = False  # whether the next rate above that one was worse
        self.tried: list[tuple[Item, Outcome]] = []
        self.exploded = False  # whether a range test has found an end of the range

    def results(self, kind) -> list[tuple[Item, Outcome]]:
        return sorted((pair for pair in self.tried if pair[0].kind == kind), key=lambda pair: pair[0].learning_rate)

    def good(self, kind) -> list[tuple[Item, Outcome]]:
        return [pair for pair in self.results(kind) if pair[1].is_good]

    def ranked(self, kind) -> list[tuple[Item, Outcome]]:
        """The good ones, best first, each seen with its neighbours: a single one near the cliff is a matter of luck."""
        results = [pair for pair in self.results(kind) if pair[1].is_good or pair[1].diverged]
        known = np.array([outcome.score for _, outcome in results if outcome.is_good])
        if not len(known):
            return []
        best, span = known.min(), np.ptp(known) or 1.0
        # what diverged counts as worse than the worst by all that they span
        scores = [(outcome.score - best) / span if outcome.is_good else 2.0 for _, outcome in results]
        logs = np.log10([item.learning_rate for item, _ in results])
        weights = np.exp(-0.5 * np.square((logs[:, None] - logs) / NEAR))
        around = np.round(weights @ scores / weights.sum(1), 9)  # so that ties are ties on every machine
        order = np.argsort(around, kind="stable")
        return [results[place] for place in order if results[place][1].is_good]

    def best(self, kind) -> tuple[Item, Outcome] | None:
        return next(iter(self.ranked(kind)), None)

    @property
    def is_flat(self) -> bool:
        """Whether no training so far has changed the score of the untrained model."""
        return all(outcome.is_flat for item, outcome in self.tried if outcome.is_good and item.kind != "range test")

    def edge(self, kind) -> tuple[str, str] | None:
        """Where the range must grow, "up" or "down", and why; None if the best lies within."""
        good, best = self.good(kind), self.best(kind)
        if best is None:
            return ("down", "all have diverged") if any(one.diverged for _, one in self.results(kind)) else None
        scores = [outcome.score for _, outcome in good]
        is_tied = len(good) > 1 and np.ptp(scores) <= TIE * abs(scores[0])
        is_unmoved = self.is_flat or (kind == "stage 1" and is_tied)
        cliff = self.bounds((good[-1] if is_unmoved else best)[0].learning_rate)[1]
        ends = cliff is not None and cliff <= self.high
        if is_unmoved:
            return None if ends else ("up", "none has moved the model")
        is_again = best[0].learning_rate == self.carried
        if is_again and len(self.results(kind)) == 1:  # all that was asked for
            return None
        if best is good[-1] and not ends:
            return None if is_again and self.is_within else ("up", "the best is the highest")
        return ("down", "the best is the lowest") if best is good[0] and scores[:1] != scores[1:2] else None

    def bounds(self, above=0.0) -> tuple[float | None, float | None]:
        """The lowest rate above one that diverged, and before it the highest below that did not."""
        diverged = [item.learning_rate for item, outcome in self.tried if outcome.diverged]
        cliff = min((rate for rate in diverged if rate > above), default=math.inf)
        stable = [item.learning_rate for item, outcome in self.tried if outcome.is_good and item.kind != "range test"]
        below = max((rate for rate in stable if rate < cliff), default=None)
        return below, cliff if math.isfinite(cliff) else None

    def narrow(self, kind, longer) -> None:
        """Look around the best, and at it again, between its neighbours; where it has none, within the range.

        Trainings that are so many times `longer` go as far with a rate so many times lower: that one is in it, too.
        Where none has moved the model, the highest that is stable counts as the best.
        """
        results, (best, found) = self.results(kind), self.good(kind)[-1] if self.is_flat else self.best(kind)
        rates, step = [item.learning_rate for item, _ in results], math.sqrt(10)
        place = rates.index(best.learning_rate)
        above = results[place + 1] if place + 1 < len(rates) else None
        self.low = rates[place - 1] if place else max(self.low, best.learning_rate / step)
        self.high = above[0].learning_rate if above else min(self.high, best.learning_rate * step)
        if not self.is_flat:
            self.low = min(self.low, max(self.bottom, best.learning_rate / longer))
            self.carried = best.learning_rate
            self.is_within = above is not None and not (above[1].is_good and above[1].score <= found.score)
