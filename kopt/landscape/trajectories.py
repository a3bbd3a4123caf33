"""What real optimizers do on a surface of two weights, step by step."""

from dataclasses import dataclass, field

import keras
import numpy as np

from kopt import backends, checks, derivatives
from kopt.landscape import words
from kopt.landscape.descent import Descent
from kopt.landscape.surfaces import Surface, surface_of
from kopt.optimizers.quasi_newton.optimizer import QuasiNewton


@dataclass(frozen=True, eq=False)
class Run:
    """One optimizer on a surface.

    Attributes:
        label: What it is called.
        learning_rate: Its rate; None for one that has none, or a schedule.
        points: Where it was before the first step and after each.
        losses: The loss there.
        diverged_at: The step after which it was no number any more, or far away, and higher than at the start.
        left_at: The step after which it was far away, ten times beyond the view, and lower: a surface need not have a
            lowest point. On one without a view nothing but numbers that are not finite ends a run.
        tried: The rates that were tried with the score of each, less is better; empty if nothing was tuned.
        is_search: Whether a step is one evaluation of a line search, of which the points are what it tried.
    """

    label: str
    learning_rate: float | None
    points: np.ndarray
    losses: np.ndarray
    diverged_at: int | None = None
    left_at: int | None = None
    tried: dict = field(default_factory=dict)
    is_search: bool = False

    @property
    def last(self) -> int:
        """The number of steps that it went on for."""
        ends = [step for step in (self.diverged_at, self.left_at) if step is not None]
        return ends[0] if ends else len(self.losses) - 1

    @property
    def there(self) -> slice:
        """The points before it was gone."""
        return slice(max(1, self.last) if self.end else len(self.losses))

    @property
    def end(self) -> str:
        """What became of it, if it is gone."""
        if self.diverged_at is not None:
            return f"diverged at step {self.diverged_at}"
        return "" if self.left_at is None else f"far down at step {self.left_at}"


@dataclass(frozen=True, eq=False)
class Trajectories:
    """What `kopt.landscape.trajectories` has found; `kopt.plot.trajectories(record)` draws it, `print` makes a table.

    Attributes:
        surface: The surface.
        view: What of it to show.
        x: The coordinates of a grid over the view, from left to right.
        y: From bottom to top.
        z: The loss at its points, a row for each `y`.
        lowest: The lowest value that is known of, the zero of a logarithmic axis.
        runs: A `Run` for each optimizer.
        steps: How many steps each did.

    Example:
        >>> import kopt
        >>> print(kopt.landscape.trajectories(["sgd=0.1", "momentum=1"], "plateau", steps=30))
        a plateau, 30 steps from (-2.8, 2.2)
          SGD                   0.1  loss in the end 0.998
          momentum                1  loss in the end 0.276
    """

    surface: Surface
    view: tuple
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    lowest: float
    runs: list[Run]
    steps: int

    def __str__(self):
        lines = [f"{self.surface.name}, {self.steps} steps from ({self.surface.start[0]:g}, {self.surface.start[1]:g})"]
        for run in self.runs:
            rate = "" if run.learning_rate is None else f"{run.learning_rate:g}"
            lines.append(f"  {run.label:<16} {rate:>8}  {run.end or f'loss in the end {run.losses[-1]:.3g}'}")
        return "\n".join(lines)


def trajectories(optimizers, surface="beale", *, steps=None, start=None, view=None, tune=None) -> Trajectories:
    """Run optimizers on a surface of two weights, each compiled as in training, and keep every point.

    Optimizers are run as they are, by their own `apply`; copies, so that those given are not touched. One step is one
    gradient, of L-BFGS and its kin too: for these the points are what the line search tries.

    A rule that is given by its name alone gets the best of 19 learning rates, 13 of them spread over 1e-5 to 10 and six
    around the best of these. Best is what has the lowest mean over the steps of the logarithm of what is left to gain;
    a rate does not count with which it diverges, leaves the view uphill, or steps over a quarter of it at once.

    Args:
        optimizers: One or a list of: names ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw",
            "lbfgs", "bfgs", "ssbfgs", "ssbroyden", or "keras.Lion" for any of Keras's), names with a rate
            ("adam=0.1"), and optimizers of Keras or kopt. A dict gives them labels.
        surface: "saddle", "beale", "long_valley", "rosenbrock", "himmelblau", "rastrigin", "bowl" (ill-conditioned, and
            not along the axes), "plateau"; a function of two tensors `x` and `y`, or of one with both, made of
            `keras.ops`; or a `Surface`.
        steps: How many; by default what tells something on the surface.
        start: Where to begin, two numbers.
        view: What to show, `((left, right), (bottom, top))`.
        tune: Find the learning rate of every optimizer in so many tries, the same number for all, also of those with a
            rate. What has none, or a schedule, stays as it is.

    Example:
        >>> import kopt
        >>> found = kopt.landscape.trajectories(["momentum", kopt.Adam(0.1)], "beale", steps=5)
        >>> [(run.label, run.points.shape) for run in found.runs]
        [('momentum', (6, 2)), ('Adam', (6, 2))]
        >>> found.runs[1].points[1].round(2).tolist()
        [0.9, 1.4]
    """
    asked = words.asked(optimizers)
    tune = checks.optional(checks.count(3))("tune", tune)
    surface = surface_of(surface, start, view)
    steps = checks.optional(checks.count(1))("steps", steps) or surface.steps
    _check(surface)
    made = [(label, *words.made(one, tune)) for label, one in asked]
    descents = [Descent(optimizer, surface, steps) for _, optimizer, _ in made]
    found = [descent.coarse(tries) for descent, (*_, tries) in zip(descents, made, strict=True)]
    lowest = _lowest(surface, [way for ways in found for way in ways.values()])
    for descent, ways, (*_, tries) in zip(descents, found, made, strict=True):
        descent.look_closer(ways, tries, lowest)
    runs = [_run(label, *of, lowest) for (label, *_), *of in zip(made, descents, found, strict=True)]
    view = surface.view or _around(runs)
    x, y, z = surface.grid(view)
    if surface.lowest is None:
        lowest = float(min([_least(z), *(_least(run.losses[run.there]) for run in runs)]))
    return Trajectories(surface, view, x, y, z, lowest, runs, steps)


def _least(values) -> float:
    """The lowest finite number."""
    return float(np.min(values, where=np.isfinite(values), initial=np.inf))


def _lowest(surface, ways) -> float:
    """The lowest value that is known of before it is known where runs end: what rates are judged by."""
    if surface.lowest is not None:
        return surface.lowest
    if surface.view:
        return _least(surface.grid(surface.view)[2])
    return min(_least(way.losses) for way in ways)


def _run(label, descent, ways, lowest) -> Run:
    """The best of the ways; the only one, if nothing was tuned."""
    tried = {rate: descent.score(way, lowest) for rate, way in ways.items()} if len(ways) > 1 else {}
    rate = min(tried, key=tried.get) if tried else next(iter(ways))
    way = ways[rate]
    ends = {} if way.gone is None else {"left_at" if way.is_down else "diverged_at": way.gone}
    is_search = isinstance(descent.optimizer, QuasiNewton)
    return Run(label, rate, way.points, way.losses, tried=tried, is_search=is_search, **ends)


def _check(surface) -> None:
    """See that the function gives one number, and has a gradient, where optimizers begin."""
    point = keras.ops.convert_to_tensor(np.asarray(surface.start), keras.config.floatx())
    allowed = "a function of two tensors, made of `keras.ops` and operators, that gives one number with a gradient"
    try:
        found = backends.compiled(derivatives.value_and_gradient(surface.of_point))(point)
        numbers = np.concatenate([np.ravel(keras.ops.convert_to_numpy(one)) for one in found]).astype("float64")
    except Exception as error:
        raise ValueError(f"`surface` must be {allowed}. Received: surface={surface.name!r}: {error}") from error
    if not np.isfinite(numbers).all():
        checks.refuse("start", "a point at which the loss and its gradient are finite", surface.start)


def _low(run) -> int:
    """How many points there are to look at."""
    if run.diverged_at is None:
        return run.there.stop
    return 1 + int(np.flatnonzero(run.losses[run.there] <= run.losses[0])[-1])


def _around(runs):
    """A view that has all paths in it, with a margin; of those that diverge what is no higher than the start."""
    points = np.concatenate([run.points[: _low(run)] for run in runs])
    low, high = points.min(0), points.max(0)
    room = np.maximum(0.15 * (high - low), 0.1 * np.ptp(points, 0).max() or 1.0)
    return tuple((float(a), float(b)) for a, b in zip(low - room, high + room, strict=True))
