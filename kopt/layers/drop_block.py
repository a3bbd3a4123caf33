"""DropBlock."""

import keras
from keras import ops

from kopt import _keras, checks
from kopt.layers import draws


@_keras.register
class DropBlock2D(keras.layers.Layer):
    """Leaves out square blocks of feature maps, at random.

    What lies side by side in a feature map says nearly the same, so that dropout of single places takes little away. In
    training, places are drawn with a probability `gamma` among those where a whole block fits, for each image and
    channel by itself, and a block is left out at each of them. `gamma` is such that a share of `rate` would be left out
    if no two blocks overlapped:

        gamma = rate / block_size**2 * (height * width) / ((height - block_size + 1) * (width - block_size + 1))

    What is left is divided by the share of the image that is left, over all its places and channels: the mean of the
    factors that an image is multiplied with is 1 in each draw. A single place has a factor with the mean 1 only nearly,
    more at the rim and less in the middle, for blocks cover the middle more often. Where nothing is left, the output
    is 0. At inference the input is as it is.

    When to use it: in convolutional networks, after the later convolutions and in their shortcuts.

    Args:
        rate: The share that is left out, in [0, 1); less where blocks overlap.
        block_size: The side of a block. In a map that is less high or wide, a block is as high or wide as the map.
        seed: For the same draws each time the layer is made.
        data_format: "channels_last" or "channels_first"; None: Keras's own.
        **common: Keras's, such as `name` and `dtype`.

    Example:
        >>> import keras, kopt, numpy as np
        >>> x = np.ones((1, 4, 4, 1), "float32")
        >>> layer = kopt.layers.DropBlock2D(0.3, block_size=2, seed=0)
        >>> round(float(keras.ops.mean(layer(x, training=True))), 5)
        1.0
        >>> bool(keras.ops.all(layer(x) == x))
        True

    Reference: Ghiasi et al., "DropBlock: a regularization method for convolutional networks", NeurIPS 2018.

    Differs from the paper in that what is left is divided for each image by itself, so that no row depends on others;
    timm and torchvision divide the whole batch by one number.
    """

    def __init__(
        self, rate: float, block_size: int = 7, seed: int | None = None, data_format: str | None = None, **common
    ):
        rate, block_size = checks.fraction("rate", rate), checks.count(1)("block_size", block_size)
        seed, data_format = draws.check_seed(seed), draws.check_format(data_format)
        super().__init__(**common)
        self.rate, self.block_size, self.seed, self.data_format = rate, block_size, seed, data_format
        self.input_spec = keras.layers.InputSpec(ndim=4)
        self.supports_masking = True
        if rate:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, inputs, training=False):
        if not training or not self.rate:
            return inputs
        shape = ops.shape(inputs)
        if self.data_format == "channels_first":
            shape = (shape[0], shape[2], shape[3], shape[1])
        kept = self._kept(*shape)
        left = ops.mean(kept, axis=(1, 2, 3), keepdims=True)
        factor = kept / ops.maximum(left, 1e-12)
        if self.data_format == "channels_first":
            factor = ops.transpose(factor, (0, 3, 1, 2))
        return inputs * ops.cast(factor, inputs.dtype)

    def _kept(self, rows, height, width, channels):
        """1 where a place is left, 0 where it is in a block; the channels last."""
        size = self.block_size
        gamma = self.rate * _per_start(height, size) * _per_start(width, size)
        begins = ops.logical_not(draws.survivors((rows, height, width, channels), gamma, self.seed_generator))
        fits = ops.reshape(_fits(height, size), (-1, 1, 1)) & ops.reshape(_fits(width, size), (-1, 1))
        begins = ops.cast(begins & fits, "float32")
        begins = ops.pad(begins, ((0, 0), (size - 1, 0), (size - 1, 0), (0, 0)))
        return 1 - ops.max_pool(begins, size, strides=1, padding="valid", data_format="channels_last")

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        own = {"rate": self.rate, "block_size": self.block_size, "seed": self.seed, "data_format": self.data_format}
        return {**super().get_config(), **own}


def _fits(side, size):
    """Whether a block that begins here ends within the map; where none does, the first place counts."""
    place = ops.arange(side)
    return (place <= side - size) | (place == 0)


def _per_start(side, size):
    """`side / (size * starts)`, where `starts` is at how many places a block can begin along a side."""
    if isinstance(side, int):
        size = min(size, side)
        return side / (size * (side - size + 1))
    side = ops.cast(side, "float32")
    size = ops.minimum(side, size)
    return side / (size * (side - size + 1))
