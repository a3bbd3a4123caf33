"""Several models as one: the mean of what they predict, in every mode, before and after it is saved."""

import copy
import json
import os
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest
from keras import layers, ops

import kopt
from kopt import scores, weights
from tests.conftest import BACKEND, FLOATX

pytestmark = pytest.mark.skipif(FLOATX != "float32", reason="models compute in float32 here")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 4)).astype("float32")
LABELS = RNG.integers(0, 3, 20)
YES = RNG.integers(0, 2, (20, 1)).astype("float32")
NUMBERS = RNG.normal(size=(20, 2)).astype("float32")
FROM_LOGITS = {"from_logits": True}
KINDS = {  # how an output ends, its loss, its targets, what it is
    "softmax": (3, "softmax", "sparse_categorical_crossentropy", LABELS, "probabilities"),
    "one-hot": (3, "softmax", "categorical_crossentropy", np.eye(3)[LABELS], "probabilities"),
    "logits": (3, None, keras.losses.SparseCategoricalCrossentropy(**FROM_LOGITS), LABELS, "logits"),
    "sigmoid": (1, "sigmoid", "binary_crossentropy", YES, "binary_probabilities"),
    "binary logits": (1, None, keras.losses.BinaryCrossentropy(**FROM_LOGITS), YES, "binary_logits"),
    "numbers": (2, None, "mse", NUMBERS, "mean"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def member(kind, seed, hidden=5, **compiled):
    units, activation, loss, _, _ = KINDS[kind]
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(hidden, activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(units, activation=activation),
        ]
    )
    model.compile("adam", loss=loss, metrics=[] if kind == "numbers" else ["accuracy"], **compiled)
    return model


def mean(outputs, kind, shares):
    """The mean in NumPy, float64: of probabilities, back to what the models give."""
    outputs = outputs.astype("float64")
    average = lambda values: np.tensordot(shares, values, 1)  # noqa: E731
    if kind == "logits":
        return np.log(average(np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)))
    if kind == "binary logits":
        p = average(1 / (1 + np.exp(-outputs)))
        return np.log(p / (1 - p))
    return average(outputs)


MODES = {
    "tensorflow": {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "xla": {"jit_compile": True}},
    "jax": {"eager": {"run_eagerly": True}, "jit": {}},
    "torch": {"eager": {}},
}[BACKEND]


@every_kind
@pytest.mark.parametrize("mode", MODES)
def test_it_predicts_the_mean(kind, mode):
    models = [member(kind, seed, **MODES[mode]) for seed in range(3)]
    ensemble, y = kopt.Ensemble(models, weights=[1, 2, 1]), KINDS[kind][3]
    assert ensemble.combine == KINDS[kind][4]
    apart = np.stack([np.array(ops.convert_to_numpy(model(X))) for model in models])
    wanted = mean(apart, kind, [0.25, 0.5, 0.25])
    np.testing.assert_allclose(ensemble.predict(X, batch_size=7, verbose=0), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ensemble.members(X, batch_size=7), apart, rtol=1e-5, atol=1e-6)
    found = ensemble.evaluate(X, y, verbose=0, return_dict=True)
    loss = keras.losses.get(KINDS[kind][2])
    theirs = loss(*(ops.convert_to_tensor(one, "float32") for one in (y, wanted)))
    np.testing.assert_allclose(found["loss"], np.mean(ops.convert_to_numpy(theirs)), rtol=1e-5)


@every_kind
def test_of_one_it_is_that_one(kind):
    model = member(kind, 0)
    ensemble = kopt.Ensemble([model])
    found, alone = ensemble.evaluate(X, KINDS[kind][3], verbose=0), model.evaluate(X, KINDS[kind][3], verbose=0)
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    unsure = ensemble.uncertainty(X)
    assert np.all(np.abs(unsure.get("mutual_information", unsure.get("std"))) < 1e-7)


CHILD = """
import sys, json
import numpy as np, keras, kopt
model = keras.models.load_model(sys.argv[1])
x = np.load(sys.argv[2])
print(json.dumps([type(model).__name__, model.predict(x, verbose=0).tolist(), model.members(x).tolist()]))
"""


def test_in_another_process(tmp_path):
    """Its file is enough; no code that made the models is needed."""
    models = [member("logits", seed, hidden=3 + seed) for seed in range(2)]
    ensemble = kopt.Ensemble(models, weights=[1, 3], temperature=2.0)
    predicted, apart = ensemble.predict(X, verbose=0), ensemble.members(X)
    ensemble.save(tmp_path / "e.keras")
    np.save(tmp_path / "x.npy", X)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "e.keras"), str(tmp_path / "x.npy")]
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    name, again, again_apart = json.loads(out.stdout.splitlines()[-1])
    assert name == "Ensemble"
    assert np.array_equal(np.array(again, "float32"), predicted)
    assert np.array_equal(np.array(again_apart, "float32"), apart)


def test_saved_and_loaded(tmp_path):
    models = [member("softmax", seed) for seed in range(3)]
    for model in models:
        model.optimizer.build(model.trainable_variables)
    ensemble = kopt.Ensemble(models, name="all")
    ensemble.members(X)
    ensemble.save(tmp_path / "e.keras")
    other = keras.models.load_model(tmp_path / "e.keras")
    assert other.name == "all"
    assert np.array_equal(other.predict(X, verbose=0), ensemble.predict(X, verbose=0))
    assert other.evaluate(X, LABELS, verbose=0) == ensemble.evaluate(X, LABELS, verbose=0)
    ensemble.save_weights(tmp_path / "e.weights.h5")
    third = kopt.Ensemble([member("softmax", seed) for seed in range(10, 13)])
    third.load_weights(tmp_path / "e.weights.h5")
    assert np.array_equal(third.predict(X, verbose=0), ensemble.predict(X, verbose=0))
    again = kopt.Ensemble.from_config(json.loads(json.dumps(ensemble.get_config())))
    assert len(again.models) == 3
    assert models[0].optimizer.variables
    with h5py.File(tmp_path / "e.weights.h5") as file:
        found = []
        file.visit(found.append)
    assert not [name for name in found if "/optimizer" in name]


@pytest.mark.filterwarnings("ignore:The `native_serialization` parameter:DeprecationWarning")  # Keras with JAX
@pytest.mark.skipif(BACKEND == "torch", reason="Keras exports torch models as ONNX and litert only, which are not here")
def test_it_can_be_exported(tmp_path):
    tf = pytest.importorskip("tensorflow", reason="Keras exports to TensorFlow's format")
    ensemble = kopt.Ensemble([member("softmax", seed) for seed in range(2)])
    ensemble.export(tmp_path / "e", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "e"))
    found = loaded.serve(X)
    np.testing.assert_allclose(found, ensemble.predict(X, verbose=0), rtol=1e-5)


def functional(seed, as_dict):
    keras.utils.set_random_seed(seed)
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((4,), name="b")}
    both = layers.Concatenate()([inputs["a"], inputs["b"]])
    kind, size = layers.Dense(3, activation="softmax", name="kind")(both), layers.Dense(1, name="size")(both)
    model = keras.Model(inputs, {"kind": kind, "size": size} if as_dict else [size, kind])
    loss = {"kind": "sparse_categorical_crossentropy", "size": "mse"}
    model.compile("sgd", loss=loss, metrics={"kind": ["accuracy"]})
    return model


@pytest.mark.parametrize("as_dict", [True, False], ids=["dict", "list"])
def test_several_outputs_are_kept_apart(as_dict, tmp_path):
    models = [functional(seed, as_dict) for seed in range(2)]
    ensemble, x = kopt.Ensemble(models), {"a": X, "b": X[::-1]}
    y = {"kind": LABELS, "size": NUMBERS[:, :1]}
    apart = [model.predict(x, verbose=0) for model in models]
    found, members, unsure = ensemble.predict(x, verbose=0), ensemble.members(x), ensemble.uncertainty(x)
    for name in ("kind", "size"):
        place = name if as_dict else ["size", "kind"].index(name)
        np.testing.assert_allclose(found[place], (apart[0][place] + apart[1][place]) / 2, rtol=1e-5, atol=1e-6)
        assert members[place].shape == (2, *found[place].shape)
        assert sorted(unsure[place])[0] == {"kind": "disagreement", "size": "std"}[name]
    names = ensemble.evaluate(x, y, verbose=0, return_dict=True)
    assert {"kind_loss", "size_loss", "kind_accuracy"} <= names.keys()
    twins = kopt.Ensemble([models[0], weights.copy_of(models[0], compiled=False)])  # with one config for both
    twins.save(tmp_path / "e.keras")
    for again in (keras.models.load_model(tmp_path / "e.keras"), keras.models.clone_model(twins), copy.deepcopy(twins)):
        assert len(again.models) == 2
    assert np.array_equal(again.members(x)["size" if as_dict else 0], twins.members(x)["size" if as_dict else 0])


def test_of_penalties_it_has_the_mean():
    def penalized(seed):
        keras.utils.set_random_seed(seed)
        hidden = layers.Dense(5, kernel_regularizer="l2", activity_regularizer=keras.regularizers.L1(0.01))
        model = keras.Sequential([keras.Input((4,)), hidden, layers.Dense(3, activation="softmax")])
        model.compile("sgd", loss="sparse_categorical_crossentropy")
        return model

    models = [penalized(seed) for seed in range(2)]
    ensemble, losses = kopt.Ensemble(models, weights=[1, 3]), []
    for one in [*models, ensemble]:
        p = one.predict(X, verbose=0)
        losses.append(one.evaluate(X, LABELS, batch_size=20, verbose=0) + np.log(p[np.arange(20), LABELS]).mean())
    assert min(losses) > 0.05
    np.testing.assert_allclose(losses[2], (losses[0] + 3 * losses[1]) / 4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["softmax", "logits", "binary logits"])
def test_who_counts_for_nothing_may_have_failed(kind):
    models = [member(kind, seed) for seed in range(3)]
    models[1].set_weights([np.nan * one for one in models[1].get_weights()])
    found = kopt.Ensemble(models, weights=[1, 0, 1]).predict(X, verbose=0)
    np.testing.assert_allclose(found, kopt.Ensemble([models[0], models[2]]).predict(X, verbose=0), rtol=1e-5, atol=1e-6)


def test_uncertainty():
    stats = pytest.importorskip("scipy.stats", reason="SciPy comes with scikit-learn")
    ensemble = kopt.Ensemble([member("softmax", seed) for seed in range(3)], weights=[1, 1, 2])
    p, found = ensemble.members(X).astype("float64"), ensemble.uncertainty(X)
    average = np.average(p, axis=0, weights=[1, 1, 2])
    within = np.average(stats.entropy(p, axis=-1), axis=0, weights=[1, 1, 2])
    np.testing.assert_allclose(found["entropy"], stats.entropy(average, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(found["mutual_information"], stats.entropy(average, axis=-1) - within, atol=1e-7)
    differs = np.average(p.argmax(-1) != average.argmax(-1), axis=0, weights=[1, 1, 2])
    np.testing.assert_allclose(found["disagreement"], differs)
    of_numbers = kopt.Ensemble([member("numbers", seed) for seed in range(3)])
    np.testing.assert_allclose(of_numbers.uncertainty(X)["std"], of_numbers.members(X).std(0), rtol=1e-4)


@pytest.mark.parametrize("kind", ["softmax", "logits", "sigmoid", "binary logits"])
def test_a_temperature_divides_the_logits_of_the_mean(kind):
    models = [member(kind, seed) for seed in range(2)]
    plain, warm = (kopt.Ensemble(models, temperature=t).predict(X, verbose=0).astype("float64") for t in (None, 3.0))
    if kind == "softmax":
        np.testing.assert_allclose(warm, scores.tempered(plain, 3.0), rtol=1e-4)
    elif kind == "sigmoid":
        np.testing.assert_allclose(np.log(warm / (1 - warm)), np.log(plain / (1 - plain)) / 3, rtol=1e-3, atol=1e-5)
    else:
        np.testing.assert_allclose(warm, plain / 3, rtol=1e-5)


def test_files_of_models(tmp_path):
    models = [member("softmax", seed) for seed in range(3)]
    models[0].save(tmp_path / "a.keras")
    models[1].save_weights(tmp_path / "b.weights.h5")
    ensemble = kopt.Ensemble([tmp_path / "a.keras", str(tmp_path / "b.weights.h5"), models[2]])
    assert np.array_equal(ensemble.predict(X, verbose=0), kopt.Ensemble(models).predict(X, verbose=0))
    assert ensemble.compiled


@keras.saving.register_keras_serializable(package="tests")
class Own(keras.Model):
    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.units, self.dense = units, layers.Dense(units)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {"units": self.units}


def test_models_with_a_call_of_their_own(tmp_path):
    models = [Own(), Own(), member("logits", 0)]
    for model in models[:2]:
        model.build((None, 4))
    ensemble = kopt.Ensemble(models, combine="logits")
    predicted = ensemble.predict(X, verbose=0)
    assert predicted.shape == (20, 3)
    ensemble.save(tmp_path / "e.keras")
    assert np.array_equal(keras.models.load_model(tmp_path / "e.keras").predict(X, verbose=0), predicted)


def test_its_members_stay_as_they_are():
    models = [member("softmax", seed) for seed in range(2)]
    ensemble = kopt.Ensemble(models)
    assert ensemble.models == models
    assert [len(model.trainable_variables) for model in models] == [6, 6]
    assert ensemble.trainable_variables == ensemble.trainable_weights == []
    assert len(ensemble.non_trainable_variables) == len(ensemble.variables)
    assert ensemble.count_params() == sum(model.count_params() for model in models)
    with pytest.raises(RuntimeError, match="train its `models`"):
        ensemble.fit(X, LABELS)


def unbuilt():
    return keras.Sequential([layers.Dense(3)])


REFUSED = {
    "no list": lambda: ("models", member("softmax", 0), {}),
    "none": lambda: ("models", [], {}),
    "no model": lambda: ("models", [3], {}),
    "no file": lambda: ("models", [member("softmax", 0), "nowhere.keras"], {}),
    "another file": lambda: ("models", [__file__], {}),
    "the same twice": lambda: ("models", [member("softmax", 0)] * 2, {}),
    "unbuilt": lambda: ("models", [unbuilt()], {}),
    "other outputs": lambda: ("models", [member("softmax", 0), member("sigmoid", 0)], {}),
    "a word": lambda: ("combine", [member("softmax", 0)], {"combine": "average"}),
    "too many ways": lambda: ("combine", [member("softmax", 0)], {"combine": ["mean", "mean"]}),
    "too few weights": lambda: ("weights", [member("softmax", 0)], {"weights": [1, 2]}),
    "negative weights": lambda: ("weights", [member("softmax", 0)], {"weights": [-1]}),
    "no weight": lambda: ("weights", [member("softmax", 0)], {"weights": [0]}),
    "temperature 0": lambda: ("temperature", [member("softmax", 0)], {"temperature": 0}),
    "warm numbers": lambda: ("temperature", [member("numbers", 0)], {"temperature": 2.0}),
    "two temperatures": lambda: ("temperature", [member("softmax", 0)], {"temperature": [1.0, 2.0]}),
    "name": lambda: ("name", [member("softmax", 0)], {"name": 3}),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_refused(wrong):
    name, models, arguments = REFUSED[wrong]()
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        kopt.Ensemble(models, **arguments)


class Late(keras.losses.Loss):
    """A loss of a user's own."""

    def call(self, y_true, y_pred):
        return ops.mean(y_pred, -1)


def test_what_nobody_can_tell_is_asked_for():
    """Numbers and logits look alike; a loss of one's own says nothing."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    with pytest.raises(ValueError, match="`combine` must be one of"):
        kopt.Ensemble([model])
    model.compile(loss=lambda y, p: ops.mean(p))
    with pytest.raises(ValueError, match="`combine` must be one of"):
        kopt.Ensemble([model])
    assert kopt.Ensemble([model], combine="logits").combine == "logits"
    for loss in ("poisson", keras.losses.Poisson(), "cosine_similarity", keras.losses.Hinge(), "hinge"):
        model.compile(loss=loss)
        assert kopt.Ensemble([model]).combine == "mean"
    for loss in ("ctc", keras.losses.CTC(), Late()):
        model.compile(loss=loss)
        with pytest.raises(ValueError, match="`combine` must be one of"):
            kopt.Ensemble([model])
    soft = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Softmax()])
    assert kopt.Ensemble([soft]).combine == "probabilities"
    nested = keras.Sequential([keras.Input((4,)), soft])
    assert kopt.Ensemble([nested]).combine == "probabilities"
