"""Polyak averaging beside other callbacks in one `fit`: which weights they see, keep and restore."""

import keras
import keras_tuner
import numpy as np
import pytest

from tests.test_callback_base import assert_gone
from tests.test_polyak_fit import Polyak, alike, averages, fit, loss, made, raw_run
from tests.training import X, Y, equal, numpy


def test_two_averages_of_one_training():
    """The one that is left in the model does not come into the other's raw weights, nor into the next `fit`."""
    for order in (1, -1):
        whole, parts = made(), made()
        for model, fits in ((whole, [(0, 4)]), (parts, [(0, 1), (1, 4)])):
            one = Polyak(momentum=0.8, validate="raw")
            other = Polyak(kind="uniform", on_train_end="raw", name="uniform")
            for first, last in fits:
                fit(model, *[one, other][::order], initial_epoch=first, epochs=last)
            assert one.updates_ == other.updates_ == 12
        assert equal(whole.trainable_variables, parts.trainable_variables)
        with one.applied("raw"):
            raw = numpy(parts.trainable_variables)
        with other.applied("raw"):
            assert equal(parts.trainable_variables, raw)
        assert equal(raw_run(epochs=4)[0][-1], raw)
        assert_gone(parts)
        assert not [v.path for v in parts.optimizer.variables if v.path.endswith(("average", "segment", "seen"))]


@pytest.mark.parametrize("name", ["validate", "on_train_end"])
def test_only_one_can_be_what_the_model_shows(name):
    both = {"validate": "both", "validation_data": (X, Y), "on_train_end": "raw"}
    with pytest.raises(ValueError, match="^`validate` must be 'both' in one of several PolyakAveraging at most"):
        fit(made(), Polyak(**both), Polyak(**both))
    one, other = Polyak(validate="raw", on_train_end="raw"), Polyak(validate="raw", on_train_end="raw")
    for callback in (one, other):
        setattr(callback, {"on_train_end": "at_end"}.get(name, name), "averaged")
    with pytest.raises(ValueError, match=f"^`{name}` must be 'averaged' in one of several PolyakAveraging at most"):
        fit(made(), one, other)


def best(**more):
    return keras.callbacks.EarlyStopping(**{"patience": 1, "restore_best_weights": True} | more)


class Worse(keras.callbacks.Callback):
    """Makes the second epoch the best one, by its word."""

    def on_epoch_end(self, epoch, logs=None):
        logs["val_loss"] = logs["loss"] = abs(epoch - 1)
        if "val_averaged_loss" in logs:
            logs["val_averaged_loss"] = logs["loss"]


@pytest.mark.parametrize("at_end", ["averaged", "raw"])
@pytest.mark.parametrize("validate", ["averaged", "raw", "both"])
def test_early_stopping_restores_what_the_end_promises(validate, at_end):
    """With Keras's averages the model ends with the raw weights of the best epoch."""
    more = {"validation_data": (X, Y)} if validate == "both" else {}
    stop = best(monitor="val_averaged_loss" if validate == "both" else "val_loss")
    model, callback = made(), Polyak(momentum=0.8, validate=validate, on_train_end=at_end, **more)
    history = fit(model, callback, Worse(), stop, epochs=9)
    assert len(history["loss"]) == 3
    assert stop.best_epoch == 1
    assert equal(model.trainable_variables, averages()[1] if at_end == "averaged" else raw_run()[0][1])
    assert "on_epoch_end" not in vars(stop)


def test_stopped_early_it_still_ends_with_the_average():
    """Keras's callback finishes only in the last epoch that was asked for."""
    model = made()
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch == 1))
    fit(model, Polyak(momentum=0.8), stop, epochs=9)
    assert equal(model.trainable_variables, averages()[1])


@pytest.mark.parametrize("order", ["stop", "save", "plateau"])
def test_a_wrong_order_is_refused(order):
    before = {
        "stop": best(),
        "save": keras.callbacks.ModelCheckpoint("never.keras"),
        "plateau": keras.callbacks.ReduceLROnPlateau("val_averaged_loss"),
    }[order]
    more = {"validate": "both", "validation_data": (X, Y)} if order == "plateau" else {}
    model = made()
    name = type(before).__name__
    with pytest.raises(ValueError, match=rf"^`callbacks` must be a list with PolyakAveraging before .*\({name}\)"):
        fit(model, before, Polyak(**more))
    assert_gone(model)
    assert not model.optimizer.built or model.optimizer.iterations == 0
    fit(model, keras.callbacks.ReduceLROnPlateau("loss"), best(restore_best_weights=False), Polyak(), epochs=1)


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_checkpoints_hold_the_weights_that_were_judged(suffix, tmp_path):
    save = lambda name, **more: keras.callbacks.ModelCheckpoint(  # noqa: E731
        tmp_path / f"{name}_{{epoch}}{suffix}", save_weights_only="weights" in suffix, **more
    )
    model = made()
    fit(model, Polyak(momentum=0.8), save("val"), save("loss", monitor="loss"), save("batch", save_freq=3))
    raw, mean = raw_run()[0], averages()
    for epoch in range(3):
        for name, expected in (("val", mean), ("loss", raw), ("batch", mean)):
            loaded = made()
            path = tmp_path / f"{name}_{epoch + 1}{suffix}"
            if suffix == ".keras":
                loaded = keras.models.load_model(path)
                assert loaded.optimizer.iterations == 3 * (epoch + 1)
            else:
                loaded.optimizer.build(loaded.trainable_variables)
                loaded.load_weights(path)
            assert equal(loaded.trainable_variables, expected[epoch]), (name, epoch)


@pytest.mark.filterwarnings("ignore:(currentThread|getName).*:DeprecationWarning", "ignore:Skipping variable loading")
@pytest.mark.parametrize("validate", ["averaged", "both", "raw"])
def test_keras_tuner_saves_the_weights_that_it_has_judged(validate, tmp_path):
    metric = "val_averaged_loss" if validate == "both" else "val_loss"
    callback = Polyak(momentum=0.8, validate=validate, validation_data=(X, Y) if validate == "both" else None)
    tuner = keras_tuner.RandomSearch(
        lambda hp: made(), keras_tuner.Objective(metric, "min"), max_trials=1, directory=tmp_path
    )
    fit = {"batch_size": 8, "epochs": 3, "shuffle": False, "verbose": 0, "validation_data": (X, Y)}
    tuner.search(X, Y, callbacks=[callback], **fit)
    expected = raw_run()[0] if validate == "raw" else averages()
    (trial,) = tuner.oracle.get_best_trials()
    (model,) = tuner.get_best_models()
    assert alike(numpy(model.trainable_variables), expected[trial.best_step])
    assert trial.score == pytest.approx(loss(expected[trial.best_step]), rel=1e-5)


def test_a_callback_of_ones_own_sees_the_raw_weights_unless_it_asks():
    raw, mean, seen = raw_run()[0], averages(), []
    model, callback = made(), Polyak(momentum=0.8)

    def look(epoch, logs):
        seen.append(numpy(model.trainable_variables))
        with callback.applied():
            seen.append(numpy(model.trainable_variables))
            twin = callback.averaged_model()
        seen.append(numpy(twin.trainable_variables))
        seen.append(model.evaluate(X, Y, verbose=0))

    fit(model, callback, keras.callbacks.LambdaCallback(on_epoch_end=look), epochs=2)
    assert alike(seen[4], raw[1])
    assert alike(seen[5], mean[1])
    assert alike(seen[6], mean[1])
    np.testing.assert_allclose(seen[7], loss(raw[1]), rtol=1e-5)
    assert equal(model.trainable_variables, mean[1])
