"""Gradients of chosen rows, which only TensorFlow has: they equal dense ones, under every condition."""

import functools

import keras
import numpy as np
import pytest

import kopt
from tests.catalog import CLASSES, OPTIMIZERS
from tests.conftest import BACKEND
from tests.training import (
    CLIPS,
    START,
    STREAM,
    equal,
    numpy,
    train,
)

INDICES = [1, 0, 1]  # rows that repeat


ROW_CONDITIONS = [
    *CLIPS,
    {"nonfinite": "skip"},
    {"gradient_accumulation_steps": 2},
    {"loss_scale_factor": 4.0},
    {"use_ema": True, "track_gradient_norm": True},
]


RUNS = [(row, [{}]) for row in OPTIMIZERS] + [(row, ROW_CONDITIONS) for row in CLASSES]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has gradients of chosen rows")
@pytest.mark.parametrize(("row", "conditions"), RUNS, ids=[f"{row}-{len(conditions)}" for row, conditions in RUNS])
@pytest.mark.parametrize("jit", [None, False, True], ids=["eager", "graph", "xla"])
def test_rows_that_repeat_equal_a_dense_gradient(row, conditions, jit):
    import tensorflow as tf

    for more in conditions:
        dense, sparse = keras.Variable(START), keras.Variable(START)
        one, two = row.make(**more), row.make(**more)
        train("eager", one, [dense], [[np.stack([g[1], g[0] + g[0] * 2])] for g in STREAM])
        two.build([sparse])

        def step(optimizer, variable, values):
            optimizer.apply([tf.IndexedSlices(values, tf.constant(INDICES), (2, 3))], [variable])

        step = functools.partial(step, two, sparse)
        step = step if jit is None else tf.function(step, jit_compile=jit)
        for g in STREAM:
            step(tf.constant([g[0], g[1], g[0] * 2]))
        np.testing.assert_allclose(numpy([sparse])[0], numpy([dense])[0], rtol=1e-5, atol=1e-6, err_msg=str(more))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has gradients of chosen rows")
def test_the_sum_of_rows_is_what_is_judged_and_clipped():
    import tensorflow as tf

    w = keras.Variable(np.zeros((3, 2), "float32"))
    rows = tf.IndexedSlices(tf.fill((2, 2), 3e38), tf.constant([1, 1]), None)  # finite, but not their sum
    optimizer = kopt.SGD(1.0, nonfinite="skip")
    optimizer.apply([rows], [w])
    assert int(optimizer.skipped_steps) == 1
    for values, indices in (([[3.0, 4.0], [-3.0, -4.0]], [2, 2]), (np.zeros((0, 2), "float32"), np.zeros(0, "int32"))):
        kopt.SGD(1.0, clipnorm=1.0).apply([tf.IndexedSlices(tf.constant(values), tf.constant(indices), (3, 2))], [w])
        assert not numpy([w])[0].any()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has gradients of chosen rows")
@pytest.mark.parametrize("more", [*CLIPS, {"track_gradient_norm": True}, {"nonfinite": "skip"}], ids=str)
def test_rows_of_which_there_are_not_always_as_many(more):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(10, 3), layers.Flatten()])
    model.compile(kopt.Adam(0.1, **more), loss="mse", jit_compile=False)
    before = numpy(model.variables)
    model.fit(np.arange(21).reshape(7, 3) % 10, np.zeros((7, 9)), batch_size=3, verbose=0)
    assert not equal(model.variables, before)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has gradients of chosen rows")
def test_distinct_rows():
    import tensorflow as tf

    from kopt import backends

    values, indices = np.arange(10, dtype="float32").reshape(5, 2), [7, 2, 7, 0, 2]
    rows = backends.distinct_rows(tf.IndexedSlices(tf.constant(values), tf.constant(indices), (9, 2)))
    np.testing.assert_array_equal(rows.indices, [0, 2, 7, 0, 0])
    np.testing.assert_array_equal(rows.values, [[6, 7], [10, 12], [4, 6], [0, 0], [0, 0]])
