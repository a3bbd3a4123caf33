"""What the loss of a model is along a line, or in a plane, of weights: records of numbers."""

import dataclasses

import numpy as np

from kopt import checks

NORMS = "filter norms", "layer norms"  # what positions along random directions count


def _array(value, dtype=None):
    found = np.array(value, dtype)
    found.flags.writeable = False
    return found


class _Record:
    def _hold(self, *names) -> None:
        for name in names:
            object.__setattr__(self, name, _array(getattr(self, name), "float64"))
        object.__setattr__(self, "values", {name: _array(value) for name, value in self.values.items()})

    def _check_values(self, shape) -> None:
        if "loss" not in self.values or any(value.shape[: len(shape)] != shape for value in self.values.values()):
            found = {name: value.shape for name, value in self.values.items()}
            checks.refuse("values", f"arrays by name, of the shape {shape}, one of them the loss", found)

    @property
    def loss(self) -> np.ndarray:
        return self.values["loss"]

    def _place(self):
        """Where the loss is lowest; None if it is nowhere finite."""
        finite = np.isfinite(self.loss)
        return np.unravel_index(np.argmin(np.where(finite, self.loss, np.inf)), finite.shape) if finite.any() else None


@dataclasses.dataclass(frozen=True, eq=False)
class Slice(_Record):
    """The loss of a model along a line of weights, as `kopt.landscape.slice_1d` finds it.

    A loss that is infinite or no number is kept as it is. `kopt.plot.slice_1d(record)` draws it.

    Args:
        positions: Where on the line, in rising order.
        values: The loss and each metric by name, an array with a value for each position.
        marks: The positions of the points that the line goes through, all of them among `positions`.
        unit: What positions count: "share of the way", "points passed", "filter norms" or "layer norms".

    Attributes:
        loss: `values["loss"]`.
        lowest: The position at which the loss is lowest, and that loss; None if it is nowhere finite.
        barriers: For each leg from point to point how far the loss rises above the straight line between the losses of
            its ends, and never less than 0 (Frankle et al. 2020). What is not finite counts as infinite between the
            ends; where an end is not finite there is no barrier, but NaN.

    Example:
        >>> import kopt, numpy as np
        >>> positions = np.linspace(0, 1, 5)
        >>> record = kopt.landscape.Slice(
        ...     positions, {"loss": [1.0, 2.0, 3.0, 2.0, 0.0]}, [0, 1], "share of the way")
        >>> record.barriers.tolist()
        [2.5]
        >>> print(record)
        Slice of 5 positions: the loss is lowest at 1, 0; barrier 2.5
    """

    positions: np.ndarray
    values: dict
    marks: np.ndarray
    unit: str

    def __post_init__(self):
        self._hold("positions", "marks")
        checks.one_of("share of the way", "points passed", *NORMS)("unit", self.unit)
        if self.positions.ndim != 1 or not (np.diff(self.positions) > 0).all():
            checks.refuse("positions", "numbers that rise", self.positions)
        if not np.isin(self.marks, self.positions).all() or not (np.diff(self.marks) > 0).all():
            checks.refuse("marks", "some of `positions`, rising", self.marks)
        self._check_values(self.positions.shape)

    @property
    def lowest(self) -> tuple[float, float] | None:
        place = self._place()
        return None if place is None else (float(self.positions[place]), float(self.loss[place]))

    def leg(self, i) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The positions from one point to the next, the loss there, and the straight line between the ends."""
        places = np.flatnonzero((self.positions >= self.marks[i]) & (self.positions <= self.marks[i + 1]))
        x, loss = self.positions[places], self.loss[places]
        share = (x - x[0]) / (x[-1] - x[0])
        with np.errstate(invalid="ignore"):
            return x, loss, loss[0] + share * (loss[-1] - loss[0])

    @property
    def barriers(self) -> np.ndarray:
        found = []
        for i in range(len(self.marks) - 1):
            _, loss, straight = self.leg(i)
            with np.errstate(invalid="ignore"):
                rises = np.where(np.isfinite(loss), loss, np.inf) - straight
            found.append(np.max(rises[1:-1], initial=0.0) if np.isfinite(loss[[0, -1]]).all() else np.nan)
        return np.array(found)

    def __str__(self):
        found = f"Slice of {len(self.positions)} positions: {_lowest(self.lowest)}"
        if len(self.marks) > 1:
            found += f"; barrier{'s' * (len(self.marks) > 2)} {', '.join(f'{one:.4g}' for one in self.barriers)}"
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Plane(_Record):
    """The loss of a model in a plane of weights, as `kopt.landscape.plane` finds it.

    A loss that is infinite or no number is kept as it is. `kopt.plot.plane(record)` draws it.

    Args:
        x: The coordinates along the first direction, in rising order.
        y: The coordinates along the second, which is at right angles to it.
        values: The loss and each metric by name, `values[name][i, j]` at `y[i]` and `x[j]`.
        points: The coordinates of each point, a row each.
        distances: How far each point is from the plane: 0 unless there are more than three.
        unit: What coordinates count: "distance of weights", "filter norms" or "layer norms".

    Attributes:
        loss: `values["loss"]`.
        lowest: The `x` and `y` at which the loss is lowest, and that loss; None if it is nowhere finite.

    Example:
        >>> import kopt, numpy as np
        >>> x, y = np.linspace(-1, 1, 3), np.linspace(0, 2, 3)
        >>> record = kopt.landscape.Plane(
        ...     x, y, {"loss": x**2 + y[:, None]}, points=[[0, 0]], distances=[0], unit="filter norms")
        >>> print(record)
        Plane of 3 x 3 positions: the loss is lowest at (0, 0), 0
    """

    x: np.ndarray
    y: np.ndarray
    values: dict
    points: np.ndarray
    distances: np.ndarray
    unit: str

    def __post_init__(self):
        self._hold("x", "y", "points", "distances")
        checks.one_of("distance of weights", *NORMS)("unit", self.unit)
        for name in ("x", "y"):
            if getattr(self, name).ndim != 1 or not (np.diff(getattr(self, name)) > 0).all():
                checks.refuse(name, "numbers that rise", getattr(self, name))
        if self.points.shape != (len(self.distances), 2):
            checks.refuse("points", "a row of two numbers for each of `distances`", self.points)
        self._check_values((len(self.y), len(self.x)))

    @property
    def lowest(self) -> tuple[float, float, float] | None:
        place = self._place()
        return None if place is None else (float(self.x[place[1]]), float(self.y[place[0]]), float(self.loss[place]))

    def __str__(self):
        found = f"Plane of {len(self.x)} x {len(self.y)} positions: {_lowest(self.lowest)}"
        if self.distances.any():
            found += f"; the points are up to {self.distances.max():.4g} away from it"
        return found


def _lowest(lowest) -> str:
    if lowest is None:
        return "the loss is nowhere finite"
    *place, loss = (f"{number:.4g}" for number in lowest)
    return f"the loss is lowest at {place[0] if len(place) == 1 else '(' + ', '.join(place) + ')'}, {loss}"
