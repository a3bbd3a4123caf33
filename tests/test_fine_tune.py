"""`kopt.fine_tune` and `kopt.reinit_head`."""

import keras
import numpy as np
import pytest

import kopt
from tests.training import AtEpoch, equal, numpy

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = X @ np.random.default_rng(1).normal(size=(4, 1)).astype("float32")


def made(optimizer=None):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(4, name="low"), keras.layers.BatchNormalization(name="norm")]
    base = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(3, name="high")], name="base")
    head = [keras.layers.Dense(3, activation="tanh", name="neck"), keras.layers.Dense(1, name="head")]
    model = keras.Sequential([base, *head])
    model.compile(optimizer or kopt.Adam(0.01), loss="mse")
    return model, base


def tuned(model, base, **more):
    more = {"head_epochs": 1, "epochs": 2, "batch_size": 8, "shuffle": False, "verbose": 0, **more}
    return kopt.fine_tune(model, base, X, Y, **more).history


def moved(model, start):
    """Which of the weights are others than at the start, by name."""
    pairs = zip(model.weights, start, numpy(model.weights), strict=True)
    return {"/".join(v.path.split("/")[-2:]) for v, before, after in pairs if not np.array_equal(before, after)}


BODY = {"low/kernel", "low/bias", "norm/gamma", "norm/beta", "high/kernel", "high/bias"}
HEAD = {"neck/kernel", "neck/bias", "head/kernel", "head/bias"}


@pytest.mark.parametrize(
    ("given", "expected", "multipliers"),
    [
        ({}, BODY | HEAD, {"base": [0.0, 0.1, 0.1]}),
        ({"body_multiplier": 0.0}, HEAD, {"base": [0.0, 0.0, 0.0]}),
        ({"head_epochs": 0, "body_multiplier": 0.5}, BODY | HEAD, {"base": [0.5, 0.5]}),
        ({"levels": 1}, {"high/kernel", "high/bias"} | HEAD, {"base": [0.0, 0.0, 0.0], "high": [0.0, 0.1, 0.1]}),
        ({"head_epochs": 0, "levels": 1}, {"high/kernel", "high/bias"} | HEAD, {"base": [0.0] * 2, "high": [0.1] * 2}),
        ({"levels": 2, "engine": "trainable"}, BODY | HEAD, None),
        ({"ramp_epochs": 1}, BODY | HEAD, {"base": [0.0, 0.075, 0.1]}),
    ],
    ids=["default", "head", "body", "top", "top at once", "trainable", "ramp"],
)
def test_what_is_trained(given, expected, multipliers):
    model, base = made()
    start = numpy(model.weights)
    history = tuned(model, base, **given)
    assert moved(model, start) == expected
    if multipliers is not None:
        found = {name: values for name, values in history.items() if name.startswith("multiplier/")}
        assert found == {f"multiplier/{name}": pytest.approx(values) for name, values in multipliers.items()}


def test_it_is_one_fit_with_the_callback():
    """The same as what it stands for, to the bit; other callbacks and arguments go to `fit`."""
    model, base = made()
    seen = []
    look = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: seen.append(epoch))
    history = tuned(model, base, learning_rate=0.02, callbacks=[look], validation_data=(X, Y))
    assert seen == [0, 1, 2]
    assert "val_loss" in history
    other, base = made(kopt.Adam(0.02))
    staged = kopt.callbacks.StagedUnfreeze({0: {base: 0.0}, 1: {base: 0.1}})
    other.fit(X, Y, epochs=3, batch_size=8, shuffle=False, verbose=0, callbacks=[staged])
    assert equal(model.weights, other.weights)
    assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == 12


def test_the_base_may_be_a_list_of_layers():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(4, name="low"), keras.layers.ReLU(), keras.layers.Dense(3, name="high")]
    layers += [keras.layers.BatchNormalization(name="norm"), keras.layers.Dense(1, name="head")]
    inputs = keras.Input((4,))
    outputs = inputs
    for layer in layers:
        outputs = layer(outputs)
    model = keras.Model(inputs, outputs)
    model.compile("adam", loss="mse")
    start = numpy(model.weights)
    tuned(model, model.layers[:-1], levels=1)
    assert moved(model, start) == {"high/kernel", "high/bias", "norm/gamma", "norm/beta", "head/kernel", "head/bias"}
    for layer in model.layers[:-1]:
        layer.trainable = False
    with pytest.raises(ValueError, match="`base` must be of trainable weights: set `trainable = True`"):
        tuned(model, model.layers[:-1])


def test_reinit_head():
    model, base = made()
    start, body = numpy(model.weights), numpy(base.weights)
    kopt.reinit_head(model, base)
    assert moved(model, start) == {"neck/kernel", "head/kernel"}  # biases begin at 0 again
    assert equal(base.weights, body)
    base.trainable = False
    kopt.reinit_head(model, base, zeros=True)
    base.trainable = True
    assert not any(array.any() for array in numpy(model.get_layer("head").weights))
    assert numpy(model.get_layer("neck").weights)[0].any()
    start = numpy(model.get_layer("neck").weights)
    tuned(model, base, reinit=True, body_multiplier=0.0)
    assert not equal(model.get_layer("neck").weights, start)
    model, base = made(kopt.SGD(1e-30))
    tuned(model, base, reinit="zeros")
    assert np.abs(numpy(model.get_layer("head").weights)[0]).max() < 1e-20


class Bare(keras.layers.Layer):
    """A layer whose matrix is no `kernel`."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 1))

    def call(self, x):
        return x @ self.w


def test_zeros_are_refused_where_they_would_be_in_the_wrong_layer():
    base = keras.Sequential([keras.Input((8, 4)), keras.layers.Dense(3)])
    hidden = keras.layers.Dense(3, "relu")
    for last in (Bare(), keras.layers.SeparableConv1D(2, 3), keras.layers.Bidirectional(keras.layers.LSTM(2))):
        model = keras.Sequential([base, hidden, last])
        start = numpy(model.weights)
        with pytest.raises(ValueError, match="`zeros` must be False where the head does not end with .* `kernel`"):
            kopt.reinit_head(model, base, zeros=True)
        assert equal(model.weights, start)


def test_a_deep_body_beside_a_head():
    """A way back from an output that meets no head goes through the whole body."""
    inputs = outputs = keras.Input((4,))
    for _ in range(400):
        outputs = keras.layers.Identity()(outputs)
    base = keras.Model(inputs, keras.layers.Dense(3)(outputs))
    inputs = keras.Input((4,))
    features = base(inputs)
    head = keras.layers.Dense(1)
    kopt.reinit_head(keras.Model(inputs, [head(features), features]), base, zeros=True)
    assert not numpy(head.weights)[0].any()


@pytest.mark.parametrize("then", ["again", "frozen"])
def test_after_an_interrupt(then):
    """The flags of engine "trainable" are gone before anything looks at them; what was frozen since stays so."""

    def stop(model):
        raise KeyboardInterrupt

    model, base = made()
    with pytest.raises(KeyboardInterrupt):
        tuned(model, base, engine="trainable", callbacks=[AtEpoch(0, stop)])
    if then == "again":
        history = tuned(model, base, engine="trainable")
        assert history["multiplier/base"] == [0.0, 0.1, 0.1]
        return
    base.trainable = False
    model.compile("adam", loss="mse")
    start = numpy(base.weights[:4])
    model.fit(X, Y, batch_size=8, verbose=0)
    assert len(model.trainable_variables) == 4
    assert equal(base.weights[:4], start)


def test_callbacks_may_be_any_iterable():
    seen = []
    look = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: seen.append(epoch))
    model, base = made()
    tuned(model, base, callbacks=(one for one in (look,)))
    tuned(model, base, callbacks=look)
    assert seen == [0, 1, 2] * 2


def own(x):
    return keras.ops.tanh(x)


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """Of other layers, with a weight of its own, and no config."""

    def __init__(self, **more):
        super().__init__(**more)
        self.dense = keras.layers.Dense(3, activation=own)

    def build(self, shape):
        self.dense.build(shape)
        self.shift = self.add_weight(shape=(3,), initializer="ones")

    def call(self, x):
        return self.dense(x) + self.shift


def test_heads_of_all_kinds_are_drawn_anew():
    """Functions of one's own, layers of layers, recurrent ones, and a body within a plain layer."""
    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    layers = [keras.layers.LSTM(3, return_sequences=True), Block(), keras.layers.Dense(2, activation=lambda x: x)]
    model = keras.Sequential([keras.Input((2, 4)), keras.layers.TimeDistributed(base), *layers])
    for weight in model.trainable_variables:
        weight.assign(weight + 1.0)
    body, start = numpy(base.weights), [*numpy(layers[0].weights), *numpy(layers[1].weights), *numpy(layers[2].weights)]
    kopt.reinit_head(model, base)
    assert equal(base.weights, body)
    head = [weight for layer in layers for weight in numpy(layer.weights)]
    assert not any(np.array_equal(a, b) for a, b in zip(head, start, strict=True))
    np.testing.assert_array_equal(layers[1].get_weights()[0], 1.0)
    np.testing.assert_array_equal(layers[2].get_weights()[1], 0.0)


def test_what_cannot_be_drawn_anew_changes_nothing():
    class Bound(keras.Model):
        def __init__(self, base):
            super().__init__()
            self.base, self.head = base, keras.layers.Dense(1)
            self.scale = self.add_weight(shape=(1,), initializer="ones", name="scale")

        def call(self, x):
            return self.head(self.base(x)) * self.scale

    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model = Bound(base)
    model(X)
    start = numpy(model.weights)
    with pytest.raises(ValueError, match="`reinit_head` draws weights by making each layer anew, .* 'bound'"):
        kopt.reinit_head(model, base)
    assert equal(model.weights, start)


def test_zeros_in_the_last_kernel_of_each_output():
    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    inputs = keras.Input((4,))
    neck = keras.layers.Dense(3, name="neck")(base(inputs))
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="inner"), keras.layers.PReLU()])
    outputs = [keras.layers.BatchNormalization()(keras.layers.Dense(2, name="plain")(neck)), inner(neck)]
    outputs.append(keras.layers.Add()([neck, base(inputs)]))  # the neck is what comes before it
    for used, expected in ((outputs[:2], {"plain", "inner"}), (outputs[2], {"neck"})):
        model = keras.Model(inputs, used)
        body = numpy(base.weights)
        kopt.reinit_head(model, base, zeros=True)
        zeros = {v.path.split("/")[-2] for v in model.weights if v.name == "kernel" and not numpy([v])[0].any()}
        assert zeros == expected
        assert equal(base.weights, body)


def test_what_is_refused():
    model, base = made()
    for given, message in (
        ({"base": "base"}, "`base` must be the base of the model"),
        ({"base": model}, "`base` must be the base of the model"),
        ({"base": []}, "`base` must be the base of the model"),
        ({"model": keras.Sequential([keras.layers.Dense(1)])}, "`base` must be the base of the model"),
        ({"head_epochs": -1}, "`head_epochs` must be an integer of 0 or more"),
        ({"epochs": 0}, "`epochs` must be an integer of 1 or more"),
        ({"learning_rate": 0}, "`learning_rate` must be a finite number greater than 0"),
        ({"body_multiplier": -1}, "`body_multiplier` must be a finite number of 0 or more"),
        ({"levels": 3}, "`levels` must be 2 at most, as many as the base has"),
        ({"head_epochs": 0, "ramp_epochs": 1}, "`ramp_epochs` must be None without `head_epochs`"),
        ({"reinit": 1}, "`reinit` must be 'zeros' or True or False"),
        ({"initial_epoch": 2}, "`initial_epoch` must be left out"),
        ({"engine": "none"}, "`engine` must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            kopt.fine_tune(**{"model": model, "base": base, "x": X, "y": Y} | given)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    several = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), {"head/.*": keras.optimizers.Adam(0.1)})
    for optimizer in (kopt.SGD(schedule), keras.optimizers.MultiOptimizer(several)):
        model.compile(optimizer, loss="mse")
        with pytest.raises(ValueError, match="`learning_rate` must be None where the optimizer has a schedule"):
            kopt.fine_tune(model, base, X, Y, learning_rate=0.1)
    model, base = made()
    tuned(model, base)
    with pytest.raises(ValueError, match="`reinit` must be False for an optimizer that has run"):
        tuned(model, base, reinit=True)
    bare = keras.Sequential([base, keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="`model` must be a compiled model"):
        kopt.fine_tune(bare, base, X, Y)
    with pytest.raises(ValueError, match="`base` must be a part of the model, so that .* trainable"):
        kopt.reinit_head(keras.Sequential([keras.Input((4,)), base]), base)
    lazy = keras.Sequential([keras.layers.Dense(1), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="`model` must be built"):
        kopt.reinit_head(lazy, lazy.layers[0])
