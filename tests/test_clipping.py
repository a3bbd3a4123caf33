"""`clipnorm`, `clipvalue`, `global_clipnorm`, and the norm that can be read."""

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from tests.conftest import BACKEND
from tests.training import (
    CLIPS,
    MODES,
    PAIRS,
    START,
    STREAM,
    equal,
    every_class,
    every_clip,
    every_mode,
    every_row_in_every_mode,
    numpy,
    run,
    train,
    two,
)


def clipped(clip, gradients):
    (kind, limit), gradients = next(iter(clip.items())), [np.asarray(g, "float64") for g in gradients]
    norms = [np.linalg.norm(g) for g in gradients]
    if kind == "clipvalue":
        return [g.clip(-limit, limit) for g in gradients]
    if kind == "global_clipnorm":
        norms = [np.linalg.norm(norms)] * len(norms)
    return [g * min(1, limit / (norm or 1)) for g, norm in zip(gradients, norms, strict=True)]


@every_row_in_every_mode
def test_clipping(row, mode):
    stream = [*PAIRS[:3], [g * 1e-3 for g in PAIRS[3]]]
    for clip in CLIPS:
        ours, theirs = two(), two()
        train(mode, row.make(**clip), ours, stream)
        train("eager", row.make(), theirs, [clipped(clip, pair) for pair in stream])
        for a, b in zip(numpy(ours), numpy(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * row.rate)


@every_mode
@every_clip
@pytest.mark.parametrize("size", [1e25, 3e36, 1e-25], ids=str)
def test_clipping_of_what_overflows_or_vanishes_when_squared(clip, mode, size):
    start = [START * 0, START[0] * 0, START[0, :1] * 0, START[:0]]  # XLA treats one entry unlike several
    gradients = [g * np.float32(size) for g in (STREAM[0], STREAM[1, 0], STREAM[2, 0, :1], STREAM[3, :0])]
    if size < 1:
        clip = {kind: limit * size for kind, limit in clip.items()}
    ours, theirs = ([keras.Variable(x) for x in start] for _ in range(2))
    optimizer = kopt.SGD(1.0, track_gradient_norm=True, **clip)
    train(mode, optimizer, ours, [gradients])
    train("eager", kopt.SGD(1.0), theirs, [clipped(clip, gradients)])
    for a, b in zip(numpy(ours), numpy(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)
    norm = np.linalg.norm([np.linalg.norm(g.astype("float64")) for g in gradients])
    assert float(optimizer.gradient_norm) == pytest.approx(norm, rel=1e-6)


@every_mode
@every_clip
def test_clipping_does_not_hide_what_is_no_number(clip, mode):
    w = keras.Variable(np.zeros(3), dtype="float32")
    train(mode, kopt.SGD(1.0, **clip), [w], [[np.array([1000, np.nan, 1])]])
    moved = numpy([w])[0]
    assert np.isnan(moved[1])
    assert not np.any(np.abs(moved) > 1)


@every_clip
def test_float16_gradients_are_clipped_in_float32(clip):
    for size in (300.0, 1e-5):  # 300 squared is infinite in float16, 1e-5 squared is zero
        narrow, wide = keras.Variable(np.ones(4), dtype="float16"), keras.Variable(np.ones(4))
        gradient = np.full(4, size, "float16")
        kopt.SGD(1.0, **clip).apply([ops.convert_to_tensor(gradient)], [narrow])
        run(kopt.SGD(1.0), wide, stream=clipped(clip, [gradient]))
        assert equal([narrow], [ops.cast(wide, "float16")])


@every_mode
def test_a_limit_can_change_between_steps(mode):
    ours, theirs = two(), two()
    optimizer = kopt.SGD(1.0, clipnorm=0.5)
    train(mode, optimizer, ours, PAIRS[:2])
    optimizer.clipnorm = 0.25
    train(mode, optimizer, ours, PAIRS[2:])
    train(
        "eager", kopt.SGD(1.0), theirs, [clipped({"clipnorm": 0.5 if i < 2 else 0.25}, p) for i, p in enumerate(PAIRS)]
    )
    for a, b in zip(numpy(ours), numpy(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@every_mode
def test_the_norm_is_that_of_the_last_update_before_clipping(mode):
    optimizer = kopt.Adam(track_gradient_norm=True, gradient_accumulation_steps=2, global_clipnorm=1e-3)
    assert optimizer.gradient_norm == 0
    train(mode, optimizer, two(), PAIRS[:3])
    mean = np.concatenate([((a + b) / 2).ravel() for a, b in zip(*PAIRS[:2], strict=True)])
    assert float(optimizer.gradient_norm) == pytest.approx(np.linalg.norm(mean), rel=1e-6)


@every_class
def test_readings_that_were_not_asked_for(row):
    with pytest.raises(AttributeError, match="^`gradient_norm` is kept only with `track_gradient_norm=True`$"):
        _ = row.make().gradient_norm
    with pytest.raises(AttributeError, match='^`skipped_steps` is kept only with `nonfinite="skip"` or'):
        _ = row.make().skipped_steps


MIXED = [{}, {"gradient_accumulation_steps": 2}, {"nonfinite": "skip", "use_ema": True}]


@every_clip
@pytest.mark.parametrize("more", MIXED, ids=str)
def test_variables_of_different_precision(clip, more):
    """Each as precise as it is, clipped together. Keras cannot mix them on TensorFlow."""
    dtypes = ["float32", "bfloat16", "float64"]
    if BACKEND == "jax":
        dtypes.pop()  # float64 needs JAX_ENABLE_X64
    ours = [keras.Variable(START, dtype=dtype) for dtype in dtypes]
    theirs = [ops.convert_to_numpy(ops.cast(w, "float32")).astype("float64") for w in ours]
    theirs[2:] = numpy(ours[2:])
    short = ops.convert_to_numpy(ops.cast(ops.cast(STREAM, "bfloat16"), "float32"))
    stream = [[g * (i + 1) for i in range(len(dtypes))] for g in short]
    clip = dict.fromkeys(clip, 0.125)  # which float32 holds exactly, as it does the rate
    train(MODES[-1], kopt.SGD(0.5, **clip, **more), ours, stream)
    if "gradient_accumulation_steps" in more:
        stream = [[(a + b) / 2 for a, b in zip(*stream[at : at + 2], strict=True)] for at in (0, 2, 4)]
    for gradients in stream:
        theirs = [w - 0.5 * g for w, g in zip(theirs, clipped(clip, gradients), strict=True)]
    np.testing.assert_allclose(numpy(ours)[0], theirs[0], rtol=1e-6, atol=1e-6)
    assert equal([ours[1]], [ops.cast(ops.convert_to_tensor(theirs[1].astype("float32")), "bfloat16")])
    if dtypes[-1] == "float64":
        np.testing.assert_allclose(numpy(ours)[-1], theirs[-1], rtol=1e-12, atol=1e-12)
