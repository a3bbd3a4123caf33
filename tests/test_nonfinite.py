"""`nonfinite`: what is left out, what is raised, and that nothing else is touched."""

import contextlib
import functools

import keras
import numpy as np
import pytest

import kopt
from tests.conftest import BACKEND
from tests.training import (
    MODES,
    PAIRS,
    X,
    Y,
    equal,
    every_class,
    every_mode,
    every_row_in_every_mode,
    fit,
    network,
    numpy,
    same,
    spoilt,
    state_of,
    train,
    two,
)

BAD = {"NaN": np.nan, "infinity": -np.inf, "overflow": 1e20}  # 1e20 squared is not finite in float32


def with_bad(row, pairs):
    """The stream with bad gradients put in at chosen places, one or two at a time."""
    kinds = [value for name, value in BAD.items() if name != "overflow" or row.cls.squares]
    stream = [spoilt(pairs[0], kinds[0], 0), *pairs]
    stream[3:3] = [spoilt(pairs[1], kinds[-1], 1), spoilt(pairs[2], kinds[1], 0)]
    return [*stream, spoilt(spoilt(pairs[0], kinds[0], 0), kinds[1], 1)]


def left_no_trace(row, mode, stream, **more):
    """Train with a stream in which something is bad, and with the good one; all but the count must be equal."""
    ours, theirs, optimizer, clean = two(), two(), row.make(**more), row.make(**more)
    train(mode, optimizer, ours, stream)
    train(mode, clean, theirs, PAIRS)
    assert same(state_of(optimizer, *ours, but=["skipped_steps"]), state_of(clean, *theirs, but=["skipped_steps"]))
    assert int(clean.skipped_steps) == 0
    return optimizer


@every_row_in_every_mode
def test_a_skipped_step_is_as_if_it_had_not_been(row, mode):
    more = {"nonfinite": "skip", "use_ema": True, "ema_overwrite_frequency": 2, "track_gradient_norm": True}
    optimizer = left_no_trace(row, mode, with_bad(row, PAIRS), **more)
    assert int(optimizer.skipped_steps) == 4
    assert int(optimizer.iterations) == len(PAIRS)


@every_row_in_every_mode
def test_a_bad_gradient_drops_its_window_of_accumulation(row, mode):
    stream = [*PAIRS[:2], spoilt(PAIRS[0], np.inf, 1), PAIRS[1], *PAIRS[2:]]
    optimizer = left_no_trace(row, mode, stream, nonfinite="skip", gradient_accumulation_steps=2)
    assert int(optimizer.skipped_steps) == 1
    assert int(optimizer.iterations) == 3


@every_class
@every_mode
@pytest.mark.parametrize("steps", [None, pytest.param(2, marks=pytest.mark.slow)], ids=["", "accumulating"])
def test_a_bad_gradient_is_raised_and_stops_what_is_compiled(row, mode, steps):
    ours, theirs, size = two(), two(), steps or 1
    more = {"nonfinite": "raise", "gradient_accumulation_steps": steps}
    optimizer, clean = row.make(**more), row.make(**more)
    at_once = FloatingPointError if mode == "eager" else None
    if mode == "graph":
        import tensorflow as tf

        at_once = tf.errors.InvalidArgumentError
    stream = [pair for pair in PAIRS for _ in range(size)]
    good, rest = stream[: 2 * size], stream[2 * size :]
    bad = [spoilt(PAIRS[2], np.nan, 1)] * size
    raised = pytest.raises(at_once, match=f"gradient of `{ours[1].path}`") if at_once else contextlib.nullcontext()
    with raised:
        train(mode, optimizer, ours, [*good, *bad, *rest[:size]])
    if at_once is None:
        with pytest.raises(FloatingPointError, match=f"^The gradient of `{ours[1].path}` .*not finite at update 3; "):
            optimizer.finalize_variable_values(ours)
    optimizer.raise_nonfinite()  # once
    train(mode, clean, theirs, good)
    noted = ["skipped_steps", "nonfinite_step", "nonfinite_variable"]
    sums = [v.name for v in optimizer.variables if optimizer.named.get(id(v), "")[:1] == ("gradient_sum",)]
    but = [*noted, *sums]
    assert same(state_of(optimizer, *ours, but=but), state_of(clean, *theirs, but=but))
    assert [int(optimizer.readings[name]) for name in noted] == [1, 3, 1]
    train(mode, optimizer, ours, rest)  # and it can go on
    train(mode, clean, theirs, rest)
    assert same(state_of(optimizer, *ours, but=noted), state_of(clean, *theirs, but=noted))


@every_class
def test_an_error_that_waits_stays_out_of_files(row):
    ours, file = two(), {}
    optimizer = row.make(nonfinite="raise")
    train(MODES[-1], optimizer, ours, PAIRS)
    optimizer.readings["nonfinite_waiting"].assign(1)
    optimizer.save_own_variables(file)
    for build in (True, False):
        loaded = row.make(nonfinite="raise")
        if build:
            loaded.build(ours)
            loaded.readings["nonfinite_waiting"].assign(1)
        loaded.load_own_variables(file)
        train(MODES[-1], loaded, ours, PAIRS[:1])
        assert int(loaded.iterations) == len(PAIRS) + 1


@pytest.mark.parametrize("compiled", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}], ids=str)
def test_in_fit(compiled):
    """Four batches of which the third is bad: skipped, dropped with its window, raised."""
    if BACKEND == "torch" and compiled == {"jit_compile": True}:
        pytest.skip("torch.compile needs a C++ compiler and half a minute")
    spoilt_x = X.copy()
    spoilt_x[17] = np.nan
    x = np.concatenate([spoilt_x, X[:8]])
    y = np.concatenate([Y, Y[:8]])
    train = functools.partial(keras.Model.fit, x=x, y=y, batch_size=8, shuffle=False, verbose=0)

    model = network(kopt.Adam(0.1, nonfinite="skip"), **compiled)
    twin = network(kopt.Adam(0.1), **compiled)
    twin.set_weights(model.get_weights())
    train(model)
    twin.fit(np.delete(x, slice(16, 24), 0), np.delete(y, slice(16, 24), 0), batch_size=8, shuffle=False, verbose=0)
    assert (int(model.optimizer.skipped_steps), int(model.optimizer.iterations)) == (1, 3)
    assert equal(model.variables[:4], twin.variables[:4])

    model = network(kopt.Adam(0.1, nonfinite="skip", gradient_accumulation_steps=2), **compiled)
    train(model)
    assert (int(model.optimizer.skipped_steps), int(model.optimizer.iterations)) == (1, 1)
    assert np.isfinite(np.concatenate([w.ravel() for w in model.get_weights()])).all()

    model = network(kopt.Adam(0.1, nonfinite="raise", use_ema=True), **compiled)
    twin = network(kopt.Adam(0.1), **compiled)
    twin.set_weights(model.get_weights())
    with pytest.raises(Exception, match="The gradient of `.*body/kernel` or its square is not finite"):
        train(model, epochs=2)
    twin.fit(x[:16], y[:16], batch_size=8, shuffle=False, verbose=0)
    assert equal(model.variables[:4], twin.variables[:4])  # and not replaced by the averages


@pytest.mark.parametrize("compiled", [{"jit_compile": False}, {"jit_compile": True}], ids=str)
def test_raised_when_an_epoch_ends(compiled):
    """As the README says: for steps that cannot raise."""
    if BACKEND == "torch":
        pytest.skip("in torch's fit every step raises at once")
    x, epochs = X.copy(), []
    x[1] = np.nan
    model = network(kopt.SGD(0.1, nonfinite="raise"), **compiled)
    before = numpy(model.variables)
    raising = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: epochs.append(epoch),
        on_epoch_end=lambda epoch, logs: model.optimizer.raise_nonfinite(),
    )
    with pytest.raises(Exception, match="The gradient of `.*body/kernel` is not finite"):
        model.fit(x, Y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=[raising])
    assert epochs == [0]
    assert equal(model.variables, before)
    fit(model)  # and it can go on
    assert int(model.optimizer.iterations) == 3
