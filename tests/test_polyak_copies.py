"""Copies of the averaged model, which are plain models, and copies of the callback, which begin anew."""

import copy
import pickle

import keras
import numpy as np
import pytest

from tests.test_polyak_fit import Polyak, averages, fit, made
from tests.training import AtEpoch, X, Y, equal, numpy


def test_the_copy_is_a_plain_model(tmp_path):
    model, callback = made(metrics=["mae"]), Polyak(momentum=0.8, on_train_end="raw")
    fit(model, callback)
    twin = callback.averaged_model()
    assert type(twin) is type(model)
    assert equal(twin.trainable_variables, averages()[2])
    with callback.applied():
        assert twin.evaluate(X, Y, verbose=0) == model.evaluate(X, Y, verbose=0)
    twin.save(tmp_path / "averaged.keras")
    loaded = keras.models.load_model(tmp_path / "averaged.keras")
    assert np.array_equal(loaded.predict(X, verbose=0), twin.predict(X, verbose=0))
    kept = numpy(model.trainable_variables)
    fit(twin)
    assert equal(model.trainable_variables, kept)


class Own(keras.Model):
    """A model of one's own, with a layer of one's own and a loss that no config can name."""

    def __init__(self, units=3, **arguments):
        super().__init__(**arguments)
        self.units = units
        self.body = keras.layers.Dense(units, name="body")
        self.head = keras.layers.Dense(2, name="head")

    def call(self, x):
        return self.head(self.body(x))

    def get_config(self):
        return super().get_config() | {"units": self.units}


class Nameless(Own):
    def __init__(self, function, **arguments):
        super().__init__(**arguments)
        self.function = function

    get_config = keras.Model.get_config


def test_copies_have_what_layers_make_of_their_state():
    words = keras.layers.Normalization()
    words.adapt(X * 5 + 100)
    frozen = keras.layers.Dense(3, trainable=False)
    double = keras.layers.Lambda(lambda x: x * 2)
    model = keras.Sequential([keras.Input((4,)), words, frozen, double, keras.layers.Dense(2)])
    own = keras.metrics.MeanMetricWrapper(lambda y, found: keras.ops.square(y - found), name="own")
    model.compile("sgd", loss="mse", metrics=[own])
    callback = Polyak(momentum=0.8)
    model.fit(X * 5 + 100, Y, verbose=0, callbacks=[callback])
    twin = callback.averaged_model()
    assert np.array_equal(twin.predict(X, verbose=0), model.predict(X, verbose=0))
    assert len(twin.trainable_variables) == len(model.trainable_variables) == 2
    assert twin.evaluate(X, Y, verbose=0) == model.evaluate(X, Y, verbose=0)


def test_copies_of_models_of_ones_own():
    for make, error in ((lambda: Own(4), None), (lambda: Nameless(len), "cannot be made from its config")):
        model, callback = make(), Polyak(momentum=0.8)
        model.compile("adam", loss=lambda y, found: keras.ops.mean(keras.ops.square(y - found), axis=-1))
        fit(model, callback, epochs=1)
        if error:
            with pytest.raises(ValueError, match=error):
                callback.averaged_model()
        else:
            twin = callback.averaged_model()
            assert equal(twin.weights, model.weights)
            assert twin.evaluate(X, Y, verbose=0) == model.evaluate(X, Y, verbose=0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies_begin_anew_and_share_the_data(clone):
    callback = Polyak(momentum=0.8, validate="both", validation_data=(X, Y), update_bn=X)
    model = made()
    fit(model, callback, AtEpoch(1, lambda _: clone(callback)))
    twin = clone(callback)
    assert twin.updates_ == 0
    assert (twin.update_bn is X) == (clone is copy.deepcopy)
    assert fit(made(), twin) == fit(made(), Polyak(momentum=0.8, validate="both", validation_data=(X, Y)))
