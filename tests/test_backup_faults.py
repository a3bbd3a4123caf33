"""What becomes of faults with `BackupAndRestore`: a full disk, weights that are not finite, an error in any hook."""

import copy
import json
import os
import pickle

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from kopt import store
from tests.disks import Failing
from tests.test_backup import (
    BackupAndRestore,
    Fails,
    Saves,
    as_in_another_process,  # noqa: F401  a fixture of every test here
    crash,
    everything,
    train,
)
from tests.training import X, Y, equal, numpy


@pytest.fixture
def full(monkeypatch):
    """A disk that is full before long."""
    disk = Failing(full=50_000)
    monkeypatch.setattr(store, "Disk", lambda: disk)
    return disk


def test_a_full_disk_leaves_what_was_saved(full, tmp_path):
    with pytest.raises(OSError, match="No space left") as caught:
        train(tmp_path, epochs=9)
    assert str(tmp_path) in str(caught.value.filename)
    full.full = None
    assert [path for path in os.listdir(tmp_path) if path.endswith(".tmp")] == []
    assert equal(everything(train(tmp_path, epochs=9)), everything(train(tmp_path / "at once", epochs=9)))


def test_a_save_that_fails_is_not_tried_at_the_next_batch(tmp_path, monkeypatch):
    tried = []

    def save(self, tree):
        tried.append((tree["epoch"], tree["step"]))
        raise OSError("full")

    monkeypatch.setattr(store.Store, "save", save)
    with pytest.warns(UserWarning, match="Not saved"), pytest.raises(OSError, match="full"):
        train(tmp_path, backup=BackupAndRestore(tmp_path, None, save_every_steps=2, on_save_error="warn"))
    assert tried == [(0, 2), (1, 1), (2, 0)]


def test_a_full_disk_can_be_warned_of(full, tmp_path):
    backup = Saves(tmp_path, on_save_error="warn")
    with (
        pytest.warns(UserWarning, match="Not saved at epoch .*No space left"),
        pytest.raises(OSError, match="No space"),
    ):
        train(tmp_path, epochs=9, backup=backup)
    assert backup.run.failed == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_saved(bad, tmp_path):
    class Spoils(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                kernel = self.model.layers[0].kernel
                kernel.assign(ops.convert_to_numpy(kernel) * bad)

    with pytest.warns(UserWarning, match="Not saved at epoch 2, step 0: .*body/kernel not finite"):
        train(tmp_path, Spoils(), epochs=2)
    tree = store.Store(tmp_path).load().tree
    assert tree["epoch"] == 1
    assert all(np.isfinite(array).all() for array in tree["weights"].values())


def test_constants_that_are_not_finite_are_no_fault(tmp_path):
    class Mask(keras.layers.Layer):
        def build(self, shape):
            start = keras.initializers.Constant(-np.inf)
            self.mask = self.add_weight(shape=(1,), initializer=start, trainable=False)

        def call(self, x):
            return x

    model = keras.Sequential([keras.Input((4,)), Mask(), keras.layers.Dense(2)])
    model.compile(kopt.Adam(0.01), "mse")
    saves = Saves(tmp_path)
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[saves])
    assert saves.positions == [(1, 0), (2, 0)]


HOOKS = [name for name in dir(keras.callbacks.Callback) if name.startswith(("on_train", "on_epoch", "on_test"))]
VALIDATED = {"validation_data": (X, Y), "epochs": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return numpy(everything(train(tmp_path_factory.mktemp("undisturbed"), **VALIDATED)))


@pytest.mark.parametrize(("hook", "error"), [*((hook, RuntimeError) for hook in HOOKS), (HOOKS[0], KeyboardInterrupt)])
def test_an_error_in_any_hook_of_another_callback_loses_nothing(hook, error, undisturbed, tmp_path):
    number = 1 if hook in ("on_train_begin", "on_train_end") else 2
    backup = BackupAndRestore(tmp_path, save_every_steps=2)
    with pytest.raises(error, match="stop"):
        train(tmp_path, Fails(hook, number, error), backup=backup, **VALIDATED)
    again = backup if "batch" in hook else None  # the same object, or another one
    assert equal(everything(train(tmp_path, backup=again, **VALIDATED)), undisturbed)


def test_a_copy_leaves_the_fit_behind(tmp_path):
    backup = BackupAndRestore(tmp_path, save_every_steps=2)
    crash(tmp_path, "on_train_batch_end", 5, backup=backup)  # the run is still there
    for twin in (copy.deepcopy(backup), pickle.loads(pickle.dumps(backup))):
        assert twin.run is None
        assert (twin.directory, twin.save_every_steps) == (str(tmp_path), 2)
        assert twin.model is None
    model = train(tmp_path, backup=copy.deepcopy(backup))
    assert copy.deepcopy(backup).run is None
    assert equal(everything(model), everything(train(tmp_path / "at once")))


def test_what_is_saved_is_numbers(tmp_path):
    train(tmp_path)
    manifest = json.loads(max(tmp_path.glob("*.json")).read_bytes())
    assert manifest["format"] == "kopt.store"
    arrays = max(tmp_path.glob("*.data")).read_bytes()
    assert len(arrays) == manifest["size"] == 32 + sum(array["bytes"] for array in manifest["arrays"])
