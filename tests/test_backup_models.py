"""`BackupAndRestore` on many devices, and with models that hold more than they list."""

import keras
import numpy as np
import pytest

import kopt
from kopt.callbacks import training
from tests.conftest import BACKEND
from tests.test_backup import (
    BackupAndRestore,
    Fails,
    as_in_another_process,  # noqa: F401  a fixture of every test here
    everything,
)
from tests.test_distribution import mirrored
from tests.training import X, Y, equal, near


def test_keras_forgets_what_kopt_saves(tmp_path):
    """The same training with Keras's callback: it ends elsewhere, since the state of Dropout is not saved."""

    def dropout(backup, *callbacks):
        keras.utils.set_random_seed(0)
        keras.utils.clear_session(free_memory=False)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(2)])
        model.compile(keras.optimizers.Adam(0.01), "mse")
        model.fit(X, Y, batch_size=8, shuffle=False, epochs=3, verbose=0, callbacks=[backup, *callbacks])
        return model

    same = []
    for make in (keras.callbacks.BackupAndRestore, BackupAndRestore):
        directory = str(tmp_path / make.__module__)
        with pytest.raises(RuntimeError, match="stop"):
            dropout(make(directory), Fails("on_train_batch_begin", 7))
        resumed = dropout(make(directory))
        same.append(equal(resumed.weights, dropout(make(directory + "2")).weights))
    assert same == [False, True]


def assert_it_resumes(scope, tmp_path, y, **compiled):
    """A training in a scope of many devices, broken off in the middle of an epoch, ends as one that was not."""

    def train(directory, *callbacks):
        keras.utils.set_random_seed(0)
        keras.utils.clear_session(free_memory=False)
        with scope():
            head = keras.layers.Dense(y.shape[1], name="head")
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5), head])
            model.compile(kopt.Adam(0.01), "mse", **compiled)
            backup = BackupAndRestore(directory, save_every_steps=2)
            model.fit(X, y, batch_size=8, epochs=3, verbose=0, callbacks=[backup, *callbacks])
        return model

    with pytest.raises(RuntimeError, match="stop"):
        train(tmp_path, Fails("on_train_batch_end", 6))
    assert equal(everything(train(tmp_path)), everything(train(tmp_path / "at once")))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="strategies are TensorFlow's")
def test_it_works_on_many_devices(tmp_path):
    assert_it_resumes(lambda: mirrored().scope(), tmp_path, Y, jit_compile=False)


@pytest.mark.skipif(BACKEND != "jax", reason="Keras distributes so on JAX")
@pytest.mark.parametrize("kind", ["data", "model"])
def test_it_works_with_keras_distribution(kind, tmp_path):
    distribution = keras.distribution.DataParallel()
    if kind == "model":
        layout = keras.distribution.LayoutMap(keras.distribution.DeviceMesh((2, 4), ["batch", "model"]))
        layout["head/kernel"] = (None, "model")
        distribution = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    assert_it_resumes(distribution.scope, tmp_path, np.tile(Y, (1, 2)))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras trains no stateful layer here")
def test_the_states_of_a_stateful_layer_are_saved(tmp_path):
    def recurrent(directory, *callbacks):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4, 1), batch_size=8), keras.layers.LSTM(3, stateful=True)])
        model.compile(kopt.Adam(0.01), "mse")
        backup = BackupAndRestore(directory, save_every_steps=1)
        model.fit(X[..., None], np.tile(Y, 2)[:, :3], batch_size=8, epochs=3, verbose=0, callbacks=[backup, *callbacks])
        return [*model.variables, *model.layers[0].states]

    with pytest.raises(RuntimeError, match="stop"):
        recurrent(tmp_path, Fails("on_train_batch_end", 5))
    assert equal(recurrent(tmp_path), recurrent(tmp_path / "at once"))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the step is written with TensorFlow's tape")
@pytest.mark.parametrize("early", [True, False])
def test_an_optimizer_that_a_model_holds_for_a_step_of_its_own_is_saved(early, tmp_path, capsys):
    import tensorflow as tf

    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.other = keras.layers.Dense(2), keras.layers.Dense(2)
            self.second = kopt.Adam(0.1)

        def build(self, shape):
            self.one.build(shape)
            self.other.build(shape)
            self.built = True
            if early:
                self.second.build(self.other.trainable_variables)

        def train_step(self, data):
            x, y = data
            for optimizer, layer in ((self.optimizer, self.one), (self.second, self.other)):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((self.one(x) + self.other(x) - y) ** 2)
                variables = layer.trainable_variables
                optimizer.apply(tape.gradient(loss, variables), variables)
            return {"loss": loss}

    def both(directory, *callbacks, verbose=0):
        keras.utils.set_random_seed(0)
        model = Two()
        model.build((None, 4))
        model.compile(kopt.SGD(0.1, momentum=0.9))
        backup = BackupAndRestore(directory, save_every_steps=1)
        model.fit(X, Y, batch_size=8, epochs=3, verbose=verbose, callbacks=[backup, *callbacks])
        return [*everything(model), *model.second.variables]

    with pytest.raises(RuntimeError, match="stop"):
        both(tmp_path, Fails("on_train_batch_end", 5), verbose=2)
    printed = "cannot be exact to the last bit unless adam is built before `fit`" in capsys.readouterr().out
    assert printed == (not early)
    resumed = both(tmp_path)
    near(resumed, both(tmp_path / "at once"))  # TensorFlow computes this step in no fixed order, resumed or not
    assert int(resumed[-7]) == 9  # the second optimizer's iterations, kept also if it was built in the first step


def test_the_best_weights_may_be_scalars(tmp_path):
    class Scale(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(), initializer="ones")

        def call(self, x):
            return x * self.scale

    def scaled(directory, *callbacks):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), Scale(), keras.layers.Dense(2)])
        model.compile(kopt.Adam(0.3), "mse")
        stopping = keras.callbacks.EarlyStopping("loss", mode="max", patience=9, restore_best_weights=True)
        callbacks = [stopping, BackupAndRestore(directory), *callbacks]
        model.fit(X, Y, batch_size=8, epochs=3, verbose=0, callbacks=callbacks)
        return model

    with pytest.raises(RuntimeError, match="stop"):
        scaled(tmp_path, Fails("on_epoch_begin", 3))
    assert equal(everything(scaled(tmp_path)), everything(scaled(tmp_path / "at once")))


def test_callbacks_of_one_class_are_told_apart():
    stops = [keras.callbacks.EarlyStopping("loss") for _ in range(2)]
    named = kopt.callbacks.RateMonitor(name="mine"), kopt.callbacks.RateMonitor()
    keys = training.keyed([*stops, *named])
    assert list(keys) == ["EarlyStopping", "EarlyStopping#2", "RateMonitor:mine", "RateMonitor"]
