"""Adagrad: Duchi, Hazan & Singer, 2011, https://jmlr.org/papers/v12/duchi11a.html."""

from typing import Unpack

from keras import ops

from kopt import _keras, checks
from kopt.optimizers.base import Common, Optimizer
from kopt.optimizers.rule import Choice, Hyper, Slot, elementwise


@elementwise(kernel="adagrad", rests=True)
def adagrad(g, w, c, *, at, epsilon):
    c = c + ops.square(g)
    return at.learning_rate * g / (ops.sqrt(c) + epsilon), c


@_keras.register
class Adagrad(Optimizer):
    """Step against the gradient, each coordinate divided by the root of the sum of its squared gradients so far.

        c += g²;    w -= a g / (√c + epsilon)

    When to use it: sparse features, where rare coordinates should keep their pace. c only grows, so the pace only
    drops, and long runs of a deep network stall; RMSprop and Adam forget instead.

    Args:
        learning_rate: Number, schedule, or callable without arguments.
        initial_accumulator_value: What c starts from: larger values hold back the first steps.
        epsilon: Keeps the division finite; outside the root.
        **common: What every optimizer takes; see `kopt.Optimizer`.

    Example:
        >>> import keras, kopt
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="zeros")])
        >>> model.compile(kopt.Adagrad(0.5), loss="mse")
        >>> history = model.fit(keras.ops.ones((8, 4)), keras.ops.ones((8, 1)), epochs=5, verbose=0)
        >>> history.history["loss"][-1] < history.history["loss"][0]
        True

    Reference:
        Duchi, Hazan & Singer, Adaptive subgradient methods for online learning and stochastic optimization, 2011,
        https://jmlr.org/papers/v12/duchi11a.html.

    Differs from Keras in epsilon, which Keras puts inside the root, and in c, which Keras starts at 0.1. The same as
    torch but for epsilon, 1e-10 there.
    """

    squares = True
    initial_accumulator_value = Choice(checks.nonnegative)
    epsilon = Hyper(checks.positive)

    rule = staticmethod(adagrad)

    def __init__(self, learning_rate=0.01, initial_accumulator_value=0.0, epsilon=1e-7, **common: Unpack[Common]):
        super().__init__(learning_rate, initial_accumulator_value=initial_accumulator_value, epsilon=epsilon, **common)

    @property
    def slots(self):
        return (Slot("c", doc="sum of g²", initial=self.initial_accumulator_value),)
