"""AdamW: Loshchilov & Hutter, Decoupled weight decay regularization, 2019, https://arxiv.org/abs/1711.05101."""

from typing import Unpack

from kopt import _keras, checks
from kopt.optimizers.adam import LARGEST, MOMENTS, adam, amsgrad
from kopt.optimizers.base import Common, Optimizer
from kopt.optimizers.rule import Choice, Hyper


@_keras.register
class AdamW(Optimizer):
    """Adam's step, and beside it a pull of every weight towards zero.

        w -= a weight_decay w + a m̂ / (√v̂ + epsilon), with m̂ and v̂ as in `kopt.Adam`

    The decay goes past the division by √v̂, so it acts on all weights alike; as `l2`, in the gradient, it would act
    least on the weights with the largest gradients.

    When to use it: transformers and fine-tuning. Biases and normalisation are often left out of the decay:
    `exclude_from_decay=["bias$", "gamma$", "beta$"]`.

    Args:
        learning_rate: Number, schedule, or callable without arguments.
        beta_1: Weight of the past in m, in [0, 1).
        beta_2: Weight of the past in v, in [0, 1).
        epsilon: Keeps the division finite; outside the root, after the correction.
        bias_correction: Whether to divide m and v by the corrections.
        amsgrad: Whether to divide by the largest v so far; one slot more.
        weight_decay: The pull, times the learning rate, on each step.
        **common: What every optimizer takes; see `kopt.Optimizer`.

    Example:
        >>> import keras, kopt
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="zeros")])
        >>> model.compile(kopt.AdamW(0.01, exclude_from_decay="bias"), loss="mse")
        >>> history = model.fit(keras.ops.ones((8, 4)), keras.ops.ones((8, 1)), epochs=5, verbose=0)
        >>> history.history["loss"][-1] < history.history["loss"][0]
        True

    Reference:
        Loshchilov & Hutter, Decoupled weight decay regularization, 2019, https://arxiv.org/abs/1711.05101.

    Differs from the paper in multiplying the decay by the learning rate, as Keras and torch do; from Keras in epsilon
    (see `kopt.Adam`) and in the default decay, 0.004 there.
    """

    squares = True
    beta_1 = Hyper(checks.fraction)
    beta_2 = Hyper(checks.fraction)
    epsilon = Hyper(checks.positive)
    bias_correction = Choice(checks.boolean)
    amsgrad = Choice(checks.boolean)

    def __init__(
        self,
        learning_rate=1e-3,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-7,
        bias_correction=True,
        amsgrad=False,
        weight_decay=0.01,
        **common: Unpack[Common],
    ):
        super().__init__(
            learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            bias_correction=bias_correction,
            amsgrad=amsgrad,
            weight_decay=weight_decay,
            **common,
        )

    @property
    def rule(self):
        return amsgrad if self.amsgrad else adam

    @property
    def slots(self):
        return (*MOMENTS, LARGEST) if self.amsgrad else MOMENTS
