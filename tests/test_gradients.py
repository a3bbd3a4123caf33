"""The way of a gradient to its rule (`kopt/optimizers/gradients.py`): each condition, each rule, each way to run it."""

import contextlib
import functools

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from tests.catalog import CLASSES, OPTIMIZERS
from tests.conftest import BACKEND
from tests.training import (
    MODES,
    START,
    STREAM,
    X,
    Y,
    equal,
    every_class,
    every_mode,
    every_row,
    fit,
    near,
    network,
    numpy,
    run,
    same,
    state_of,
    train,
)

PAIRS = [[g, g[0] * 3] for g in STREAM]  # gradients of two variables
BAD = {"NaN": np.nan, "infinity": -np.inf, "overflow": 1e20}  # 1e20 squared is not finite in float32


def two():
    return [keras.Variable(START, name="a"), keras.Variable(START[0] * 5, name="b")]


def spoilt(pair, value, which):
    pair = [g.copy() for g in pair]
    pair[which].flat[-1] = value
    return pair


def with_bad(row, pairs):
    """The stream with bad gradients put in at chosen places, one or two at a time."""
    kinds = [value for name, value in BAD.items() if name != "overflow" or row.cls.squares]
    stream = [spoilt(pairs[0], kinds[0], 0), *pairs]
    stream[3:3] = [spoilt(pairs[1], kinds[-1], 1), spoilt(pairs[2], kinds[1], 0)]
    return [*stream, spoilt(spoilt(pairs[0], kinds[0], 0), kinds[1], 1)]


@every_row
@every_mode
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


@every_row
@every_mode
def test_a_skipped_step_is_as_if_it_had_not_been(row, mode):
    more = {"nonfinite": "skip", "use_ema": True, "ema_overwrite_frequency": 2, "track_gradient_norm": True}
    stream = with_bad(row, PAIRS)
    ours, theirs = two(), two()
    optimizer, clean = row.make(**more), row.make(**more)
    train(mode, optimizer, ours, stream)
    train(mode, clean, theirs, PAIRS)
    but = ["skipped_steps"]
    assert same(state_of(optimizer, *ours, but=but), state_of(clean, *theirs, but=but))
    assert int(optimizer.skipped_steps) == 4
    assert int(clean.skipped_steps) == 0
    assert int(optimizer.iterations) == len(PAIRS)


@every_row
@every_mode
def test_a_bad_gradient_drops_its_window_of_accumulation(row, mode):
    more = {"nonfinite": "skip", "gradient_accumulation_steps": 2}
    ours, theirs = two(), two()
    optimizer, clean = row.make(**more), row.make(**more)
    stream = [*PAIRS[:2], spoilt(PAIRS[0], np.inf, 1), PAIRS[1], *PAIRS[2:]]
    train(mode, optimizer, ours, stream)
    train(mode, clean, theirs, PAIRS)
    but = ["skipped_steps"]
    assert same(state_of(optimizer, *ours, but=but), state_of(clean, *theirs, but=but))
    assert int(optimizer.skipped_steps) == 1
    assert int(optimizer.iterations) == 3


@every_class
@every_mode
@pytest.mark.parametrize("steps", [None, 2], ids=["", "accumulating"])
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


def clipped(clip, gradients):
    (kind, limit), gradients = next(iter(clip.items())), [np.asarray(g, "float64") for g in gradients]
    norms = [np.linalg.norm(g) for g in gradients]
    if kind == "clipvalue":
        return [g.clip(-limit, limit) for g in gradients]
    if kind == "global_clipnorm":
        norms = [np.linalg.norm(norms)] * len(norms)
    return [g * min(1, limit / (norm or 1)) for g, norm in zip(gradients, norms, strict=True)]


CLIPS = [{"clipnorm": 0.5}, {"clipvalue": 0.1}, {"global_clipnorm": 0.5}]
every_clip = pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: next(iter(clip)))


@every_row
@every_mode
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


# Gradients of rows

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


# Refusals

W = [[2, 3], [3]]


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
