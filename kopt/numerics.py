"""Arithmetic that rules, plots and finders share: tensors (or numbers) in, tensors (or numbers) out."""

import math

import numpy as np
from keras import config, ops
from keras.config import backend

from kopt import backends, checks


def lerp(a, b, weight):
    """The point that lies `weight` of the way from `a` to `b`."""
    if backend() == "torch" and isinstance(weight, float) and ops.is_tensor(a) and ops.is_tensor(b):
        return a.lerp(b, weight)  # the same in one operation
    return a + weight * (b - a)


def larger(a, b):
    """The larger of `a` and `b`, NaN where `b` is NaN; `ops.maximum` on torch rounds float64 to float32."""
    return ops.where(a >= b, a, b)


def behind(weight, master):
    """The wide weight behind a narrow one: its master, but where one of them was assigned from outside."""
    return ops.where(ops.cast(master, weight.dtype) == weight, master, ops.cast(weight, master.dtype))


def bias_correction(beta, t):
    """`1 - beta**t`: how much of an average that started at zero is data after `t` steps.

    Computed as -expm1(t log1p(beta - 1)): in float32, `1 - beta**t` loses four digits for beta = 0.999 and small t.
    """
    if isinstance(beta, (int, float)) and isinstance(t, (int, float)):
        return 1.0 if beta == 0 else -math.expm1(t * math.log1p(beta - 1))
    floats = [x.dtype for x in (beta, t) if "float" in str(getattr(x, "dtype", ""))]
    dtype = floats[0] if floats else config.floatx()
    beta, t = ops.convert_to_tensor(beta, dtype), ops.convert_to_tensor(t, dtype)
    return -ops.expm1(t * ops.log1p(beta - 1))


def norm(arrays):
    """The Euclidean norm of all entries of some arrays, as two factors, so that it neither overflows nor vanishes.

    The second factor is 1, or the largest entry where the squares of the entries do not fit the dtype.
    """
    dtype = "float64" if any("float64" in str(a.dtype) for a in arrays) else "float32"
    arrays = [ops.cast(a, dtype) for a in arrays if 0 not in tuple(a.shape)]
    if not arrays:
        return ops.zeros((), dtype), ops.ones((), dtype)

    def root(scaled):
        if backend() == "torch":
            return ops.sqrt(ops.sum(ops.square(backends.norms(scaled))))
        return ops.sqrt(sum(ops.sum(ops.square(a)) for a in scaled))

    direct = root(arrays)
    fits = _fits(direct, dtype)

    def largest():
        found = ops.max(ops.stack([ops.max(ops.abs(a)) for a in arrays]))
        return ops.where(found >= float(np.finfo(dtype).tiny), found, ops.ones_like(found))

    unit = ops.cond(fits, lambda: ops.ones((), dtype), largest)
    return ops.cond(fits, lambda: direct, lambda: root([a / unit for a in arrays])), unit


def _fits(norm, dtype):
    """Whether no square has overflowed or vanished in a norm."""
    return ops.isfinite(norm) & (norm > math.sqrt(np.finfo(dtype).tiny) * 1e3)


def shrinkings(arrays, limit) -> list:
    """For each array the factor that brings its own norm down to `limit`; on torch for all at once."""
    if backend() != "torch":
        return [shrinking(norm([a]), limit) for a in arrays]
    dtype = str(limit.dtype).removeprefix("torch.")
    arrays = [ops.zeros((1,), dtype) if 0 in a.shape else ops.cast(a, dtype) for a in arrays]
    values = backends.norms(arrays)
    units, fits = ops.ones_like(values), _fits(values, dtype)
    if not ops.all(fits):
        largest = backends.norms(arrays, math.inf)
        largest = ops.where(largest >= float(np.finfo(dtype).tiny), largest, units)
        scaled = backends.norms([a / unit for a, unit in zip(arrays, largest, strict=True)])
        values, units = ops.where(fits, values, scaled), ops.where(fits, units, largest)
    return list(shrinking((values, units), limit))


def shrinking(norm, limit):
    """The factor that brings a norm, in its two factors, down to `limit`; NaN where it is NaN."""
    value, unit = (ops.cast(x, limit.dtype) for x in norm)
    limit = limit / unit
    return ops.where(value <= limit, ops.ones_like(limit), limit / value)


def exponentially_weighted_average(values, beta=None, *, window=None, bias_correction=True):
    """Smooth a series: V = beta V + (1 - beta) value, divided by 1 - beta**t.

    The average looks back over about `1 / (1 - beta)` values. Without the correction it starts near zero, because V
    starts at zero; with it, the first entry is the first value. A NaN in the series stays in the average from then on.

    Args:
        values: Numbers in order of time; of an array, the first axis is time.
        beta: Weight of the past, in [0, 1). Defaults to 0.9.
        window: Give this instead of `beta` to say how many values to look back over: `beta = 1 - 1 / window`.
        bias_correction: Whether to divide by `1 - beta**t`.

    Returns:
        A NumPy float64 array of the shape of `values`.

    Example:
        >>> import kopt
        >>> kopt.exponentially_weighted_average([1.0, 1.0, 4.0], beta=0.5).round(3).tolist()
        [1.0, 1.0, 2.714]
        >>> kopt.exponentially_weighted_average([1.0, 1.0, 4.0], beta=0.5, bias_correction=False).tolist()
        [0.5, 0.75, 2.375]
    """
    if beta is not None and window is not None:
        checks.refuse("window", f"None beside `beta` ({beta!r})", window)
    if window is not None:
        beta = 1 - 1 / checks.window("window", window)
    else:
        beta = 0.9 if beta is None else checks.fraction("beta", beta)
    bias_correction = checks.boolean("bias_correction", bias_correction)

    series = np.asarray(ops.convert_to_numpy(values) if ops.is_tensor(values) else values)
    if series.dtype.kind not in "biuf" or series.ndim == 0:
        checks.refuse("values", "a series of real numbers, with time as its first axis", values)
    values = series.astype("float64")
    averages, average = np.empty_like(values), np.zeros(values.shape[1:])
    for i, value in enumerate(values):
        average = beta * average + (1 - beta) * value
        averages[i] = average
    if bias_correction:
        weights = 1 - beta ** np.arange(1, len(values) + 1, dtype="float64")
        averages /= weights.reshape(-1, *[1] * (values.ndim - 1))
    return averages
