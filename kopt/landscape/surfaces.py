"""Surfaces in two dimensions to watch an optimizer on."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import keras
import numpy as np
from keras import ops

from kopt import checks

GRID = 161  # points to a side
SHAPES = {
    "start": "two numbers",
    "minima": "a list of pairs of numbers",
    "view": "two pairs, ((left, right), (bottom, top))",
}


@dataclass(frozen=True)
class Surface:
    """A loss with two weights, and what of it to look at.

    Args:
        function: Of `x` and `y`, two tensors, or, if it can do with one argument, of one tensor that has both; made of
            `keras.ops` and operators.
        start: Where optimizers begin.
        view: What to show, `((left, right), (bottom, top))`; None: what the paths are in.
        name: What it is called.
        minima: Where its minima are, if that is known.
        lowest: Its lowest value, if it has one and that is known.
        steps: How many steps tell something.

    Example:
        >>> import kopt
        >>> bowl = kopt.landscape.Surface(lambda x, y: x**2 + 4 * y**2, start=(-2, 1), view=((-3, 3), (-2, 2)))
        >>> kopt.landscape.trajectories(["sgd=0.1"], bowl, steps=10).runs[0].points[-1].round(2).tolist()
        [-0.21, 0.0]
    """

    function: Callable
    start: tuple[float, float] = (1.0, 1.0)
    view: tuple[tuple[float, float], tuple[float, float]] | None = None
    name: str = "a surface"
    minima: tuple = ()
    lowest: float | None = None
    steps: int = 200

    def __post_init__(self):
        if not callable(self.function):
            checks.refuse("function", "a function of two tensors", self.function)
        start = _pair("start", self.start)
        view = self.view if self.view is None else tuple(_span(self.view, part) for part in _two(self.view))
        if view and not all(low <= at <= high for at, (low, high) in zip(start, view, strict=True)):
            checks.refuse("start", f"within the view, {view}", self.start)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "view", view)
        object.__setattr__(self, "minima", tuple(_pair("minima", one) for one in checks.listed("minima", self.minima)))
        checks.optional(checks.finite)("lowest", self.lowest)
        checks.sentence("name", self.name)
        checks.count(1)("steps", self.steps)

    def of_point(self, point):
        """The loss of a vector of two."""
        return ops.reshape(self.function(point[0], point[1]) if self.is_of_two else self.function(point), ())

    @property
    def is_of_two(self) -> bool:
        return checks.takes(self.function, 2) and not checks.takes(self.function, 1)

    @functools.cached_property
    def takes_arrays(self) -> bool:
        """Whether the function of arrays is that of each entry: some make one number of all, or branch on one."""
        if not self.is_of_two:
            return False
        points = np.asarray(self.start) + np.random.default_rng(0).normal(size=(7, 2))
        x, y = _tensors(*points.T)
        try:
            together = ops.convert_to_numpy(ops.convert_to_tensor(self.function(x, y)))
        except Exception:  # whatever a function raises that takes one point at a time
            return False
        alone = [float(ops.convert_to_numpy(self.of_point(point))) for point in _tensors(points)[0]]
        return together.shape == (7,) and np.allclose(together, alone, rtol=1e-4, atol=1e-6, equal_nan=True)

    def values(self, x, y) -> np.ndarray:
        """The loss at points whose coordinates lie in two arrays of one shape."""
        if self.takes_arrays:
            return ops.convert_to_numpy(self.function(*_tensors(x, y))).astype("float64")
        points = _tensors(np.stack([np.ravel(x), np.ravel(y)], 1))[0]
        try:
            found = ops.vectorized_map(self.of_point, points)
        except Exception:  # as for a branch on torch: one by one, slowly
            found = ops.stack([self.of_point(point) for point in points])
        return ops.convert_to_numpy(found).astype("float64").reshape(np.shape(x))

    def grid(self, view) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The coordinates of a grid over a view, and the loss at its points, rows first."""
        x, y = (np.linspace(*span, GRID) for span in view)
        return x, y, self.values(*np.meshgrid(x, y))


def _tensors(*arrays) -> list:
    return [ops.convert_to_tensor(np.asarray(array, "float64"), keras.config.floatx()) for array in arrays]


def _two(value) -> list:
    parts = list(value) if isinstance(value, (list, tuple, np.ndarray)) else []
    return parts if len(parts) == 2 else checks.refuse("view", SHAPES["view"], value)


def _span(view, part) -> tuple[float, float]:
    low, high = _pair("view", part)
    return (low, high) if low < high else checks.refuse("view", "two pairs that rise, (left, right) first", view)


def _pair(name, value) -> tuple[float, float]:
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) != 2:
        checks.refuse(name, SHAPES[name], value)
    first, second = (checks.finite(name, part) for part in value)
    return first, second


def saddle(x, y):
    return x**2 - y**2


def beale(x, y):
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def long_valley(x, y):
    return 5 * y**2 + 0.1 * (ops.sqrt(1 + (x - 4) ** 2) - 1)


def rosenbrock(x, y):
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def himmelblau(x, y):
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def rastrigin(x, y):
    return 20 + x**2 + y**2 - 10 * (ops.cos(2 * math.pi * x) + ops.cos(2 * math.pi * y))


def bowl(x, y):
    """A hundred times as steep one way as the other, and not along the axes."""
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    return 0.5 * (cos * x + sin * y) ** 2 + 50 * (cos * y - sin * x) ** 2


def plateau(x, y):
    return 1 - ops.exp(-(x**2 + y**2) / 2)


HIMMELBLAU = (3.0, 2.0), (-2.805118, 3.131312), (-3.779310, -3.283186), (3.584428, -1.848126)
SURFACES = {
    "saddle": Surface(saddle, (-1.0, 1e-3), ((-1.5, 1.5), (-1.5, 1.5)), "a saddle", steps=120),
    "beale": Surface(beale, (1.0, 1.5), ((-1.0, 4.5), (-1.5, 2.0)), "Beale's function", ((3.0, 0.5),), 0.0),
    "long_valley": Surface(long_valley, (-4.0, 0.8), ((-5.0, 6.0), (-1.2, 1.2)), "a long valley", ((4.0, 0.0),), 0.0),
    "rosenbrock": Surface(
        rosenbrock, (-1.2, 1.0), ((-2.0, 2.0), (-1.0, 3.0)), "Rosenbrock's function", ((1.0, 1.0),), 0.0, steps=300
    ),
    "himmelblau": Surface(
        himmelblau, (-0.5, -1.0), ((-5.0, 5.0), (-5.0, 5.0)), "Himmelblau's function", HIMMELBLAU, 0.0, steps=100
    ),
    "rastrigin": Surface(
        rastrigin, (-2.3, 3.4), ((-4.5, 4.5), (-4.5, 4.5)), "Rastrigin's function", ((0.0, 0.0),), 0.0
    ),
    "bowl": Surface(bowl, (-4.0, 1.5), ((-5.0, 5.0), (-4.0, 4.0)), "an ill-conditioned bowl", ((0.0, 0.0),), 0.0),
    "plateau": Surface(plateau, (-2.8, 2.2), ((-4.0, 4.0), (-4.0, 4.0)), "a plateau", ((0.0, 0.0),), 0.0),
}


def surface_of(given, start=None, view=None) -> Surface:
    """The surface that is meant by a name, a function or a `Surface`, with another start or view if that is given."""
    if isinstance(given, str):
        given = SURFACES[checks.one_of(*SURFACES)("surface", given.replace("-", "_"))]
    elif not isinstance(given, Surface):
        if not callable(given) or isinstance(given, type):
            names = ", ".join(map(repr, SURFACES))
            checks.refuse("surface", f"one of {names}, a function of two tensors, or a Surface", given)
        name = getattr(given, "__name__", "")
        given = Surface(given, name="a surface" if name in ("", "<lambda>") else name.replace("_", " "))
    return replace(given, start=given.start if start is None else start, view=given.view if view is None else view)
