"""Which weights the model has when, with Polyak averaging: in validation, in files, at the end, in the next `fit`."""

import contextlib
import functools

import keras
import numpy as np
import pytest

import kopt
from tests.conftest import BACKEND
from tests.test_callback_base import Map, Multi, assert_gone, multi
from tests.training import AtEpoch, X, Y, equal, near, network, numpy

Polyak = kopt.callbacks.PolyakAveraging
RATE = 0.1


def made(**compiled):
    keras.utils.set_random_seed(0)
    return network(keras.optimizers.Adam(RATE), **compiled)


def fit(model, *callbacks, epochs=3, **more):
    arguments = {"batch_size": 8, "epochs": epochs, "shuffle": False, "verbose": 0, "validation_data": (X, Y)} | more
    return model.fit(X, Y, callbacks=list(callbacks), **arguments).history


class Watch(keras.callbacks.Callback):
    """What weights the model has at each moment, seen without asking for them in a special way."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def note(self, moment):
        self.seen.setdefault(moment, []).append(numpy(self.model.trainable_variables))

    def on_epoch_begin(self, epoch, logs=None):
        self.note("epoch begins")

    def on_test_batch_begin(self, batch, logs=None):
        if batch == 0:
            self.note("test")

    def on_epoch_end(self, epoch, logs=None):
        self.note("epoch ends")

    def on_train_end(self, logs=None):
        self.note("end")


@functools.cache
def raw_run(epochs=3):
    """The raw weights when each epoch ends, and the history."""
    model, watch = made(), Watch()
    history = fit(model, watch, epochs=epochs)
    return watch.seen["epoch ends"], history


@functools.cache
def averages(epochs=3):
    """The average when each epoch ends, from fits of that length."""
    found = []
    for count in range(1, epochs + 1):
        model, callback = made(), Polyak(momentum=0.8)
        fit(model, callback, epochs=count)
        found.append(numpy(model.trainable_variables))
    return found


def loss(weights):
    model = made()
    for variable, value in zip(model.trainable_variables, weights, strict=True):
        variable.assign(value)
    return model.evaluate(X, Y, verbose=0)


def alike(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_training_goes_by_the_raw_weights_validation_by_the_averaged():
    raw, mean = raw_run()[0], averages()
    model, watch = made(), Watch()
    history = fit(model, Polyak(momentum=0.8), watch)
    for epoch in range(3):
        assert alike(watch.seen["test"][epoch], mean[epoch])
        assert alike(watch.seen["epoch ends"][epoch], raw[epoch])
        np.testing.assert_allclose(history["val_loss"][epoch], loss(mean[epoch]), rtol=1e-5)
    assert alike(watch.seen["end"][0], mean[2])
    assert equal(model.trainable_variables, mean[2])


@pytest.mark.parametrize("at_end", ["averaged", "raw"])
def test_validate_raw(at_end):
    raw, history = raw_run()
    model, watch, callback = made(), Watch(), Polyak(momentum=0.8, validate="raw", on_train_end=at_end)
    assert fit(model, callback, watch) == history
    assert alike(watch.seen["test"][1], raw[1])
    assert equal(model.trainable_variables, averages()[2] if at_end == "averaged" else raw[2])


def test_validate_both():
    history, mean = raw_run()[1], averages()
    model, seen = made(metrics=["mae"]), []
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs["val_averaged_loss"]))
    callback = Polyak(momentum=0.8, validate="both", validation_data=(X, Y))
    found = fit(model, callback, stop)
    np.testing.assert_allclose(found["val_loss"], history["val_loss"], rtol=1e-6)
    np.testing.assert_allclose(found["val_averaged_loss"], [loss(one) for one in mean], rtol=1e-5)
    assert found["val_averaged_loss"] == seen
    assert {"val_mae", "val_averaged_mae"} < found.keys()
    alone = fit(made(), Polyak(momentum=0.8, validate="both", validation_data=[X, Y]), validation_data=None)
    np.testing.assert_allclose(alone["val_averaged_loss"], found["val_averaged_loss"], rtol=1e-6)


def test_before_it_begins_validation_is_of_the_raw_weights():
    history = raw_run()[1]
    found = fit(made(), Polyak(momentum=0.8, start_epoch=2))
    np.testing.assert_allclose(found["val_loss"][:2], history["val_loss"][:2], rtol=1e-6)
    assert found["val_loss"][2] != history["val_loss"][2]


ODD = [np.nan, np.inf, -np.inf, 1e-38, 3e38, -0.0, 1e-45, 1.0]


@pytest.mark.parametrize("which", ["averaged", "raw"])
def test_a_swap_and_back_is_exact(which):
    """Keras adds and subtracts: NaN is everywhere then, and next to a large number a small one is gone."""
    model, callback = made(), Polyak(momentum=0.8)
    fit(model, callback)
    kernel = model.layers[0].kernel
    odd = np.array(ODD + ODD[:4], "float32").reshape(kernel.shape)
    kernel.assign(odd)
    before = [value.tobytes() for value in numpy(model.variables)]
    for _ in range(2):
        with callback.applied(which):
            assert np.isfinite(numpy([kernel])[0]).all()
    assert [value.tobytes() for value in numpy(model.variables)] == before
    with pytest.raises(KeyError), callback.applied(which):
        raise KeyError
    assert [value.tobytes() for value in numpy(model.variables)] == before


def test_an_average_that_is_not_finite_is_shown_and_taken_back():
    model, callback = made(), Polyak(momentum=0.8, on_train_end="raw")
    spoil = AtEpoch(1, lambda model: model.layers[0].kernel.assign(model.layers[0].kernel * np.nan))
    fit(model, callback, spoil, epochs=2)
    before = [value.tobytes() for value in numpy(model.variables)]
    with callback.applied():
        assert np.isnan(numpy([model.layers[0].kernel])[0]).all()
    assert [value.tobytes() for value in numpy(model.variables)] == before


class Fails(keras.callbacks.Callback):
    def __init__(self, hook):
        super().__init__()
        setattr(self, hook, self.fail)

    def fail(self, *arguments, **more):
        raise InterruptedError


@pytest.mark.parametrize("hook", ["on_test_batch_end", "on_test_begin", "on_test_end"])
def test_a_validation_that_raises_leaves_the_raw_weights(hook):
    raw = raw_run(epochs=1)[0]
    model, callback = made(), Polyak(momentum=0.8)
    with pytest.raises(InterruptedError):
        fit(model, callback, Fails(hook))
    assert equal(model.trainable_variables, raw[0])
    with callback.applied():
        assert equal(model.trainable_variables, averages(1)[0])
    fit(model, Polyak())
    assert_gone(model)
    assert "evaluate" not in vars(model)


def test_evaluate_and_predict_show_it_and_take_it_back():
    """Keras's callback leaves its average in the model after `predict`."""
    model, callback = made(), Polyak(momentum=0.8, on_train_end="raw")
    fit(model, callback)
    raw, mean = numpy(model.trainable_variables), averages()[2]
    shown = loss(mean)
    assert model.evaluate(X, Y, verbose=0, callbacks=[callback]) == pytest.approx(shown, rel=1e-5)
    assert equal(model.trainable_variables, raw)
    found = model.predict(X, verbose=0, callbacks=[callback])
    assert equal(model.trainable_variables, raw)
    with callback.applied():
        assert np.array_equal(found, model.predict(X, verbose=0))
    assert not {"evaluate", "fit"} & vars(model).keys()
    with pytest.raises(InterruptedError):
        model.predict(X, verbose=0, callbacks=[callback, Fails("on_predict_batch_end")])
    start = []
    fit(model, AtEpoch(0, lambda model: start.extend(numpy(model.trainable_variables))))
    assert alike(start, raw)
    now = numpy(model.trainable_variables)
    with callback.applied():
        assert equal(model.trainable_variables, mean)
    assert equal(model.trainable_variables, now)


@pytest.mark.parametrize("at_end", ["averaged", "raw"])
@pytest.mark.parametrize("make", [made, lambda: network(multi())], ids=["one optimizer", "several"])
def test_fits_in_a_row_are_one(at_end, make):
    """In Keras each `fit` begins where the average was."""
    keras.utils.set_random_seed(0)
    whole, one = make(), Polyak(momentum=0.8, on_train_end=at_end, segment_every_epochs=2)
    fit(whole, one, epochs=4)
    keras.utils.set_random_seed(0)
    parts, other = make(), Polyak(momentum=0.8, on_train_end=at_end, segment_every_epochs=2)
    for epoch in range(4):
        fit(parts, other, initial_epoch=epoch, epochs=epoch + 1)
        parts.evaluate(X, Y, verbose=0)
    assert equal(parts.trainable_variables, whole.trainable_variables)
    assert equal(parts.optimizer.variables, whole.optimizer.variables)
    assert one.updates_ == other.updates_ == 12
    assert [len(callback.segments_) for callback in (one, other)] == [2, 2]
    assert equal(one.posthoc(tail=0.5).weights, other.posthoc(tail=0.5).weights)
    for which in ("averaged", "raw"):
        with one.applied(which), other.applied(which):
            assert equal(parts.trainable_variables, whole.trainable_variables)


@pytest.mark.parametrize("change", ["weights", "frozen", "another model", "another fit"])
def test_it_begins_anew_where_something_was_changed(change):
    model, callback = made(), Polyak(momentum=0.8)
    fit(model, callback, epochs=1)
    if change == "weights":
        model.layers[0].bias.assign([1.0, 2.0, 3.0])
    elif change == "frozen":
        model.layers[0].trainable = False
        model.compile(keras.optimizers.Adam(RATE), loss="mse")
    elif change == "another model":
        model = made()
    else:
        fit(model, epochs=1)
    before = numpy(model.trainable_variables)
    start = []
    look = AtEpoch(0, lambda model: start.extend(numpy(model.trainable_variables)))
    said = contextlib.nullcontext()
    if change != "another model":
        said = pytest.warns(UserWarning, match="averages anew, not on from the last `fit`: its weights were changed")
    with said:
        fit(model, callback, look, epochs=1)
    assert alike(before, start)
    assert callback.updates_ == 3
    assert len(callback._averaged()) == len(model.trainable_variables)


def test_after_an_interrupt_the_average_is_there():
    model, callback = made(), Polyak(momentum=0.8)

    def interrupt(epoch, logs):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, callback, keras.callbacks.LambdaCallback(on_epoch_end=interrupt))
    assert equal(model.trainable_variables, raw_run(epochs=2)[0][1])
    with callback.applied():
        assert equal(model.trainable_variables, averages(2)[1])
    assert equal(callback.averaged_model().trainable_variables, averages(2)[1])
    model.evaluate(X, Y, verbose=0)
    assert equal(model.trainable_variables, raw_run(epochs=2)[0][1])


def test_what_has_averaged_nothing_says_so():
    model, callback = made(), Polyak(start_epoch=2)
    with pytest.raises(RuntimeError, match="has averaged nothing yet; it begins at epoch 2"), callback.applied():
        pass
    with pytest.raises(RuntimeError, match="has averaged the weights of another model, or of none"):
        model.predict(X, verbose=0, callbacks=[callback])
    with pytest.warns(UserWarning, match="has averaged nothing: `start_epoch` is 2. The model has its own weights"):
        fit(model, callback, epochs=1)
    assert equal(model.trainable_variables, raw_run(epochs=1)[0][0])
    with pytest.raises(RuntimeError, match="has averaged nothing yet"):
        callback.averaged_model()
    with pytest.raises(ValueError, match="^`which` must be"):
        callback.applied("best")


def test_a_fit_while_it_is_shown_is_refused():
    model, callback = made(), Polyak(momentum=0.8)
    fit(model, callback, epochs=1)
    for which in ("averaged", "raw"):
        for again in ([callback], [Polyak()], []):
            with pytest.raises(RuntimeError, match="`fit` cannot run while"), callback.applied(which):
                fit(model, *again)
    assert "fit" not in vars(model)


class InValidation(keras.callbacks.Callback):
    """Asks for the average, and for the raw weights, in the middle of a validation."""

    def __init__(self, average):
        super().__init__()
        self.average, self.seen = average, []

    def on_test_batch_begin(self, batch, logs=None):
        with self.average.applied("raw"):
            self.seen.append(numpy(self.model.trainable_variables))
            with self.average.applied():
                self.seen.append(numpy(self.model.trainable_variables))


def test_asking_for_it_in_the_middle_of_a_validation_changes_nothing():
    callback, model = Polyak(momentum=0.8), made()
    look = InValidation(callback)
    history = fit(model, callback, look, epochs=1)
    assert history["val_loss"] == fit(made(), Polyak(momentum=0.8), epochs=1)["val_loss"]
    assert len(look.seen) == 6
    for raw, mean in zip(look.seen[::2], look.seen[1::2], strict=True):
        assert alike(raw, raw_run(1)[0][0])
        assert alike(mean, averages(1)[0])


def test_of_an_optimizer_that_has_done_nothing_yet_the_weights_stay():
    """Its slots are zeros; the other optimizer has an average."""
    keras.utils.set_random_seed(0)
    slow = kopt.SGD(0.1, gradient_accumulation_steps=50)
    model = network(Multi(Map(kopt.Adam(0.1), {".*head.*": slow})))
    head = numpy(model.layers[1].weights)
    callback = Polyak(momentum=0.8, segment_every_epochs=1)
    fit(model, callback, epochs=2)
    assert equal(model.layers[1].weights, head)
    assert sorted(callback._counts()) == [0, 6]
    for twin in (callback.averaged_model(), callback.posthoc(tail=0.5), callback.posthoc(window_steps=4)):
        assert equal(twin.layers[1].weights, head)
        assert not equal(twin.layers[0].weights, numpy(made().layers[0].weights))


def test_an_optimizer_that_averages_by_itself_is_refused():
    model = network(keras.optimizers.Adam(0.1, use_ema=True))
    with pytest.raises(ValueError, match="^`use_ema` must be False beside PolyakAveraging"):
        fit(model, Polyak(), keras.callbacks.SwapEMAWeights())
    assert_gone(model)


def test_after_an_interrupt_it_says_that_it_begins_anew():
    model, callback = made(), Polyak(momentum=0.8)
    with pytest.raises(InterruptedError):
        fit(model, callback, Fails("on_epoch_end"))
    with pytest.warns(UserWarning, match="averages anew, not on from the last `fit`: that was broken off"):
        fit(model, callback, epochs=1)
    assert callback.updates_ == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"momentum": 1.0}, "`momentum` must be a number in"),
        ({"kind": "uniform", "momentum": 0.9}, "`momentum` must be left out with `kind='uniform'`"),
        ({"kind": "uniform", "window_steps": 9}, "`window_steps` must be left out with `kind='uniform'`"),
        ({"momentum": 0.9, "window_epochs": 2}, "`window_epochs` must be left out beside `momentum`"),
        ({"momentum": 0.995, "window_steps": 2}, "`window_steps` must be left out beside `momentum`"),
        ({"window_steps": 5, "window_epochs": 2}, "`window_epochs` must be left out beside `window_steps`"),
        ({"warmup_steps": 5, "bias_correction": False}, "`bias_correction` must be True beside `warmup_steps`"),
        ({"validate": "both"}, "`validation_data` must be what the average is validated on"),
        ({"validation_data": (X, Y)}, "`validation_data` must be what the average is validated on"),
        ({"validate": "both", "validation_data": X}, "`validation_data` must be .x, y., or batches"),
        ({"validate": "both", "validation_data": (X, Y[:3])}, "`validation_data` must be .x, y., or batches"),
        ({"update_bn": (row for row in X)}, "`update_bn` must be arrays"),
        ({"update_bn": [X, X[:3]]}, "`update_bn` must be arrays"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}.*Received: "):
        Polyak(**wrong)


def test_a_window_in_epochs_wants_to_know_how_long_they_are():
    class Unknown(keras.utils.PyDataset):
        @property
        def num_batches(self):
            return None

        def __getitem__(self, index):
            return X, Y

    with pytest.raises(ValueError, match="^`window_epochs` must be None where the data do not say"):
        made().fit(Unknown(), verbose=0, shuffle=False, callbacks=[Polyak(window_epochs=2)])
    made().fit(Unknown(), verbose=0, shuffle=False, steps_per_epoch=2, callbacks=[Polyak(window_epochs=2)])


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has one step an execution there")
def test_several_steps_in_one_execution_change_nothing():
    one, several = made(run_eagerly=False), made(steps_per_execution=2)
    for model in (one, several):
        fit(model, Polyak(momentum=0.8))
    near(several.trainable_variables, numpy(one.trainable_variables), 1e-6)
