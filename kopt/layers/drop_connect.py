"""DropConnect: layers whose weights are left out at random."""

import keras
from keras import ops

from kopt import _keras, checks
from kopt.layers import draws

SIZES = checks.pair(checks.count(1), "an integer of 1 or more, or two such")


class DropConnect(keras.layers.Layer):
    """What the layers have in common; the next class in line makes the weights.

    Of what Keras can do with a layer's weights, LoRA works: what is dropped are entries of the sum. Quantization is
    refused, since a layer with quantized weights is called in another way, in which nothing would be dropped.
    """

    def _set(self, rate, drop_bias, seed):
        self.rate, self.drop_bias, self.seed = rate, drop_bias, seed
        if isinstance(self.dtype_policy, keras.dtype_policies.QuantizedDTypePolicy):
            checks.refuse("dtype", "without quantization", self.dtype_policy.name)
        if rate:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def drawn(self):
        """The kernel and the bias for one batch in training."""
        kernel, bias = self.kernel, self.bias
        kernel = draws.dropped(ops.convert_to_tensor(kernel), self.rate, self.seed_generator)
        if bias is not None and self.drop_bias:
            bias = draws.dropped(ops.convert_to_tensor(bias), self.rate, self.seed_generator)
        return kernel, bias

    def activated(self, outputs):
        return outputs if self.activation is None else self.activation(outputs)

    def quantize(self, mode=None, *arguments, **named):
        raise NotImplementedError(f"A {type(self).__name__} cannot be quantized; its weights fit Keras's own layer.")

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "drop_bias": self.drop_bias, "seed": self.seed}


@_keras.register
class DropConnectDense(DropConnect, keras.layers.Dense):
    """`Dense`, with weights that are left out at random in training.

    Each weight is 0 with the probability `rate`, else it is divided by `1 - rate`, so that the mean of the outputs,
    before the activation, is what the layer gives at inference, with all weights. The draw is one for the whole batch:
    a mask for each row would need memory for as many kernels as there are rows, and a product for each of them.

    When to use it: on wide dense layers; dropout is cheaper, and often as good.

    Args:
        units: How many outputs there are.
        rate: The probability of a weight to be left out, in [0, 1).
        drop_bias: Whether that goes for the bias, too.
        seed: For the same draws each time the layer is made.
        **common: Those of `keras.layers.Dense`.

    Example:
        >>> import keras, kopt, numpy as np
        >>> layer = kopt.layers.DropConnectDense(1, 0.5, seed=0, kernel_initializer="ones")
        >>> x = np.ones((3, 100), "float32")
        >>> keras.ops.convert_to_numpy(layer(x))[:, 0].tolist()
        [100.0, 100.0, 100.0]
        >>> one, another, third = keras.ops.convert_to_numpy(layer(x, training=True))[:, 0].tolist()
        >>> 60 < one < 140 and one == another == third
        True

    Reference: Wan et al., "Regularization of neural networks using DropConnect", ICML 2013.

    Differs from the paper in that it draws once a batch, not for each row; that weights are scaled in training, not at
    inference; and that inference takes the mean of the weights, where the paper draws from a normal distribution with
    the mean and the variance of the outputs, and averages the activations. `kopt.mc_predict` draws at inference, too.
    """

    def __init__(self, units: int, rate: float, drop_bias: bool = False, seed: int | None = None, **common):
        units, rate = checks.count(1)("units", units), checks.fraction("rate", rate)
        drop_bias, seed = checks.boolean("drop_bias", drop_bias), draws.check_seed(seed)
        super().__init__(units, **common)
        self._set(rate, drop_bias, seed)

    def call(self, inputs, training=None):
        if not training or not self.rate:
            return super().call(inputs)
        kernel, bias = self.drawn()
        outputs = ops.matmul(inputs, kernel)
        return self.activated(outputs if bias is None else ops.add(outputs, bias))


@_keras.register
class DropConnectConv2D(DropConnect, keras.layers.Conv2D):
    """`Conv2D`, with weights that are left out at random in training.

    As in `DropConnectDense`: an entry of the kernel is left out at all places of all images of a batch.

    When to use it: where a convolution has more weights than the data can tell; `DropBlock2D` is the usual choice. Keep
    the rate small, 0.05 say: with 0.1 the network of `recipes/regularizers.py` is worse than without.

    Args:
        filters: How many channels the output has.
        kernel_size: The height and width of the kernel, or one number for both.
        rate: The probability of a weight to be left out, in [0, 1).
        drop_bias: Whether that goes for the bias, too.
        seed: For the same draws each time the layer is made.
        **common: Those of `keras.layers.Conv2D`.

    Example:
        >>> import keras, kopt, numpy as np
        >>> layer = kopt.layers.DropConnectConv2D(4, 3, 0.05, padding="same", activation="relu")
        >>> tuple(layer(np.ones((2, 8, 8, 3), "float32"), training=True).shape)
        (2, 8, 8, 4)

    Reference: Wan et al., "Regularization of neural networks using DropConnect", ICML 2013.

    Differs from the paper as `DropConnectDense` does; the paper has dense layers only.
    """

    def __init__(
        self, filters: int, kernel_size, rate: float, drop_bias: bool = False, seed: int | None = None, **common
    ):
        filters, rate = checks.count(1)("filters", filters), checks.fraction("rate", rate)
        drop_bias, seed = checks.boolean("drop_bias", drop_bias), draws.check_seed(seed)
        super().__init__(filters, SIZES("kernel_size", kernel_size), **common)
        self._set(rate, drop_bias, seed)

    def call(self, inputs, training=None):
        if not training or not self.rate:
            return super().call(inputs)
        kernel, bias = self.drawn()
        outputs = self.convolution_op(inputs, kernel)
        if bias is not None:
            beside = (1, -1, 1, 1) if self.data_format == "channels_first" else (1, 1, 1, -1)
            outputs = ops.add(outputs, ops.reshape(bias, beside))
        return self.activated(outputs)
