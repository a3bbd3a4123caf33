"""Gradient descent with momentum, in the three conventions in use.

Momentum: Polyak, Some methods of speeding up the convergence of iteration methods, 1964,
https://doi.org/10.1016/0041-5553(64)90137-5.
Nesterov's look-ahead at the cost of one gradient: Sutskever et al., On the importance of initialization and momentum in
deep learning, 2013, https://proceedings.mlr.press/v28/sutskever13.html.
"""

from typing import Unpack

from kopt import _keras, checks
from kopt.numerics import lerp
from kopt.optimizers.base import Common, Optimizer
from kopt.optimizers.rule import Choice, Hyper, Slot, elementwise


@elementwise(kernel="sgd", rests=True)
def sgd(g, w, *, at):
    return (at.learning_rate * g,)


@elementwise(kernel="velocity")
def velocity(g, w, v, *, at, momentum, nesterov):
    v = momentum * v - at.learning_rate * g
    return (at.learning_rate * g - momentum * v if nesterov else -v), v


@elementwise(kernel="gradient")
def gradient(g, w, v, *, at, momentum, nesterov):
    v = momentum * v + g
    return at.learning_rate * (g + momentum * v if nesterov else v), v


@elementwise(kernel="average")
def average(g, w, v, *, at, momentum, nesterov):
    v = lerp(g, v, momentum)
    return at.learning_rate * (lerp(g, v, momentum) if nesterov else v), v


FORMS = {"velocity": velocity, "gradient": gradient, "average": average}


@_keras.register
class SGD(Optimizer):
    """Step against the gradient, or along a decaying sum of past gradients.

    With a = learning rate, m = momentum, g = gradient:

        momentum=0           w -= a g
        form="velocity"      v = m v - a g;          w += v      (Keras; what "momentum" means in the course)
        form="gradient"      v = m v + g;            w -= a v    (torch)
        form="average"       v = m v + (1 - m) g;    w -= a v    (exponentially weighted average of the gradient)

    With `nesterov=True` the gradient is taken at the point to which momentum is about to carry the weights. That point
    itself is what is stored, so one gradient a step is enough; the last column becomes

        w += m v - a g       w -= a (g + m v)        w -= a (m v + (1 - m) g)

    While the learning rate stays the same, the first two are equal, and the third is the second at the rate a (1 - m).
    They part when the rate changes: a velocity keeps the rate that each gradient came with.

    When to use it: images, with momentum 0.9 and a rate that is tuned and decays; it keeps one slot or none.

    Args:
        learning_rate: Number, schedule, or callable without arguments.
        momentum: How much of `v` is kept, in [0, 1). Built with 0 there is no slot, and it must stay 0.
        nesterov: Look ahead along the momentum. It needs `momentum`.
        form: `"velocity"`, `"gradient"` or `"average"`.
        **common: What every optimizer takes; see `kopt.Optimizer`.

    Example:
        >>> import keras, kopt
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="zeros")])
        >>> model.compile(kopt.SGD(0.1, momentum=0.9, nesterov=True), loss="mse")
        >>> history = model.fit(keras.ops.ones((8, 4)), keras.ops.ones((8, 1)), epochs=5, verbose=0)
        >>> history.history["loss"][-1] < history.history["loss"][0]
        True

    Reference:
        Sutskever et al., On the importance of initialization and momentum in deep learning, 2013,
        https://proceedings.mlr.press/v28/sutskever13.html.

    Differs from Keras in having three forms; the default is Keras's. Differs from torch in the default form.
    """

    momentum = Hyper(checks.fraction, opens_slot=True)
    nesterov = Choice(checks.boolean)
    form = Choice(checks.one_of(*FORMS))

    def __init__(self, learning_rate=0.01, momentum=0.0, nesterov=False, form="velocity", **common: Unpack[Common]):
        super().__init__(learning_rate, momentum=momentum, nesterov=nesterov, form=form, **common)

    def check_together(self, arguments):
        super().check_together(arguments)
        if arguments["nesterov"] and not arguments["momentum"]:
            checks.refuse("nesterov", "False without `momentum`", True)

    @property
    def rule(self):
        return FORMS[self.form] if self.opens("momentum") else sgd

    @property
    def slots(self):
        return (Slot("v", doc="velocity, sum or mean of gradients, by `form`"),) if self.opens("momentum") else ()
