"""Whole minimisations: of a function of tensors, and of a model's loss."""

from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
from keras import ops

from kopt import backends, checks
from kopt.optimizers.named import SOLVERS
from kopt.optimizers.quasi_newton import machine, search
from kopt.optimizers.quasi_newton.optimizer import WHY, QuasiNewton
from kopt.optimizers.quasi_newton.space import space_of

COMPILED = (
    "`minimize_fn` has compiled `value_and_grad`, since `x0` is a tensor: it may call the backend's functions alone. "
    "Give `x0` as a NumPy array, and it is called with arrays that have values."
)
MESSAGES = WHY | {"running": "`max_evals` evaluations were not enough"}


@dataclass(frozen=True)
class Minimum:
    """What `minimize_fn` has found, with the names of SciPy's `OptimizeResult`."""

    x: Any = field(repr=False)  # the best point, in the structure of `x0`
    fun: float
    jac: Any = field(repr=False)  # the gradient there
    nit: int  # steps
    nfev: int  # evaluations of function and gradient
    status: str
    message: str

    @property
    def success(self) -> bool:
        """Whether a tolerance was met."""
        return self.status in ("gradient", "loss")


def minimize_fn(
    value_and_grad, x0, method="lbfgs", *, max_evals: int = 1000, chunk: int = 100, callback=None, **options
) -> Minimum:
    """Minimise a function of tensors or NumPy arrays, given its gradient.

    Tensors are minimised where they are, the whole loop compiled on TensorFlow and JAX; NumPy arrays are given to the
    function as such, in their precision, whatever the backend. An evaluation that is infinite or NaN is a point to back
    off from.

    Args:
        value_and_grad: A function of `x` that returns the value, a scalar, and the gradient, in the structure of `x`.
        x0: Where to begin: an array, a tensor, a variable, or a list or dict of them.
        method: "lbfgs", "bfgs", "ssbfgs", "ssbroyden", or an optimizer such as `kopt.LBFGS(memory=20)`.
        max_evals: How many evaluations of function and gradient to make at most.
        chunk: How many evaluations a compiled loop makes between two calls of `callback`.
        callback: Called as `callback(result)` with what there is, after each chunk where the loop is compiled and after
            each step where it is not; it ends the minimisation by returning True.
        **options: Arguments of the optimizer, as `gtol`, `ftol`, `memory`. A tolerance of 0 switches it off.

    Example:
        >>> import kopt, numpy as np
        >>> def parabola(x):
        ...     return np.sum((x - 3) ** 2), 2 * (x - 3)
        >>> found = kopt.minimize_fn(parabola, np.zeros(2))
        >>> found.x.round(4).tolist(), found.status
        ([3.0, 3.0], 'gradient')
    """
    if not callable(value_and_grad):
        checks.refuse("value_and_grad", "a function that returns value and gradient", value_and_grad)
    max_evals, chunk = checks.count(1)("max_evals", max_evals), checks.count(1)("chunk", chunk)
    if callback is not None and not callable(callback):
        checks.refuse("callback", "a function or None", callback)
    optimizer = optimizer_of(method, options)
    point = Flat(x0)
    rules, m = optimizer.rules()._replace(check_noise=False), space_of(point.start)
    optimizer.check_size(point.start.shape[0])
    state = machine.begun(optimizer.method(), point.start, m)

    def evaluated(state, data, m):
        value, gradient = point.called(value_and_grad, state.trial)
        return machine.advanced(state, state.trial, m.number(value), gradient, optimizer.method(), rules, m)

    if point.is_compiled:
        loop = compiled_chunks(evaluated, point.dtype)
    with np.errstate(all="ignore"):
        while int(state.search.status) == search.RUNNING and int(state.search.evaluations) < max_evals:
            before = int(state.search.iterations)
            if point.is_compiled:
                state = loop(state, min(max_evals, int(state.search.evaluations) + chunk))
            else:
                state = evaluated(state, (), m)
            is_step = point.is_compiled or int(state.search.iterations) > before
            if callback is not None and is_step and callback(_result(state, point)):
                return replace(_result(state, point), message="`callback` has stopped it")
    return _result(state, point)


class Flat:
    """The point of a minimisation as one vector, and the structure that the function sees."""

    def __init__(self, x0):
        if isinstance(x0, (list, tuple)) and all(isinstance(part, (int, float)) for part in x0):
            x0 = np.asarray(x0)
        self.like = keras.tree.map_structure(self._array, x0)
        parts = keras.tree.flatten(self.like)
        if not parts or any("float" not in self.dtype_of(part) for part in parts):
            checks.refuse("x0", "numbers: an array, a tensor, a variable, or a list or dict of them", x0)
        kinds = {isinstance(part, np.ndarray) for part in parts}
        dtypes = {self.dtype_of(part) for part in parts}
        if len(kinds) > 1 or len(dtypes) > 1 or not dtypes <= {"float32", "float64"}:
            allowed = "all arrays or all tensors, and all of float32 or all of float64"
            checks.refuse("x0", allowed, sorted(f"{type(part).__name__} of {self.dtype_of(part)}" for part in parts))
        self.xp, self.dtype = np if kinds == {True} else ops, dtypes.pop()
        self.is_compiled = self.xp is ops and backends.BACKEND != "torch"
        self.start = self.joined(self.like)
        if not self.start.shape[0]:
            checks.refuse("x0", "of one number or more", x0)

    @staticmethod
    def _array(part):
        if isinstance(part, keras.Variable) or keras.ops.is_tensor(part):
            return backends.detached(part)
        array = np.asarray(part)
        return array.astype("float64") if array.dtype.kind in "iu" else array

    @staticmethod
    def dtype_of(part) -> str:
        return str(part.dtype) if isinstance(part, np.ndarray) else keras.backend.standardize_dtype(part.dtype)

    def joined(self, tree):
        parts = [self.xp.reshape(part, (-1,)) for part in keras.tree.flatten(tree)]
        return self.xp.concatenate(parts)

    def split(self, vector):
        parts, start = [], 0
        for part in keras.tree.flatten(self.like):
            size = int(np.prod(part.shape))
            own = vector[start : start + size]  # a copy where the function could write into it
            own = own.copy() if self.xp is np else own.clone() if backends.BACKEND == "torch" else own
            parts.append(self.xp.reshape(own, part.shape))
            start += size
        return keras.tree.pack_sequence_as(self.like, parts)

    def called(self, function, vector):
        """The value of a function at a vector, and its gradient as one."""
        try:
            found = function(self.split(vector))
        except Exception as error:
            if self.is_compiled:
                error.add_note(COMPILED)
            raise
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            checks.refuse("value_and_grad", "a function that returns value and gradient, both of them", function)
        value, gradient = found
        if isinstance(value, (str, complex, type(None))) or any(size != 1 for size in np.shape(value)):
            shape = f"{type(value).__name__} of shape {np.shape(value)}"
            checks.refuse("value_and_grad", "a function whose value is one number", shape)
        try:
            keras.tree.assert_same_structure(self.like, gradient)
            gradients = keras.tree.map_structure(lambda part, like: self._like(part, like), gradient, self.like)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"`value_and_grad` must return a gradient in the structure and the shapes of `x0`. {error}"
            ) from error
        return self.xp.reshape(value, ()), self.joined(gradients)

    def _like(self, part, like):
        if self.xp is np:
            part = ops.convert_to_numpy(part) if ops.is_tensor(part) else np.asarray(part)
            if part.dtype.kind not in "fiub":
                raise ValueError(f"It is of {part.dtype}.")
            part = np.array(part, self.dtype)
        else:
            part = ops.cast(backends.detached(part) if ops.is_tensor(part) else part, self.dtype)
        if tuple(part.shape) != tuple(like.shape):
            raise ValueError(f"Its shape is {tuple(part.shape)}, that of `x0` {tuple(like.shape)}.")
        return part


def optimizer_of(method, options) -> QuasiNewton:
    for name in ("maxiter", "max_iter", "maxfun", "max_eval", "maxfev"):
        if name in options:
            checks.refuse(name, "left out: the number of evaluations is `max_evals`", options[name])
    for name in ("accumulate_steps", "check_noise"):
        if name in options:
            checks.refuse(name, "left out: an evaluation is of all there is, and is taken to be exact", options[name])
    if isinstance(method, QuasiNewton) and method.accumulate_steps:
        checks.refuse("method", "an optimizer without `accumulate_steps`: an evaluation is of all there is", method)
    if isinstance(method, QuasiNewton):
        for name, value in options.items():
            checks.refuse(name, "an argument of the optimizer that `method` is", value)
        return method
    return SOLVERS[checks.one_of(*SOLVERS)("method", method)](**options)


def compiled_chunks(evaluated, dtype):
    """`(state, limit, data) -> state` after at most `limit` evaluations by `evaluated(state, data, m)`, compiled."""

    def goes_on(state, limit):
        return (state.search.status == search.RUNNING) & (state.search.evaluations < limit)

    loop = backends.compiled_loop(goes_on, lambda state, data: evaluated(state, data, space_of(state.trial)))

    def run(state, limit, data=()):
        numbers = [
            ops.convert_to_tensor(value, "int32" if name in search.INTEGERS else dtype)
            for name, value in state.search._asdict().items()
        ]
        return loop(state._replace(search=search.Search(*numbers)), ops.convert_to_tensor(limit, "int32"), data)

    return run


def _result(state, point) -> Minimum:
    s = state.search
    status = search.STATUS[int(s.status)]
    x, jac = point.split(state.point), point.split(state.gradient)
    return Minimum(x, float(s.loss), jac, int(s.iterations), int(s.evaluations), status, MESSAGES[status])
