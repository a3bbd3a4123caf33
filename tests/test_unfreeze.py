"""`kopt.callbacks.StagedUnfreeze`: stages in one `fit`."""

from itertools import pairwise

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from kopt.callbacks import cold
from tests.conftest import BACKEND
from tests.training import AtEpoch, Counted, equal, numpy

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = X @ np.random.default_rng(1).normal(size=(4, 1)).astype("float32")
every_engine = pytest.mark.parametrize("engine", ["multiplier", "trainable"])


def made(optimizer="adam", norm=True, **compiled):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(4, activation="tanh", name="low"), keras.layers.Dense(3, name="high")]
    if norm:
        layers.insert(1, keras.layers.BatchNormalization(name="norm"))
    base = keras.Sequential([keras.Input((4,)), Counted(), *layers], name="base")
    model = keras.Sequential([base, keras.layers.Dense(1, name="head")])
    model.compile(optimizer, loss="mse", **compiled)
    return model, base


def fit(model, *callbacks, epochs=4, **more):
    more = {"shuffle": False, "verbose": 0, "batch_size": 8, **more}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **more).history


class Look(keras.callbacks.Callback):
    """The weights of some layers when each epoch ends."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.seen = names, []

    def on_epoch_end(self, epoch, logs=None):
        layers = [self.model.get_layer("base").get_layer(name) for name in self.names]
        self.seen.append([one for layer in layers for one in numpy(layer.weights)])

    def still(self, start):
        """For each epoch, whether they were as at the start."""
        return [all(map(np.array_equal, start, weights)) for weights in self.seen]


OPTIMIZERS = {
    "keras": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "kopt": lambda: kopt.SGD(0.01, momentum=0.9, weight_decay=0.1),
    "multipliers": lambda: kopt.Multipliers(keras.optimizers.Adam(0.01), {"head": 0.5}),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(kopt.Adam(0.01)),
}


@every_engine
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stages(name, engine):
    model, base = made(OPTIMIZERS[name]())
    start, low, norm = numpy(base.get_layer("low").weights), Look("low"), Look("norm")
    calls, traces = base.layers[0].calls, []
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: traces.append(len(calls)))
    statistics = numpy(base.get_layer("norm").weights)
    stages = {0: {base: 0.0}, 1: {"high": 0.1}, 2: {base: 0.1, "head": 1.0}}
    history = fit(model, kopt.callbacks.StagedUnfreeze(stages, engine=engine), low, norm, count)
    assert low.still(start) == [True, True, False, False]
    assert norm.still(statistics) == [True, True, False, False]  # then gamma and beta move
    assert all(map(np.array_equal, norm.seen[-1][2:], statistics[2:]))
    assert history["multiplier/base"] == [0.0, 0.0, 0.1, 0.1]
    assert history["multiplier/base#2"] == [0.0, 0.1, 0.1, 0.1]
    assert history["multiplier/head"] == [1.0] * 4
    anew = len(np.unique(traces)) - 1  # how many stages have traced the step anew
    assert BACKEND == "torch" or anew == (0 if engine == "multiplier" else 2)
    assert len(model.trainable_variables) == 8
    count = len(model.optimizer.variables)
    fit(model, epochs=1)  # without the callback: all weights are free, and nothing is left in the optimizer
    assert not equal(base.get_layer("low").weights, low.seen[-1])
    assert not np.array_equal(numpy(base.get_layer("norm").weights)[2], statistics[2])
    assert len(model.optimizer.variables) == count


@every_engine
def test_stages_of_one_change_nothing(engine):
    for make in (keras.optimizers.Adam, lambda: kopt.Adam(0.01)):
        bare, _ = made(make())
        staged, base = made(make())
        fit(bare)
        fit(staged, kopt.callbacks.StagedUnfreeze({0: {base: 1.0}}, engine=engine))
        assert equal(bare.weights, staged.weights)


@every_engine
def test_going_on_at_a_later_epoch(engine, tmp_path):
    """State is a function of the epoch: `initial_epoch` goes on where the fit would have been, in a ramp, too."""
    stages = [
        {"epoch": 0, "multipliers": {"low|norm|high": 0.0}},
        {"epoch": 2, "multipliers": {"low|norm|high": 0.5}, "ramp_steps": 6},
        {"epoch": 4, "multipliers": {"low": 1.0}, "ramp_epochs": 1.5},
    ]

    def staged():
        return kopt.callbacks.StagedUnfreeze(stages, engine=engine)

    whole, _ = made(kopt.Adam(0.01))
    history = fit(whole, staged(), epochs=6)
    for stop in (1, 3, 5):
        first, _ = made(kopt.Adam(0.01))
        fit(first, staged(), epochs=stop)
        first.save(tmp_path / "first.keras")
        second = keras.models.load_model(tmp_path / "first.keras", custom_objects={"Counted": Counted})
        more = fit(second, staged(), epochs=6, initial_epoch=stop)
        assert more["multiplier/low"] == history["multiplier/low"][stop:]
        assert equal(whole.weights, second.weights)


@every_engine
def test_a_new_optimizer_at_a_later_epoch_trains_as_without(engine):
    models = []
    for staged in (True, False):
        model, base = made(keras.optimizers.Adam(0.01))
        stages = kopt.callbacks.StagedUnfreeze({0: {base: 0.0}, 1: {base: 1.0}}, engine=engine, freeze_bn=False)
        fit(model, *[stages] * staged, epochs=6, initial_epoch=4)
        models.append(model)
    assert equal(*(model.weights for model in models))


def test_ramps_are_straight():
    """With a gradient that is the same at every step, the updates of an epoch are the sum of the multipliers."""
    model, base = made(norm=False)
    model.get_layer("head").trainable = False
    model.compile(kopt.SGD(1e-3), loss=lambda y, predicted: ops.sum(predicted, axis=-1))
    stages = [{"epoch": 0, "multipliers": {base: 0.0}}, {"epoch": 1, "multipliers": {base: 0.8}, "ramp_steps": 5}]
    look, start = Look("high"), numpy([base.get_layer("high").bias])
    history = fit(model, kopt.callbacks.StagedUnfreeze(stages), look, epochs=4)
    biases = np.array([start[0], *(weights[1] for weights in look.seen)])
    moved = np.diff(biases[:, 0])
    sums = [0.0, 0.0 + 0.16 + 0.32 + 0.48, 0.64 + 3 * 0.8, 4 * 0.8]
    np.testing.assert_allclose(moved / moved[-1] * sums[-1], sums, rtol=1e-3, atol=1e-6)
    assert history["multiplier/base"] == pytest.approx([0.0, 0.48, 0.8, 0.8])


@pytest.mark.parametrize("fits", ["one", "two", "two, the second later"])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("before", [0, 2000])
@pytest.mark.parametrize("make", [keras.optimizers.Adam, kopt.AdamW])
def test_moments_that_begin_late_take_steps_of_the_size_of_new_ones(make, before, corrected, fits, monkeypatch):
    """With the same gradient at every step each of a new Adam's steps is the rate."""
    model, base = made(norm=False)
    model.get_layer("head").trainable = False
    model.compile(make(0.001), loss=lambda y, predicted: ops.sum(predicted, axis=-1))
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(before)
    if not corrected:
        monkeypatch.setattr(cold, "correction", lambda optimizer: None)
    look, start = Look("high"), numpy(base.get_layer("high").weights)[1]
    frozen, free = {"high": 0.0}, {"high": 1.0}
    first = 2 * (fits == "two, the second later")
    whole = [({0: frozen, 2: free}, {"epochs": 5})]
    parts = [({0: frozen}, {"epochs": 2}), ({0: free}, {"initial_epoch": first, "epochs": first + 3})]
    for stages, epochs in whole if fits == "one" else parts:
        fit(model, kopt.callbacks.StagedUnfreeze(stages, engine="trainable"), look, **epochs)
    biases = [start, *(weights[1] for weights in look.seen)]
    steps = [np.abs(b - a).mean() / (4 * 0.001) for a, b in pairwise(biases)]
    assert steps[:2] == [0.0, 0.0]
    if corrected:
        np.testing.assert_allclose(steps[2:], 1.0, atol=0.01)
    else:
        assert steps[2] < 0.9 if before == 0 else max(steps) > 5


def test_unfrozen_moments_are_those_of_a_weight_that_was_never_frozen():
    """While the weights below are frozen, what they would have done leaves no trace but in their moments."""
    model, base = made(kopt.Adam(0.0), norm=False)  # at rate 0 the gradients are the same with and without
    fit(model, epochs=2)
    other, base = made(kopt.Adam(0.0), norm=False)
    fit(other, kopt.callbacks.StagedUnfreeze({0: {base: 0.0}}), epochs=2)
    assert equal(model.optimizer.variables, other.optimizer.variables)


@pytest.mark.skipif(BACKEND == "jax", reason="on JAX it is refused, see below")
@every_engine
def test_beside_an_average_and_a_schedule(engine):
    model, base = made(kopt.Adam(0.01))
    average = kopt.callbacks.PolyakAveraging(momentum=0.5)
    staged = kopt.callbacks.StagedUnfreeze({0: {base: 0.0}, 2: {base: 0.1}}, engine=engine)
    history = fit(model, kopt.callbacks.WarmUp(epochs=1), staged, average)
    assert history["multiplier/base"] == [0.0, 0.0, 0.1, 0.1]
    assert history["learning_rate"][-1] == pytest.approx(0.01)


@every_engine
def test_a_fit_that_raises_leaves_nothing_behind(engine):
    model, base = made()

    def fail(model):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(model, kopt.callbacks.StagedUnfreeze({0: {base: 0.0}}, engine=engine), AtEpoch(1, fail))
    start = numpy(base.weights)
    fit(model, epochs=1)
    assert len(model.trainable_variables) == 8
    changed = [not np.array_equal(a, b) for a, b in zip(start, numpy(base.weights), strict=True)]
    assert all(changed)


@every_engine
def test_another_optimizer_after_an_interrupt_trains_all(engine):
    model, base = made()
    variables = list(model.trainable_variables)

    def stop(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, kopt.callbacks.StagedUnfreeze({0: {base: 0.0}}, engine=engine), AtEpoch(1, stop))
    start = numpy(variables)
    model.compile("adam", loss="mse")
    fit(model, epochs=1)
    changed = [not np.array_equal(a, b) for a, b in zip(start, numpy(variables), strict=True)]
    assert all(changed)
    assert not {"compile", "make_train_function"} & vars(model).keys()


def test_one_of_several_optimizers_has_nothing_staged():
    model, base = made()
    optimizers = keras.optimizers
    several = optimizers.OptimizerMap(optimizers.SGD(0.1), {"head/.*": optimizers.Adam(0.1)})
    model.compile(optimizers.MultiOptimizer(several), loss="mse")
    start = numpy(base.weights)
    fit(model, kopt.callbacks.StagedUnfreeze({0: {base: 0.0}}))
    assert equal(base.weights, start)


def test_statistics_alone_are_held():
    model, base = made()
    norm = base.get_layer("norm")
    start = numpy(norm.weights)
    history = fit(model, kopt.callbacks.StagedUnfreeze({0: {"norm/moving": 0.0}}))
    assert [np.array_equal(a, b) for a, b in zip(start, numpy(norm.weights), strict=True)] == [False] * 2 + [True] * 2
    assert history["multiplier/norm/moving"] == [0.0] * 4


def test_two_of_them_have_a_log_each():
    model, base = made()
    staged = kopt.callbacks.StagedUnfreeze
    history = fit(model, staged({0: {base: 0.5}}), staged({0: {base: 0.25}}, name="second"), epochs=1)
    assert history["multiplier/base"] == [0.5]
    assert history["multiplier/base_second"] == [0.25]


def test_it_says_what_it_does(capsys):
    model, base = made()
    stages = [{"epoch": 0, "multipliers": {base: 0}}, {"epoch": 1, "multipliers": {base: 0.5}, "ramp_epochs": 1}]
    fit(model, kopt.callbacks.StagedUnfreeze(stages, verbose=1), epochs=3)
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 1: multiplier of 'base' is 0",
        "Epoch 2: multiplier of 'base' is 0.5, in epochs=1",
    ]


def test_what_is_refused():
    model, base = made()
    staged = kopt.callbacks.StagedUnfreeze
    for stages, message in (
        ({}, "`stages` must be a dict of epochs"),
        ("base", "`stages` must be a dict of epochs"),
        ([{"at": 1}], r"`stages` must be a dict of epochs"),
        ({-1: {"base": 0}}, "`stages` must be of epochs that are integers of 0 or more, not -1"),
        ({2: {"base": 0}, 1: {"base": 1}}, r"`stages\[1\]\['epoch'\]` must be later than 2"),
        ({0: {"base": -1}}, r"must be a finite number of 0 or more. Received"),
    ):
        with pytest.raises(ValueError, match=message):
            staged(stages)
    with pytest.raises(ValueError, match="`engine` must be one of 'multiplier', 'trainable'"):
        staged({0: {"base": 0}}, engine="recompile")
    with pytest.raises(ValueError, match=r"`stages\[0\]\['multipliers'\]` must match a trainable variable: .*'tail'"):
        fit(model, staged({0: {"tail": 0}}))
    lazy = keras.Sequential([keras.layers.Dense(1)])
    lazy.compile("adam", loss="mse")
    if BACKEND == "tensorflow":  # the others build a model before its first step
        with pytest.raises(ValueError, match="`model` must be built"):
            fit(lazy, staged({0: {"dense": 0}}))
    ramp = [{"epoch": 0, "multipliers": {"base": 0}}, {"epoch": 1, "multipliers": {"base": 1}, "ramp_steps": 3}]
    batches = ((X[:8], Y[:8]) for _ in range(8))
    with pytest.raises(ValueError, match=r"`stages` of 'base'|how many batches"):
        model.fit(batches, epochs=2, verbose=0, shuffle=False, callbacks=[staged(ramp)])
    batches = ((X[:8], Y[:8]) for _ in range(8))
    late, more = staged({0: {"head": 0}, 1: {"head": 1}}, engine="trainable"), {"epochs": 2, "verbose": 0}
    with pytest.raises(ValueError, match='`engine` must be "multiplier" where the data do not say how many batches'):
        model.fit(batches, callbacks=[late], shuffle=False, **more)
    model.compile("nadam", loss="mse")
    with pytest.raises(ValueError, match='`optimizer` must be .*engine="multiplier".*Nadam'):
        fit(model, staged({0: {base: 0}}, engine="trainable"))
    for optimizer in (kopt.Adam(use_ema=True), keras.optimizers.Adam(use_ema=True)):
        model.compile(optimizer, loss="mse")
        with pytest.raises(ValueError, match="`use_ema` must be False for StagedUnfreeze"):
            fit(model, staged({0: {base: 0}}))
    model.compile(keras.optimizers.ScheduleFreeAdamW(), loss="mse")
    with pytest.raises(ValueError, match="`optimizer` must be one that keeps no weights of its own"):
        fit(model, staged({0: {base: 0}}))
    model.compile(kopt.LBFGS(), loss="mse")
    with pytest.raises(ValueError, match="`optimizer` must be one that updates each weight by itself"):
        fit(model, staged({0: {base: 0}}), batch_size=32)


@pytest.mark.skipif(BACKEND != "jax", reason="the other backends have all weights in the step")
def test_what_needs_all_weights_is_refused_on_jax():
    model, base = made(kopt.Adam())
    staged = kopt.callbacks.StagedUnfreeze({0: {base: 0.0}}, engine="trainable")
    for callbacks in ([staged, kopt.callbacks.PolyakAveraging()], [kopt.callbacks.PolyakAveraging(), staged]):
        with pytest.raises(ValueError, match="`callbacks` must be without PolyakAveraging on JAX"):
            fit(model, *callbacks)


def test_what_happens_to_be_as_long_as_a_weight_is_no_weight():
    model, base = made(kopt.Adam())
    monitor = kopt.callbacks.RateMonitor(capacity=4)  # as many steps as a bias has entries
    fit(model, kopt.callbacks.StagedUnfreeze({0: {base: 0.0}}, engine="trainable"), monitor, epochs=1)
    assert len(monitor.history["learning_rate"]) == 4
