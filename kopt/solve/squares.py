"""Levenberg's and Marquardt's method for losses that are sums of squares."""

import keras
import numpy as np
from keras import ops

from kopt import checks, derivatives
from kopt.solve.trust import ENOUGH, Foretold

FIRST = 1.0  # the first damping, in shares of the largest diagonal entry of JᵀJ


class Residuals:
    """The loss of a model as a sum of squares: mean squared errors, with sample weights and penalties of squares."""

    def __init__(self, objective):
        self.objective, model = objective, objective.model
        losses = keras.tree.flatten(model.loss)
        known = ("mse", "MSE", "mean_squared_error", "MeanSquaredError")
        named = [one if isinstance(one, str) else type(one).__name__ for one in losses]
        if len(losses) != 1 or getattr(losses[0], "__name__", named[0]) not in known:
            checks.refuse("method", "another than 'lm' where the loss is not 'mse' of one output", named)
        if type(model).compute_loss is not keras.Model.compute_loss:
            checks.refuse("method", "another than 'lm' for a model with a `compute_loss` of its own", "lm")
        self.penalized = []
        for variable in objective.variables:
            penalty = getattr(variable, "regularizer", None)
            if penalty is None:
                continue
            if float(getattr(penalty, "l1", 0.0)) or not hasattr(penalty, "l2"):
                checks.refuse("method", "another than 'lm' beside penalties other than L2", penalty)
            self.penalized.append((variable, float(penalty.l2) ** 0.5))

    def __call__(self, vector, data):
        """The residuals, the sum of whose squares is the loss."""
        _, y, sample_weight, _ = data
        values = dict(zip(map(id, self.objective.variables), self.objective.split(vector), strict=True))
        predicted = self.objective.predicted(vector, data)
        y = ops.reshape(ops.cast(y, predicted.dtype), predicted.shape)
        rows = (predicted - y) / float(np.prod(predicted.shape)) ** 0.5
        if sample_weight is not None:
            weight = ops.sqrt(ops.cast(sample_weight, rows.dtype))
            rows = rows * ops.reshape(weight, (*weight.shape, *[1] * (len(rows.shape) - len(weight.shape))))
        parts = [ops.reshape(rows, (-1,))]
        parts += [factor * ops.reshape(values[id(variable)], (-1,)) for variable, factor in self.penalized]
        return ops.cast(ops.concatenate(parts), self.objective.dtype)


class LevenbergMarquardt(Foretold):
    """Solve (JᵀJ + μ) step = -Jᵀr, with the μ of Nielsen: less where the linear model has foretold well.

    Nielsen, "Damping parameter in Marquardt's method", Technical University of Denmark, IMM-REP-1999-05. The smaller of
    JᵀJ and JJᵀ is solved, on the host, in float64.
    """

    def __init__(self, start, rules, residuals, jacobian):
        super().__init__(start, rules)
        self.residuals, self.jacobian = residuals, jacobian
        self.damping, self.growth = None, 2.0

    def loss_at(self, x):
        return float(np.sum(np.asarray(self.residuals(x), "float64") ** 2))

    def gradient_at(self, x):
        self._linearize(x)
        return (2 * self.jacobian_now.T @ self.residuals_now).astype(x.dtype)

    def learn(self, ratio, length):
        if ratio > ENOUGH:
            self.damping, self.growth = self.damping * max(1 / 3, 1 - (2 * min(ratio, 1.0) - 1) ** 3), 2.0
        else:
            self.damping, self.growth = self.damping * self.growth, self.growth * 2

    def _linearize(self, x) -> None:
        residuals, jacobian = self.jacobian(x)
        self.residuals_now, self.jacobian_now = np.asarray(residuals, "float64"), np.asarray(jacobian, "float64")
        j = self.jacobian_now
        self.normal = j.T @ j if j.shape[1] <= j.shape[0] else j @ j.T
        if self.damping is None:
            self.damping = FIRST * max(float(np.max(np.sum(j * j, axis=0))), np.finfo("float64").tiny)

    def propose(self, loss):
        """The step for the damping there is, and the decrease that the linear model promises."""
        r, j = self.residuals_now, self.jacobian_now
        damped = self.normal + self.damping * np.eye(len(self.normal))
        try:
            is_tall = j.shape[1] <= j.shape[0]
            step = -np.linalg.solve(damped, j.T @ r) if is_tall else -j.T @ np.linalg.solve(damped, r)
        except np.linalg.LinAlgError:
            return np.full(j.shape[1], np.nan), 0.0
        return step, loss - float(np.sum((r + j @ step) ** 2))


def jacobian_of(residuals):
    """`(vector, data) -> (residuals, Jacobian)`."""
    return lambda vector, data: derivatives.value_and_jacobian(lambda w: residuals(w, data))(vector)
