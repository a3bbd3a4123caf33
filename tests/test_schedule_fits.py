"""Schedules from one `fit` to the next: another epoch, another process, a fit that raised, a fit in a fit."""

import keras
import numpy as np
import pytest
from keras import ops

import kopt
import kopt.callbacks as kc
import kopt.schedules as ks
from tests.catalog import BATCHES, EPOCHS, STEPS
from tests.conftest import BACKEND
from tests.test_schedule_callbacks import (
    RATE,
    Halve,
    Multi,
    cosine,
    every_optimizer,
    near,
    stock_schedule,
    weigh,
    weighing,
)
from tests.training import AtEpoch


@every_optimizer
@pytest.mark.parametrize("again", ["the same callback", "another"])
def test_a_second_fit_begins_at_initial_epoch(make, again):
    schedule = lambda: kc.CosineDecay(epochs=EPOCHS)  # noqa: E731
    whole, _ = weigh(weighing(make()), [schedule()])
    model, callback = weighing(make()), schedule()
    first, _ = weigh(model, [callback], epochs=2)
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == RATE
    callback = callback if again == "the same callback" else schedule()
    second, _ = weigh(model, [callback], initial_epoch=2)
    near(first + second, whole)
    third, _ = weigh(model, [callback])  # from the beginning again
    near(third, whole)


def test_a_new_process_goes_on_where_it_is_told(tmp_path):
    """The file of a ModelCheckpoint, written while a schedule runs, holds the optimizer's own rate."""
    whole, _ = weigh(weighing(kopt.SGD(RATE)), [kc.CosineDecay(epochs=EPOCHS), kc.WarmUp(epochs=1)])
    model = weighing(kopt.SGD(RATE))
    model.compile(kopt.SGD(RATE), loss="mae")
    path = str(tmp_path / "at_{epoch}.keras")
    weigh(model, [kc.CosineDecay(), keras.callbacks.ModelCheckpoint(path)], epochs=2)
    loaded = keras.models.load_model(path.format(epoch=1))
    assert loaded.optimizer.get_config()["learning_rate"] == RATE
    assert float(ops.convert_to_numpy(loaded.optimizer.learning_rate)) == RATE
    assert int(loaded.optimizer.iterations) == BATCHES
    loaded.compile(loaded.optimizer, loss=lambda true, predicted: ops.mean(predicted))
    rates, _ = weigh(loaded, [kc.CosineDecay(epochs=EPOCHS), kc.WarmUp(epochs=1)], initial_epoch=1)
    near(rates[BATCHES:], whole[BATCHES:])


def test_weights_loaded_in_mid_fit_bring_their_own_rate(tmp_path):
    other = weighing(kopt.SGD(RATE / 2))
    other.optimizer.build(other.trainable_variables)
    other.optimizer.iterations.assign(2 * BATCHES)
    path = str(tmp_path / "other.weights.h5")
    other.save_weights(path)
    model = weighing(kopt.SGD(RATE))

    class Load(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                before = self.model.get_weights()
                self.model.load_weights(path)
                self.model.set_weights(before)

    rates, _ = weigh(model, [kc.CosineDecay(), Load()])
    expected = RATE * cosine(range(STEPS), STEPS)
    expected[10:] /= 2
    near(rates, expected)
    assert float(model.optimizer.learning_rate) == RATE / 2


def test_an_open_schedule_is_bound_by_each_fit_without_another_trace():
    traces = []

    class Counted(keras.layers.Layer):
        def call(self, inputs):
            traces.append(1)
            return inputs

    model = keras.Sequential(
        [keras.Input((STEPS,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros"), Counted()]
    )
    rate = ks.CosineDecay(initial=RATE)
    model.compile(keras.optimizers.SGD(rate), loss=lambda true, predicted: ops.mean(predicted))
    plain = kopt.callbacks.base.Callback
    near(weigh(model, [plain()])[0], RATE * cosine(range(STEPS), STEPS))
    done = len(traces)
    near(weigh(model, [plain()], epochs=2)[0][:10], RATE * cosine(range(10), 10))
    near(weigh(model, [plain()], initial_epoch=1)[0][5:], RATE * cosine(range(5, 20), STEPS))
    if BACKEND != "torch":  # which calls the layer at each step
        assert len(traces) == done


def test_an_open_schedule_leaves_files_as_they_are(tmp_path):
    def make():
        return weighing(keras.optimizers.SGD(ks.CosineDecay(initial=RATE), momentum=0.9))

    model = make()
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "at_{epoch}.weights.h5"), save_weights_only=True)
    weigh(model, [kc.RateMonitor(), checkpoint])
    model.save_weights(tmp_path / "end.weights.h5")
    for name in ("at_4.weights.h5", "end.weights.h5"):
        fresh = make()
        fresh.optimizer.build(fresh.trainable_variables)
        fresh.load_weights(tmp_path / name)
        assert int(fresh.optimizer.iterations) == STEPS
        near(ops.convert_to_numpy(fresh.optimizer.momentums[0]), ops.convert_to_numpy(model.optimizer.momentums[0]))


def test_an_open_schedule_that_nobody_binds_says_what_to_do():
    for cls in (kopt.SGD, keras.optimizers.SGD):
        model = weighing(cls(ks.CosineDecay(initial=RATE)))
        with pytest.raises(ValueError, match=r"CosineDecay.* cannot say its value.*`steps=`.*callback of kopt"):
            weigh(model, [])


@pytest.mark.parametrize("schedule", [lambda: ks.CosineDecay(initial=RATE), stock_schedule])
def test_a_schedule_is_its_own_after_a_fit_that_raised(schedule):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    model = weighing(keras.optimizers.SGD(schedule()))
    with pytest.raises(KeyboardInterrupt):
        weigh(model, [kc.WarmUp(steps=1, start=1.0), Stop()])
    begun = int(model.optimizer.iterations)
    rates, _ = weigh(model, [kc.WarmUp(steps=1, start=1.0)])
    steps = np.arange(STEPS)
    near(rates, RATE * cosine(steps, STEPS) if model.optimizer._learning_rate.__class__ is ks.CosineDecay
         else RATE * 0.5 ** ((begun + steps) / 4))  # fmt: skip


def test_a_fit_that_raised_keeps_what_was_written_in_it():
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    model = weighing(keras.optimizers.SGD(RATE))
    with pytest.raises(KeyboardInterrupt):
        weigh(model, [kc.CosineDecay(), Halve(1), Stop()])
    monitor = kc.RateMonitor()
    weigh(model, [monitor])
    near(monitor.history["learning_rate"], np.full(STEPS, RATE / 2))


def test_what_a_fit_that_raised_has_left_goes_at_the_next():
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyboardInterrupt

    model = weighing(keras.optimizers.Adam(RATE))
    for then in (None, 0.25):
        with pytest.raises(KeyboardInterrupt):
            weigh(model, [kc.CosineDecay(), kc.Schedule("beta_1", ks.Linear(0.9, 0.5, initial=1.0)), Stop()])
        assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) != RATE
        if then is not None:  # what the user writes then is the rate from then on
            model.optimizer.learning_rate = then
        monitor = kc.RateMonitor(["learning_rate", "beta_1"])
        weigh(model, [monitor])
        near(monitor.history["learning_rate"], np.full(STEPS, then or RATE))
        near(monitor.history["beta_1"], np.full(STEPS, 0.9))
        assert model.optimizer.beta_1 == 0.9


def test_one_schedule_for_two_optimizers():
    schedule = ks.CosineDecay(initial=RATE)
    models = [weighing(keras.optimizers.SGD(schedule)), weighing(kopt.SGD(schedule))]
    for epochs in (EPOCHS, 2, EPOCHS):
        for model in models:
            rates, _ = weigh(model, [kc.RateMonitor()], epochs=epochs)
            near(rates[: epochs * BATCHES], RATE * cosine(range(epochs * BATCHES), epochs * BATCHES))


def test_a_batch_after_a_fit_that_raised_is_trained_at_the_own_rate():
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyboardInterrupt

    model = weighing(keras.optimizers.SGD(RATE))
    with pytest.raises(KeyboardInterrupt):
        weigh(model, [kc.CosineDecay(), Stop()])
    before = model.get_weights()[0]
    model.train_on_batch(np.eye(STEPS, dtype="float32")[[0, 0]], np.zeros((2, 1)))
    near((before - model.get_weights()[0])[0], [RATE])


def test_time_goes_on_in_a_fit_that_nobody_tells():
    """As it does with Keras's schedules."""
    for make, expected in (
        (lambda: ks.StepDecay(0.5, every_epochs=1, initial=RATE), RATE * 0.5 ** (np.arange(STEPS) // 5)),
        (lambda: ks.CosineDecay(epochs=EPOCHS, initial=RATE), RATE * cosine(range(STEPS), STEPS)),
    ):
        for cls in (kopt.SGD, keras.optimizers.SGD):
            model = weighing(cls(make()))
            first, _ = weigh(model, [kc.RateMonitor()], epochs=2)
            second, _ = weigh(model, [], initial_epoch=2)
            near(first + second, expected)
            near(weigh(model, [kc.RateMonitor()])[0], expected)


def test_an_open_schedule_within_several_optimizers():
    def made(variable):
        return keras.optimizers.SGD(ks.CosineDecay(initial=RATE))

    model = weighing(Multi(made))
    near(weigh(model, [kc.RateMonitor()])[0], RATE * cosine(range(STEPS), STEPS))


@pytest.mark.parametrize("outer", [True, False])
def test_a_fit_within_a_fit(outer):
    """The inner one takes the outer one's schedule out, which that says at its end; without one it goes on."""
    model = weighing(keras.optimizers.SGD(RATE))
    inner = AtEpoch(1, lambda model: weigh(model, [kc.CosineDecay()]))
    if outer:
        with pytest.raises(RuntimeError, match="CosineDecay was taken out of the step by another `fit`"):
            weigh(model, [kc.CosineDecay(), inner])
    else:
        rates, _ = weigh(model, [inner])
        near(rates, RATE * (1 + cosine(range(STEPS), STEPS)))
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == RATE
