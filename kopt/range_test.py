"""What a learning-rate range test has found: a record of numbers, and the rates that it suggests."""

import dataclasses
import functools
import math

import numpy as np

from kopt import checks
from kopt.numerics import exponentially_weighted_average

ENDS = {
    "end": "the whole range was tried",
    "diverged": "the loss exploded",
    "data": "`fit` or its data ended before the range did",
}
SURE = 3.0  # standard errors by which a loss must have fallen to count


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """The learning rates that a range test has tried, and the loss after each.

    Losses and rates are smoothed with the same weights, an exponentially weighted average with bias correction, so that
    the smoothed curve lags behind in neither: a point of it is the mean loss at the mean (logarithm of the) rate of the
    same steps. All suggestions are read from it, up to its minimum. They are None where the loss has not fallen by more
    than its noise. `kopt.plot.rate_range(record)` draws it.

    Args:
        learning_rates: The rate of each update.
        losses: The loss of the batch that comes after each update.
        initial_loss: The loss of the first batch, before any update.
        stopped: Why it ended: "end", "diverged" or "data".
        beta: How much the past weighs in a smoothed point.

    Attributes:
        valley: The middle, on a log scale, of the stretch in which the smoothed loss makes the middle four fifths of
            its fall.
        steepest: The rate at which the smoothed loss falls fastest per factor of the rate.
        minimum_tenth: A tenth of the rate at the minimum of the smoothed loss.
        suggestion: The valley, the steadiest of the three.
        diverged_at: The rate at which the loss exploded; None if it has not.

    Example:
        >>> import numpy as np, kopt
        >>> rates = np.geomspace(1e-4, 10, 60)
        >>> losses = 1 / (1 + 100 * rates) + rates**2
        >>> record = kopt.RangeTest(rates, losses, initial_loss=1.0, beta=0.5)
        >>> f"{record.valley:.3f} {record.steepest:.3f} {record.minimum_tenth:.3f}"
        '0.007 0.010 0.017'
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    initial_loss: float
    stopped: str = "end"
    beta: float = 0.9

    def __post_init__(self):
        for name in ("learning_rates", "losses"):
            series = np.array(getattr(self, name), "float64").reshape(-1)
            series.flags.writeable = False
            object.__setattr__(self, name, series)
        object.__setattr__(self, "initial_loss", float(self.initial_loss))
        if len(self.losses) != len(self.learning_rates):
            checks.refuse("losses", f"{len(self.learning_rates)} numbers, as many as rates", self.losses)
        checks.one_of(*ENDS)("stopped", self.stopped)
        checks.fraction("beta", self.beta)

    @functools.cached_property
    def finite(self) -> int:
        """How many losses there are before the first that is not finite."""
        bad = np.flatnonzero(~np.isfinite(self.losses))
        return int(bad[0]) if len(bad) else len(self.losses)

    @functools.cached_property
    def smoothed_learning_rates(self) -> np.ndarray:
        rates = self.learning_rates[: self.finite]
        return np.exp(exponentially_weighted_average(np.log(rates), self.beta))

    @functools.cached_property
    def smoothed_losses(self) -> np.ndarray:
        return exponentially_weighted_average(self.losses[: self.finite], self.beta)

    @functools.cached_property
    def start(self) -> float:
        """The loss at the beginning of the range: a tenth of it, where the smallest rates have changed nothing yet."""
        first = self._first()
        return float(np.mean(first)) if len(first) else math.nan

    def _first(self) -> np.ndarray:
        first = np.append(self.initial_loss, self.losses[: max(2, self.finite // 10)])
        return first[np.isfinite(first)]

    @functools.cached_property
    def lowest(self) -> int | None:
        """Where the smoothed loss is lowest, if it has fallen by more than its noise."""
        if self.finite < 3:
            return None
        place = int(np.argmin(self.smoothed_losses + SURE * self.errors))
        fall = self.start - self.smoothed_losses[place]
        error = math.hypot(self.errors[place], self._noise() / math.sqrt(len(self._first())))
        return place if fall > max(SURE * error, 1e-3 * abs(self.start)) else None

    def _noise(self) -> float:
        """How far the loss of a batch is off: slow changes drop out of differences, few large ones of a median."""
        return float(np.median(np.abs(np.diff(self.losses[: self.finite])))) * 1.05

    @functools.cached_property
    def errors(self) -> np.ndarray:
        """The standard error of each smoothed loss."""
        counts = np.arange(1, self.finite + 1)
        share = (1 - self.beta) / (1 + self.beta) * (1 + self.beta**counts) / (1 - self.beta**counts)
        return self._noise() * np.sqrt(share)

    def has_exploded(self, explode) -> bool:
        """Whether the last loss is not finite, or has risen, smoothed and beyond its noise, by `explode` times what it
        was at first, or what it has fallen by if that is more."""
        if self.finite < len(self.losses):
            return True
        if self.finite < max(3, 1 / (1 - self.beta)):
            return False
        best = min(self.smoothed_losses.min(), self.start)
        rise = self.smoothed_losses[-1] - best - SURE * self.errors[-1]
        return bool(rise > explode * max(abs(self.start), self.start - best))

    @functools.cached_property
    def falling(self) -> slice | None:
        """The stretch in which the smoothed loss makes the middle four fifths of its fall."""
        if self.lowest is None:
            return None
        losses = self.smoothed_losses[: self.lowest + 1]
        share = (self.start - losses) / (self.start - losses[-1])
        begin = int(np.flatnonzero(share < 0.1)[-1]) if (share < 0.1).any() else 0
        return slice(begin, begin + int(np.argmax(share[begin:] >= 0.9)) + 1)

    @property
    def valley(self) -> float | None:
        if self.falling is None:
            return None
        rates = self.smoothed_learning_rates[self.falling]
        return float(math.sqrt(rates[0] * rates[-1]))

    @property
    def steepest(self) -> float | None:
        if self.falling is None:
            return None
        stretch = slice(self.falling.start, max(self.falling.stop, self.falling.start + 2))
        rates, losses = np.log(self.smoothed_learning_rates[stretch]), self.smoothed_losses[stretch]
        place = int(np.argmin(np.diff(losses) / np.diff(rates)))
        return float(np.exp((rates[place] + rates[place + 1]) / 2))

    @property
    def minimum_tenth(self) -> float | None:
        return None if self.lowest is None else float(self.smoothed_learning_rates[self.lowest] / 10)

    @property
    def suggestion(self) -> float | None:
        return self.valley

    @property
    def suggestions(self) -> dict[str, float | None]:
        return {"valley": self.valley, "steepest": self.steepest, "minimum/10": self.minimum_tenth}

    @property
    def diverged_at(self) -> float | None:
        return float(self.learning_rates[-1]) if self.stopped == "diverged" and len(self.learning_rates) else None

    def to_dict(self) -> dict:
        """Plain numbers and lists, for JSON; infinities and NaN as None."""
        numbers = [float(loss) if np.isfinite(loss) else None for loss in self.losses]
        initial = self.initial_loss if math.isfinite(self.initial_loss) else None
        fields = {"learning_rates": self.learning_rates.tolist(), "losses": numbers, "initial_loss": initial}
        return fields | {"stopped": self.stopped, "beta": self.beta}

    @classmethod
    def from_dict(cls, fields: dict) -> "RangeTest":
        """The record that `to_dict` has written."""
        losses = [math.nan if loss is None else loss for loss in fields["losses"]]
        initial = math.nan if fields["initial_loss"] is None else fields["initial_loss"]
        return cls(**fields | {"losses": losses, "initial_loss": initial})

    def __str__(self):
        rates = self.learning_rates
        tried = f"{len(rates)} rates from {rates[0]:.2g} to {rates[-1]:.2g}" if len(rates) else "no rate"
        if self.lowest is None:
            found = "the loss did not fall by more than its noise: no suggestion"
        else:
            found = ", ".join(f"{name} {rate:.2g}" for name, rate in self.suggestions.items())
        return f"Range test of {tried} ({ENDS[self.stopped]}): {found}"

    def __repr__(self):
        return f"<{self}>"

    def __eq__(self, other):
        if not isinstance(other, RangeTest):
            return NotImplemented
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return all(np.array_equal(a, b, equal_nan=not isinstance(a, str)) for a, b in zip(mine, theirs, strict=True))

    __hash__ = None
