"""The layers, and what they rest on."""

import keras
import numpy as np
import pytest
from keras import layers

from kopt._keras import modes
from tests.training import near, numpy


def with_batch_norm():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(momentum=0.5), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.0), loss="mse")
    return model, model.layers[0]


X = np.random.default_rng(0).normal(3.0, 2.0, (16, 3)).astype("float32")
Y = np.zeros((16, 1), "float32")


@pytest.mark.parametrize("within", [False, True])
def test_batch_normalization_uses_and_keeps_its_statistics_within_a_fit(within):
    model, norm = with_batch_norm()
    if within:
        model = keras.Sequential([keras.Input((3,)), keras.Sequential(model.layers)])
        model.compile(keras.optimizers.SGD(0.0), loss="mse")
    before, expected = numpy(norm.variables), model.evaluate(X, Y, verbose=0)
    with modes.called_with([norm], training=False):
        found = model.fit(X, Y, verbose=0).history["loss"][0]
    near([np.array(found)], [np.array(expected)])
    near(norm.variables, before, 0)
    model.train_function = None
    model.fit(X, Y, verbose=0)
    assert np.abs(numpy([norm.moving_mean])[0] - before[2]).min() > 0.5


def test_the_inner_context_counts_and_all_is_put_back():
    seen = []

    class Sees(layers.Layer):
        def call(self, x, scale, training=None):
            seen.append(training)
            return x * scale

    def fails(layer, deaf):
        with modes.called_with([layer, deaf, layer], training=True):
            layer(one, one, training=False)
            with modes.called_with([layer], training=False):
                layer(one, one, training=True)
                layer.call(one, one, True)
            layer(one, one)
            raise KeyError

    layer, deaf, one = Sees(), layers.Dense(1), np.ones((1, 1), "float32")
    with pytest.raises(KeyError):
        fails(layer, deaf)
    layer(one, one)
    layer(one, one, training=True)
    assert seen == [True, False, False, True, None, True]
    assert "call" not in vars(layer)
    assert "call" not in vars(deaf)
