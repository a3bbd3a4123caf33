"""BFGS and its self-scaled relatives: the inverse Hessian as a matrix."""

from typing import Unpack

from kopt import checks
from kopt._keras import register
from kopt.optimizers.quasi_newton.lbfgs import is_curved
from kopt.optimizers.quasi_newton.optimizer import Common, QuasiNewton
from kopt.optimizers.quasi_newton.search import Search
from kopt.optimizers.rule import Choice


class Inverse:
    """The memory of a dense method: the inverse Hessian H, updated after a step s that turned the gradient by y.

    H <- (H - (Hy)(Hy)ᵀ / yᵀHy + φ yᵀHy v vᵀ) / τ + s sᵀ / sᵀy,    v = s / sᵀy - Hy / yᵀHy

    `scaling(b, h, n, m)` gives τ and φ, where b = sᵀH⁻¹s / sᵀy and h = yᵀHy / sᵀy; `m` has the functions of numbers.
    """

    def __init__(self, scaling):
        self.scaling = scaling

    def empty(self, x, m):
        return (m.zeros((*x.shape, *x.shape)),)

    def learnt(self, memory, search: Search, s, y, when, m):
        """The memory with one more pair, and whether there is one more."""
        when = when & is_curved(m.dot(s, y), s, y, m)
        return m.cond(when, lambda: (self.updated(*memory, search, s, y, m),), lambda: memory), when

    def updated(self, inverse, search, s, y, m):
        sy, first = m.dot(s, y), search.pairs == 0
        scale = m.ratio(sy, m.dot(y, y))
        inverse = m.cond(first, lambda: m.eye(s.shape[0]) * scale, lambda: inverse)
        hy = m.matmul(inverse, y)
        yhy = m.dot(y, hy)
        # H⁻¹s is -step * gradient, since the step went along -H gradient; but H is new where nothing was learnt.
        curved = m.where(first, m.ratio(m.dot(s, s), scale), -search.step * search.step * search.slope)
        tau, phi = self.scaling(m.ratio(curved, sy), m.ratio(yhy, sy), s.shape[0], m)
        v = s / sy - hy / yhy
        inverse = (inverse - m.outer(hy, hy / yhy) + m.outer(phi * yhy * v, v)) / tau + m.outer(s, s / sy)
        return (inverse + m.transpose(inverse)) / 2

    def direction(self, state, m):
        return m.cond(state.search.pairs > 0, lambda: -m.matmul(*state.memory, state.gradient), lambda: -state.gradient)

    @staticmethod
    def has_scale(search):
        return search.pairs > 0


def bfgs(b, h, n, m):
    return 1.0, 1.0


def ssbfgs(b, h, n, m):
    """Al-Baali: never scaled up."""
    return m.minimum(1.0, m.ratio(1.0, b)), 1.0


def ssbroyden(b, h, n, m):
    """Al-Baali's member of Broyden's family, with its θ between the bounds within which H stays positive definite."""
    a = m.maximum(b * h - 1, m.eps)
    c = m.sqrt(a / (1 + a))
    low = (m.minimum(1.0, h * (1 - c)) - 1) / a
    high = m.maximum(1.0, b * (1 + c))
    middle = m.ratio(1.0, 1 - b)
    theta = m.where(b > 1, m.maximum(low, middle), m.where(b < 1, m.minimum(high, middle), low))
    sigma = 1 + theta * a
    root = m.power(m.abs(sigma), 1 / (1 - n) if n > 1 else 0.0)
    least = m.minimum(1.0, m.ratio(1.0, b))
    below, above = least * root, least * m.minimum(root, m.ratio(1.0, theta))
    tau = m.where(theta <= 0, m.minimum(below, sigma), above)
    phi = m.ratio(1 - theta, sigma)
    fits = m.is_finite(tau) & m.is_finite(phi) & (tau > 0)
    return m.where(fits, tau, 1.0), m.where(fits, phi, 1.0)


class Dense(QuasiNewton):
    """What the dense methods have in common: a matrix of the size of the model's weights, squared."""

    scaling = None
    max_weights = Choice(checks.count(1))

    def __init__(self, max_weights: int = 5000, **common: Unpack[Common]):
        super().__init__(max_weights=max_weights, **common)

    def method(self):
        return Inverse(self.scaling)

    def check_size(self, size):
        if size > self.max_weights:
            allowed = f"{size} or more here: {type(self).__name__} keeps a matrix of {size} x {size}, which "
            allowed += (
                f"is {4e-9 * size**2:.1f} GB in float32, and goes through it at each step; `kopt.LBFGS` keeps none"
            )
            checks.refuse("max_weights", allowed, self.max_weights)


@register
class BFGS(Dense):
    """Step along the gradient times an inverse Hessian that is kept as a matrix and updated after each step.

        H <- (I - s yᵀ / sᵀy) H (I - y sᵀ / sᵀy) + s sᵀ / sᵀy;    w -= a H g,    with a from the line search

    where s is a step and y how the gradient turned along it; the first H is sᵀy / yᵀy.

    When to use it: as `kopt.LBFGS`, on models of up to some thousand weights, where it needs fewer evaluations.
    `kopt.SSBroyden` mostly needs fewer still.

    Args:
        max_weights: How many weights a model may have: the matrix has that number squared.
        **common: `line_search="wolfe"`, `c1=1e-4`, `c2=0.9`, `gtol=1e-5`, `ftol="auto"`, `max_line_search=25`,
            `accumulate_steps=None`, `check_noise=True` and `name`: `kopt.QuasiNewton` says what they are.

    Example:
        >>> import keras, kopt, numpy as np
        >>> x = np.linspace(-1, 1, 32, dtype="float32")[:, None]
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
        >>> model.compile(kopt.BFGS(), loss="mse")
        >>> history = model.fit(x, np.sin(3 * x), batch_size=len(x), shuffle=False, epochs=5, verbose=0)

    Reference:
        Nocedal & Wright, Numerical optimization, 2nd ed., 2006, chapter 6.

    Differs from SciPy's in that it works in float32, on the device, and that a training step is one evaluation.
    """

    scaling = staticmethod(bfgs)


@register
class SSBFGS(Dense):
    """BFGS with an inverse Hessian that is scaled before each update, where it is too small: self-scaled BFGS.

        H <- BFGS's update of H / min(1, 1 / b),    b = sᵀH⁻¹s / sᵀy

    where s is a step and y how the gradient turned along it.

    When to use it: as `kopt.SSBroyden`, which is mostly a little better.

    Args:
        max_weights: How many weights a model may have: the matrix has that number squared.
        **common: `line_search="wolfe"`, `c1=1e-4`, `c2=0.9`, `gtol=1e-5`, `ftol="auto"`, `max_line_search=25`,
            `accumulate_steps=None`, `check_noise=True` and `name`: `kopt.QuasiNewton` says what they are.

    Example:
        >>> import keras, kopt, numpy as np
        >>> x = np.linspace(-1, 1, 32, dtype="float32")[:, None]
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
        >>> model.compile(kopt.SSBFGS(), loss="mse")
        >>> history = model.fit(x, np.sin(3 * x), batch_size=len(x), shuffle=False, epochs=5, verbose=0)

    Reference:
        Al-Baali, Numerical experience with a class of self-scaling quasi-Newton algorithms, Journal of Optimization
        Theory and Applications 96, 1998. Urbán, Stefanou & Pons, Unveiling the optimization process of physics informed
        neural networks, Journal of Computational Physics 523, 2025.

    Differs from every other library in being there: neither Keras, torch, optax nor SciPy has it.
    """

    scaling = staticmethod(ssbfgs)


@register
class SSBroyden(Dense):
    """A member of Broyden's family of updates, chosen anew at each step and scaled: self-scaled Broyden.

        H <- (H - (Hy)(Hy)ᵀ / yᵀHy + φ yᵀHy v vᵀ) / τ + s sᵀ / sᵀy,    v = s / sᵀy - Hy / yᵀHy

    where s is a step and y how the gradient turned along it, and φ and τ are chosen by b = sᵀH⁻¹s / sᵀy and
    h = yᵀHy / sᵀy; BFGS is φ = τ = 1.

    When to use it: physics-informed networks and regression to many digits, up to some thousand weights, in float64
    (`keras.config.set_floatx("float64")`), after some hundred steps of Adam: it can lag in its first 300 evaluations.

    Args:
        max_weights: How many weights a model may have: the matrix has that number squared.
        **common: `line_search="wolfe"`, `c1=1e-4`, `c2=0.9`, `gtol=1e-5`, `ftol="auto"`, `max_line_search=25`,
            `accumulate_steps=None`, `check_noise=True` and `name`: `kopt.QuasiNewton` says what they are.

    Example:
        >>> import keras, kopt, numpy as np
        >>> x = np.linspace(-1, 1, 32, dtype="float32")[:, None]
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
        >>> model.compile(kopt.SSBroyden(), loss="mse")
        >>> history = model.fit(x, np.sin(3 * x), batch_size=len(x), shuffle=False, epochs=5, verbose=0)

    Reference:
        Al-Baali, Numerical experience with a class of self-scaling quasi-Newton algorithms, Journal of Optimization
        Theory and Applications 96, 1998. Urbán, Stefanou & Pons, Unveiling the optimization process of physics informed
        neural networks, Journal of Computational Physics 523, 2025.

    Differs from every other library in being there: neither Keras, torch, optax nor SciPy has it.
    """

    scaling = staticmethod(ssbroyden)
