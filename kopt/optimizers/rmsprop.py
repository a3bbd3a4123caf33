"""RMSprop: Tieleman & Hinton, 2012, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf.

The centered form: Graves, Generating sequences with recurrent neural networks, 2013, https://arxiv.org/abs/1308.0850.
"""

from typing import Unpack

from keras import ops

from kopt import _keras, checks
from kopt.numerics import lerp
from kopt.optimizers.base import Common, Optimizer
from kopt.optimizers.rule import Choice, Hyper, Slot, elementwise


@elementwise()
def rmsprop(g, w, c, *, at, rho, epsilon):
    c = lerp(c, ops.square(g), 1 - rho)
    return at.learning_rate * g / (ops.sqrt(c) + epsilon), c


@elementwise()
def centered(g, w, s, mean, *, at, rho, epsilon):
    # s is c - mean², carried along by itself: the difference of the two would cancel, and could be negative.
    s = rho * (s + (1 - rho) * ops.square(g - mean))
    mean = lerp(mean, g, 1 - rho)
    return at.learning_rate * g / (ops.sqrt(s) + epsilon), s, mean


@elementwise()
def rmsprop_momentum(g, w, c, v, *, at, rho, epsilon, momentum):
    step, c = rmsprop(g, w, c, at=at, rho=rho, epsilon=epsilon)
    v = momentum * v + step
    return v, c, v


@elementwise()
def centered_momentum(g, w, s, mean, v, *, at, rho, epsilon, momentum):
    step, s, mean = centered(g, w, s, mean, at=at, rho=rho, epsilon=epsilon)
    v = momentum * v + step
    return v, s, mean, v


RULES = {  # (centered, with momentum)
    (False, False): rmsprop,
    (True, False): centered,
    (False, True): rmsprop_momentum,
    (True, True): centered_momentum,
}


@_keras.register
class RMSprop(Optimizer):
    """Step against the gradient, each coordinate divided by the root mean square of its recent gradients.

        c = rho c + (1 - rho) g²;    w -= a g / (√c + epsilon)

    `centered=True` divides by the standard deviation instead, √(c - mean²), with mean = rho mean + (1 - rho) g.
    With `momentum` the step above is accumulated: v = momentum v + a g / (√c + epsilon);  w -= v.

    When to use it: recurrent networks and reinforcement learning; otherwise Adam does the same with a better start.

    Args:
        learning_rate: Number, schedule, or callable without arguments.
        rho: Weight of the past in c, in [0, 1).
        momentum: How much of the last step is kept, in [0, 1). Built with 0 there is no slot, and it must stay 0.
        centered: Whether to divide by the standard deviation; one slot more.
        epsilon: Keeps the division finite; outside the root.
        **common: What every optimizer takes; see `kopt.Optimizer`.

    Example:
        >>> import keras, kopt
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="zeros")])
        >>> model.compile(kopt.RMSprop(0.01), loss="mse")
        >>> history = model.fit(keras.ops.ones((8, 4)), keras.ops.ones((8, 1)), epochs=5, verbose=0)
        >>> history.history["loss"][-1] < history.history["loss"][0]
        True

    Reference:
        Tieleman & Hinton, Lecture 6.5: RMSprop, 2012,
        https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf.

    Differs from Keras in epsilon, which Keras puts inside the root. Differs from torch in rho (alpha there, 0.99) and
    epsilon (1e-8 there); torch keeps the rate out of v, which matters only when the rate changes.
    """

    squares = True
    rho = Hyper(checks.fraction)
    momentum = Hyper(checks.fraction, opens_slot=True)
    centered = Choice(checks.boolean)
    epsilon = Hyper(checks.positive)

    def __init__(
        self, learning_rate=1e-3, rho=0.9, momentum=0.0, centered=False, epsilon=1e-7, **common: Unpack[Common]
    ):
        super().__init__(learning_rate, rho=rho, momentum=momentum, centered=centered, epsilon=epsilon, **common)

    @property
    def rule(self):
        return RULES[self.centered, self.opens("momentum")]

    @property
    def slots(self):
        mean_square = Slot("c", doc="mean of g²")
        spread = Slot("s", doc="variance of g"), Slot("mean", doc="mean of g")
        steps = Slot("v", doc="sum of past steps")
        return (*(spread if self.centered else (mean_square,)), *((steps,) if self.opens("momentum") else ()))
