"""`BackupAndRestore`: when it saves, what goes on, and what it says."""

import os
import sys

import keras
import numpy as np
import pytest

import kopt
from kopt.callbacks import backup, stock
from tests.conftest import BACKEND
from tests.training import X, Y, equal, network, numpy

BackupAndRestore = kopt.callbacks.BackupAndRestore
STEPS = 3  # of an epoch: 24 rows in batches of 8


class Saves(BackupAndRestore):
    """Notes where it saves."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.positions = []

    def _save(self, epoch, step, stopped=False):
        super()._save(epoch, step, stopped)
        self.positions.append((epoch, step))


class Fails(keras.callbacks.Callback):
    """Raises in a hook, at a number of its calls."""

    def __init__(self, hook, number=1, error=RuntimeError):
        super().__init__()
        self.left = number

        def fail(*arguments, **named):
            self.left -= 1
            if self.left == 0:
                raise error("stop")

        setattr(self, hook, fail)


@pytest.fixture(autouse=True)
def as_in_another_process(monkeypatch):
    """Where a training was completed in this process, it may not be begun again."""

    class Forgets(set):
        def add(self, directory):
            pass

    monkeypatch.setattr(backup, "COMPLETED", Forgets())


def train(directory, *callbacks, epochs=3, backup=None, optimizer=None, x=X, y=Y, verbose=0, compiled=None, **fit):
    keras.utils.set_random_seed(0)
    keras.utils.clear_session(free_memory=False)
    model = network(optimizer or kopt.Adam(0.01), **(compiled or {}))
    backup = backup or BackupAndRestore(directory)
    fit = {"batch_size": 8} | fit if y is not None else fit
    model.fit(x, y, epochs=epochs, verbose=verbose, callbacks=[*callbacks, backup], **fit)
    return model


def everything(model):
    return [*model.variables, *model.optimizer.variables]


def crash(directory, hook="on_epoch_end", number=2, **more):
    with pytest.raises(RuntimeError, match="stop"):
        train(directory, Fails(hook, number), **more)


@pytest.mark.parametrize(("arguments", "expected"), [
    ({}, [(1, 0), (2, 0), (3, 0), (4, 0)]),
    ({"save_every_epochs": 3}, [(3, 0), (4, 0)]),
    ({"save_every_epochs": None, "save_every_steps": 2}, [(0, 2), (2, 0), (1, 1), (2, 2), (4, 0), (3, 1)]),
    ({"save_every_epochs": None, "save_every_steps": 5}, [(1, 2), (3, 1), (4, 0)]),
    ({"save_every_steps": 2}, [(0, 2), (1, 0), (1, 1), (2, 0), (2, 2), (3, 0), (3, 1), (4, 0)]),
])  # fmt: skip
def test_it_saves_when_it_is_told(arguments, expected, tmp_path):
    backup = Saves(tmp_path, **arguments)
    train(tmp_path, backup=backup, epochs=4)
    assert sorted(backup.positions) == sorted(expected)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has one step an execution there")
def test_it_saves_at_the_right_batches_of_longer_executions(tmp_path):
    """Keras saves twice here, at other batches."""
    x, y = np.tile(X, (2, 1)), np.tile(Y, (2, 1))
    backup = Saves(tmp_path, save_every_steps=3)
    train(tmp_path, backup=backup, epochs=2, x=x, y=y, compiled={"steps_per_execution": 3})
    assert backup.positions == [(0, 3), (1, 0), (1, 3), (2, 0)]


def test_without_steps_no_batch_is_waited_for(tmp_path):
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            seen.append(sys._getframe(1).f_locals["self"]._async_train)

    for steps in (None, 2):
        train(tmp_path / str(steps), Looks(), backup=BackupAndRestore(tmp_path / str(steps), save_every_steps=steps))
    assert seen == [BACKEND != "tensorflow", False]


def test_alone_it_does_what_it_does_in_a_list(tmp_path):
    """On JAX and torch Keras calls the hooks of batches of a lone callback in other threads."""
    positions = []
    for name in ("alone", "list"):
        model, backup = network(kopt.Adam(0.01)), Saves(tmp_path / name, save_every_steps=1)
        model.fit(X, Y, batch_size=4, epochs=3, verbose=0, callbacks=backup if name == "alone" else [backup])
        positions.append(backup.positions)
    assert positions[0] == positions[1]
    assert len(positions[0]) == 3 * 6


def test_it_goes_on_with_more_epochs_as_if_they_had_been_asked_for(tmp_path):
    train(tmp_path, epochs=2)
    assert equal(everything(train(tmp_path, epochs=5)), everything(train(tmp_path / "at once", epochs=5)))


def test_a_completed_training_is_not_trained_again(tmp_path, capsys):
    model = train(tmp_path, verbose=2)
    again = train(tmp_path, verbose=2)
    assert equal(everything(model), everything(again))
    assert "was complete after epoch 3 of 3; nothing to do" in capsys.readouterr().out
    assert again.history.epoch == [0, 1, 2]
    assert len(again.history.history["loss"]) == 3


def test_a_stopped_training_stays_stopped(tmp_path, capsys):
    stopping = lambda: keras.callbacks.EarlyStopping("loss", min_delta=1e9, restore_best_weights=True)  # noqa: E731
    model = train(tmp_path, stopping(), epochs=9)
    again = train(tmp_path, stopping(), epochs=9, verbose=2)
    assert equal(everything(model), everything(again))
    assert "had been stopped after epoch 2 of 9" in capsys.readouterr().out


def test_fits_one_after_the_other_may_share_a_callback(tmp_path):
    def stages(directory, fail=()):
        keras.utils.set_random_seed(0)
        keras.utils.clear_session(free_memory=False)
        model, backup = network(kopt.Adam(0.01)), BackupAndRestore(directory)
        for _ in range(2):
            model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[backup, *fail])
        return model

    with pytest.raises(RuntimeError, match="stop"):
        stages(tmp_path, [Fails("on_epoch_end", 4)])
    assert equal(everything(stages(tmp_path)), everything(stages(tmp_path / "at once")))


def test_the_saves_can_be_deleted_at_the_end(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "kopt-00000001.data").write_text("mine, too")
    train(tmp_path, backup=BackupAndRestore(tmp_path, delete_checkpoint=True))
    assert sorted(os.listdir(tmp_path)) == ["kopt-00000001.data", "mine.txt"]


def test_a_save_that_is_damaged_gives_way_to_the_one_before(tmp_path):
    crash(tmp_path, number=3)
    newest = max(tmp_path.glob("kopt-*.data"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match="has changed since it was saved"):
        model = train(tmp_path)
    assert equal(everything(model), everything(train(tmp_path / "at once")))


def test_the_next_fit_begins_where_it_is_told(tmp_path):
    """Keras's callback leaves its first epoch in the model, for every `fit` to come."""
    crash(tmp_path)
    model = train(tmp_path, epochs=4)
    assert model.fit(X, Y, epochs=2, verbose=0).epoch == [0, 1]


def test_shuffled_arrays_come_in_another_order_in_each_epoch(tmp_path):
    """With seeds set, Keras on TensorFlow has one order for all epochs."""
    seen = []

    class Net(keras.Sequential):
        def train_step(self, *arguments):  # JAX hands the state first
            seen.append(tuple(numpy([arguments[-1][0]])[0].ravel()))
            return super().train_step(*arguments)

    model, rows = Net([keras.layers.Dense(1)]), np.arange(6.0).reshape(6, 1)
    model.compile("sgd", "mse", run_eagerly=True, jit_compile=False)
    model.fit(rows, rows, batch_size=6, epochs=3, verbose=0, callbacks=[BackupAndRestore(tmp_path)])
    assert [sorted(order) for order in seen] == [list(range(6))] * 3
    assert len(set(seen)) == 3


def test_another_training_is_not_taken_for_the_one_that_was_completed(tmp_path, monkeypatch):
    """As in cross-validation, where each fold would get the weights of the first."""
    monkeypatch.setattr(backup, "COMPLETED", set())
    train(tmp_path)
    with pytest.raises(ValueError, match="`directory` must be another one for another training"):
        train(tmp_path)
    train(tmp_path, epochs=4)


def test_an_error_before_the_first_epoch_leaves_no_epoch_to_begin_with(tmp_path):
    crash(tmp_path)
    model = network(kopt.Adam(0.01))
    with pytest.raises(RuntimeError, match="stop"):
        model.fit(
            X, Y, batch_size=8, epochs=3, callbacks=[Fails("on_epoch_begin"), BackupAndRestore(tmp_path)], verbose=0
        )
    assert model.fit(X, Y, epochs=2, verbose=0).epoch == [0, 1]


def test_it_says_where_it_goes_on(tmp_path, capsys):
    backup = lambda verbose=1: BackupAndRestore(tmp_path, save_every_steps=1, verbose=verbose)  # noqa: E731
    crash(tmp_path, "on_train_batch_end", 6, backup=backup(), verbose=2)
    assert "goes on" not in capsys.readouterr().out
    train(tmp_path, backup=backup(verbose=2), verbose=2)
    out = capsys.readouterr().out
    assert f"BackupAndRestore goes on at epoch 2 of 3, batch 3 of 3, from {tmp_path} (saved 20" in out
    assert "BackupAndRestore saved epoch 3, step 0 as" in out
    train(tmp_path, backup=backup(verbose=2))
    assert capsys.readouterr().out == ""


def batches():
    """Data that no one can put at a position."""
    while True:
        for i in range(STEPS):
            yield X[i * 8 : i * 8 + 8], Y[i * 8 : i * 8 + 8]


def test_other_data_goes_on_at_an_epoch_and_says_so(tmp_path, capsys):
    saves = Saves(tmp_path, save_every_steps=1)
    data = {"x": batches(), "y": None, "steps_per_epoch": STEPS, "shuffle": False, "verbose": 2}
    crash(tmp_path, "on_train_batch_end", 6, backup=saves, **data)
    assert "saves when epochs end: the data cannot be put at a position" in capsys.readouterr().out
    assert saves.positions == [(1, 0)]
    model = train(tmp_path, **data | {"x": batches()})
    assert "goes on at epoch 2 of 3, from" in (out := capsys.readouterr().out)
    assert "what is random in it is not what it would have been: the data cannot be put" in out
    assert equal(everything(model), everything(train(tmp_path / "at once", **data | {"x": batches()})))


def test_it_names_callbacks_whose_state_it_cannot_save(tmp_path, capsys):
    class Mine(keras.callbacks.Callback):
        count = 0

        def on_epoch_end(self, epoch, logs=None):
            self.count += 1

        def __init__(self):
            super().__init__()
            self.kept = []

    train(tmp_path, Mine(), keras.callbacks.LambdaCallback(), keras.callbacks.TerminateOnNaN(), verbose=2)
    assert "does not save what Mine may hold: no `get_state()` and `set_state(state)`" in capsys.readouterr().out


@pytest.mark.parametrize("name", stock.ATTRIBUTES)
def test_the_state_of_keras_callbacks_is_where_it_is_looked_for(name, tmp_path):
    arguments = {
        "EarlyStopping": {"monitor": "loss"},
        "ReduceLROnPlateau": {"monitor": "loss"},
        "ModelCheckpoint": {"filepath": tmp_path / "model.keras"},
        "OrbaxCheckpoint": {"directory": tmp_path / "orbax"},
        "TensorBoard": {"log_dir": tmp_path / "board", "write_graph": False},
    }
    try:
        callback = getattr(keras.callbacks, name)(**arguments.get(name, {}))
    except ImportError as error:
        pytest.skip(f"not installed: {error}")
    optimizer = keras.optimizers.Adam(0.01, use_ema=True)
    network(optimizer).fit(X, Y, verbose=0, callbacks=[callback])
    assert [one for one in stock.ATTRIBUTES[name] if not hasattr(callback, one)] == []


def test_data_that_could_not_be_sought_may_be_seekable_later(tmp_path):
    data = {"x": batches(), "y": None, "steps_per_epoch": STEPS, "shuffle": False}
    crash(tmp_path, **data)
    assert train(tmp_path, epochs=4).history.epoch == [0, 1, 2, 3]


def test_a_later_fit_is_not_taken_for_one_after_another(tmp_path):
    def stages(epochs):
        model, callback = network(kopt.Adam(0.01)), BackupAndRestore(tmp_path)
        for n in (epochs, 2):
            model.fit(X, Y, batch_size=8, epochs=n, verbose=0, callbacks=[callback])
        return int(model.optimizer.iterations)

    assert stages(3) == 5 * STEPS
    assert stages(3) == 5 * STEPS
    assert stages(6) == 8 * STEPS
