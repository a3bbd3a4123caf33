"""The only file that reaches into Keras: the bridge from Keras's optimizer to kopt's, and small helpers.

Every private name used here has a test in `tests/test_keras_internals.py` that fails when Keras changes it.
"""

import contextlib

import keras
import numpy as np

from kopt import checks

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
elif keras.backend.backend() == "torch":
    import torch

register = keras.saving.register_keras_serializable(package="kopt")


def dtype_of(variable) -> str:
    return keras.backend.standardize_dtype(variable.dtype)


def wide(dtype: str) -> str:
    """The dtype in which kopt computes and keeps state for `dtype`: float64 for float64, else float32."""
    return "float64" if dtype == "float64" else "float32"


def to_numpy(variable) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable))


def number(variable, known: float) -> float:
    """The value of a scalar variable as the shortest float that is stored as it: 0.9, not 0.8999999761581421.

    Where no value can be read, while a step is compiled or in the hands of JAX, it is the one that is `known`.
    """
    try:
        return float(str(to_numpy(variable)[()]))
    except (NotImplementedError, TypeError):
        return known


def is_symbolic(value) -> bool:
    """Whether this is a tensor of a TensorFlow function that is being traced, which has no value yet."""
    return keras.backend.backend() == "tensorflow" and tf.is_tensor(value) and not hasattr(value, "numpy")


def assign(name, variable, value) -> None:
    """Assign to a variable, unless JAX would lose it: between two steps of `fit` it holds the values itself."""
    if getattr(variable, "_value", value) is None:
        raise ValueError(
            f"`{name}` must be assigned through `self.model.optimizer`, which fetches the state from the running step, "
            f"not through a reference from before. Received: {name}={value!r}"
        )
    variable.assign(value)


def constant(value):
    """An initializer; Keras's own rounds a number to float32 on its way to float64."""
    return lambda shape, dtype: keras.ops.full(shape, keras.ops.convert_to_tensor(value, dtype), dtype)


def read(x, dtype):
    """The value of a variable or tensor as a plain tensor: Keras's operators on its variables are other ones."""
    if keras.backend.backend() == "tensorflow":  # the rows of `tf.IndexedSlices` are summed
        return tf.cast(tf.convert_to_tensor(x), dtype)
    return keras.ops.convert_to_tensor(x, dtype)


def eagerly():
    """A context that leaves the TensorFlow function being traced, so that variables hold their values at once."""
    return tf.init_scope() if keras.backend.backend() == "tensorflow" else contextlib.nullcontext()


def unrecorded():
    """A context in which torch keeps no graph for differentiation; the other backends need none."""
    return torch.no_grad() if keras.backend.backend() == "torch" else contextlib.nullcontext()


class OptimizerBridge(keras.optimizers.Optimizer):
    """Keras's optimizer with its private methods turned into hooks that have plain names.

    A subclass defines `update_step`, and may define `scalars(learning_rate)`: it is called once a step, and what it
    returns is handed to every `update_step` of that step in place of the learning rate.
    """

    def __init__(self, learning_rate, name=None):
        self.__dict__["named"] = {}  # id of a variable -> its slot and the path of the model's variable
        super().__init__(learning_rate, name=name)
        if not self.rate_is_computed() and keras.config.floatx() != checks.held_dtype():  # 16 bits would round it
            self._untrack_variable(self._learning_rate)
            self._learning_rate = self.add_scalar("learning_rate", learning_rate)

    def scalars(self, learning_rate):
        return learning_rate

    def add_scalar(self, name, value):
        """A scalar variable of this optimizer, saved and compiled like its slots."""
        return self.add_variable(
            shape=(),
            initializer=constant(value),
            dtype=checks.held_dtype(),
            aggregation="only_first_replica",
            name=name,
        )

    def add_variable_from_reference(self, reference_variable, name=None, initializer="zeros", dtype=None):
        """Keras's method, with a dtype of its own and a record of what the variable is for."""
        strategy = getattr(self, "_distribution_strategy", None)  # TensorFlow only
        native = reference_variable.value if isinstance(reference_variable, keras.Variable) else reference_variable
        path = path_of(reference_variable)
        with strategy.extended.colocate_vars_with(native) if strategy else contextlib.nullcontext():
            variable = self.add_variable(
                shape=reference_variable.shape,
                initializer=initializer,
                dtype=dtype or dtype_of(reference_variable),
                layout=getattr(reference_variable, "_layout", None),
                name=f"{path.replace('/', '_').replace(':', '_')}_{name or 'var'}",
            )
        self.named[id(variable)] = name or "var", path
        return variable

    def index_of(self, variable) -> int:
        """The position of a variable in the list that the optimizer was built with."""
        return self._get_variable_index(variable)

    def rate_source(self):
        """The schedule, the callable, or the variable that the learning rate comes from."""
        return self._learning_rate

    def rate_is_computed(self) -> bool:
        return not isinstance(self._learning_rate, keras.Variable)

    def apply(self, grads, trainable_variables=None):
        with unrecorded():
            super().apply(grads, trainable_variables)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        super()._backend_update_step(grads, trainable_variables, self.scalars(learning_rate))

    def _apply_weight_decay(self, variables):
        """Nothing: decay is part of the step (`optimizers/execution.py`), so that a weight is read and written once."""


def path_of(variable) -> str:
    """The path of a Keras variable; the name of a `tf.Variable`, which has no path."""
    return getattr(variable, "path", variable.name)
