"""Where to look from a set of weights: random directions, and the planes that several sets lie in."""

from typing import NamedTuple

import keras
import numpy as np

from kopt import _keras, batch_norm, checks
from kopt.landscape.evaluation import is_float

L = keras.layers
APART = 1e-12  # squares of lengths below this share of the longest are nothing but rounding
DEPTHWISE = L.DepthwiseConv1D, L.DepthwiseConv2D
TRANSPOSED = L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose


class Flat:
    """Weights in a line or a plane: mixtures of points, and steps from there along directions.

    Args:
        points: Sets of weights, each the arrays of the float variables.
        directions: The same; None stands for a variable that does not move.
    """

    def __init__(self, points, directions=()):
        self.points, self.directions = points, directions

    def at(self, shares, steps=()) -> list:
        """The weights with so much of each point, and so far along each direction."""
        return [self._one(place, shares, steps) for place in range(len(self.points[0]))]

    def _one(self, place, shares, steps):
        parts = [(share, point[place]) for share, point in zip(shares, self.points, strict=True)]
        parts += [(step, direction[place]) for step, direction in zip(steps, self.directions, strict=True)]
        parts = [(much, array) for much, array in parts if much and array is not None]
        with np.errstate(over="ignore", invalid="ignore"):
            return sum(much * array.astype("float64") for much, array in parts).astype(self.points[0][place].dtype)


def filters_of(model, per: str) -> list:
    """For each float variable the axes that one filter of it has, or None if it does not move.

    Biases, and all else of one dimension, as what normalization has, do not move: they have no scale to go by.

    Args:
        model: The model.
        per: What is a filter: "filter", what leads to one neuron, or "layer", the whole kernel.
    """
    trained = {id(variable) for variable in model.trainable_variables}
    owners = {id(own): layer for layer in _keras.layers_of(model) for own in _keras.own_weights(layer)}
    found = []
    for variable in filter(is_float, model.weights):
        rank = len(variable.shape)
        if rank < 2 or variable.name == "bias" or id(variable) not in trained:
            found.append(None)
        else:
            kept = () if per == "layer" else _of_one(owners.get(id(variable)), variable)
            found.append(tuple(axis for axis in range(rank) if axis not in {place % rank for place in kept}))
    return found


def _of_one(layer, variable) -> tuple:
    """The axes along which there is one filter after the other."""
    if isinstance(layer, L.Embedding):
        return (0,)
    if isinstance(layer, TRANSPOSED):
        return (-2,)
    if isinstance(layer, DEPTHWISE) or variable is getattr(layer, "depthwise_kernel", None):
        return (-2, -1)
    if isinstance(layer, L.EinsumDense) and layer.bias is not None:  # such as a neuron of each head of attention
        return tuple(range(-len(layer.bias.shape), 0))
    return (-1,)


def random_directions(point, filters, count: int, seed: int, across=()) -> list:
    """Directions in which each filter has the length that it has in the point, at right angles to each other.

    Args:
        point: The weights.
        filters: The axes of a filter of each; see `filters_of`.
        count: How many.
        seed: What the directions follow from.
        across: Other directions that they are at right angles to.
    """
    random, found = np.random.default_rng(seed), []
    weights = [None if axes is None else array.astype("float64") for array, axes in zip(point, filters, strict=True)]
    for _ in range(count):
        drawn = [None if w is None else random.standard_normal(w.shape) for w in weights]
        direction = _scaled(drawn, weights, filters)
        others = [*across, *found]
        for _ in range(8 * bool(others)):  # by turns, until both are true; the right angles last
            direction = _apart(_scaled(direction, weights, filters), others)
        if not inner(direction, direction) > APART * inner(weights, weights):
            allowed = f"such that its kernels have {count + len(across)} weights at least, finite and not all zero"
            checks.refuse("points", allowed, f"kernels of the shapes {[w.shape for w in weights if w is not None]}")
        found.append(direction)
    return found


def _scaled(direction, weights, filters) -> list:
    """The direction with the lengths of the filters."""

    def one(d, w, axes):
        lengths = [np.sqrt(np.sum(np.square(part), axis=axes, keepdims=True)) for part in (w, d)]
        return d * (lengths[0] / np.where(lengths[1] > 0, lengths[1], 1))

    each = zip(direction, weights, filters, strict=True)
    return [None if axes is None else one(d, w, axes) for d, w, axes in each]


def _apart(direction, others) -> list:
    """The direction without what it has of others."""
    for other in others:
        other = [o if d is not None else None for d, o in zip(direction, other, strict=True)]  # as far as it can move
        share = inner(direction, other) / (inner(other, other) or 1.0)
        direction = [d if d is None or o is None else d - share * o for d, o in zip(direction, other, strict=True)]
    return direction


def inner(one, other) -> float:
    """The inner product of two directions."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return float(sum(np.sum(a.astype("float64") * b) for a, b in pairs))


def counted_in(model) -> list[bool]:
    """Which float variables count for the distance of weights: all but the statistics of batch normalization."""
    layers = batch_norm.layers_of(model)
    statistics = {id(one) for layer in layers for one in (layer.moving_mean, layer.moving_variance)}
    return [id(variable) not in statistics for variable in model.weights if is_float(variable)]


class Chart(NamedTuple):
    """A plane as mixtures of points: `origin + x * along[0] + y * along[1]` are the shares of the points.

    `places` are the coordinates of the points, and `distances` how far they are from the plane.
    """

    origin: np.ndarray
    along: np.ndarray
    places: np.ndarray
    distances: np.ndarray


def chart_of(points, counted) -> Chart:
    """The plane through three points, or that of the two principal directions of more; the line through two."""
    products = _products(points, counted)
    size = products.diagonal().max()
    if not 0 < size < np.inf:
        checks.refuse("points", "sets of finite weights that differ", f"{len(points)} sets, {size:g} apart")
    return _through(products, size) if len(points) <= 3 else _principal(products, size)


def _products(points, counted) -> np.ndarray:
    """The inner products of what each point differs from the first in."""
    total = np.zeros((len(points), len(points)))
    for place in np.flatnonzero(counted):
        rows = np.stack([point[place].astype("float64").reshape(-1) for point in points])
        with np.errstate(invalid="ignore"):
            rows = rows - rows[0]
        total += rows @ rows.T
    return total


def _through(products, size) -> Chart:
    """The first point is the origin, the second lies on the first axis, the third above it."""
    count = len(products)
    length = np.sqrt(products[1, 1])
    if products[1, 1] <= APART * size:
        checks.refuse("points", "sets of weights of which the first two differ", length)
    along, places = np.zeros((2, count)), np.zeros((count, 2))
    along[0, :2], places[1, 0] = (-1 / length, 1 / length), length
    if count == 3:
        share = products[1, 2] / products[1, 1]
        height = products[2, 2] - share * products[1, 2]
        _check_height(height, size)
        along[1] = np.array([share - 1, -share, 1]) / np.sqrt(height)
        places[2] = share * length, np.sqrt(height)
    return Chart(np.eye(count)[0], along, places, np.zeros(count))


def _principal(products, size) -> Chart:
    """The mean is the origin, and the last point lies to the right of the first, and above it."""
    count = len(products)
    center = np.eye(count) - 1 / count
    centered = center @ products @ center
    squares, vectors = np.linalg.eigh(centered)
    squares, vectors = squares[:-3:-1], vectors[:, :-3:-1]
    _check_height(squares[1], size)
    vectors = vectors * np.where(vectors[-1] < vectors[0], -1, 1)
    places = vectors * np.sqrt(squares)
    rest = np.maximum(centered.diagonal() - np.sum(places**2, 1), 0)
    rest[rest <= APART * size] = 0
    return Chart(np.full(count, 1 / count), (center @ vectors / np.sqrt(squares)).T, places, np.sqrt(rest))


def _check_height(square, size) -> None:
    if not square > APART * size:
        checks.refuse("points", "sets of weights that are not all on one line", f"{np.sqrt(max(square, 0)):g} off it")
