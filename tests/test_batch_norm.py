"""The statistics of batch normalization, estimated anew: the pooled ones of NumPy, and nothing else is touched."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import kopt
from kopt import backends
from tests.training import equal, near, numpy

X = np.random.default_rng(0).normal(3.0, 2.0, size=(50, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(50, 2)).astype("float32")
IMAGES = np.random.default_rng(2).normal(size=(20, 5, 5, 3)).astype("float32")


class Rows(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return X[i * 16 : (i + 1) * 16], Y[i * 16 : (i + 1) * 16]


def dataset():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)


def loader():
    torch = pytest.importorskip("torch", reason="torch is an extra")
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y)), batch_size=16)


DATA = {
    "array": lambda: X,
    "pair": lambda: (X, Y),
    "PyDataset": Rows,
    "Dataset": dataset,
    "DataLoader": loader,
    "tensor": lambda: ops.convert_to_tensor(X),
    "batches": lambda: Again(),
}


class Again:
    """Anything that can be read again."""

    def __iter__(self):
        return iter([X[:30], X[30:]])


def one_layer(momentum=0.99, **arguments):
    layer = layers.BatchNormalization(momentum=momentum, **arguments)
    return keras.Sequential([keras.Input((4,)), layer]), layer


@pytest.mark.parametrize("make", DATA.values(), ids=DATA)
def test_they_are_those_of_all_rows(make):
    """Also where the last batch is smaller."""
    model, layer = one_layer()
    kopt.update_bn(model, make())
    near([layer.moving_mean, layer.moving_variance], [X.mean(0), X.var(0)], 1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("eagerly", [False, True])
def test_at_any_momentum_and_far_from_zero(momentum, eagerly):
    model, layer = one_layer(momentum)
    model.compile(loss="mse", run_eagerly=eagerly)
    layer.moving_mean.assign([1e6] * 4)
    kopt.update_bn(model, X + 10, batch_size=7)
    near([layer.moving_mean, layer.moving_variance], [(X + 10).mean(0), X.var(0)], 1e-4)


def test_of_images_over_all_places():
    layer = layers.BatchNormalization()
    model = keras.Sequential([keras.Input((5, 5, 3)), layer])
    kopt.update_bn(model, IMAGES, batch_size=6)
    near([layer.moving_mean, layer.moving_variance], [IMAGES.mean((0, 1, 2)), IMAGES.var((0, 1, 2))], 1e-5)


def test_a_layer_that_is_called_twice():
    """As in a Siamese network. The mean of the calls, each weighing by its place as in training, is little off."""
    one, other, layer = keras.Input((4,)), keras.Input((4,)), layers.BatchNormalization(momentum=0.99)
    model = keras.Model([one, other], layers.Concatenate()([layer(one), layer(other)]))
    kopt.update_bn(model, [X, X + 1])
    near([layer.moving_mean], [X.mean(0) + 0.5], 0.02)
    near([layer.moving_variance], [X.var(0)], 0.02)


class Counts(layers.Layer):
    """Changes a variable whenever it is called, as spectral normalization does."""

    def __init__(self):
        super().__init__()
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x, training=None):
        if training:
            self.calls.assign(self.calls + 1)
        return x


def deep(frozen=False):
    inner = keras.Sequential([layers.Dense(6), layers.BatchNormalization(momentum=0.9), layers.Dropout(0.5)])
    fixed, unused = layers.BatchNormalization(momentum=1.0, name="fixed"), layers.BatchNormalization(name="frozen")
    model = keras.Sequential([keras.Input((4,)), inner, Counts(), fixed, unused, layers.Dense(2)])
    unused.trainable = not frozen
    model.compile("adam", loss="mse", metrics=["mae"])
    return model, inner.layers[1], fixed, unused


@pytest.mark.parametrize("random", [layers.GaussianNoise(1.0), layers.Dropout(0.5)])
def test_what_is_random_differs_from_batch_to_batch(random):
    layer = layers.BatchNormalization()
    model = keras.Sequential([keras.Input((1,)), random, layer])
    kopt.update_bn(model, np.ones((3200, 1), "float32"), batch_size=32)
    np.testing.assert_allclose(numpy([layer.moving_mean, layer.moving_variance]), [[1], [1]], atol=6 * 0.025)


def test_nothing_else_is_touched():
    model, layer, *_ = deep(frozen=True)
    model.fit(X, Y, verbose=0)
    own = [layer.moving_mean, layer.moving_variance]
    others = [v for v in [*model.variables, *model.metrics_variables, *model.optimizer.variables]
              if not any(v is one for one in own)]  # fmt: skip
    before, state = numpy(others), backends.random_state()
    kopt.update_bn(model, (X, Y))
    assert equal(others, before)
    assert all(np.array_equal(value, state[name]) for name, value in backends.random_state().items() if name != "cuda")
    hidden = ops.convert_to_numpy(model.layers[0].layers[0](X))
    near(own, [hidden.mean(0), hidden.var(0)], 1e-5)
    first = numpy(own)
    kopt.update_bn(model, (X, Y))
    assert equal(own, first)


def test_a_layer_after_another_is_estimated_with_the_batches_statistics_of_that():
    first, last = layers.BatchNormalization(epsilon=1e-3), layers.BatchNormalization()
    model = keras.Sequential([keras.Input((4,)), first, layers.Dense(3), last])
    first.moving_mean.assign([9.0] * 4)
    kopt.update_bn(model, X, batch_size=25)
    parts = [(part - part.mean(0)) / np.sqrt(part.var(0) + 1e-3) for part in (X[:25], X[25:])]
    hidden = np.concatenate(parts) @ numpy([model.layers[1].kernel])[0]
    near([last.moving_mean, last.moving_variance], [hidden.mean(0), hidden.var(0)], 1e-4)


def test_refusals():
    model, _ = one_layer()
    for wrong in (iter([X]), [X, X[:3]], np.zeros((0, 4)), 3, "data", None, model):
        with pytest.raises(ValueError, match="^`data` must be arrays.* Received: data="):
            kopt.update_bn(model, wrong)
    with pytest.raises(ValueError, match="^`batch_size` must be an integer"):
        kopt.update_bn(model, X, batch_size=0)
    with pytest.raises(ValueError, match="^`data` must be not empty"):
        kopt.update_bn(model, type("Empty", (), {"__iter__": lambda self: iter([])})())
    with pytest.raises(ValueError, match="^`model` must be one without `renorm=True`"):
        kopt.update_bn(one_layer(renorm=True)[0], X)
    with pytest.raises(ValueError, match="^`model` must be built"):
        kopt.update_bn(keras.Sequential([layers.BatchNormalization()]), X)
    with pytest.raises(ValueError, match="^`model` must be"):
        kopt.update_bn("model", X)
    kopt.update_bn(keras.Sequential([keras.Input((4,)), layers.Dense(2)]), X)


def test_data_without_end_are_refused():
    with pytest.raises(ValueError, match="^`data` must be arrays"):
        kopt.update_bn(one_layer()[0], dataset().repeat())


def trained(update_bn=None, **arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.BatchNormalization(), layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    callback = kopt.callbacks.PolyakAveraging(momentum=0.9, update_bn=update_bn, **arguments)
    stop = keras.callbacks.EarlyStopping(patience=99, restore_best_weights=True)
    more = [] if arguments.get("on_train_end") == "raw" else [stop]
    history = model.fit(X, Y, batch_size=10, epochs=3, verbose=0, validation_data=(X, Y), callbacks=[callback, *more])
    return model, callback, history.history


def test_the_average_is_shown_with_statistics_of_its_own():
    model, callback, history = trained((X, Y))
    kernel, layer = model.layers[0].kernel, model.layers[1]
    assert min(history["val_loss"]) == history["val_loss"][-1]
    hidden = X @ numpy([kernel])[0] + numpy([model.layers[0].bias])[0]
    near([layer.moving_mean, layer.moving_variance], [hidden.mean(0), hidden.var(0)], 1e-4)
    np.testing.assert_allclose(model.evaluate(X, Y, verbose=0), history["val_loss"][-1], rtol=1e-5)
    raw, twin, _ = trained((X, Y), on_train_end="raw")
    averaged = numpy(model.variables)
    with callback.applied("raw"):
        assert equal(model.variables, raw.variables)
    assert equal(model.variables, averaged)
    with twin.applied():
        near(raw.weights, model.weights, 1e-6)
    statistics = numpy([raw.layers[1].moving_mean])
    without, _, _ = trained(on_train_end="raw")
    assert equal([without.layers[1].moving_mean], statistics)
    assert equal(without.trainable_variables, raw.trainable_variables)


def test_fits_in_a_row_are_one_with_statistics_of_each():
    """The next `fit` has the raw weights' statistics again, not those of the average."""
    ends = []
    for fits in ([(0, 3)], [(0, 1), (1, 2), (2, 3)]):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.BatchNormalization(), layers.Dense(2)])
        model.compile(keras.optimizers.SGD(0.1), loss="mse")
        callback = kopt.callbacks.PolyakAveraging(momentum=0.9, update_bn=X)
        for first, last in fits:
            model.fit(X, Y, initial_epoch=first, epochs=last, shuffle=False, verbose=0, callbacks=[callback])
        with callback.applied("raw"):
            ends.append(numpy(model.variables))
        ends.append(numpy(model.variables))
    assert all(
        np.array_equal(a, b)
        for one, other in zip(ends[:2], ends[2:], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    assert not np.array_equal(*(numpy([model.layers[1].moving_mean])[0], ends[0][4]))
