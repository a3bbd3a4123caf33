"""State by name: what is saved is what is loaded, and what does not fit is refused."""

import copy
import json
import os
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from tests.catalog import CLASSES
from tests.conftest import BACKEND
from tests.training import START, STREAM, X, Y, equal, every_class, every_row, fit, network, numpy, run


@every_row
def test_config_makes_the_same_optimizer(row):
    optimizer = row.make(l2=0.25, exclude_from_decay=["bias", r"gamma$"], clipnorm=2.0, use_ema=True, name="mine")
    config = optimizer.get_config()
    assert json.loads(json.dumps(config)) == config
    assert type(optimizer).from_config(config).get_config() == config
    for name, value in row.arguments.items():
        assert config[name] == value
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(again) is row.cls
    assert again.get_config() == config
    assert keras.saving.get_registered_name(row.cls) == f"kopt>{row.cls.__name__}"
    with pytest.raises(ValueError, match="has no argument `surprise`"):
        type(optimizer).from_config({**config, "surprise": 1})


@every_row
def test_repr_can_be_read_back(row):
    optimizer = row.make()
    again = eval(repr(optimizer), vars(kopt))
    assert again.get_config() | {"name": None} == optimizer.get_config() | {"name": None}


@every_row
def test_training_goes_on_from_a_file_bit_for_bit(row, tmp_path):
    model = network(row.make(exclude_from_decay="bias", l2=0.01))
    for name, value in row.changes.items():
        setattr(model.optimizer, name, value)
    fit(model).save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert equal(model.optimizer.variables, loaded.optimizer.variables)
    assert all(getattr(loaded.optimizer, name) == value for name, value in row.changes.items())
    assert equal(fit(model).variables, fit(loaded).variables)
    assert equal(model.optimizer.variables, loaded.optimizer.variables)


CHILD = """
import sys, keras, numpy as np, kopt
folder, names = sys.argv[1], sys.argv[2:]
data = np.load(f"{folder}/data.npz")
for name in names:
    model = keras.models.load_model(f"{folder}/{name}.keras")
    model.fit(data["x"], data["y"], batch_size=8, shuffle=False, verbose=0)
    state = [keras.ops.convert_to_numpy(v) for v in model.optimizer.variables]
    np.savez(f"{folder}/{name}.npz", *model.get_weights(), *state)
"""


def test_training_goes_on_in_another_process(tmp_path):
    models = {row.name: network(row.make()) for row in CLASSES}
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    for name, model in models.items():
        fit(model).save(tmp_path / f"{name}.keras")
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path, *models], capture_output=True, text=True,
                          env={**os.environ, "KERAS_BACKEND": BACKEND})  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, model in models.items():
        fit(model)
        theirs = np.load(tmp_path / f"{name}.npz").values()
        assert equal([*model.get_weights(), *model.optimizer.variables], list(theirs)), name


@pytest.mark.parametrize("wrap", ["loss scale", "multi"])
def test_wrapped_optimizers_are_saved_whole(wrap, tmp_path):
    inner = kopt.SGD(0.01, momentum=0.9)
    optimizers = keras.optimizers
    model = network(optimizers.LossScaleOptimizer(inner) if wrap == "loss scale" else optimizers.MultiOptimizer(
        optimizers.OptimizerMap(inner, {".*head.*": kopt.Adam()})))  # fmt: skip
    fit(model).save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert equal(fit(model).variables, fit(loaded).variables)
    assert equal(model.optimizer.variables, loaded.optimizer.variables)


def test_weights_wait_for_an_optimizer_that_is_not_built(tmp_path):
    trained, file = fit(network(kopt.Adam(0.1))), tmp_path / "all.weights.h5"
    trained.save_weights(file)
    fresh = network(kopt.Adam(0.2))
    fresh.load_weights(file)
    fresh.save(tmp_path / "again.keras")  # still not built
    again = keras.models.load_model(tmp_path / "again.keras")
    twin = fit(trained)
    assert equal(fit(fresh).variables, twin.variables)
    assert equal(fit(again).variables, twin.variables)
    assert equal(again.optimizer.variables, twin.optimizer.variables)
    assert fresh.optimizer.get_config()["learning_rate"] == 0.1


def test_what_is_assigned_after_loading_stays(tmp_path):
    fit(network(kopt.Adam(0.1))).save_weights(tmp_path / "all.weights.h5")
    fresh = network(kopt.Adam(0.2))
    fresh.load_weights(tmp_path / "all.weights.h5")
    fresh.optimizer.learning_rate = 0.3
    fit(fresh)
    assert fresh.optimizer.get_config()["learning_rate"] == 0.3
    assert int(fresh.optimizer.iterations) == 6


def test_the_last_file_counts(tmp_path):
    early, late = tmp_path / "early.weights.h5", tmp_path / "late.weights.h5"
    model = network(kopt.Adam())
    model.save_weights(early)
    fit(model).save_weights(late)
    fresh = network(kopt.Adam())
    fresh.load_weights(late)
    fresh.load_weights(early)
    fresh.optimizer.build(fresh.trainable_variables)
    assert int(fresh.optimizer.iterations) == 0
    assert not any(numpy([v])[0].any() for v in fresh.optimizer.variables if len(v.shape))


def test_waiting_state_that_does_not_fit_is_let_go_with_a_word(tmp_path):
    frozen = network("sgd")
    frozen.get_layer("body").trainable = False
    frozen.compile(kopt.Adam(0.1), loss="mse")
    fit(frozen).save_weights(tmp_path / "head.weights.h5")
    thawed = network(kopt.Adam(0.01))
    thawed.load_weights(tmp_path / "head.weights.h5")
    with pytest.warns(UserWarning, match="does not fit .*m:.*body.kernel is not in the file.*starts afresh"):
        fit(thawed)
    assert int(thawed.optimizer.iterations) == 3
    assert thawed.optimizer.get_config()["learning_rate"] == 0.01


def test_a_mixed_precision_model_loads_where_the_policy_is_another(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = fit(network(kopt.Adam()))
        model.save(tmp_path / "mixed.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    loaded = keras.models.load_model(tmp_path / "mixed.keras")
    assert type(loaded.optimizer) is kopt.Adam
    assert equal(loaded.optimizer.variables, model.optimizer.inner_optimizer.variables)
    fit(loaded)


@every_class
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(row, clone):
    w, optimizer = keras.Variable(START), row.make()
    run(optimizer, w)
    w_copy, copied = keras.Variable(numpy([w])[0]), clone(optimizer)
    held = numpy(optimizer.variables)
    assert equal(run(copied, w_copy), run(optimizer, w))
    assert not equal(optimizer.variables, held)


def state_of(optimizer):
    store = {}
    optimizer.save_own_variables(store)
    return store


def branches(*names):
    """A network whose two layers of the same shape bear these names."""
    x = keras.Input((4,))
    layers = [keras.layers.Dense(2, name=name) for name in names]
    model = keras.Model(x, keras.layers.add([layer(x) for layer in layers]))
    model.compile(kopt.Adam(0.01), loss="mse")
    return model


def test_names_decide_not_places():
    one, two = fit(branches("left", "right")), branches("right", "left")
    two.optimizer.build(two.trainable_variables)
    two.optimizer.load_own_variables(state_of(one.optimizer))
    by_name = {v.name: v for v in one.optimizer.variables}
    assert equal([by_name[v.name] for v in two.optimizer.variables], two.optimizer.variables)


def test_numbers_of_layers_do_not_count():
    one = fit(branches(None, None))
    two = branches(None, None)  # `dense_2`, `dense_3`
    two.optimizer.build(two.trainable_variables)
    two.optimizer.load_own_variables(state_of(one.optimizer))
    assert equal(one.optimizer.variables, two.optimizer.variables)


def test_a_state_that_does_not_fit_is_refused_and_says_where(tmp_path):
    state = state_of(fit(branches("left", "right")).optimizer)

    def refused(model, state, match, build=True):
        if build:
            model.optimizer.build(model.trainable_variables)
        before = numpy(model.optimizer.variables)
        with pytest.raises(ValueError, match=match):
            model.optimizer.load_own_variables(state)
        assert equal(model.optimizer.variables, before)

    refused(
        branches("left", "middle"), state, r"m:middle.kernel is not in the file.*m:right.kernel is in the file only"
    )
    refused(network(kopt.SGD(momentum=0.9)), state, "momentum is not in the file; beta_1 is in the file only")
    refused(network(kopt.SGD(momentum=0.9)), state, "momentum is not in the file", build=False)
    refused(network(kopt.Adam()), {"0": np.array(1)}, "another kind of optimizer")
    wider = branches("left", "right")
    wider.optimizer.build([keras.Variable(np.ones((5, 2)), name="kernel")])
    bent = {key: value.T if value.ndim == 2 else value for key, value in state.items()}
    refused(branches("left", "right"), bent, r"m:left.kernel has shape \(4, 2\) here and \(2, 4\) in the file")

    keras_model = network("adam")
    fit(keras_model).save_weights(tmp_path / "keras.weights.h5")
    ours = fit(network(kopt.Adam()))
    with pytest.raises(ValueError, match="another kind of optimizer"):
        ours.load_weights(tmp_path / "keras.weights.h5")


def test_a_model_saved_before_training_loads(tmp_path):
    model = network(kopt.Adam(0.05))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert equal(fit(model).variables, fit(loaded).variables)


def test_a_schedule_here_and_a_number_there():
    model = fit(network(kopt.SGD(0.1, momentum=0.9)))
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    other = network(kopt.SGD(schedule, momentum=0.9))
    other.optimizer.build(other.trainable_variables)
    other.optimizer.load_own_variables(state_of(model.optimizer))
    assert int(other.optimizer.iterations) == 3
    model.optimizer.load_own_variables(state_of(fit(other).optimizer))
    assert int(model.optimizer.iterations) == 6


def test_a_snapshot_from_before_training_starts_anew(tmp_path):
    model = network(kopt.RMSprop(momentum=0.5))
    model.save_weights(tmp_path / "start.weights.h5")
    ends = []
    for _ in range(2):
        model.load_weights(tmp_path / "start.weights.h5")
        ends.append(numpy([*fit(model).variables, *model.optimizer.variables]))
    assert equal(*ends)


def test_numbers_of_a_file_are_there_at_once(tmp_path):
    trained = fit(network(kopt.SGD(0.1, momentum=0.9)))
    trained.save_weights(tmp_path / "all.weights.h5")
    fresh = network(kopt.SGD(0.2, momentum=0.5))
    fresh.load_weights(tmp_path / "all.weights.h5")
    assert (int(fresh.optimizer.iterations), fresh.optimizer.momentum) == (3, 0.9)
    fresh.optimizer.learning_rate = float(fresh.optimizer.learning_rate) / 2
    fresh.optimizer.momentum = 0.0  # the slot is in the file, so it is made
    fit(fresh)
    assert int(fresh.optimizer.iterations) == 6
    assert (fresh.optimizer.get_config()["learning_rate"], fresh.optimizer.momentum) == (0.05, 0.0)
    assert "momentum=0.9" not in repr(fresh.optimizer)


@pytest.mark.parametrize(("saved", "loaded"), [("mixed_float16", "float32"), ("float32", "mixed_float16")])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.filterwarnings("ignore:Skipping variable loading")  # Keras's, of its own wrapper
def test_models_load_under_another_policy(saved, loaded, trained, tmp_path):
    try:
        keras.config.set_dtype_policy(saved)
        model = network(kopt.Adam())
        (fit(model) if trained else model).save(tmp_path / "model.keras")
        keras.config.set_dtype_policy(loaded)
        fit(keras.models.load_model(tmp_path / "model.keras"))
    finally:
        keras.config.set_dtype_policy("float32")


def test_state_of_16_bit_weights_fits_wider_ones():
    narrow, wide = keras.Variable(START, dtype="bfloat16", name="w"), keras.Variable(START, name="w")
    one, two = kopt.Adam(), kopt.Adam()
    run(one, narrow)
    two.build([wide])
    two.load_own_variables(state_of(one))
    one.load_own_variables(state_of(two))
    assert int(two.iterations) == len(STREAM)


def test_16_bit_weights_go_on_from_a_file(tmp_path):
    keras.config.set_dtype_policy("bfloat16")
    try:
        model = fit(network(kopt.Adam(0.01)))
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    assert equal(fit(model).optimizer.variables, fit(loaded).optimizer.variables)


def test_set_weights_takes_all_or_nothing():
    optimizer, w = kopt.Adam(), keras.Variable(START)
    run(optimizer, w)
    weights = numpy(optimizer.variables)
    with pytest.raises(ValueError, match="`weights` must be a list of 7 arrays. Received: weights='6 arrays'"):
        optimizer.set_weights(weights[:-1])
    optimizer.set_weights(weights)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a format of TensorFlow's")
def test_checkpoint_of_tensorflow(tmp_path):
    import tensorflow as tf

    w, optimizer = keras.Variable(START), kopt.Adam(0.1, beta_1=0.8)
    run(optimizer, w)
    path = tf.train.Checkpoint(optimizer=optimizer, w=w.value).write(str(tmp_path / "point"))
    w_new, new = keras.Variable(START), kopt.Adam(0.3)
    new.build([w_new])
    tf.train.Checkpoint(optimizer=new, w=w_new.value).read(path).assert_consumed()
    assert equal(new.variables, optimizer.variables)
    assert equal(run(new, w_new, stream=STREAM), run(optimizer, w, stream=STREAM))


def test_the_state_is_named_for_people():
    model = fit(branches("left", "right"))
    keys = list(state_of(model.optimizer))
    assert keys[:5] == ["0:iteration", "1:learning_rate", "2:beta_1", "3:beta_2", "4:epsilon"]
    assert keys[5:7] == ["5:m:left.kernel", "6:v:left.kernel"]
    assert ops.convert_to_numpy(model.optimizer.iterations) == 3
