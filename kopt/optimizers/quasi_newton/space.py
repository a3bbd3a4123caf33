"""Where vectors and numbers are: NumPy's arrays, tensors that have values, or tensors of a step that is being traced.

Functions of `keras.ops` that round float64 to float32 on JAX or torch are not used: `dot`, `matmul`, `maximum`, `sin`.
The search and the methods are written once, with the functions of a space. Where values are at hand, numbers are
Python's, in float64, and only what is needed is computed; in a traced step they are tensors in the vectors' dtype.
"""

import math

import keras
import numpy as np
from keras import ops

from kopt import backends


class Space:
    def __init__(self, like):
        self.xp = np if isinstance(like, np.ndarray) else ops
        self.dtype = keras.backend.standardize_dtype(like.dtype)
        self.eps = float(np.finfo(self.dtype).eps)
        self.least = float(np.finfo(self.dtype).tiny)  # above it a number has all its digits
        self.root_eps, self.tiny = math.sqrt(self.eps), math.sqrt(self.least)

    def zeros(self, shape):
        return self.xp.zeros(shape, self.dtype)

    def eye(self, size):
        return self.xp.eye(size, dtype=self.dtype)

    def matmul(self, matrix, vector):
        return (matrix @ vector[:, None])[:, 0]

    def transpose(self, a):
        return self.xp.transpose(a)

    def outer(self, a, b):
        return a[:, None] * b[None, :]

    def length(self, a):
        """The Euclidean length, where the squares of the entries may overflow, too."""
        largest = self.largest(a)
        part = a / largest
        return self.where(largest > 0, largest * self.sqrt(self.dot(part, part)), largest)

    def grain(self, point, direction):
        """The least step along a direction that leads to another point."""
        size = self.xp.abs(point)
        size = self.xp.where(size > self.tiny, size, self.tiny)
        return self.ratio(self.eps, self.largest(direction / size))

    def merged(self, condition, one, other):
        """One tuple of numbers or the other."""
        return type(one)(*(self.where(condition, a, b) for a, b in zip(one, other, strict=True)))


class Values(Space):
    """Vectors with values: NumPy's, or the backend's tensors."""

    def dot(self, a, b) -> float:
        return float(a @ b if self.xp is np or backends.BACKEND == "torch" else ops.sum(a * b))

    def largest(self, a) -> float:
        return float(self.xp.max(self.xp.abs(a)))

    def all_finite(self, a) -> bool:
        return bool(self.xp.all(self.xp.isfinite(a)))

    def equal(self, a, b) -> bool:
        return bool(self.xp.all(a == b))

    @staticmethod
    def repeat(times, body, carry):
        for i in range(times):
            carry = body(i, carry)
        return carry

    @staticmethod
    def row(rows, place):
        return rows[place]

    def put(self, rows, row, place, when=True):
        """The rows with one replaced; where memory can be written to, it is written in place."""
        if not when:
            return rows
        if self.xp is np or backends.BACKEND == "torch" or isinstance(rows, list):
            rows[place] = row
            return rows
        row = ops.convert_to_tensor(row, self.dtype)
        return ops.slice_update(rows, [place] + [0] * len(row.shape), row[None])

    def parts(self, vector, dtype) -> list:
        """The entries of a vector as numbers."""
        return ops.convert_to_numpy(vector).tolist()

    @staticmethod
    def table(vector) -> list:
        """A vector whose entries are asked for as numbers, one by one."""
        return vector.tolist() if hasattr(vector, "tolist") else ops.convert_to_numpy(vector).tolist()

    @staticmethod
    def blank(size) -> list:
        return [0.0] * size

    def count(self, value) -> int:
        return int(value)

    def number(self, value) -> float:
        return float(value)

    @staticmethod
    def where(condition, a, b):
        return a if condition else b

    def merged(self, condition, one, other):
        return one if condition else other

    @staticmethod
    def cond(condition, a, b):
        return a() if condition else b()

    @staticmethod
    def no(condition) -> bool:
        return not condition

    is_finite = staticmethod(math.isfinite)
    abs, sign = staticmethod(abs), staticmethod(lambda x: (x > 0) - (x < 0))

    @staticmethod
    def sqrt(x) -> float:
        return math.sqrt(x) if x >= 0 else math.nan

    @staticmethod
    def ratio(a, b) -> float:
        """a / b, and something that is not finite where that is."""
        try:
            return a / b
        except (ZeroDivisionError, OverflowError):
            return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a)

    @staticmethod
    def power(x, exponent) -> float:
        try:
            return x**exponent if x > 0 else math.nan
        except OverflowError:
            return math.inf

    @staticmethod
    def minimum(a, b):
        return a if a <= b else b  # b where one is NaN, as in a traced step

    @staticmethod
    def maximum(a, b):
        return a if a >= b else b

    @staticmethod
    def clip(x, low, high):
        return Values.minimum(Values.maximum(x, low), high)


class Traced(Space):
    """Vectors and numbers of a step that TensorFlow or JAX traces."""

    def dot(self, a, b):
        return ops.sum(a * b)

    def largest(self, a):
        return ops.max(ops.abs(a))

    def all_finite(self, a):
        return ops.all(ops.isfinite(a))

    def equal(self, a, b):
        return ops.all(a == b)

    @staticmethod
    def repeat(times, body, carry):
        return ops.fori_loop(0, times, body, carry)

    @staticmethod
    def row(rows, place):
        return ops.take(rows, place, axis=0)  # an index in brackets takes XLA half a minute to compile on TensorFlow

    def put(self, rows, row, place, when=True):
        row = ops.where(when, row, self.row(rows, place))
        start = [ops.cast(index, "int32") for index in (place, *[0] * len(row.shape))]
        return ops.slice_update(rows, start, row[None])

    def parts(self, vector, dtype) -> list:
        vector = backends.read(vector, dtype)
        return list(ops.unstack(vector))

    @staticmethod
    def table(vector):
        return vector

    def blank(self, size):
        return self.zeros((size,))

    def count(self, value):
        return ops.convert_to_tensor(value, "int32")

    def number(self, value):
        return ops.convert_to_tensor(value, self.dtype)

    def where(self, condition, a, b):
        return ops.where(condition, self._typed(a, b), self._typed(b, a))

    def _typed(self, value, other):
        """A Python number as a tensor of the other's dtype, or of its kind's."""
        if not isinstance(value, (bool, int, float)):
            return value
        own = "bool" if isinstance(value, bool) else "int32" if isinstance(value, int) else self.dtype
        return ops.convert_to_tensor(value, own if isinstance(other, (bool, int, float)) else other.dtype)

    def cond(self, condition, a, b):
        """One or the other, as a loop of one turn or none, which XLA does in place."""

        return ops.while_loop(lambda go, _: go, lambda go, _: (ops.zeros_like(go), a()), (condition, b()))[1]

    def no(self, condition):
        return ops.logical_not(condition)

    def ratio(self, a, b):
        return a / b

    def power(self, x, exponent):
        return x**exponent

    def minimum(self, a, b):
        return ops.where(a <= b, a, b)

    def maximum(self, a, b):
        return ops.where(a >= b, a, b)

    def clip(self, x, low, high):
        return self.minimum(self.maximum(x, low), high)

    is_finite = staticmethod(ops.isfinite)
    abs, sign, sqrt = staticmethod(ops.abs), staticmethod(ops.sign), staticmethod(ops.sqrt)


def space_of(vector):
    """The space that a vector is in."""
    return Traced(vector) if backends.is_symbolic(vector) else Values(vector)
