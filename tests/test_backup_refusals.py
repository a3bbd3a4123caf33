"""What `BackupAndRestore` refuses, before the first step, and what may be otherwise."""

import os
import shutil
import stat
import subprocess
import sys

import keras
import numpy as np
import pytest

import kopt
from kopt import store
from tests.conftest import BACKEND
from tests.test_backup import (
    BackupAndRestore,
    Fails,
    as_in_another_process,  # noqa: F401  a fixture of every test here
    batches,
    crash,
    train,
)
from tests.training import X, Y, network, numpy


def unlike(directory, match, **more):
    before = {path: path.read_bytes() for path in directory.glob("kopt-*")}
    model = more.pop("model", None) or network(more.pop("optimizer", None) or kopt.Adam(0.01))
    start = numpy(model.variables)
    callbacks = [*more.pop("callbacks", ()), more.pop("backup", None) or BackupAndRestore(directory)]
    x, y = more.pop("x", X), more.pop("y", Y)
    size = {} if y is None else {"batch_size": 8}
    with pytest.raises(ValueError, match=match):
        model.fit(x, y, epochs=3, verbose=0, callbacks=callbacks, **size, **more)
    assert {path: path.read_bytes() for path in directory.glob("kopt-*") if path.name != "kopt.lock"} == before
    assert all(np.array_equal(a, b) for a, b in zip(numpy(model.variables), start, strict=True))


def test_another_model_is_refused(tmp_path):
    crash(tmp_path)
    wider = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5, name="body"), keras.layers.Dense(2, name="head")]
    )
    wider.compile(kopt.Adam(0.01), "mse")
    unlike(tmp_path, r"weights: `.*body/kernel` of \(4, 5\) float32 here, `.*body/kernel` of \(4, 3\)", model=wider)
    deeper = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5), keras.layers.Dense(4), keras.layers.Dense(2)])
    deeper.compile(kopt.Adam(0.01), "mse")
    unlike(tmp_path, "weights: 6 variables here, 4 in the backup", model=deeper)


def test_another_optimizer_is_refused(tmp_path):
    crash(tmp_path)
    unlike(tmp_path, "optimizer: .* variables here, .* in the backup", optimizer=kopt.SGD(0.01))
    unlike(tmp_path, "optimizer: ", optimizer=keras.optimizers.Adam(0.01))


def test_other_callbacks_are_refused(tmp_path):
    crash(tmp_path)
    stopping = keras.callbacks.EarlyStopping("loss")
    unlike(tmp_path, "with state are EarlyStopping, History, but the backup has History", callbacks=[stopping])


def test_other_data_is_refused_in_the_middle_of_an_epoch(tmp_path):
    crash(tmp_path, "on_train_batch_end", 6, backup=BackupAndRestore(tmp_path, save_every_steps=1))
    unlike(tmp_path, "of batch 2 of 3, but an epoch of this data has 2", x=X[:16], y=Y[:16])
    unlike(
        tmp_path,
        "of batch 2 of an epoch, but the data cannot be put",
        x=batches(),
        y=None,
        steps_per_epoch=3,
        shuffle=False,
    )


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has one step an execution there")
def test_an_execution_that_jumps_over_the_batch_is_refused(tmp_path):
    crash(tmp_path, "on_train_batch_end", 6, backup=BackupAndRestore(tmp_path, save_every_steps=1))
    model = network(kopt.Adam(0.01), steps_per_execution=3)
    unlike(tmp_path, "`steps_per_execution` must be a divisor of 2, the batch of the backup", model=model)


def test_a_fit_that_begins_elsewhere_is_refused(tmp_path):
    crash(tmp_path, "on_train_batch_end", 3, backup=BackupAndRestore(tmp_path, save_every_steps=1))
    with pytest.raises(RuntimeError, match="`fit` begins at epoch 2, but the backup goes on at epoch 0"):
        train(tmp_path, initial_epoch=2)


def test_a_state_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path):
    class Odd(keras.callbacks.Callback):
        def get_state(self):
            return {"model": self.model}

        def set_state(self, state):
            pass

    with pytest.raises(TypeError, match="callbacks/Odd/own/model"):
        train(tmp_path, Odd(), Fails("on_train_batch_begin", error=AssertionError))


def test_two_backups_are_refused(tmp_path):
    for rival in (keras.callbacks.BackupAndRestore(str(tmp_path / "k")), BackupAndRestore(tmp_path / "b")):
        unlike(tmp_path, "`callbacks` must be a list with one that backs up", callbacks=[rival])


def test_a_directory_in_use_is_refused(tmp_path):
    code = f"""import os, sys, time
sys.path.insert(0, {str(os.getcwd())!r})
from kopt.store import Store
Store({str(tmp_path)!r}).open()
print("open", flush=True)
time.sleep(60)"""
    environment = {**os.environ, "KERAS_BACKEND": BACKEND}
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True, env=environment) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(store.InUse, match=f"in use by process {other.pid}"):
            train(tmp_path)
        other.kill()
    train(tmp_path)


@pytest.mark.parametrize("where", ["file/inside", "file"])
def test_a_directory_that_cannot_be_written_is_refused_before_the_first_step(where, tmp_path):
    (tmp_path / "file").write_text("")
    seen = Fails("on_train_batch_begin", error=AssertionError)
    with pytest.raises(OSError, match="file"):
        train(tmp_path / where, seen)


def test_a_directory_may_be_a_link_and_may_go(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    callback = BackupAndRestore(tmp_path / "link")
    crash(tmp_path / "link", backup=callback)
    shutil.rmtree(tmp_path / "there")
    (tmp_path / "link").unlink()
    assert train(tmp_path / "link", backup=callback).history.epoch == [0, 1, 2]


def test_the_files_are_private(tmp_path):
    train(tmp_path / "new")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_an_inner_fit_with_the_same_callback_is_refused(tmp_path):
    model, other = network(kopt.Adam(0.1)), network(kopt.Adam(0.1))
    backup = BackupAndRestore(tmp_path, verbose=0)
    inner = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: other.fit(X, Y, verbose=0, callbacks=[backup])
    )
    with pytest.raises(ValueError, match="`callbacks` must be others than those of the `fit` around this one"):
        model.fit(X, Y, verbose=0, callbacks=[backup, inner])


def test_a_backup_with_more_weights_is_refused_before_it_is_read(tmp_path):
    def wide(units):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units), keras.layers.Dense(2)])
        model.compile(kopt.Adam(0.1), loss="mse")
        return model

    wide(64).fit(X, Y, verbose=0, callbacks=[BackupAndRestore(tmp_path, verbose=0)])
    with pytest.raises(ValueError, match="of another model, with more weights: 23 here, 450 in the backup"):
        wide(3).fit(X, Y, verbose=0, callbacks=[BackupAndRestore(tmp_path, verbose=0)])
