"""L-BFGS: the inverse Hessian from the last steps, as a recursion through them. Liu & Nocedal, 1989."""

from typing import Unpack

from kopt import checks
from kopt._keras import register
from kopt.optimizers.quasi_newton.optimizer import Common, QuasiNewton
from kopt.optimizers.rule import Choice


class Recursion:
    """The memory of L-BFGS: the last steps, how the gradient turned along each, and their products."""

    def __init__(self, size):
        self.size = size

    def empty(self, x, m):
        rows = m.zeros((self.size, *x.shape))
        return rows, m.zeros(rows.shape), m.zeros((self.size,))

    def learnt(self, memory, search, change, turn, when, m):
        """The memory with one more pair, in the place of the oldest, and whether there is one more."""
        product = m.dot(change, turn)
        when = when & is_curved(product, change, turn, m)
        place = search.pairs % self.size
        return tuple(
            m.put(rows, row, place, when) for rows, row in zip(memory, (change, turn, product), strict=True)
        ), when

    def direction(self, state, m):
        return -times(state.memory, state.search.pairs, state.gradient, self.size, m)

    @staticmethod
    def has_scale(search):
        """Whether a step of 1 is a good first guess."""
        return search.pairs > 0


def is_curved(product, change, turn, m):
    """Whether the loss curves upward along a step, beyond rounding: whether the angle of step and turn is acute.

    An angle, since the usual test against the length of the step leaves out good pairs where the loss is flat.
    """
    steps, turns = m.dot(change, change), m.dot(turn, turn)
    is_number = (product > m.least) & (turns > m.least)
    return is_number & (product > m.eps * m.sqrt(steps) * m.sqrt(turns))


def times(memory, pairs, vector, size, m):
    """The inverse Hessian that the last pairs stand for, times a vector: the two loops."""
    changes, turns, products = memory[0], memory[1], m.table(memory[2])
    known = m.minimum(pairs, size)

    def place(age):
        return (pairs - 1 - age) % size

    def back(age, carry):  # from the youngest pair to the oldest
        vector, shares = carry
        share = m.ratio(m.dot(m.row(changes, place(age)), vector), m.row(products, place(age)))
        return vector - share * m.row(turns, place(age)), m.put(shares, share, age)

    def forth(i, carry):  # and to the youngest again
        vector, shares = carry
        age = known - 1 - i
        share = m.row(shares, age) - m.ratio(m.dot(m.row(turns, place(age)), vector), m.row(products, place(age)))
        return vector + share * m.row(changes, place(age)), shares

    vector, shares = m.repeat(known, back, (vector, m.blank(size)))
    last = m.row(turns, place(0))
    vector = vector * m.where(pairs > 0, m.ratio(m.row(products, place(0)), m.dot(last, last)), 1.0)
    return m.repeat(known, forth, (vector, shares))[0]


@register
class LBFGS(QuasiNewton):
    """Step along the gradient as the last steps have shown it to bend: quasi-Newton with little memory.

        H₀ = sᵀy / yᵀy,    H <- (I - s yᵀ / sᵀy) H (I - y sᵀ / sᵀy) + s sᵀ / sᵀy   for each of the last pairs
        w -= a H g,    with a from the line search

    where s is a step and y how the gradient turned along it. H is never made: two loops through the pairs give H g. A
    pair is left out where the loss does not curve upward along s. One training step is one evaluation of loss and
    gradient; most of them are steps of the method as well, since the search mostly takes the first it tries.

    When to use it: few parameters and all data in one batch, without Dropout: physics-informed networks, regression,
    logistic regression, an image to optimise. Begin with some hundred steps of Adam where the start is poor. It is not
    for mini-batches.

    Args:
        memory: How many pairs to keep. It costs 2 * memory floats a weight; 10 to 50 are usual.
        **common: `line_search="wolfe"`, `c1=1e-4`, `c2=0.9`, `gtol=1e-5`, `ftol="auto"`, `max_line_search=25`,
            `accumulate_steps=None`, `check_noise=True` and `name`: `kopt.QuasiNewton` says what they are.

    Example:
        >>> import keras, kopt, numpy as np
        >>> keras.utils.set_random_seed(0)
        >>> x = np.linspace(-1, 1, 32, dtype="float32")[:, None]
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
        >>> model.compile(kopt.LBFGS(), loss="mse")
        >>> history = model.fit(x, np.sin(3 * x), batch_size=len(x), shuffle=False, epochs=60, verbose=0)
        >>> model.optimizer.loss < 0.01
        True

    Reference:
        Liu & Nocedal, On the limited memory BFGS method for large scale optimization, Mathematical Programming 45,
        1989.

    Differs from torch's in that a training step is one evaluation, that tolerances are relative and ask for five steps
    in a row, and that it backs off from NaN; from SciPy's in that it works in float32, on the device.
    """

    memory = Choice(checks.count(1))

    def __init__(self, memory: int = 10, **common: Unpack[Common]):
        super().__init__(memory=memory, **common)

    def method(self):
        return Recursion(self.memory)
