"""Predictions with random layers: what is random, what they come to, and that the model stays as it is."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import kopt
from kopt._keras import modes
from tests.conftest import BACKEND
from tests.training import near, numpy

X = np.random.default_rng(0).normal(size=(10, 4)).astype("float32")
Y = np.random.default_rng(1).integers(3, size=10)


def classifier(*more, rate=0.5, activation="softmax", **compiled):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6),
            *more,
            layers.Dropout(rate, seed=7),
            layers.Dense(3, activation=activation),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), loss="sparse_categorical_crossentropy", **compiled)
    return model


def state(model):
    return numpy([*model.variables, *model.optimizer.variables])


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def by_hand(model, x, n):
    """The predictions of `n` passes, with the layers as in training; for models without batch normalization."""
    return np.stack([numpy([free(model(x, training=True))])[0] for _ in range(n)]).astype("float64")


def free(tensor):
    return tensor.detach() if BACKEND == "torch" else tensor


def test_the_sums_are_those_of_the_passes():
    """The layer's own generator, which both begin with, draws the same for both."""
    model = classifier()
    seeds = numpy(modes.seeds_of(model))
    found = kopt.mc_predict(model, X, n=7)
    after = numpy(modes.seeds_of(model))
    for variable, value in zip(modes.seeds_of(model), seeds, strict=True):
        variable.assign(value)
    drawn = by_hand(model, X, 7)
    assert same(numpy(modes.seeds_of(model)), after)
    near([found.mean, found.spread], [drawn.mean(0), drawn.std(0, ddof=1)], 1e-5)
    p = drawn.mean(0)
    entropy = -(p * np.log(p)).sum(-1)
    within = -(drawn * np.log(drawn)).sum(-1).mean(0)
    near([found.entropy, found.mutual_information], [entropy, entropy - within], 1e-5)
    assert found.passes == 7
    assert {one.dtype.name for one in (found.mean, found.spread, found.entropy)} == {"float32"}


def test_the_mean_of_a_linear_network_is_its_prediction():
    model = keras.Sequential([keras.Input((4,)), kopt.layers.DropConnectDense(3, 0.2), layers.Dropout(0.2)])
    found = kopt.mc_predict(model, X, n=300, seed=0, batch_size=10)
    error = found.spread / np.sqrt(300)
    assert (np.abs(found.mean - model.predict(X, verbose=0)) < 4.5 * error + 1e-6).all()
    assert found.entropy is None
    assert found.mutual_information is None
    assert repr(found).startswith("MonteCarlo(passes=300, mean=array(")


def test_a_seed_gives_the_same_and_none_goes_on():
    model = classifier(layers.GaussianNoise(0.3))
    first, second = (kopt.mc_predict(model, X, 3, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.mean, second.mean)
    assert not np.array_equal(kopt.mc_predict(model, X, 3, seed=6).mean, first.mean)
    one, another = (kopt.mc_predict(model, X, 3).mean for _ in range(2))
    assert not np.array_equal(one, another)
    keras.utils.set_random_seed(1)
    one = kopt.mc_predict(classifier(), X, 3).mean
    keras.utils.set_random_seed(1)
    np.testing.assert_array_equal(kopt.mc_predict(classifier(), X, 3).mean, one)


@pytest.mark.parametrize(("seed", "eagerly"), [(None, False), (3, False), (3, True)])
def test_the_model_is_as_it_was(seed, eagerly):
    model = classifier(layers.BatchNormalization(), run_eagerly=eagerly)
    model.fit(X, Y, verbose=0)
    plain = model.predict(X, verbose=0)
    functions = model.train_function, model.predict_function, model.test_function
    before, seeds = state(model), {id(one) for one in modes.seeds_of(model)}
    kopt.mc_predict(model, X, 3, seed=seed)
    for variable, value in zip([*model.variables, *model.optimizer.variables], before, strict=True):
        moved = not np.array_equal(numpy([variable])[0], value)
        assert moved == (seed is None and id(variable) in seeds), variable.path
    assert (model.train_function, model.predict_function, model.test_function) == functions
    np.testing.assert_array_equal(model.predict(X, verbose=0), plain)
    assert not any("call" in vars(layer) for layer in model.layers)
    model.fit(X, Y, verbose=0)


def test_a_failure_leaves_it_as_it_was():
    class Fails(layers.Layer):
        def call(self, x):
            if fails:
                raise RuntimeError("failed")
            return x

    fails = False
    model = classifier(Fails())
    before, fails = state(model), True
    with pytest.raises(RuntimeError, match="failed"):
        kopt.mc_predict(model, X)
    assert same(state(model), before)
    assert not any("call" in vars(layer) for layer in model.layers)


def test_batch_normalization_is_as_at_inference():
    """Also where it lies in a layer that is active, whatever that one says."""

    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.seeds, self.norm = keras.random.SeedGenerator(0), layers.BatchNormalization()

        def call(self, x, training=None):
            noise = keras.random.normal(ops.shape(x), seed=self.seeds) if training else ops.zeros_like(x)
            return self.norm(x, training=training) + 1e-6 * noise

    model = keras.Sequential([keras.Input((4,)), Block(), layers.BatchNormalization()])
    found = kopt.mc_predict(model, 5 + X, 3)
    near([found.mean], [model.predict(5 + X, verbose=0)], 1e-4)
    assert found.spread.max() > 0
    near([model.layers[1].moving_mean], [np.zeros(4)], 0)


STEPS = np.random.default_rng(2).normal(size=(6, 5, 4)).astype("float32")
PICTURES = np.random.default_rng(3).normal(size=(2, 8, 8, 3)).astype("float32")
RANDOM = {
    "Dropout": (lambda: [layers.Dropout(0.5)], X),
    "SpatialDropout1D": (lambda: [layers.SpatialDropout1D(0.5)], STEPS),
    "GaussianDropout": (lambda: [layers.GaussianDropout(0.5)], X),
    "GaussianNoise": (lambda: [layers.GaussianNoise(0.5)], X),
    "AlphaDropout": (lambda: [layers.AlphaDropout(0.5)], X),
    "LSTM": (lambda: [layers.LSTM(2, dropout=0.5)], STEPS),
    "recurrent": (lambda: [layers.GRU(2, recurrent_dropout=0.5)], STEPS),
    "cells": (lambda: [layers.RNN([layers.SimpleRNNCell(2), layers.LSTMCell(3, dropout=0.5)])], STEPS),
    "Bidirectional": (lambda: [layers.Bidirectional(layers.LSTM(2, dropout=0.5))], STEPS),
    "TimeDistributed": (lambda: [layers.TimeDistributed(layers.Dropout(0.5))], STEPS),
    "nested": (lambda: [keras.Sequential([layers.Dense(4), keras.Sequential([layers.Dropout(0.5)])])], X),
    "DropPath": (lambda: [kopt.layers.DropPath(0.5)], X),
    "DropConnectDense": (lambda: [kopt.layers.DropConnectDense(3, 0.5)], X),
    "DropBlock2D": (lambda: [kopt.layers.DropBlock2D(0.3, 3)], PICTURES),
    "pooling": (lambda: [kopt.layers.FractionalMaxPooling2D(1.4)], PICTURES),
}


@pytest.mark.parametrize(("make", "x"), RANDOM.values(), ids=RANDOM)
def test_what_is_random(make, x):
    model = keras.Sequential([keras.Input(x.shape[1:]), *make()])
    found = kopt.mc_predict(model, x, 4, seed=0)
    assert found.spread.max() > 1e-3
    again = kopt.mc_predict(model, x, 4, seed=0)
    np.testing.assert_array_equal(found.mean, again.mean)


def attention():
    inputs = keras.Input((5, 4))
    return keras.Model(inputs, layers.MultiHeadAttention(2, 3, dropout=0.5)(inputs, inputs))


def test_dropout_in_attention():
    found = kopt.mc_predict(attention(), STEPS, 4, seed=0)
    assert found.spread.max() > 1e-3
    assert kopt.mc_predict(attention(), STEPS, 2, layers="multi_head_attention_1").spread.max() > 1e-4


NOT_RANDOM = {
    "rate 0": (lambda: [layers.Dropout(0.0), layers.LSTM(2)], STEPS),
    "augmentation": (lambda: [layers.RandomFlip(), layers.RandomContrast(0.5)], PICTURES),
    "normalization": (lambda: [layers.Dense(3), layers.BatchNormalization()], X),
}


@pytest.mark.parametrize(("make", "x"), NOT_RANDOM.values(), ids=NOT_RANDOM)
def test_a_model_without_random_layers_is_refused(make, x):
    model = keras.Sequential([keras.Input(x.shape[1:]), *make()])
    with pytest.raises(
        ValueError, match=r"^`model` must be one with a random layer, such as Dropout, of a rate above 0. "
    ):
        kopt.mc_predict(model, x)


def test_augmentation_is_active_only_if_it_is_named():
    flip = layers.RandomFlip("horizontal", name="flip")
    model = keras.Sequential([keras.Input((8, 8, 3)), flip, layers.SpatialDropout2D(0.5, name="drop")])
    still = kopt.mc_predict(model, PICTURES, 6, seed=0, layers="drop")
    assert set(np.unique((still.mean / PICTURES * 3).round(2))) <= {float(i) for i in range(7)}
    moved = kopt.mc_predict(model, PICTURES, 6, seed=0, layers=[flip])
    mirrored = PICTURES[:, :, ::-1]
    share = (moved.mean - PICTURES)[:, :, 0] / (mirrored - PICTURES)[:, :, 0]
    near([share], [np.broadcast_to(share[:, :1, :1], share.shape)], 1e-3)
    assert np.ptp(share[:, 0, 0]) > 0 or 0 < share[0, 0, 0] < 1


def test_only_the_named_layers_are_active():
    first, second = layers.Dropout(0.5), layers.Dropout(0.5, name="second")
    model = keras.Sequential([keras.Input((4,)), first, keras.Sequential([layers.Rescaling(3), second], name="inner")])
    for named in (first, ["second"], "inner", [model.layers[1]]):
        found = kopt.mc_predict(model, np.ones((50, 4), "float32"), 2, layers=named)
        assert set(np.unique(found.mean)) == {0.0, 3.0, 6.0}
    both = kopt.mc_predict(model, np.ones((50, 4), "float32"), 2, layers=[first, second])
    assert set(np.unique(both.mean)) == {0.0, 6.0, 12.0}
    for wrong in (3, [], "third", layers.Dropout(0.5), [first, None]):
        with pytest.raises(
            ValueError, match=r"^`layers` must be a layer of the model, the name of one, or a list of such"
        ):
            kopt.mc_predict(model, X, layers=wrong)
    with pytest.raises(ValueError, match=r"^`layers` must be random, or layers with random ones in them. Received: "):
        kopt.mc_predict(model, X, layers=model.layers[1].layers[0])


# What goes in and comes out


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[i * 4 : (i + 1) * 4], Y[i * 4 : (i + 1) * 4]


def dataset():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)


def loader():
    torch = pytest.importorskip("torch", reason="torch is an extra")
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(X)), batch_size=4)


@pytest.mark.parametrize("make", [Batches, dataset, loader, lambda: ops.convert_to_tensor(X)])
def test_all_kinds_of_data(make):
    expected = kopt.mc_predict(classifier(), X, 3, batch_size=4, seed=0)
    keras.utils.set_random_seed(0)
    found = kopt.mc_predict(classifier(), make(), 3, batch_size=4, seed=0)
    assert found.mean.shape == expected.mean.shape == (10, 3)


def test_data_do_not_change_the_draws():
    model = classifier()
    near([kopt.mc_predict(model, X, 3, batch_size=4, seed=0).mean], [kopt.mc_predict(model, Batches(), 3, seed=0).mean])


def test_what_can_be_read_once_is_refused(capsys):
    model = classifier()
    for wrong in (iter([X]), (one for one in [X]), "x", [X, X[:3]], np.ones((0, 4)), 3):
        with pytest.raises(ValueError, match="^`x` must be arrays, "):
            kopt.mc_predict(model, wrong)
    for name, wrong in {"n": 1, "batch_size": 0, "seed": -1, "verbose": -1, "model": None}.items():
        with pytest.raises(ValueError, match=f"^`{name}` must be .* Received: {name}={wrong}"):
            kopt.mc_predict(**{"model": model, "x": X, name: wrong})
    with pytest.raises(ValueError, match="^`model` must be built, so that it has weights"):
        kopt.mc_predict(keras.Sequential([layers.Dropout(0.5)]), X)
    assert capsys.readouterr().out == ""
    kopt.mc_predict(model, X, 2, batch_size=4, verbose=1)
    assert "3/3" in capsys.readouterr().out


@pytest.mark.parametrize("form", [list, tuple, dict])
def test_several_inputs_and_outputs(form):
    one, other = keras.Input((4,), name="one"), keras.Input((4,), name="other")
    x = layers.Dropout(0.5)(layers.Add()([one, other]))
    classes, number = layers.Dense(3, activation="softmax", name="classes")(x), layers.Dense(1, name="number")(x)
    yes = layers.Dense(1, activation="sigmoid", name="yes")(x)
    outputs = {"classes": classes, "number": number, "yes": yes}
    model = keras.Model([one, other], outputs if form is dict else [classes, number, yes])
    model.compile(loss={"classes": "categorical_crossentropy", "number": "mse", "yes": "binary_crossentropy"}
                  if form is dict else ["categorical_crossentropy", "mse", "binary_crossentropy"])  # fmt: skip
    data = {"one": X, "other": X} if form is dict else form([X, X])
    found = kopt.mc_predict(model, data, 5, seed=0)
    assert type(found.mean) is (dict if form is dict else list)
    shapes = keras.tree.map_structure(np.shape, list(found.mean.values()) if form is dict else found.mean)
    assert shapes == [(10, 3), (10, 1), (10, 1)]
    entropies = list(found.entropy.values()) if form is dict else found.entropy
    assert entropies[1] is None
    assert [entropies[0].shape, entropies[2].shape] == [(10,), (10, 1)]
    p = (found.mean["yes"] if form is dict else found.mean[2]).astype("float64")
    near([entropies[2]], [-(p * np.log(p) + (1 - p) * np.log(1 - p))], 1e-5)


def test_logits_have_the_entropy_of_their_probabilities():
    model = classifier(activation=None)
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    seeds = modes.seeds_of(model)
    kept = numpy(seeds)
    found = kopt.mc_predict(model, X, 5)
    for variable, value in zip(seeds, kept, strict=True):
        variable.assign(value)
    drawn = by_hand(model, X, 5)
    p = np.exp(drawn) / np.exp(drawn).sum(-1, keepdims=True)
    near([found.mean, found.entropy], [drawn.mean(0), -(p.mean(0) * np.log(p.mean(0))).sum(-1)], 1e-4)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_sixteen_bits(policy):
    model = keras.Sequential([keras.Input((4,)), layers.Dropout(0.5, dtype=policy), layers.Dense(2, dtype=policy)])
    found = kopt.mc_predict(model, X, 4)
    assert found.mean.dtype == found.spread.dtype == "float32"
    assert np.isfinite(found.spread).all()


def test_a_model_of_ones_own_class():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner, self.drop = layers.Dense(2), layers.Dropout(0.5)

        def call(self, x):
            return self.drop(self.inner(x))

    model = Own()
    model(X)
    assert kopt.mc_predict(model, X, 3).spread.max() > 0


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one backend has such functions")
def test_the_model_is_traced_once_for_each_size_of_a_batch():
    traces = []

    class Counts(layers.Layer):
        def call(self, x):
            traces.append(x.shape)
            return x

    model = classifier(Counts())
    traces.clear()
    kopt.mc_predict(model, X, 6, batch_size=5)
    assert len(traces) == 1
