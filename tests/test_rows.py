"""Gradients of chosen rows, which only TensorFlow has: they equal dense ones, under every condition."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from kopt.optimizers import execution
from tests.catalog import OPTIMIZERS
from tests.conftest import BACKEND
from tests.training import CLIPS, START, STREAM, equal, every_class, every_row_in, numpy, train

TENSORFLOW = pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has gradients of chosen rows")

INDICES = [1, 0, 1]  # rows that repeat


ROW_CONDITIONS = [
    *CLIPS,
    {"nonfinite": "skip"},
    {"gradient_accumulation_steps": 2},
    {"loss_scale_factor": 4.0},
    {"use_ema": True, "track_gradient_norm": True},
]


@TENSORFLOW
@every_row_in("mode", ["eager", "graph", "xla"])
def test_rows_that_repeat_equal_a_dense_gradient(row, mode):
    equals_a_dense_gradient(row, mode, [{}])


@TENSORFLOW
@pytest.mark.parametrize("mode", ["graph", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("eager", "xla"))])
@every_class
def test_rows_that_repeat_under_conditions(row, mode):
    equals_a_dense_gradient(row, mode, ROW_CONDITIONS)


def equals_a_dense_gradient(row, mode, conditions):
    import tensorflow as tf

    for more in conditions:
        dense, sparse = keras.Variable(START), keras.Variable(START)
        one, two = row.make(**more), row.make(**more)
        train("eager", one, [dense], [[np.stack([g[1], g[0] + g[0] * 2])] for g in STREAM])
        two.build([sparse])

        def step(optimizer, variable, values):
            optimizer.apply([tf.IndexedSlices(values, tf.constant(INDICES), (2, 3))], [variable])

        step = functools.partial(step, two, sparse)
        step = step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")
        for g in STREAM:
            step(tf.constant([g[0], g[1], g[0] * 2]))
        np.testing.assert_allclose(numpy([sparse])[0], numpy([dense])[0], rtol=1e-5, atol=1e-6, err_msg=str(more))


@TENSORFLOW
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


@TENSORFLOW
@pytest.mark.parametrize("more", [*CLIPS, {"track_gradient_norm": True}, {"nonfinite": "skip"}], ids=str)
def test_rows_of_which_there_are_not_always_as_many(more):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(10, 3), layers.Flatten()])
    model.compile(kopt.Adam(0.1, **more), loss="mse", jit_compile=False)
    before = numpy(model.variables)
    model.fit(np.arange(21).reshape(7, 3) % 10, np.zeros((7, 9)), batch_size=3, verbose=0)
    assert not equal(model.variables, before)


@TENSORFLOW
def test_distinct_rows():
    import tensorflow as tf

    from kopt import backends

    values, indices = np.arange(10, dtype="float32").reshape(5, 2), [7, 2, 7, 0, 2]
    rows = backends.distinct_rows(tf.IndexedSlices(tf.constant(values), tf.constant(indices), (9, 2)))
    np.testing.assert_array_equal(rows.indices, [0, 2, 7, 0, 0])
    np.testing.assert_array_equal(rows.values, [[6, 7], [10, 12], [4, 6], [0, 0], [0, 0]])


# The rows alone


def table(rows=300, width=64):
    return keras.Variable(np.random.default_rng(3).normal(size=(rows, width)).astype("float32"), name="table")


def of_rows(step, indices=(7, 2, 7, 0, 299), width=64):
    import tensorflow as tf

    values = np.random.default_rng(step).normal(size=(len(indices), width)).astype("float32")
    return tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant((300, width)))


def densely(rows):
    import tensorflow as tf

    return tf.convert_to_tensor(tf.math.unsorted_segment_sum(rows.values, rows.indices, 300))


def stepped(optimizer, w, mode, gradients):
    import tensorflow as tf

    optimizer.build([w])
    gradients = [g if isinstance(g, tf.IndexedSlices) else tf.convert_to_tensor(g) for g in gradients]
    step = lambda g: optimizer.apply([g], [w])  # noqa: E731
    if mode != "eager":
        step = tf.function(step, jit_compile=mode == "xla")
    for g in gradients:
        step(g)


ROWS_ONLY = [row for row in OPTIMIZERS if row.name in ("sgd", "adagrad", "adagrad-warm")]


@TENSORFLOW
@pytest.mark.parametrize("width", [64, 3])  # a table by itself, and one of the size that goes into slabs
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("row", ROWS_ONLY, ids=str)
def test_exact_rows_touch_no_others(row, mode, width, monkeypatch):
    dense, sparse = table(width=width), table(width=width)
    taken, ways = [], execution._way
    monkeypatch.setattr(execution, "_way", lambda *a: taken.append(ways(*a)) or taken[-1])
    stepped(row.make(), sparse, mode, [of_rows(i, width=width) for i in range(6)])
    assert {way.__name__ for way, _ in taken} == {"rows"}
    stepped(row.make(), dense, mode, [densely(of_rows(i, width=width)) for i in range(6)])
    np.testing.assert_allclose(numpy([sparse])[0], numpy([dense])[0], rtol=2e-6, atol=1e-6)
    rest = np.setdiff1d(np.arange(300), [0, 2, 7, 299])
    np.testing.assert_array_equal(numpy([sparse])[0][rest], numpy([table(width=width)])[0][rest])


@TENSORFLOW
@every_row_in("mode", ["eager", "graph", "xla"])
def test_lazy_rows_are_updated_as_if_they_were_all(row, mode):
    chosen = [0, 2, 7, 299]
    lazy, alone = table(), keras.Variable(numpy([table()])[0][chosen])
    one, other = row.make(sparse="lazy", weight_decay=0.1), row.make(weight_decay=0.1)
    stepped(one, lazy, mode, [of_rows(i) for i in range(4)])
    stepped(other, alone, mode, [densely(of_rows(i)).numpy()[chosen] for i in range(4)])
    np.testing.assert_allclose(numpy([lazy])[0][chosen], numpy([alone])[0], rtol=1e-5, atol=1e-6)
    rest = np.setdiff1d(np.arange(300), chosen)
    np.testing.assert_array_equal(numpy([lazy])[0][rest], numpy([table()])[0][rest])
    for slot, theirs in zip(one.parts, other.parts, strict=True):
        if len(slot.shape):
            initial = row.arguments.get("initial_accumulator_value", 0.0)
            np.testing.assert_allclose(numpy([slot])[0][chosen], numpy([theirs])[0], rtol=1e-5, atol=1e-6)
            assert (numpy([slot])[0][rest] == np.float32(initial)).all()


@TENSORFLOW
@every_class
def test_decay_and_constraints_reach_every_row(row):
    for more, constraint in (({"weight_decay": 0.5}, None), ({}, keras.constraints.MaxNorm(0.1, axis=0))):
        dense, sparse = table(), table()
        dense.constraint = sparse.constraint = constraint
        stepped(row.make(**more), sparse, "graph", [of_rows(0)])
        stepped(row.make(**more), dense, "graph", [densely(of_rows(0))])
        np.testing.assert_allclose(numpy([sparse])[0], numpy([dense])[0], rtol=1e-5, atol=1e-6)
        assert not np.array_equal(numpy([sparse])[0][1], numpy([table()])[0][1])


@TENSORFLOW
@pytest.mark.parametrize("more", [{"clipnorm": 1.0}, {"nonfinite": "skip"}, {"track_gradient_norm": True}], ids=str)
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_lazy_rows_that_repeat_leave_all_others_alone(mode, more):
    """Row 0 is often the padding: nothing that is done to gradients on the way may touch it."""
    lazy, optimizer = table(), kopt.Adam(0.1, sparse="lazy", **more)
    given = [of_rows(i, indices) for i, indices in enumerate([[0, 1, 1], [0, 1, 1], [3, 3, 5], [3, 3, 5]])]
    stepped(optimizer, lazy, mode, given[:2])
    before = numpy([lazy])[0]
    stepped(optimizer, lazy, mode, given[2:])
    moved = np.flatnonzero((numpy([lazy])[0] != before).any(axis=1))
    assert moved.tolist() == [3, 5]


@TENSORFLOW
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_lazy_rows_and_a_constraint(mode):
    lazy, free = table(), table()
    lazy.constraint = lambda w: ops.clip(w, -0.5, 0.5)
    stepped(kopt.Adam(0.1, sparse="lazy"), lazy, mode, [of_rows(0)])
    stepped(kopt.Adam(0.1, sparse="lazy"), free, mode, [of_rows(0)])
    np.testing.assert_array_equal(numpy([lazy])[0], np.clip(numpy([free])[0], -0.5, 0.5))


@TENSORFLOW
def test_lazy_rows_are_refused_where_they_would_be_dense():
    import tensorflow as tf

    with pytest.raises(ValueError, match='^`sparse` must be "exact" beside `gradient_accumulation_steps`: a sum has'):
        kopt.Adam(sparse="lazy", gradient_accumulation_steps=2)
    with tf.distribute.OneDeviceStrategy("cpu").scope(), pytest.raises(ValueError, match="^`sparse` must .* strategy"):
        kopt.Adam(sparse="lazy")

    class ByNorm(kopt.Optimizer):
        rule = staticmethod(lambda g, w, *, at: (at.learning_rate * g / ops.norm(g),))

    with pytest.raises(ValueError, match='^`sparse` must be "exact" with a rule that is not declared `elementwise`'):
        ByNorm(0.1, sparse="lazy").build([table()])


@TENSORFLOW
def test_an_island_is_compiled_once_whatever_the_number_of_rows():
    """What goes into it has a shape that is known, though the number of rows is not."""
    import tensorflow as tf

    mine, optimizer = table(), kopt.RMSprop()
    optimizer.build([mine])
    width = tuple(mine.shape)[1]

    def step(values, indices):
        optimizer.apply([tf.IndexedSlices(values, indices, (300, width))], [mine])

    specs = tf.TensorSpec((None, width)), tf.TensorSpec((None,), "int64")
    graph = tf.function(step, autograph=False).get_concrete_function(*specs).graph
    (island,) = [o for o in graph.get_operations() if "PartitionedCall" in o.type]
    assert all(tensor.shape.is_fully_defined() for tensor in island.inputs)


@TENSORFLOW
@every_class
def test_embeddings_in_fit(row):
    """A lookup that reads the whole table, and one that asks for the rows, train alike; also without any row."""
    import tensorflow as tf

    class Lookup(keras.layers.Embedding):
        def call(self, inputs):
            return tf.gather(self.embeddings.value, inputs)

    weights = []
    for layer in (keras.layers.Embedding, Lookup):
        keras.utils.set_random_seed(0)
        small = [keras.Input((2,), dtype="int32"), layer(9, 4), keras.layers.Flatten(), keras.layers.Dense(1)]
        small = keras.Sequential(small)  # whose slots are in a slab
        for eagerly in (False, True):
            small.compile(row.make(**SPARSE), loss="mse", run_eagerly=eagerly, jit_compile=False)
            before = small.get_weights()[0]
            small.fit(np.arange(20).reshape(10, 2) % 7, np.ones((10, 1)), batch_size=4, verbose=0)
            moved = (small.get_weights()[0] != before).any(axis=1)
            assert moved.tolist() == [True] * 7 + [False] * 2
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((2,), dtype="int32"), layer(300, 64), keras.layers.Flatten()])
        model.compile(row.make(**SPARSE), loss="mse", jit_compile=False)
        model.fit(np.arange(20).reshape(10, 2) % 7, np.ones((10, 128)), batch_size=4, epochs=2, verbose=0)
        weights.append(model.get_weights()[0])
    np.testing.assert_allclose(*weights, rtol=1e-6)
    assert (weights[0][7:] == weights[1][7:]).all()


SPARSE = {"sparse": "lazy"}


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow has gradients of chosen rows")
def test_lazy_rows_are_refused_where_there_are_none():
    message = rf'^`sparse` must be "exact" on {BACKEND}, where no gradient has rows. Received: sparse=\'lazy\'$'
    with pytest.raises(ValueError, match=message):
        kopt.Adam(sparse="lazy")
