"""The layers: NumPy from the papers, other libraries, and that they are good layers of Keras on every backend."""

import itertools
import json
from fractions import Fraction

import keras
import numpy as np
import pytest
from keras import layers, ops

import kopt
from kopt._keras import modes
from kopt.layers import fractional_pooling
from kopt.layers.fractional_pooling import FractionalMaxPooling2D
from tests import oracles
from tests.conftest import BACKEND, FLOATX
from tests.training import near, numpy

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(6, 5)).astype("float32")
IMAGES = RNG.normal(size=(4, 9, 8, 3)).astype("float32")
MAKERS = {  # name -> (how to make it, what it takes)
    "DropPath": (lambda **more: kopt.layers.DropPath(**{"rate": 0.25} | more), ROWS),
    "DropPath, batch": (lambda **more: kopt.layers.DropPath(**{"rate": 0.25, "mode": "batch"} | more), IMAGES),
    "DropConnectDense": (lambda **more: kopt.layers.DropConnectDense(**{"units": 4, "rate": 0.25} | more), ROWS),
    "DropConnectConv2D": (
        lambda **more: kopt.layers.DropConnectConv2D(**{"filters": 4, "kernel_size": 3, "rate": 0.25} | more),
        IMAGES,
    ),
    "DropBlock2D": (lambda **more: kopt.layers.DropBlock2D(**{"rate": 0.25, "block_size": 3} | more), IMAGES),
    "pooling": (lambda **more: FractionalMaxPooling2D(**{"pool_ratio": 1.44} | more), IMAGES),
    "pooling, random": (
        lambda **more: FractionalMaxPooling2D(**{"pool_ratio": 1.44, "mode": "random", "overlapping": True} | more),
        IMAGES,
    ),
}
every_layer = pytest.mark.parametrize(("make", "x"), MAKERS.values(), ids=MAKERS)
RATED = {name: row for name, row in MAKERS.items() if "pooling" not in name}
every_rated = pytest.mark.parametrize(("make", "x"), RATED.values(), ids=RATED)
IN_FIT = {"tensorflow": ({"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True})}.get(BACKEND, ({},))
WIDE = ["float64"] if BACKEND != "jax" or FLOATX == "float64" else []
every_way = pytest.mark.parametrize("compiled", IN_FIT, ids=str)


def output(layer, x, training=True):
    return numpy([ops.cast(backend_free(layer(x, training=training)), "float32")])[0]


def backend_free(tensor):
    return tensor.detach() if BACKEND == "torch" else tensor


# Layers of Keras


@every_layer
def test_training_draws_and_inference_does_not(make, x):
    layer = make(seed=1)
    still = output(layer, x, training=False)
    drawn = [output(layer, x) for _ in range(8)]
    np.testing.assert_array_equal(output(layer, x, training=False), still)
    assert any(not np.array_equal(one, drawn[0]) for one in drawn)
    assert {one.shape for one in drawn} == {still.shape} == {tuple(layer.compute_output_shape(x.shape))}


@every_rated
def test_without_a_rate_and_at_inference_it_is_as_if_it_were_not_there(make, x):
    keras.utils.set_random_seed(1)
    plain, none = make(), make(rate=0)
    expected = x
    if plain.weights or hasattr(plain, "kernel_initializer"):
        config = {k: v for k, v in plain.get_config().items() if k not in ("rate", "drop_bias", "seed")}
        base = layers.Dense if "Dense" in type(plain).__name__ else layers.Conv2D
        theirs = base.from_config(config)
        theirs.build(x.shape)
        for layer in (plain, none):
            layer.build(x.shape)
            layer.set_weights(theirs.get_weights())
        expected = output(theirs, x)
    np.testing.assert_array_equal(output(plain, x, training=False), expected)
    np.testing.assert_array_equal(output(none, x), expected)
    assert not hasattr(none, "seed_generator")


@every_layer
def test_seeds(make, x):
    def draws(layer):
        if not layer.built:
            layer.build(x.shape)
        for weight in layer.weights:
            weight.assign(np.ones(weight.shape))
        return np.stack([output(layer, x) for _ in range(10)])

    np.testing.assert_array_equal(draws(make(seed=3)), draws(make(seed=3)))
    assert not np.array_equal(draws(make(seed=3)), draws(make(seed=4)))
    keras.utils.set_random_seed(5)
    first = draws(make())
    keras.utils.set_random_seed(5)
    np.testing.assert_array_equal(draws(make()), first)


@every_layer
def test_the_config_makes_the_same_layer(make, x):
    layer = make(seed=3, name="one", dtype="mixed_bfloat16")
    config = json.loads(json.dumps(layer.get_config()))
    again = type(layer).from_config(config)
    assert json.loads(json.dumps(again.get_config())) == config
    assert again.name == "one"


@every_layer
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", *WIDE])
def test_it_computes_in_the_dtype_of_its_policy(make, x, policy):
    layer = make(seed=0, dtype=policy)
    for training in (False, True):
        found = layer(x, training=training)
        assert keras.backend.standardize_dtype(found.dtype) == layer.compute_dtype
        assert np.isfinite(numpy([ops.cast(backend_free(found), "float32")])[0]).all()


@every_layer
def test_shapes_that_are_not_known_yet(make, x):
    symbolic = keras.Input((None,) * (x.ndim - 2) + x.shape[-1:])
    layer = make()
    made = layer(symbolic)
    assert made.shape[:-1] == (None,) * (x.ndim - 1)
    assert made.shape[-1] == layer.compute_output_shape(x.shape)[-1]
    model = keras.Model(symbolic, made)
    assert model.predict(x, verbose=0).shape == layer.compute_output_shape(x.shape)


@pytest.mark.parametrize("name", ["DropConnectConv2D", "DropBlock2D", "pooling", "pooling, random"])
def test_the_channels_may_come_first(name):
    if BACKEND == "tensorflow" and "Conv" in name:
        pytest.skip("TensorFlow has no such convolution on a CPU")
    last, first = (MAKERS[name][0](seed=2, data_format=one) for one in ("channels_last", "channels_first"))
    moved = IMAGES.transpose(0, 3, 1, 2)
    for layer, x in ((last, IMAGES), (first, moved)):
        layer.build(x.shape)
    first.set_weights(last.get_weights())
    for training in (False, True):
        found = output(first, moved, training).transpose(0, 2, 3, 1)
        np.testing.assert_allclose(found, output(last, IMAGES, training), rtol=1e-5, atol=1e-5)
    assert first.compute_output_shape(moved.shape)[2:] == last.compute_output_shape(IMAGES.shape)[1:3]


def network(**more):
    k = kopt.layers
    inputs = keras.Input((9, 8, 3))
    x = k.DropConnectConv2D(4, 3, 0.1, drop_bias=True, padding="same", activation="relu", name="convolution")(inputs)
    x = k.DropBlock2D(0.1, 3)(x)
    x = FractionalMaxPooling2D(1.3, mode="random")(x)
    x = FractionalMaxPooling2D((1.5, 1.4), overlapping=True)(x)
    x = layers.Flatten()(x)
    x = layers.Add()([k.DropConnectDense(x.shape[-1], 0.1)(x), k.DropPath(0.2)(x)])
    model = keras.Model(inputs, layers.Dense(2, dtype="float32")(x))
    model.compile(keras.optimizers.SGD(0.01), loss="mse", **more)
    return model


TARGETS = RNG.normal(size=(4, 2)).astype("float32")


def test_a_model_of_all_of_them_in_sixteen_bits_is_saved_and_loaded(tmp_path):
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = network()
        loss = model.fit(IMAGES, TARGETS, verbose=0).history["loss"]
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
    finally:
        keras.config.set_dtype_policy(previous)
    assert np.isfinite(loss).all()
    near(again.weights, model.weights, 0)
    near([again.predict(IMAGES, verbose=0)], [model.predict(IMAGES, verbose=0)])
    assert [type(one) for one in again.layers] == [type(one) for one in model.layers]


class Shift(layers.Layer):
    """Adds a weight to each entry of a row, so that its gradient can be read."""

    def build(self, shape):
        self.shift = self.add_weight(shape=shape[1:], initializer="zeros")

    def call(self, x):
        return x + self.shift


def gradients(made, x, **compiled):
    """The gradients of the sum of what each layer makes of `x`, a row, by the entries of the row."""
    inputs, shifts = keras.Input(x.shape[1:]), [Shift() for _ in made]
    outputs = [layer(shift(inputs)) for layer, shift in zip(made, shifts, strict=True)]
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(1.0), loss=[lambda y, found: ops.sum(found)] * len(made), **compiled)
    model.fit(x, [np.zeros(1)] * len(made), verbose=0)
    return [-gradient for gradient in numpy([shift.shift for shift in shifts])]


@every_way
def test_gradients_in_a_compiled_fit(compiled):
    dense = kopt.layers.DropConnectDense(50, 0.5, use_bias=False, kernel_initializer="ones", seed=0)
    made = [
        kopt.layers.DropPath(0.5, seed=0),
        kopt.layers.DropBlock2D(0.2, 3, seed=0),
        FractionalMaxPooling2D(1.4, mode="random"),
        FractionalMaxPooling2D(1.4),
        dense,
    ]
    path, block, *pools, drops = gradients(made, IMAGES[:1], **compiled)
    assert np.unique(path) in (0.0, 2.0)
    assert block.mean() == pytest.approx(1.0, rel=1e-5)
    assert len(np.unique(block)) == 2
    for pool in pools:
        np.testing.assert_array_equal(np.unique(pool), [0, 1])
        np.testing.assert_array_equal(pool.sum((0, 1)), 6 * 5)
    assert set((drops % 2).ravel()) == {0.0}
    assert (np.abs(drops - 50) < 50).all()
    assert len(np.unique(drops[0, 0])) > 1
    assert len(np.unique(numpy([dense.kernel])[0])) > 1, "its own weights have moved"


@every_way
def test_all_of_them_in_a_compiled_fit(compiled):
    model = network(**compiled)
    before = numpy(model.trainable_weights)
    loss = model.fit(IMAGES, TARGETS, verbose=0).history["loss"]
    assert np.isfinite(loss).all()
    assert all(not np.array_equal(a, b) for a, b in zip(before, numpy(model.trainable_weights), strict=True))


# The mean over draws


def test_the_mean_over_draws_is_the_output_at_inference():
    """Within four standard errors, for what is linear."""
    x = np.ones((20000, 1), "float32")
    found = output(kopt.layers.DropPath(0.3, seed=0), x)
    np.testing.assert_array_equal(np.unique(found), np.float32([0, 1 / 0.7]))
    assert abs(found.mean() - 1) < 4 * np.sqrt(0.3 / 0.7 / len(x))
    layer = kopt.layers.DropConnectDense(3, 0.3, drop_bias=True, seed=0, bias_initializer="ones")
    still = output(layer, ROWS, training=False)
    drawn = np.stack([output(layer, ROWS) for _ in range(300)])
    error = drawn.std(0) / np.sqrt(len(drawn))
    assert (np.abs(drawn.mean(0) - still) < 4.5 * error).all()
    w = numpy([layer.kernel])[0]
    expected = 0.3 / 0.7 * (np.square(ROWS) @ np.square(w) + 1)  # the paper's variance, and that of the bias
    np.testing.assert_allclose(drawn.var(0), expected, rtol=0.5)


def test_sixteen_bits_draw_as_often():
    found = output(kopt.layers.DropPath(0.002, seed=0, dtype="mixed_bfloat16"), np.ones((40000, 1), "float32"))
    assert abs((found == 0).mean() - 0.002) < 4 * np.sqrt(0.002 / 40000)


# DropPath


def test_drop_path_leaves_out_rows_or_the_batch():
    rows = output(kopt.layers.DropPath(0.5, seed=0), IMAGES.repeat(10, 0)) / IMAGES.repeat(10, 0)
    assert all(len(np.unique(row.round(4))) == 1 for row in rows)
    assert set(np.unique(rows.round(4))) == {0.0, 2.0}
    layer = kopt.layers.DropPath(0.5, "batch", seed=0)
    found = [np.unique((output(layer, IMAGES) / IMAGES).round(4)).tolist() for _ in range(8)]
    assert sorted(set(map(tuple, found))) == [(0.0,), (2.0,)]


def test_drop_path_is_that_of_torchvision_in_its_values():
    """A branch that is not finite is left out, too."""
    found = output(kopt.layers.DropPath(0.5, seed=0), np.full((64, 1), np.inf, "float32"))
    assert set(np.unique(found)) == {0.0, np.inf}


def test_rates_of_blocks():
    rates = kopt.layers.drop_path_rates
    near([np.array(rates(5, 0.3))], [np.linspace(0, 0.3, 5)])
    near([np.concatenate(rates([3, 3, 9, 3], 0.1))], [np.linspace(0, 0.1, 18)])
    assert [len(stage) for stage in rates((1, 2), 0.5)] == [1, 2]
    assert rates(1, 0.2) == [0.2]
    assert rates(5, 0.3)[-1] == 0.3
    for wrong in (0, [], [1, 0], "3", 2.5):
        with pytest.raises(
            ValueError, match=r"^`depths` must be an integer of 1 or more, or a list of such. Received: "
        ):
            rates(wrong, 0.1)


# DropConnect


@pytest.mark.parametrize("drop_bias", [False, True])
def test_weights_are_dropped_for_a_whole_batch(drop_bias):
    layer = kopt.layers.DropConnectDense(6, 0.5, drop_bias, seed=0, kernel_initializer="ones", bias_initializer="ones")
    found = output(layer, np.eye(7, dtype="float32")[[*range(7), 0]] * 10)
    bias = output(layer, np.zeros((1, 7), "float32"))
    assert set(np.unique(bias)) <= ({0.0, 2.0} if drop_bias else {1.0})
    np.testing.assert_array_equal(found[0], found[-1])
    assert set(np.unique(found)) <= ({0.0, 2.0, 20.0, 22.0} if drop_bias else {1.0, 21.0})
    assert len({tuple(row) for row in found[:7]}) > 1


def test_a_convolution_drops_the_same_weights_everywhere():
    layer = kopt.layers.DropConnectConv2D(3, 2, 0.5, seed=0, strides=2, use_bias=False, kernel_initializer="ones")
    found = output(layer, np.ones((2, 8, 8, 1), "float32"))
    assert all(len(np.unique(found[..., i])) == 1 for i in range(3))
    assert set(np.unique(found)) <= {0.0, 2.0, 4.0, 6.0, 8.0}


def test_lora_and_quantization():
    layer = kopt.layers.DropConnectDense(6, 0.5, seed=0, kernel_initializer="ones")
    layer.build((None, 5))
    layer.enable_lora(2)
    assert set(np.unique(output(layer, np.eye(5, dtype="float32")))) == {0.0, 2.0}
    for named in ({}, {"type_check": False}):  # Keras's models make a warning of it
        with pytest.raises(
            NotImplementedError, match=r"^A DropConnectDense cannot be quantized; its weights fit Keras's"
        ):
            layer.quantize("int8", **named)
    with pytest.raises(ValueError, match=r"^`dtype` must be without quantization. Received: dtype='int8_from_float32'"):
        kopt.layers.DropConnectConv2D(2, 3, 0.5, dtype="int8_from_float32")


# DropBlock


@pytest.mark.parametrize(("size", "side"), [(1, 6), (3, 9), (4, 9), (7, 5), (5, 5)])
def test_blocks_are_those_of_the_paper(size, side):
    rate, shape = 0.3, (6, side, 8, 2)
    found = output(kopt.layers.DropBlock2D(rate, size, seed=3), np.ones(shape, "float32"))
    drawn = numpy([keras.random.uniform(shape, dtype="float32", seed=keras.random.SeedGenerator(3))])[0]
    high, wide = min(size, side), min(size, 8)
    starts = side - high + 1, 8 - wide + 1
    gamma = rate / (high * wide) * side * 8 / (starts[0] * starts[1])
    begins = (drawn < gamma) & (np.arange(side) < starts[0])[:, None, None] & (np.arange(8) < starts[1])[:, None]
    assert begins.any()
    for image, places in zip(found, begins, strict=True):
        left = np.stack([oracles.blocks_left(places[..., i], size) for i in range(2)], -1)
        np.testing.assert_allclose(image, left / max(left.mean(), 1e-9), rtol=1e-5)


def test_the_share_that_blocks_leave_out():
    """Near the rate where they seldom overlap."""
    found = output(kopt.layers.DropBlock2D(0.05, 3, seed=0), np.ones((400, 12, 12, 4), "float32"))
    assert 0.045 < (found == 0).mean() < 0.055
    np.testing.assert_allclose(found.mean((1, 2, 3)), 1, rtol=1e-5)
    assert (found.mean((0, 3))[[0, -1]][:, [0, -1]] > found.mean((0, 3))[5:7, 5:7]).all(), "the rim is covered less"


def test_an_image_of_which_nothing_is_left_is_0():
    found = output(kopt.layers.DropBlock2D(0.9, 9, seed=0), np.ones((40, 3, 3, 1), "float32"))
    assert set(np.unique(found)) == {0.0, 1.0}


# Fractional pooling


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize(("ratio", "shape"), [(1.44, (8, 8)), ((1.3, 2.0), (13, 6)), (2.6, (11, 7)), (1.9, (3, 5))])
@pytest.mark.parametrize("mode", ["random", "pseudorandom"])
def test_regions_are_those_of_the_paper(mode, ratio, shape, overlapping):
    x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype("float32")
    layer = FractionalMaxPooling2D(ratio, overlapping, mode, seed=0)
    counts = layer.compute_output_shape(x.shape)[1:3]
    ratios = layer.pool_ratio
    assert counts == tuple(int(n / r) for n, r in zip(shape, ratios, strict=True))
    lasts = [n - overlapping for n in shape]
    fixed = [oracles.pseudorandom_edges(last, count, Fraction(1, 2)) for last, count in zip(lasts, counts, strict=True)]
    near([output(layer, x, training=False)], [np.stack([oracles.pooled(one, *fixed, overlapping) for one in x])], 0)
    for _ in range(3):
        axes = [orders(last, count) for last, count in zip(lasts, counts, strict=True)]
        if mode == "pseudorandom":
            us = [[Fraction(k, 2 * last) for k in range(1, 2 * last)] for last in lasts]
            axes = [{tuple(oracles.pseudorandom_edges(*pair, u)) for u in several}
                    for *pair, several in zip(lasts, counts, us, strict=True)]  # fmt: skip
        found = output(layer, x)
        possible = ([oracles.pooled(one, *edges, overlapping) for one in x] for edges in itertools.product(*axes))
        assert any(np.array_equal(images, found) for images in possible), "no regions of the paper give this"


def orders(last, count):
    """All edges between 0 and `last` whose distances are two numbers that follow each other."""
    least = last // count
    found = {(0,)}
    for _ in range(count):
        found = {(*edges, edges[-1] + step) for edges in found for step in (least, least + 1)}
    return {edges for edges in found if edges[-1] == last}


def test_all_orders_are_drawn_as_often():
    layer = FractionalMaxPooling2D(1.44, mode="random", seed=0)
    drawn = [tuple(numpy([layer._drawn(6, 4)])[0].tolist()) for _ in range(600)]
    counts = [drawn.count(order) for order in orders(6, 4)]
    assert len(counts) == 6
    assert min(counts) > 60
    assert sum(counts) == 600
    evenly = FractionalMaxPooling2D(1.44, seed=0)
    drawn = {tuple(numpy([evenly._drawn(6, 4)])[0].tolist()) for _ in range(40)}
    assert drawn == {(0, 1, 3, 4, 6), (0, 2, 3, 5, 6)}


@pytest.mark.parametrize("policy", ["float32", *WIDE])
def test_what_is_not_finite_is_not_lost(policy):
    x = np.full((1, 4, 4, 1), -np.inf)
    x[0, 0, 0], x[0, 3, 3] = np.nan, np.nan
    found = output(FractionalMaxPooling2D(1.5, overlapping=True, dtype=policy), x)[0, :, :, 0]
    np.testing.assert_array_equal(found, [[np.nan, -np.inf], [-np.inf, np.nan]])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own operation")
def test_regions_of_tensorflow_give_what_tensorflow_makes_of_them():
    import tensorflow as tf

    theirs, rows, columns = tf.nn.fractional_max_pool(IMAGES, [1.0, 1.44, 1.73, 1.0], pseudo_random=True, seed=1)
    made = fractional_pooling.pooled(IMAGES, 1, rows[:-1], rows[1:], 2)
    np.testing.assert_array_equal(fractional_pooling.pooled(made, 2, columns[:-1], columns[1:], 2), theirs)


@pytest.mark.parametrize(("count", "overlapping"), [(4, False), (7, True)])
def test_torch_where_all_regions_have_one_size(count, overlapping):
    """Its regions all have one size, which they have here only if a ratio is whole, or they overlap without a gap."""
    torch = pytest.importorskip("torch", reason="torch is an extra")
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    pool = torch.nn.FractionalMaxPool2d(2, output_size=count, _random_samples=torch.rand(2, 3, 2))
    theirs = pool(torch.tensor(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    layer = FractionalMaxPooling2D(8 / count, overlapping)
    for training in (False, True):
        np.testing.assert_array_equal(output(layer, x, training), theirs)


# Refusals; those of single arguments are in tests/test_bad_input.py


def test_an_image_that_cannot_be_pooled_is_refused():
    with pytest.raises(
        ValueError, match=r"`inputs` must be as high and wide as `pool_ratio`, \(3.0, 3.0\). Received: "
    ):
        FractionalMaxPooling2D(3)(np.ones((1, 2, 6, 1), "float32"))
    with pytest.raises(ValueError, match="expected ndim=4"):
        FractionalMaxPooling2D(1.5)(ROWS)
    with pytest.raises(ValueError, match="expected ndim=4"):
        kopt.layers.DropBlock2D(0.1)(ROWS)


# How layers are called


def with_batch_norm():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(momentum=0.5), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.0), loss="mse")
    return model, model.layers[0]


X = np.random.default_rng(0).normal(3.0, 2.0, (16, 3)).astype("float32")
Y = np.zeros((16, 1), "float32")


@pytest.mark.parametrize("within", [False, True])
def test_batch_normalization_uses_and_keeps_its_statistics_within_a_fit(within):
    model, norm = with_batch_norm()
    if within:
        model = keras.Sequential([keras.Input((3,)), keras.Sequential(model.layers)])
        model.compile(keras.optimizers.SGD(0.0), loss="mse")
    before, expected = numpy(norm.variables), model.evaluate(X, Y, verbose=0)
    with modes.called_with([norm], training=False):
        found = model.fit(X, Y, verbose=0).history["loss"][0]
    near([np.array(found)], [np.array(expected)])
    near(norm.variables, before, 0)
    model.train_function = None
    model.fit(X, Y, verbose=0)
    assert np.abs(numpy([norm.moving_mean])[0] - before[2]).min() > 0.5


def test_the_inner_context_counts_and_all_is_put_back():
    seen = []

    class Sees(layers.Layer):
        def call(self, x, scale, training=None):
            seen.append(training)
            return x * scale

    def fails(layer, deaf):
        with modes.called_with([layer, deaf, layer], training=True):
            layer(one, one, training=False)
            with modes.called_with([layer], training=False):
                layer(one, one, training=True)
                layer.call(one, one, True)
            layer(one, one)
            raise KeyError

    layer, deaf, one = Sees(), layers.Dense(1), np.ones((1, 1), "float32")
    with pytest.raises(KeyError):
        fails(layer, deaf)
    layer(one, one)
    layer(one, one, training=True)
    assert seen == [True, False, False, True, None, True]
    assert "call" not in vars(layer)
    assert "call" not in vars(deaf)
