"""`kopt.callbacks.UpdateRatio` and its picture: what the step has measured is what weights saved after it say."""

import copy
from itertools import pairwise

import keras
import numpy as np
import pytest

import kopt
from kopt.callbacks import StagedUnfreeze, UpdateRatio
from kopt.callbacks.base import InStep
from tests.conftest import BACKEND
from tests.training import equal, mirrored, numpy

X = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")  # 3 batches
Y = X @ np.random.default_rng(1).normal(size=(4, 1)).astype("float32")
LAYERS = {"base/low": [0, 1], "base/high": [2, 3], "head": [4, 5]}  # the places of their weights
every_engine = pytest.mark.parametrize("engine", ["multiplier", "trainable"])


def made(optimizer="adam", head="glorot_uniform", dtype=None, constraint="unit_norm", **compiled):
    keras.utils.set_random_seed(0)
    low = keras.layers.Dense(4, activation="tanh", kernel_constraint=constraint, name="low")
    base = keras.Sequential([keras.Input((4,)), low, keras.layers.Dense(3, dtype=dtype, name="high")], name="base")
    model = keras.Sequential([base, keras.layers.Dense(1, kernel_initializer=head, name="head")], name="model")
    model.compile(optimizer, loss="mse", **compiled)
    return model


class Look(keras.callbacks.Callback):
    """The trained weights before the first batch and after each, in float64, epoch by epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.seen = [*getattr(self, "seen", ()), [self.now()]]

    def on_train_batch_end(self, batch, logs=None):
        self.seen[-1].append(self.now())

    def now(self):
        return [array.astype("float64") for array in self.model.get_weights()]


def fit(model, *callbacks, x=X, y=Y, epochs=2, **more):
    more = {"shuffle": False, "verbose": 0, "batch_size": 8} | more
    return model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **more).history


def ratios(history):
    found = {name.removeprefix("update_ratio/"): values for name, values in history.items() if "update_ratio" in name}
    return {name: np.array(values) for name, values in found.items()}


def norm(arrays):
    return np.sqrt(sum(np.square(array).sum() for array in arrays))


def by_hand(look, groups):
    """For each group and epoch the mean size of changes over that of weights; a batch that changes nothing is none."""
    found = {}
    for name, places in groups.items():
        found[name] = []
        for epoch in look.seen:
            pairs = [(old, new) for old, new in pairwise(epoch) if any(map(np.any, map(np.subtract, old, new)))]
            moved = sum(norm([new[i] - old[i] for i in places]) for old, new in pairs)
            found[name].append(moved / sum(norm([old[i] for i in places]) for old, _ in pairs))
    return found


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-4, err_msg=name)


OPTIMIZERS = {
    "keras": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, clipnorm=0.5),
    "kopt": lambda: kopt.SGD(0.01, momentum=0.9, weight_decay=0.1, clipvalue=0.5, multipliers={"high": 0.1}),
    "wrapped": lambda: keras.optimizers.LossScaleOptimizer(kopt.Multipliers("adam", {"low": 0.0})),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ratios_are_those_of_weights_saved_after_each_batch(name):
    model, look = made(OPTIMIZERS[name]()), Look()
    found = ratios(fit(model, UpdateRatio(), look))
    assert_same(found, by_hand(look, LAYERS))
    assert (found["base/low"] == 0).all() == (name == "wrapped")
    assert found["head"].min() > 1e-4


def test_groups_of_ones_own():
    model, look = made(), Look()
    base = model.get_layer("base")
    named = UpdateRatio({"body": base, "kernels": ["head/kernel", "low"]})
    with pytest.raises(ValueError, match="`groups` must be such that each key picks .* 'body' has all of this one's"):
        fit(model, UpdateRatio({"body": base, "kernels": "low"}))
    listed = UpdateRatio([base.get_layer("high"), "kernel", base.get_layer("low")])
    found = ratios(fit(model, named, listed, look))
    mine = {"body": [0, 1, 2, 3], "kernels": [4], "high": [2, 3], "kernel": [0, 4], "low": [1]}
    assert_same(found, by_hand(look, mine))
    twin = copy.deepcopy(listed)
    assert twin.groups[0] is base.get_layer("high")


def test_two_of_them_have_logs_of_their_own():
    found = ratios(fit(made(), UpdateRatio(["head"]), UpdateRatio({"head": "head/bias"}, name="second"), epochs=1))
    assert list(found) == ["head", "head_second"]
    assert found["head"] != found["head_second"]


@pytest.mark.parametrize("make", [kopt.SGD, keras.optimizers.SGD])
def test_steps_that_only_add_or_are_skipped_do_not_count(make):
    ours, x = make is kopt.SGD, np.tile(X, (2, 1))
    if ours:
        x[9] = np.nan  # in the second batch, so that the first window of two is skipped
    more = {"nonfinite": "skip"} if ours else {}
    model, look = made(make(0.01, gradient_accumulation_steps=2, **more), constraint=None), Look()
    found = ratios(fit(model, UpdateRatio(), look, x=x, y=np.tile(Y, (2, 1))))
    updates = [sum(not all(map(np.array_equal, old, new)) for old, new in pairwise(epoch)) for epoch in look.seen]
    assert updates == [2 if ours else 3] * 2
    assert_same(found, by_hand(look, LAYERS))


@every_engine
@pytest.mark.parametrize("order", [1, -1])
def test_what_is_frozen_has_exactly_0(engine, order):
    model, look = made(kopt.Adam(0.01, weight_decay=0.1)), Look()
    staged = StagedUnfreeze({0: {"base": 0.0}, 1: {"high": 0.1}, 2: {"low": 1.0}}, engine=engine)
    found = ratios(fit(model, *[staged, UpdateRatio()][::order], look, epochs=3))
    assert [(values == 0).tolist() for values in found.values()] == [
        [True, True, False],
        [True, False, False],
        [False] * 3,
    ]
    assert_same(found, by_hand(look, LAYERS))


class Shrink(InStep):
    """Changes weights after the update."""

    def after_update(self, optimizer, variables, happened):
        for variable in variables:
            variable.assign(variable * 0.9)


def test_what_another_callback_changes_is_a_change():
    model, look = made("sgd"), Look()
    found = ratios(fit(model, UpdateRatio(), Shrink(), look, epochs=1))
    assert_same(found, by_hand(look, LAYERS))
    assert found["base/high"] > 0.05


def test_groups_of_several_optimizers():
    sgd, adam = keras.optimizers.SGD(0.01), keras.optimizers.Adam(0.01)
    several = keras.optimizers.OptimizerMap(sgd, {".*head/kernel": adam})
    model, look = made(keras.optimizers.MultiOptimizer(several)), Look()
    found = ratios(fit(model, UpdateRatio(), look))
    assert_same(found, by_hand(look, {"base/low": [0, 1], "base/high": [2, 3], "head_adam": [4], "head_sgd": [5]}))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has one step an execution there")
def test_several_steps_in_one_execution_change_nothing():
    one, several = (ratios(fit(made(steps_per_execution=steps), UpdateRatio())) for steps in (1, 3))
    assert_same(several, one)


def test_zeros():
    """Weights that begin at 0 have a mean; in an only update they have none, and without an update nothing moves."""
    model, look = made(head="zeros"), Look()
    found = ratios(fit(model, UpdateRatio(), look))
    assert_same(found, by_hand(look, LAYERS))
    assert 0.1 < found["head"][0] < 1
    assert ratios(fit(made("sgd", head="zeros"), UpdateRatio(), batch_size=24, epochs=1))["head"] == np.inf
    skipping = made(kopt.SGD(nonfinite="skip"))
    assert not np.any(list(ratios(fit(skipping, UpdateRatio(), x=X * np.nan, epochs=1)).values()))


def test_weights_of_16_bits_are_measured_in_32():
    """Steps that are too small for bfloat16 are there."""
    model = made(kopt.SGD(1e-5), dtype="bfloat16")
    start = numpy(model.get_layer("base").get_layer("high").weights)[:1]
    found = ratios(fit(model, UpdateRatio(["high/kernel", "low"])))
    assert equal(model.get_layer("base").get_layer("high").weights[:1], start)
    assert (found["high/kernel"] > 1e-7).all()


def test_it_leaves_the_optimizer_as_it_was(tmp_path):
    bare, measured = made(), made()
    fit(bare)
    during = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    fit(measured, UpdateRatio(), during)
    assert equal(bare.variables, measured.variables)
    assert [one.name for one in bare.optimizer.variables] == [one.name for one in measured.optimizer.variables]
    assert equal(bare.optimizer.variables, measured.optimizer.variables)
    assert not {"apply", "make_train_function"} & (vars(measured.optimizer).keys() | vars(measured).keys())
    loaded = keras.models.load_model(tmp_path / "2.keras")
    assert equal(loaded.optimizer.variables, measured.optimizer.variables)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute is TensorFlow's")
def test_replicas_equal_one_device():
    alone = ratios(fit(made(keras.optimizers.SGD(0.1)), UpdateRatio()))
    with mirrored().scope():
        model = made(keras.optimizers.SGD(0.1))
    assert_same(ratios(fit(model, UpdateRatio())), alone)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"`groups` must match a trainable variable: .*base/low/kernel.*'tail'"):
        fit(made(), UpdateRatio(["low", "tail"]))
    for wrong in ({}, {"": "low"}, {"low": 3}, {1: "low"}, {"low": []}):
        with pytest.raises(ValueError, match="`groups` must be a dict from names to layers, .* Received: groups="):
            UpdateRatio(wrong)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(kopt.LBFGS(), loss="mse")
    with pytest.raises(ValueError, match="`optimizer` must be one whose every step is an update, for UpdateRatio; "):
        fit(model, UpdateRatio(), batch_size=24)


HISTORY = {
    "loss": [3.0, 2.0, 1.0, 0.5],
    "update_ratio/base": [0.0, 0.0, 1e-4, 2e-4],
    "update_ratio/head": [np.inf, 1e-2, 5e-3, 1e-3],
}
STAGES = {"multiplier/base": [0.0, 0.0, 0.1, 0.1], "learning_rate": [0.1, 0.2, 0.1, 0.01]}


def words(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_picture(tmp_path):
    picture = kopt.plot.groups(HISTORY | STAGES, save=tmp_path / "groups.png")
    assert (tmp_path / "groups.png").stat().st_size > 5000
    above, below = picture.axes
    assert words(above) == ["base (0 in epochs 1–2)", "head (not finite in epoch 1)", "about 1e-3 is healthy"]
    assert words(below) == ["learning rate", "base (0 in epochs 1–2)"]
    drawn = {line.get_label(): line for ax in picture.axes for line in ax.lines}
    np.testing.assert_array_equal(above.lines[0].get_ydata(), [np.nan, np.nan, 1e-4, 2e-4])
    np.testing.assert_array_equal(drawn["head (not finite in epoch 1)"].get_ydata(), [np.nan, 1e-2, 5e-3, 1e-3])
    np.testing.assert_allclose(drawn["base (0 in epochs 1–2)"].get_ydata()[2:], [0.01, 0.001])
    assert above.lines[0].get_color() == below.lines[1].get_color()
    (bar,) = (line for line in above.lines if line.get_label() == "_bar")
    np.testing.assert_array_equal(bar.get_xdata(), [0.6, 2.4, np.nan])
    assert [ax.get_yscale() for ax in picture.axes] == ["log", "log"]
    assert below.get_ylabel() == "learning rate × multiplier"
    names = ["epochs", "update_ratio/base", "update_ratio/head", "learning_rate", "rate/base"]
    assert list(picture.data) == names
    np.testing.assert_array_equal(picture.data["epochs"], [1, 2, 3, 4])
    np.testing.assert_array_equal(picture.data["update_ratio/base"], HISTORY["update_ratio/base"])


def test_picture_of_less():
    alone = kopt.plot.groups(HISTORY)
    assert len(alone.axes) == 1
    again = kopt.plot.groups(HISTORY | STAGES, ax=alone.axes[0])
    assert again.axes == alone.axes
    assert list(again.data) == ["epochs", "update_ratio/base", "update_ratio/head"]
    only = kopt.plot.groups(HISTORY | {"multiplier/base": STAGES["multiplier/base"]})
    assert only.axes[1].get_ylabel() == "multiplier"
    several = kopt.plot.groups(HISTORY | {"learning_rate_sgd": [0.1] * 4, "learning_rate_adam": [0.2] * 4})
    assert words(several.axes[1]) == ["learning rate_sgd", "learning rate_adam"]
    still = kopt.plot.groups({"update_ratio/a": [0.0, 0.0], "update_ratio/b": [0.0, np.nan]})
    assert words(still.axes[0])[:2] == ["a (0 in all epochs)", "b (0 in epoch 1; not finite in epoch 2)"]


def test_picture_of_many_layers():
    """All names stand below the picture, which keeps its size."""
    many = {f"update_ratio/block{i}/conv": [1e-3 * (i + 1), 2e-3] for i in range(30)}
    picture = kopt.plot.groups(many)
    picture._repr_png_()
    (legend,) = picture.figure.legends
    assert len(legend.get_texts()) == 31
    box, whole = legend.get_window_extent(), picture.figure.bbox
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert box.y1 < picture.axes[0].get_window_extent().y0
    assert picture.axes[0].get_window_extent().height > 0.3 * whole.height


def test_picture_of_a_fit_that_begins_later():
    history = made().fit(X, Y, epochs=4, initial_epoch=2, verbose=0, callbacks=[UpdateRatio()])
    picture = kopt.plot.groups(history)
    np.testing.assert_array_equal(picture.data["epochs"], [3, 4])
    np.testing.assert_array_equal(picture.data["update_ratio/head"], history.history["update_ratio/head"])


def test_pictures_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`history` must be of a fit with `callbacks=\[kopt.callbacks.UpdateRatio"):
        kopt.plot.groups({"loss": [1.0]})
    with pytest.raises(ValueError, match="`history` must be of a fit that has logged all of them at each epoch, not "):
        kopt.plot.groups(HISTORY | {"learning_rate": [0.1]})
    with pytest.raises(ValueError, match="`history` must be trainings: a keras History"):
        kopt.plot.groups(3)
    with pytest.raises(ValueError, match="`ax` must be axes of matplotlib"):
        kopt.plot.groups(HISTORY | STAGES, ax=[1, 2])
    with pytest.raises(ValueError, match="`save` must be "):
        kopt.plot.groups(HISTORY, save=tmp_path / "groups.gif")
