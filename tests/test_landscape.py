"""The loss of a model along lines and in planes: what `evaluate` gives there, and a model that is as it was."""

import keras
import numpy as np
import pytest
from keras import layers

import kopt
from kopt import weights
from kopt.landscape import directions, evaluation
from tests.conftest import BACKEND, FLOATX
from tests.training import mirrored, numpy

pytestmark = pytest.mark.skipif(FLOATX != "float32", reason="models compute in float32 here")
RNG = np.random.default_rng(0)
X = RNG.normal(1.0, 2.0, size=(40, 4)).astype("float32")
Y = RNG.integers(0, 3, 40)
COUNTS = RNG.uniform(0.5, 2, 40).astype("float32")
slice_1d, plane = kopt.landscape.slice_1d, kopt.landscape.plane
QUIET = {"verbose": 0, "batch_size": 16}


def network(seed=0, **compiled):
    """With all that can be lost: batch normalization, a penalty, random layers, an integer weight, metrics."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, kernel_regularizer="l2"),
            layers.BatchNormalization(),
            Counts(),
            layers.Dropout(0.3),
            layers.Dense(3, activation="softmax"),
        ]
    )
    loss, metrics = "sparse_categorical_crossentropy", ["accuracy", keras.metrics.SparseCategoricalCrossentropy()]
    model.compile(**{"optimizer": "adam", "loss": loss, "metrics": metrics, **compiled})
    return model


class Counts(layers.Layer):
    def build(self, shape):
        self.count = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)

    def call(self, x):
        return x


def line(seeds=(0, 1)):
    """A linear model, whose squared error is a parabola."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    model.compile(loss="mse")
    drawn = [np.random.default_rng(seed) for seed in seeds]
    return model, [[one.normal(size=(4, 2)).astype("float32"), one.normal(size=2).astype("float32")] for one in drawn]


TARGETS = RNG.normal(size=(40, 2)).astype("float32")


def squared(kernel, bias):
    return np.mean((X.astype("float64") @ kernel + bias - TARGETS) ** 2)


def state(model):
    keras.callbacks.Callback().set_model(model)
    return numpy([*model.variables, *model.metrics_variables, *model.optimizer.variables])


def same(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def by_hand(model, arrays, update_bn, **data):
    """What `evaluate` gives with other weights."""
    kept = model.get_weights()
    model.set_weights(arrays)
    if update_bn:
        kopt.update_bn(model, X, batch_size=16)
    found = model.evaluate(**data, batch_size=16, verbose=0, return_dict=True)
    model.set_weights(kept)
    return found


@pytest.mark.parametrize("update_bn", [True, False])
def test_it_is_what_evaluate_gives(update_bn):
    one, other = network(0), network(1)
    for model, shift in ((one, 0.5), (other, -0.5)):
        model.layers[1].moving_mean.assign([shift] * 5)
    other.layers[2].count.assign(7)
    data = {"x": X, "y": Y, "sample_weight": COUNTS}
    one.evaluate(**data, batch_size=16, verbose=0)
    given = {**data, "points": [one, other], "positions": [-0.5, 0.25, 1.0], "update_bn": update_bn}
    before = state(one)
    found = slice_1d(one, **given, **QUIET)
    assert same(state(one), before)
    assert found.positions.tolist() == [-0.5, 0, 0.25, 1]
    assert found.values.keys() == {"loss", "accuracy", "sparse_categorical_crossentropy"}
    assert not np.allclose(found.values["loss"], found.values["sparse_categorical_crossentropy"])  # the penalty
    ends = one.get_weights(), other.get_weights()
    for place, position in enumerate(found.positions):
        arrays = [(1 - position) * a + position * b if a.dtype.kind == "f" else a for a, b in zip(*ends, strict=True)]
        expected = by_hand(one, arrays, update_bn, **data)
        for name, value in expected.items():
            assert found.values[name][place] == pytest.approx(value, rel=2e-5), (name, position)
    assert slice_1d(one, **given, **QUIET).loss.tolist() == found.loss.tolist()


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[i * 16 : (i + 1) * 16], Y[i * 16 : (i + 1) * 16]


def dataset():
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is an extra")
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)


def test_batches_are_as_good_as_arrays():
    """Also for the statistics, on which all three differ from those of other data."""
    model = network()
    where = {"points": None, "positions": [0.5], **QUIET}
    found = slice_1d(model, X, Y, **where)
    for data in (Batches(), dataset()):
        np.testing.assert_allclose(slice_1d(model, data, **where).loss, found.loss, rtol=1e-6)
    np.testing.assert_allclose(slice_1d(model, X, Y, update_bn=Batches(), **where).loss, found.loss, rtol=1e-6)
    assert not np.allclose(slice_1d(model, X, Y, update_bn=X[:9], **where).loss, found.loss, rtol=1e-3)


def test_several_inputs_and_outputs():
    inputs = {name: keras.Input((4,), name=name) for name in ("a", "b")}
    outputs = {"c": layers.Dense(2, name="c")(inputs["a"]), "d": layers.Dense(3, name="d")(inputs["b"])}
    model = keras.Model(inputs, outputs)
    model.compile(loss={"c": "mse", "d": "sparse_categorical_crossentropy"}, metrics={"c": "mae"})
    data = {"x": {"a": X, "b": X}, "y": {"c": TARGETS, "d": Y}}
    found = slice_1d(model, **data, positions=[0.0], **QUIET)
    expected = model.evaluate(**data, batch_size=16, verbose=0, return_dict=True)
    assert {name: values[0] for name, values in found.values.items()} == pytest.approx(expected, rel=1e-6)


def test_a_squared_error_is_a_parabola():
    model, (one, other) = line()
    found = slice_1d(model, X, TARGETS, points=[one, other], n=9, **QUIET)
    between = [[(1 - t) * a + t * b for a, b in zip(one, other, strict=True)] for t in found.positions]
    np.testing.assert_allclose(found.loss, [squared(*arrays) for arrays in between], rtol=1e-5)
    assert found.marks.tolist() == [0, 1]
    assert found.unit == "share of the way"
    assert found.barriers.tolist() == [0]  # convex
    assert (found.positions[0], found.positions[-1], len(found.positions)) == (-0.25, 1.25, 11)


def test_a_broken_line():
    model, points = line((0, 1, 2))
    found = slice_1d(model, X, TARGETS, points=points, n=5, **QUIET)
    middle = [(a + b) / 2 for a, b in zip(*points[1:], strict=True)]
    np.testing.assert_allclose(found.loss[[0, 3, 4]], [squared(*w) for w in (points[0], middle, points[2])], rtol=1e-5)
    assert found.positions.tolist() == [0, 0.5, 1, 1.5, 2]
    assert len(found.barriers) == 2


def test_the_plane_through_three_points_is_a_quadratic():
    model, points = line((0, 1, 2))
    found = plane(model, X, TARGETS, points=points, n=4, **QUIET)
    flat = [np.concatenate([part.reshape(-1) for part in point]).astype("float64") for point in points]
    first = (flat[1] - flat[0]) / np.linalg.norm(flat[1] - flat[0])
    second = flat[2] - flat[0] - ((flat[2] - flat[0]) @ first) * first
    second /= np.linalg.norm(second)
    for place, (a, b) in enumerate(found.points):
        np.testing.assert_allclose(flat[0] + a * first + b * second, flat[place], atol=1e-5)
    for i, b in enumerate(found.y):
        for j, a in enumerate(found.x):
            w = flat[0] + a * first + b * second
            assert found.loss[i, j] == pytest.approx(squared(w[:8].reshape(4, 2), w[8:]), rel=1e-4)
    assert found.distances.tolist() == [0, 0, 0]
    low, high = found.points.min(0), found.points.max(0)
    for side, at_least, at_most in zip((found.x, found.y), low, high, strict=True):
        assert side[0] < at_least
        assert at_most < side[-1]
        assert np.ptp(side) == pytest.approx(1.5 * (high - low).max())


def test_the_plane_of_two_points_and_a_random_direction():
    model, points = line()
    found = plane(model, X, TARGETS, points=points, n=7, margin=0.25, seed=3, **QUIET)
    length = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(*points, strict=True)))
    np.testing.assert_allclose(found.points, [[0, 0], [length, 0]], rtol=1e-6)
    along = slice_1d(model, X, TARGETS, points=points, positions=found.x / length, **QUIET)
    shown = np.isin(along.positions, found.x / length) | np.isclose(along.positions % 1, 0)
    on_line = np.interp(found.x / length, along.positions[shown], along.loss[shown])
    np.testing.assert_allclose(found.loss[3], on_line, rtol=1e-4)
    other = plane(model, X, TARGETS, points=points, n=7, seed=4, **QUIET)
    np.testing.assert_allclose(other.loss[3], found.loss[3], rtol=1e-6)
    assert not np.allclose(other.loss[2], found.loss[2], rtol=1e-3)


def test_a_random_direction_is_at_right_angles_to_a_line_along_which_biases_move():
    point = [np.array([[1.0, 2.0], [3.0, -1.0]]), np.array([0.0, 0.0])]
    across = [np.array([[1.0, 1.0], [0.5, 2.0]]), np.array([9.0, -4.0])]
    (found,) = directions.random_directions(point, [(0,), None], 1, seed=0, across=[across])
    assert found[1] is None
    assert abs(directions.inner(found, across)) < 1e-9 * np.linalg.norm(found[0])


def test_the_plane_of_many_points_is_that_of_their_principal_directions():
    model, points = line(range(5))
    found = plane(model, X, TARGETS, points=points, n=2, **QUIET)
    rows = np.stack([np.concatenate([part.reshape(-1) for part in point]) for point in points]).astype("float64")
    rows -= rows.mean(0)
    _, _, principal = np.linalg.svd(rows)
    places = rows @ principal[:2].T
    np.testing.assert_allclose(np.abs(found.points), np.abs(places), rtol=1e-6)
    np.testing.assert_allclose(found.distances, np.linalg.norm(rows - places @ principal[:2], axis=1), rtol=1e-6)
    assert (found.points[-1] >= found.points[0]).all()
    assert "away from it" in str(found)


def zoo():
    images, words = keras.Input((6, 6, 4)), keras.Input((3,), dtype="int32")
    x = layers.Conv2D(3, 3, name="conv")(images)
    x = layers.DepthwiseConv2D(2, name="depthwise")(x)
    x = layers.Conv2DTranspose(2, 3, name="transposed")(x)
    x = layers.BatchNormalization(name="normal")(layers.Flatten()(x))
    w = layers.Flatten()(layers.Embedding(5, 2, name="embedding")(words))
    z = layers.Dense(4, name="dense")(layers.Concatenate()([x, w]))
    return keras.Model([images, words], layers.Dense(2, name="frozen", trainable=False)(z))


LENGTHS = {"conv": (0, 1, 2), "depthwise": (0, 1), "transposed": (0, 1, 3), "embedding": (1,), "dense": (0,)}


def test_directions_have_the_lengths_of_the_filters():
    model = zoo()
    variables = [v for v in model.weights if evaluation.is_float(v)]
    point = weights.arrays(variables)
    filters = directions.filters_of(model, "filter")
    first, second = directions.random_directions(point, filters, 2, seed=0)
    moved = {v.path: axes for v, axes in zip(variables, filters, strict=True) if axes is not None}
    assert {path.split("/")[0]: axes for path, axes in moved.items()} == LENGTHS
    assert all("bias" not in path for path in moved)
    for direction in (first, second):
        for w, d, axes in zip(point, direction, filters, strict=True):
            if axes is not None:
                sums = [np.sum(part.astype("float64") ** 2, axis=axes) for part in (w, d)]
                np.testing.assert_allclose(*sums, rtol=1e-6)
    assert abs(directions.inner(first, second)) < 1e-9 * directions.inner(first, first)
    again = directions.random_directions(point, filters, 2, seed=0)[1]
    assert same([d for d in again if d is not None], [d for d in second if d is not None])
    assert set(directions.filters_of(model, "layer")) == {None, (0, 1), (0, 1, 2, 3)}


def test_along_a_random_direction():
    model, _ = line()
    kernel, bias = model.get_weights()
    draw = np.random.default_rng(5).standard_normal((4, 2))
    step = draw * np.linalg.norm(kernel, axis=0) / np.linalg.norm(draw, axis=0)
    found = slice_1d(model, X, TARGETS, n=5, seed=5, **QUIET)
    np.testing.assert_allclose(found.loss, [squared(kernel + t * step, bias) for t in found.positions], rtol=1e-5)
    assert (found.unit, found.marks.tolist(), found.barriers.tolist()) == ("filter norms", [0], [])
    around = plane(model, X, TARGETS, n=3, span=0.5, seed=5, **QUIET)
    np.testing.assert_allclose(around.loss[1], [squared(kernel + t * step, bias) for t in around.x], rtol=1e-5)
    assert (around.x.tolist(), around.unit) == ([-0.5, 0, 0.5], "filter norms")


def test_points_are_arrays_models_files_and_ensembles(tmp_path):
    one, other = network(0), network(1)
    other.fit(X, Y, verbose=0)  # a file of it has the state of an optimizer
    other.save_weights(tmp_path / "other.weights.h5")
    other.save(tmp_path / "other.keras")
    one.fit(X, Y, verbose=0)
    before = state(one)
    where = {"positions": [0.0, 1.0], **QUIET}
    found = slice_1d(one, X, Y, points=[one, other], **where).loss
    files = [tmp_path / "other.weights.h5", str(tmp_path / "other.keras")]
    given = [[one.get_weights(), file] for file in files]
    given += [(one.weights, other.get_weights()), kopt.Ensemble([one, other])]
    for points in given:
        assert slice_1d(one, X, Y, points=points, **where).loss.tolist() == found.tolist()
    alone = [slice_1d(one, X, Y, points=points, positions=[0.0], **QUIET) for points in (other, files[0])]
    assert [record.loss.tolist() for record in alone] == [[found[1]]] * 2
    assert same(state(one), before)


class Batched(keras.metrics.Metric):
    """Counts the batches."""

    def __init__(self):
        super().__init__(name="batched")
        self.total = self.add_weight(shape=(), initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.total.assign(self.total + 1)

    def result(self):
        return self.total + 0.0


@pytest.mark.parametrize(("place", "error"), [("in a batch", KeyboardInterrupt), ("between", RuntimeError)])
def test_all_is_as_it_was_after_an_exception(place, error, monkeypatch):
    metric = Interrupted(error) if place == "in a batch" else Batched()
    model = network(metrics=[metric], run_eagerly=place == "in a batch")
    model.fit(X, Y, verbose=0)
    model.evaluate(X, Y, verbose=0)
    before, draws = state(model), kopt.backends.random_state()
    metric.left = 4
    if place == "between":

        def assign(variables, values, calls=[]):  # noqa: B006
            calls.append(1)
            if len(calls) == 5:
                raise error
            original(variables, values)

        original = weights.assign
        monkeypatch.setattr(evaluation.weights, "assign", assign)
    with pytest.raises(error):
        slice_1d(model, X, Y, n=5, **QUIET)
    monkeypatch.undo()
    metric.left = 10**9
    assert same(state(model), before)
    assert str(kopt.backends.random_state()) == str(draws)
    assert "reset_metrics" not in vars(model)
    assert np.isfinite(model.evaluate(X, Y, verbose=0)).all()
    model.fit(X, Y, verbose=0)


class Interrupted(Batched):
    """Raises after some batches."""

    def __init__(self, error):
        super().__init__()
        self.error, self.left = error, 10**9

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(y_true, y_pred)
        self.left -= 1
        if self.left < 0:
            raise self.error


def test_a_model_that_was_never_evaluated():
    model = network()
    before = numpy(model.weights)
    slice_1d(model, X, Y, positions=[1.0], **QUIET)
    assert same(numpy(model.weights), before)
    assert not any(np.any(value) for value in numpy(model.metrics_variables))
    assert not model.optimizer.built


def test_barriers():
    positions, loss = np.arange(7) / 2, np.array([1.0, 4.0, 3.0, 2.0, 1.5, np.inf, 0.0])
    record = kopt.landscape.Slice(positions, {"loss": loss}, [0, 1, 2, 3], "points passed")
    assert record.barriers.tolist() == [2, 0, np.inf]
    assert record.lowest == (3.0, 0.0)
    assert str(record) == "Slice of 7 positions: the loss is lowest at 3, 0; barriers 2, 0, inf"
    with pytest.raises(ValueError, match="read-only"):
        record.loss[0] = 0
    nowhere = kopt.landscape.Slice([0, 1], {"loss": [np.nan, np.inf]}, [0, 1], "share of the way")
    assert nowhere.lowest is None
    assert "nowhere finite" in str(nowhere)


def test_what_is_not_finite_is_kept():
    pytest.importorskip("matplotlib", reason="pictures come with the extra `plot`")
    model, (one, other) = line()
    far = [other[0] * np.float32(1e30), other[1]]
    found = slice_1d(model, X, TARGETS, points=[one, far], n=2, **QUIET)
    assert np.isinf(found.loss[-1])
    assert np.isfinite(found.loss[list(found.positions).index(0)])
    picture = kopt.plot.slice_1d(found)
    assert np.isinf(picture.data["loss"][-1])
    assert any("not finite" in text.get_text() for text in picture.axes[0].texts)


def test_a_leg_with_an_end_that_is_not_finite_has_no_barrier():
    for ends in ((1, np.nan), (np.inf, 1), (1, np.inf)):
        record = kopt.landscape.Slice([0, 0.5, 1], {"loss": [ends[0], 5, ends[1]]}, [0, 1], "share of the way")
        assert np.isnan(record.barriers).all()
    record = kopt.landscape.Slice([0, 0.5, 1], {"loss": [1, np.nan, 1]}, [0, 1], "share of the way")
    assert record.barriers.tolist() == [np.inf]
    with pytest.raises(ValueError, match="`unit` must be one of 'share of the way', "):
        kopt.landscape.Slice([0, 1], {"loss": [1, 1]}, [0, 1], "meters")


def test_a_plane_that_is_nowhere_finite_is_drawn():
    pytest.importorskip("matplotlib", reason="pictures come with the extra `plot`")
    record = kopt.landscape.Plane([0, 1], [0, 1], {"loss": np.full((2, 2), np.nan)}, [[0, 0]], [0], "filter norms")
    picture = kopt.plot.plane(record)
    assert "gray: not finite" in picture.axes[0].get_title(loc="left")
    with pytest.raises(ValueError, match=r"`model` must be a keras.Model, or a kopt.landscape.Slice. Received"):
        kopt.plot.slice_1d(record)


@pytest.mark.parametrize(
    "bad", [{"metrics": 3}, {"metrics": [["loss"]]}, {"ax": 3}, {"show": 3}, {"save": "x"}], ids=str
)
def test_what_a_picture_cannot_be_is_refused_before_anything_is_computed(bad, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures come with the extra `plot`")
    model, points = line()
    monkeypatch.setattr(kopt.landscape, "plane", lambda *given, **how: pytest.fail("it was computed"))
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be "):
        kopt.plot.plane(model, X, TARGETS, points=points, **bad)


def test_a_filter_of_attention_is_a_neuron_of_a_head():
    inputs = keras.Input((5, 4))
    attention = layers.MultiHeadAttention(num_heads=2, key_dim=3)
    model = keras.Model(inputs, attention(inputs, inputs))
    found = dict(zip([v.path for v in model.weights], directions.filters_of(model, "filter"), strict=True))
    kernels = {path.split("/")[-2]: axes for path, axes in found.items() if path.endswith("kernel")}
    assert kernels == {"query": (0,), "key": (0,), "value": (0,), "attention_output": (0, 1)}
    assert all(axes is None for path, axes in found.items() if path.endswith("bias"))


def test_progress_is_shown(capsys):
    model, points = line()
    slice_1d(model, X, TARGETS, points=points, n=2, **QUIET)
    assert capsys.readouterr().out == ""
    slice_1d(model, X, TARGETS, points=points, n=2)
    assert "4/4" in capsys.readouterr().out


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a strategy of TensorFlow")
def test_on_several_replicas():
    with mirrored().scope():
        model, points = line()
    found = slice_1d(model, X, TARGETS, points=points, positions=[0.5], **QUIET)
    middle = [(a + b) / 2 for a, b in zip(*points, strict=True)]
    assert found.loss[1] == pytest.approx(squared(*middle), rel=1e-5)


LINE, ENDS = line()
UNCOMPILED = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
UNBUILT = keras.Sequential([layers.Dense(2)])
UNBUILT.compile(loss="mse")
REFUSED = {
    "model": (
        ({"model": 3}, "a keras.Model"),
        ({"model": UNCOMPILED}, "compiled with a loss"),
        ({"model": UNBUILT}, "built"),
    ),
    "x": (({"x": X[:0], "y": TARGETS[:0]}, "at least one"), ({"x": X[:9]}, "as many rows"), ({"x": 3, "y": None}, "")),
    "y": (({"y": None}, "the targets"), ({"x": Batches()}, "left out")),
    "sample_weight": (({"x": Batches(), "y": None, "sample_weight": COUNTS}, "left out"),),
    "points": (
        ({"points": []}, "a list of these"),
        ({"points": 3}, "a list of these"),
        ({"points": ["nowhere.weights.h5"]}, "files that there are"),
        ({"points": [ENDS[0], ENDS[1][:1]]}, "2 arrays, of the shapes"),
        ({"points": [network()]}, "2 arrays, of the shapes"),
        ({"points": __file__}, "files of weights of this model"),
    ),
    "n": (({"n": 1}, "2 or more"), ({"n": 2.5}, "2 or more")),
    "directions": (({"directions": "random"}, "one of 'filter', 'layer'"),),
    "update_bn": (({"update_bn": 3}, "arrays"),),
    "batch_size": (({"batch_size": 0}, "1 or more"),),
    "seed": (({"seed": -1}, "0 or more"),),
    "verbose": (({"verbose": "loud"}, "0 or more"),),
}
ONE_OF_TWO = {
    slice_1d: {"positions": (({"positions": []}, "finite numbers"), ({"positions": [0, np.nan]}, "finite numbers"))},
    plane: {
        "margin": (({"margin": -1}, "0 or more"),),
        "span": (({"span": 0}, "greater than 0"),),
        "points": (
            ({"points": [ENDS[0], ENDS[0]]}, "that differ"),
            ({"points": [ENDS[0], ENDS[1], ENDS[0]]}, "not all on one line"),
            ({"points": [ENDS[0], ENDS[0], ENDS[1]]}, "the first two differ"),
        ),
    },
}


@pytest.mark.parametrize("compute", [slice_1d, plane])
def test_arguments_are_refused_before_any_work(compute, monkeypatch):
    monkeypatch.setattr(evaluation.Evaluation, "__call__", lambda *_: pytest.fail("the model was evaluated"))
    for name, cases in [*REFUSED.items(), *ONE_OF_TWO[compute].items()]:
        for given, why in cases:
            call = {"model": LINE, "x": X, "y": TARGETS, "verbose": 0, **given}
            with pytest.raises(ValueError, match=rf"(?s)`{name}`.*{why}.*Received: {name}="):
                compute(**call)


def test_a_direction_needs_kernels():
    model, _ = line()
    model.set_weights([np.zeros((4, 2)), np.ones(2)])
    with pytest.raises(ValueError, match="`points` must be such that its kernels have"):
        slice_1d(model, X, TARGETS, **QUIET)


def test_records_are_refused_that_do_not_fit():
    good = {"positions": [0, 1], "values": {"loss": [1, 2]}, "marks": [0, 1], "unit": "share of the way"}
    wrong = {"positions": [1, 0], "values": {"loss": [1]}, "marks": [0, 0.5]}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
            kopt.landscape.Slice(**{**good, name: value})
    good = {"x": [0, 1], "y": [0, 1], "values": {"loss": np.ones((2, 2))}, "points": [[0, 0]], "distances": [0]}
    for name, value in {"x": [0, 0], "y": [[1]], "values": {"mae": np.ones((2, 2))}, "points": [0, 0]}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
            kopt.landscape.Plane(**{**good, name: value}, unit="filter norms")


def test_the_picture_of_a_slice(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures come with the extra `plot`")
    loss, accuracy = np.array([1.0, 3.0, 2.0, 0.0, 1.0]), np.array([0.5, 0.1, 0.2, 0.9, 0.8])
    values = {"loss": loss, "accuracy": accuracy, "auc": accuracy}
    record = kopt.landscape.Slice(np.arange(5) / 4, values, [0, 0.75], "share of the way")
    figure, data = picture = kopt.plot.slice_1d(record, save=[tmp_path / "a.png", tmp_path / "b.svg"])
    assert picture.record is record
    assert [ax.get_ylabel() for ax in figure.axes] == ["loss", "accuracy"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), loss)
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_xdata(), record.positions)
    assert [text.get_text() for text in figure.axes[0].texts if text.get_text()] == ["barrier 2.33"]
    assert data["barriers"].tolist() == record.barriers.tolist()
    assert (tmp_path / "a.png").stat().st_size > 5000
    given = kopt.plot.slice_1d(record, metrics="auc", ax=figure.axes[1])
    assert given.axes == [figure.axes[1]]
    assert given.data.keys() == {"positions", "auc", "marks", "barriers"}


def test_the_picture_of_a_plane(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures come with the extra `plot`")
    x, y = np.linspace(-1, 3, 9), np.linspace(-2, 2, 9)
    loss = 1 + np.exp(8 * ((x - 1) ** 2 + y[:, None] ** 2))
    loss[0, 0], loss[0, 1] = np.nan, np.inf
    where = {"points": [[0, 0], [2, 0], [2.1, 0]], "distances": [0, 0, 0.5], "unit": "distance of weights"}
    record = kopt.landscape.Plane(x, y, {"loss": loss, "accuracy": 1 / loss}, **where)
    picture = kopt.plot.plane(record, metrics=["loss", "accuracy"], save=tmp_path / "plane.png")
    ax = picture.axes[0]
    assert (tmp_path / "plane.png").stat().st_size > 5000
    assert picture.data["lowest"].tolist() == [1, 0, 2]
    np.testing.assert_array_equal(picture.data["loss"], loss)
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), record.points)
    assert [text.get_text() for text in ax.texts] == ["1", "3"]  # 2 lies beneath 3
    assert ax.get_aspect() == 1
    assert ax.get_xlabel() == "first direction (distance of weights)"
    for said in ("lowest 2", "0.5 off the plane", "not finite"):
        assert said in ax.get_title(loc="left")
    levels = ax.collections[0].norm.boundaries
    assert levels[0] == 2
    assert levels[-1] < np.nanmax(loss[np.isfinite(loss)]) / 10  # what explodes leaves the basin its colors
    steps = np.diff(np.log(levels[1:] - levels[0]))
    np.testing.assert_allclose(steps, steps[0])
    flat = kopt.landscape.Plane(x, y, {"loss": np.ones((9, 9))}, **where)
    assert kopt.plot.plane(flat).data["loss"].min() == 1


def test_pictures_of_models(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures come with the extra `plot`")
    model, points = line((0, 1, 2))
    for draw, n in ((kopt.plot.slice_1d, 3), (kopt.plot.plane, 2)):
        picture = draw(model, X, TARGETS, points=points, n=n, verbose=0)
        np.testing.assert_array_equal(picture.data["loss"], picture.record.loss)
        record = picture.record
        for bad in ({"x": X}, {"n": 3}, {"metrics": "nonsense"}, {"show": 2}, {"save": "picture"}, {"ax": 3}):
            with pytest.raises(ValueError, match=rf"`{next(iter(bad))}` must be .*Received: {next(iter(bad))}="):
                draw(record, **bad)
    monkeypatch.setattr(evaluation.Evaluation, "__call__", lambda *_: pytest.fail("the model was evaluated"))
    with pytest.raises(ValueError, match="`save` must be"):
        kopt.plot.plane(model, X, TARGETS, save="plane.gif", verbose=0)
