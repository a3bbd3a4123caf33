"""The range test of learning rates: no trace, the loss after each update, suggestions that can be had by hand."""

import copy
import json
import pickle
import random

import keras
import numpy as np
import pytest
from keras import ops

import kopt
import kopt.callbacks as kc
import kopt.schedules as ks
from kopt import backends
from tests.conftest import BACKEND
from tests.training import X, Y, mirrored, network, numpy

ko = keras.optimizers
NOT_TORCH = pytest.mark.skipif(BACKEND == "torch", reason="Keras has one step an execution on torch")
clones = pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"]
)


def tall(optimizer="adam", built=True):
    """A network with all that a training changes beside weights."""
    layers = [
        keras.layers.Dense(3),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(2),
    ]
    model = keras.Sequential([keras.Input((4,))] * built + layers)
    model.compile(optimizer, loss="mse", metrics=["mae"])
    return model


def find(model, *data, **arguments):
    given = {"steps": 8, "verbose": 0, "min_learning_rate": 1e-4, "max_learning_rate": 0.3}
    return kopt.find_learning_rate(model, *(data or (X, Y)), **given | {"batch_size": None if data else 8} | arguments)


def train(model, **arguments):
    return model.fit(X, Y, batch_size=8, verbose=0, **arguments)


def state(model):
    """All that a training changes, to the bit."""
    held = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    seeds = [random.getstate(), *np.random.get_state()[1:3]]
    return [array.tobytes() for array in numpy(held)], repr([*seeds, backends.random_state()])


OPTIMIZERS = {
    "keras": lambda: ko.Adam(0.01),
    "kopt": lambda: kopt.AdamW(0.01),
    "schedule": lambda: ko.SGD(ko.schedules.ExponentialDecay(0.1, 10, 0.9), momentum=0.9),
    "open schedule": lambda: kopt.SGD(ks.CosineDecay(steps=50, initial=0.1)),
    "accumulating": lambda: kopt.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2, use_ema=True),
    "accumulating of Keras": lambda: ko.Adam(0.1, gradient_accumulation_steps=2),
    "several": lambda: ko.MultiOptimizer(ko.OptimizerMap(kopt.SGD(0.1), {".*kernel": ko.Adam(0.1)})),
    "scaled": lambda: ko.LossScaleOptimizer(kopt.SGD(0.1, gradient_accumulation_steps=2), initial_scale=4.0),
}


@pytest.mark.parametrize("name", [*OPTIMIZERS, "mixed precision"])
def test_no_trace_is_left_after_a_training(name):
    if name == "mixed precision":
        keras.config.set_dtype_policy("mixed_float16")
    try:
        model = tall(OPTIMIZERS.get(name, lambda: "adam")())
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, ko.LossScaleOptimizer) == (name in ("scaled", "mixed precision"))
    history, optimizer = train(model), model.optimizer
    own, before = {key: id(value) for key, value in vars(optimizer).items()}, state(model)
    record = find(model)
    assert len(record.losses) == 8 or record.stopped == "diverged"
    assert state(model) == before
    assert {key: id(value) for key, value in vars(optimizer).items()} == own
    assert model.history is history
    assert model.optimizer is optimizer
    if name in ("keras", "kopt"):
        assert find(model) == record
        assert state(model) == before


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("name", ["keras", "kopt"])
def test_a_training_after_it_is_the_one_without_it(built, name):
    ends = []
    for finds in (0, 1):
        keras.utils.set_random_seed(0)
        model = tall(OPTIMIZERS[name](), built)
        for _ in range(finds):
            find(model)
            assert not model.optimizer.built
            assert not hasattr(model, "history")
            assert not any(array.any() for array in numpy(model.metrics_variables))
        ends.append((train(model, epochs=2).history, state(model)))  # in the same shuffled order
    assert ends[0] == ends[1]


def loop(model, rates, batches, **arguments):
    """The losses before each update, of a loop that sets the rate itself."""
    seen, origin, n = [[] for _ in range(len(rates) + 1)], int(model.optimizer.iterations), 0
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    while (done := int(inner.iterations) - origin) <= len(rates) and n < 50:
        rows = slice(8 * (n % 3), 8 * (n % 3) + 8)
        inner.learning_rate = rates[min(done, len(rates) - 1)]
        model.reset_metrics()
        weights = {key: value[rows] if key == "sample_weight" else value for key, value in arguments.items()}
        seen[done].append(float(model.train_on_batch(X[rows], Y[rows], **weights)))
        n += 1
    return [np.mean(losses) for losses in seen], n


HEAVY = {"sample_weight": np.full(24, 4.0)}
LOOPS = {  # an optimizer, arguments of `fit`, batches before
    "plain": (lambda: ko.SGD(0.1, momentum=0.5), {}, 0),
    "sample weights": (lambda: kopt.Adam(0.1), {"sample_weight": np.linspace(0, 2, 24)}, 0),
    "class weights": (lambda: ko.Adam(0.1), {"class_weight": {0: 1.0, 1: 3.0}}, 0),
    "accumulating": (lambda: kopt.SGD(0.1, gradient_accumulation_steps=2), {}, 0),
    "in mid-window": (lambda: ko.SGD(0.1, gradient_accumulation_steps=2), {}, 3),
    "skipping": (
        lambda: ko.LossScaleOptimizer(ko.SGD(0.1), initial_scale=2.0**127),
        HEAVY,
        0,
    ),  # gradients of 2 overflow
}


@pytest.mark.parametrize("row", LOOPS.values(), ids=LOOPS)
def test_losses_and_rates_are_those_of_a_loop(row):
    """They are not the running means of Keras's logs, and belong to the rates of the updates before them."""
    make, arguments, before = row
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        models.append(network(make()))
        models[-1].layers[0].kernel_regularizer = keras.regularizers.L2(0.1)
        for n in range(before):
            models[-1].train_on_batch(X[8 * n : 8 * n + 8], Y[8 * n : 8 * n + 8])
    rates = np.geomspace(1e-4, 0.3, 8)
    losses, batches = loop(models[0], rates, 8, **arguments)
    record = find(models[1], shuffle=False, explode=1e9, **arguments)
    np.testing.assert_allclose([record.initial_loss, *record.losses], losses, rtol=2e-5)
    np.testing.assert_allclose(record.learning_rates, rates)
    assert record.stopped == "end"
    if row is LOOPS["skipping"]:
        assert batches > 9


class Numbered(keras.utils.PyDataset):
    """Batches in which only the weight of that step has a gradient, 1; the targets are the number in the epoch."""

    def __init__(self):
        super().__init__()
        self.epoch = 0

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return np.eye(15, dtype="float32")[[i + 5 * self.epoch] * 2], np.full((2, 1), i, "float32")

    def on_epoch_end(self):
        self.epoch += 1


@pytest.mark.parametrize("cls", [ko.SGD, kopt.SGD])
@pytest.mark.parametrize("executed", [1, pytest.param(3, marks=NOT_TORCH)])
def test_the_recorded_rates_move_the_weights(cls, executed):
    model = keras.Sequential([keras.Input((15,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    compiled = {} if executed == 1 else {"steps_per_execution": executed}
    model.compile(cls(0.5), loss=lambda true, predicted: ops.mean(predicted + true), **compiled)
    moved, data = [], Numbered()
    data.epoch = -1  # Keras resets the data before the first
    look = keras.callbacks.LambdaCallback(on_train_end=lambda logs: moved.append(-model.get_weights()[0][:, 0]))
    finder = kc.LearningRateFinder(0.01, 1.0, 11, explode=1e9, verbose=0)
    model.fit(data, epochs=3, verbose=0, shuffle=False, callbacks=[look, finder])
    record, rates = finder.record, np.geomspace(0.01, 1, 11)
    np.testing.assert_allclose(record.learning_rates, rates)
    np.testing.assert_allclose(moved[0][:11], rates, rtol=1e-5)
    numbers = np.array([0, 1, 2, 3, 4] if executed == 1 else [1, 1, 1, 3.5, 3.5])  # five are three and two
    np.testing.assert_allclose(record.losses, np.tile(numbers, 3)[1:12], rtol=1e-6)
    assert not model.get_weights()[0].any()


class Rows(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]


def batches(n=100):
    return (Rows()[i % 3] for i in range(n))


def dataset():
    tf = pytest.importorskip("tensorflow", reason="data of TensorFlow")
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)


def loader():
    data = pytest.importorskip("torch", reason="data of torch").utils.data
    return data.DataLoader(list(zip(X, Y, strict=True)), 8)


INPUTS = {
    "PyDataset": lambda: (Rows(),),
    "dict": lambda: ({"x": X}, Y),
    "tf.data": lambda: (dataset(),),
    "DataLoader": lambda: (loader(),),
}


def test_every_input_gives_the_same():
    model = network("sgd")
    first = find(model, X, Y, batch_size=8, shuffle=False)
    by_name = keras.Model({"x": (x := keras.Input((4,), name="x"))}, model(x))
    by_name.compile("sgd", loss="mse")
    for name, make in INPUTS.items():
        has_rows = name == "dict"
        found = find(by_name if has_rows else model, *make(), shuffle=False, batch_size=8 if has_rows else None)
        np.testing.assert_allclose(found.losses, first.losses, rtol=1e-5, err_msg=name)
        np.testing.assert_array_equal(found.learning_rates, first.learning_rates)
    with pytest.warns(UserWarning, match="find_learning_rate has used up 9 batches of the generator; they are gone"):
        found = find(model, batches(), shuffle=False)
    np.testing.assert_allclose(found.losses, first.losses, rtol=1e-5)
    for steps_per_epoch in (None, 2):
        with pytest.warns(UserWarning, match="find_learning_rate") as warned:
            found = find(model, batches(5), shuffle=False, steps_per_epoch=steps_per_epoch)
        lent, short = (str(one.message) for one in warned if "find_learning_rate" in str(one.message))
        assert "used up 5 batches" in lent
        assert "had tried 4 of 8 rates when `fit` or its data ended" in short
        assert found.stopped == "data"
        np.testing.assert_allclose(found.losses, first.losses[:4], rtol=1e-5)


def test_a_loss_that_is_not_finite_ends_it_at_once():
    model, bad = network("sgd"), Y.copy()
    bad[16] = np.nan
    before = state(model)[0][:4]
    record = find(model, X, bad, batch_size=8, shuffle=False)
    assert (len(record.losses), record.finite, record.stopped) == (2, 1, "diverged")
    assert record.diverged_at == record.learning_rates[-1]
    assert record.suggestion is None
    assert state(model)[0][:4] == before
    record = find(model, X[16:], bad[16:], batch_size=8)
    assert (len(record.losses), record.stopped, record.diverged_at) == (0, "diverged", None)
    assert "no rate" in str(record)


def test_a_quadratic_loss_explodes_past_its_curvature():
    """The gradient of all data at once, beside NumPy in float64."""
    w = np.random.default_rng(3).normal(size=(4, 2))
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, use_bias=False)])
    model.compile(ko.SGD(), loss="mse")
    model.set_weights([w])
    record = find(model, X, Y, batch_size=24, steps=60, max_learning_rate=30.0)
    curvature = np.linalg.eigvalsh(X.T @ X / 24).max()  # of the mean over 48 numbers: 2 / 48 X'X
    losses = []
    for rate in record.learning_rates:
        w = w - rate * 2 / 48 * X.T @ (X @ w - Y)
        losses.append(np.mean((X @ w - Y) ** 2))
    np.testing.assert_allclose(record.losses, losses, rtol=1e-2)  # it has been at 1e-9 and has grown again
    assert record.stopped == "diverged"
    assert len(record.losses) < 60
    assert max(record.suggestions.values()) < 2 / curvature < record.diverged_at


class Silent(keras.Model):
    """A model whose step logs no loss."""

    def train_step(self, *arguments):
        found = super().train_step(*arguments)
        logs, *rest = found if BACKEND == "jax" else (found,)
        logs["objective"] = logs.pop("loss")
        return (logs, *rest) if BACKEND == "jax" else logs


def silent():
    inputs = keras.Input((4,))
    model = Silent(inputs, keras.layers.Dense(2)(inputs))
    model.compile("sgd", loss="mse")
    return model


REFUSED = [
    (keras.Sequential, {}, "`model` must be a compiled model"),
    (lambda: "model", {}, "`model` must be a compiled model"),
    (lambda: network("sgd"), {"min_learning_rate": 1.0}, "`max_learning_rate` must be greater than"),
    (lambda: network("sgd"), {"steps": 2}, "`steps` must be "),
    (lambda: network("sgd"), {"beta": 1.0}, "`beta` must be "),
    (lambda: network("sgd"), {"explode": 0.0}, "`explode` must be "),
    (lambda: network("sgd"), {"verbose": 3}, "`verbose` must be "),
    (lambda: network("sgd"), {"epochs": 2}, "`epochs` must be left out"),
    (lambda: network("sgd"), {"callbacks": []}, "`callbacks` must be left out"),
    (lambda: network("sgd"), {"validation_split": 0.5}, "`validation_split` must be left out"),
    (lambda: network(kopt.LBFGS()), {}, "`model` must be compiled with an optimizer that has a learning rate"),
    (silent, {}, "`loss` must be in what the training step"),
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[2].strip("`").split("`")[0] + str(list(row[1])))
def test_what_is_refused_leaves_no_trace(row):
    make, arguments, message = row
    model = make()
    before = state(model)[0] if getattr(model, "compiled", False) else None
    with pytest.raises(ValueError, match=message):
        find(model, X, Y, batch_size=8, **arguments)
    if before:
        assert not model.optimizer.built
        assert state(model)[0] == before
        assert "make_train_function" not in vars(model)


def test_no_other_schedule_is_beside_it():
    finder = kc.LearningRateFinder(steps=8)
    for others in ([kc.WarmUp(epochs=1), finder], [finder, kc.CosineDecay()]):
        with pytest.raises(ValueError, match="`callbacks` must be without others that drive the rate"):
            train(network("sgd"), callbacks=others)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["schedule", "accumulating", "several"])
def test_a_fit_that_raised_is_undone(name, error, monkeypatch):
    model = network(OPTIMIZERS[name]())
    train(model)
    own = [{key: id(value) for key, value in vars(one).items()} for one in (model.optimizer, model)]
    before, history = state(model), model.history

    def fail(*_):
        raise error("in mid-fit")

    monkeypatch.setattr(kc.LearningRateFinder, "on_epoch_end", fail)
    with pytest.raises(error, match="in mid-fit"):
        find(model)
    assert state(model) == before
    assert {key: id(value) for key, value in vars(model.optimizer).items()} == own[0]
    assert vars(model).keys() == own[1].keys()
    assert model.history is history


@pytest.mark.skipif(BACKEND != "tensorflow", reason="strategies are TensorFlow's")
@pytest.mark.slow
def test_several_replicas():
    with mirrored().scope():
        model = tall(kopt.Adam(0.01))
    first = find(model, shuffle=False)
    assert first == find(model, shuffle=False)
    assert not model.optimizer.built
    train(model)
    before = state(model)
    find(model)
    assert state(model) == before


@clones
def test_copies_of_the_callback(clone):
    finder, model = kc.LearningRateFinder(1e-4, 0.3, 4, verbose=0), network("sgd")
    twin = clone(finder)
    train(model, epochs=2, shuffle=False, callbacks=[finder])
    again = clone(finder)
    assert again.record == finder.record
    assert again._kept is again._model is again._fit is again._training is None
    for one in (twin, again, finder):
        train(model, epochs=2, shuffle=False, callbacks=[one])
        assert one.record == again.record
    with pytest.warns(UserWarning, match="LearningRateFinder had tried 2 of 4 rates"):
        train(model, callbacks=[again])


def test_what_is_shown(capsys):
    model = network("sgd")
    find(model)
    assert capsys.readouterr() == ("", "")
    record = find(model, verbose="auto")
    shown = capsys.readouterr().out
    assert "8/8" in shown
    assert shown.endswith(f"\n{record}\n")


RATES = np.geomspace(1e-6, 1, 61)  # ten in a decade
FALL = np.repeat([8, 7, 6, 5, 4, 3, 1, 0, 100], [21, 1, 1, 1, 1, 1, 1, 33, 1]) / 8


def record_of(losses, beta=0.0, initial=None, **arguments):
    return kopt.RangeTest(
        RATES[: len(losses)], losses, losses[0] if initial is None else initial, beta=beta, **arguments
    )


@pytest.mark.parametrize("shift", [0.0, -10.0])
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_suggestions_by_hand(shift, scale):
    record = record_of(FALL * scale + shift * scale)
    assert record.lowest == 27
    assert record.falling == slice(20, 28)
    assert record.suggestion == record.valley == pytest.approx(np.sqrt(RATES[20] * RATES[27]))
    assert record.steepest == pytest.approx(np.sqrt(RATES[25] * RATES[26]))  # of a raw rate it were the first
    assert np.argmin(np.diff(FALL) / np.diff(RATES)) == 20
    assert record.minimum_tenth == pytest.approx(RATES[17])
    assert record.diverged_at is None


def test_smoothing_lags_behind_in_neither():
    losses = 3.0 - np.log(RATES) / 7
    for beta in (0.0, 0.5, 0.9, 0.98):
        record = record_of(losses, beta)
        np.testing.assert_allclose(record.smoothed_losses, 3.0 - np.log(record.smoothed_learning_rates) / 7)
        for n in (0, 3, 60):
            weights = beta ** np.arange(n, -1.0, -1)
            assert record.smoothed_losses[n] == pytest.approx(np.average(losses[: n + 1], weights=weights))


def test_noise_gives_no_suggestion():
    """But for about one in a hundred: the lowest of many points is looked at."""
    noises = [np.random.default_rng(seed).normal(size=62) for seed in range(100)]
    for shift in (0, 100, np.append(0, np.geomspace(1e-6, 50, 61))):
        found = [record_of((noise + shift)[1:], 0.9, (noise + shift)[0]).suggestion for noise in noises]
        assert found.count(None) >= 97
    for noise in noises:
        assert RATES[17] < record_of(20 * np.append(FALL[:-1], FALL[-2]) + noise[1:], 0.9).suggestion < RATES[33]
    assert record_of([1.0, 0.5]).suggestions == {"valley": None, "steepest": None, "minimum/10": None}


def test_what_is_an_explosion():
    flat = np.ones(20)
    for sign in (1, -1):
        assert not record_of(sign * flat).has_exploded(3.0)
        assert record_of([*sign * flat, sign + 3.1]).has_exploded(3.0)
        assert not record_of([*sign * flat, sign + 2.9]).has_exploded(3.0)
    assert not record_of([*flat, 3.1], beta=0.9).has_exploded(3.0)
    assert not record_of([100.0 + sign, *flat]).has_exploded(3.0)
    assert not record_of([*np.linspace(10, -1000, 20), 100.0]).has_exploded(3.0)  # less than it has fallen by
    for bad in (np.nan, np.inf, -np.inf):
        assert record_of([1.0, bad]).has_exploded(1e9)


@pytest.mark.parametrize("end", [0.5, np.nan])
def test_a_record_is_data(end):
    record = record_of([1.0, 0.7, 0.6, end], beta=0.5, initial=end, stopped="data")
    fields = json.loads(json.dumps(record.to_dict(), allow_nan=False))
    again = kopt.RangeTest.from_dict(fields)
    for other in (again, copy.deepcopy(record), pickle.loads(pickle.dumps(record))):
        assert other == record
        assert other.suggestions == record.suggestions
    for changed in ({"stopped": "end"}, {"beta": 0.6}, {"losses": [1.0, 0.7, 0.6, 0.4]}, {"initial_loss": 2.0}):
        assert kopt.RangeTest.from_dict(fields | changed) != record
    assert record != "record"
    with pytest.raises(TypeError, match="unhashable"):
        hash(record)
    with pytest.raises(ValueError, match="read-only"):
        record.losses[0] = 0
    with pytest.raises(ValueError, match="`losses` must be 4 numbers"):
        kopt.RangeTest.from_dict(fields | {"losses": [1.0]})


def test_the_picture_is_of_the_record():
    pytest.importorskip("matplotlib", reason="pictures come with the extra `plot`")
    record = record_of(FALL, beta=0.3, stopped="diverged")
    picture = kopt.plot.rate_range(record)
    (ax,) = picture.axes
    points, curve, *marks = ax.lines
    np.testing.assert_array_equal(points.get_xydata(), np.stack([record.learning_rates, record.losses], 1))
    np.testing.assert_array_equal(
        curve.get_xydata(), np.stack([record.smoothed_learning_rates, record.smoothed_losses], 1)
    )
    assert [mark.get_xdata()[0] for mark in marks] == list(record.suggestions.values())
    assert [text.get_text() for text in ax.get_legend().get_texts()][2:5] == [
        f"{name}: {rate:.2g}" for name, rate in record.suggestions.items()
    ]
    found = [picture.data[f"suggestion/{name}"] for name in record.suggestions]
    np.testing.assert_array_equal(found, list(record.suggestions.values()))
    for losses in ([1.0, np.nan], [np.nan], []):
        (ax,) = kopt.plot.rate_range(kopt.RangeTest(RATES[: len(losses)], losses, 1.0, "diverged")).axes
        assert len(ax.lines) == 2
    with pytest.raises(ValueError, match="`record` must be "):
        kopt.plot.rate_range([1.0])


@pytest.mark.parametrize(("after", "begin"), [([0.5, 9.0, 9.0], 4), ([0.5, np.nan], 4), ([9.0, 0.5], 4), ([], 2)])
def test_what_is_above_its_start_is_shaded(after, begin):
    """From the rate after the last loss that was not above the first; the last of all if none is left."""
    pytest.importorskip("matplotlib", reason="pictures come with the extra `plot`")
    record = record_of([1.0, 1.0, 0.7, *after], initial=1.0, stopped="diverged")
    picture = kopt.plot.rate_range(record)
    (shade,) = picture.axes[0].patches
    assert shade.get_x() == picture.data["diverges"][0] == record.learning_rates[begin]
    assert shade.get_x() + shade.get_width() > record.learning_rates[-1]
    assert not kopt.plot.rate_range(record_of([1.0, 1.0, 0.7, 2.0])).axes[0].patches
