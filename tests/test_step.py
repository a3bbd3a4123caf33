"""One step, whatever the rule: shapes, dtypes, missing gradients, and the same numbers compiled or not."""

import functools
import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from tests import oracles
from tests.conftest import BACKEND
from tests.training import START, STREAM, equal, every_class, every_row, every_row_in, numpy, run


@every_row
def test_goes_downhill(row):
    def rosenbrock(w):
        x, y = w
        slope = np.array([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)])
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2, slope / max(1.0, np.linalg.norm(slope))

    def bowl(w):
        return w[0] ** 2 + 10 * w[1] ** 2, np.array([2 * w[0], 20 * w[1]])

    for surface in (rosenbrock, bowl):
        w, optimizer = keras.Variable([-1.0, 1.5]), row.make()
        before = surface(numpy([w])[0])[0]
        for _ in range(60):
            optimizer.apply([ops.convert_to_tensor(surface(numpy([w])[0])[1], "float32")], [w])
        assert surface(numpy([w])[0])[0] < before


@every_row
def test_keeps_the_slots_that_it_declares_and_no_more(row):
    optimizer, w = row.make(), keras.Variable(START)
    run(optimizer, w)
    assert tuple(slot for slot, _ in optimizer.named.values()) == row.slots
    scalars = ["iteration", "learning_rate", *optimizer.hyper_variables]
    assert [v.name for v in optimizer.variables] == scalars + [f"variable_{slot}" for slot in row.slots]
    held = [(id(v), v.shape, v.dtype) for v in optimizer.variables]
    run(optimizer, w)
    assert held == [(id(v), v.shape, v.dtype) for v in optimizer.variables]


@every_row
def test_zero_gradients_move_nothing(row):
    w = keras.Variable(START)
    run(row.make(**({"weight_decay": None} if "weight_decay" in row.arguments else {})), w, stream=STREAM * 0)
    assert equal([w], [START])


@every_row
def test_shape_and_order_do_not_matter(row):
    matrix, vector, scalar, empty = (keras.Variable(x) for x in (START, START.ravel(), START[0, 0], START[:0]))
    optimizer = row.make()
    for g in STREAM:
        gradients = [ops.convert_to_tensor(x) for x in (g, g.ravel(), g[0, 0], g[:0])]
        optimizer.apply(gradients, [matrix, vector, scalar, empty])
    assert equal([matrix], [ops.reshape(vector, (2, 3))])
    assert np.isclose(numpy([scalar])[0], numpy([matrix])[0][0, 0], rtol=1e-6)  # a scalar may take another kernel

    first, second = keras.Variable(START), keras.Variable(START + 1)
    one, two = row.make(), row.make()
    forward = run(one, first, second)
    assert equal(forward[::-1], run(two, keras.Variable(START + 1), keras.Variable(START)))


@every_row
def test_none_gradients_and_frozen_variables_are_left_out(row):
    def of_b():
        return numpy([b, *[v for v in optimizer.parts if optimizer.named.get(id(v), "")[-1:] == ("b",)]])

    alone = run(row.make(), keras.Variable(START))
    a, b = keras.Variable(START, name="a"), keras.Variable(START, name="b")
    optimizer = row.make()
    for i, g in enumerate(STREAM):
        if i == 3:  # frozen: Keras passes the trainable variables only
            optimizer.apply([ops.convert_to_tensor(g)], [a])
        elif i == 0:
            optimizer.apply([ops.convert_to_tensor(g)] * 2, [a, b])
            held = of_b()
            assert len(held) == 1 + len(row.slots)
        else:
            with pytest.warns(UserWarning, match="Gradients do not exist"):
                optimizer.apply([ops.convert_to_tensor(g), None], [a, b])
    assert equal([a], alone)
    assert equal(of_b(), held)


@every_row
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_follow_the_float32_run(row, dtype):
    start = ops.convert_to_numpy(ops.cast(ops.cast(START, dtype), "float32"))
    stream = ops.convert_to_numpy(ops.cast(ops.cast(STREAM, dtype), "float32"))
    narrow, wide, optimizer = keras.Variable(start, dtype=dtype), keras.Variable(start), row.make()
    for half in (stream[:3], stream[3:]):
        run(optimizer, narrow, stream=half)
    reference = row.make()
    run(reference, wide, stream=stream)
    assert keras.backend.standardize_dtype(narrow.dtype) == dtype
    assert equal([narrow], [ops.cast(wide, dtype)])
    assert all("16" not in keras.backend.standardize_dtype(v.dtype) for v in optimizer.variables)

    narrow.assign(ops.full((2, 3), 2.0, dtype))  # from outside: the float32 weight behind it starts anew
    wide.assign(ops.full((2, 3), 2.0))
    run(optimizer, narrow, stream=stream)
    run(reference, wide, stream=stream)
    assert equal([narrow], [ops.cast(wide, dtype)])


@every_class
def test_16_bit_weights_move_by_less_than_their_precision(row):
    w = keras.Variable(np.ones(4), dtype="bfloat16")  # a neighbour of 1 is 0.004 away
    run(row.make(learning_rate=1e-4), w, stream=np.ones((200, 4), "float32"))
    assert (ops.convert_to_numpy(ops.cast(w, "float32")) < 1).all()


@every_class
def test_float64_weights_keep_their_precision(row):
    if BACKEND == "jax":
        pytest.skip("JAX has float64 only with JAX_ENABLE_X64, where tests/test_rules.py covers it")
    optimizer, w = row.make(), keras.Variable(np.ones(3), dtype="float64")
    run(optimizer, w, stream=np.full((5, 3), 1 / 3))
    held = [v for v in optimizer.variables if v.shape == w.shape]
    assert all(keras.backend.standardize_dtype(v.dtype) == "float64" for v in [w, *held])
    changes = oracles.run(row.oracle, np.ones(3), np.full((5, 3), 1 / 3), **row.hypers())
    np.testing.assert_allclose(numpy([w])[0], 1 + np.sum(changes, 0), rtol=1e-7)  # the hyperparameters are float32


@every_row_in("case", [({}, "float32"), ({"l2": 0.1, "weight_decay": 0.1}, "float32"), ({}, "bfloat16")])
def test_compiled_equals_eager(row, case):
    more, dtype = case
    stream = ops.convert_to_numpy(ops.cast(ops.cast(STREAM, dtype), "float32"))
    eager = run(row.make(**more), keras.Variable(START, dtype=dtype), stream=stream)[0].astype("float32")
    ulp = {"float32": 2e-6, "bfloat16": 1e-2}[dtype]
    for step in compiled_steps(lambda: (row.make(**more), keras.Variable(START, dtype=dtype))):
        compiled = step([ops.cast(g, dtype) for g in stream])
        np.testing.assert_allclose(compiled.astype("float32"), eager, rtol=ulp, atol=ulp / 10)


def compiled_steps(make):
    """Training runs of one variable, compiled in each way that the backend has."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        for jit in (False, True):
            optimizer, w = make()
            optimizer.build([w])
            step = tf.function(functools.partial(lambda o, w, g: o.apply([g], [w]), optimizer, w), jit_compile=jit)
            yield lambda stream, step=step, w=w: [step(g) for g in stream] and numpy([w])[0]
    elif BACKEND == "jax":
        import jax

        optimizer, w = make()
        optimizer.build([w])
        step = jax.jit(lambda weights, state, g: optimizer.stateless_apply(state, [g], weights), donate_argnums=(0, 1))

        def train(stream):
            weights, state = [ops.copy(w.value)], [ops.copy(v.value) for v in optimizer.variables]
            for g in stream:
                weights, state = step(weights, state, g)
            return np.asarray(weights[0])

        yield train
    else:
        optimizer, w = make()
        optimizer.build([w])
        before = numpy([w])

        def train(stream):  # Keras runs torch eagerly; the stateless form is the other way to call it
            weights, state = [w.value.detach().clone()], [v.value.detach().clone() for v in optimizer.variables]
            for g in stream:
                weights, state = optimizer.stateless_apply(state, [g], weights)
            assert equal([w], before)
            return ops.convert_to_numpy(weights[0])

        yield train


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has gradients of chosen rows")
@every_row
def test_rows_that_repeat_are_summed(row):
    import tensorflow as tf

    dense, sparse = keras.Variable(START), keras.Variable(START)
    one, two = row.make(), row.make()
    for g in STREAM:
        slices = tf.IndexedSlices(tf.constant([g[0], g[1], g[0]]), tf.constant([1, 0, 1]), (2, 3))
        one.apply([tf.constant(np.stack([g[1], g[0] + g[0]]))], [dense])
        two.apply([slices], [sparse])
    np.testing.assert_allclose(numpy([sparse])[0], numpy([dense])[0], rtol=1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a variable of TensorFlow's own")
@every_class
def test_variables_of_tensorflow_itself(row):
    import tensorflow as tf

    native, ours = tf.Variable(START), keras.Variable(START)
    optimizer = row.make()
    for g in STREAM:
        optimizer.apply([tf.constant(g)], [native])
    assert equal([native], run(row.make(), ours))


@every_class
def test_is_freed_when_dropped(row):
    optimizer = row.make()
    run(optimizer, keras.Variable(START))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


def test_variables_that_are_no_floats_are_refused():
    optimizer = kopt.SGD(momentum=0.9)
    with pytest.raises(ValueError, match=r"^`variables` must be of floats. Received: variables='count' of int32$"):
        optimizer.build([keras.Variable([1, 2], dtype="int32", trainable=False, name="count")])
    assert not optimizer.built
