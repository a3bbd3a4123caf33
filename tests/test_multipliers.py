"""`multipliers=`, `kopt.Multipliers`, `kopt.layer_decay` and `kopt.describe`."""

from functools import partial

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from tests.conftest import BACKEND
from tests.training import (
    MODES,
    PAIRS,
    START,
    AtEpoch,
    Counted,
    X,
    Y,
    equal,
    every_row_in_every_mode,
    fit,
    mirrored,
    network,
    numpy,
    state_of,
    train,
    two,
)

STOCK = {
    "SGD": {},
    "SGD with momentum": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"global_clipnorm": 0.1},
    "Adam accumulating": {"gradient_accumulation_steps": 2},
    "AdamW": {"weight_decay": 0.1},
    **{name: {} for name in ("RMSprop", "Adagrad", "Adadelta", "Adamax", "Nadam", "Ftrl", "Lion", "Adafactor", "Lamb")},
    "Muon": {},
}
every_stock = pytest.mark.parametrize("name", STOCK)

SGD = keras.optimizers.SGD


def stock(name, **more):
    return getattr(keras.optimizers, name.split()[0])(0.01, **STOCK[name], **more)


def trained(mode, make, multiplier):
    """Variables `a`, which has a multiplier, and `b`, after six steps, and the optimizer."""
    variables = two()
    optimizer = make(multiplier)
    train(mode, optimizer, variables, PAIRS)
    return variables, optimizer


@every_row_in_every_mode
def test_one_is_as_without_and_zero_stays_to_the_bit(row, mode):
    def make(multiplier):
        return row.make(weight_decay=0.1, multipliers=None if multiplier is None else {"^a$": multiplier})

    bare, optimizer = trained(mode, make, None)
    one, with_one = trained(mode, make, 1.0)
    none, with_none = trained(mode, make, 0.0)
    assert equal(bare, one)
    assert not equal(bare[:1], [START])
    assert np.array_equal(numpy(none)[0], START)
    assert equal(bare[1:], none[1:])  # the other one has not noticed
    but = ("multipliers",)
    states = [state_of(o, but=but) for o in (optimizer, with_one)]
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
    assert with_none.multipliers == {"^a$": 0.0}


def test_no_optimizer_of_keras_is_left_out():
    around_others = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer"}
    found = {name for name, one in vars(keras.optimizers).items() if isinstance(one, type)} - around_others
    found = {name for name in found if issubclass(getattr(keras.optimizers, name), keras.optimizers.Optimizer)}
    assert found == {name.split()[0] for name in STOCK} | {"ScheduleFreeAdamW"}  # which is refused


@pytest.mark.parametrize("mode", MODES)
@every_stock
def test_multipliers_around_every_optimizer_of_keras(name, mode):
    def make(multiplier):
        return stock(name) if multiplier is None else kopt.Multipliers(stock(name), {"^a$": multiplier})

    bare, _ = trained(mode, make, None)
    one, _ = trained(mode, make, 1.0)
    none, _ = trained(mode, make, 0.0)
    assert equal(bare, one)
    assert not equal(bare[:1], [START])
    assert np.array_equal(numpy(none)[0], START)
    assert equal(bare[1:], none[1:])


@pytest.mark.parametrize("make", [kopt.Adam, lambda rate, multipliers: kopt.Multipliers("adam", multipliers)])
def test_the_update_is_scaled(make):
    steps = []
    for multiplier in (1.0, 0.1):
        a, b = two()
        optimizer = make(0.001, multipliers={"^a$": multiplier})
        optimizer.apply([ops.convert_to_tensor(g) for g in PAIRS[0]], [a, b])
        steps.append(numpy([a])[0] - START)
    np.testing.assert_allclose(steps[1], 0.1 * steps[0], rtol=1e-3)


def test_moments_go_on_as_if_nothing_were_held_back():
    """With gradients that do not depend on the weights, a weight that is let go moves as one that was never held."""
    free, held = (kopt.AdamW(0.01, multipliers={"^a$": multiplier}) for multiplier in (1.0, 0.0))
    moved = []
    for optimizer in (free, held):
        a, b = two()
        for pair in PAIRS[:4]:
            optimizer.apply([ops.convert_to_tensor(g) for g in pair], [a, b])
        before = numpy([a])[0]
        optimizer.multipliers["^a$"] = 1.0
        optimizer.weight_decay = 0.0
        optimizer.apply([ops.convert_to_tensor(g) for g in PAIRS[4]], [a, b])
        moved.append(numpy([a])[0] - before)
    np.testing.assert_allclose(*moved, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_a_tenth_of_many_small_updates_adds_up(kept):
    """Also of a 16-bit weight, behind which there is a float32 master."""
    a = keras.Variable(np.ones((3,)), dtype=kept, name="a")
    optimizer = kopt.SGD(1e-2, multipliers={"a": 0.1})
    for _ in range(40):
        optimizer.apply([ops.ones((3,), kept)], [a])
    np.testing.assert_allclose(ops.convert_to_numpy(ops.cast(a, "float32")), 1 - 40 * 1e-3, rtol=4e-3)


def counted(optimizer):
    counter = Counted()
    model = keras.Sequential(
        [keras.Input((4,)), counter, keras.layers.Dense(3, name="body"), keras.layers.Dense(2, name="head")]
    )
    model.compile(optimizer, loss="mse")
    counter.calls.clear()
    return model, counter


@pytest.mark.skipif(BACKEND == "torch", reason="torch traces nothing")
@pytest.mark.parametrize("make", [kopt.Adam, lambda rate, multipliers: kopt.Multipliers("adam", multipliers)])
def test_they_change_in_a_fit_without_another_trace(make):
    model, counter = counted(make(0.01, multipliers={"body": 0.0}))
    start, seen = numpy(model.layers[1].weights), []

    def change(model):
        model.optimizer.multipliers["body"] = 0.5

    unfreeze = AtEpoch(2, change)
    look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(numpy(model.layers[1].weights)))
    model.fit(X, Y, batch_size=8, epochs=1, verbose=0)
    traces = len(counter.calls)
    model.fit(X, Y, batch_size=8, epochs=4, verbose=0, callbacks=[unfreeze, look])
    assert len(counter.calls) == traces
    still = [all(map(np.array_equal, start, weights)) for weights in seen]
    assert still == [True, True, False, False]
    assert model.optimizer.multipliers == {"body": 0.5}


@pytest.mark.parametrize("wrapped", [False, True])
def test_they_are_saved_and_loaded(wrapped, tmp_path):
    def make(model):
        groups = {model.get_layer("body"): 0.0, "head": 0.5}
        return kopt.Multipliers("adam", groups) if wrapped else kopt.Adam(multipliers=groups)

    model = network("sgd")
    model.compile(make(model), loss="mse")
    fit(model)
    model.optimizer.multipliers["head"] = 0.25
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.multipliers == {"body": 0.0, "head": 0.25}
    assert equal(fit(model).weights, fit(loaded).weights)
    assert equal(model.optimizer.variables, loaded.optimizer.variables)
    loaded.optimizer.multipliers["body"] = 1.0  # by the name of the layer that it was made with
    start = numpy(loaded.get_layer("body").weights)
    assert not equal(fit(loaded).get_layer("body").weights, start)


def test_a_state_of_other_groups_leaves_them_as_they_were_made(tmp_path):
    model = fit(network(kopt.Adam()))
    model.save_weights(tmp_path / "a.weights.h5")
    for groups in ({"body": 0.5}, {"body": 0.5, "head": 0.0}):
        other = network(kopt.Adam(multipliers=groups))
        other.optimizer.build(other.trainable_variables)
        other.load_weights(tmp_path / "a.weights.h5")
        assert other.optimizer.multipliers == groups
        assert int(ops.convert_to_numpy(other.optimizer.iterations)) == 3
        other.save_weights(tmp_path / "a.weights.h5")


@pytest.mark.parametrize("make", [kopt.Adam, lambda multipliers: kopt.Multipliers("adam", multipliers)])
def test_under_a_loss_scale(make):
    models = []
    for groups in ({"head": 1.0}, {"body": 0.0}):
        model = network(keras.optimizers.LossScaleOptimizer(make(multipliers=groups)))
        start = numpy(model.weights)
        models.append((start, fit(model)))
    assert not equal(models[0][1].weights[:2], models[0][0][:2])
    assert equal(models[1][1].weights[:2], models[1][0][:2])
    assert not equal(models[1][1].weights[2:], models[1][0][2:])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has gradients of rows")
@pytest.mark.parametrize("sparse", ["exact", "lazy"])
@pytest.mark.parametrize("make", [kopt.Adam, kopt.Adagrad])
def test_rows_take_their_share(make, sparse):
    import tensorflow as tf

    tables = {}
    for multiplier in (None, 1.0, 0.5, 0.0):
        table = keras.Variable(np.arange(12.0).reshape(6, 2), name="table")
        optimizer = make(0.1, sparse=sparse, multipliers=None if multiplier is None else {"table": multiplier})
        optimizer.build([table])
        rows = tf.IndexedSlices(tf.ones((3, 2)), tf.constant([1, 4, 1]), tf.constant([6, 2]))
        tf.function(partial(optimizer.apply, [rows], [table]))()
        tables[multiplier] = numpy([table])[0]
    start = np.arange(12.0).reshape(6, 2).astype("float32")
    assert np.array_equal(tables[None], tables[1.0])
    assert np.array_equal(tables[0.0], start)
    np.testing.assert_allclose(tables[0.5] - start, 0.5 * (tables[1.0] - start), atol=1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has replicas in a process")
@pytest.mark.parametrize("make", [kopt.Adam, lambda multipliers: kopt.Multipliers("adam", multipliers)])
def test_on_replicas(make):
    found = []
    for multiplier in (1.0, 0.0):
        keras.utils.set_random_seed(0)
        with mirrored().scope():
            model = network(make(multipliers={"body": multiplier}))
        start = numpy(model.weights)
        found.append((start, numpy(fit(model).weights)))
    (start, one), (_, none) = found
    assert all(map(np.array_equal, none[:2], start[:2]))
    assert not np.array_equal(one[0], start[0])
    keras.utils.set_random_seed(0)
    with mirrored().scope():
        bare = network(kopt.Adam() if make is kopt.Adam else "adam")
    assert all(map(np.array_equal, numpy(fit(bare).weights), one))


@pytest.mark.parametrize(
    "make", [kopt.SGD, lambda rate, multipliers: kopt.Multipliers(keras.optimizers.SGD(rate), multipliers)]
)
@pytest.mark.parametrize("multiplier", [0.0, 0.5, 1.0, 3.0])
def test_constraints_hold_for_what_was_blended(make, multiplier):
    """Between two vectors of length 1 there is a shorter one; a weight may go three times as far, but not below 0."""
    keras.utils.set_random_seed(0)
    body = keras.layers.Dense(4, kernel_constraint="unit_norm", bias_constraint="non_neg", name="body")
    model = keras.Sequential([keras.Input((4,)), body, keras.layers.Dense(2)])
    model.compile(make(0.1, multipliers={body: multiplier}), loss="mse")
    start = numpy(body.weights)
    fit(model)
    kernel, bias = numpy(body.weights)
    if multiplier:
        np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1.0, rtol=1e-5)
        assert bias.min() >= 0
    else:  # as it was, though it has not length 1
        assert equal(body.weights, start)
    assert multiplier == 0 or not np.array_equal(kernel, start[0])


def test_one_clip_one_rate_one_count():
    """A frozen gradient still counts in the global norm, and a schedule drives the optimizer within."""
    model = network(kopt.Multipliers(keras.optimizers.SGD(1.0, global_clipnorm=1e-3), {"body": 0.0}))
    decay = kopt.callbacks.StepDecay(0.5, every_epochs=1)
    rates = model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[decay]).history["learning_rate"]
    assert rates == [1.0, 0.5]
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 6
    model.optimizer.learning_rate = 0.25
    assert float(ops.convert_to_numpy(model.optimizer.inner_optimizer.learning_rate)) == 0.25


@pytest.mark.parametrize("make", [kopt.Adam, lambda multipliers: kopt.Multipliers("adam", multipliers)])
def test_an_average_is_of_the_weights_as_they_are(make):
    model = network(make(multipliers={"body": 0.0}))
    start = numpy(model.weights)
    average = kopt.callbacks.PolyakAveraging(kind="uniform")
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[average])
    averaged = numpy(average.averaged_model().weights)
    assert all(map(np.array_equal, averaged[:2], start[:2]))
    assert not np.array_equal(averaged[2], start[2])


def test_what_is_refused():
    for make in (lambda groups: kopt.Adam(multipliers=groups), lambda groups: kopt.Multipliers("adam", groups)):
        with pytest.raises(ValueError, match=r"`multipliers` must match a trainable.*head/bias.* Received: .*'tail'"):
            fit(network(make({"tail": 0.1})))
        with pytest.raises(ValueError, match="a variable that none before it does; 'body' has all.*'body/kernel'"):
            fit(network(make({"body": 0.1, "body/kernel": 1.0})))
        with pytest.raises(ValueError, match=r"`multipliers\['body'\]` must be a finite number of 0 or more. Received"):
            make({"body": -0.1})
        with pytest.raises(ValueError, match=r"`multipliers` must be a dict of layers, models or regular.*Received"):
            make("body")
        optimizer = make({"body": 0.1})
        with pytest.raises(ValueError, match=r"`multipliers\['body'\]` must be a finite number of 0 or more. Received"):
            optimizer.multipliers["body"] = float("nan")
        with pytest.raises(ValueError, match="`multipliers` must be a dict of some of 'body', as it was made"):
            optimizer.multipliers = {"head": 1.0}
        with pytest.raises(KeyError, match="`multipliers` has 'body'. Received: 'head'"):
            optimizer.multipliers["head"]
        optimizer.multipliers = {"body": 0.25}
        assert optimizer.multipliers["body"] == 0.25
    assert kopt.Adam().multipliers is kopt.Adam(multipliers={}).multipliers is None
    with pytest.raises(ValueError, match="`multipliers` must be given when the optimizer is made"):
        kopt.Adam().multipliers = {"body": 0.1}
    with pytest.raises(ValueError, match="`ema_overwrite_frequency` must be None beside `multipliers`"):
        kopt.Adam(multipliers={"body": 0.1}, use_ema=True, ema_overwrite_frequency=2)
    for inner, message in (
        (kopt.Adam(), r"kopt's take `multipliers=` \(kopt.Adam\)"),
        (kopt.LBFGS(), r"updates each weight by itself"),
        (keras.optimizers.ScheduleFreeAdamW(), "keeps no weights of its own"),
        (keras.optimizers.Adam(use_ema=True), "without `use_ema`"),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), "put Multipliers into LossScaleOptimizer"),
    ):
        with pytest.raises(ValueError, match=f"`inner_optimizer` must be .*{message}"):
            kopt.Multipliers(inner, {"body": 0.1})
    with pytest.raises(ValueError, match="`multipliers` must be a dict with at least one entry"):
        kopt.Multipliers("adam", {})


def test_an_optimizer_that_was_built_keeps_its_state():
    model = fit(network(keras.optimizers.Adam()))
    inner = model.optimizer
    model.compile(kopt.Multipliers(inner, {"body": 0.0}), loss="mse")
    start = numpy(model.weights)
    fit(model)
    assert int(ops.convert_to_numpy(inner.iterations)) == 6
    assert equal(model.weights[:2], start[:2])
    assert not equal(model.weights[2:], start[2:])


def deep():
    base = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, name="low"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(3, name="high"),
        ],
        name="base",
    )
    return keras.Sequential([base, keras.layers.Dropout(0.1), keras.layers.Dense(1, name="head")]), base


def test_layer_decay():
    model, base = deep()
    decay = kopt.layer_decay(model, 0.5, min_multiplier=0.3)
    assert {layer.name: m for layer, m in decay.items()} == {"head": 1.0, "high": 0.5, "low": 0.3, "norm": 0.3}
    blocks = kopt.layer_decay(model, 0.1, levels=[["low", "norm"], base, "head"])
    assert [m for _, m in blocks] == pytest.approx([1.0, 0.1, 0.01])
    model.compile(kopt.Adam(multipliers=decay), loss="mse")
    model.optimizer.build(model.trainable_variables)
    assert model.optimizer.multipliers == {"head": 1.0, "high": 0.5, "low": 0.3, "norm": 0.3}

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.places = self.add_weight(shape=(4,), name="places")
            self.first, self.second = keras.layers.Dense(2, name="first"), keras.layers.Dense(1, name="second")

        def call(self, x):
            return self.second(self.first(x + self.places))

    own = Own()
    own(X)
    assert list(kopt.layer_decay(own, 0.5).values()) == [1.0, 0.5, 0.25]
    own.compile(kopt.Adam(multipliers=kopt.layer_decay(own, 0.5)), loss="mse")
    own.optimizer.build(own.trainable_variables)
    for wrong, message in (
        ({"model": "body"}, "`model` must be a keras.Model"),
        ({"model": keras.Sequential([keras.layers.Dense(1)])}, "`model` must be one with trainable weights"),
        ({"model": model, "decay": 0.0}, r"`decay` must be a number in \(0, 1\]"),
        ({"model": model, "min_multiplier": 2.0}, r"`min_multiplier` must be a number in \[0, 1\]"),
        ({"model": model, "levels": [3]}, "`levels` must be a layer, a model"),
    ):
        with pytest.raises(ValueError, match=message):
            kopt.layer_decay(**wrong)


def test_layers_of_one_name_are_told_apart():
    twins = [keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="dense")]) for _ in range(2)]
    model = keras.Sequential([*twins, keras.layers.Dense(2)])
    first, second = (twin.layers[0] for twin in twins)
    model.compile(kopt.Adam(multipliers={first: 0.5, second: 0.25}), loss="mse")
    model.optimizer.multipliers[second] = 0.0
    assert model.optimizer.multipliers == {"dense": 0.5, "dense#2": 0.0}
    start = numpy(model.weights)
    fit(model)
    assert equal(second.weights, start[2:4])
    assert not equal(first.weights, start[:2])


def test_describe(capsys):
    model, base = deep()
    base.get_layer("low").trainable = False
    kopt.describe(model, {base: 0.1})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["group", "base", "all others", "not trainable"]
    assert lines[1].split() == [
        *("base", "0.1", "4", "18", "norm/gamma" if lines[1].split()[4].startswith("norm") else "base/norm/gamma"),
        *("1", "with", "statistics", "that", "move"),
    ]
    assert lines[2].split()[:4] == ["all", "others", "1", "2"]
    assert lines[3].split()[:5] == ["not", "trainable", "-", "2", "15"]
    base.get_layer("norm").trainable = False
    model.compile(kopt.Multipliers("adam", {"head": 0.5}), loss="mse")
    said = []
    kopt.describe(model, print_fn=said.append)
    assert said[1].split()[:3] == ["head", "0.5", "2"]
    assert said[-1].endswith("1 in inference")
    model.optimizer.build(model.trainable_variables)
    model.get_layer("head").trainable = False
    said.clear()
    kopt.describe(model, print_fn=said.append)
    assert [line.split("  ")[0] for line in said] == ["group", "head", "all others", "not trainable"]
    assert said[1].split()[:3] == ["head", "0.5", "0"]
    model.get_layer("head").trainable = True
    many = kopt.layer_decay(model, levels=[["high/kernel", "high/bias", "head/kernel", "head/bias"]])
    kopt.describe(model, many, print_fn=said.append)
    assert said[5].startswith("high/kernel, ..., head/bias ")
    model.compile("adam", loss="mse")
    kopt.describe(model)
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["all", "1"]
    with pytest.raises(ValueError, match="`model` must be built"):
        kopt.describe(keras.Sequential([keras.layers.Dense(1)]))
