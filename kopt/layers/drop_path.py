"""Stochastic depth."""

import keras
from keras import ops

from kopt import _keras, checks
from kopt.layers import draws


@_keras.register
class DropPath(keras.layers.Layer):
    """Leaves out a residual branch, at random: stochastic depth.

    In training the input is 0 with the probability `rate`, else it is divided by `1 - rate`, so that its mean is kept.
    At inference it is as it is. Put it at the end of a branch: `x + DropPath(0.1)(branch(x))`.

    When to use it: in deep residual networks, with rates that grow from block to block (`drop_path_rates`).

    Args:
        rate: The probability to be left out, in [0, 1).
        mode: What is left out at once: "sample", each row by itself, or "batch", all rows or none.
        seed: For the same draws each time the layer is made.
        **common: Keras's, such as `name` and `dtype`.

    Example:
        >>> import keras, kopt, numpy as np
        >>> x = np.ones((8, 2), "float32")
        >>> layer = kopt.layers.DropPath(0.5, seed=0)
        >>> np.unique(layer(x, training=True)).tolist()
        [0.0, 2.0]
        >>> np.unique(layer(x)).tolist()
        [1.0]

    Reference: Huang et al., "Deep networks with stochastic depth", ECCV 2016 (by batch); Larsson et al., "FractalNet",
    ICLR 2017.

    Differs from the paper, which multiplies by `1 - rate` at inference instead, as do the layers called
    `StochasticDepth` of TensorFlow Addons and KerasCV. The same as timm's `DropPath` and torchvision's
    `StochasticDepth`, whose mode "row" is "sample". What EfficientNet calls "drop connect" is this layer.
    """

    def __init__(self, rate: float, mode: str = "sample", seed: int | None = None, **common):
        rate = checks.fraction("rate", rate)
        mode = checks.one_of("sample", "batch")("mode", mode)
        seed = draws.check_seed(seed)
        super().__init__(**common)
        self.rate, self.mode, self.seed = rate, mode, seed
        self.supports_masking = True
        if rate:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, inputs, training=False):
        if not training or not self.rate:
            return inputs
        rows = ops.shape(inputs)[0] if self.mode == "sample" else 1
        return draws.dropped(inputs, self.rate, self.seed_generator, (rows, *[1] * (len(inputs.shape) - 1)))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "mode": self.mode, "seed": self.seed}


def drop_path_rates(depths, rate: float) -> list:
    """The rate of each block of a network, growing linearly from 0 in the first to `rate` in the last.

    A network of one block has `rate`.

    Args:
        depths: How many blocks there are, or a list of how many each stage has; then the rates are in a list for each.
        rate: That of the last block, in [0, 1).

    Example:
        >>> import kopt
        >>> kopt.layers.drop_path_rates(3, 0.2)
        [0.0, 0.1, 0.2]
        >>> kopt.layers.drop_path_rates([1, 2], 0.2)
        [[0.0], [0.1, 0.2]]
    """
    rate = checks.fraction("rate", rate)
    stages = checks.one_or_several(checks.count(1), "an integer of 1 or more, or a list of such")("depths", depths)
    total = sum(stages)
    rates = [rate * i / (total - 1) for i in range(total)] if total > 1 else [rate]
    if not checks.is_several(depths):
        return rates
    ends = [sum(stages[: i + 1]) for i in range(len(stages))]
    return [rates[end - stage : end] for stage, end in zip(stages, ends, strict=True)]
