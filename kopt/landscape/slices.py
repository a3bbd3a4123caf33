"""The loss of a model along lines and in planes of its weights."""

import keras
import numpy as np

from kopt import checks
from kopt.landscape.directions import Chart, Flat, chart_of, counted_in, filters_of, inner, random_directions
from kopt.landscape.evaluation import Evaluation, as_it_was, is_float
from kopt.landscape.points import points_of
from kopt.landscape.records import Plane, Slice
from kopt.objective import check_trainable


def slice_1d(
    model,
    x,
    y=None,
    *,
    points=None,
    positions=None,
    n: int = 41,
    directions: str = "filter",
    update_bn=True,
    batch_size: int = 256,
    sample_weight=None,
    seed: int = 0,
    verbose: int = 1,
) -> Slice:
    """The loss and the metrics of a model along a line of weights: between snapshots, or in a random direction.

    One set of weights is looked at along a random direction in which each filter has the length that it has in the
    weights, so that models of another scale compare (Li et al. 2018); biases, what normalization has, and what is
    frozen stay. Two are looked at along the line through them:
    a barrier says that they lie in different basins. More are joined by lines, from each to the next.

    Weights between two have no use for statistics of batch normalization between theirs: with these a network looks
    worse than it is. They are estimated anew at each position, as `kopt.update_bn` does.

    Afterwards the model is as it was, to the bit and whatever was raised: weights, statistics, metrics, random states;
    the optimizer is not touched. The data are read once and kept, but for models of several outputs on TensorFlow with
    batches of different sizes, and on several replicas: there `evaluate` reads them at each position.

    When to use it: to see whether two trainings, or two snapshots, have found the same basin, and how wide it is. A
    random direction shows little of what many weights can do; low and flat there is not low and flat everywhere.

    Args:
        model: A model that is built, and compiled with a loss.
        x: The inputs, or a Dataset, PyDataset or DataLoader with targets, as for `evaluate`. A few hundred rows do.
        y: The targets.
        points: Sets of weights, each as `get_weights()` gives it, as a model like this one, or as a file that
            `load_weights` takes; one, or a list of them, or a `kopt.Ensemble` of such models. None: the weights that
            the model has. Integers, such as counts, stay those of the model.
        positions: Where to look, those of the points beside. None: from -1 to 1 filter norms from one point, from -0.25
            to 1.25 of the way from one to another, and for more points from the first to the last; each leg counts 1.
        n: How many positions, unless `positions` says it; the points are added if they are not among them.
        directions: "filter", or "layer" for a random direction in which kernels have their lengths as a whole.
        update_bn: Whether the statistics of batch normalization are estimated anew on `x`; or other data for it.
        batch_size: How arrays are split, for the statistics as well.
        sample_weight: How much each row counts, for arrays.
        seed: What the random direction follows from, the same on all backends.
        verbose: 0 says nothing, 1 shows a bar.

    Returns:
        A `kopt.landscape.Slice`. `kopt.plot.slice_1d` draws it.

    Example:
        >>> import keras, kopt, numpy as np
        >>> x = np.linspace(-1, 1, 20)[:, None]
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(loss="mse")
        >>> ends = [[np.array([[slope]]), np.zeros(1)] for slope in (0.0, 4.0)]
        >>> found = kopt.landscape.slice_1d(model, x, 2 * x, points=ends, n=7, verbose=0)
        >>> found.lowest[0], found.barriers.tolist()
        (0.5, [0.0])

    Reference: Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018; Frankle et al., "Linear mode
    connectivity and the lottery ticket hypothesis", ICML 2020.
    """
    n, seed, verbose = _checked(n, directions, seed, verbose)
    asked = None if positions is None else _positions(positions)
    check_trainable(model)
    ends = _float_arrays(model, points)
    evaluation = Evaluation(model, (x, y, sample_weight), batch_size, update_bn)
    flat = Flat(ends, _random(model, ends[0], directions, 1, seed) if len(ends) == 1 else ())
    marks = np.arange(len(ends), dtype="float64")
    if asked is None:
        asked = np.linspace(*{1: (-1, 1), 2: (-0.25, 1.25)}.get(len(ends), (0, len(ends) - 1)), n)
    places = _with_marks(asked, marks)
    looks = [_on_line(place, len(ends)) for place in places]
    unit = {1: f"{directions} norms", 2: "share of the way"}.get(len(ends), "points passed")
    return Slice(places, _looked_at(evaluation, flat, looks, verbose), marks, unit)


def plane(
    model,
    x,
    y=None,
    *,
    points=None,
    n: int = 21,
    margin: float = 0.25,
    span: float = 1.0,
    directions: str = "filter",
    update_bn=True,
    batch_size: int = 256,
    sample_weight=None,
    seed: int = 0,
    verbose: int = 1,
) -> Plane:
    """The loss and the metrics of a model in a plane of weights: through snapshots, or in two random directions.

    One set of weights is looked at along two random directions in which each filter has the length that it has in the
    weights (Li et al. 2018); biases, what normalization has, and what is frozen stay. Two lie on the first axis, and
    the second is such a direction. Three make the plane through them (Garipov et al. 2018), with the first at the
    origin and the second on the first axis. Of more, as of the snapshots of a training, it is the plane of their two
    principal directions, and the record says how far from it each of them is. The axes are at right angles, and with
    two points or more they count the distance of weights.

    All else is as for `kopt.landscape.slice_1d`; `n * n` positions take their time.

    Args:
        model: A model that is built, and compiled with a loss.
        x: The inputs, or a Dataset, PyDataset or DataLoader with targets, as for `evaluate`. A few hundred rows do.
        y: The targets.
        points: Sets of weights, as for `kopt.landscape.slice_1d`. None: the weights that the model has.
        n: How many positions along each direction.
        margin: How much wider the square is than the points lie apart, on each side and as a share of it.
        span: How far to look from one point, in filter norms.
        directions: "filter", or "layer" for random directions in which kernels have their lengths as a whole.
        update_bn: Whether the statistics of batch normalization are estimated anew on `x`; or other data for it.
        batch_size: How arrays are split, for the statistics as well.
        sample_weight: How much each row counts, for arrays.
        seed: What the random directions follow from, the same on all backends.
        verbose: 0 says nothing, 1 shows a bar.

    Returns:
        A `kopt.landscape.Plane`. `kopt.plot.plane` draws it.

    Example:
        >>> import keras, kopt, numpy as np
        >>> x = np.linspace(-1, 1, 20)[:, None]
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(loss="mse")
        >>> corners = [[np.array([[slope]]), np.array([bias])] for slope, bias in ((0, 0), (4, 0), (0, 2))]
        >>> found = kopt.landscape.plane(model, x, 2 * x, points=corners, n=5, verbose=0)
        >>> found.points.tolist()
        [[0.0, 0.0], [4.0, 0.0], [0.0, 2.0]]

    Reference: Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018; Garipov et al., "Loss surfaces,
    mode connectivity, and fast ensembling of DNNs", NeurIPS 2018.
    """
    n, seed, verbose = _checked(n, directions, seed, verbose)
    margin, span = checks.nonnegative("margin", margin), checks.positive("span", span)
    check_trainable(model)
    ends = _float_arrays(model, points)
    evaluation = Evaluation(model, (x, y, sample_weight), batch_size, update_bn)
    chart, flat = _charted(model, ends, directions, seed)
    sides = [np.linspace(-span, span, n)] * 2 if len(ends) == 1 else _sides(chart.places, margin, n)
    count = len(flat.directions)
    at = [(chart.origin + np.array([a, b]) @ chart.along, (a, b)[2 - count :]) for b in sides[1] for a in sides[0]]
    found = _looked_at(evaluation, flat, at, verbose)
    values = {name: array.reshape(n, n, *array.shape[1:]) for name, array in found.items()}
    unit = f"{directions} norms" if len(ends) == 1 else "distance of weights"
    return Plane(*sides, values, chart.places, chart.distances, unit)


def _checked(n, directions, seed, verbose) -> tuple[int, int, int]:
    checks.one_of("filter", "layer")("directions", directions)
    return checks.count(2)("n", n), checks.count(0)("seed", seed), checks.count(0)("verbose", verbose)


def _positions(positions) -> np.ndarray:
    found = checks.several(checks.finite, "a list of finite numbers")("positions", positions)
    return np.unique(np.array(found, "float64"))


def _with_marks(asked, marks) -> np.ndarray:
    """The positions in order, those of the points among them and not beside them."""
    for mark in marks:
        asked = np.where(np.abs(asked - mark) < 1e-9, mark, asked)
    return np.union1d(asked, marks)


def _float_arrays(model, points) -> list:
    """Of each point what can move."""
    floats = [is_float(variable) for variable in model.weights]
    return [[array for array, moves in zip(point, floats, strict=True) if moves] for point in points_of(model, points)]


def _random(model, point, per, count, seed, across=()) -> list:
    return random_directions(point, filters_of(model, per), count, seed, across)


def _on_line(place, count) -> tuple:
    """The shares of the points at a position, and the steps from there."""
    if count == 1:
        return (1.0,), (place,)
    leg = int(np.clip(np.floor(place), 0, count - 2))
    shares = np.zeros(count)
    shares[leg : leg + 2] = 1 - (place - leg), place - leg
    return shares, ()


def _charted(model, ends, per, seed) -> tuple[Chart, Flat]:
    """The plane of one, two or more points, and the weights in it."""
    if len(ends) == 1:
        chart = Chart(np.ones(1), np.zeros((2, 1)), np.zeros((1, 2)), np.zeros(1))
        return chart, Flat(ends, _random(model, ends[0], per, 2, seed))
    counted = counted_in(model)
    chart = chart_of(ends, counted)
    if len(ends) > 2:
        return chart, Flat(ends)
    line = [b.astype("float64") - a if one else None for a, b, one in zip(*ends, counted, strict=True)]
    direction = _random(model, ends[0], per, 1, seed, [line])[0]
    length = np.sqrt(inner(direction, direction))
    return chart, Flat(ends, [[part if part is None else part / length for part in direction]])


def _sides(places, margin, n) -> list:
    """A square around the points."""
    low, high = places.min(0), places.max(0)
    half = (high - low).max() * (0.5 + margin)
    return [np.linspace(middle - half, middle + half, n) for middle in (low + high) / 2]


def _looked_at(evaluation, flat, looks, verbose) -> dict:
    """The loss and the metrics at each of some mixtures; the model is as it was afterwards."""
    bar = keras.utils.Progbar(len(looks), unit_name="position") if verbose else None
    found: dict = {}
    with as_it_was(evaluation.model):
        for done, look in enumerate(looks, 1):
            for name, value in evaluation(flat.at(*look)).items():
                found.setdefault(name, []).append(value)
            if bar is not None:
                bar.update(done)
    return {name: np.array(values) for name, values in found.items()}
