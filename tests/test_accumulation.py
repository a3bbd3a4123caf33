"""`gradient_accumulation_steps`: one update for a window of steps, whatever happens within it."""

import contextlib

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
    equal,
    every_class,
    every_mode,
    every_row_in_every_mode,
    fit,
    near,
    network,
    numpy,
    run,
    state_of,
    train,
    two,
)


@every_row_in_every_mode
def test_accumulating_over_k_steps_equals_one_step_with_their_mean(row, mode):
    ours, theirs = two(), two()
    accumulating, plain = row.make(gradient_accumulation_steps=3), row.make()
    train(mode, accumulating, ours, PAIRS)
    means = [[np.mean([pair[i] for pair in PAIRS[at : at + 3]], 0) for i in range(2)] for at in (0, 3)]
    train(mode, plain, theirs, means)
    for a, b in zip(numpy(ours), numpy(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    for name, value in state_of(plain).items():
        np.testing.assert_allclose(state_of(accumulating)[name], value, rtol=2e-5, atol=1e-7, err_msg=name)
    assert int(accumulating.iterations) == 2
    before = numpy(ours)
    train(mode, accumulating, ours, PAIRS[:2])
    assert equal(ours, before)
    assert int(accumulating.readings["micro_step"]) == 2


@every_mode
def test_applied_updates_drive_schedules_and_averages(mode):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [1.0, 0.5, 0.25])  # 1.0 at 0, 0.5 at 1
    ones = [[np.ones((2, 3)), np.ones(3)]] * 6
    ours = two()
    optimizer = kopt.SGD(schedule, gradient_accumulation_steps=2, use_ema=True, ema_momentum=0.5)
    train(mode, optimizer, ours, ones)
    np.testing.assert_allclose(numpy(ours)[0], START - 1.75, rtol=1e-6)
    np.testing.assert_allclose(float(optimizer.learning_rate), 0.25)
    optimizer.finalize_variable_values(ours)
    average = ((START - 1.0) + (START - 1.5)) / 4 + (START - 1.75) / 2
    np.testing.assert_allclose(numpy(ours)[0], average, rtol=1e-6)


def with_missing(optimizer, variables, stream):
    for gradients in stream:
        gradients = [g if g is None else ops.convert_to_tensor(g) for g in gradients]
        missing = any(g is None for g in gradients)
        with pytest.warns(UserWarning, match="Gradients do not exist") if missing else contextlib.nullcontext():
            optimizer.apply(gradients, variables)


@every_class
def test_a_gradient_that_is_missing_at_times_is_in_the_mean_of_its_window(row):
    more = {"l2": 0.1, "weight_decay": 0.1}
    ours, theirs = two(), two()
    optimizer, plain = row.make(gradient_accumulation_steps=2, **more), row.make(**more)
    a, b = zip(*PAIRS, strict=True)
    rest = [[a[1], None], [a[2], None], [a[3], None], [a[4], None], [a[5], b[5]]]
    with_missing(optimizer, ours, [[a[0], b[0]], *rest])
    mean = [[(a[i] + a[i + 1]) / 2 for i in (0, 2, 4)], [b[0] / 2, None, b[5] / 2]]
    with_missing(plain, theirs, zip(*mean, strict=True))
    near(ours, theirs)

    for mode in MODES[1:]:
        compiled = two()
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            train(mode, row.make(gradient_accumulation_steps=2, **more), compiled, [[a[0], b[0]], *rest])
        near(compiled, ours)

    again, file = two(), {}  # and likewise when resumed in the middle of a window
    first, second = row.make(gradient_accumulation_steps=2, **more), row.make(gradient_accumulation_steps=2, **more)
    with_missing(first, again, [[a[0], b[0]]])
    first.save_own_variables(file)
    second.build(again)
    second.load_own_variables(file)
    with_missing(second, again, rest)
    assert equal(again, ours)


@every_class
@every_mode
def test_what_is_not_given_at_the_end_of_a_window_does_not_move(row, mode):
    """A layer that was frozen in the middle of a window, for instance."""
    if mode in ("jit", "stateless"):
        pytest.skip("the stateless form takes all variables")
    w, frozen = two()
    optimizer = row.make(gradient_accumulation_steps=2)
    optimizer.build([w, frozen])
    before = numpy([frozen])
    train("eager", optimizer, [w, frozen], PAIRS[:1])
    train(mode, optimizer, [w], [[g] for g, _ in PAIRS[1:4]])
    assert equal([frozen], before)
    assert int(optimizer.iterations) == 2


@every_class
def test_resumed_in_the_middle_of_a_window(row):
    more = {"gradient_accumulation_steps": 3, "nonfinite": "skip", "use_ema": True}
    whole, broken, again = two(), two(), two()
    one, first, second = (row.make(**more) for _ in range(3))
    train("eager", one, whole, PAIRS)
    train("eager", first, broken, PAIRS[:4])
    file = {}
    first.save_own_variables(file)
    for a, b in zip(again, broken, strict=True):
        a.assign(b)
    second.load_own_variables(file)
    train("eager", second, again, PAIRS[4:])
    assert equal(again, whole)
    assert equal(second.variables, one.variables)


def test_a_window_is_loaded_with_its_sums_or_not_at_all():
    def one(layer, gradient, file=None, **more):
        w = keras.Variable(np.zeros(1), dtype="float32", name=layer)
        optimizer = kopt.SGD(1.0, **more)
        optimizer.build([w])
        if file is not None:
            optimizer.load_own_variables(file)
        run(optimizer, w, stream=np.full((1, 1), gradient, "float32"))
        return optimizer, float(numpy([w])[0][0])

    for other in ({}, {"nonfinite": "skip"}):  # another name, other readings
        file = {}
        one("dense", 10, gradient_accumulation_steps=2)[0].save_own_variables(file)
        assert one("dense_1", 2, file, gradient_accumulation_steps=2, **other)[1] == -6
    file = {}
    one("dense", 1)[0].save_own_variables(file)  # no window: one that is under way is over
    optimizer, _ = one("dense", 100, gradient_accumulation_steps=2, nonfinite="skip")
    optimizer.load_own_variables(file)
    assert [int(optimizer.readings[name]) for name in ("micro_step", "skipped_steps")] == [0, 0]
    assert equal([optimizer.held(optimizer.trained[0]).sum], [[0]])


@every_class
def test_counts_and_sums_may_be_new_when_a_state_is_loaded(row):
    file, w = {}, two()
    optimizer = row.make()
    train("eager", optimizer, w, PAIRS)
    optimizer.save_own_variables(file)
    richer = row.make(nonfinite="raise", gradient_accumulation_steps=2, track_gradient_norm=True)
    richer.build(w)
    richer.load_own_variables(file)
    assert int(richer.iterations) == len(PAIRS)
    file.clear()
    richer.save_own_variables(file)
    optimizer.load_own_variables(file)


def test_steps_per_execution():
    if BACKEND == "torch":
        pytest.skip("Keras runs one step at a time on torch")
    more = {"nonfinite": "skip", "gradient_accumulation_steps": 2, "global_clipnorm": 0.1}
    models = [network(kopt.Adam(0.1, **more), steps_per_execution=n) for n in (1, 3)]
    models[1].set_weights(models[0].get_weights())
    for model in models:
        fit(model, epochs=4)
        assert int(model.optimizer.iterations) == 6
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
