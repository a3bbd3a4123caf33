"""Fractional max pooling."""

import math

import keras
import numpy as np
from keras import ops

from kopt import _keras, checks
from kopt.layers import draws

RATIOS = checks.pair(checks.above_one, "a finite number greater than 1, or two such")


@_keras.register
class FractionalMaxPooling2D(keras.layers.Layer):
    """Max pooling that makes an image smaller by a ratio that need not be whole, in regions that are drawn anew.

    An image of `n` rows becomes one of `floor(n / pool_ratio)`. Its regions are `k` or `k + 1` rows high, one or two
    for an exact ratio between 1 and 2; how they follow each other is drawn for each batch in training. So it is with
    the columns.

    - `mode="random"`: all orders of the right number of low and high regions are equally likely.
    - `mode="pseudorandom"`: region `i` ends at `ceil(a * (i + u))`, where `a` is the exact ratio and only `u` is drawn
      from (0, 1), so that heights are as even as they can be.

    At inference the regions are those of the second mode with u = 1/2; `kopt.mc_predict` averages over others. The
    height and width of the input must be known.

    When to use it: with many such layers, each with a small ratio, in place of a few poolings by 2. The paper finds
    random regions good without other regularization, and pseudorandom ones beside dropout or augmentation.

    Args:
        pool_ratio: How much smaller the output is, above 1, or one for the height and one for the width.
        overlapping: Whether neighbouring regions have a row in common.
        mode: How regions are drawn, "random" or "pseudorandom".
        seed: For the same draws each time the layer is made.
        data_format: "channels_last" or "channels_first"; None: Keras's own.
        **common: Keras's, such as `name` and `dtype`.

    Example:
        >>> import keras, kopt, numpy as np
        >>> layer = kopt.layers.FractionalMaxPooling2D(1.44, seed=0)
        >>> image = np.arange(64, dtype="float32").reshape(1, 8, 8, 1)
        >>> keras.ops.convert_to_numpy(layer(image)).reshape(5, 5)[:, -1].tolist()  # the last row of each region
        [15.0, 23.0, 39.0, 55.0, 63.0]
        >>> tuple(layer(image, training=True).shape)
        (1, 5, 5, 1)

    Reference: Graham, "Fractional max-pooling", arXiv:1412.6071.

    Differs from the paper in that disjoint regions reach to the last row, which the paper leaves out. So they do in
    TensorFlow, whose `tf.nn.fractional_max_pool` XLA cannot compile. torch's regions all have one given size.
    """

    def __init__(
        self,
        pool_ratio,
        overlapping: bool = False,
        mode: str = "pseudorandom",
        seed: int | None = None,
        data_format: str | None = None,
        **common,
    ):
        pool_ratio, overlapping = RATIOS("pool_ratio", pool_ratio), checks.boolean("overlapping", overlapping)
        mode = checks.one_of("random", "pseudorandom")("mode", mode)
        seed, data_format = draws.check_seed(seed), draws.check_format(data_format)
        super().__init__(**common)
        self.pool_ratio, self.overlapping, self.mode = pool_ratio, overlapping, mode
        self.seed, self.data_format = seed, data_format
        self.input_spec = keras.layers.InputSpec(ndim=4)
        self.seed_generator = keras.random.SeedGenerator(seed)

    @property
    def axes(self):
        """Those of the height and the width."""
        return (1, 2) if self.data_format == "channels_last" else (2, 3)

    def call(self, inputs, training=False):
        shape = self.compute_output_shape(inputs.shape)
        for axis in self.axes:
            if shape[axis] is None:
                checks.refuse("inputs", "of a known height and width", tuple(inputs.shape))
            last = inputs.shape[axis] - self.overlapping
            edges = self._drawn(last, shape[axis]) if training else _fixed(last, shape[axis])
            highest = -(-last // shape[axis]) + self.overlapping
            inputs = pooled(inputs, axis, edges[:-1], edges[1:] + int(self.overlapping), highest)
        return inputs

    def _drawn(self, last, count):
        """The edges of `count` regions between 0 and `last`."""
        if self.mode == "pseudorandom":
            shift = keras.random.randint((), 1, last + 1, seed=self.seed_generator)
            return even_edges(last, ops.arange(count + 1, dtype="int32"), shift)
        order = ops.argsort(keras.random.uniform((count,), dtype="float32", seed=self.seed_generator))
        heights = last // count + ops.cast(order < last % count, "int32")
        return ops.concatenate([ops.zeros(1, "int32"), ops.cumsum(heights)])

    def compute_output_shape(self, input_shape):
        shape = list(input_shape)
        for axis, ratio in zip(self.axes, self.pool_ratio, strict=True):
            if shape[axis] is not None:
                shape[axis] = math.floor(round(shape[axis] / ratio, 6))
                if not shape[axis]:
                    checks.refuse("inputs", f"as high and wide as `pool_ratio`, {self.pool_ratio}", tuple(input_shape))
        return tuple(shape)

    def get_config(self):
        own = {"pool_ratio": list(self.pool_ratio), "overlapping": self.overlapping, "mode": self.mode}
        return {**super().get_config(), **own, "seed": self.seed, "data_format": self.data_format}


def even_edges(last, numbers, shift):
    """`ceil(a * (i + u)) - ceil(a * u)` for i = 0 ... count, where `a = last / count` and `shift = ceil(last * u)`.

    The `numbers` are all i. Since `last * i` is whole, no more than the ceiling of `last * u` counts, and all is exact
    in integers.
    """
    count = numbers.shape[0] - 1
    return (last * numbers + shift + count - 1) // count - (shift + count - 1) // count


def _fixed(last, count):
    return even_edges(last, np.arange(count + 1, dtype="int32"), (last + 1) // 2)


def pooled(x, axis, starts, ends, highest):
    """The maxima of regions along an axis; `highest` is how many rows a region has at most."""
    found = ops.take(x, starts, axis=axis)
    for i in range(1, highest):  # beyond its end a region repeats its last row
        found = _larger(found, ops.take(x, ops.minimum(starts + i, ends - 1), axis=axis))
    return found


def _larger(a, b):
    """The larger of two, or NaN; `ops.maximum` on torch rounds float64."""
    if _keras.dtype_of(a) != "float64":
        return ops.maximum(a, b)
    return ops.where((a >= b) | ops.isnan(a), a, b)
