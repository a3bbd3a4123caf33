"""What every optimizer does, whatever its rule: the rows of the catalogue times the properties."""

import functools
import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from kopt.optimizers import execution
from tests import oracles
from tests.catalog import CLASSES, OPTIMIZERS
from tests.conftest import BACKEND

every_row = pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
every_class = pytest.mark.parametrize("row", CLASSES, ids=str)
START = np.linspace(-1, 1, 6, dtype="float32").reshape(2, 3)
STREAM = np.random.default_rng(0).normal(size=(6, 2, 3)).astype("float32")
X = np.random.default_rng(1).normal(size=(24, 4)).astype("float32")
Y = X @ np.random.default_rng(2).normal(size=(4, 2)).astype("float32")


def numpy(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]  # copies: on torch they would be views


def equal(ours, theirs):
    return all(np.array_equal(a, b) for a, b in zip(numpy(ours), numpy(theirs), strict=True))


def run(optimizer, *variables, stream=STREAM):
    """Train the variables, all with the same gradients."""
    for g in stream:
        optimizer.apply([ops.convert_to_tensor(g.reshape(v.shape), dtype=v.dtype) for v in variables], list(variables))
    return numpy(variables)


def network(optimizer, **compiled):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, activation="relu", name="body"), keras.layers.Dense(2, name="head")]
    )
    model.compile(optimizer, loss="mse", **compiled)
    return model


class AtEpoch(keras.callbacks.Callback):
    """Do something when an epoch begins."""

    def __init__(self, epoch, action):
        super().__init__()
        self.epoch, self.action = epoch, action

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            self.action(self.model)


# The step


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
        return numpy([b, *[v for v in optimizer.variables if optimizer.named.get(id(v), "")[-1:] == ("b",)]])

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


@every_row
@pytest.mark.parametrize(
    ("more", "dtype"), [({}, "float32"), ({"l2": 0.1, "weight_decay": 0.1}, "float32"), ({}, "bfloat16")], ids=str
)
def test_compiled_equals_eager(row, more, dtype):
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


# What changes during fit

COMPILED = [{"jit_compile": True}, {"jit_compile": False}] if BACKEND != "torch" else [{}]


@every_row
@pytest.mark.parametrize("compiled", COMPILED, ids=str)
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
    if BACKEND == "tensorflow" or compiled.get("jit_compile"):  # else every step runs from Python
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


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a variable of TensorFlow's own")
@every_class
def test_variables_of_tensorflow_itself(row):
    import tensorflow as tf

    native, ours = tf.Variable(START), keras.Variable(START)
    optimizer = row.make()
    for g in STREAM:
        optimizer.apply([tf.constant(g)], [native])
    assert equal([native], run(row.make(), ours))


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


# Decay


class Ones:
    """A gradient of ones, whatever the shape."""

    def reshape(self, shape):
        return np.ones(shape, "float32")


STEPS = [Ones()] * 3
DECAYS = [{"weight_decay": 0.1}, {"l2": 0.1}, {"weight_decay": 0.1, "l2": 0.1}]


@pytest.mark.parametrize("amount", [1e-4, 1e-5, 1e-6])
def test_a_small_decay_is_not_rounded_away(amount):
    start = np.random.default_rng(0).uniform(1, 2, size=1000).astype("float32")
    w = keras.Variable(start)
    run(kopt.SGD(1e-3, weight_decay=amount / 1e-3), w, stream=np.zeros((100, 1000), "float32"))
    lost = (start.astype("float64") - numpy([w])[0]) / (start * (1 - (1 - amount) ** 100))
    assert lost.mean() == pytest.approx(1, rel=0.02)


@every_class
@pytest.mark.parametrize("decay", DECAYS, ids=str)
def test_decay_spares_what_is_excluded(row, decay):
    free = {"weight_decay": None} if "weight_decay" in row.arguments else {}
    for chosen, spared in {
        "kernels": [True, False, True, False],
        "head": [False, False, True, True],
        "head's bias": [False, False, False, True],
        "all but the body's kernel": [False, True, True, True],
    }.items():
        model, twin = network("sgd"), network("sgd")
        for m in (model, twin):
            m.set_weights([np.ones(w.shape) for w in m.get_weights()])
        head = model.get_layer("head")
        keys = {
            "kernels": "kernel$",
            "head": head,
            "head's bias": [head.bias],
            "all but the body's kernel": [head, "body/b"],
        }
        run(row.make(**free | decay, exclude_from_decay=keys[chosen]), *model.trainable_variables, stream=STEPS)
        run(row.make(**free), *twin.trainable_variables, stream=STEPS)
        pairs = zip(model.trainable_variables, twin.trainable_variables, strict=True)
        assert [equal([ours], [plain]) for ours, plain in pairs] == spared, chosen


def test_an_exclusion_that_matches_nothing_is_refused():
    model = network("sgd")
    other = keras.layers.Dense(1)
    other.build((None, 4))
    for key in ("biass$", other, other.bias):
        optimizer = kopt.SGD(weight_decay=0.1, exclude_from_decay=["kernel", key])
        with pytest.raises(
            ValueError, match=r"`exclude_from_decay` must match a trainable.*head/bias.* Received: exclude"
        ):
            optimizer.build(model.trainable_variables)
        assert not optimizer.built
    model.get_layer("head").trainable = False  # a frozen layer matches nothing, and nothing is meant to happen to it
    optimizer = kopt.SGD(weight_decay=0.1, exclude_from_decay=model.get_layer("head"))
    optimizer.build(model.trainable_variables)
    assert kopt.SGD.from_config(optimizer.get_config()).exclude_from_decay[0]["path"] == "head/kernel"

    optimizer = kopt.SGD(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])  # Keras's way
    assert optimizer.exclude_from_decay == ["bias"]


# A citizen of Keras


@every_class
def test_constraints_are_kept(row):
    w, free = keras.Variable(START * 0 + 0.1), keras.Variable(START * 0 + 0.1)
    w.constraint = keras.constraints.NonNeg()
    run(row.make(learning_rate=0.5), w)
    run(row.make(learning_rate=0.5), free)
    assert (numpy([w])[0] >= 0).all()
    assert (numpy([free])[0] < 0).any()


@every_class
def test_moving_average_of_keras(row):
    w, twin = keras.Variable(START), keras.Variable(START)
    optimizer, plain = row.make(use_ema=True, ema_momentum=0.9), row.make()
    average = None
    for g in STREAM:
        now = run(plain, twin, stream=[g])[0].astype("float64")
        average = now if average is None else 0.9 * average + 0.1 * now
        assert equal(run(optimizer, w, stream=[g]), [twin])
    optimizer.finalize_variable_values([w])
    np.testing.assert_allclose(numpy([w])[0], average, rtol=1e-5, atol=1e-6)


@every_class
def test_average_that_overwrites_the_weights(row):
    for dtype in ("float32", "bfloat16"):
        w = keras.Variable(START, dtype=dtype)
        optimizer = row.make(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)
        run(optimizer, w, stream=STREAM[:2])
        average = next(v for v in optimizer.variables if optimizer.named.get(id(v), "")[:1] == ("average",))
        assert equal([w], [average])
        before = ops.convert_to_numpy(ops.cast(w, "float32"))
        run(optimizer, w, stream=STREAM[2:3])  # goes on from the average, in 16 bits too
        step = ops.convert_to_numpy(ops.cast(w, "float32")) - before
        assert np.abs(step).max() < 0.2


@every_class
def test_frozen_layers_have_no_state(row):
    model = network(row.make())
    model.get_layer("body").trainable = False
    model.compile(row.make(), loss="mse")
    body = numpy(model.get_layer("body").variables)
    model.fit(X, Y, batch_size=8, verbose=0)
    assert equal(model.get_layer("body").variables, body)
    assert all("head" in path for _, path in model.optimizer.named.values())


@every_class
def test_variables_that_are_overwritten_with_their_gradient(row):
    w, scale = keras.Variable(START), keras.Variable(np.zeros(3, "float32"))
    scale.overwrite_with_gradient = True
    optimizer = row.make()
    optimizer.apply([ops.convert_to_tensor(STREAM[0]), ops.ones(3)], [w, scale])
    assert equal([scale], [np.ones(3)])
    assert equal([w], run(row.make(), keras.Variable(START), stream=STREAM[:1]))


@every_class
def test_accumulated_gradients_equal_their_mean(row):
    one, two = keras.Variable(START), keras.Variable(START)
    accumulating = row.make(gradient_accumulation_steps=2)
    run(accumulating, one)
    run(row.make(), two, stream=(STREAM[::2] + STREAM[1::2]) / 2)
    np.testing.assert_allclose(numpy([one])[0], numpy([two])[0], rtol=1e-5, atol=1e-6)
    assert int(accumulating.iterations) == 3


@every_class
def test_loss_scaling_changes_nothing_and_skips_overflow(row):
    w, twin = keras.Variable(START), keras.Variable(START)
    scaled = keras.optimizers.LossScaleOptimizer(row.make(), initial_scale=2.0**15)
    scaled.build([w])
    overflow = np.full((1, 2, 3), np.inf, "float32")
    for g in np.concatenate([STREAM * 2.0**15, overflow]):
        before = numpy([w])
        if BACKEND == "jax":  # where Keras's wrapper has only this form
            weights, state = scaled.stateless_apply([v.value for v in scaled.variables], [ops.array(g)], [w.value])
            for variable, value in zip([w, *scaled.variables], [*weights, *state], strict=True):
                variable.assign(value)
        else:
            run(scaled, w, stream=[g])
    assert equal([w], before)
    run(row.make(), twin)
    np.testing.assert_allclose(*numpy([w, twin]), rtol=2e-6, atol=2e-7)  # JAX compiles one of the two
    assert int(scaled.inner_optimizer.iterations) == len(STREAM)
    fixed = keras.Variable(START)
    run(row.make(loss_scale_factor=4.0), fixed, stream=STREAM * 4)
    assert equal([fixed], [twin])


@every_class
def test_two_optimizers_side_by_side_equal_one(row):
    models = [network(row.make()), network(keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(row.make(), {".*head.*": row.make()})
    ))]  # fmt: skip
    models[1].set_weights(models[0].get_weights())
    for model in models:
        model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@every_class
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_fit_under_a_dtype_policy(row, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = network(row.make())
    finally:
        keras.config.set_dtype_policy("float32")
    before = model.get_weights()
    history = model.fit(X, Y, batch_size=8, epochs=3, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert not equal(model.get_weights(), before)
    optimizer = model.optimizer.inner_optimizer if policy == "mixed_float16" else model.optimizer
    masters = [v for v in optimizer.variables if optimizer.named.get(id(v), "")[:1] == ("master",)]
    assert len(masters) == (4 if policy == "bfloat16" else 0)
    for master, weight in zip(masters, model.trainable_variables, strict=False):
        assert equal([ops.cast(master, policy)], [weight])


def test_callbacks_of_keras(tmp_path):
    def fit(model, *callbacks, epochs=4):
        return model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks)).history

    c = keras.callbacks
    model = network(kopt.Adam(0.1))
    history = fit(model, c.LearningRateScheduler(lambda epoch, rate: rate / 2), c.ModelCheckpoint(tmp_path / "m.keras"))
    np.testing.assert_allclose(history["learning_rate"], [0.05, 0.025, 0.0125, 0.00625])
    assert int(keras.models.load_model(tmp_path / "m.keras").optimizer.iterations) == 12
    history = fit(network(kopt.Adam(0.1)), c.ReduceLROnPlateau(monitor="loss", patience=1, min_delta=1e9, factor=0.5))
    np.testing.assert_allclose(history["learning_rate"], [0.1, 0.1, 0.05, 0.025])
    stopping = c.EarlyStopping(monitor="loss", patience=1, min_delta=1e9, restore_best_weights=True)
    assert len(fit(network(kopt.Adam(0.1)), stopping)["loss"]) == 2

    whole, broken = network(kopt.Adam(0.1)), network(kopt.Adam(0.1))
    broken.set_weights(whole.get_weights())
    fit(whole)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, c.BackupAndRestore(tmp_path / "backup"), AtEpoch(2, interrupt))
    resumed = network(kopt.Adam(0.1))
    fit(resumed, c.BackupAndRestore(tmp_path / "backup"))
    assert equal(resumed.variables, whole.variables)
    assert equal(resumed.optimizer.variables, whole.optimizer.variables)


def interrupt(model):
    raise KeyboardInterrupt


@pytest.mark.parametrize("clip", [{"clipnorm": 0.5}, {"clipvalue": 0.1}, {"global_clipnorm": 0.5}], ids=str)
def test_clipping(clip):
    variables = [keras.Variable(START), keras.Variable(START[:1])]
    gradients = [STREAM[0], STREAM[1, :1]]
    kopt.SGD(1.0, **clip).apply([ops.convert_to_tensor(g) for g in gradients], variables)
    whole = np.sqrt(sum((g**2).sum() for g in gradients))
    for w, g in zip(variables, gradients, strict=True):
        clipped = {
            "clipnorm": g * min(1, 0.5 / np.linalg.norm(g)),
            "clipvalue": g.clip(-0.1, 0.1),
            "global_clipnorm": g * min(1, 0.5 / whole),
        }[next(iter(clip))]
        np.testing.assert_allclose(numpy([w])[0], START[: len(g)] - clipped, rtol=1e-6, atol=1e-7)


@every_class
def test_one_step_of_jit_and_many(row):
    if BACKEND == "torch":
        pytest.skip("Keras runs one step at a time on torch")
    models = [network(row.make(), steps_per_execution=n) for n in (1, 3)]
    models[1].set_weights(models[0].get_weights())
    for model in models:
        model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


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
