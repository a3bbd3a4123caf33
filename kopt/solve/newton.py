"""Newton's method with the whole Hessian, and with products of it: the Hessian may be indefinite."""

import numpy as np

from kopt.optimizers.quasi_newton import machine, search
from kopt.optimizers.quasi_newton.space import Values
from kopt.solve.trust import Foretold

DAMPING = 4.0  # how much more is added to the Hessian until it has a Cholesky factor
LEAST = 1e-3  # that is added first, in shares of its largest diagonal entry


class Damped:
    """Newton's direction for a line search: -(H + λ)⁻¹ g, with the least λ of a series that makes it go downhill.

    Nocedal and Wright, "Numerical Optimization", algorithm 3.3. The linear algebra is done on the host, in float64.
    """

    def __init__(self, hessian):
        self.hessian, self.shift = hessian, 0.0

    def empty(self, x, m):
        return ()

    def learnt(self, memory, search, change, turn, when, m):
        return memory, False

    @staticmethod
    def has_scale(search):
        return True

    def direction(self, state, m):
        matrix = np.asarray(self.hessian(state.point), "float64")
        factor, self.shift = factored((matrix + matrix.T) / 2, self.shift)
        if factor is None:
            return -state.gradient
        half = np.linalg.solve(factor, state.gradient.astype("float64"))
        return -np.linalg.solve(factor.T, half).astype(state.gradient.dtype)


def factored(matrix, shift):
    """A Cholesky factor of a symmetric matrix with as little added to its diagonal as needed, and how much that is."""
    if not np.isfinite(matrix).all():
        return None, shift
    diagonal = np.diag(matrix)
    least = LEAST * max(np.abs(diagonal).max(), np.finfo("float64").tiny)
    shift = (
        max(shift / DAMPING, least - diagonal.min())
        if diagonal.min() <= 0
        else (shift / DAMPING if shift > least else 0.0)
    )
    while True:
        try:
            return np.linalg.cholesky(matrix + shift * np.eye(len(matrix))), shift
        except np.linalg.LinAlgError:
            shift = max(DAMPING * shift, least)


class Newton:
    """Newton's method as a minimisation, one evaluation after another."""

    def __init__(self, start, rules, value_and_gradient, hessian):
        self.m, self.rules, self.evaluate = Values(start), rules, value_and_gradient
        self.method = Damped(hessian)
        self.state = machine.begun(self.method, start, self.m)

    def go(self, limit) -> None:
        with np.errstate(all="ignore"):
            while self.state.search.status == search.RUNNING and self.state.search.evaluations < limit:
                loss, gradient = self.evaluate(self.state.trial)
                self.state = machine.advanced(
                    self.state, self.state.trial, float(loss), gradient, self.method, self.rules, self.m
                )


class TrustRegion(Foretold):
    """Newton's method within a radius, which grows and shrinks; `product(point, v)` is the Hessian times v.

    Nocedal and Wright, "Numerical Optimization", algorithm 4.1.
    """

    def __init__(self, start, rules, value_and_gradient, product, radius=1.0):
        super().__init__(start, rules)
        self.evaluate, self.product, self.radius = value_and_gradient, product, radius

    def loss_at(self, x):
        loss, self.found = self.evaluate(x)
        return float(loss) if np.isfinite(self.found).all() else np.nan

    def gradient_at(self, x):
        self.best = x, self.found
        return self.found

    def learn(self, ratio, length):
        if ratio < 0.25:
            self.radius = 0.25 * length
        elif ratio > 0.75 and length > 0.8 * self.radius:
            self.radius = 2 * self.radius

    def propose(self, loss):
        point, gradient = self.best
        return steihaug(lambda v: self.product(point, v), gradient, self.radius)


def steihaug(product, gradient, radius):
    """Conjugate gradients on the quadratic model, up to the radius or to where the curvature is negative.

    Steihaug, "The conjugate gradient method and trust regions in large scale optimization", SIAM Journal on Numerical
    Analysis 20(3), 1983. Returns the step and the decrease that the model promises.
    """
    g = gradient.astype("float64")
    step, residual, direction, bent = np.zeros_like(g), g.copy(), -g, np.zeros_like(g)  # bent: H times step
    size = np.linalg.norm(g)
    tolerance = min(0.5, np.sqrt(size)) * size

    def promised():
        return -(g @ step + 0.5 * step @ bent)

    for _ in range(2 * len(g)):
        length = np.linalg.norm(direction)  # divided by, since its product may overflow in float32
        curved = length * np.asarray(product(direction / length), "float64")
        bend, squares = direction @ curved, residual @ residual
        reach = to_boundary(step, direction, radius)
        if not np.isfinite(bend):
            break
        if bend <= 0 or (squares / bend) >= reach:
            step, bent = step + reach * direction, bent + reach * curved
            break
        length = squares / bend
        step, bent, residual = step + length * direction, bent + length * curved, residual + length * curved
        if np.linalg.norm(residual) <= tolerance:
            break
        direction = -residual + (residual @ residual / squares) * direction
    return step, promised()


def to_boundary(step, direction, radius) -> float:
    """How far one can go along a direction until the radius is reached."""
    a, b, c = direction @ direction, step @ direction, step @ step - radius**2
    return (-b + np.sqrt(max(b * b - a * c, 0.0))) / a if a > 0 else 0.0
