"""An optimizer going down a surface, compiled once, and the learning rates that it tries."""

from dataclasses import dataclass

import keras
import numpy as np

from kopt import _keras, backends, derivatives
from kopt.landscape import words
from kopt.optimizers.quasi_newton.optimizer import QuasiNewton

LOWEST_RATE, HIGHEST_RATE = 1e-5, 10.0
FINE = 24  # tries of which all are told apart by two digits
FAR = 10.0  # so many times half the view from its middle: gone
NEAR = 1e-9  # of what there is to gain: nearer to the lowest value, scores see no difference


@dataclass
class Way:
    """Where an optimizer went at a rate."""

    points: np.ndarray
    losses: np.ndarray
    gone: int | None  # the step after which it was lost
    is_down: bool  # whether it was lost going down


class Descent:
    """An optimizer on its way: compiled once, for all learning rates."""

    def __init__(self, optimizer, surface, steps):
        self.optimizer, self.surface = optimizer, surface
        self.point = keras.Variable(np.asarray(surface.start), dtype=keras.config.floatx(), name="point")
        optimizer.build([self.point])
        self.variables = [self.point, *optimizer.variables]
        self.begin = [backends.copied(variable) for variable in self.variables]
        self.loop = backends.repeated(self.step, self.variables, steps)

    def step(self):
        with backends.unrecorded():
            before = backends.copied(self.point)
        loss, gradient = derivatives.value_and_gradient(self.surface.of_point)(before)
        with backends.unrecorded():
            told = {"loss": loss} if isinstance(self.optimizer, QuasiNewton) else {}
            self.optimizer.apply([gradient], [self.point], **told)
        return before

    def way(self, rate=None) -> Way:
        """All points from the start on, and the loss at each, at this rate or the optimizer's own."""
        for variable, value in zip(self.variables, self.begin, strict=True):
            variable.assign(value)
        if rate is not None:
            self.optimizer.learning_rate = rate
        before = keras.ops.convert_to_numpy(self.loop()).astype("float64")
        points = np.concatenate([before, _keras.to_numpy(self.point)[None].astype("float64")])
        with np.errstate(all="ignore"):
            losses = self.surface.values(points[:, 0], points[:, 1])
        return Way(points, losses, *self._gone(points, losses))

    def coarse(self, tries) -> dict:
        """The ways at two thirds of so many rates, everywhere; without tries the way at the rate that it has."""
        if not tries:
            return {words.rate_of(self.optimizer): self.way()}
        rates = np.geomspace(LOWEST_RATE, HIGHEST_RATE, max(2, tries - tries // 3))
        return {rate: self.way(rate) for rate in _written(rates, tries)}

    def look_closer(self, ways, tries, lowest) -> None:
        """Try the rates that are left near the best."""
        if not tries:
            return
        best = min(ways, key=lambda rate: self.score(ways[rate], lowest))
        factor, left = (HIGHEST_RATE / LOWEST_RATE) ** (1 / (len(ways) - 1)), tries - len(ways)
        shares = (np.arange(1, left + 1) - (left + 1) / 2) / ((left + 1) / 2)
        shares[shares == 0] = 0.5 / (left + 1)  # the best itself is there
        ways |= {rate: self.way(rate) for rate in _written(best * factor**shares, tries)}

    def score(self, way, lowest) -> float:
        """The mean over the steps of the logarithm of what is left to gain; once it is far down, nothing is."""
        if (way.gone is not None and not way.is_down) or self._jumps(way):
            return np.inf
        losses = way.losses[: None if way.gone is None else way.gone + 1]
        gain = losses[0] - lowest
        if not gain > 0:
            return 0.0
        left = np.clip((losses - lowest) / gain, NEAR, None)
        return float(np.log(np.append(left, [NEAR] * (len(way.losses) - len(left)))).mean())

    def _within(self, points, times) -> np.ndarray:
        """Which points lie in a view so many times as large."""
        view = self.surface.view
        return (np.abs(points - np.mean(view, 1)) <= times * np.ptp(view, 1) / 2).all(1)

    def _jumps(self, way) -> bool:
        """Whether it leaves the view uphill, or steps over a quarter of it: luck, where it comes down."""
        if not self.surface.view:
            return False
        with np.errstate(all="ignore"):
            is_in = self._within(way.points, 1)
            is_long = (np.abs(np.diff(way.points, axis=0)) > np.ptp(self.surface.view, 1) / 4).any(1)
        return bool((~is_in & (way.losses > way.losses[0])).any() or (is_long & is_in[:-1]).any())

    def _gone(self, points, losses) -> tuple:
        """The step after which it is lost, if it is, and whether it was going down."""
        with np.errstate(all="ignore"):
            lost = ~np.isfinite(points).all(1) | ~np.isfinite(losses)
            if self.surface.view:
                lost |= ~self._within(points, FAR)
        if not lost[-1]:  # what comes back, as from a try of a line search, was not lost
            return None, False
        gone = len(lost) - int(np.argmin(lost[::-1]))  # the start is there
        last = losses[max(gone - 1, 0)] if losses[gone] == -np.inf else losses[gone]
        return gone, bool(last < losses[0])  # no number is no way down


def _written(rates, tries) -> list[float]:
    """The rates with no more digits than tell them apart."""
    return [float(f"{rate:.{2 if tries <= FINE else 4}g}") for rate in rates]
