"""The quasi-Newton optimizers in `compile` and `fit`: what the model has when, what is refused, saved and resumed."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import kopt
from kopt.callbacks import LineSearchMonitor
from tests.conftest import BACKEND
from tests.training import mirrored, numpy

X = np.linspace(-1, 1, 32, dtype="float32")[:, None]
Y = np.sin(3 * X)
OPTIMIZERS = {"lbfgs": kopt.LBFGS, "bfgs": kopt.BFGS, "ssbfgs": kopt.SSBFGS, "ssbroyden": kopt.SSBroyden}
MODES = {"xla": {}, "graph": {"jit_compile": False}, "eager": {"run_eagerly": True}}
if BACKEND == "torch":
    MODES = {"eager": {}}
PLAIN = {} if BACKEND == "jax" else MODES["eager"]  # one of them compiled, for what does not hang on it


def network(optimizer, *hidden, loss="mse", **compiled):
    keras.utils.set_random_seed(1)
    hidden = hidden or (layers.Dense(6, "tanh"),)
    model = keras.Sequential([keras.Input((1,)), *hidden, layers.Dense(1)])
    model.compile(optimizer, loss=loss, **(compiled or PLAIN))
    return model


def fit(model, epochs=20, x=X, y=Y, **arguments):
    arguments = {"batch_size": len(x), "shuffle": False, "verbose": 0} | arguments
    return model.fit(x, y, epochs=epochs, **arguments)


def loss_of(model, x=X, y=Y):
    return model.evaluate(x, y, batch_size=len(x), verbose=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fit_ends_with_the_best_point(name, mode):
    if mode == "graph" and name != "lbfgs":
        pytest.skip("the graph without XLA is the same for all of them")
    model = network(OPTIMIZERS[name](), **MODES[mode])
    before = loss_of(model)
    fit(model, 25)
    optimizer = model.optimizer
    assert optimizer.evaluations == 25
    assert 5 < int(optimizer.iterations) < 25
    assert optimizer.loss == pytest.approx(loss_of(model), rel=1e-4)
    assert optimizer.loss < 0.1 * before


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 8])
def test_wherever_fit_ends_the_point_is_the_best(epochs):
    model = network(kopt.LBFGS(check_noise=False))
    before = loss_of(model)
    fit(model, epochs)
    assert loss_of(model) == pytest.approx(model.optimizer.loss, rel=1e-5)
    assert loss_of(model) <= before * (1 + 1e-6)


def test_two_fits_are_one_with_an_evaluation_more():
    whole, parted = network(kopt.LBFGS()), network(kopt.LBFGS())
    fit(whole, 20)
    fit(parted, 10)
    fit(parted, 11)  # the first looks at the point that the model was left with
    assert parted.optimizer.loss == pytest.approx(whole.optimizer.loss, rel=0.2)
    assert parted.optimizer.evaluations == 21


def test_fits_of_one_evaluation_with_the_monitor_are_one_fit():
    whole, parted = network(kopt.LBFGS()), network(kopt.LBFGS())
    fit(whole, 12, callbacks=[LineSearchMonitor()])
    for _ in range(12):
        fit(parted, 1, callbacks=[LineSearchMonitor()])
    for one, other in zip(numpy(whole.variables), numpy(parted.variables), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["lbfgs", "ssbroyden"])
def test_saved_and_loaded_it_goes_on(name, tmp_path):
    model = network(OPTIMIZERS[name]())
    fit(model, 12)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.run_eagerly = model.run_eagerly
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    fit(model, 10)
    fit(loaded, 10)
    assert loaded.optimizer.evaluations == model.optimizer.evaluations == 22
    for one, other in zip(numpy(model.variables), numpy(loaded.variables), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_checkpoint_and_a_validation_see_the_best_point(tmp_path):
    seen = []

    class Look(keras.callbacks.ModelCheckpoint):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, logs)
            seen.append((logs["accepted_loss"], logs["val_loss"], logs["loss"]))

    model = network(kopt.LBFGS())
    saver = Look(tmp_path / "{epoch}.weights.h5", save_weights_only=True)
    history = fit(model, 14, callbacks=[LineSearchMonitor(), saver], validation_data=(X, Y), validation_batch_size=32)
    for epoch, (accepted, validated, _) in enumerate(seen, start=1):
        assert validated == pytest.approx(accepted, rel=1e-4)
        twin = network(kopt.LBFGS())
        twin.load_weights(tmp_path / f"{epoch}.weights.h5")
        assert loss_of(twin) == pytest.approx(accepted, rel=1e-4)
    assert history.history["evaluations"] == list(range(1, 15))
    assert any(one != pytest.approx(accepted, rel=1e-3) for accepted, _, one in seen)  # points that were only tried


def test_backup_and_restore_goes_on_to_the_bit(tmp_path):
    def train(epochs, directory):
        model = network(kopt.LBFGS())
        callbacks = [LineSearchMonitor(), kopt.callbacks.BackupAndRestore(directory, verbose=0)]
        fit(model, epochs, callbacks=callbacks)
        return model

    class Stop(Exception):  # noqa: N818
        pass

    class Break(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 7:
                raise Stop

    model = network(kopt.LBFGS())
    backup = kopt.callbacks.BackupAndRestore(tmp_path / "broken", verbose=0)
    with pytest.raises(Stop):
        fit(model, 15, callbacks=[LineSearchMonitor(), backup, Break()])
    resumed, whole = train(15, tmp_path / "broken"), train(15, tmp_path / "whole")
    assert resumed.optimizer.evaluations == whole.optimizer.evaluations == 15
    for one, other in zip(numpy(whole.variables), numpy(resumed.variables), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_monitor_logs_stops_and_says_why(capsys):
    model = network(kopt.LBFGS(), layers.Dense(1))
    monitor = LineSearchMonitor()
    history = fit(model, 300, y=2 * X + 1, callbacks=[monitor], verbose=2).history
    assert model.optimizer.status == "gradient"
    assert "no entry of the gradient is above `gtol`" in capsys.readouterr().out
    assert len(history["loss"]) < 60
    assert {"accepted_loss", "gradient_norm", "step_size", "evaluations", "iterations", "status"} < set(history)
    assert history["status"][-1] == monitor.STATUS.index("gradient")
    assert (np.diff(history["accepted_loss"]) <= 1e-6).all()
    assert history["gradient_norm"][-1] <= 1e-5


# What can go wrong


def test_at_the_optimum_nothing_moves():
    model = network(kopt.LBFGS(check_noise=False), layers.Dense(1, kernel_initializer="zeros"))
    model.layers[-1].kernel.assign(ops.zeros((1, 1)))
    before = numpy(model.variables)
    fit(model, 3, y=0 * X)
    assert (model.optimizer.status, model.optimizer.evaluations) == ("gradient", 1)
    for one, other in zip(before, numpy(model.variables), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_start_that_is_not_finite_is_said():
    model = network(kopt.LBFGS(), loss=lambda y, p: ops.mean(ops.log(-1 - p * p)))
    before = numpy(model.variables)
    with pytest.warns(UserWarning, match="has stopped at its start: the loss or the gradient is infinite or NaN there"):
        fit(model, 3)
    for one, other in zip(before, numpy(model.variables), strict=True):
        np.testing.assert_array_equal(one, other)


def poisson(y, p):
    return ops.mean(p - y * ops.log(p))  # NaN where p is negative


def test_trials_that_are_nan_are_backed_off_from():
    """The least of p - 3 log p is at p = 3, far from the start, where the step to it leads to a negative p."""
    model = network(kopt.LBFGS(), layers.Dense(1, kernel_initializer="zeros", trainable=False), loss=poisson)
    model.layers[-1].bias.assign([40.0])
    x, y = np.ones((8, 1), "float32"), np.full((8, 1), 3, "float32")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "invalid value encountered in log")
        history = fit(model, 60, x=x, y=y, callbacks=[LineSearchMonitor()]).history
    assert np.isnan(history["loss"]).any()
    assert np.isfinite(history["accepted_loss"]).all()
    assert model.optimizer.status == "gradient"
    assert loss_of(model, x, y) == pytest.approx(3 - 3 * np.log(3), abs=1e-4)


@pytest.mark.parametrize("cause", ["dropout", "batches", "halves"])
def test_a_noisy_loss_is_said(cause):
    """Of the two halves, one is the negative of the other: their losses are equal, their gradients are not."""
    hidden = (layers.Dense(6, "tanh"), layers.Dropout(0.5)) if cause == "dropout" else ()
    model = network(kopt.LBFGS(), *hidden)
    before = numpy(model.trainable_variables)
    with pytest.warns(UserWarning, match="two evaluations of the same weights gave two losses, or two gradients"):
        fit(model, 4, batch_size={"batches": 8, "halves": 16}.get(cause, 32))
    assert model.optimizer.status == "noisy"
    for one, other in zip(before, numpy(model.trainable_variables), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("hidden", "arguments", "refused"),
    [
        ((layers.Dropout, 0.5), {}, r"`model` must be without layers that draw at random.*\['dropout"),
        ((layers.GaussianNoise, 0.5), {}, r"`model` must be without layers that draw at random.*\['gaussian_noise"),
        (
            None,
            {"batch_size": 8},
            r"`batch_size` must be 32, all rows, or `accumulate_steps` .*: 4. Received: batch_size=8",
        ),
    ],
)
def test_the_monitor_refuses_noise_before_the_first_step(hidden, arguments, refused):
    model = network(kopt.LBFGS(), *([hidden[0](hidden[1])] if hidden else []))
    with pytest.raises(ValueError, match=refused):
        fit(model, 2, callbacks=[LineSearchMonitor()], **arguments)
    assert model.optimizer.evaluations == 0


def test_the_monitor_is_for_these_optimizers():
    with pytest.raises(ValueError, match="`optimizer` must be kopt.LBFGS or one of its kin in `compile`"):
        fit(network("adam"), 1, callbacks=[LineSearchMonitor()])


def test_batch_normalization_is_warned_of():
    model = network(kopt.LBFGS(), layers.BatchNormalization())
    with pytest.warns(UserWarning, match="the moving statistics of batch_normalization lag behind"):
        fit(model, 2, callbacks=[LineSearchMonitor()])


def test_batch_normalization_is_warned_of_without_the_monitor():
    model = network(kopt.LBFGS(), layers.BatchNormalization())
    with pytest.warns(UserWarning, match="the moving statistics of batch_normalization lag behind"):
        fit(model, 2)


def test_mini_batches_after_a_whole_batch_are_said():
    model = network(kopt.LBFGS())
    fit(model, 8)
    before = loss_of(model)
    with pytest.warns(UserWarning, match="two evaluations of the same weights"):
        fit(model, 3, batch_size=8, y=Y + X**2)
    assert loss_of(model) == pytest.approx(before, rel=1e-5)


def test_so_few_steps_that_something_is_wrong_are_said():
    model = network(kopt.LBFGS(check_noise=False))
    batches = [(X, Y + shift) for shift in np.random.default_rng(0).normal(size=(60, 1, 1)).astype("float32")]
    with pytest.warns(UserWarning, match=r"has taken \d+ steps in 60 evaluations: the loss is not the same"):
        model.fit((batch for batch in batches), steps_per_epoch=60, shuffle=False, verbose=0)


def test_equal_batches_taken_together_are_the_whole():
    whole, parted = network(kopt.LBFGS()), network(kopt.LBFGS(accumulate_steps=4))
    fit(whole, 12)
    fit(parted, 12, batch_size=8, callbacks=[LineSearchMonitor()])
    assert whole.optimizer.evaluations == parted.optimizer.evaluations == 12
    assert parted.optimizer.loss == pytest.approx(whole.optimizer.loss, rel=0.05)


def test_an_evaluation_that_is_not_complete_is_forgotten():
    """Two of four batches are left when `fit` ends; the weights move then."""
    model = network(kopt.LBFGS(accumulate_steps=4))
    parts = [(X[start : start + 8], np.exp(2 * X[start : start + 8])) for start in range(0, 32, 8)]
    model.fit((parts[i % 4] for i in range(42)), steps_per_epoch=42, shuffle=False, verbose=0)
    assert float(model.optimizer.kept["window"]) == 0
    fit(model, 1, batch_size=8, y=np.exp(2 * X))
    assert model.optimizer.loss == pytest.approx(loss_of(model, X, np.exp(2 * X)), rel=1e-5)


def test_one_batch_that_is_short_is_whole():
    fit(network(kopt.LBFGS()), 2, batch_size=64, callbacks=[LineSearchMonitor()])


def test_shuffled_or_short_batches_are_said():
    with pytest.raises(ValueError, match="`shuffle` must be False beside `accumulate_steps`"):
        fit(network(kopt.LBFGS(accumulate_steps=4)), 1, batch_size=8, shuffle=True, callbacks=[LineSearchMonitor()])
    with pytest.warns(UserWarning, match="The last batch has 2 rows, the others 10, and counts as much"):
        fit(network(kopt.LBFGS(accumulate_steps=4)), 1, batch_size=10, callbacks=[LineSearchMonitor()])


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ({"learning_rate": 0.1}, "`learning_rate` must be left out for LBFGS: there is no learning rate"),
        ({"clipnorm": 1.0}, "`clipnorm` must be left out for LBFGS: .*the gradient of the very loss"),
        ({"global_clipnorm": 1.0}, "`global_clipnorm` must be left out"),
        ({"weight_decay": 1e-2}, "`weight_decay` must be left out for LBFGS: .*`kernel_regularizer`"),
        ({"use_ema": True}, "`use_ema` must be left out"),
        (
            {"gradient_accumulation_steps": 4},
            "`gradient_accumulation_steps` must be left out for LBFGS: use `accumulate",
        ),
        ({"history_size": 5}, "Did you mean `memory`"),
        ({"c1": 0.9, "c2": 0.5}, "`c1` must be less than `c2`, 0.5. Received: c1=0.9"),
    ],
)
def test_what_does_not_belong_is_refused(argument, says):
    with pytest.raises(ValueError, match=says):
        kopt.LBFGS(**argument)


def test_what_changes_the_rate_is_refused():
    with pytest.raises(ValueError, match="`learning_rate` must be left alone with LBFGS"):
        fit(network(kopt.LBFGS()), 2, callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)])
    with pytest.raises(ValueError, match="LBFGS"):
        fit(network(kopt.LBFGS()), 2, callbacks=[kopt.callbacks.CosineDecay()])


def test_mixed_float16_is_refused():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        with pytest.raises(
            ValueError, match="`optimizer` must be outside of a LossScaleOptimizer, which mixed_float16"
        ):
            network(kopt.LBFGS())
    finally:
        keras.config.set_dtype_policy("float32")


def test_narrow_computations_are_refused():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = network(kopt.LBFGS())
    finally:
        keras.config.set_dtype_policy("float32")
    with pytest.raises(ValueError, match="`model` must be with layers that compute in float32 or float64.*bfloat16"):
        fit(model, 1, callbacks=[LineSearchMonitor()])


def test_an_average_of_trials_is_refused():
    with pytest.raises(
        ValueError, match="`optimizer` must be another beside PolyakAveraging: .*that a line search tries"
    ):
        fit(network(kopt.LBFGS()), 1, callbacks=[kopt.callbacks.PolyakAveraging()])


def test_what_does_not_belong_is_refused_later_too():
    optimizer = kopt.LBFGS(clipnorm=None)
    with pytest.raises(ValueError, match="`clipnorm` must be left alone with LBFGS"):
        optimizer.clipnorm = 1.0
    with pytest.raises(ValueError, match="`use_ema` must be left alone with LBFGS"):
        optimizer.use_ema = True


def test_a_model_without_trainable_weights_is_refused():
    with pytest.raises(ValueError, match="the model has no trainable weights"):
        kopt.LBFGS().build([])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_search_what_rises_is_no_end(name):
    model = network(OPTIMIZERS[name](line_search="none"))
    fit(model, 60)
    assert model.optimizer.status != "loss" or model.optimizer.loss < 1


def test_a_gradient_whose_square_overflows():
    x = np.linspace(1e10, 2e10, 32, dtype="float32")[:, None]
    model = network(kopt.LBFGS(), layers.Dense(1, use_bias=False))
    before = loss_of(model, x, x)
    fit(model, 12, x=x, y=x)
    assert model.optimizer.loss < 1e-2 * before


def test_variables_that_it_cannot_move_are_refused():
    with pytest.raises(ValueError, match="`variables` must be without constraints for LBFGS"):
        fit(network(kopt.LBFGS(), layers.Dense(2, kernel_constraint="non_neg")), 1)
    with pytest.raises(ValueError, match="`variables` must be all of float32, or all of float64, for LBFGS"):
        kopt.LBFGS().build([keras.Variable([1.0], dtype="bfloat16")])
    with pytest.raises(ValueError, match="`max_weights` must be 19 or more here: BFGS keeps a matrix of 19 x 19"):
        fit(network(kopt.BFGS(max_weights=10)), 1)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="strategies are TensorFlow's")
def test_several_replicas_are_refused():
    with mirrored().scope(), pytest.raises(ValueError, match="`strategy` must be of one replica for LBFGS"):
        kopt.LBFGS()


def test_weights_that_somebody_moves_begin_a_new_search():
    model = network(kopt.LBFGS())
    fit(model, 20)
    keras.utils.set_random_seed(7)
    model.set_weights([np.random.default_rng(0).normal(size=v.shape) for v in model.variables])
    start = loss_of(model)
    fit(model, 1)
    assert model.optimizer.loss == pytest.approx(start, rel=1e-4)
    fit(model, 25)
    assert model.optimizer.loss < 0.3 * start


@pytest.mark.parametrize("callbacks", [[], [LineSearchMonitor()]], ids=["alone", "monitored"])
def test_other_data_begin_a_new_search(callbacks):
    """While it runs: neither the old loss as a bound nor the old gradients count."""
    model, other = network(kopt.LBFGS()), 10 * Y + 5
    fit(model, 8, y=0.1 * Y, callbacks=callbacks)
    assert model.optimizer.status == "running"
    fit(model, 80, y=other, callbacks=callbacks)
    assert model.optimizer.loss == pytest.approx(loss_of(model, X, other), rel=1e-4)
    assert model.optimizer.loss < 0.05 * np.mean(other**2)


def test_data_that_are_not_finite_do_no_harm():
    model, broken = network(kopt.LBFGS()), np.where(X > 0.9, np.nan, Y).astype("float32")
    fit(model, 8, callbacks=[LineSearchMonitor()])
    before = loss_of(model)
    with pytest.warns(UserWarning, match="the loss or the gradient is infinite or NaN there"):
        fit(model, 8, y=broken, callbacks=[LineSearchMonitor()])
    assert model.optimizer.status == "nonfinite"
    assert np.isnan(model.optimizer.loss)
    assert loss_of(model) == pytest.approx(before, rel=1e-5)
    fit(model, 30, callbacks=[LineSearchMonitor()])
    assert model.optimizer.loss < 0.5 * before


def test_data_that_change_the_gradient_wake_an_optimizer_that_has_ended():
    noise = np.random.default_rng(0).normal(size=X.shape).astype("float32")
    model = network(kopt.LBFGS(), layers.Dense(1))
    fit(model, 60, y=2 * X + noise)
    assert model.optimizer.status in ("gradient", "loss")
    tries, least = model.optimizer.evaluations, np.linalg.lstsq(np.hstack([X, X**0]), 2.01 * X + noise, rcond=None)[1]
    fit(model, 60, y=2.01 * X + noise)
    assert model.optimizer.evaluations > tries
    assert model.optimizer.loss == pytest.approx(float(least[0]) / len(X), rel=1e-6)


class Interrupt(keras.callbacks.Callback):
    """Ctrl-C, in the middle of a search."""

    def on_epoch_end(self, epoch, logs=None):
        if logs["loss"] > 1.001 * self.model.optimizer.loss:
            raise KeyboardInterrupt


def test_after_an_interruption_the_best_point_can_be_had(tmp_path):
    model, saver = network(kopt.LBFGS()), keras.callbacks.ModelCheckpoint(tmp_path / "model.keras")
    with pytest.raises(KeyboardInterrupt):
        fit(model, 30, callbacks=[LineSearchMonitor(), saver, Interrupt()])
    model.optimizer.show("point")
    assert loss_of(model) == pytest.approx(model.optimizer.loss, rel=1e-4)
    model.compile("sgd", "mse", **PLAIN)
    fit(model, 1, callbacks=[saver])  # the monitor that was broken off does not hold it


def test_other_data_wake_an_optimizer_that_has_ended():
    model = network(kopt.LBFGS(), layers.Dense(1))
    fit(model, 60, y=2 * X + 1)
    assert model.optimizer.status == "gradient"
    fit(model, 60, y=1 - X)
    assert loss_of(model, X, 1 - X) < 1e-4


@pytest.mark.parametrize("told", [True, False])
def test_a_loop_of_ones_own(told):
    model, optimizer = network("sgd"), kopt.LBFGS(check_noise=False, gtol=1e-4)
    variables, target = (
        model.trainable_variables,
        np.concatenate([v.ravel() + 1 for v in numpy(model.trainable_variables)]),
    )

    def step():
        difference = np.concatenate([v.ravel() for v in numpy(variables)]) - target
        sizes = np.cumsum([int(np.prod(v.shape)) for v in variables])[:-1]
        parts = np.split((2 * difference).astype("float32"), sizes)
        gradients = [ops.convert_to_tensor(part.reshape(v.shape)) for part, v in zip(parts, variables, strict=True)]
        loss = {"loss": ops.convert_to_tensor(float(difference @ difference))} if told else {}
        optimizer.apply(gradients, variables, **loss)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(15):
            step()
    said = [str(one.message) for one in caught if "is not told the loss" in str(one.message)]
    assert len(said) == (0 if told else 1)
    assert np.isnan(optimizer.loss) == (not told)
    optimizer.finalize_variable_values(variables)
    assert optimizer.status == "gradient"
    np.testing.assert_allclose(np.concatenate([v.ravel() for v in numpy(variables)]), target, atol=1e-3)


def test_it_says_what_it_is():
    assert repr(kopt.LBFGS(memory=20)) == "LBFGS(memory=20)"
    assert repr(kopt.SSBroyden(gtol=0.0)) == "SSBroyden(gtol=0.0)"
    with pytest.raises(TypeError, match="use one of its subclasses"):
        kopt.QuasiNewton()
    again = kopt.LBFGS.from_config(kopt.LBFGS(memory=3, ftol=0.0, name="mine").get_config())
    assert (again.memory, again.ftol, again.name) == (3, 0.0, "mine")
