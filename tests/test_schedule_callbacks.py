"""Schedules in `fit`: the rates that reach the weights, whatever the optimizer, the backend and the way it compiles."""

import contextlib
import copy
import pickle

import keras
import numpy as np
import pytest
from keras import ops

import kopt
import kopt.callbacks as kc
import kopt.schedules as ks
from tests.catalog import BATCHES, EPOCHS, SCHEDULES, STEPS
from tests.conftest import BACKEND
from tests.test_distribution import JAX, TENSORFLOW, many_devices
from tests.training import AtEpoch, in_turn

Multi, Map, Scaled = keras.optimizers.MultiOptimizer, keras.optimizers.OptimizerMap, keras.optimizers.LossScaleOptimizer
RATE = 0.5
WAYS = {"plain": {"jit_compile": False}, "three": {"steps_per_execution": 3}, "seven": {"steps_per_execution": 7},
        "xla": {"jit_compile": True}, "eager": {"run_eagerly": True}}  # fmt: skip
if BACKEND == "torch":
    WAYS = {"plain": {}}  # Keras has one step an execution there
OPTIMIZERS = {
    "kopt": lambda: kopt.SGD(RATE),
    "keras": lambda: keras.optimizers.SGD(RATE),
}
DRIVEN = [row for row in SCHEDULES if row.callback is not None]


class Ones(keras.utils.PyDataset):
    """Batches in which only the weight of that step has a gradient: 1."""

    def __init__(self, batches, steps):
        super().__init__()
        self.rows, self.batches, self.epoch = np.eye(steps, dtype="float32"), batches, 0

    def __len__(self):
        return self.batches

    def __getitem__(self, i):
        i += self.epoch * self.batches
        return self.rows[[i, i]], np.zeros((2, 1), "float32")


class Epoch(keras.callbacks.Callback):
    """Tells the data which epoch it is."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def on_epoch_begin(self, epoch, logs=None):
        self.data.epoch = epoch


def weighing(optimizer, steps=STEPS, **compiled):
    """A model with a weight for each step of a training."""
    model = keras.Sequential(
        [keras.Input((steps,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", name="only")]
    )
    model.compile(optimizer, loss=lambda true, predicted: ops.mean(predicted), **compiled)
    return model


def weigh(model, callbacks, epochs=EPOCHS, batches=BATCHES, **arguments):
    """The rate that each step of a `fit` moved its weight by, and the history."""
    steps, before = model.count_params(), model.get_weights()[0][:, 0]
    data = Ones(batches, steps)
    history = model.fit(data, epochs=epochs, verbose=0, shuffle=False, callbacks=[Epoch(data), *callbacks], **arguments)
    return before - model.get_weights()[0][:, 0], history.history


def near(rates, expected, rtol=1e-5):
    np.testing.assert_allclose(rates, expected, rtol=rtol, atol=1e-6)


SLOW = pytest.mark.slow  # all of them; otherwise each row goes one way with each optimizer
EVERY = in_turn(
    {str(row): row for row in DRIVEN},
    {f"{name}-{way}": (OPTIMIZERS[name], WAYS[way]) for way in WAYS for name in OPTIMIZERS},
)


@pytest.mark.parametrize(("row", "case"), EVERY)
def test_the_rates_that_reach_the_weights(row, case):
    make, way = case
    optimizer = make()
    scale = RATE if row.make().is_factor else 1.0
    if row.cls is ks.CyclicalRate:  # its lowest value is the optimizer's own
        optimizer.learning_rate = 1.0
    model = weighing(optimizer, **way)
    rates, history = weigh(model, [row.callback(**row.arguments)])
    expected = scale * row.values(range(STEPS), STEPS)
    near(rates, expected)
    near(history["learning_rate"], expected[BATCHES - 1 :: BATCHES])
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(scale)
    assert len(model.optimizer.variables) <= 3


@pytest.mark.parametrize(("row", "case"), EVERY)
def test_a_schedule_as_the_learning_rate_itself(row, case):
    """Told by any callback of kopt how long the fit is; one that needs nothing is told nothing."""
    make, way = case
    optimizer = make()
    schedule = row.by_itself()
    optimizer = type(optimizer)(schedule)
    callbacks = [kc.RateMonitor()] if schedule.needs_clock() else []
    rates, history = weigh(weighing(optimizer, **way), callbacks)
    expected = row.values(range(STEPS), STEPS)
    near(rates, expected)
    if callbacks:
        near(history["learning_rate"], expected[BATCHES - 1 :: BATCHES])
        near(callbacks[0].history["learning_rate"], expected)


def cosine(steps, total):
    return (1 + np.cos(np.pi * np.asarray(steps) / total)) / 2


every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@every_optimizer
def test_factors_multiply_in_any_order(make):
    expected = (
        RATE * cosine(range(STEPS), STEPS) * np.minimum(np.arange(STEPS) / 10, 1) * 0.5 ** (np.arange(STEPS) // 5)
    )
    parts = [lambda: kc.WarmUp(epochs=2), kc.CosineDecay, lambda: kc.StepDecay(0.5, every_epochs=1)]
    for order in (parts, parts[::-1]):
        rates, history = weigh(weighing(make()), [part() for part in order])
        near(rates, expected)
        near(history["learning_rate"], expected[BATCHES - 1 :: BATCHES])


@every_optimizer
def test_a_factor_beside_a_value_of_its_own(make):
    rates, _ = weigh(weighing(make()), [kc.WarmUp(epochs=1), kc.OneCycle(1.0, momentum=None)])
    near(rates, ks.OneCycle(1.0).preview(STEPS) * np.minimum(np.arange(STEPS) / 5, 1))


def test_two_values_of_their_own_are_refused_before_a_step():
    model = weighing(kopt.SGD(RATE, momentum=0.9))
    both = [kc.MomentumAnneal(), kc.OneCycle(1.0)]
    with pytest.raises(ValueError, match=r"only one gives `momentum` a value of its own.*Received: callbacks="):
        weigh(model, both)
    assert int(model.optimizer.iterations) == 0
    assert float(model.optimizer.learning_rate) == RATE
    assert model.optimizer.momentum == 0.9
    assert "apply" not in vars(model.optimizer)
    weigh(model, [kc.MomentumAnneal(), kc.OneCycle(1.0, momentum=None)])


class Halve(keras.callbacks.Callback):
    """Writes to the learning rate, as ReduceLROnPlateau does."""

    def __init__(self, epoch, hook="on_epoch_end"):
        super().__init__()
        setattr(self, hook, lambda at, logs=None: at == epoch and self.halve())

    def halve(self):
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        self.model.optimizer.learning_rate = 0.5 * rate


@every_optimizer
@pytest.mark.parametrize("hook", ["on_epoch_end", "on_epoch_begin"])
@pytest.mark.parametrize("first", [True, False])
def test_what_others_write_changes_the_rate_in_that_ratio(make, hook, first):
    parts = [kc.CosineDecay(), kc.WarmUp(epochs=2)]
    halve = Halve(1, hook)
    model = weighing(make())
    rates, _ = weigh(model, [halve, *parts] if first else [*parts, halve])
    expected = RATE * cosine(range(STEPS), STEPS) * np.minimum(np.arange(STEPS) / 10, 1)
    expected[(10 if hook == "on_epoch_end" else 5) :] /= 2
    near(rates, expected)
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(RATE / 2)


def test_plateau_and_schedule_compose():
    plateau = keras.callbacks.ReduceLROnPlateau("loss", 0.1, patience=1, min_delta=1e9, verbose=0)
    model = weighing(keras.optimizers.SGD(RATE))
    rates, history = weigh(model, [kc.CosineDecay(), plateau])
    drops = np.repeat([1, 1, 0.1, 0.01], BATCHES)
    near(rates, RATE * cosine(range(STEPS), STEPS) * drops)
    near(history["learning_rate"], rates[BATCHES - 1 :: BATCHES])


def test_a_write_after_the_last_step_counts_too():
    model = weighing(keras.optimizers.SGD(RATE))
    weigh(model, [kc.CosineDecay(), Halve(EPOCHS - 1)])
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(RATE / 2)


def write(epoch, rate):
    return AtEpoch(epoch, lambda model: setattr(model.optimizer, "learning_rate", rate))


@every_optimizer
def test_a_write_where_the_factor_is_zero_is_the_rate_without_it(make):
    rates, _ = weigh(weighing(make()), [kc.Staircase([1, 2, 3], [0.0, 1.0, 0.5]), write(2, 0.3)])
    near(rates, np.repeat([RATE, 0, 0.3, 0.15], BATCHES))
    model = weighing(make())
    weigh(model, [kc.Staircase([3], [0.0]), keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: epoch == 3 and setattr(model.optimizer, "learning_rate", 0.01))])  # fmt: skip
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(0.01)


@every_optimizer
def test_a_rate_that_was_written_to_zero_can_be_written_again(make):
    rates, _ = weigh(weighing(make()), [kc.CosineDecay(), write(1, 0.0), write(2, 0.1)])
    wave = cosine(range(STEPS), STEPS)
    near(rates[:10], RATE * wave[:10] * np.repeat([1, 0], BATCHES))
    near(rates[10:], wave[10:] * 0.1 / wave[9])


@every_optimizer
def test_a_file_has_what_was_written_before_it(make, tmp_path):
    model = weighing(make())
    files = keras.callbacks.ModelCheckpoint(str(tmp_path / "at_{epoch}.weights.h5"), save_weights_only=True)
    weigh(model, [Halve(1), kc.CosineDecay(), files])
    for epoch, rate in ((1, RATE), (2, RATE / 2), (3, RATE / 2)):
        other = weighing(make())
        other.optimizer.build(other.trainable_variables)
        other.load_weights(tmp_path / f"at_{epoch}.weights.h5")
        assert float(ops.convert_to_numpy(other.optimizer.learning_rate)) == pytest.approx(rate)


@every_optimizer
def test_the_rate_in_use_is_what_others_read(make):
    seen = []

    class Read(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(float(ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    model = weighing(make())
    rates, _ = weigh(model, [Read(), kc.CosineDecay()])
    near(seen, rates[BATCHES - 1 :: BATCHES])
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == RATE


def stock_schedule():
    return keras.optimizers.schedules.ExponentialDecay(RATE, 4, 0.5)


SOURCES = {
    "stock": (stock_schedule, RATE * 0.5 ** (np.arange(STEPS) / 4)),
    "kopt": (lambda: ks.PolynomialDecay(1.0, initial=RATE), RATE * (1 - np.arange(STEPS) / STEPS)),
    "callable": (lambda: lambda: 0.25, np.full(STEPS, 0.25)),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("cls", [kopt.SGD, keras.optimizers.SGD])
def test_a_rate_that_is_a_schedule_is_multiplied(source, cls):
    make, values = SOURCES[source]
    optimizer = cls(make())
    own = optimizer._learning_rate
    model = weighing(optimizer)
    rates, history = weigh(model, [kc.CosineDecay(), kc.WarmUp(epochs=1), Halve(1)])
    expected = values * cosine(range(STEPS), STEPS) * np.minimum(np.arange(STEPS) / 5, 1)
    expected[10:] /= 2  # which without a callback of kopt would be an error
    near(rates, expected)
    near(history["learning_rate"], expected[BATCHES - 1 :: BATCHES])
    assert optimizer._learning_rate is own


@pytest.mark.parametrize("cls", [kopt.SGD, keras.optimizers.SGD])
def test_time_is_counted_in_updates(cls):
    """Accumulation over two of five batches: an update now and then has batches of two epochs."""
    model = weighing(cls(RATE, gradient_accumulation_steps=2))
    rates, _ = weigh(model, [kc.Staircase([3, 6], [0.5, 0.1], per="step")])
    near(rates, RATE / 2 * np.repeat([1, 1, 1, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1], 2))
    model = weighing(cls(RATE, gradient_accumulation_steps=5))
    rates, _ = weigh(model, [kc.StepDecay(0.5, every_epochs=1)])
    near(rates, RATE / 5 * np.repeat(0.5 ** np.arange(4), 5))
    model = weighing(cls(RATE, gradient_accumulation_steps=5))
    rates, history = weigh(model, [kc.CosineDecay()])
    near(rates, RATE / 5 * np.repeat(cosine(range(4), 4), 5))
    near(history["learning_rate"], RATE * cosine(range(4), 4))


@pytest.mark.parametrize("inner", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_within_a_loss_scale_optimizer(inner):
    model = weighing(Scaled(inner(), initial_scale=4.0))
    rates, history = weigh(model, [kc.CosineDecay(), Halve(1)])
    expected = RATE * cosine(range(STEPS), STEPS)
    expected[10:] /= 2
    near(rates, expected)
    near(history["learning_rate"], expected[BATCHES - 1 :: BATCHES])


class Growing(Ones):
    """The gradients of the first steps are too large for the loss scale."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x * (8 if self.epoch == 0 and i < 3 else 1), y


@pytest.mark.parametrize("inner", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_that_overflow_do_not_count(inner):
    """An epoch is an epoch, however many of its updates a loss scale has dropped."""
    model = weighing(Scaled(inner(), initial_scale=2.0**127, dynamic_growth_steps=10**6))
    monitor, data = kc.RateMonitor(), Growing(BATCHES, STEPS)
    model.fit(data, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=[
        Epoch(data), kc.StepDecay(0.5, every_epochs=1), monitor])  # fmt: skip
    done = int(ops.convert_to_numpy(model.optimizer.inner_optimizer.iterations))
    assert 0 < done < STEPS
    expected = RATE * np.repeat(0.5 ** np.arange(EPOCHS), BATCHES)
    near(monitor.history["learning_rate"], expected[STEPS - done :])
    near(-model.get_weights()[0][3:, 0], expected[3:])


def test_each_of_several_optimizers_keeps_its_own():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((STEPS,))
    one = {"use_bias": False, "kernel_initializer": "zeros"}
    outputs = keras.layers.Add()([keras.layers.Dense(1, name=name, **one)(inputs) for name in ("left", "right")])
    model = keras.Model(inputs, outputs)
    optimizer = Multi(Map(kopt.SGD(0.1, name="ours"), {".*right.*": keras.optimizers.SGD(0.4, name="theirs")}))
    model.compile(optimizer, loss=lambda true, predicted: ops.mean(predicted))
    data = Ones(BATCHES, STEPS)
    history = model.fit(data, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=[Epoch(data), kc.CosineDecay()])
    left, right = (-weights[:, 0] for weights in model.get_weights())
    near(left, 0.1 * cosine(range(STEPS), STEPS))
    near(right, 0.4 * cosine(range(STEPS), STEPS))
    near(history.history["learning_rate_theirs"], right[BATCHES - 1 :: BATCHES])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_momentum_goes_the_other_way(way):
    """The weight of the first step moves on by momentum: m1 + m1 m2 + ..."""
    model = weighing(kopt.SGD(0.01, momentum=0.9), **way)
    cycle = kc.OneCycle(1.0, peak_at=0.5)
    rates, history = weigh(model, [cycle])
    rate, momentum = cycle.schedule.preview(STEPS), cycle.other_way.preview(STEPS)
    assert momentum[0] == pytest.approx(0.95)
    assert momentum[STEPS // 2] == pytest.approx(0.85)
    for i in (0, 7):
        near(rates[i], rate[i] * (1 + np.cumprod(momentum[i + 1 :]).sum()))
    near(history["momentum"], momentum[BATCHES - 1 :: BATCHES])
    assert model.optimizer.momentum == 0.9
    _, history = weigh(model, [kc.MomentumAnneal(0.5, 0.9, epochs=2)])
    near(history["momentum"], [0.66, 0.86, 0.9, 0.9])


@pytest.mark.parametrize("cls", [kopt.Adam, keras.optimizers.Adam])
def test_one_cycle_drives_beta_1_of_adam(cls):
    model = weighing(cls(0.01))
    cycle = kc.OneCycle(0.1)
    _, history = weigh(model, [cycle])
    near(history["beta_1"], cycle.other_way.preview(STEPS)[BATCHES - 1 :: BATCHES])
    assert model.optimizer.beta_1 == 0.9


FLOATS = {  # what can be driven of Keras's optimizers, and of kopt's beside the rate
    "beta_1": (keras.optimizers.Adam, {}, kopt.Adam),
    "beta_2": (keras.optimizers.Adam, {}, kopt.Adam),
    "rho": (keras.optimizers.RMSprop, {}, kopt.RMSprop),
    "weight_decay": (keras.optimizers.AdamW, {"weight_decay": 0.1}, kopt.AdamW),
    "momentum": (None, {"momentum": 0.5}, kopt.SGD),
    "epsilon": (None, {}, kopt.Adam),
    "clipnorm": (None, {"clipnorm": 1.0}, kopt.SGD),
}


class Assigned(keras.callbacks.Callback):
    """The same by hand, one step at a time, without a compiled step."""

    def __init__(self, name, values):
        super().__init__()
        self.name, self.values, self.step = name, values, 0

    def on_train_batch_begin(self, batch, logs=None):
        setattr(self.model.optimizer, self.name, float(self.values[self.step]))
        self.step += 1


BOTH = [
    pytest.param(name, cls, more, marks=pytest.mark.slow if stock and cls is ours else ())
    for name, (stock, more, ours) in FLOATS.items()
    for cls in (stock, ours)
    if cls
]


@pytest.mark.parametrize(("name", "cls", "arguments"), BOTH)
def test_other_numbers_follow_a_schedule(name, cls, arguments):
    high = {"epsilon": 1e-2, "clipnorm": 1.0, "weight_decay": 0.2}.get(name, 0.9)
    schedule = ks.Linear(high, high / 2, initial=1.0)
    model = weighing(cls(0.1, **arguments))
    model.set_weights([np.ones((STEPS, 1))])
    rates, history = weigh(model, [kc.Schedule(name, schedule)])
    near(history[name], schedule.preview(STEPS)[BATCHES - 1 :: BATCHES])
    by_hand = weighing(cls(0.1, **arguments), run_eagerly=True)
    by_hand.set_weights([np.ones((STEPS, 1))])
    expected, _ = weigh(by_hand, [Assigned(name, schedule.preview(STEPS))])
    near(rates, expected, rtol=1e-4)
    assert np.abs(rates - weigh(fresh(cls(0.1, **arguments)), [])[0]).max() > 1e-4


def fresh(optimizer):
    model = weighing(optimizer)
    model.set_weights([np.ones((STEPS, 1))])
    return model


@TENSORFLOW
@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), lambda: kopt.SGD(RATE, gradient_accumulation_steps=5)])
def test_under_a_strategy(make):
    one, alone = weigh(weighing(make()), [kc.CosineDecay(), kc.WarmUp(epochs=1), Halve(1)])
    with many_devices():
        model = weighing(make())
    rates, history = weigh(model, [kc.CosineDecay(), kc.WarmUp(epochs=1), Halve(1)])
    near(rates, 2 * one)  # the sum of the gradients of two replicas, each 1
    near(history["learning_rate"], alone["learning_rate"])


@TENSORFLOW
def test_accumulation_of_keras_under_a_strategy_is_refused():
    with many_devices():
        model = weighing(keras.optimizers.SGD(RATE, gradient_accumulation_steps=2))
    with pytest.raises(ValueError, match="use one of kopt's optimizers"):
        weigh(model, [kc.CosineDecay()])


@TENSORFLOW
def test_a_float_of_keras_under_a_strategy():
    with many_devices():
        model = weighing(keras.optimizers.Adam(0.1))
    beta = ks.Linear(0.9, 0.4, initial=1.0)
    rates, _ = weigh(model, [kc.Schedule("beta_1", beta)])
    near(rates, weigh(weighing(keras.optimizers.Adam(0.1)), [kc.Schedule("beta_1", beta)])[0], rtol=1e-4)
    assert model.optimizer.beta_1 == 0.9


@JAX
def test_distributed_on_jax():
    rows = 8

    def train(scope):
        with scope:
            model = weighing(keras.optimizers.SGD(RATE))
            x = np.repeat(np.eye(STEPS, dtype="float32")[:BATCHES], rows, 0)
            model.fit(x, np.zeros((len(x), 1)), batch_size=rows, epochs=EPOCHS, shuffle=False, verbose=0,
                      callbacks=[kc.CosineDecay(), kc.WarmUp(epochs=1)])  # fmt: skip
            return model.get_weights()[0]

    near(train(many_devices()), train(contextlib.nullcontext()))


def test_nothing_is_called_for_each_batch():
    """JAX goes on without waiting, and steps can be many in one execution; but two must see every batch."""
    seeing = kc.BackupAndRestore, kc.LearningRateFinder
    public = [cls for cls in vars(kc).values() if isinstance(cls, type) and cls not in seeing]
    assert len(public) > 10
    for cls in public:
        for hook in ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end"):
            assert getattr(cls, hook) is getattr(keras.callbacks.Callback, hook)


@every_optimizer
def test_a_monitor_keeps_every_step(make):
    monitor = kc.RateMonitor()
    model = weighing(make())
    rates, history = weigh(model, [monitor, kc.CosineDecay(), kc.WarmUp(steps=4)])
    near(monitor.history["learning_rate"], rates)
    assert history["learning_rate"] == monitor.history["learning_rate"][BATCHES - 1 :: BATCHES].tolist()
    weigh(model, [monitor], epochs=1)
    near(monitor.history["learning_rate"], np.full(BATCHES, RATE))


def test_a_monitor_keeps_other_numbers_and_rates_that_are_computed():
    monitor = kc.RateMonitor(["learning_rate", "momentum", "weight_decay"])
    optimizer = kopt.SGD(stock_schedule(), momentum=0.5, weight_decay=0.1)
    _, history = weigh(weighing(optimizer), [kc.MomentumAnneal(), monitor])
    near(monitor.history["learning_rate"], SOURCES["stock"][1])
    near(monitor.history["momentum"], np.linspace(0.5, 0.99, STEPS + 1)[:-1])
    near(monitor.history["weight_decay"], np.full(STEPS, 0.1))
    near(history["weight_decay"], np.full(EPOCHS, 0.1))


@pytest.mark.parametrize("row", {row.cls: row for row in DRIVEN}.values(), ids=str)
def test_copies_go_without_the_model(row):
    """KerasTuner copies callbacks, one that has been fitted, too."""
    callback = row.callback(**row.arguments)
    fitted, _ = weigh(weighing(kopt.SGD(1.0)), [callback])
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert twin._drives is None
        assert twin._rates is None
        assert twin.schedule == callback.schedule
    near(weigh(weighing(kopt.SGD(1.0)), [copy.deepcopy(twin)])[0], fitted)


def size_of_step(optimizer, callbacks, count):
    """How many operations an update of so many variables has."""
    variables = [keras.Variable(np.ones(3, "float32"), name=f"v{i}") for i in range(count)]
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(optimizer, loss="mse")
    optimizer.build(variables)
    listed = keras.callbacks.CallbackList(callbacks, model=model, steps=BATCHES, epochs=EPOCHS)
    listed.on_train_begin()
    listed.on_epoch_begin(0)
    gradients = [ops.ones(3)] * count
    if BACKEND == "tensorflow":
        import tensorflow as tf

        function = tf.function(lambda: optimizer.apply(gradients, variables)).get_concrete_function()
        size = len(function.graph.get_operations())
    else:
        import jax

        held = [v.value for v in optimizer.variables], gradients, [v.value for v in variables]
        size = str(jax.make_jaxpr(optimizer.stateless_apply)(*held)).count("\n")
    listed.on_train_end()
    return size


@pytest.mark.skipif(BACKEND == "torch", reason="nothing is compiled")
@pytest.mark.parametrize("cls", [kopt.Adam, keras.optimizers.Adam])
def test_a_schedule_costs_the_same_however_many_variables_there_are(cls):
    """The rate is computed once a step: so many more scalar operations, and no more for each variable."""
    added = {}
    for count in (1, 20):
        plain = size_of_step(cls(0.1), [], count)
        added[count] = [size_of_step(cls(0.1), make(), count) - plain for make in (
            lambda: [kc.CosineDecay()], lambda: [kc.CosineDecay(), kc.WarmUp(epochs=1)])]  # fmt: skip
    assert np.abs(np.subtract(added[20], added[1])).max() <= 2, added
    one, two = added[1]
    assert 0 < one < two < 250, added


def test_narrow_and_mixed_precision():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = weighing(kopt.SGD(RATE))
        monitor = kc.RateMonitor()
        weigh(model, [kc.CosineDecay(), monitor])
    finally:
        keras.config.set_dtype_policy(policy)
    assert isinstance(model.optimizer, Scaled)
    done = int(ops.convert_to_numpy(model.optimizer.inner_optimizer.iterations))
    near(monitor.history["learning_rate"], RATE * cosine(range(STEPS - done, STEPS), STEPS))


def test_very_many_epochs_do_not_overflow():
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == EPOCHS - 1

    model = weighing(keras.optimizers.SGD(RATE))
    near(weigh(model, [kc.CosineDecay(), Stop()], epochs=3 * 10**9)[0], np.full(STEPS, RATE))
    schedule = ks.CosineDecay(epochs=2**30)
    with pytest.raises(ValueError, match="more than the 2147483647 steps that can be counted"):
        weigh(model, [kc.Schedule("learning_rate", schedule)])


def test_where_floats_have_16_bits():
    floatx = keras.config.floatx()
    keras.config.set_floatx("bfloat16")
    try:
        model, monitor = weighing(keras.optimizers.SGD(RATE)), kc.RateMonitor()
        weigh(model, [kc.WarmUp(epochs=1), kc.CosineRestarts(cycle_epochs=2), monitor])
    finally:
        keras.config.set_floatx(floatx)
    t = np.arange(STEPS)
    np.testing.assert_allclose(
        monitor.history["learning_rate"], RATE * np.minimum(t / 5, 1) * cosine(t % 10, 10), atol=4e-3
    )
