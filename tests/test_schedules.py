"""Schedules as formulas: against oracles and other libraries, in numbers and compiled tensors, alone and combined."""

import copy
import json
import math

import keras
import numpy as np
import pytest
from keras import ops

import kopt
import kopt.schedules as ks
from kopt.schedules.time import Time
from tests import oracles
from tests.catalog import BATCHES, SCHEDULES, STEPS
from tests.conftest import BACKEND, FLOATX

every_schedule = pytest.mark.parametrize("row", SCHEDULES, ids=str)
LAST = 2**31 - 1
EXACT = 1e-12
ROUNDED = 1e-12 if FLOATX == "float64" else 2e-6


EXPRESSIONS = [
    "WarmUp(epochs=2) >> CosineDecay()",
    "0.5 * CosineDecay(final=0.1, steps=100, initial=0.2)",
    "WarmUp(steps=5) * CosineDecay() * StepDecay(factor=0.1, every_epochs=30)",
    "(WarmUp(steps=5) >> Linear(steps=20)).repeat(3).offset(epochs=1)",
    "(WarmUp(epochs=1) >> Constant().lasting(epochs=0.5) >> PolynomialDecay()) * Constant(initial=0.1)",
    "2.0 * (0.5 * Linear(end=0.1)).lasting(epochs=3)",
    "Staircase(boundaries=[1, 3], factors=[0.5, 0.1]) * CyclicalRate(max_learning_rate=1.0, cycle_epochs=2)",
    *[repr(row.make()) for row in SCHEDULES],
]


def numbers(schedule, steps, total=STEPS, batches=BATCHES, base=1.0):
    """The values in NumPy."""
    steps = np.asarray(steps, "int64")
    return np.broadcast_to(schedule.value(Time.of_steps(steps, total, batches), base), steps.shape)


def borders(row):
    around = {step + d for step in (*row.borders, STEPS) for d in (-1, 0, 1)}
    return sorted({0, 1, *around, 3 * STEPS, 2**24 + 1, LAST})


@every_schedule
def test_values_are_those_of_the_oracle(row):
    steps = borders(row)
    np.testing.assert_allclose(numbers(row.make(), steps), row.values(steps, STEPS), rtol=EXACT, atol=1e-15)


@every_schedule
def test_values_are_those_of_other_libraries(row):
    if row.reference is None:
        assert row.without, f"{row} does not say why it has no reference"
        pytest.skip(row.without)
    theirs = row.reference(STEPS + 1)
    np.testing.assert_allclose(numbers(row.make(), range(STEPS + 1)), theirs, rtol=3e-6, atol=3e-7)


def traced(schedule):
    """The schedule as a function of a tensor of int32, compiled where the backend compiles."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        function = tf.function(schedule, jit_compile=True)
        return lambda step: function(tf.constant(step, "int32"))
    if BACKEND == "jax":
        import jax

        def stateless(clock, step):
            with keras.StatelessScope([] if clock is None else [(schedule.clock, clock)]):
                return schedule(step)

        function = jax.jit(stateless)
        return lambda step: function(
            None if schedule.clock is None else schedule.clock.value, ops.convert_to_tensor(step, "int32")
        )
    return lambda step: schedule(ops.convert_to_tensor(step, "int32"))


@every_schedule
def test_a_compiled_tensor_gives_the_same(row):
    schedule = row.by_itself()
    function = traced(schedule)
    steps = borders(row)
    compiled, eager = followed(schedule, function, steps)
    expected = row.values(steps, STEPS)
    np.testing.assert_allclose(compiled, expected, rtol=ROUNDED, atol=2e-7)
    np.testing.assert_allclose(eager, expected, rtol=ROUNDED, atol=2e-7)


def followed(schedule, function, steps):
    """The values at these steps, compiled and not, as a fit tells it the time if it has to."""
    if schedule.needs_clock():
        schedule.clock = keras.Variable(np.zeros(8), dtype="int32", trainable=False)
    values = []
    for step in steps:
        if schedule.clock is not None:
            epoch = step // BATCHES
            begun = epoch * BATCHES
            schedule.clock.assign(np.array([0, epoch, begun, begun, BATCHES, 1, STEPS, 0], "int32"))
        values.append((float(function(step)), float(schedule(step))))
    return np.array(values).T


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_compiled_expression_gives_the_same(text):
    schedule = eval(text.replace("CyclicalRate(", "CyclicalRate(initial=0.5, "), vars(ks).copy())
    schedule = schedule if schedule.stands_alone else schedule * ks.Constant(initial=1.0)
    steps = [*range(STEPS + 2), 3 * STEPS, 10**6]
    expected = numbers(schedule, steps)
    for values in followed(schedule, traced(schedule), steps):
        np.testing.assert_allclose(values, expected, rtol=ROUNDED, atol=2e-7)


def test_positions_in_cycles_are_integers():
    """float32 cannot tell 2**24 + 1 from 2**24; a step counter goes to 2**31."""
    schedule = traced(ks.CosineRestarts(cycle_steps=3, initial=1.0))
    for step in (2**24 + 1, 2**30 + 1, LAST):
        assert float(schedule(step)) == pytest.approx(oracles.cosine(step % 3, 0, 3, 0.0), abs=1e-6)
    grown = traced(ks.CosineRestarts(cycle_steps=1000, growth=2, initial=1.0))
    begun = 1000 * (2**21 - 1)  # of the 22nd cycle
    assert float(grown(begun - 1)) < 1e-6
    assert float(grown(begun)) == 1.0


def test_time_does_not_go_beyond_its_end():
    offset = ks.CosineDecay(steps=8, initial=1.0).offset(steps=3)
    assert float(traced(offset)(LAST)) == pytest.approx(0.0, abs=1e-7)


class TestAlgebra:
    warm, cosine = ks.WarmUp(steps=4), ks.CosineDecay(steps=8)

    def test_a_product_multiplies(self):
        both = self.warm * self.cosine
        np.testing.assert_array_equal(both.preview(12), self.warm.preview(12) * self.cosine.preview(12))
        np.testing.assert_array_equal((0.1 * self.cosine).preview(9), 0.1 * self.cosine.preview(9))
        np.testing.assert_array_equal((self.cosine * 0.1).preview(9), self.cosine.preview(9) * 0.1)

    def test_what_follows_begins_at_its_beginning(self):
        joined = self.warm >> self.cosine
        expected = [*self.warm.preview(4), *self.cosine.preview(9)]
        np.testing.assert_array_equal(joined.preview(13), expected)
        three = self.cosine >> self.warm >> ks.Constant(0.5)
        np.testing.assert_array_equal(three.preview(13), [*self.cosine.preview(8), *self.warm.preview(4), 0.5])

    def test_by_epochs_and_in_mixed_units(self):
        joined = ks.WarmUp(epochs=1) >> ks.StepDecay(0.5, every_epochs=1).lasting(steps=10) >> ks.Constant(2.0)
        values = joined.preview(18, steps_per_epoch=5)
        np.testing.assert_allclose(values, [0, 0.2, 0.4, 0.6, 0.8, *[1.0] * 5, *[0.5] * 5, 2, 2, 2], atol=1e-15)

    def test_nothing_is_left_for_an_open_end(self):
        np.testing.assert_array_equal((self.warm >> ks.CosineDecay()).preview(4), self.warm.preview(4))

    def test_an_open_end_is_as_long_as_what_is_left(self):
        joined = self.warm >> ks.CosineDecay()
        np.testing.assert_allclose(joined.preview(12)[4:], ks.CosineDecay(steps=8).preview(8))
        open_first = ks.CosineDecay().lasting(epochs=2) >> ks.Linear()
        values = open_first.preview(20, steps_per_epoch=5)
        np.testing.assert_allclose(values[:10], ks.CosineDecay(steps=10).preview(10))
        np.testing.assert_allclose(values[10:], ks.Linear(steps=10).preview(10))

    def test_repeated(self):
        again = ks.Linear(steps=3).repeat()
        np.testing.assert_allclose(again.preview(7), [1, 2 / 3, 1 / 3] * 2 + [1])
        twice = ks.Linear(epochs=1).repeat(2)
        np.testing.assert_allclose(twice.preview(8, steps_per_epoch=3), [1, 2 / 3, 1 / 3, 1, 2 / 3, 1 / 3, 0, 0])
        whole = (self.warm >> ks.Linear(steps=4)).repeat(2) >> ks.Constant(3.0)
        np.testing.assert_allclose(whole.preview(18)[:8], whole.preview(18)[8:16])
        assert whole.preview(18)[16:].tolist() == [3.0, 3.0]
        stays = ks.ExponentialDecay(base=0.5, unit_steps=1).lasting(steps=2).repeat(2)
        assert stays.preview(7).tolist() == [1, 0.5, 1, 0.5, 0.25, 0.25, 0.25]

    def test_offset(self):
        np.testing.assert_allclose(self.cosine.offset(steps=3).preview(6), self.cosine.preview(9)[3:])
        late = ks.InverseTimeDecay().offset(epochs=2).preview(4, steps_per_epoch=2)
        np.testing.assert_allclose(late, ks.InverseTimeDecay().preview(8, steps_per_epoch=2)[4:])

    def test_against_joined_schedules_of_optax(self):
        optax = pytest.importorskip("optax", reason="optax comes with the extra `jax`")
        ours = ks.WarmUp(steps=5) >> ks.CosineDecay(0.1, steps=20, initial=0.3)
        theirs = optax.warmup_cosine_decay_schedule(0.0, 0.3, 5, 25, 0.03)
        np.testing.assert_allclose(ours.preview(30), [float(theirs(t)) for t in range(30)], atol=1e-7)

    def test_a_value_in_a_sequence_is_that_of_its_factors(self):
        joined = self.warm >> ks.CosineDecay(steps=4, initial=0.2)
        assert not joined.is_factor
        np.testing.assert_allclose(joined.preview(8)[:4], 0.2 * self.warm.preview(4))
        assert float(joined(4)) == pytest.approx(0.2)

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: ks.CosineDecay() >> ks.Constant(), "with a length, such as `.lasting(epochs=5)`"),
            (lambda: ks.ExponentialDecay() >> ks.Constant(), "with a length"),
            (lambda: ks.CosineDecay().repeat(), "with a length"),
            (lambda: ks.Linear(initial=0.1) * ks.Linear(initial=0.2), "only one can have a value of its own"),
            (
                lambda: ks.WarmUp(steps=2) >> ks.Linear(steps=1, initial=0.1) >> ks.Linear(initial=0.2),
                "each needs its own",
            ),
            (lambda: ks.Linear() * "a", "Received: factor='a'"),
            (lambda: -1 * ks.Linear(), "Received: factor=-1"),
            (lambda: ks.Linear() >> 0.1, "`schedule` must be one of kopt's"),
            (lambda: ks.Linear() * keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5), "one of kopt's"),
            (lambda: ks.WarmUp(epochs=2) * ks.StepDecay() >> ks.Constant(), "with a length"),
            (lambda: ks.WarmUpStableDecay(warmup_steps=4, decay_steps=4, steps=6), "up and down together, steps=8"),
            (lambda: ks.CyclicalRate(0.1, cycle_steps=2).preview(4), "the lowest value, which is 1"),
            (lambda: ks.Linear(steps=2).repeat(0), "Received: times=0"),
            (lambda: ks.Linear().offset(), "`epochs` must be given, or `steps`"),
            (lambda: ks.Linear().lasting(epochs=1, steps=2), "None beside `epochs`"),
        ],
    )
    def test_what_cannot_be_combined_says_so(self, make, says):
        with pytest.raises(ValueError, match="(?s).*Received: ") as error:
            make()
        assert says in str(error.value)


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_expression_prints_as_itself_and_comes_back_from_its_config(text):
    schedule = eval(text, vars(ks).copy())
    again = eval(repr(schedule), vars(ks).copy())
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert schedule != ks.Constant(0.123)
    config = json.loads(json.dumps(keras.optimizers.schedules.serialize(schedule)))
    revived = keras.optimizers.schedules.deserialize(config)
    assert revived == schedule
    assert repr(revived) == repr(schedule)
    np.testing.assert_array_equal(revived.preview(50, steps_per_epoch=5), schedule.preview(50, steps_per_epoch=5))
    assert copy.deepcopy(schedule) == schedule


def test_it_prints_with_as_few_brackets_as_needed():
    for text in EXPRESSIONS[:2]:
        assert repr(eval(text, vars(ks).copy())) == text
    assert repr((ks.WarmUp(steps=1) >> ks.Linear()) * 2) == "(WarmUp(steps=1) >> Linear()) * Constant(factor=2.0)"


@every_schedule
def test_a_factor_is_no_learning_rate(row):
    schedule = row.make()
    with pytest.raises(ValueError, match=r"with `initial=`. Received: learning_rate=") as error:
        kopt.Adam(schedule)
    assert type(schedule).__name__ in str(error.value)
    optimizer = keras.optimizers.SGD(schedule)
    with pytest.raises(ValueError, match=r"add `initial=` to .*kopt\.callbacks"):
        _ = optimizer.learning_rate


@every_schedule
def test_an_optimizer_takes_it_and_its_config_brings_it_back(row):
    for cls in (kopt.SGD, keras.optimizers.SGD):
        optimizer = cls(row.by_itself(0.5))
        config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
        again = keras.optimizers.deserialize(config)
        assert again._learning_rate == row.by_itself(0.5)
        if not (row.counts_epochs or row.is_open):
            assert float(again.learning_rate) == pytest.approx(numbers(row.by_itself(0.5), [0])[0], rel=1e-6)


@every_schedule
def test_what_is_not_told_is_asked_for(row):
    schedule = row.by_itself()
    if row.counts_epochs or row.is_open:
        assert schedule.needs_clock()
        with pytest.raises(ValueError, match=r"cannot say its value.*`steps=`.*any callback of kopt"):
            schedule(0)
    else:
        assert not schedule.needs_clock()
        assert float(schedule(0)) == pytest.approx(row.values([0], STEPS)[0])
    if row.counts_epochs:
        with pytest.raises(ValueError, match="give `steps_per_epoch`, too"):
            schedule.preview(10)


def test_preview_and_sparkline():
    schedule = ks.WarmUp(steps=30) >> ks.CosineDecay()
    assert schedule.preview(100, base=0.1).max() == pytest.approx(0.1)
    line = schedule.sparkline(100, width=20)
    assert line[0] == "▁"
    assert line[6] == "█"
    assert line.endswith("  0 to 1")
    assert len(line.split()[0]) == 20
    assert ks.Constant().sparkline(5) == "▁▁▁▁▁  1 to 1"
    for bad in ({"steps": 0}, {"steps": 1.5}, {"steps": 3, "width": 1}, {"steps": 3, "base": math.nan}):
        with pytest.raises(ValueError, match="Received: "):
            schedule.sparkline(**bad)


def test_a_schedule_of_ones_own():
    class Half(ks.Schedule):
        def __init__(self, share=0.5, *, initial=None):
            self.share, self.initial = share, initial

        def formula(self, time):
            return self.share * (1 + 0 * time.steps)

    assert (ks.WarmUp(steps=2) * Half()).preview(3).tolist() == [0.0, 0.25, 0.5]
    assert repr(Half(0.2)) == "Half(share=0.2)"
    assert float(Half(initial=4.0)(1)) == 2.0

    class Inverse(ks.Schedule):
        def formula(self, time):
            return 1 / (1 + time.units(unit_steps=1))

    assert repr(2 * Inverse()) == "2.0 * Inverse()"
    assert Inverse() == Inverse()
    assert Inverse().get_config() == {}
    both = Inverse() * ks.Constant(initial=1.0)
    assert float(traced(both)(3)) == both.preview(4)[3] == 0.25
    with pytest.raises(NotImplementedError, match="must give a `formula`"):
        ks.Schedule().preview(1)
