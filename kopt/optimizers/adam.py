"""Adam: Kingma & Ba, 2015, https://arxiv.org/abs/1412.6980. AMSGrad: Reddi, Kale & Kumar, 2018, https://arxiv.org/abs/1904.09237."""

from typing import Unpack

from keras import ops

from kopt import _keras, checks
from kopt.numerics import larger, lerp
from kopt.optimizers.base import Common, Optimizer
from kopt.optimizers.rule import Choice, Hyper, Slot, elementwise

MOMENTS = Slot("m", doc="mean of g"), Slot("v", doc="mean of g²")
LARGEST = Slot("v_max", doc="largest v so far")


@elementwise(kernel="adam")
def adam(g, w, m, v, *, at, beta_1, beta_2, epsilon, bias_correction):
    m = lerp(m, g, 1 - beta_1)
    v = lerp(v, ops.square(g), 1 - beta_2)
    return _step(m, v, at, beta_1, beta_2, epsilon, bias_correction), m, v


@elementwise(kernel="amsgrad")
def amsgrad(g, w, m, v, v_max, *, at, beta_1, beta_2, epsilon, bias_correction):
    m = lerp(m, g, 1 - beta_1)
    v = lerp(v, ops.square(g), 1 - beta_2)
    v_max = larger(v_max, v)
    return _step(m, v_max, at, beta_1, beta_2, epsilon, bias_correction), m, v, v_max


def _step(m, v, at, beta_1, beta_2, epsilon, bias_correction):
    rate = at.learning_rate
    if bias_correction:
        rate, v = rate * at.correction(beta_1), v * at.correction(beta_2)
    return rate * m / (ops.sqrt(v) + epsilon)


@_keras.register
class Adam(Optimizer):
    """Step along the mean gradient, each coordinate divided by the root mean square of its gradients.

        m = beta_1 m + (1 - beta_1) g;    v = beta_2 v + (1 - beta_2) g²
        m̂ = m / (1 - beta_1ᵗ);    v̂ = v / (1 - beta_2ᵗ);    w -= a m̂ / (√v̂ + epsilon)

    The corrections undo that m and v start at zero; without them the first step is three times too long, the twelfth
    more than six times. `amsgrad=True` divides by the largest v so far in place of v.

    When to use it: the default for most networks; 1e-3 or 5e-4 is a good first rate.

    Args:
        learning_rate: Number, schedule, or callable without arguments.
        beta_1: Weight of the past in m, in [0, 1).
        beta_2: Weight of the past in v, in [0, 1).
        epsilon: Keeps the division finite; outside the root, after the correction.
        bias_correction: Whether to divide m and v by the corrections.
        amsgrad: Whether to divide by the largest v so far; one slot more.
        **common: What every optimizer takes; see `kopt.Optimizer`.

    Example:
        >>> import keras, kopt
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="zeros")])
        >>> model.compile(kopt.Adam(0.01), loss="mse")
        >>> history = model.fit(keras.ops.ones((8, 4)), keras.ops.ones((8, 1)), epochs=5, verbose=0)
        >>> history.history["loss"][-1] < history.history["loss"][0]
        True

    Reference:
        Kingma & Ba, Adam: a method for stochastic optimization, 2015, https://arxiv.org/abs/1412.6980; Reddi, Kale &
        Kumar, On the convergence of Adam and beyond, 2018, https://arxiv.org/abs/1904.09237.

    Differs from Keras in epsilon: Keras's is the paper's "epsilon hat", added to the uncorrected √v, so it counts
    1 / √(1 - beta_2ᵗ) times as much, 32 times at the first step. The same as torch but for epsilon, 1e-8 there.
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
        **common: Unpack[Common],
    ):
        super().__init__(
            learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            bias_correction=bias_correction,
            amsgrad=amsgrad,
            **common,
        )

    @property
    def rule(self):
        return amsgrad if self.amsgrad else adam

    @property
    def slots(self):
        return (*MOMENTS, LARGEST) if self.amsgrad else MOMENTS
