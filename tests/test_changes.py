"""What changes while training runs: every number of a rule, and the learning rate."""

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from kopt.optimizers import execution
from tests.conftest import BACKEND
from tests.training import START, STREAM, AtEpoch, X, Y, equal, every_row, every_row_in, network, numpy, run

COMPILED = {  # the ways in which fit runs a step, and which of them trace it
    "tensorflow": [{"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}],
    "jax": [{"jit_compile": True}, {"run_eagerly": True}],
    "torch": [{}],
}[BACKEND]


@every_row_in("compiled", COMPILED)
def test_numbers_change_in_mid_fit_without_a_new_trace(row, compiled, monkeypatch):
    traced, plain = [], execution.plain
    monkeypatch.setattr(execution, "plain", lambda *a: traced.append(1) or plain(*a))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    decays = {"l2": 0.01, "weight_decay": 0.02}
    model.compile(row.make(**decays), loss=lambda y, output: ops.mean(output), **compiled)  # gradient: the mean input
    model.set_weights([np.ones((3, 1))])
    changes = {"learning_rate": 0.05, "l2": 0.1, "weight_decay": 0.2, **row.changes}
    calls = []

    def change(model):
        calls.append(len(traced))
        for name, value in changes.items():
            setattr(model.optimizer, name, value)

    x = np.tile(np.array([[1.0, -2.0, 0.5]], "float32"), (4, 1))
    model.fit(x, np.zeros(4), batch_size=2, epochs=4, verbose=0, callbacks=[AtEpoch(2, change)])

    w, state, moved = np.ones(3), {}, 0.0
    for t in range(1, 9):
        step = row.oracle(w, x[0].astype("float64"), state, t, **row.hypers(**(decays | changes if t > 4 else decays)))
        w, moved = w + step, moved + np.abs(step).max()
    np.testing.assert_allclose(numpy(model.trainable_variables)[0].ravel(), w, rtol=1e-6, atol=2e-5 * moved)
    assert {name: getattr(model.optimizer, name) for name in row.changes} == row.changes
    if "jit_compile" in compiled:  # else every step runs from Python
        assert calls == [len(traced)]


@every_row
def test_numbers_are_judged_when_assigned(row):
    optimizer = row.make()
    run(optimizer, keras.Variable(START))
    for name in row.changes:
        before = getattr(optimizer, name)
        for value in (-1.0, "0.5", None, float("nan"), True):
            with pytest.raises(ValueError, match=rf"`{name}` .*Received: {name}="):
                setattr(optimizer, name, value)
        assert getattr(optimizer, name) == before
    for value in (-1.0, "0.5", None, float("nan")):
        with pytest.raises(ValueError, match=r"`learning_rate` .*Received: learning_rate="):
            optimizer.learning_rate = value


@every_row
def test_choices_are_fixed_by_build(row):
    optimizer = row.make()
    for name, value in row.fixed.items():
        setattr(optimizer, name, value)
        setattr(optimizer, name, row.make().get_config()[name])
    run(optimizer, keras.Variable(START))
    for name, value in row.fixed.items():
        with pytest.raises(ValueError, match=rf"`{name}` must be as it was at build.*Received: {name}="):
            setattr(optimizer, name, value)


def test_numbers_can_be_read_and_set_inside_a_train_step():
    seen = []

    class Warming(keras.Sequential):
        def train_step(self, *args, **kwargs):
            seen.append((self.optimizer.beta_1, repr(self.optimizer)))
            if BACKEND == "tensorflow":  # on JAX an assignment cannot leave the compiled step
                self.optimizer.learning_rate = 0.5 * ops.cast(self.optimizer.iterations + 1, "float32")
                self.optimizer.beta_2 = ops.cast(0.5, "float32")
            return super().train_step(*args, **kwargs)

    model = Warming([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile(kopt.Adam(0.1, beta_1=0.8), loss="mse")
    model.fit(X, Y, batch_size=8, verbose=0)
    assert seen[0][0] == 0.8
    if BACKEND == "tensorflow":
        assert (float(model.optimizer.learning_rate), model.optimizer.beta_2) == (1.5, 0.5)


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX takes the variables away while fit runs")
def test_an_assignment_that_jax_would_lose_is_refused():
    model, optimizer = network(kopt.Adam(0.1)), None
    optimizer = model.optimizer

    class Cached(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            assert optimizer.beta_1 == 0.9
            for name in ("beta_1", "learning_rate"):
                with pytest.raises(ValueError, match=f"`{name}` must be assigned through `self.model.optimizer`"):
                    setattr(optimizer, name, 0.5)
            self.model.optimizer.beta_2 = 0.5

    model.fit(X, Y, batch_size=8, verbose=0, callbacks=[Cached()])
    assert (optimizer.beta_1, optimizer.beta_2) == (0.9, 0.5)


def test_numbers_without_state_stay_as_they_are():
    optimizer = kopt.SGD()
    optimizer.momentum = 0.9  # before build the slot can still be made
    optimizer.momentum = 0.0
    optimizer.build([keras.Variable(START)])
    with pytest.raises(ValueError, match="`momentum` must be 0, as it was at build.*Received: momentum=0.9$"):
        optimizer.momentum = 0.9
    with pytest.raises(ValueError, match="`l2` must stay None, as it was at the start.* Received: l2=0.1$"):
        optimizer.l2 = 0.1
    with pytest.raises(ValueError, match="`weight_decay` must stay a number.* Received: weight_decay=None$"):
        kopt.AdamW().weight_decay = None
    optimizer = kopt.SGD(momentum=0.9)
    optimizer.build([keras.Variable(START)])
    optimizer.momentum = 0.0
    again, w = kopt.SGD.from_config(optimizer.get_config()), keras.Variable(START)
    again.build([w])
    again.set_weights(numpy(optimizer.variables))  # the slot is there, and the state holds the number in use
    assert optimizer.momentum == again.momentum == 0.0


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.1 * 0.5 ** ops.cast(step, "float32")

    def get_config(self):
        return {}


@every_row
def test_learning_rate_of_every_kind(row):
    expected = run(row.make(learning_rate=1.0), keras.Variable(START))
    constant = keras.optimizers.schedules.PiecewiseConstantDecay([10], [1.0, 0.1])
    for rate in (1, np.float32(1), np.int64(1), np.array(1.0), keras.Variable(1.0), constant, lambda: 1.0):
        assert equal(run(row.make(learning_rate=rate), keras.Variable(START)), expected), rate

    w, state, scheduled = START.astype("float64"), {}, keras.Variable(START)
    for t, g in enumerate(STREAM, 1):
        w = w + row.oracle(w, g.astype("float64"), state, t, **row.hypers(learning_rate=0.1 * 0.5 ** (t - 1)))
    np.testing.assert_allclose(run(row.make(learning_rate=Halving()), scheduled)[0], w, rtol=2e-5, atol=1e-6)


def test_learning_rate_can_be_replaced_by_its_own_kind_only():
    constant = keras.optimizers.schedules.PiecewiseConstantDecay([10], [1.0, 0.1])
    for start, others in {
        0.1: [constant, lambda: 0.1],
        Halving(): [0.2, constant],
        (lambda: 0.1): [0.2, constant],
    }.items():
        optimizer = kopt.SGD(start)
        optimizer.build([keras.Variable(START)])
        for other in others:
            with pytest.raises(ValueError, match=r"^`learning_rate` must be .* at build. Received: learning_rate="):
                optimizer.learning_rate = other
    optimizer = kopt.SGD(0.1)
    optimizer.learning_rate = constant  # nothing is compiled yet
    assert float(optimizer.learning_rate) == 1.0
