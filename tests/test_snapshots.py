"""One training, several models: the rate of every step, when snapshots are taken, and what is made of them."""

import contextlib
import copy
import gc
import itertools
import math
import os

import keras
import keras_tuner
import numpy as np
import pytest
from keras import layers, ops

import kopt
from kopt import store
from kopt.callbacks import shelf, snapshots
from tests.conftest import BACKEND, FLOATX
from tests.disks import Failing
from tests.training import X, Y, mirrored, network

pytestmark = [
    pytest.mark.skipif(FLOATX != "float32", reason="what is kept is kept alike"),
    pytest.mark.filterwarnings("ignore:.*The ensemble is worse", "ignore:.*The members are nearly"),  # small ones
]
RNG = np.random.default_rng(0)
LABELS = (Y[:, 0] + RNG.normal(size=len(Y)) > 0).astype("int64") + (Y[:, 1] > 1)
Snap = kopt.callbacks.SnapshotEnsemble


def classifier(seed=0, activation="softmax", loss="sparse_categorical_crossentropy", optimizer=None, units=3):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, activation="relu"),
            layers.BatchNormalization(momentum=0.9),
            layers.Dropout(0.1),
            layers.Dense(units, activation=activation),
        ]
    )
    model.compile(optimizer or kopt.SGD(0.1, momentum=0.9), loss=loss)
    return model


class Weights(keras.callbacks.Callback):
    """The weights when epochs begin and end."""

    def __init__(self):
        super().__init__()
        self.begun, self.ended = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.begun.append(self.model.get_weights())

    def on_epoch_end(self, epoch, logs=None):
        self.ended.append(self.model.get_weights())


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# The rate


def paper(high, low, lengths, batches):
    """Equation 2 of the paper, with t from 1, for cycles of any lengths."""
    for length in lengths:
        total = length * batches
        for t in range(1, total + 1):
            yield low + (high - low) / 2 * (math.cos(math.pi * ((t - 1) % total) / total) + 1)


PLANS = {  # epochs and arguments -> the lengths of the cycles
    "divisible": (12, {"cycles": 3, "max_learning_rate": 0.2, "min_learning_rate": 0.01}, [4, 4, 4]),
    "50 in 7": (50, {"cycles": 7, "max_learning_rate": 0.1}, [8, 7, 7, 7, 7, 7, 7]),
    "100 in 6": (100, {"cycles": 6}, [17, 17, 17, 17, 16, 16]),
    "growing": (14, {"cycles": 3, "cycle_mult": 2.0}, [2, 4, 8]),
}


@pytest.mark.parametrize("plan", PLANS)
def test_the_rate_of_every_step(plan):
    epochs, arguments, lengths = PLANS[plan]
    model, snap, monitor = network(keras.optimizers.SGD(0.05)), Snap(**arguments), kopt.callbacks.RateMonitor()
    history = model.fit(X, Y, batch_size=12, epochs=epochs, verbose=0, callbacks=[snap, monitor])
    high, low = arguments.get("max_learning_rate", 0.05), arguments.get("min_learning_rate", 0.0)
    wanted = list(paper(high, low, lengths, 2))
    np.testing.assert_allclose(monitor.history["learning_rate"], wanted, rtol=1e-5, atol=1e-8)
    ends = list(itertools.accumulate(lengths))
    assert [one["epoch"] for one in snap.snapshots_] == ends
    rates = [history.history["learning_rate"][end - 1] for end in ends]
    assert [one["learning_rate"] for one in snap.snapshots_] == rates
    assert math.isclose(float(ops.convert_to_numpy(model.optimizer.learning_rate)), 0.05, rel_tol=1e-6)  # its own again


@pytest.mark.parametrize("epochs", [1, 2, 7, 50, 365])
@pytest.mark.parametrize("mult", [0.3, 0.9, 1, 1.5, 2, 1e300])
def test_cycles_share_the_epochs(epochs, mult):
    for cycles in range(1, min(epochs, 12) + 1):
        lengths = snapshots.split(epochs, cycles, mult)
        assert sum(lengths) == epochs
        assert len(lengths) == cycles
        assert min(lengths) >= 1
        assert lengths == sorted(lengths, reverse=mult <= 1)


OPTIMIZERS = {
    "SGD": lambda: kopt.SGD(0.05, momentum=0.9),
    "Keras's Adam": lambda: keras.optimizers.Adam(0.01),
    "accumulation": lambda: kopt.Adam(0.01, gradient_accumulation_steps=2),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(kopt.Adam(0.01)),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)),
}


@pytest.mark.parametrize(
    "optimizer", [pytest.param(name, marks=() if name == "SGD" else pytest.mark.slow) for name in OPTIMIZERS]
)
def test_snapshots_are_taken_before_the_restart(optimizer):
    steps = {} if BACKEND == "torch" else {"steps_per_execution": 3}
    model, snap, seen = network(OPTIMIZERS[optimizer](), **steps), Snap(2, 0.1, verbose=0), Weights()
    model.fit(X, Y, batch_size=8, epochs=5, verbose=0, callbacks=[snap, seen])
    made = snap.ensemble
    assert [one["epoch"] for one in snap.snapshots_] == [3, 5]
    for member, end in zip(made.models, (2, 4), strict=True):
        assert same(member.get_weights(), seen.ended[end])
    assert same(model.get_weights(), seen.ended[-1])
    assert type(made.models[0]) is keras.Sequential


# What is made of them


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(0)
    model, snap, seen = classifier(), Snap(3, verbose=0), Weights()
    model.fit(
        X, LABELS, batch_size=8, epochs=6, verbose=0, callbacks=[snap, seen], validation_data=(X[::-1], LABELS[::-1])
    )
    return model, snap, seen


def test_the_ensemble_is_the_mean_of_its_members(trained, tmp_path):
    model, snap, seen = trained
    before = model.get_weights()
    apart = []
    for end in (1, 3, 5):
        model.set_weights(seen.ended[end])
        apart.append(model.predict(X, verbose=0))
    model.set_weights(before)
    made = snap.ensemble
    assert made is snap.ensemble
    np.testing.assert_allclose(made.predict(X, verbose=0), np.mean(apart, axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(made.members(X), apart, rtol=1e-5, atol=1e-7)
    nll = -np.log(np.mean(apart, axis=0)[np.arange(len(X)), LABELS]).mean()
    assert math.isclose(made.evaluate(X, LABELS, verbose=0), nll, rel_tol=1e-4)
    made.save(tmp_path / "e.keras")
    assert np.array_equal(
        keras.models.load_model(tmp_path / "e.keras").predict(X, verbose=0), made.predict(X, verbose=0)
    )
    assert same(model.get_weights(), before)


def test_some_of_them(trained):
    _, snap, seen = trained
    last = snap.build(last=2)
    assert [same(one.get_weights(), seen.ended[end]) for one, end in zip(last.models, (3, 5), strict=True)] == [
        True
    ] * 2
    greedy = snap.build(select="greedy")
    loss = lambda one: one.evaluate(X[::-1], LABELS[::-1], verbose=0)  # noqa: E731
    assert loss(greedy) <= min(loss(snap.build(last=1)), loss(snap.ensemble)) + 1e-6
    warm = snap.build(temperature="fit", data=(X, LABELS))
    assert warm.temperature > 0
    assert warm.evaluate(X, LABELS, verbose=0) <= snap.ensemble.evaluate(X, LABELS, verbose=0) + 1e-6
    assert np.array_equal(warm.predict(X, verbose=0).argmax(-1), snap.ensemble.predict(X, verbose=0).argmax(-1))


def test_a_soup_is_one_model_with_the_mean_of_the_weights(trained):
    model, snap, seen = trained
    soup = snap.soup(last=2, update_bn=X)
    wanted = [(a + b) / 2 for a, b in zip(seen.ended[3], seen.ended[5], strict=True)]
    statistics = [i for i, v in enumerate(model.weights) if "moving" in v.path]
    for i, (found, mean) in enumerate(zip(soup.get_weights(), wanted, strict=True)):
        if i not in statistics:
            np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-7)
    twin = snap.soup(last=2, update_bn=X)
    kopt.update_bn(twin, X)
    assert same(soup.get_weights(), twin.get_weights())
    with pytest.raises(ValueError, match="`update_bn` must be data"):
        snap.soup()


def test_a_soup_of_what_has_kept_its_statistics():
    model, snap = classifier(), Snap(2, verbose=0)
    (frozen,) = (one for one in model.layers if isinstance(one, layers.BatchNormalization))
    frozen.trainable = False
    model.compile("sgd", loss="sparse_categorical_crossentropy")
    model.fit(X, LABELS, epochs=2, verbose=0, callbacks=[snap])
    wanted = [
        snapshots.mean_of(ones) for ones in zip(*(one.get_weights() for one in snap.ensemble.models), strict=True)
    ]
    assert same(snap.soup().get_weights(), wanted)


def test_what_they_are_worth(trained, capsys):
    _, snap, _ = trained
    (found,) = snap.results_
    made = snap.ensemble
    p, labels = made.predict(X[::-1], verbose=0), LABELS[::-1]
    assert math.isclose(found["ensemble"]["accuracy"], (p.argmax(-1) == labels).mean(), rel_tol=1e-6)
    assert math.isclose(found["ensemble"]["nll"], made.evaluate(X[::-1], labels, verbose=0), rel_tol=1e-4)
    assert len(found["members"]) == 3
    assert found["interval"][0] < found["ensemble"]["accuracy"] < found["interval"][1]
    assert found["over_best"]["low"] <= found["over_best"]["gain"] <= found["over_best"]["high"]
    assert 0 < found["over_best"]["p"] <= 1
    assert found["calibrated"]["nll"] <= found["ensemble"]["nll"]
    snap.summary()
    shown = capsys.readouterr().out
    for part in ("3 snapshots", "cycle  epoch", "accuracy of the ensemble:", "McNemar", "diversity:", "temperature"):
        assert part in shown


def test_a_copy_has_nothing_of_the_training(trained):
    twin = copy.deepcopy(trained[1])
    assert twin.snapshots_ == []
    assert twin.cycles == 3


WRONG = {
    "last": {"last": 4},
    "last ": {"last": 0},
    "select": {"select": "best"},
    "temperature": {"temperature": 2.0},
    "data": {"select": "greedy", "data": X},
    "data ": {"data": (X, LABELS)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_parts_are_refused(trained, wrong):
    with pytest.raises(ValueError, match=f"`{wrong.strip()}` must be .*Received: "):
        trained[1].build(**WRONG[wrong])


def test_what_cannot_be_fitted_is_refused():
    model, snap = network("sgd"), Snap(2, verbose=0)
    model.fit(X, Y, epochs=2, verbose=0, validation_data=forever(), validation_steps=1, callbacks=[snap])
    assert snap.results_ == []
    with pytest.raises(ValueError, match="`data` must be given for `select`, as the validation data of `fit` cannot"):
        snap.build(select="greedy")
    with pytest.raises(ValueError, match="`temperature` must be None where the outputs are numbers"):
        snap.build(temperature="fit", data=(X, Y))


def test_what_is_told_of_each_snapshot_and_in_a_table(capsys):
    model, snap = classifier(), Snap(2, validation_data=(X, LABELS))
    model.fit(X, LABELS, epochs=4, verbose=2, callbacks=[snap])
    shown = capsys.readouterr().out
    assert "SnapshotEnsemble: cycle 1 of 2, epoch 2, rate " in shown
    assert "; accuracy " in shown
    assert "; ensemble of 2: accuracy " in shown
    after_first, after_second = shown.split("cycle 2 of 2")
    in_line, in_table = after_second.split("SnapshotEnsemble: 2 snapshots\n  cycle  epoch")
    for said in (in_line, in_table):
        for part in ("of the ensemble:", "against the best member (cycle ", "McNemar", "diversity:", "at temperature"):
            assert part in said
    assert "calibration error" in after_first
    assert "diversity" not in after_first  # of one
    model.fit(X, LABELS, epochs=2, verbose=0, callbacks=[snap])
    assert "SnapshotEnsemble" not in capsys.readouterr().out
    assert [one["epoch"] for one in snap.snapshots_] == [1, 2]  # each `fit` has its own


def test_without_validation_data(capsys):
    model, snap = classifier(), Snap(2)
    model.fit(X, LABELS, epochs=2, verbose=2, callbacks=[snap])
    assert snap.results_ == []
    assert "cycle 2 of 2, epoch 2, rate" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`data` must be given for `select`"):
        snap.build(select="greedy")


KINDS = {  # how it ends, the loss, the targets, what the score is
    "logits": (None, keras.losses.SparseCategoricalCrossentropy(from_logits=True), LABELS, 3, "accuracy"),
    "yes or no": ("sigmoid", "binary_crossentropy", (LABELS > 0).astype("float32"), 1, "accuracy"),
    "numbers": (None, "mse", Y, 2, "rmse"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_outputs_are_judged(kind):
    activation, loss, y, units, score = KINDS[kind]
    model, snap = classifier(activation=activation, loss=loss, units=units), Snap(2, 0.05, verbose=0)
    model.fit(X, y, batch_size=8, epochs=4, verbose=0, validation_split=0.25, callbacks=[snap])
    (found,) = snap.results_
    p = snap.ensemble.predict(X[18:], verbose=0)
    right = {
        "logits": lambda: (p.argmax(-1) == y[18:]).mean(),
        "yes or no": lambda: ((p[:, 0] > 0.5) == y[18:]).mean(),
        "numbers": lambda: np.sqrt(np.square(p - y[18:]).mean()),
    }[kind]()
    assert math.isclose(found["ensemble"][score], right, rel_tol=1e-5)
    assert "over_best" in found


def test_several_outputs_are_judged_apart(capsys):
    inputs = keras.Input((4,))
    outputs = {"kind": layers.Dense(3, activation="softmax", name="kind")(inputs), "size": layers.Dense(2)(inputs)}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss={"kind": "sparse_categorical_crossentropy", "size": "mse"})
    y = {"kind": LABELS, "size": Y}
    snap = Snap(2, 0.05)
    model.fit(X, y, epochs=2, verbose=2, validation_data=(X, y), callbacks=[snap])
    assert [one["output"] for one in snap.results_] == ["kind", "size"]
    assert "output kind" in capsys.readouterr().out
    assert snap.build(temperature="fit", select="greedy").temperature[1] is None


def test_members_that_are_nearly_the_same_are_warned_of():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="softmax")])
    model.compile("sgd", loss="sparse_categorical_crossentropy")
    with pytest.warns(UserWarning, match="nearly the same function"):
        model.fit(X, LABELS, epochs=3, verbose=0, callbacks=[Snap(3, 1e-6, verbose=0)], validation_split=0.5)


def test_an_ensemble_that_is_worse_than_its_last_member_is_warned_of():
    class Spoil(keras.callbacks.Callback):  # the first weights are wrong
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 0:
                self.model.set_weights([*good[:-2], -100 * good[-2], good[-1]])
            if epoch == 1:
                self.model.set_weights(good)

    model = classifier(optimizer=kopt.SGD(1e-6))
    good = model.get_weights()
    y = model.predict(X, verbose=0).argmax(-1)
    with pytest.warns(UserWarning, match="worse than its last member"):
        model.fit(X, y, epochs=2, verbose=0, callbacks=[Snap(2, verbose=0), Spoil()], validation_data=(X, y))


# Beside others


def test_with_an_average_the_snapshots_are_averages():
    class Averages(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_epoch_end(self, epoch, logs=None):
            with average.applied():
                self.seen.append(self.model.get_weights())

    average, snap, seen = kopt.callbacks.PolyakAveraging(0.9, update_bn=X), Snap(2, 0.1, verbose=0), Averages()
    model = classifier()
    model.fit(X, LABELS, batch_size=8, epochs=4, verbose=0, callbacks=[snap, average, seen])
    for member, end in zip(snap.ensemble.models, (1, 3), strict=True):
        assert same(member.get_weights(), seen.seen[end])
    assert same(model.get_weights(), seen.seen[-1])  # what the average leaves


class Scale(layers.Layer):
    """A weight that is a single number."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, x):
        return x * self.scale


@pytest.mark.parametrize("optimizer", [kopt.SGD, keras.optimizers.SGD])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_star_begins_each_cycle_at_the_first_snapshot(optimizer, dtype):
    """Exactly, whatever the snapshots are kept in, with the state of the optimizer."""

    class Slots(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.begun, self.ended = [], []

        def momenta(self):
            return [ops.convert_to_numpy(one) for one in snapshots._slots(self.model)]

        def on_epoch_begin(self, epoch, logs=None):
            self.begun.append(copy.deepcopy(self.momenta()))

        def on_epoch_end(self, epoch, logs=None):
            self.ended.append(copy.deepcopy(self.momenta()))

    model, seen, slots = classifier(), Weights(), Slots()
    model = keras.Sequential([*model.layers, Scale()])
    model.compile(optimizer(0.1, momentum=0.9), loss="sparse_categorical_crossentropy")
    snap = Snap(3, 0.1, topology="star", dtype=dtype, verbose=0)
    model.fit(X, LABELS, batch_size=8, epochs=6, verbose=0, callbacks=[snap, seen, slots])
    for begin in (2, 4):
        assert same(seen.begun[begin], seen.ended[1])
        assert same(slots.begun[begin], slots.ended[1])
        assert sum(map(np.size, slots.begun[begin])) == model.count_params() - 12  # without statistics
    members = snap.ensemble.models
    assert not same(members[1].get_weights(), members[2].get_weights())  # other orders, other dropout


def test_a_training_that_is_stopped():
    class Stop(keras.callbacks.Callback):
        def __init__(self, after):
            super().__init__()
            self.after = after

        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch + 1 == self.after

    model, snap = network("sgd"), Snap(2, 0.01, verbose=0)
    model.fit(X, Y, epochs=6, verbose=0, callbacks=[snap, Stop(4)])
    assert [one["epoch"] for one in snap.snapshots_] == [3]
    assert len(snap.ensemble.models) == 1
    with pytest.warns(UserWarning, match="has taken no snapshot: `fit` ended after epoch 2"):
        model.fit(X, Y, epochs=6, verbose=0, callbacks=[snap, Stop(2)])
    with pytest.raises(RuntimeError, match="has taken no snapshot yet"):
        _ = snap.ensemble


def test_beside_early_stopping():
    """The model gets its best weights back; the snapshots are those of the ends of cycles all the same."""
    stop = keras.callbacks.EarlyStopping("loss", min_delta=100, patience=4, restore_best_weights=True)
    model, snap, seen = classifier(), Snap(4, 0.1, verbose=0), Weights()
    model.fit(X, LABELS, batch_size=8, epochs=8, verbose=0, callbacks=[stop, snap, seen])
    assert [one["epoch"] for one in snap.snapshots_] == [2, 4]
    assert len(seen.ended) == 5
    for member, end in zip(snap.ensemble.models, (2, 4), strict=True):
        assert same(member.get_weights(), seen.ended[end - 1])
    assert same(model.get_weights(), seen.ended[0])


def test_what_multiplies_the_rate_does_so_here():
    monitor = kopt.callbacks.RateMonitor()
    callbacks = [Snap(2, 0.1, verbose=0), kopt.callbacks.WarmUp(epochs=2), monitor]
    network("sgd").fit(X, Y, batch_size=12, epochs=4, verbose=0, callbacks=callbacks)
    up = np.minimum(np.arange(8) / 4, 1)
    np.testing.assert_allclose(monitor.history["learning_rate"], up * [*paper(0.1, 0, [2, 2], 2)], rtol=1e-5)


def test_a_model_that_has_changed_its_shape_is_refused():
    model, snap = network("sgd"), Snap(2, verbose=0)
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[snap])
    model.pop()
    model.add(layers.Dense(5))
    before = model.get_weights()
    for made in (lambda: snap.ensemble, snap.soup):
        with pytest.raises(ValueError, match="which must be a model with the variables of the one that was trained"):
            made()
    assert same(model.get_weights(), before)


def test_weights_that_are_not_finite_do_not_end_the_training():
    model, snap = classifier(optimizer=kopt.SGD(1e30)), Snap(2)
    model.fit(X, LABELS, epochs=2, verbose=0, validation_split=0.5, callbacks=[snap])
    assert np.isnan(snap.results_[0]["ensemble"]["nll"])
    with pytest.raises(ValueError, match="`select` must be None where no snapshot has a finite loss"):
        snap.build(select="greedy")


def test_what_cannot_be_judged_does_not_end_the_training(capsys):
    model, snap = network("sgd"), Snap(2, 0.01, validation_data=Late())
    with pytest.warns(UserWarning, match="cannot judge the snapshots"):
        model.fit(X, Y, epochs=2, verbose=2, callbacks=[snap])
    assert len(snap.snapshots_) == 2
    assert "cycle 2 of 2" in capsys.readouterr().out


class Late(keras.utils.PyDataset):
    """Data that ends badly when they are read for the second time."""

    reads = 0

    def __len__(self):
        return 1

    def __getitem__(self, i):
        self.reads += 1
        if self.reads > 1:
            raise OSError("the disk is gone")
        return X, Y


@pytest.mark.parametrize("ignored", [-1, 1, 255])
def test_what_the_loss_ignores_does_not_count(ignored):
    labels = np.where(np.arange(24) % 3 == 1, ignored, LABELS)
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=ignored)
    kept = labels != ignored
    model, snap = classifier(loss=loss), Snap(2, verbose=0, validation_data=(X, labels))
    model.fit(X, labels, epochs=2, verbose=0, callbacks=[snap])
    p = snap.ensemble.predict(X, verbose=0)
    found = snap.results_[0]["ensemble"]
    assert snap.results_[0]["rows"] == kept.sum()
    assert math.isclose(found["accuracy"], (p.argmax(-1) == labels)[kept].mean())
    assert math.isclose(found["nll"], -np.log(p[kept, labels[kept]]).mean(), rel_tol=1e-5)


def test_a_model_that_is_built_in_the_first_step():
    model, snap = keras.Sequential([layers.Dense(3), layers.Dense(2)]), Snap(2, verbose=0)
    model.compile("sgd", loss="mse")
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[snap, kopt.callbacks.WarmUp(epochs=1)])
    assert snap.ensemble.members(X).shape == (2, 24, 2)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="strategies are TensorFlow's")
def test_on_two_devices():
    with mirrored().scope():
        model = classifier()
    snap = Snap(2, verbose=0)
    model.fit(X, LABELS, batch_size=8, epochs=2, verbose=0, validation_data=(X, LABELS), callbacks=[snap])
    (found,) = snap.results_
    assert found["rows"] == len(X)
    p = snap.ensemble.predict(X, verbose=0)
    assert math.isclose(found["ensemble"]["accuracy"], (p.argmax(-1) == LABELS).mean())


def test_narrow_predictions_are_judged_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model, snap = classifier(), Snap(2, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    model.fit(X, LABELS, batch_size=8, epochs=2, verbose=0, validation_data=(X, LABELS), callbacks=[snap])
    loss = snap.ensemble.evaluate(X, LABELS, verbose=0)
    assert math.isclose(snap.results_[0]["ensemble"]["nll"], loss, rel_tol=2**-8)  # bfloat16 has 8 bits
    assert snap.build(select="greedy", temperature="fit").temperature > 0


def test_cycles_before_the_first_epoch_are_missed():
    model, snap = network("sgd"), Snap(2, 0.1, verbose=0)
    with pytest.warns(UserWarning, match="will lack the first 1 of 2 snapshots: `fit` begins at epoch 3 of 4"):
        model.fit(X, Y, epochs=4, initial_epoch=2, verbose=0, callbacks=[snap])
    assert [one["cycle"] for one in snap.snapshots_] == [2]


def forever():
    while True:
        yield X, Y


def test_data_of_unknown_length_are_refused():
    with pytest.raises(ValueError, match="`steps_per_epoch` must be given"):
        network("sgd").fit(forever(), epochs=2, shuffle=False, verbose=0, callbacks=[Snap(2)])


class Scheduled:
    """Makes the optimizer's rate a schedule."""

    def __new__(cls):
        return keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5))


REFUSED = {  # name, epochs, callbacks, optimizer
    "fewer epochs": ("cycles", 3, lambda: [Snap(5)], None),
    "another value": ("callbacks", 4, lambda: [Snap(2, 0.1), kopt.callbacks.OneCycle(0.1, momentum=None)], None),
    "another before": ("callbacks", 4, lambda: [kopt.callbacks.OneCycle(0.1, momentum=None), Snap(2)], None),
    "LearningRateScheduler": (
        "callbacks", 4, lambda: [Snap(2), keras.callbacks.LearningRateScheduler(lambda e: 0.1)], None
    ),
    "a schedule below": ("max_learning_rate", 4, lambda: [Snap(2)], Scheduled),
    "too high a low": ("min_learning_rate", 4, lambda: [Snap(2, min_learning_rate=0.5)], None),
    "twice": ("callbacks", 4, lambda: [Snap(2, 0.1), Snap(2, 0.1)], None),
    "Keras's backup": (
        "callbacks", 4, lambda: [Snap(2, directory="nowhere"), keras.callbacks.BackupAndRestore("nowhere")], None
    ),
    "no targets": ("validation_data", 4, lambda: [Snap(2, validation_data=(X, np.zeros((24, 5, 5))))], None),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_refused_before_the_first_step(wrong):
    name, epochs, callbacks, optimizer = REFUSED[wrong]
    model = network((optimizer or keras.optimizers.SGD)())
    before = model.get_weights()
    with pytest.raises(ValueError, match=f"`{name}` must be "):
        model.fit(X, Y, epochs=epochs, verbose=0, callbacks=callbacks())
    assert same(model.get_weights(), before)
    model.fit(X, Y, epochs=1, verbose=0)  # and nothing of it is left
    assert "kopt" not in str(model.optimizer.variables[-1].path)


def test_what_cannot_be_told_is_refused_before_the_first_step():
    model = network("sgd")
    model.compile("sgd", loss=lambda y, p: ops.mean(ops.square(y - p)))
    with pytest.raises(ValueError, match="`combine` must be one of"):
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[Snap(2)])
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[Snap(2, combine="mean")])


def test_nothing_before_a_training():
    with pytest.raises(RuntimeError, match="has taken no snapshot yet"):
        Snap().build()
    with pytest.raises(ValueError, match="`min_learning_rate` must be below"):
        Snap(2, 0.1, 0.1)


@pytest.mark.filterwarnings("ignore:(currentThread|getName).*:DeprecationWarning", "ignore:Skipping variable loading")
def test_in_a_search(tmp_path):
    """KerasTuner trains with copies of the callback."""
    build = lambda hp: classifier(hp.Int("seed", 0, 9))  # noqa: E731
    tuner = keras_tuner.RandomSearch(build, "val_loss", max_trials=2, directory=tmp_path)
    snap = Snap(2, verbose=0)
    fit = {"epochs": 2, "verbose": 0, "validation_data": (X, LABELS), "callbacks": [snap]}
    tuner.search(X, LABELS, **fit)
    assert [trial.status for trial in tuner.oracle.get_best_trials(2)] == ["COMPLETED"] * 2
    assert snap.snapshots_ == []


def test_with_several_optimizers():
    """Each has its own rate, which falls in its own cycles from there."""
    both = keras.optimizers.OptimizerMap(kopt.SGD(0.1), {".*bias": keras.optimizers.Adam(0.01)})
    snap, monitor = Snap(2, verbose=0), kopt.callbacks.RateMonitor()
    network(keras.optimizers.MultiOptimizer(both)).fit(X, Y, epochs=4, verbose=0, callbacks=[snap, monitor])
    rates = {"learning_rate_sgd": [0.1, 0.05] * 2, "learning_rate_adam": [0.01, 0.005] * 2}
    for name, wanted in rates.items():
        np.testing.assert_allclose(monitor.history[name], wanted, rtol=1e-5)
    assert len(snap.snapshots_) == 2


# Where they are kept


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_the_memory(dtype):
    model, snap, seen = classifier(), Snap(2, 0.1, dtype=dtype, verbose=0), Weights()
    model.fit(X, LABELS, batch_size=8, epochs=2, verbose=0, callbacks=[snap, seen])
    kept = snap._shelf.get(1)
    assert {array.dtype.name for array in kept if array.ndim == 2} == {dtype}
    assert {array.dtype.name for array in kept if array.ndim == 1 and "int" not in array.dtype.name} == {"float32"}
    for found, exact in zip(snap.ensemble.models[1].get_weights(), seen.ended[1], strict=True):
        np.testing.assert_allclose(found, exact, rtol=0.01, atol=1e-3)


def test_what_a_narrow_type_cannot_hold_stays():
    array = np.array([[1e6, 1.0]], "float32")
    assert shelf.narrowed(array, "float16") is array
    assert shelf.narrowed(array, "bfloat16").dtype.name == "bfloat16"
    assert shelf.narrowed(array[0], "float16").dtype == "float32"


@pytest.mark.parametrize(("storage", "free", "is_on_disk"), [
    ("auto", 1e9, False), ("auto", 100, True), ("ram", 0, False), ("disk", 1e9, True)])  # fmt: skip
def test_where_they_are(storage, free, is_on_disk, monkeypatch):
    monkeypatch.setattr(shelf, "free_memory", lambda: free)
    model, snap, seen = network("sgd"), Snap(2, 0.1, storage=storage, verbose=0), Weights()
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[snap, seen])
    assert [held is None for held in snap._shelf.arrays] == [is_on_disk] * 2
    assert same(snap.ensemble.models[0].get_weights(), seen.ended[0])
    assert bool(snap._shelf.store) == is_on_disk


def test_a_temporary_directory_goes_with_the_callback():
    kept = shelf.Shelf("disk", None, 1, "float32", "raise")
    kept.put({"cycle": 1}, [np.ones(3)])
    where = kept.store.directory
    assert os.path.exists(where)
    del kept
    gc.collect()
    assert not os.path.exists(where)


def test_a_program_that_is_started_again_finds_what_there_is(tmp_path, capsys):
    """The second time nothing is trained; more epochs are another plan, which is refused by what was done."""

    def train(epochs=4, hidden=3):
        keras.utils.set_random_seed(1)
        model, snap = network("sgd"), Snap(2, 0.1, directory=tmp_path)
        if hidden != 3:
            model = keras.Sequential([keras.Input((4,)), layers.Dense(hidden), layers.Dense(2)])
            model.compile("sgd", loss="mse")
        snapshots.BackupAndRestore.__init__.__globals__["COMPLETED"].clear()  # as in another process
        model.fit(X, Y, epochs=epochs, verbose=2, callbacks=[snap])
        return snap

    first = train()
    second = train()
    assert "training was complete" in capsys.readouterr().out
    assert second.snapshots_ == first.snapshots_
    assert np.array_equal(second.ensemble.members(X), first.ensemble.members(X))
    with pytest.raises(ValueError, match="another model or optimizer"):
        train(hidden=4)
    with pytest.raises(ValueError, match=r"`cycles` must be such that cycles end after epochs \[2, 4\], as in"):
        train(epochs=6)
    os.remove(tmp_path / "kopt-00000001.data")
    with pytest.raises(ValueError, match="`directory` must be where the snapshot of cycle 1 lies"):
        train()


@pytest.mark.parametrize("broken_at", [1, 3])
def test_a_training_that_was_broken_off_goes_on(broken_at, tmp_path):
    class Break(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == broken_at and where == "broken":
                raise KeyboardInterrupt

    ended = []
    for where in ("whole", "broken", "again"):
        keras.utils.set_random_seed(1)
        model, snap = classifier(), Snap(2, 0.1, directory=tmp_path / where.replace("again", "broken"), verbose=0)
        with contextlib.suppress(KeyboardInterrupt):
            model.fit(X, LABELS, batch_size=8, epochs=4, verbose=0, callbacks=[snap, Break()])
        ended.append(snap)
    whole, broken, again = ended
    assert len(broken.snapshots_) == broken_at // 2
    assert again.snapshots_ == whole.snapshots_
    assert np.array_equal(again.ensemble.members(X), whole.ensemble.members(X))


def test_snapshots_of_another_training_are_not_removed(tmp_path):
    """Only what knows of them may: a backup of one's own that begins anew does not."""
    first = Snap(2, 0.1, directory=tmp_path / "s", storage="disk", verbose=0)
    network("sgd").fit(X, Y, epochs=2, verbose=0, callbacks=[first])
    backup = kopt.callbacks.BackupAndRestore(tmp_path / "b", verbose=0)
    other = Snap(2, 0.1, directory=tmp_path / "s", verbose=0)
    with pytest.raises(ValueError, match="`directory` must be another one, or empty: 2 snapshots lie there"):
        network("sgd").fit(X, Y, epochs=2, verbose=0, callbacks=[other, backup])
    assert first.ensemble.members(X).shape == (2, 24, 2)


def test_a_directory_is_where_it_was(tmp_path, monkeypatch):
    class Move(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            os.chdir(tmp_path / "elsewhere")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model, snap = network("sgd"), Snap(2, 0.1, directory="run", verbose=0)
    for _ in range(2):
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[snap, Move()])
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (tmp_path / "run" / "fit-2" / "training").is_dir()


def test_a_fit_without_an_epoch():
    snap = Snap(2, verbose=0)
    with pytest.warns(UserWarning, match="has taken no snapshot: `fit` had no epoch to do"):
        network("sgd").fit(X, Y, epochs=2, initial_epoch=2, verbose=0, callbacks=[snap])


def test_a_directory_is_not_for_two_trainings(tmp_path):
    callbacks = lambda: [Snap(2, 0.1, directory=tmp_path, verbose=0)]  # noqa: E731
    network("sgd").fit(X, Y, epochs=2, verbose=0, callbacks=callbacks())
    with pytest.raises(ValueError, match="`directory` must be another one for another training"):
        network("sgd").fit(X, Y, epochs=2, verbose=0, callbacks=callbacks())


def test_a_second_fit_has_a_directory_of_its_own(tmp_path):
    model, snap = network("sgd"), Snap(2, 0.1, directory=tmp_path, verbose=0)
    for _ in range(2):
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[snap])
    assert sorted(name for name in os.listdir(tmp_path) if "." not in name) == ["fit-2", "training"]
    assert sorted(name for name in os.listdir(tmp_path / "fit-2") if "." not in name) == ["training"]


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_seen_at_once(tmp_path):
    tmp_path.chmod(0o500)
    refuses_at_once(tmp_path, PermissionError)


def test_a_folder_that_is_a_file_is_seen_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    refuses_at_once(tmp_path / "file", NotADirectoryError)


def refuses_at_once(directory, error):
    model = network("sgd")
    before = model.get_weights()
    with pytest.raises(error):
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[Snap(2, 0.1, directory=directory)])
    assert same(model.get_weights(), before)


@pytest.mark.parametrize("on_save_error", ["raise", "warn"])
def test_a_full_disk(on_save_error, tmp_path, monkeypatch):
    """The training goes on or stops as it was told; the snapshot before is as it was."""
    full = Failing()
    monkeypatch.setattr(store, "Disk", lambda: full)

    class Fill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                full.full = 0

    model, seen = network("sgd"), Weights()
    snap = Snap(3, 0.1, directory=tmp_path, verbose=0, on_save_error=on_save_error, storage="disk")
    callbacks = [Fill(), seen, snap]
    if on_save_error == "raise":
        with pytest.raises(OSError, match="No space left"):
            model.fit(X, Y, epochs=3, verbose=0, callbacks=callbacks)
        assert len(seen.ended) == 2
    else:
        alone = pytest.warns(UserWarning, match="cycle [23] is kept in memory alone")
        with pytest.warns(UserWarning, match="Not saved"), alone:
            model.fit(X, Y, epochs=3, verbose=0, callbacks=callbacks)
        assert len(snap.snapshots_) == 3
    for i, member in enumerate(snap.ensemble.models):
        assert same(member.get_weights(), seen.ended[i])
    assert len(store.Store(tmp_path).generations()) == 1
