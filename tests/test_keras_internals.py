"""What kopt relies on in Keras, in `_keras/`. A failure says which private name changed."""

import inspect
import types

import h5py
import keras
import numpy as np
import pytest
from keras import ops

import kopt
from kopt import _keras
from kopt._keras import running, stepping
from tests.conftest import BACKEND
from tests.training import START, STREAM, X, Y, fit, mirrored, near, network

KerasOptimizer = keras.optimizers.Optimizer


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_hooks_that_the_bridge_overrides():
    assert parameters(KerasOptimizer.apply) == ["self", "grads", "trainable_variables"]
    assert parameters(KerasOptimizer.finalize_variable_values) == ["self", "var_list"]


STILL_KERAS = {  # what of Keras's optimizer still runs in fit
    "__init__", "__new__", "__setattr__", "_check_super_called", "_get_current_learning_rate", "_track_variable",
    "_untrack_variable", "_var_key", "add_variable", "assign", "assign_add", "assign_sub", "from_config", "get_config",
    "scale_loss", "apply_gradients", "_obj_type", "__delattr__",
}  # fmt: skip


def test_keras_does_nothing_else_in_a_step(monkeypatch):
    """Nothing of Keras's way of a gradient is left, whatever it is called today."""
    model = network(kopt.SGD(use_ema=True, gradient_accumulation_steps=2, clipnorm=1.0, weight_decay=0.1))
    theirs = {}
    for cls in KerasOptimizer.__mro__:
        if cls.__module__.startswith("keras.") and "optimizer" in cls.__module__:
            theirs |= {name: value for name, value in vars(cls).items() if inspect.isfunction(value)}
    ours = {name for cls in kopt.SGD.__mro__ if cls.__module__.startswith("kopt.") for name in vars(cls)}
    stopped = theirs.keys() - ours - STILL_KERAS
    assert {"_clip_gradients", "_apply_weight_decay", "_update_model_variables_moving_average"} <= stopped
    for name in stopped:
        fail = lambda *_, name=name, **__: pytest.fail(f"{name} was called")  # noqa: E731
        monkeypatch.setattr(kopt.SGD, name, fail, raising=False)
    fit(model)


def test_private_attributes():
    optimizer, w = kopt.SGD(0.5), keras.Variable(np.ones(2))
    assert isinstance(optimizer._learning_rate, keras.Variable)
    before = len(optimizer.variables)
    optimizer._untrack_variable(optimizer._learning_rate)
    assert len(optimizer.variables) == before - 1
    optimizer.build([w])
    assert optimizer._trainable_variables_indices == {optimizer._var_key(w): 0}
    assert optimizer._trainable_variables == [w]
    assert keras.optimizers.SGD(use_ema=True)._iterations.shape == ()
    theirs = keras.optimizers.SGD(use_ema=True)
    theirs.build([w])
    assert len(theirs._model_variables_moving_average) == 1
    assert len(optimizer._variables) == len(optimizer.variables)
    assert hasattr(w, "_layout")
    assert hasattr(optimizer, "_distribution_strategy") == (BACKEND == "tensorflow")


def test_a_frozen_layer_keeps_the_list_of_what_it_would_train():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1), keras.layers.BatchNormalization()])
    frozen = model.layers[0]
    frozen.trainable = False
    assert _keras.frozen_in(model) == frozen.weights
    frozen.trainable = True
    assert _keras.frozen_in(model) == []
    frozen.kernel.trainable = False  # one weight alone, as engine="trainable" does it
    assert [v.name for v in model.trainable_variables] == ["bias", "gamma", "beta"]
    assert frozen.get_config()["trainable"] is True


def test_the_private_class_of_keras_still_rounds_a_constant_to_float32():
    """The reason for `_keras.constant`; when this fails, Keras's own initializer will do."""
    if BACKEND != "tensorflow":
        pytest.skip("Keras has this defect on TensorFlow only")
    value = keras.initializers.Constant(0.1)((), "float64")
    assert float(value) != 0.1


def test_maximum_still_rounds_float64_on_torch():
    """The reason for `numerics.larger`; when this fails, `ops.maximum` will do."""
    if BACKEND != "torch":
        pytest.skip("Keras has this defect on torch only")
    a = keras.ops.convert_to_tensor(0.1, "float64")
    assert keras.backend.standardize_dtype(keras.ops.maximum(a, a).dtype) == "float32"


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has strategies")
def test_the_private_name_of_tensorflow():
    import tensorflow as tf

    assert parameters(tf.__internal__.distribute.interim.maybe_merge_call)[:2] == ["fn", "strategy"]


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX has this class")
def test_the_class_of_values_that_are_not_there_yet():
    import jax

    jax.jit(lambda x: isinstance(x, jax.core.Tracer) or pytest.fail("no Tracer"))(1.0)


def test_what_a_part_of_a_step_needs():
    """For `stepping.Step`: what is tracked goes to the list that the tracker knows; nothing else holds one of them."""
    optimizer = keras.optimizers.SGD()
    optimizer.build([keras.Variable(np.ones(2))])
    is_kept, kept = optimizer._tracker.config["variables"]
    assert kept is optimizer._variables
    other = list(kept)
    optimizer._tracker.config["variables"] = is_kept, other
    vars(optimizer)["_variables"] = other
    added = optimizer.add_variable(())
    assert other[-1] is optimizer.variables[-1] is added
    assert len(kept) == len(other) - 1
    optimizer._untrack_variable(added)
    assert len(optimizer.variables) == len(kept)
    assert id(added) not in optimizer._tracker.stored_ids["variables"]


def test_the_list_of_variables_still_cannot_be_saved_by_tensorflow_once_something_was_taken_out(tmp_path):
    """The reason for the other list in `stepping.Step`; when this fails, `_untrack_variable` will do."""
    if BACKEND != "tensorflow":
        pytest.skip("TensorFlow's checkpoints")
    import tensorflow as tf

    optimizer = keras.optimizers.SGD()
    optimizer._untrack_variable(optimizer.add_variable(()))
    with pytest.raises(ValueError, match="Unable to save"):
        tf.train.Checkpoint(optimizer=optimizer).write(str(tmp_path / "point"))


def test_the_layers_of_a_model():
    model = keras.Sequential([keras.layers.Dense(2)])
    assert not all(layer.built for layer in model._flatten_layers())
    model.build((None, 3))
    assert {type(layer) for layer in model._flatten_layers()} >= {keras.Sequential, keras.layers.Dense}
    assert all(layer.built for layer in model._flatten_layers())


def test_what_is_another_after_each_compile():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    before = model._loss_tracker
    model.compile(model.optimizer, model.loss)
    assert model._loss_tracker is not before


def test_what_only_a_training_calls():
    """For `callbacks/install.py`: `fit` makes its function between `set_model` and `on_train_begin`; no other does."""
    model, calls = network("sgd"), []

    class Notes(keras.callbacks.Callback):
        def set_model(self, model):
            calls.append(("set_model", model.history))

        def on_train_begin(self, logs=None):
            calls.append("train")

        def on_test_begin(self, logs=None):
            calls.append("test")

        def on_predict_begin(self, logs=None):
            calls.append("predict")

    make, x, y = model.make_train_function, np.ones((2, 4)), np.ones((2, 2))
    vars(model)["make_train_function"] = lambda force=False: (calls.append("make"), make(force))[1]
    for _ in range(2):
        model.fit(x, y, verbose=0, callbacks=[Notes()], validation_data=(x, y))
        model.evaluate(x, y, verbose=0, callbacks=[Notes()])
        model.predict(x, verbose=0, callbacks=[Notes()])
    histories = [call[1] for call in calls if call[0] == "set_model"]
    assert histories[0] is histories[1] is histories[2] is not histories[3]
    names = [call if isinstance(call, str) else call[0] for call in calls]
    fit_ = ["set_model", "make", "train", "test"]
    assert names == [*fit_, "set_model", "test", "set_model", "predict"] * 2
    model.train_on_batch(x, y)
    assert calls[-1] == "make"


def test_the_names_of_optimizers_in_files():
    """For `optimizers.loading`."""
    from keras.src.utils.naming import to_snake_case

    from kopt.optimizers.loading import snake_case

    for name in ("SGD", "Adam", "AdamW", "RMSprop", "LossScaleOptimizer", "Adam2Bit", "_Own", "MyAdamW3"):
        assert snake_case(name) == to_snake_case(name)


def test_what_is_found_in_a_running_fit():
    """For `running.py` and `passes.py`: their names of the frames, the epoch's iterator, its adapter and the model."""
    found = []

    class Looks(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            found.append(running.Fit(self))

    model, looks = network("sgd"), Looks()
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, validation_data=(X, Y), callbacks=[looks])
    (fit,) = found
    assert looks in fit.callbacks
    assert fit.validation_data[0] is X
    assert {"_async_train", "callbacks"} <= vars(fit.callback_list).keys()
    iterator, adapter = fit.epoch_iterator, fit.epoch_iterator.data_adapter
    own = {"_current_iterator", "_steps_seen", "_num_batches", "steps_per_epoch", "data_adapter"}
    assert own <= vars(iterator).keys()
    assert {"_get_iterator", "_enumerate_iterator", "num_batches"} <= set(dir(iterator))
    assert ({"_distributed_dataset", "_distribute_strategy"} <= vars(iterator).keys()) == (BACKEND == "tensorflow")
    assert {"_num_samples", "_batch_size", "_shuffle", "_inputs"} <= vars(adapter).keys()
    assert {"_symbolic_build", "_flatten_layers", "_initial_epoch"} <= set(dir(model))
    keras.random.normal(())
    assert len(_keras.global_seeds()) == 1


def test_the_first_epoch_is_asked_for_once():
    model = network("sgd")
    running.Fit.start_at(types.SimpleNamespace(model=model), 2)
    for expected in ([2], [0, 1, 2]):
        assert model.fit(X, Y, epochs=3, verbose=0).epoch == expected


def test_the_source_of_a_rate_is_read_at_each_step_from_its_attribute():
    """`stepping.stand_in_for_rate` puts a variable in place of a schedule."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    optimizer = keras.optimizers.SGD(schedule)
    assert stepping.rate_source(optimizer) is schedule
    variable = keras.Variable(0.25, trainable=False)
    put_back = stepping.stand_in_for_rate(optimizer, variable)
    assert stepping.rate_source(optimizer) is schedule
    assert float(optimizer.learning_rate) == 0.25
    optimizer.learning_rate = 0.5  # is no error then
    assert float(variable) == 0.5
    put_back()
    assert optimizer._learning_rate is schedule
    assert "_rate_source" not in vars(optimizer)


@pytest.mark.parametrize(("cls", "names"), [
    (keras.optimizers.Adam, ("beta_1", "beta_2")), (keras.optimizers.RMSprop, ("rho",)),
    (keras.optimizers.AdamW, ("weight_decay",)), (keras.optimizers.Nadam, ("beta_1", "beta_2")),
    (keras.optimizers.Adamax, ("beta_1", "beta_2")), (keras.optimizers.Lion, ("beta_1", "beta_2")),
    (keras.optimizers.Adadelta, ("rho",)), (keras.optimizers.Lamb, ("beta_1", "beta_2"))])  # fmt: skip
def test_numbers_of_keras_optimizers_are_attributes_read_at_each_step(cls, names):
    for name in names:
        optimizer, twin = cls(0.1), cls(0.1, **{name: 0.5})
        optimizer.build([keras.Variable(START)])
        twin.build([keras.Variable(START)])
        for g in STREAM[:3]:
            is_number = BACKEND == "torch"
            before = vars(optimizer)[name]
            vars(optimizer)[name] = 0.5 if is_number else keras.Variable(0.5, trainable=False)
            for one in (optimizer, twin):
                one.apply([ops.convert_to_tensor(g)])
            vars(optimizer)[name] = before
        near(optimizer._trainable_variables, twin._trainable_variables, 1e-5)


def test_what_is_kept_unfiled_is_in_the_step_and_in_no_file():
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build([keras.Variable(START)])
    stored = {}
    optimizer.save_own_variables(stored)
    kept = optimizer.add_variable((), "zeros", name="kept")
    stepping.keep_unfiled(optimizer, optimizer, kept)
    again = {}
    optimizer.save_own_variables(again)
    assert stored.keys() == again.keys()
    assert any(variable is kept for variable in optimizer.variables)


def test_in_which_methods_callbacks_take_the_weights(tmp_path):
    taken, model = [], network("sgd")
    watched = type("Watched", (type(model),), {"get_weights": lambda self: taken.append("get") or []})
    for frequency, expected in (("epoch", 2), (1, 6)):
        save = keras.callbacks.ModelCheckpoint(tmp_path / "m.weights.h5", save_freq=frequency, save_weights_only=True)
        name, calls = _keras.keeping_method(save), []
        setattr(save, name, lambda *args, calls=calls, **more: calls.append(1))
        model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[save])
        assert len(calls) == expected
        assert not list(tmp_path.iterdir())
    stop = keras.callbacks.EarlyStopping("loss", restore_best_weights=True)
    stop.set_model(watched([keras.Input((4,))]))
    stop.on_train_begin()
    assert not taken
    getattr(stop, _keras.keeping_method(stop))(0, {"loss": 1.0})
    assert taken
    assert _keras.keeping_method(keras.callbacks.EarlyStopping()) is None


def test_the_direction_of_a_metric_is_told_by_its_name():
    model = network("sgd", metrics=["accuracy"])
    model.fit(X, Y, verbose=0)
    for metric, expected in (("val_accuracy", ops.greater), ("val_loss", ops.less)):
        callback = keras.callbacks.EarlyStopping("val_averaged_loss", min_delta=0.5)
        callback.set_model(model)
        for _ in range(2):
            _keras.tell_direction(callback, metric)
        assert callback.monitor_op is expected
        assert callback.monitor == "val_averaged_loss"
        assert callback.min_delta == (0.5 if expected is ops.greater else -0.5)


@pytest.mark.parametrize("is_nested", [True, False], ids=["nested", "flat"])
def test_which_layer_makes_an_output(is_nested):
    last = keras.layers.Dense(2)
    inner = keras.Sequential([keras.Input((4,)), last])
    inputs = {"a": keras.Input((4,), name="a")}
    outputs = {"b": inner(inputs["a"]) if is_nested else last(inputs["a"])}
    model = keras.Model(inputs, outputs)
    assert _keras.inputs_of(model).keys() == inputs.keys()
    assert _keras.outputs_of(model).keys() == outputs.keys()
    assert _keras.made_by(_keras.outputs_of(model)["b"]) is last
    assert _keras.made_by(_keras.outputs_of(inner)) is last
    assert _keras.outputs_of(keras.Sequential([last])) is None
    after = keras.layers.ReLU()(_keras.outputs_of(model)["b"])
    assert _keras.last_before(after, lambda layer: layer is last) == [last]
    assert _keras.last_before(after, lambda layer: False) == []


def test_the_weights_of_a_layer_itself():
    layer = keras.layers.Bidirectional(keras.layers.LSTM(2))
    layer.build((None, 3, 4))
    own = [one for one in _keras.layers_of(layer) if _keras.own_weights(one)]
    assert {type(one) for one in own} == {keras.layers.LSTMCell}
    norm = keras.layers.BatchNormalization()
    norm.build((None, 4))
    assert _keras.own_weights(norm) == [norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance]
    assert [v.shape for v in _keras.own_weights(_keras.made_anew(norm))] == [(4,)] * 4


def test_a_model_without_its_optimizer_is_saved_and_trained_on(tmp_path):
    model = network(keras.optimizers.Adam(0.25))
    model.fit(X, Y, verbose=0)
    with _keras.without_optimizers([model]):
        model.save_weights(tmp_path / "m.weights.h5")
    with h5py.File(tmp_path / "m.weights.h5") as file:
        assert "optimizer" not in file
    assert model.optimizer.iterations > 0


@pytest.mark.skipif(BACKEND != "tensorflow", reason="strategies are TensorFlow's")
def test_predict_on_batch_still_repeats_rows_on_two_devices():
    with mirrored().scope():
        model = network("sgd")
    assert len(model.predict_on_batch(X)) == 2 * len(X)
    assert len(_keras.predicted(model, X)) == len(X)


def test_validation_within_fit_is_a_call_of_evaluate_with_the_list_of_callbacks():
    model, calls = network("sgd"), []
    evaluate = model.evaluate
    vars(model)["evaluate"] = lambda *args, **more: calls.append(more["callbacks"]) or evaluate(*args, **more)
    callback = keras.callbacks.Callback()
    model.fit(X, Y, epochs=2, verbose=0, validation_data=(X, Y), callbacks=[callback])
    assert [callback in one.callbacks for one in calls] == [True, True]


def test_a_model_is_compiled_like_another():
    loss = lambda y, found: ops.mean(ops.square(y - found), axis=-1)  # noqa: E731
    model = network(keras.optimizers.Adam(0.25))
    own = keras.metrics.MeanMetricWrapper(lambda y, found: ops.square(y - found), name="own")
    model.compile(model.optimizer, loss=loss, metrics=["mae", own, keras.metrics.MeanSquaredError(name="theirs")])
    twin = _keras.made_from_config(model)
    assert not twin.compiled
    _keras.compile_like(twin, model)
    twin.set_weights(model.get_weights())
    assert twin.evaluate(X, Y, verbose=0) == model.evaluate(X, Y, verbose=0)
    assert float(twin.optimizer.learning_rate) == 0.25
    assert twin.optimizer is not model.optimizer
    assert not {id(one) for one in twin.metrics_variables} & {id(one) for one in model.metrics_variables}


def test_whether_a_model_is_told_that_it_is_trained():
    class Plain(keras.Model):
        def call(self, x):
            return x

    inputs = keras.Input((1,))
    assert not _keras.takes_training(Plain())
    assert _keras.takes_training(keras.Model(inputs, inputs))
    assert _keras.takes_training(keras.Sequential([inputs]))


def test_whether_a_model_has_metrics():
    model = keras.Sequential([keras.Input((1,))])
    assert not _keras.has_metrics(model)
    model.compile(loss="mse")
    assert not _keras.has_metrics(model)
    for given in ({"metrics": ["mae"]}, {"weighted_metrics": ["mae"]}):
        model.compile(loss="mse", **given)
        assert _keras.has_metrics(model)


def test_a_loss_is_scaled_where_it_is_differentiated():
    """`QuasiNewton` takes the loss from there; on JAX it has a value after the gradient, too."""
    seen = []

    class Looks(keras.optimizers.SGD):
        def scale_loss(self, loss):
            seen.append(ops.stop_gradient(loss))
            return super().scale_loss(loss)

        def apply(self, grads, trainable_variables=None):
            self.learning_rate.assign(ops.cast(seen[-1], "float32"))
            return super().apply([0 * g for g in grads], trainable_variables)

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    model.compile(Looks(), loss="mse")
    model.fit(np.ones((2, 1)), np.zeros((2, 1)), verbose=0)
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == 1.0
