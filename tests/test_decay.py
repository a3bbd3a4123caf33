"""Decay, and what is excluded from it, in the model and in files."""

import json

import keras
import numpy as np
import pytest

import kopt
from tests.training import STEPS, X, equal, every_class, fit, network, numpy, run

DECAYS = [{"weight_decay": 0.1}, {"l2": 0.1}, {"weight_decay": 0.1, "l2": 0.1}]


@pytest.mark.parametrize("amount", [1e-4, 1e-5, 1e-6])
def test_a_small_decay_is_not_rounded_away(amount):
    start = np.random.default_rng(0).uniform(1, 2, size=1000).astype("float32")
    w = keras.Variable(start)
    run(kopt.SGD(1e-3, weight_decay=amount / 1e-3), w, stream=np.zeros((100, 1000), "float32"))
    lost = (start.astype("float64") - numpy([w])[0]) / (start * (1 - (1 - amount) ** 100))
    assert lost.mean() == pytest.approx(1, rel=0.02)


@every_class
@pytest.mark.parametrize("decay", DECAYS, ids=str)
def test_decay_spares_what_is_excluded(row, decay):
    free = {"weight_decay": None} if "weight_decay" in row.arguments else {}
    for chosen, spared in {
        "kernels": [True, False, True, False],
        "head": [False, False, True, True],
        "head's bias": [False, False, False, True],
        "all but the body's kernel": [False, True, True, True],
    }.items():
        model, twin = network("sgd"), network("sgd")
        for m in (model, twin):
            m.set_weights([np.ones(w.shape) for w in m.get_weights()])
        head = model.get_layer("head")
        keys = {
            "kernels": "kernel$",
            "head": head,
            "head's bias": [head.bias],
            "all but the body's kernel": [head, "body/b"],
        }
        run(row.make(**free | decay, exclude_from_decay=keys[chosen]), *model.trainable_variables, stream=STEPS)
        run(row.make(**free), *twin.trainable_variables, stream=STEPS)
        pairs = zip(model.trainable_variables, twin.trainable_variables, strict=True)
        assert [equal([ours], [plain]) for ours, plain in pairs] == spared, chosen


def test_an_exclusion_that_matches_nothing_is_refused():
    model = network("sgd")
    other = keras.layers.Dense(1)
    other.build((None, 4))
    for key in ("biass$", other, other.bias):
        optimizer = kopt.SGD(weight_decay=0.1, exclude_from_decay=["kernel", key])
        with pytest.raises(
            ValueError, match=r"`exclude_from_decay` must match a trainable.*head/bias.* Received: exclude"
        ):
            optimizer.build(model.trainable_variables)
        assert not optimizer.built
    model.get_layer("head").trainable = False  # a frozen layer matches nothing, and nothing is meant to happen to it
    optimizer = kopt.SGD(weight_decay=0.1, exclude_from_decay=model.get_layer("head"))
    optimizer.build(model.trainable_variables)
    assert kopt.SGD.from_config(optimizer.get_config()).exclude_from_decay[0]["path"] == "head/kernel"

    optimizer = kopt.SGD(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])  # Keras's way
    assert optimizer.exclude_from_decay == ["bias"]


@every_class
def test_exclusions_by_layer_survive_saving(row, tmp_path):
    model = network("sgd")
    optimizer = row.make(l2=0.1, exclude_from_decay=[model.get_layer("head"), "body/bias"])
    model.compile(optimizer, loss="mse")
    fit(model).save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [h.decayed for h in loaded.optimizer.all_held] == [h.decayed for h in optimizer.all_held]
    assert [h.decayed for h in optimizer.all_held] == [True, False, False, False]


def test_exclusions_have_a_config_before_build():
    model = network("sgd")
    keys = [model.get_layer("head"), model.get_layer("body").bias, "kernel$"]
    config = kopt.SGD(l2=0.1, exclude_from_decay=keys).get_config()
    assert json.loads(json.dumps(config)) == config
    assert [key if isinstance(key, str) else key["path"] for key in config["exclude_from_decay"]] == [
        "head/kernel", "head/bias", "body/bias", "kernel$",
    ]  # fmt: skip
    optimizer = kopt.SGD.from_config(config | {"exclude_from_decay": config["exclude_from_decay"][:3]})
    optimizer.build(model.trainable_variables)
    assert [h.decayed for h in optimizer.all_held] == [True, False, False, False]
    optimizer.get_config()["exclude_from_decay"].append("nothing")
    assert len(optimizer.exclude_from_decay) == 3


@keras.saving.register_keras_serializable("test")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second, self.third = (keras.layers.Dense(4) for _ in range(3))

    def call(self, x):
        return self.third(self.second(self.first(x)))


def test_an_excluded_layer_is_found_under_another_number(tmp_path):
    model = Subclassed()
    model.compile(kopt.AdamW(exclude_from_decay=model.second), loss="mse")
    model.fit(X, X, verbose=0)
    model.save(tmp_path / "model.keras")
    keras.utils.clear_session()
    keras.layers.Dense(1)  # takes the name `dense`
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [h.decayed for h in loaded.optimizer.all_held] == [True, True, False, False, True, True]


def test_frozen_layers_may_be_excluded_and_come_back(tmp_path):
    model = network("sgd")
    model.get_layer("body").trainable = False
    model.compile(kopt.AdamW(exclude_from_decay=model.get_layer("body")), loss="mse")
    fit(model).save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [h.decayed for h in loaded.optimizer.all_held] == [True, True]
    loaded.get_layer("body").trainable = True
    thawed = kopt.AdamW.from_config(loaded.optimizer.get_config())
    thawed.build(loaded.trainable_variables)
    assert [h.decayed for h in thawed.all_held] == [False, False, True, True]


def block(name):
    x = keras.Input((4,))
    return keras.Model(x, keras.layers.Dense(4, name="d")(x), name=name)


def stack(name):
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="d")], name=name)


def test_what_cannot_be_told_apart_is_refused():
    x = keras.Input((4,))
    model = keras.Model(x, block("C")(block("A")(x)))
    early = kopt.AdamW(exclude_from_decay=model.get_layer("A"))  # nothing is built: which `d` it is, no one can say
    again = kopt.AdamW.from_config(early.get_config())
    with pytest.raises(ValueError, match="`exclude_from_decay` must be given anew: 2 variables .* called 'd/kernel'"):
        again.build(model.trainable_variables)


@pytest.mark.parametrize("part", [block, stack])
def test_layers_of_the_same_name_are_told_apart(part, tmp_path):
    x = keras.Input((4,))
    model = keras.Model(x, part("C")(part("A")(x)))
    model.compile(kopt.AdamW(exclude_from_decay=model.get_layer("A")), loss="mse")
    model.fit(X, X, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [h.decayed for h in model.optimizer.all_held] == [False, False, True, True]
    assert [h.decayed for h in loaded.optimizer.all_held] == [False, False, True, True]
    assert equal(model.optimizer.variables, loaded.optimizer.variables)
    loaded.save(tmp_path / "again.keras")
    again = keras.models.load_model(tmp_path / "again.keras")
    assert [h.decayed for h in again.optimizer.all_held] == [False, False, True, True]


def test_a_pattern_over_the_front_of_a_path_survives_saving(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="e"), keras.layers.Dense(2)], name="net")
    model.compile(kopt.AdamW(exclude_from_decay=["net/e/", "bias$"]), loss="mse")
    fit(model).save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [h.decayed for h in loaded.optimizer.all_held] == [False, False, True, False]
    assert "bias$" in loaded.optimizer.exclude_from_decay
