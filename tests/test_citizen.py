"""A citizen of Keras: constraints, averages, wrappers, policies, callbacks."""

import shutil

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from tests.conftest import BACKEND
from tests.training import START, STREAM, AtEpoch, X, Y, equal, every_class, near, network, numpy, run


@every_class
def test_constraints_are_kept(row):
    w, free = keras.Variable(START * 0 + 0.1), keras.Variable(START * 0 + 0.1)
    w.constraint = keras.constraints.NonNeg()
    run(row.make(learning_rate=0.5), w)
    run(row.make(learning_rate=0.5), free)
    assert (numpy([w])[0] >= 0).all()
    assert (numpy([free])[0] < 0).any()


@every_class
def test_moving_average_of_keras(row):
    w, twin = keras.Variable(START), keras.Variable(START)
    optimizer, plain = row.make(use_ema=True, ema_momentum=0.9), row.make()
    average = None
    for g in STREAM:
        now = run(plain, twin, stream=[g])[0].astype("float64")
        average = now if average is None else 0.9 * average + 0.1 * now
        assert equal(run(optimizer, w, stream=[g]), [twin])
    optimizer.finalize_variable_values([w])
    np.testing.assert_allclose(numpy([w])[0], average, rtol=1e-5, atol=1e-6)


@every_class
def test_average_that_overwrites_the_weights(row):
    for dtype in ("float32", "bfloat16"):
        w = keras.Variable(START, dtype=dtype)
        optimizer = row.make(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)
        run(optimizer, w, stream=STREAM[:2])
        average = next(v for v in optimizer.variables if optimizer.named.get(id(v), "")[:1] == ("average",))
        assert equal([w], [ops.cast(average, dtype)])
        before = ops.convert_to_numpy(ops.cast(w, "float32"))
        run(optimizer, w, stream=STREAM[2:3])  # goes on from the average, in 16 bits too
        step = ops.convert_to_numpy(ops.cast(w, "float32")) - before
        assert np.abs(step).max() < 0.2


@every_class
def test_frozen_layers_have_no_state(row):
    model = network(row.make())
    model.get_layer("body").trainable = False
    model.compile(row.make(), loss="mse")
    body = numpy(model.get_layer("body").variables)
    model.fit(X, Y, batch_size=8, verbose=0)
    assert equal(model.get_layer("body").variables, body)
    assert all("head" in path for _, path in model.optimizer.named.values())


@every_class
def test_variables_that_are_overwritten_with_their_gradient(row):
    w, scale = keras.Variable(START), keras.Variable(np.zeros(3, "float32"))
    scale.overwrite_with_gradient = True
    optimizer = row.make()
    optimizer.apply([ops.convert_to_tensor(STREAM[0]), ops.ones(3)], [w, scale])
    assert equal([scale], [np.ones(3)])
    assert equal([w], run(row.make(), keras.Variable(START), stream=STREAM[:1]))


@every_class
def test_two_optimizers_side_by_side_equal_one(row):
    models = [network(row.make()), network(keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(row.make(), {".*head.*": row.make()})
    ))]  # fmt: skip
    models[1].set_weights(models[0].get_weights())
    for model in models:
        model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@every_class
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_fit_under_a_dtype_policy(row, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = network(row.make())
    finally:
        keras.config.set_dtype_policy("float32")
    before = model.get_weights()
    history = model.fit(X, Y, batch_size=8, epochs=3, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert not equal(model.get_weights(), before)
    optimizer = model.optimizer.inner_optimizer if policy == "mixed_float16" else model.optimizer
    masters = [v for v in optimizer.variables if optimizer.named.get(id(v), "")[:1] == ("master",)]
    assert len(masters) == (4 if policy == "bfloat16" else 0)
    for master, weight in zip(masters, model.trainable_variables, strict=False):
        assert equal([ops.cast(master, policy)], [weight])


@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile is torch's")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
def test_torch_compile():
    losses = []
    for compiled in (False, True):
        keras.utils.set_random_seed(0)
        losses.append(network(kopt.Adam(0.01), jit_compile=compiled).fit(X, Y, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_callbacks_of_keras(tmp_path):
    def fit(model, *callbacks, epochs=4):
        return model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks)).history

    c = keras.callbacks
    model = network(kopt.Adam(0.1))
    history = fit(model, c.LearningRateScheduler(lambda epoch, rate: rate / 2), c.ModelCheckpoint(tmp_path / "m.keras"))
    np.testing.assert_allclose(history["learning_rate"], [0.05, 0.025, 0.0125, 0.00625])
    assert int(keras.models.load_model(tmp_path / "m.keras").optimizer.iterations) == 12
    history = fit(network(kopt.Adam(0.1)), c.ReduceLROnPlateau(monitor="loss", patience=1, min_delta=1e9, factor=0.5))
    np.testing.assert_allclose(history["learning_rate"], [0.1, 0.1, 0.05, 0.025])
    stopping = c.EarlyStopping(monitor="loss", patience=1, min_delta=1e9, restore_best_weights=True)
    assert len(fit(network(kopt.Adam(0.1)), stopping)["loss"]) == 2

    whole, broken = network(kopt.Adam(0.1)), network(kopt.Adam(0.1))
    broken.set_weights(whole.get_weights())
    fit(whole)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, c.BackupAndRestore(tmp_path / "backup"), AtEpoch(2, interrupt))
    resumed = network(kopt.Adam(0.1))
    fit(resumed, c.BackupAndRestore(tmp_path / "backup"))
    assert equal(resumed.variables, whole.variables)
    assert equal(resumed.optimizer.variables, whole.optimizer.variables)


def test_averages_swapped_by_keras():
    model = network(kopt.Adam(0.1, use_ema=True, ema_momentum=0.9))
    seen = []
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(model.get_weights()))
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[swap, look])
    assert np.abs(np.subtract(seen[0][0], seen[1][0])).max() > 0
    near(model.get_weights(), seen[1], tolerance=1e-5)  # Keras's arithmetic swap rounds


def test_averages_in_another_precision_cannot_be_swapped_by_keras():
    keras.config.set_dtype_policy("bfloat16")
    try:
        model = network(kopt.Adam(0.1, use_ema=True))
    finally:
        keras.config.set_dtype_policy("float32")
    with pytest.raises(ValueError, match="SwapEMAWeights"):
        model.fit(X, Y, verbose=0, callbacks=[keras.callbacks.SwapEMAWeights(swap_on_epoch=True)])
    model.fit(X, Y, verbose=0)


def test_averages_when_fit_is_called_again():
    model = network(kopt.Adam(0.1, use_ema=True))
    for _ in range(2):
        model.fit(X, Y, batch_size=8, verbose=0)
    assert np.isfinite(np.concatenate([w.ravel() for w in model.get_weights()])).all()


def interrupt(model):
    raise KeyboardInterrupt


@every_class
def test_one_step_of_jit_and_many(row):
    if BACKEND == "torch":
        pytest.skip("Keras runs one step at a time on torch")
    models = [network(row.make(), steps_per_execution=n) for n in (1, 3)]
    models[1].set_weights(models[0].get_weights())
    for model in models:
        model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
