"""What comes to `apply`: gradients that fit or are refused, scaled or of no known shape, and what are none at all."""

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from tests.conftest import BACKEND
from tests.training import (
    PAIRS,
    START,
    STREAM,
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


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ([np.ones((3, 2), "float32"), None], r"`grads\[0\]` must be of floats and of shape \(2, 3\), like '.*first'. "
         r"Received: grads\[0\]='float32 of shape \(3, 2\)'$"),
        ([np.ones((2, 3), "float32"), np.ones((3, 1), "float32")], r"`grads\[1\]` must be .* of shape \(3,\), like"),
        ([np.ones((2, 3), "int32"), None], r"`grads\[0\]` must be of floats .* Received: grads\[0\]='int32 of shape"),
        ([np.ones((2, 3), "bool"), None], r"`grads\[0\]` must be of floats .* Received: grads\[0\]='bool of shape"),
        ([None, None], r"`grads` must be a gradient for one variable at least .* Received: grads=\[None, None\]$"),
        ([np.ones((2, 3), "float32")], r"`grads` must be one for each of the 2 variables, .* grads='a list of 1'$"),
    ],
    ids=["shape", "rank", "integers", "truth values", "all missing", "too few"],
)  # fmt: skip
@every_class
def test_gradients_that_do_not_fit_are_refused(row, gradients, message):
    w = [keras.Variable(START, name="first"), keras.Variable(START[0], name="second")]
    before = numpy(w)
    gradients = [g if g is None else ops.convert_to_tensor(g) for g in gradients]
    optimizer = row.make()
    with pytest.raises(ValueError, match=f"^{message}"):
        optimizer.apply(gradients, w)
    assert not optimizer.built
    optimizer.build(w)
    with pytest.raises(ValueError, match=f"^{message}"):
        optimizer.apply(gradients, w)
    assert equal(w, before)
    assert int(optimizer.iterations) == 0


@every_class
def test_variables_that_do_not_fit_are_refused(row):
    w, other = keras.Variable(START), keras.Variable(START, name="stranger")
    gradient = ops.convert_to_tensor(STREAM[0])
    with pytest.raises(ValueError, match="^`trainable_variables` must be given at the first step.* Received: .*=None$"):
        row.make().apply([gradient])
    optimizer = row.make()
    optimizer.build([w])
    with pytest.raises(ValueError, match=r"^`trainable_variables` must be among the 1 .* Received: .*=\['stranger'\]$"):
        optimizer.apply([gradient], [other])
    unbuilt = row.make()
    unbuilt.build(keras.Sequential([keras.layers.Dense(2)]).trainable_variables)
    with pytest.raises(ValueError, match="must be known, but the optimizer was built with none: build the model"):
        unbuilt.apply([gradient], [w])
    for bad in ([w, w], [None], ["w"], [START]):
        with pytest.raises(ValueError, match=r"^`variables` must be a list "):
            row.make().build(bad)
    for grads in (gradient, None, []):
        with pytest.raises(ValueError, match="^`grads` must be "):
            optimizer.apply(grads, [w])
    for variables in (w, [w, w]):
        with pytest.raises(ValueError, match="^`trainable_variables` must be "):
            optimizer.apply([gradient, gradient], variables)
    optimizer.apply([], [])
    fresh = row.make()
    fresh.apply([], [])
    assert not fresh.built
    assert int(optimizer.iterations) == 0


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has shapes that are not known")
def test_a_gradient_whose_shape_shows_when_it_comes():
    import tensorflow as tf

    w, twin, optimizer = keras.Variable(START), keras.Variable(START), kopt.SGD(1.0, clipnorm=0.1)
    optimizer.build([w])

    @tf.function
    def step(g):
        optimizer.apply([tf.numpy_function(lambda g: g, [g], "float32")], [w])

    step(tf.constant(STREAM[0]))
    run(kopt.SGD(1.0, clipnorm=0.1), twin, stream=STREAM[:1])
    near([w], [twin])
    with pytest.raises(tf.errors.InvalidArgumentError):
        step(tf.constant(STREAM[0].T))


@every_class
@every_mode
def test_a_loss_scale_changes_nothing_and_its_overflow_is_skipped(row, mode):
    if (BACKEND, mode) == ("jax", "eager"):
        pytest.skip("Keras's LossScaleOptimizer has only the stateless form on JAX")
    if mode == "stateless":
        pytest.skip("covered by eager: Keras's LossScaleOptimizer calls the same method")
    ours, theirs, fixed = two(), two(), two()
    scaled = keras.optimizers.LossScaleOptimizer(row.make(nonfinite="skip"), initial_scale=2.0**15)
    big = [[g * np.float32(2**15) for g in pair] for pair in PAIRS]
    train(mode, scaled, ours, [*big, spoilt(big[0], np.inf, 1), [g / 2 for g in big[0]]])
    plain = row.make(nonfinite="skip")
    train(mode, plain, theirs, [*PAIRS, PAIRS[0]])
    for a, b in zip(numpy(ours), numpy(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7)
    assert int(scaled.inner_optimizer.iterations) == len(PAIRS) + 1
    assert float(ops.convert_to_numpy(scaled.dynamic_scale)) == 2.0**14
    train(mode, row.make(loss_scale_factor=4.0), fixed, [[g * 4 for g in pair] for pair in [*PAIRS, PAIRS[0]]])
    for a, b in zip(numpy(fixed), numpy(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7)


@every_class
@every_mode
def test_what_overwrites_its_variable(row, mode):
    """Keras trains float8 scales so: their gradient is the next value, and the largest one of a window."""
    ours, theirs = two(), two()
    ours[1].overwrite_with_gradient = True
    both = {"loss_scale_factor": 2.0, "global_clipnorm": 0.1, "nonfinite": "skip"}
    train(mode, row.make(**both), ours, [[PAIRS[0][0], np.full(3, 1e20)], PAIRS[1]])  # nothing squares it
    assert equal(ours[1:], [PAIRS[1][1]])
    alone = keras.Variable(START)
    train(mode, row.make(**both), [alone], [[PAIRS[0][0]], [PAIRS[1][0]]])
    near(ours[:1], [alone])
    optimizer = row.make(gradient_accumulation_steps=2)
    theirs[1].overwrite_with_gradient = True
    train(mode, optimizer, theirs, PAIRS[:4])
    assert equal(theirs[1:], [np.maximum(np.maximum(PAIRS[2][1], PAIRS[3][1]), 0)])
    train(mode, optimizer, theirs, [spoilt(PAIRS[2], np.nan, 1), PAIRS[3]])
    assert np.isnan(numpy(theirs[1:])[0]).any()  # not lost on the way
