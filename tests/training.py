"""What the tests train: variables with given gradients, and a small network."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

from tests.catalog import CLASSES, OPTIMIZERS
from tests.conftest import BACKEND

every_row = pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
every_class = pytest.mark.parametrize("row", CLASSES, ids=str)


def in_turn(first: dict, second: dict):
    """Each of the first with one of the second, in turn; the other pairs are slow."""
    return [
        pytest.param(one, other, marks=() if i % len(second) == k else pytest.mark.slow, id=f"{name}-{other_name}")
        for i, (name, one) in enumerate(first.items())
        for k, (other_name, other) in enumerate(second.items())
    ]


def every_row_in(name, ways):
    """Every row in the first of some ways, and one of each class in all of them; the other rows in these are slow."""
    pairs = [(row, way, way == ways[0] or row in CLASSES) for row in OPTIMIZERS for way in ways]
    marked = [
        pytest.param(row, way, marks=() if quick else pytest.mark.slow, id=f"{row}-{way}") for row, way, quick in pairs
    ]
    return pytest.mark.parametrize(("row", name), marked)


START = np.linspace(-1, 1, 6, dtype="float32").reshape(2, 3)
STREAM = np.random.default_rng(0).normal(size=(6, 2, 3)).astype("float32")
X = np.random.default_rng(1).normal(size=(24, 4)).astype("float32")
Y = X @ np.random.default_rng(2).normal(size=(4, 2)).astype("float32")

PAIRS = [[g, g[0] * 3] for g in STREAM]  # gradients of two variables
CLIPS = [{"clipnorm": 0.5}, {"clipvalue": 0.1}, {"global_clipnorm": 0.5}]
every_clip = pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: next(iter(clip)))


class Ones:
    """A gradient of ones, whatever the shape."""

    def reshape(self, shape):
        return np.ones(shape, "float32")


STEPS = [Ones()] * 3


@functools.cache  # two of them in one process would mix up their collective operations
def mirrored():
    """TensorFlow's strategy for two devices."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def numpy(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]  # copies: on torch they would be views


def equal(ours, theirs):
    return all(np.array_equal(a, b) for a, b in zip(numpy(ours), numpy(theirs), strict=True))


def run(optimizer, *variables, stream=STREAM):
    """Train the variables, all with the same gradients."""
    for g in stream:
        optimizer.apply([ops.convert_to_tensor(g.reshape(v.shape), dtype=v.dtype) for v in variables], list(variables))
    return numpy(variables)


MODES = {"tensorflow": ("eager", "graph", "xla"), "jax": ("eager", "jit"), "torch": ("eager", "stateless")}[BACKEND]
every_mode = pytest.mark.parametrize("mode", MODES)
every_row_in_every_mode = every_row_in("mode", MODES)


def train(mode, optimizer, variables, stream):
    """Do one step for each list of gradients in the stream, in one of the ways that a backend can run it."""
    optimizer.build(variables)
    state = optimizer.variables
    stream = [[g if g is None else ops.convert_to_tensor(g, v.dtype) for g, v in zip(gs, variables, strict=True)]
              for gs in stream]  # fmt: skip
    if mode == "eager":
        for gradients in stream:
            optimizer.apply(gradients, variables)
    elif mode in ("graph", "xla"):
        import tensorflow as tf

        step = tf.function(lambda *gradients: optimizer.apply(gradients, variables), jit_compile=mode == "xla")
        for gradients in stream:
            step(*gradients)
    else:
        step = optimizer.stateless_apply
        if mode == "jit":
            import jax

            step = jax.jit(step, donate_argnums=(0, 2))
        held = [[ops.copy(v.value) for v in state], [ops.copy(v.value) for v in variables]]
        for gradients in stream:
            weights, values = step(held[0], gradients, held[1])
            held = [values, weights]
        for variable, value in zip([*state, *variables], [*held[0], *held[1]], strict=True):
            variable.assign(value)


def near(ours, theirs, tolerance=1e-6):
    for a, b in zip(numpy(ours), numpy(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def state_of(optimizer, *variables, but=()):
    """The values of all variables of an optimizer, and of others, by name."""
    own = {v.name: v for v in optimizer.variables if v.name not in but} | {f"w{i}": v for i, v in enumerate(variables)}
    return dict(zip(own, numpy(own.values()), strict=True))


def same(one, other):
    """Whether two states are equal to the bit; says where they are not."""
    assert one.keys() == other.keys()
    return [name for name in one if not np.array_equal(one[name], other[name])] == []


def two():
    return [keras.Variable(START, name="a"), keras.Variable(START[0] * 5, name="b")]


def spoilt(pair, value, which):
    pair = [g.copy() for g in pair]
    pair[which].flat[-1] = value
    return pair


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
