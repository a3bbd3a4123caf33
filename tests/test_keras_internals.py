"""What kopt/_keras.py relies on in Keras. A failure here says which private name changed, and where it is used."""

import inspect

import keras
import numpy as np
import pytest

import kopt
from tests.conftest import BACKEND

KerasOptimizer = keras.optimizers.Optimizer


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_hooks_that_the_bridge_overrides():
    assert parameters(KerasOptimizer._backend_update_step) == ["self", "grads", "trainable_variables", "learning_rate"]
    assert parameters(KerasOptimizer._apply_weight_decay) == ["self", "variables"]
    assert parameters(KerasOptimizer.apply) == ["self", "grads", "trainable_variables"]


def test_keras_calls_the_hooks_in_the_order_that_gradients_py_writes_down(monkeypatch):
    calls = []
    for name in ("_backend_apply_gradients", "_clip_gradients", "_apply_weight_decay", "_backend_update_step"):
        original = getattr(kopt.SGD, name)

        def spy(self, *args, name=name, original=original):
            calls.append(name)
            return original(self, *args)

        monkeypatch.setattr(kopt.SGD, name, spy)
    kopt.SGD().apply([keras.ops.ones(2)], [keras.Variable(np.ones(2))])
    assert calls == ["_backend_apply_gradients", "_clip_gradients", "_apply_weight_decay", "_backend_update_step"]


def test_private_attributes():
    optimizer, w = kopt.SGD(0.5), keras.Variable(np.ones(2))
    assert isinstance(optimizer._learning_rate, keras.Variable)
    before = len(optimizer.variables)
    optimizer._untrack_variable(optimizer._learning_rate)
    assert len(optimizer.variables) == before - 1
    optimizer.build([w])
    assert optimizer._get_variable_index(w) == 0
    assert hasattr(w, "_layout")
    assert hasattr(optimizer, "_distribution_strategy") == (BACKEND == "tensorflow")


def test_the_private_class_of_keras_still_rounds_a_constant_to_float32():
    """The reason for `_keras.constant`; when this fails, Keras's own initializer will do."""
    if BACKEND != "tensorflow":
        pytest.skip("Keras has this defect on TensorFlow only")
    value = keras.initializers.Constant(0.1)((), "float64")
    assert float(value) != 0.1


def test_maximum_still_rounds_float64_on_torch():
    """The reason for `numerics.larger`; when this fails, `ops.maximum` will do."""
    if BACKEND != "torch":
        pytest.skip("Keras has this defect on torch only")
    a = keras.ops.convert_to_tensor(0.1, "float64")
    assert keras.backend.standardize_dtype(keras.ops.maximum(a, a).dtype) == "float32"
