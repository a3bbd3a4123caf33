"""Schedules in `fit`: the rates that reach the weights, whatever the optimizer, the backend and the way it compiles."""

import keras
import numpy as np
import pytest
from keras import ops

import kopt
import kopt.schedules as ks
from tests.catalog import BATCHES, EPOCHS, SCHEDULES, STEPS
from tests.conftest import BACKEND

Multi, Map, Scaled = keras.optimizers.MultiOptimizer, keras.optimizers.OptimizerMap, keras.optimizers.LossScaleOptimizer
RATE = 0.5
WAYS = {"plain": {"jit_compile": False}, "three": {"steps_per_execution": 3}, "seven": {"steps_per_execution": 7},
        "xla": {"jit_compile": True}, "eager": {"run_eagerly": True}}  # fmt: skip
if BACKEND == "torch":
    WAYS = {"plain": {}}  # Keras has one step an execution there
OPTIMIZERS = {
    "kopt": lambda: kopt.SGD(RATE),
    "keras": lambda: keras.optimizers.SGD(RATE),
}
DRIVEN = [row for row in SCHEDULES if row.callback is not None]


class Ones(keras.utils.PyDataset):
    """Batches in which only the weight of that step has a gradient: 1."""

    def __init__(self, batches, steps):
        super().__init__()
        self.rows, self.batches, self.epoch = np.eye(steps, dtype="float32"), batches, 0

    def __len__(self):
        return self.batches

    def __getitem__(self, i):
        i += self.epoch * self.batches
        return self.rows[i : i + 1], np.zeros((1, 1), "float32")


class Epoch(keras.callbacks.Callback):
    """Tells the data which epoch it is."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def on_epoch_begin(self, epoch, logs=None):
        self.data.epoch = epoch


def weighing(optimizer, steps=STEPS, **compiled):
    """A model with a weight for each step of a training."""
    model = keras.Sequential(
        [keras.Input((steps,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", name="only")]
    )
    model.compile(optimizer, loss=lambda true, predicted: ops.mean(predicted), **compiled)
    return model


def weigh(model, callbacks, epochs=EPOCHS, batches=BATCHES, **arguments):
    """The rate that each step of a `fit` moved its weight by, and the history."""
    steps, before = model.count_params(), model.get_weights()[0][:, 0]
    data = Ones(batches, steps)
    history = model.fit(data, epochs=epochs, verbose=0, shuffle=False, callbacks=[Epoch(data), *callbacks], **arguments)
    return before - model.get_weights()[0][:, 0], history.history


def near(rates, expected, rtol=1e-5):
    np.testing.assert_allclose(rates, expected, rtol=rtol, atol=1e-6)


SLOW = pytest.mark.slow  # all of them; otherwise each row goes one way with each optimizer
SLOW = pytest.mark.slow  # all of them; otherwise each row goes one way with each optimizer
EVERY = [
    pytest.param(row, make, way, id=f"{row}-{name}-{way_name}", marks=() if (i + j) % len(WAYS) == k else SLOW)
    for i, row in enumerate(DRIVEN)
    for j, (name, make) in enumerate(OPTIMIZERS.items())
    for k, (way_name, way) in enumerate(WAYS.items())
]


@pytest.mark.parametrize(("row", "make", "way"), EVERY)
def test_the_rates_that_reach_the_weights(row, make, way):
    optimizer = make()
    scale = RATE if row.make().is_factor else 1.0
    if row.cls is ks.CyclicalRate:  # its lowest value is the optimizer's own
        optimizer.learning_rate = 1.0
    model = weighing(optimizer, **way)
    rates, history = weigh(model, [row.callback(**row.arguments)])
    expected = scale * row.values(range(STEPS), STEPS)
    near(rates, expected)
    near(history["learning_rate"], expected[BATCHES - 1 :: BATCHES])
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(scale)
    assert len(model.optimizer.variables) <= 3
