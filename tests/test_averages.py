"""`use_ema`: the moving average of the weights."""

import keras
import numpy as np
import pytest

import kopt
from tests.training import (
    PAIRS,
    START,
    equal,
    every_class,
    every_mode,
    near,
    numpy,
    run,
    spoilt,
    train,
    two,
)


@every_mode
def test_the_average_is_of_the_weights_that_satisfy_the_constraint(mode):
    w = keras.Variable(START)
    w.constraint = keras.constraints.NonNeg()
    optimizer = kopt.SGD(1.0, use_ema=True, ema_momentum=0.5)
    train(mode, optimizer, [w], [[np.full((2, 3), 10.0)]] * 3)
    optimizer.finalize_variable_values([w])
    assert equal([w], [START * 0])


@every_class
def test_a_bfloat16_average_does_not_stand_still(row):
    w = keras.Variable(np.ones(4), dtype="bfloat16")
    optimizer = row.make(learning_rate=0.0, use_ema=True, ema_momentum=0.999)
    run(optimizer, w, stream=np.zeros((1, 4), "float32"))
    w.assign(np.full(4, 2.0))
    run(optimizer, w, stream=np.zeros((200, 4), "float32"))
    average = next(v for v in optimizer.variables if optimizer.named.get(id(v), "")[:1] == ("average",))
    np.testing.assert_allclose(numpy([average])[0], 2 - 0.999**200, rtol=1e-5)


@every_class
@every_mode
def test_an_average_of_what_has_no_gradient_is_the_weight(row, mode):
    for second in (None, PAIRS[1][1] * 0):
        ours = two()
        optimizer = row.make(use_ema=True, ema_momentum=0.5, **({"weight_decay": None} if row.arguments else {}))
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            train(mode, optimizer, ours, [[PAIRS[0][0], None], [PAIRS[1][0], second]])
        weight = numpy(ours[1:])
        optimizer.finalize_variable_values(ours)
        near(ours[1:], weight, tolerance=1e-6)


@every_class
@every_mode
def test_no_update_leaves_no_average(row, mode):
    bad = [spoilt(pair, np.nan, 0) for pair in PAIRS]
    for more, stream in (({"nonfinite": "skip"}, bad), ({"gradient_accumulation_steps": 10}, PAIRS)):
        ours = two()
        optimizer = row.make(use_ema=True, ema_overwrite_frequency=1, **more)
        train(mode, optimizer, ours, stream)
        optimizer.finalize_variable_values(ours)
        assert equal(ours, two())


def test_a_state_without_averages_is_not_taken_for_one_with():
    file = {}
    w = keras.Variable(np.ones(1), dtype="float32")
    first, second = kopt.SGD(0.0), kopt.SGD(0.0, use_ema=True)
    run(first, w, stream=np.ones((3, 1), "float32"))
    first.save_own_variables(file)
    second.load_own_variables(file)
    with pytest.warns(UserWarning, match="average:.* is not in the file.* Training starts afresh"):
        second.build([w])
    run(second, w, stream=np.ones((3, 1), "float32"))
    second.finalize_variable_values([w])
    assert equal([w], [[1]])
