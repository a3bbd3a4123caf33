"""Callbacks with a part in the compiled step: what they see there, and that nothing of them stays."""

import copy
import os
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from kopt import backends
from kopt.callbacks.base import Callback, InStep
from kopt.callbacks.install import settle
from tests.conftest import BACKEND, FLOATX
from tests.test_distribution import TENSORFLOW, dense, many_devices
from tests.training import AtEpoch, X, Y, equal, fit, in_turn, near, network, numpy

Multi, Map, Scaled = keras.optimizers.MultiOptimizer, keras.optimizers.OptimizerMap, keras.optimizers.LossScaleOptimizer


class Mean(InStep):
    """The mean of the weights after each update, in float32."""

    left_behind = (*InStep.left_behind, "kept")

    def __init__(self, name=None, fails=False):
        super().__init__(name)
        self.fails, self.kept, self.means, self.counts = fails, {}, {}, []

    def prepare(self, model):
        self.kept, self.means, self.counts = {}, {}, []

    def install(self, optimizer):
        slots = [self.add_slot(optimizer, v, "mean", dtype="float32") for v in trained(optimizer)]
        self.kept[id(optimizer)] = self.add_variable(optimizer, dtype="int32", name="count"), slots
        if self.fails:
            raise KeyError("no luck")

    def after_update(self, optimizer, variables, happened):
        count, slots = self.kept[id(optimizer)]

        def update():
            count.assign_add(1)
            share = 1 / ops.cast(ops.convert_to_tensor(count), "float32")
            for slot, variable in zip(slots, variables, strict=True):
                slot.assign(slot + (ops.cast(backends.first_copy(variable), "float32") - slot) * share)

        backends.when(happened, update, [count, *slots, *variables])

    def finish(self, optimizer):
        count, slots = self.kept[id(optimizer)]
        self.counts.append(int(numpy([count])[0]))
        self.means |= dict(zip(map(place, trained(optimizer)), numpy(slots), strict=True))


def trained(optimizer):
    return getattr(optimizer, "trained", None) or optimizer._trainable_variables


def place(variable):
    """The path without the model, whose name is another for each."""
    return variable.path.split("/", 1)[1]


class Weights(keras.callbacks.Callback):
    """The weights after each update, as Python sees them."""

    def __init__(self):
        super().__init__()
        self.updates, self.seen = [], 0

    def on_train_batch_end(self, batch, logs=None):
        now = int(numpy([self.model.optimizer.iterations])[0])
        if now > self.seen:
            self.seen = now
            self.updates.append({place(v): numpy([v])[0] for v in self.model.trainable_variables})


def true_means(model, x=X, epochs=2):
    watch = Weights()
    model.fit(x, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=[watch])
    assert watch.updates
    return {path: np.mean([w[path] for w in watch.updates], 0) for path in watch.updates[0]}, len(watch.updates)


def observed(model, x=X, epochs=2, callback=None):
    callback = callback or Mean()
    model.fit(x, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=[callback])
    assert_gone(model)
    return callback


def assert_gone(model):
    assert not {"make_train_function", "evaluate", "fit"} & vars(model).keys()
    optimizers = [model.optimizer, *getattr(model.optimizer, "optimizers", [])]
    for optimizer in [*optimizers, getattr(model.optimizer, "inner_optimizer", model.optimizer)]:
        assert not vars(optimizer).keys() & {"apply", "save_own_variables", "load_own_variables"}
        assert not [v.path for v in optimizer.variables if v.path.endswith(("_mean", "count"))]
        assert len(optimizer._tracker.stored_ids["variables"]) == len(optimizer._variables)
        assert optimizer._tracker.config["variables"][1] is optimizer._variables


def near_means(callback, means, count):
    assert callback.counts
    assert set(callback.counts) == {count}
    assert callback.means.keys() == means.keys()
    near([callback.means[path] for path in means], means.values(), 1e-5)


def multi():
    return Multi(Map(kopt.Adam(0.1), {".*head.*": keras.optimizers.SGD(0.1, momentum=0.9)}))


OPTIMIZERS = {
    "stock": lambda: keras.optimizers.Adam(0.1),
    "stock accumulates": lambda: keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=4),
    "kopt": lambda: kopt.Adam(0.1),
    "kopt accumulates": lambda: kopt.SGD(0.1, momentum=0.9, gradient_accumulation_steps=4),
    "kopt skips": lambda: kopt.Adam(0.1, nonfinite="skip"),
    "scaled": lambda: Scaled(keras.optimizers.Adam(0.1), initial_scale=2.0**127),  # the first steps overflow
    "scaled kopt": lambda: Scaled(kopt.Adam(0.1), initial_scale=2.0**127),
    "multi": multi,
    "scaled multi": lambda: Scaled(multi(), initial_scale=2.0**10),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
WAYS = [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}, {"steps_per_execution": 3}]
if BACKEND == "torch":
    WAYS = [{}]
EVERY = in_turn(OPTIMIZERS, {str(way): way for way in WAYS})


@pytest.mark.parametrize(("make", "way"), EVERY)
def test_the_mean_is_that_of_the_weights_after_each_update(make, way):
    x = X.copy()
    x[9] = np.nan if make is OPTIMIZERS["kopt skips"] else x[9]
    keras.utils.set_random_seed(0)
    twin = network(make(), **WAYS[0])
    means, count = true_means(twin, x)
    assert count < 12 or make not in [OPTIMIZERS[name] for name in OPTIMIZERS if "acc" in name or "skips" in name]
    keras.utils.set_random_seed(0)
    model = network(make(), **way)
    near_means(observed(model, x), means, count)
    near(model.get_weights(), twin.get_weights(), 1e-5)
    assert len(model.optimizer.variables) == len(twin.optimizer.variables)


@TENSORFLOW
@pytest.mark.parametrize("make", [OPTIMIZERS[name] for name in ("stock", "kopt accumulates", "scaled multi", "multi")])
def test_under_a_strategy(make):
    means, count = true_means(dense(make()))
    with many_devices():
        model = dense(make())
    near_means(observed(model), means, count)


@pytest.mark.skipif(BACKEND != "jax", reason="Keras distributes so on JAX")
def test_distributed_on_jax():
    means, count = true_means(dense(keras.optimizers.Adam(0.1)))
    with many_devices():
        near_means(observed(dense(keras.optimizers.Adam(0.1))), means, count)


UNBUILT = {"stock": OPTIMIZERS["stock"], "kopt": OPTIMIZERS["kopt"], "multi": multi}


@pytest.mark.parametrize(("make", "way"), in_turn(UNBUILT, {str(way): way for way in WAYS}))
def test_a_model_that_is_not_built(make, way):
    def lazy(**way):
        model = keras.Sequential([keras.layers.Dense(3, name="body"), keras.layers.Dense(2, name="head")])
        model.compile(make(), loss="mse", **way)
        return model

    keras.utils.set_random_seed(0)
    twin = lazy(**WAYS[0])
    means, count = true_means(twin)
    keras.utils.set_random_seed(0)
    model = lazy(**way)
    callback = Mean()
    model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[callback])
    assert_gone(model)
    assert set(callback.counts) == {count}
    near([mean for _, mean in sorted(callback.means.items())], [mean for _, mean in sorted(means.items())], 1e-5)
    assert len(model.optimizer.variables) == len(twin.optimizer.variables)


class Scale(InStep):
    """Multiplies the weights after each update, without a variable of its own."""

    def __init__(self, by, turns=None):
        super().__init__()
        self.by, self.turns = by, [] if turns is None else turns

    def before_update(self, optimizer):
        self.turns.append((self.by, "before"))

    def after_update(self, optimizer, variables, happened):
        self.turns.append((self.by, "after"))
        assert happened is True
        for variable in variables:
            variable.assign(variable * self.by)


def fit_with(model, *callbacks, epochs=1):
    model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model


def test_a_part_without_variables_is_in_the_step_it_belongs_to_and_in_no_other():
    """JAX must not take the step that it has compiled before, though all shapes are the same."""
    keras.utils.set_random_seed(0)
    model = network(keras.optimizers.SGD(0.1))
    start = model.get_weights()
    plain = fit_with(model).get_weights()
    model.set_weights(start)
    zero = fit_with(model, Scale(0.0)).get_weights()
    assert not any(w.any() for w in zero)
    model.set_weights(start)
    assert equal(fit_with(model).get_weights(), plain)


def test_several_take_turns_and_leave_in_any_order():
    order = []
    parts = [Scale(0.5, order), Mean(), Scale(2.0, order)]
    model = network(keras.optimizers.SGD(0.1), run_eagerly=True)
    fit_with(model, *parts)
    assert_gone(model)
    assert order == [(0.5, "before"), (2.0, "before"), (0.5, "after"), (2.0, "after")] * 3
    assert parts[1].counts == [3]
    model = network(keras.optimizers.SGD(0.1))
    callbacks = keras.callbacks.CallbackList(parts, model=model)
    callbacks.on_train_begin()
    model.train_on_batch(X, Y)
    for part in (parts[1], parts[0], parts[2]):
        assert "apply" in vars(model.optimizer)
        part.on_train_end()
    assert_gone(model)
    assert parts[1].counts == [1]


def test_the_optimizers_list_is_its_own_again():
    model = network(keras.optimizers.Adam(0.1))
    model.optimizer.build(model.trainable_variables)
    variables, kept = model.optimizer.variables, model.optimizer._variables
    fit_with(model, Mean(), Mean())
    assert model.optimizer._variables is kept
    assert all(one is other for one, other in zip(model.optimizer.variables, variables, strict=True))


def test_evaluate_and_predict_install_nothing():
    model, callback = network(keras.optimizers.Adam(0.1)), Mean()
    for _ in range(2):
        model.evaluate(X, Y, verbose=0, callbacks=[callback])
        assert_gone(model)
        model.predict(X, verbose=0, callbacks=[callback])
        assert_gone(model)
        made = model.train_function
        assert made is None or callback.counts
        fit_with(model, callback)
    assert callback.counts == [3]


def test_evaluation_within_fit_takes_nothing_out():
    """Validation is given the list of `fit`; a call of evaluate in a callback makes its own."""
    model, callback, other = network(keras.optimizers.Adam(0.1)), Mean(), network("sgd")
    evaluate = lambda m: m.evaluate(X, Y, verbose=0, callbacks=[callback])  # noqa: E731
    model.fit(X, Y, batch_size=8, epochs=3, verbose=0, validation_data=(X, Y), callbacks=[
        callback, AtEpoch(1, evaluate), AtEpoch(2, lambda _: evaluate(other))])  # fmt: skip
    assert callback.counts == [9]
    assert_gone(model)
    assert_gone(other)


class Stop(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise InterruptedError

    def on_test_begin(self, logs=None):
        raise InterruptedError


def crash(model, *callbacks):
    with pytest.raises(InterruptedError):
        fit_with(model, *callbacks, Stop())


@pytest.mark.parametrize("again", ["the same", "another", "none", "recompiled", "recompiled, none", "elsewhere"])
def test_what_a_fit_that_raised_has_left_goes_at_the_next(again):
    model, callback = network(keras.optimizers.Adam(0.1)), Mean()
    crash(model, callback)
    old = model.optimizer
    assert "apply" in vars(old)
    if "recompiled" in again:
        model.compile(kopt.Adam(0.1), loss="mse")
    next_model = network(keras.optimizers.Adam(0.1)) if again == "elsewhere" else model
    part = Mean() if again == "another" else callback
    fit_with(next_model, *([] if "none" in again else [part]))
    assert_gone(next_model)
    assert_gone(model)
    assert not vars(old).keys() & {"apply", "save_own_variables"}
    assert not [v.path for v in old.variables if v.path.endswith(("_mean", "count"))]
    if "none" not in again:
        assert part.counts == [3]


def test_an_evaluation_that_raised_leaves_nothing_to_a_fit():
    model, callback = network(keras.optimizers.Adam(0.1)), Mean()
    with pytest.raises(InterruptedError):
        model.evaluate(X, Y, verbose=0, callbacks=[Stop(), callback])
    fit_with(model)
    assert_gone(model)
    assert not callback.counts


def test_an_installation_that_raised_leaves_nothing():
    model, good = network(keras.optimizers.Adam(0.1)), Mean()
    with pytest.raises(KeyError, match="no luck"):
        fit_with(model, good, Mean(fails=True))
    assert_gone(model)
    assert fit_with(model, good).optimizer.iterations == 3
    assert good.counts == [3]


def test_a_fit_within_a_fit_that_takes_a_part_out_is_not_kept_secret():
    model = network(keras.optimizers.Adam(0.1))
    with pytest.raises(RuntimeError, match="^Mean was taken out of the step by another `fit`"):
        fit_with(model, Mean(), AtEpoch(1, fit), epochs=2)
    assert_gone(model)


def test_a_list_of_callbacks_can_be_used_again():
    model, parts = network(keras.optimizers.Adam(0.1)), [Mean("one"), Mean("two")]
    callbacks = keras.callbacks.CallbackList(parts, add_history=True, model=model)
    for _ in range(2):
        model.fit(X, Y, batch_size=8, verbose=0, callbacks=callbacks)
        assert_gone(model)
        assert [part.counts for part in parts] == [[3], [3]]


def test_a_loop_of_the_users_own():
    model, callback = network(keras.optimizers.Adam(0.1)), Mean()
    for _ in range(2):
        callbacks = keras.callbacks.CallbackList([callback], model=model)
        callbacks.on_train_begin()
        for _ in range(4):
            model.train_on_batch(X, Y)
        callbacks.on_train_end()
        assert callback.counts == [4]
        assert_gone(model)


def test_refusals():
    model, callback = network(keras.optimizers.Adam(0.1)), Mean("average")
    with pytest.raises(ValueError, match="^`callbacks` must be a list with each callback once. .*average twice"):
        fit_with(model, callback, callback)
    assert_gone(model)
    model.compile(optimizer=None, loss="mse")
    with pytest.raises(ValueError, match="^`optimizer` must be one of Keras or kopt in `compile`, for average. .*None"):
        fit_with(model, callback)
    with pytest.raises(ValueError, match="^`state` must be empty for average, which keeps none"):
        callback.set_state({"a": 1})
    with pytest.raises(ValueError, match="^`name` must be"):
        Callback("")
    callback.set_state(callback.get_state())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies_have_neither_the_model_nor_what_runs(clone):
    model, callback = network(keras.optimizers.Adam(0.1)), Mean()
    copies = [clone(callback)]
    fit_with(model, callback, AtEpoch(0, lambda _: copies.append(clone(callback))))
    copies.append(clone(callback))
    assert len(pickle.dumps(callback)) < 3000
    for twin in copies:
        assert twin._model is twin._training is twin._announced is twin._begun is None
        assert type(twin) is Mean
        assert twin.name == "Mean"
    assert copies[2].counts == [3]
    assert equal(copies[2].means.values(), callback.means.values())
    fit_with(model, *copies)
    assert [twin.counts for twin in copies] == [[3]] * 3


CHILD = """
import sys, keras, numpy as np
folder, floatx = sys.argv[1:]
keras.config.set_floatx(floatx)
for name in ("mid", "end"):
    model = keras.models.load_model(f"{folder}/{name}.keras")
    np.savez(f"{folder}/{name}", *[keras.ops.convert_to_numpy(v) for v in model.optimizer.variables])
assert "kopt" not in sys.modules
"""


def stock_multi():
    return Multi(Map(keras.optimizers.Adam(0.1), {".*head.*": keras.optimizers.SGD(0.1, momentum=0.9)}))


@pytest.mark.parametrize("make", [
    OPTIMIZERS["stock"],
    pytest.param(OPTIMIZERS["scaled"], marks=pytest.mark.slow),
    pytest.param(stock_multi, marks=pytest.mark.slow),
])  # fmt: skip
def test_files_load_where_kopt_is_not_known(make, tmp_path):
    model, states = network(make()), []
    save = keras.callbacks.ModelCheckpoint(tmp_path / "mid.keras", save_freq="epoch")
    fit_with(model, Mean(), save, AtEpoch(1, lambda m: states.append(numpy(m.optimizer.variables))), epochs=2)
    fit_with(network(make()), AtEpoch(1, lambda m: states.append(numpy(m.optimizer.variables))), epochs=2)
    model.save(tmp_path / "end.keras")
    command = [sys.executable, "-W", "error::UserWarning", "-c", CHILD, tmp_path, FLOATX]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": BACKEND})
    assert done.returncode == 0, done.stderr
    for name in ("mid", "end"):
        assert equal(np.load(tmp_path / f"{name}.npz").values(), model.optimizer.variables)


@every_optimizer
def test_files_of_a_running_fit_can_be_read_in_it_and_after_it(make, tmp_path):
    model, callback, saved = network(make()), Mean(), {}

    def save(model):
        model.save(tmp_path / "mid.keras")
        model.save_weights(tmp_path / "mid.weights.h5")
        kept = {id(v) for count, slots in callback.kept.values() for v in (count, *slots)}
        saved["state"] = numpy([v for v in model.optimizer.variables if id(v) not in kept])
        saved["count"] = numpy([count for count, _ in callback.kept.values()])

    def load(model):
        added = numpy([count for count, _ in callback.kept.values()])
        model.load_weights(tmp_path / "mid.weights.h5")
        kept = {id(v) for count, slots in callback.kept.values() for v in (count, *slots)}
        assert equal([v for v in model.optimizer.variables if id(v) not in kept], saved["state"])
        assert equal([count for count, _ in callback.kept.values()], added)
        assert not equal(added, saved["count"])

    model.fit(X, Y, batch_size=2, epochs=3, shuffle=False, verbose=0, callbacks=[
        callback, AtEpoch(1, save), AtEpoch(2, load)])  # fmt: skip
    assert_gone(model)
    loaded = keras.models.load_model(tmp_path / "mid.keras")
    assert equal(loaded.optimizer.variables, saved["state"])
    model.load_weights(tmp_path / "mid.weights.h5")
    assert equal(model.optimizer.variables, saved["state"])


@TENSORFLOW
def test_checkpoints_of_tensorflow_during_and_after_a_fit(tmp_path):
    import tensorflow as tf

    model, paths = network(keras.optimizers.Adam(0.1)), []

    def write(model):
        paths.append(tf.train.Checkpoint(optimizer=model.optimizer).write(str(tmp_path / str(len(paths)))))

    fit_with(model, Mean(), AtEpoch(1, write), epochs=2)
    write(model)
    new = network(keras.optimizers.Adam(0.1))
    new.optimizer.build(new.trainable_variables)
    for path in paths:
        tf.train.Checkpoint(optimizer=new.optimizer).read(path).assert_consumed()
    assert equal(new.optimizer.variables, model.optimizer.variables)


def test_what_the_optimizer_lets_go_in_a_fit_stays_away():
    model, callback = network(keras.optimizers.SGD(0.1, momentum=0.9)), Mean()
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)

    def change(model):
        model.optimizer.learning_rate = schedule
        model.train_function = None
        model.make_train_function()

    fit_with(model, callback, AtEpoch(1, change), epochs=2)
    assert_gone(model)
    assert not any("learning_rate" in v.path for v in model.optimizer.variables)
    assert callback.counts == [6]


def test_what_waits_for_weights_can_be_settled_before_the_first_step():
    model, callback = keras.Sequential([keras.layers.Dense(2)]), Mean()
    model.compile(keras.optimizers.Adam(0.1), loss="mse")
    callbacks = keras.callbacks.CallbackList([callback], model=model)
    callbacks.on_train_begin()
    settle(model)
    assert not callback.kept
    model.build((None, 4))
    settle(model)
    settle(model)
    assert len(callback.kept) == 1
    model.train_on_batch(X, Y)
    callbacks.on_train_end()
    assert callback.counts == [1]
    assert_gone(model)
    settle(model)


def test_no_hook_of_a_batch_is_overridden():
    for cls in (Callback, InStep):
        assert not {name for base in cls.__mro__[:-2] if base is not keras.callbacks.Callback for name in vars(base)
                    if "batch" in name}  # fmt: skip


NEEDED = {  # arguments of those public callbacks that cannot do without, or are long by themselves
    "BackupAndRestore": {"directory": "backup"},
    "CosineRestarts": {"cycle_epochs": 1},
    "CyclicalRate": {"max_learning_rate": 0.1, "cycle_epochs": 1},
    "ExponentialDecay": {"rate": 0.1},
    "LearningRateFinder": {"steps": 3, "verbose": 0},
    "Schedule": {"hyperparameter": "learning_rate", "schedule": kopt.schedules.Linear(initial=0.1)},
    "SnapshotEnsemble": {"cycles": 1, "max_learning_rate": 0.1},
    "StagedUnfreeze": {"stages": {0: {"kernel": 0.5}}},
    "Staircase": {"boundaries": [1], "factors": [0.1]},
    "StepDecay": {"every_epochs": 1},
    "WarmUp": {"epochs": 1},
}


@pytest.mark.parametrize("name", [name for name, one in vars(kopt.callbacks).items() if isinstance(one, type)])
def test_every_callback_can_be_copied_before_and_after_a_fit(name, tmp_path, monkeypatch):
    """KerasTuner copies them for each trial."""
    monkeypatch.chdir(tmp_path)

    def fit(callback):
        keras.utils.set_random_seed(0)
        optimizer = kopt.LBFGS(accumulate_steps=2) if name == "LineSearchMonitor" else kopt.SGD(0.01, momentum=0.9)
        model = network(optimizer, run_eagerly=BACKEND == "tensorflow" and name != "LineSearchMonitor")
        model.fit(X[:8], Y[:8], batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[callback])
        return numpy(model.weights)

    callback = getattr(kopt.callbacks, name)(**NEEDED.get(name, {}))
    before = copy.deepcopy(callback)
    first = fit(callback)
    after = copy.deepcopy(callback)
    if name == "BackupAndRestore":  # which would go on with the finished training
        (tmp_path / "backup").rename(tmp_path / "of the first")
    assert equal(fit(before), first)
    assert all(np.isfinite(array).all() for array in fit(after))
