"""Problems of unconstrained minimisation, each a sum of squares, for every backend.

All 35 of Moré, Garbow & Hillstrom, "Testing unconstrained optimization software", ACM Transactions on Mathematical
Software 7 (1981), in their order and under their numbers, and two others at the end. An `x` of float64 asks for
JAX_ENABLE_X64=1 on JAX.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops


@dataclass(frozen=True)
class Problem:
    name: str
    start: tuple | list
    residuals: Callable  # of a tensor x, in its dtype; the function to minimise is the sum of their squares
    optima: tuple[float, ...]  # the known values of local minima, the best first; the paper has their first digits


PROBLEMS: list[Problem] = []


def problem(start, *optima, name=None):
    """Add the function of residuals below to PROBLEMS, under its own name if no other is given."""

    def add(residuals):
        floats = tuple(float(value) for value in start)
        PROBLEMS.append(Problem(name or residuals.__name__.replace("_", "-"), floats, residuals, optima))
        return residuals

    return add


def value_and_grad(problem):
    """The function that takes a tensor x to the value and the gradient there, compiled on TensorFlow and JAX."""

    def value(x):
        return ops.sum(ops.square(problem.residuals(x)))

    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(jax.value_and_grad(value))
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.function
        def both(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                f = value(x)
            return f, tape.gradient(f, x)

        return both
    import torch

    def both(x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            f = value(x)
        return f.detach(), torch.autograd.grad(f, x)[0]

    return both


def on_numpy(problem, dtype):
    """The same from a NumPy array to a NumPy scalar and array, computed in `dtype`."""
    function = value_and_grad(problem)

    def both(x):
        f, g = function(ops.convert_to_tensor(np.asarray(x, dtype), dtype))
        return ops.convert_to_numpy(f)[()], np.array(ops.convert_to_numpy(g))

    return both


def const(values, x):
    """The constants as a tensor of x's dtype."""
    return ops.convert_to_tensor(np.asarray(values, "float64"), x.dtype)


def upto(n):
    """1, ..., n, as floats."""
    return np.arange(1.0, n + 1)


def wide(name, x):
    """sin, cos or arctan, which `keras.ops` computes in float32 on JAX for an x of float64."""
    if keras.backend.backend() == "jax":
        import jax.numpy as jnp

        return getattr(jnp, name)(x)
    return getattr(ops, name)(x)


@problem((-1.2, 1), 0.0)
def rosenbrock(x):
    """(1) Rosenbrock"""
    return ops.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


@problem((0.5, -2), 0.0, 48.98425367924)
def freudenstein_roth(x):
    """(2) Freudenstein and Roth"""
    a, b = x[0], x[1]
    return ops.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


@problem((0, 1), 0.0)
def powell_badly_scaled(x):
    """(3) Powell badly scaled"""
    return ops.stack([1e4 * x[0] * x[1] - 1, ops.exp(-x[0]) + ops.exp(-x[1]) - 1.0001])


@problem((1, 1), 0.0)
def brown_badly_scaled(x):
    """(4) Brown badly scaled"""
    return ops.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


@problem((1, 1), 0.0)
def beale(x):
    """(5) Beale"""
    return ops.stack([y - x[0] * (1 - x[1] ** i) for i, y in ((1, 1.5), (2, 2.25), (3, 2.625))])


@problem((0.3, 0.4), 124.36218235561)
def jennrich_sampson(x):
    """(6) Jennrich and Sampson, m = 10"""
    i = const(upto(10), x)
    return 2 + 2 * i - (ops.exp(i * x[0]) + ops.exp(i * x[1]))


@problem((-1, 0, 0), 0.0)
def helical_valley(x):
    """(7) Helical valley"""
    half = ops.cast(x[0] < 0, x.dtype) / 2
    theta = wide("arctan", x[1] / x[0]) / (2 * np.pi) + half
    return ops.stack([10 * (x[2] - 10 * theta), 10 * (ops.sqrt(x[0] ** 2 + x[1] ** 2) - 1), x[2]])


BARD = [0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39]


@problem((1, 1, 1), 8.214877306579e-3, 17.428693)
def bard(x):
    """(8) Bard; the second minimum is at infinity"""
    u = upto(15)
    v = 16 - u
    w = np.minimum(u, v)
    return const(BARD, x) - (x[0] + const(u, x) / (const(v, x) * x[1] + const(w, x) * x[2]))


GAUSSIAN = [0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521]


@problem((0.4, 1, 0), 1.127932769619e-8)
def gaussian(x):
    """(9) Gaussian"""
    t = const((8 - upto(15)) / 2, x)
    return x[0] * ops.exp(-x[1] * (t - x[2]) ** 2 / 2) - const([*GAUSSIAN, 0.3989, *GAUSSIAN[::-1]], x)


MEYER = [
    34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872,
]  # fmt: skip


@problem((0.02, 4000, 250), 87.94585517067)
def meyer(x):
    """(10) Meyer"""
    t = const(45 + 5 * upto(16), x)
    return x[0] * ops.exp(x[1] / (t + x[2])) - const(MEYER, x)


@problem((5, 2.5, 0.15), 0.0)
def gulf(x):
    """(11) Gulf research and development, m = 99, without the factor m i that the paper has in error"""
    t = upto(99) / 100
    y = const(25 + (-50 * np.log(t)) ** (2 / 3), x)
    return ops.exp(-(ops.abs(y - x[1]) ** x[2]) / x[0]) - const(t, x)


@problem((0, 10, 20), 0.0)
def box_3d(x):
    """(12) Box three-dimensional, m = 10"""
    t = upto(10) / 10
    s = const(t, x)
    return ops.exp(-s * x[0]) - ops.exp(-s * x[1]) - x[2] * const(np.exp(-t) - np.exp(-10 * t), x)


@problem((3, -1, 0, 1), 0.0)
def powell_singular(x):
    """(13) Powell singular"""
    a, b, c, d = (x[i] for i in range(4))
    return ops.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])


@problem((-3, -1, -3, -1), 0.0)
def wood(x):
    """(14) Wood"""
    a, b, c, d = (x[i] for i in range(4))
    first = [10 * (b - a**2), 1 - a, 90**0.5 * (d - c**2), 1 - c]
    return ops.stack([*first, 10**0.5 * (b + d - 2), 10**-0.5 * (b - d)])


KOWALIK_OSBORNE = [
    [0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246],
    [4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625],
]


@problem((0.25, 0.39, 0.415, 0.39), 3.075056038492e-4, 1.027342e-3)
def kowalik_osborne(x):
    """(15) Kowalik and Osborne; the second minimum is at infinity"""
    y, u = (const(row, x) for row in KOWALIK_OSBORNE)
    return y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


@problem((25, 5, -5, -1), 85822.20162636)
def brown_dennis(x):
    """(16) Brown and Dennis, m = 20"""
    t = upto(20) / 5
    first = x[0] + const(t, x) * x[1] - const(np.exp(t), x)
    return first**2 + (x[2] + x[3] * const(np.sin(t), x) - const(np.cos(t), x)) ** 2


OSBORNE_1 = [
    0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685, 0.658, 0.628, 0.603,
    0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411,
    0.406,
]  # fmt: skip


@problem((0.5, 1.5, -1, 0.01, 0.02), 5.464894697482e-5)
def osborne_1(x):
    """(17) Osborne 1"""
    t = const(10 * (upto(33) - 1), x)
    return const(OSBORNE_1, x) - (x[0] + x[1] * ops.exp(-t * x[3]) + x[2] * ops.exp(-t * x[4]))


@problem((1, 2, 1, 1, 1, 1), 0.0, 5.6556499255e-3)
def biggs_exp6(x):
    """(18) Biggs EXP6, m = 13"""
    t = upto(13) / 10
    s, y = const(t, x), const(np.exp(-t) - 5 * np.exp(-10 * t) + 3 * np.exp(-4 * t), x)
    return x[2] * ops.exp(-s * x[0]) - x[3] * ops.exp(-s * x[1]) + x[5] * ops.exp(-s * x[4]) - y


OSBORNE_2 = [
    1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608, 0.655, 0.616, 0.606,
    0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423,
    0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668,
    0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098,
    0.054,
]  # fmt: skip


@problem((1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5), 4.013773629355e-2)
def osborne_2(x):
    """(19) Osborne 2"""
    t = const((upto(65) - 1) / 10, x)
    peaks = [x[i] * ops.exp(-((t - x[i + 7]) ** 2) * x[i + 4]) for i in (1, 2, 3)]
    return const(OSBORNE_2, x) - (x[0] * ops.exp(-t * x[4]) + sum(peaks))


@problem([0] * 12, 4.72238e-10, name="watson-12")
@problem([0] * 9, 1.39976e-6, name="watson-9")
@problem([0] * 6, 2.28767e-3, name="watson-6")
def watson(x):
    """(20) Watson"""
    j = np.arange(x.shape[0])
    powers = (upto(29) / 29)[:, None] ** j
    derivatives = j[1:] * powers[:, :-1]
    first = ops.sum(const(derivatives, x) * x[1:], axis=1) - ops.sum(const(powers, x) * x, axis=1) ** 2 - 1
    return ops.concatenate([first, ops.stack([x[0], x[1] - x[0] ** 2 - 1])])


@problem([-1.2, 1] * 50, 0.0)
def extended_rosenbrock(x):
    """(21) Extended Rosenbrock, n = 100"""
    a, b = x[::2], x[1::2]
    return ops.concatenate([10 * (b - a**2), 1 - a])


@problem([3, -1, 0, 1] * 3, 0.0)
def extended_powell(x):
    """(22) Extended Powell singular, n = 12"""
    a, b, c, d = (x[i::4] for i in range(4))
    return ops.concatenate([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])


@problem(upto(10), 7.087651467090e-5)
def penalty_1(x):
    """(23) Penalty I, n = 10"""
    return ops.concatenate([1e-5**0.5 * (x - 1), ops.stack([ops.sum(x**2) - 0.25])])


@problem([0.5] * 10, 2.936605374567e-4)
def penalty_2(x):
    """(24) Penalty II, n = 10"""
    n, a = x.shape[0], 1e-5**0.5
    i, e = upto(n), ops.exp(x / 10)
    y = const(np.exp(i[1:] / 10) + np.exp(i[:-1] / 10), x)
    pairs, singles = a * (e[1:] + e[:-1] - y), a * (e[1:] - float(np.exp(-0.1)))
    return ops.concatenate([x[:1] - 0.2, pairs, singles, ops.stack([ops.sum(const(n - i + 1, x) * x**2) - 1])])


@problem(1 - upto(10) / 10, 0.0)
def variably_dimensioned(x):
    """(25) Variably dimensioned, n = 10"""
    weighted = ops.sum(const(upto(x.shape[0]), x) * (x - 1))
    return ops.concatenate([x - 1, ops.stack([weighted, weighted**2])])


@problem([0.1] * 10, 0.0, 2.795056121877e-5)
def trigonometric(x):
    """(26) Trigonometric, n = 10; the second minimum is not in the paper"""
    n, c = x.shape[0], wide("cos", x)
    return n - ops.sum(c) + const(upto(n), x) * (1 - c) - wide("sin", x)


@problem([0.5] * 10, 0.0)
def brown_almost_linear(x):
    """(27) Brown almost linear, n = 10"""
    n = x.shape[0]
    product = math.prod(x[i] for i in range(n))  # ops.prod computes in float32 on PyTorch
    return ops.concatenate([x[:-1] + ops.sum(x) - (n + 1), ops.stack([product - 1])])


ELEVENTHS = upto(10) / 11


@problem(ELEVENTHS * (ELEVENTHS - 1), 0.0)
def discrete_boundary_value(x):
    """(28) Discrete boundary value, n = 10"""
    h = 1 / (x.shape[0] + 1)
    beside = ops.pad(x, ((1, 1),))
    return 2 * x - beside[:-2] - beside[2:] + h**2 * (x + const(ELEVENTHS + 1, x)) ** 3 / 2


@problem(ELEVENTHS * (ELEVENTHS - 1), 0.0)
def discrete_integral_equation(x):
    """(29) Discrete integral equation, n = 10"""
    h, t = 1 / (x.shape[0] + 1), ELEVENTHS
    kernel = np.minimum.outer(t, t) * (1 - np.maximum.outer(t, t))
    return x + h * ops.sum(const(kernel, x) * (x + const(t + 1, x)) ** 3, axis=1) / 2


@problem([-1] * 10, 0.0)
def broyden_tridiagonal(x):
    """(30) Broyden tridiagonal, n = 10"""
    beside = ops.pad(x, ((1, 1),))
    return (3 - 2 * x) * x - beside[:-2] - 2 * beside[2:] + 1


@problem([-1] * 10, 0.0)
def broyden_banded(x):
    """(31) Broyden banded, n = 10: five places below the diagonal and one above"""
    n = x.shape[0]
    band = np.tri(n, k=1) - np.tri(n, k=-6) - np.eye(n)
    return x * (2 + 5 * x**2) + 1 - ops.sum(const(band, x) * (x * (1 + x)), axis=1)


@problem([1] * 10, 10.0)
def linear_full_rank(x):
    """(32) Linear, full rank, n = 10, m = 20"""
    return ops.pad(x, ((0, 10),)) - 2 / 20 * ops.sum(x) - 1


@problem([1] * 10, 20 * 19 / (2 * 41))
def linear_rank_1(x):
    """(33) Linear, rank 1, n = 10, m = 20"""
    return const(upto(20), x) * ops.sum(const(upto(10), x) * x) - 1


@problem([1] * 10, (20**2 + 3 * 20 - 6) / (2 * 37))
def linear_rank_1_with_zeros(x):
    """(34) Linear, rank 1 with zero columns and rows, n = 10, m = 20"""
    return const([*range(19), 0], x) * ops.sum(const(upto(9)[1:], x) * x[1:-1]) - 1


@problem(upto(8) / 9, 3.516873725678e-3)
def chebyquad(x):
    """(35) Chebyquad, n = 8: the shifted Chebyshev polynomials by their recurrence"""
    n, z = x.shape[0], 2 * x - 1
    before, now, residuals = ops.ones_like(x), z, []
    for i in range(1, n + 1):
        residuals.append(ops.sum(now) / n - (0 if i % 2 else -1 / (i**2 - 1)))
        before, now = now, 2 * z * now - before
    return ops.stack(residuals)


@problem([-1.2, 1] * 25, 0.0, 3.98662385)
def chained_rosenbrock(x):
    """Rosenbrock's function of each pair of neighbours, n = 50"""
    return ops.concatenate([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


@problem((0, 0), 0.0)
def himmelblau(x):
    """Himmelblau, with four minima of the same value"""
    return ops.stack([x[0] ** 2 + x[1] - 11, x[0] + x[1] ** 2 - 7])
