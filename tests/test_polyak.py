"""Polyak averaging in the compiled step: the mean is that of the weights after each update."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from tests import oracles
from tests.conftest import BACKEND
from tests.test_callback_base import EVERY, OPTIMIZERS, UNBUILT, WAYS, Weights, assert_gone, multi, place
from tests.test_distribution import TENSORFLOW, dense, many_devices
from tests.training import X, Y, in_turn, near, network, numpy

Polyak = kopt.callbacks.PolyakAveraging


def fitted(model, callback, *others, x=X, epochs=3, **more):
    arguments = {"batch_size": 4, "epochs": epochs, "shuffle": False, "verbose": 0} | more
    return model.fit(x, Y, callbacks=[callback, *others], **arguments)


def watched(model, x=X, epochs=3):
    """The weights as Python sees them after each update."""
    watch = Weights()
    model.fit(x, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=[watch])
    return watch.updates


@functools.cache
def watched_adam():
    keras.utils.set_random_seed(0)
    return watched(network(keras.optimizers.Adam(0.1), **WAYS[0]))


def average_of(updates, skip=0, **arguments):
    """The average of the weights after each update but the first ones."""
    assert len(updates) > skip
    series = {path: [weights[path] for weights in updates[skip:]] for path in updates[0]}
    return {path: oracles.polyak(values, **arguments) for path, values in series.items()}


def shown(model, callback):
    with callback.applied():
        return {place(v): numpy([v])[0] for v in model.trainable_variables}


def near_average(model, callback, expected, tolerance=1e-6):
    found = shown(model, callback)
    assert found.keys() == expected.keys()
    near([found[path] for path in expected], expected.values(), tolerance)


FORMS = {  # arguments -> those of the oracle, and how many updates are left out of it
    "ema": ({"momentum": 0.9}, {"momentum": 0.9}),
    "default": ({}, {"momentum": 0.995}),
    "none": ({"momentum": 0.0}, {"momentum": 0.0}),
    "long": ({"momentum": 0.9999}, {"momentum": 0.9999}),
    "uncorrected": ({"momentum": 0.9, "bias_correction": False}, {"momentum": 0.9, "corrected": False}),
    "window": ({"window_steps": 4}, {"momentum": 0.75}),
    "epochs": ({"window_epochs": 1.5}, {"momentum": 1 - 1 / 9}),
    "short": ({"window_epochs": 0.01}, {"momentum": 0.0}),
    "sparse": ({"momentum": 0.9, "update_every_steps": 3}, {"momentum": 0.9, "every": 3}),
    "late": ({"momentum": 0.9, "start_epoch": 1}, {"momentum": 0.9, "skip": 6}),
    "late and sparse": (
        {"momentum": 0.9, "start_epoch": 2, "update_every_steps": 4},
        {"momentum": 0.9, "every": 4, "skip": 12},
    ),
    "uniform": ({"kind": "uniform"}, {"momentum": 1.0}),
    "tail": ({"kind": "uniform", "start_epoch": 1}, {"momentum": 1.0, "skip": 6}),
    "each epoch": ({"kind": "uniform", "update_every_steps": 6}, {"momentum": 1.0, "every": 6}),
    "warm": ({"momentum": 0.9, "warmup_steps": 12}, {"momentum": 0.9, "warmup": 12}),
    "warm, shorter": ({"momentum": 0.9, "warmup_steps": 3}, {"momentum": 0.9, "warmup": 3}),
    "warm and sparse": (
        {"momentum": 0.9, "warmup_steps": 12, "update_every_steps": 2},
        {"momentum": 0.9, "warmup": 12, "every": 2},
    ),
}


@pytest.mark.parametrize(("arguments", "oracle"), FORMS.values(), ids=FORMS)
def test_each_form_is_the_oracles(arguments, oracle):
    expected = average_of(watched_adam(), **oracle)
    keras.utils.set_random_seed(0)
    model, callback = network(keras.optimizers.Adam(0.1)), Polyak(**arguments)
    fitted(model, callback)
    assert_gone(model)
    near_average(model, callback, expected)


@pytest.mark.parametrize(("make", "way"), [each for each in EVERY if not each.marks])  # the rest: test_callback_base
def test_every_optimizer_in_one_of_the_ways(make, way):
    arguments = {"momentum": 0.8, "start_epoch": 1, "update_every_steps": 2}
    x = X.copy()
    x[9] = np.nan if make is OPTIMIZERS["kopt skips"] else x[9]
    keras.utils.set_random_seed(0)
    twin, watch = network(make(), **WAYS[0]), Weights()
    done = []
    count = lambda model: done.append(len(watch.updates))  # noqa: E731
    twin.fit(x, Y, batch_size=4, epochs=4, shuffle=False, verbose=0, callbacks=[
        watch, keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: count(twin))])  # fmt: skip
    keras.utils.set_random_seed(0)
    model, callback = network(make(), **way), Polyak(**arguments)
    fitted(model, callback, x=x, epochs=4)
    assert_gone(model)
    expected = {
        path: oracles.polyak([weights[path] for weights in watch.updates[done[0] :]], momentum=0.8, every=2)
        for path in watch.updates[0]
    }
    near_average(model, callback, expected, 1e-5)
    assert len(model.optimizer.variables) == len(twin.optimizer.variables)


@TENSORFLOW
@pytest.mark.parametrize("make", [
    OPTIMIZERS["stock"],
    OPTIMIZERS["scaled multi"],
    pytest.param(OPTIMIZERS["kopt accumulates"], marks=pytest.mark.slow),
    pytest.param(multi, marks=pytest.mark.slow),
])  # fmt: skip
def test_under_a_strategy(make):
    arguments = {"momentum": 0.8, "update_every_steps": 2}
    expected = average_of(watched(dense(make())), momentum=0.8, every=2)
    with many_devices():
        model = dense(make())
    callback = Polyak(**arguments)
    before = numpy(model.trainable_variables)
    fitted(model, callback, validation_data=(X, Y))
    near_average(model, callback, expected, 1e-5)
    assert not all(np.array_equal(a, b) for a, b in zip(before, numpy(model.trainable_variables), strict=True))


@pytest.mark.skipif(BACKEND != "jax", reason="Keras distributes so on JAX")
def test_distributed_on_jax():
    expected = average_of(watched(dense(keras.optimizers.Adam(0.1))), momentum=0.8)
    with many_devices():
        model, callback = dense(keras.optimizers.Adam(0.1)), Polyak(momentum=0.8)
        fitted(model, callback, validation_data=(X, Y))
        near_average(model, callback, expected, 1e-5)


@pytest.mark.parametrize(("make", "way"), in_turn(UNBUILT, {str(way): way for way in WAYS}))
def test_a_model_that_is_not_built(make, way):
    def lazy(**way):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Dense(3, name="body"), keras.layers.Dense(2, name="head")])
        model.compile(make(), loss="mse", **way)
        return model

    expected = average_of(watched(lazy(**WAYS[0])), momentum=0.9, skip=6)
    model, callback = lazy(**way), Polyak(momentum=0.9, start_epoch=1)
    fitted(model, callback)
    near_average(model, callback, expected, 1e-5)


def test_of_constrained_weights_it_satisfies_the_constraint():
    """Keras averages before the constraint: its kernel ends at -0.03."""
    layer = keras.layers.Dense(2, kernel_constraint="non_neg")
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.SGD(0.5), loss="mse")
    fitted(model, Polyak(momentum=0.5), epochs=1)
    assert numpy([layer.kernel])[0].min() >= 0


def test_sixteen_bits_do_not_stand_still():
    """In bfloat16, 0.999 is 1: an average in that dtype never moves."""
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", dtype="bfloat16")
    model = keras.Sequential([keras.Input((2,)), layer])
    model.compile(keras.optimizers.SGD(0.0), loss="mse")
    callback = Polyak(momentum=0.999, on_train_end="raw")
    change = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: layer.kernel.assign([[1 + epoch]] * 2))
    model.fit(np.ones((300, 2)), np.ones(300), batch_size=1, epochs=2, verbose=0, callbacks=[callback, change])
    weights = 0.999 ** np.arange(600)[::-1]
    expected = np.sum(weights * np.repeat([1, 2], 300)) / weights.sum()
    (averaged,) = callback._of.values()
    (found,) = averaged.means()
    assert found.dtype == "float32"
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with callback.applied():
        np.testing.assert_allclose(numpy([layer.kernel])[0].astype("float32"), expected, rtol=2**-8)


def test_uncorrected_it_is_that_of_keras():
    keras.utils.set_random_seed(0)
    theirs = network(keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.9))
    theirs.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    keras.utils.set_random_seed(0)
    ours = network(keras.optimizers.Adam(0.1))
    fitted(ours, Polyak(momentum=0.9, bias_correction=False), epochs=2)
    near(ours.trainable_variables, theirs.trainable_variables, 1e-5)


def test_corrected_it_is_that_of_optax():
    optax = pytest.importorskip("optax", reason="optax comes with the extra for JAX")
    keras.utils.set_random_seed(0)
    twin, watch = network(keras.optimizers.Adam(0.1), **WAYS[0]), Weights()
    twin.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[watch])
    ema = optax.ema(0.9, debias=True)
    state = ema.init(watch.updates[0])
    for weights in watch.updates:
        average, state = ema.update(weights, state)
    keras.utils.set_random_seed(0)
    model = network(keras.optimizers.Adam(0.1))
    fitted(model, Polyak(momentum=0.9), epochs=2)
    near(model.trainable_variables, [average[place(v)] for v in model.trainable_variables], 1e-5)


def test_uniform_it_is_that_of_torch():
    torch = pytest.importorskip("torch", reason="torch is an extra")
    keras.utils.set_random_seed(0)
    twin, watch = network(keras.optimizers.Adam(0.1), **WAYS[0]), Weights()
    twin.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[watch])
    path = next(iter(watch.updates[0]))
    module = torch.nn.Linear(1, 1)
    module.weight = torch.nn.Parameter(torch.tensor(watch.updates[0][path]))
    averaged = torch.optim.swa_utils.AveragedModel(module)
    for weights in watch.updates:
        module.weight.data = torch.tensor(weights[path])
        averaged.update_parameters(module)
    keras.utils.set_random_seed(0)
    model = network(keras.optimizers.Adam(0.1))
    fitted(model, Polyak(kind="uniform"), epochs=2)
    near([v for v in model.trainable_variables if place(v) == path], [averaged.module.weight.detach().cpu()], 1e-5)


class Quadratic(keras.layers.Layer):
    """Many independent weights, each pulled to 0 by its curvature and pushed by noise."""

    def __init__(self, curvature, size):
        super().__init__()
        self.curvature, self.size = curvature, size
        self.w = self.add_weight(shape=(size,), initializer="zeros")

    def call(self, noise):
        return ops.sum(0.5 * self.curvature * ops.square(self.w) + self.w * noise, axis=-1, keepdims=True)


@pytest.mark.parametrize("arguments", [{"momentum": 0.9}, {"momentum": 0.97}, {"kind": "uniform"}, {}], ids=str)
def test_the_variance_on_a_noisy_quadratic_is_that_of_theory(arguments):
    """w is an autoregression with rho = 1 - rate: the exact variance of any weighted mean of it, within 5 sigma."""
    rate, size, steps = 0.2, 10_000, 250
    layer = Quadratic(1.0, size)
    model = keras.Sequential([keras.Input((size,)), layer])
    model.compile(keras.optimizers.SGD(rate), loss=lambda y, value: value)
    noise = np.random.default_rng(5).normal(size=(steps, size)).astype("float32")
    callbacks = [Polyak(**arguments)] if arguments else []
    model.fit(noise, np.zeros(steps), batch_size=1, shuffle=False, verbose=0, callbacks=callbacks)
    rho = 1 - rate
    m = arguments.get("momentum", 1.0)
    shares = m ** np.arange(steps)[::-1] if arguments else np.eye(steps)[-1]
    shares = shares / shares.sum()
    impulse = np.array([np.sum(shares[k:] * rho ** np.arange(steps - k)) for k in range(steps)])
    exact = rate**2 * np.sum(impulse**2)
    found = numpy([layer.w])[0].astype("float64").var()
    np.testing.assert_allclose(found, exact, rtol=5 * np.sqrt(2 / size))
