"""The only file that reaches into Keras: the bridge from Keras's optimizer to kopt's, and small helpers.

Every private name used here has a test in `tests/test_keras_internals.py` that fails when Keras changes it.
"""

import contextlib

import keras
import numpy as np

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


def wide_floatx() -> str:
    return wide(keras.config.floatx())


def number(variable) -> float:
    """The value of a scalar variable as the shortest float that is stored as it: 0.9, not 0.8999999761581421."""
    return float(str(np.asarray(keras.ops.convert_to_numpy(variable))[()]))


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

    def __init__(self, learning_rate, **arguments):
        super().__init__(learning_rate, **arguments)
        if not self.rate_is_scheduled() and keras.config.floatx() != wide_floatx():  # 16 bits would round the rate
            self._untrack_variable(self._learning_rate)
            self._learning_rate = self.add_scalar("learning_rate", learning_rate)

    def scalars(self, learning_rate):
        return learning_rate

    def add_scalar(self, name, value):
        """A scalar variable of this optimizer, saved and compiled like its slots."""
        return self.add_variable(
            shape=(),
            initializer=constant(value),
            dtype=wide_floatx(),
            aggregation="only_first_replica",
            name=name,
        )

    def add_slot(self, variable, name, initializer, dtype):
        """`add_variable_from_reference` with a dtype of its own: beside `variable`, distributed like it."""
        strategy = getattr(self, "_distribution_strategy", None)  # TensorFlow only
        native = getattr(variable, "value", variable)
        with strategy.extended.colocate_vars_with(native) if strategy else contextlib.nullcontext():
            return self.add_variable(
                shape=variable.shape,
                initializer=initializer,
                dtype=dtype,
                layout=getattr(variable, "_layout", None),
                name=f"{path_of(variable).replace('/', '_').replace(':', '_')}_{name}",
            )

    def index_of(self, variable) -> int:
        """The position of a variable in the list that the optimizer was built with."""
        return self._get_variable_index(variable)

    def rate_is_scheduled(self) -> bool:
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
