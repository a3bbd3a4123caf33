"""Update rules in NumPy float64, written from the papers; this file shares no code with kopt.

Each takes the weight `w`, the gradient `g`, a dictionary `s` of state (empty at first) and the number `t` of the step,
and returns what to add to the weight. Hyperparameters may differ from step to step.
"""

import math
from fractions import Fraction

import numpy as np


def decayed(rule):
    """The rule with coupled decay (L2: the gradient gets `l2 w`) and decoupled decay (Loshchilov & Hutter, 2019)."""

    def step(w, g, s, t, *, weight_decay=0.0, l2=0.0, **hypers):
        return rule(w, g + l2 * w, s, t, **hypers) - hypers["learning_rate"] * weight_decay * w

    return step


@decayed
def sgd(w, g, s, t, *, learning_rate, momentum=0.0, nesterov=False, form="velocity"):
    """Polyak, 1964; Sutskever et al., 2013, with the look-ahead point x̃ = x + (what momentum adds next) stored."""
    v = s.get("v", np.zeros_like(w))
    if form == "velocity":
        s["v"] = momentum * v - learning_rate * g
        return (1 + momentum) * s["v"] - momentum * v if nesterov else s["v"]
    s["v"] = momentum * v + (g if form == "gradient" else (1 - momentum) * g)
    ahead = momentum * (s["v"] - v) if nesterov else 0.0
    return -learning_rate * (s["v"] + ahead)


@decayed
def adagrad(w, g, s, t, *, learning_rate, initial_accumulator_value=0.0, epsilon=1e-7):
    """Duchi, Hazan & Singer, 2011, the diagonal form."""
    s["c"] = s.get("c", np.full_like(w, initial_accumulator_value)) + g**2
    return -learning_rate * g / (np.sqrt(s["c"]) + epsilon)


@decayed
def rmsprop(w, g, s, t, *, learning_rate, rho=0.9, momentum=0.0, centered=False, epsilon=1e-7):
    """Tieleman & Hinton, 2012; centered: Graves, 2013, equations 38 to 41, with epsilon outside the root."""
    s["c"] = rho * s.get("c", 0.0) + (1 - rho) * g**2
    s["mean"] = rho * s.get("mean", 0.0) + (1 - rho) * g
    second = np.maximum(s["c"] - s["mean"] ** 2, 0.0) if centered else s["c"]
    s["v"] = momentum * s.get("v", 0.0) + learning_rate * g / (np.sqrt(second) + epsilon)
    return -s["v"]


@decayed
def adam(w, g, s, t, *, learning_rate, beta_1=0.9, beta_2=0.999, epsilon=1e-7, bias_correction=True, amsgrad=False):
    """Kingma & Ba, 2015, algorithm 1; AMSGrad: Reddi, Kale & Kumar, 2018, algorithm 2, with the corrections."""
    s["m"] = beta_1 * s.get("m", 0.0) + (1 - beta_1) * g
    s["v"] = beta_2 * s.get("v", 0.0) + (1 - beta_2) * g**2
    s["largest"] = np.maximum(s.get("largest", 0.0), s["v"])
    m, v = s["m"], s["largest"] if amsgrad else s["v"]
    if bias_correction:
        m, v = m / (1 - beta_1**t), v / (1 - beta_2**t)
    return -learning_rate * m / (np.sqrt(v) + epsilon)


def run(rule, w, gradients, **hypers):
    """What each step adds to the weight."""
    state, changes = {}, []
    for t, g in enumerate(gradients, start=1):
        changes.append(rule(w, np.asarray(g, "float64"), state, t, **hypers))
        w = w + changes[-1]
    return changes


# Schedules: the factor after t steps, where an epoch has `batches` and the fit `total` steps. Written one by one with
# Python's numbers, which do not round integers.


def step_decay(t, batches, total, factor, every):
    return factor ** (t // every)


def exponential(t, batches, total, rate, per):
    return math.exp(-rate * (t // batches if per == "epoch" else t / batches))


def inverse_time(t, batches, total, rate, per):
    return 1 / (1 + rate * (t // batches if per == "epoch" else t / batches))


def inverse_sqrt(t, batches, total, scale, per):
    return scale / math.sqrt(1 + (t // batches if per == "epoch" else t / batches))


def staircase(t, batches, total, boundaries, factors):
    return ([1.0] + [f for b, f in zip(boundaries, factors, strict=True) if t >= b])[-1]


def linear(t, batches, total, start, end, length=None):
    x = min(t / (length or total), 1)
    return (1 - x) * start + x * end


def polynomial(t, batches, total, power, final, length=None):
    return (1 - final) * (1 - min(t / (length or total), 1)) ** power + final


def cosine(t, batches, total, final, length=None):
    return final + (1 - final) * math.cos(math.pi / 2 * min(t / (length or total), 1)) ** 2


def warm_up(t, batches, total, length, start=0.0):
    return min(start + (1 - start) * t / length, 1.0)


def restarts(t, batches, total, length, growth, peak, final):
    i = 0
    while t >= length:
        t, length, i = t - length, length * growth, i + 1
        if growth == 1:
            i, t = i + t // length, t % length
    return final + (1 - final) * peak**i * math.cos(math.pi / 2 * t / length) ** 2


def triangles(t, batches, total, length, low, high, mode, gamma=1.0):
    half = length / 2
    cycle = math.floor(1 + t / length)
    x = abs(t / half - 2 * cycle + 1)
    scale = {"triangular": 1.0, "triangular2": 0.5 ** (cycle - 1), "exp_range": gamma**t}[mode]
    return low + (high - low) * max(0, 1 - x) * scale


def one_cycle(t, batches, total, start, final, peak_at, shape, length=None):
    n = length or total
    top = peak_at * n
    if t < top:
        a, b, x = start, 1.0, t / top
    else:
        a, b, x = 1.0, final, min((t - top) / (n - top), 1)
    return a + (b - a) * x if shape == "linear" else b + (a - b) / 2 * (math.cos(math.pi * x) + 1)


def trapezoid(t, batches, total, up, down, shape, final, length=None):
    n = length or total
    if t <= n - down:
        return min(t / up, 1.0)
    x = min((t - (n - down)) / down, 1)
    left = {"linear": 1 - x, "cosine": math.cos(math.pi / 2 * x) ** 2, "sqrt": 1 - x**0.5}[shape]
    return min(final + (1 - final) * left, t / up)


def polyak(series, momentum, every=1, warmup=None, corrected=True):
    """The average of a series of weights: V = m V + (1 - m) w, divided by what of it is data; with m = 1 their mean.

    In a warm-up m is such that 1 / (1 - m) grows along a line, from 1 at the first to its value after `warmup`.
    """
    series = [np.asarray(w, "float64") for w in series][every - 1 :: every]
    if momentum == 1:
        return sum(series) / len(series)
    m, average, known = momentum**every, 0.0, 0.0
    for i, w in enumerate(series):
        now = m
        if warmup is not None:
            now = min(m, 1 - 1 / (1 + (1 / (1 - m) - 1) * i * every / warmup))
        if not corrected:
            now = now if i else 0.0
        average, known = now * average + (1 - now) * w, now * known + (1 - now)
    return average / known


# Layers


def pooled(image, rows, columns, overlapping):
    """Fractional max pooling of one image, (height, width, channels), in regions between these edges (Graham, 2014)."""
    made = np.empty((len(rows) - 1, len(columns) - 1, image.shape[-1]))
    for i in range(len(rows) - 1):
        for j in range(len(columns) - 1):
            below, right = rows[i + 1] + overlapping, columns[j + 1] + overlapping
            made[i, j] = image[rows[i] : below, columns[j] : right].max((0, 1))
    return made


def pseudorandom_edges(last, count, u):
    """Those of the paper: `ceil(a (i + u))`, from 0."""
    edges = [math.ceil(Fraction(last, count) * (i + u)) for i in range(count + 1)]
    return [edge - edges[0] for edge in edges]


def blocks_left(begins, size):
    """DropBlock's mask of one map: 0 in each block that begins where `begins` says, else 1."""
    left = np.ones(begins.shape)
    for row, column in np.argwhere(begins):
        left[row : row + size, column : column + size] = 0
    return left
