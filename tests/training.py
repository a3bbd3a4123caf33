"""What the tests train: variables with given gradients, and a small network."""

import keras
import numpy as np
import pytest
from keras import ops

from tests.catalog import CLASSES, OPTIMIZERS

every_row = pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
every_class = pytest.mark.parametrize("row", CLASSES, ids=str)

START = np.linspace(-1, 1, 6, dtype="float32").reshape(2, 3)
STREAM = np.random.default_rng(0).normal(size=(6, 2, 3)).astype("float32")
X = np.random.default_rng(1).normal(size=(24, 4)).astype("float32")
Y = X @ np.random.default_rng(2).normal(size=(4, 2)).astype("float32")


class Ones:
    """A gradient of ones, whatever the shape."""

    def reshape(self, shape):
        return np.ones(shape, "float32")


STEPS = [Ones()] * 3


def numpy(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]  # copies: on torch they would be views


def equal(ours, theirs):
    return all(np.array_equal(a, b) for a, b in zip(numpy(ours), numpy(theirs), strict=True))


def run(optimizer, *variables, stream=STREAM):
    """Train the variables, all with the same gradients."""
    for g in stream:
        optimizer.apply([ops.convert_to_tensor(g.reshape(v.shape), dtype=v.dtype) for v in variables], list(variables))
    return numpy(variables)


def network(optimizer, **compiled):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, activation="relu", name="body"), keras.layers.Dense(2, name="head")]
    )
    model.compile(optimizer, loss="mse", **compiled)
    return model


def fit(model, epochs=1):
    model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return model


class AtEpoch(keras.callbacks.Callback):
    """Do something when an epoch begins."""

    def __init__(self, epoch, action):
        super().__init__()
        self.epoch, self.action = epoch, action

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            self.action(self.model)
