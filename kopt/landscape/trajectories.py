"""What real optimizers do on a surface of two weights, step by step."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import keras
import numpy as np

from kopt import _keras, backends, checks, derivatives
from kopt.landscape.surfaces import Surface, surface_of
from kopt.optimizers.named import RULES, SOLVERS
from kopt.optimizers.quasi_newton.optimizer import QuasiNewton

LABELS = {
    "sgd": "SGD", "momentum": "momentum", "nesterov": "Nesterov", "adagrad": "Adagrad", "rmsprop": "RMSprop",
    "adam": "Adam", "adamw": "AdamW", "lbfgs": "L-BFGS", "bfgs": "BFGS", "ssbfgs": "SSBFGS", "ssbroyden": "SSBroyden",
}  # fmt: skip
LOWEST_RATE, HIGHEST_RATE = 1e-5, 10.0
TRIES = 19  # for each whose rate nobody has said: the first 13 half a decade apart, the others close to the best
FAR = 10.0  # so many times half the view from its middle: gone
NEAR = 1e-9  # of what there is to gain: nearer to the lowest value, scores see no difference


@dataclass(frozen=True)
class Run:
    """One optimizer on a surface.

    Attributes:
        label: What it is called.
        learning_rate: Its rate; None for one that has none, or a schedule.
        points: Where it was before the first step and after each.
        losses: The loss there.
        diverged_at: The step after which it was no number any more, or far away, and higher than at the start.
        left_at: The step after which it was far away, and lower: a surface need not have a lowest point.
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
    def end(self) -> str:
        """What became of it, if it is gone."""
        if self.diverged_at is not None:
            return f"diverged at step {self.diverged_at}"
        return "" if self.left_at is None else f"far down at step {self.left_at}"


@dataclass(frozen=True)
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
            rate = "" if run.learning_rate is None else f"{run.learning_rate:.3g}"
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
    asked = _asked(optimizers)
    tune = checks.optional(checks.count(3))("tune", tune)
    surface = surface_of(surface, start, view)
    steps = checks.optional(checks.count(1))("steps", steps) or surface.steps
    _check(surface)
    made = [(label, *_made(word, tune)) for label, word in asked]
    lowest = surface.lowest
    if lowest is None and surface.view:
        lowest = float(surface.grid(surface.view)[2].min())
    runs = [_Path(optimizer, surface, steps).found(label, tries, lowest) for label, optimizer, tries in made]
    view = surface.view or _around(runs)
    x, y, z = surface.grid(view)
    if surface.lowest is None:
        lowest = float(min(np.nanmin(z), *(np.nanmin(run.losses[: run.last]) for run in runs)))
    return Trajectories(surface, view, x, y, z, lowest, runs, steps)


def _asked(optimizers) -> list[tuple]:
    """Labels and what is meant by each: a name with a rate or without one, or an optimizer."""
    allowed = "a name, an optimizer, a list of these, or a dict from labels to them"
    if isinstance(optimizers, (str, keras.optimizers.Optimizer)):
        optimizers = [optimizers]
    if not isinstance(optimizers, (list, tuple, Mapping)) or not optimizers:
        checks.refuse("optimizers", allowed, optimizers)
    if isinstance(optimizers, Mapping):
        pairs = [(checks.sentence("optimizers", label), one) for label, one in optimizers.items()]
    else:
        pairs = [(_label(one), one) for one in optimizers]
        count, seen = Counter(label for label, _ in pairs), Counter()
        for place, (label, one) in enumerate(pairs):
            seen[label] += 1
            pairs[place] = (f"{label} {seen[label]}" if count[label] > 1 else label, one)
    for _, one in pairs:
        if not isinstance(one, (str, keras.optimizers.Optimizer)):
            checks.refuse("optimizers", allowed, one)
    return pairs


def _label(one) -> str:
    if isinstance(one, str):
        word = one.split("=")[0].strip()
        return LABELS.get(word.lower(), word)
    kind = type(one)
    return ("keras." if kind.__module__.startswith("keras") else "") + kind.__name__


def _made(one, tune):
    """The optimizer, and how many rates to try: as many as are asked for, or some if none is known to be good."""
    if not isinstance(one, str):
        return _copy(one), tune if _is_tunable(one) else None
    word, _, given = (part.strip() for part in one.partition("="))
    name = word.lower()
    if name in SOLVERS:
        if given:
            checks.refuse("optimizers", f"without a rate where there is none: {word!r}", one)
        return SOLVERS[name](check_noise=False), None  # there is none
    make = RULES.get(name) or _of_keras(word)
    if make is None:
        names = ", ".join(map(repr, [*RULES, *SOLVERS]))
        checks.refuse("optimizers", f"of {names}, or of Keras's optimizers, such as 'keras.Lion'", one)
    optimizer = make(_number(one, given) if given else 1e-3)
    return optimizer, (tune or (None if given else TRIES)) if _is_tunable(optimizer) else None


def _number(one, text):
    try:
        return float(text)
    except ValueError:
        return checks.refuse("optimizers", "with a number behind '='", one)


def _of_keras(word):
    kind = getattr(keras.optimizers, word.removeprefix("keras."), None) if word.startswith("keras.") else None
    is_one = isinstance(kind, type) and issubclass(kind, keras.optimizers.Optimizer)
    return (lambda rate: kind(learning_rate=rate)) if is_one else None


def _copy(optimizer):
    return type(optimizer).from_config(optimizer.get_config())


def _is_tunable(optimizer) -> bool:
    return not isinstance(optimizer, QuasiNewton) and _rate_of(optimizer) is not None


def _rate_of(optimizer):
    """The learning rate, if it is one number."""
    if isinstance(optimizer, QuasiNewton):
        return None
    rate = optimizer.get_config().get("learning_rate")
    return float(rate) if isinstance(rate, (int, float)) else None


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


class _Path:
    """An optimizer on its way: compiled once, for all learning rates."""

    def __init__(self, optimizer, surface, steps):
        self.optimizer, self.surface, self.rate = optimizer, surface, _rate_of(optimizer)
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

    def run(self, rate=None):
        """All points from the start on, and the loss at each."""
        for variable, value in zip(self.variables, self.begin, strict=True):
            variable.assign(value)
        if rate is not None:
            self.rate = self.optimizer.learning_rate = rate
        before = keras.ops.convert_to_numpy(self.loop()).astype("float64")
        points = np.concatenate([before, _keras.to_numpy(self.point)[None].astype("float64")])
        with np.errstate(all="ignore"):
            return points, self.surface.values(points[:, 0], points[:, 1])

    def found(self, label, tries, lowest) -> Run:
        """The run at its rate, or at the best of so many."""
        tried = self._tried(tries, lowest) if tries else {}
        points, losses = self.run(min(tried, key=tried.get) if tried else None)
        gone, is_down = self._gone(points, losses)
        ends = {} if gone is None else {"left_at" if is_down else "diverged_at": gone}
        is_search = isinstance(self.optimizer, QuasiNewton)
        return Run(label, self.rate, points, losses, tried=tried, is_search=is_search, **ends)

    def _tried(self, tries, lowest) -> dict:
        """Rates that one can write down, with the score of each: two thirds of them everywhere, then near the best."""
        coarse = np.geomspace(LOWEST_RATE, HIGHEST_RATE, max(2, tries - tries // 3))
        tried = {rate: self._score(rate, lowest) for rate in map(_short, coarse)}
        best, factor, left = min(tried, key=tried.get), coarse[1] / coarse[0], tries - len(coarse)
        for share in (np.arange(1, left + 1) - (left + 1) / 2) / ((left + 1) / 2):
            rate = _short(best * factor ** (share or 0.5 / (left + 1)))
            tried[rate] = self._score(rate, lowest)
        return tried

    def _score(self, rate, lowest) -> float:
        points, losses = self.run(rate)
        gone, is_down = self._gone(points, losses)
        if (gone is not None and not is_down) or self._jumps(points, losses):
            return np.inf
        losses = losses[: None if gone is None else gone + 1]
        least = np.nanmin(losses) if lowest is None else lowest
        gain = losses[0] - least
        left = np.clip((losses - least) / gain, NEAR, None) if gain > 0 else np.ones(1)
        left = np.append(left, [NEAR] * (len(points) - len(left)) if gain > 0 else [])
        return float(np.log(left).mean())

    def _jumps(self, points, losses) -> bool:
        """Whether it leaves the view uphill, or steps over a quarter of it: luck, where it comes down."""
        middle, half = self._view_size()
        with np.errstate(all="ignore"):
            is_in = (np.abs(points - middle) <= half).all(1)
            is_long = (np.abs(np.diff(points, axis=0)) > half / 2).any(1)
        return bool((~is_in & (losses > losses[0])).any() or (is_long & is_in[:-1]).any())

    def _gone(self, points, losses) -> tuple:
        """The step after which it is lost, if it is, and whether it was going down."""
        middle, half = self._view_size()
        with np.errstate(all="ignore"):
            lost = ~np.isfinite(points).all(1) | ~np.isfinite(losses)
            lost |= (np.abs(points - middle) > FAR * half).any(1)
        if not lost.any():
            return None, False
        gone = int(np.argmax(lost))
        last = losses[gone] if np.isfinite(losses[gone]) else losses[max(gone - 1, 0)]
        return gone, bool(last < losses[0])

    def _view_size(self):
        """The middle of the view, and half its width and height."""
        view = self.surface.view or [(at - 10, at + 10) for at in self.surface.start]
        return np.mean(view, 1), np.ptp(view, 1) / 2


def _short(rate) -> float:
    """The rate in two digits."""
    return float(f"{rate:.2g}")


def _around(runs):
    """A view that has all paths in it, with a margin."""
    points = np.concatenate([run.points[: run.last] for run in runs] + [run.points[:1] for run in runs])
    low, high = points.min(0), points.max(0)
    room = np.maximum(0.15 * (high - low), [0.1 * max(np.ptp(points, 0).max(), 1e-3)] * 2)
    return tuple((float(a), float(b)) for a, b in zip(low - room, high + room, strict=True))
