"""Many devices give what one device gives: TensorFlow's strategies on two logical CPUs, JAX's on eight."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from tests.catalog import CLASSES
from tests.conftest import BACKEND
from tests.training import (
    PAIRS,
    START,
    STREAM,
    X,
    Y,
    equal,
    every_class,
    every_row,
    every_row_in,
    mirrored,
    near,
    network,
    numpy,
    train,
    two,
)

CONDITIONS = {
    "plain": {},
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "accumulation": {"gradient_accumulation_steps": 2},
    "average": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    "skip": {"nonfinite": "skip", "gradient_accumulation_steps": 2, "track_gradient_norm": True},
    "decay": {"l2": 0.1, "weight_decay": 0.1, "loss_scale_factor": 2.0},
}
ALWAYS = "plain", "decay"  # what a rule has a part in; the rest of the way to it does not know which one it is
BAD = 3  # the step at which "skip" gets a bad gradient, on one device of many
TENSORFLOW = pytest.mark.skipif(BACKEND != "tensorflow", reason="strategies are TensorFlow's")
JAX = pytest.mark.skipif(BACKEND != "jax", reason="Keras distributes so on JAX")
every_condition = pytest.mark.parametrize("condition", CONDITIONS)


def conditions(row):
    return CONDITIONS if row in CLASSES else ALWAYS


def stream(condition):
    pairs = list(PAIRS)
    if condition == "skip":
        pairs[BAD] = [pairs[BAD][0] * np.nan, pairs[BAD][1]]
    return pairs


def shares(gradient, n):
    """What each of n devices sees of a gradient; their sum is the gradient, and their norms are not alike."""
    first = gradient * 0.5 + 1
    rest = [gradient * np.float32(0.5 / (n - 1)) - np.float32(1 / (n - 1))] * (n - 1)
    return [np.where(np.isnan(gradient), 0, first).astype("float32"), *rest]  # the first device sees nothing bad


def on_one_device(row, condition):
    optimizer, variables = row.make(**CONDITIONS[condition]), two()
    train("eager", optimizer, variables, stream(condition))
    return optimizer, variables


def distributed(strategy, gradient):
    parts = shares(gradient, 2)
    return strategy.experimental_distribute_values_from_function(
        lambda context: ops.convert_to_tensor(parts[context.replica_id_in_sync_group])
    )


@TENSORFLOW
@every_row_in("mode", ["eager", "graph"])
def test_replicas_equal_one_device(row, mode):
    import tensorflow as tf

    strategy = mirrored()
    with strategy.scope():
        optimizers = {name: row.make(**CONDITIONS[name]) for name in conditions(row)}
        variables = {name: two() for name in optimizers}
        for name, optimizer in optimizers.items():
            optimizer.build(variables[name])

    def step(gradients):
        for name, optimizer in optimizers.items():
            optimizer.apply(gradients[name], variables[name])

    run = functools.partial(strategy.run, step)
    run = run if mode == "eager" else tf.function(run)
    for i in range(len(STREAM)):
        run(args=({name: [distributed(strategy, g) for g in stream(name)[i]] for name in optimizers},))
    for name, optimizer in optimizers.items():
        one, weights = on_one_device(row, name)
        near(variables[name], weights)
        near(optimizer.variables, one.parts, tolerance=1e-5)
        for variable in [*variables[name], *optimizer.variables]:
            assert equal(variable.value.values[:1], variable.value.values[1:])


@JAX
@every_row
def test_devices_equal_one_device(row):
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    distribution = keras.distribution.DataParallel(devices=keras.distribution.list_devices())
    with distribution.scope():
        optimizers = {name: row.make(**CONDITIONS[name]) for name in conditions(row)}
        variables = {name: two() for name in optimizers}
        for name, optimizer in optimizers.items():
            optimizer.build(variables[name])
        by_device = NamedSharding(variables["plain"][0].value.sharding.mesh, PartitionSpec("batch"))

        def step(state, parts):
            return {
                name: optimizer.stateless_apply(state[name][1], [p.sum(0) for p in parts[name]], state[name][0])
                for name, optimizer in optimizers.items()
            }

        step = jax.jit(step)
        state = {n: ([v.value for v in variables[n]], [v.value for v in optimizers[n].variables]) for n in optimizers}
        for i in range(len(STREAM)):
            parts = {name: [np.stack(shares(g, 8)) for g in stream(name)[i]] for name in optimizers}
            state = step(state, jax.device_put(parts, by_device))
    for name in optimizers:
        one, weights = on_one_device(row, name)
        near(state[name][0], weights)
        near(state[name][1], one.parts, tolerance=1e-5)
        assert all(len(value.sharding.device_set) == 8 for pair in state[name] for value in pair)


def many_devices():
    if BACKEND == "tensorflow":
        return mirrored().scope()
    return keras.distribution.DataParallel(devices=keras.distribution.list_devices()[:4]).scope()


def embedding(optimizer):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential([keras.Input((3,)), layers.Embedding(10, 4), layers.Flatten(), layers.Dense(2)])
    model.compile(optimizer, loss="mse")
    return model


def dense(optimizer):
    keras.utils.set_random_seed(0)
    return network(optimizer)


ROWS = np.random.default_rng(3).integers(0, 10, size=(24, 3))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras distributes nothing on torch")
@every_class
@pytest.mark.parametrize(
    ("make", "x"), [(dense, X), pytest.param(embedding, ROWS, marks=pytest.mark.slow)], ids=["dense", "rows"]
)
def test_fit_on_many_devices_equals_fit_on_one(row, make, x):
    more = {"global_clipnorm": 0.1, "gradient_accumulation_steps": 2, "nonfinite": "skip", "use_ema": True}
    one = make(row.make(**more))
    one.fit(x, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    with many_devices():
        many = make(row.make(**more))
        many.fit(x, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    near(many.get_weights(), one.get_weights(), tolerance=1e-5)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras distributes nothing on torch")
@every_class
def test_loss_scaling_on_many_devices(row):
    one = dense(keras.optimizers.LossScaleOptimizer(row.make(global_clipnorm=0.1)))
    one.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    with many_devices():
        many = dense(keras.optimizers.LossScaleOptimizer(row.make(global_clipnorm=0.1)))
        many.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    near(many.get_weights(), one.get_weights(), tolerance=1e-5)


@JAX
@every_class
def test_state_is_split_over_devices_like_the_weights(row):
    more = {"global_clipnorm": 0.1, "gradient_accumulation_steps": 2, "nonfinite": "skip", "use_ema": True}
    one = dense(row.make(**more))
    one.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], keras.distribution.list_devices())
    layout = keras.distribution.LayoutMap(mesh)
    layout["body/kernel"] = ("model", None)
    with keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch").scope():
        many = dense(row.make(**more))
        many.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        near(many.get_weights(), one.get_weights(), tolerance=1e-5)
        kernel = many.get_layer("body").kernel
        of_kernel = [v for v in many.optimizer.variables if many.optimizer.named.get(id(v), "")[-1:] == (kernel.path,)]
        assert len(of_kernel) >= 2
        for variable in of_kernel:
            assert variable.value.sharding.is_equivalent_to(kernel.value.sharding, 2)


@TENSORFLOW
def test_a_replica_may_see_what_the_others_do_not():
    """Keras's LossScaleOptimizer judges by the first replica; the optimizer within it by the sum of all."""
    import tensorflow as tf

    strategy = mirrored()
    with strategy.scope():
        w = keras.Variable(START)
        scaled = keras.optimizers.LossScaleOptimizer(kopt.Adam(0.1, nonfinite="skip"))
        scaled.build([w])

    @tf.function
    def step(gradient):
        strategy.run(lambda g: scaled.apply([g], [w]), args=(gradient,))

    step(distributed(strategy, np.where(START > 0, np.nan, START)))
    assert equal([w], [START])
    assert numpy([scaled.inner_optimizer.skipped_steps])[0] == 1


@JAX
@pytest.mark.parametrize("kind", ["data", "model"])
def test_a_line_search_on_many_devices(kind):
    """The state is flat vectors, whatever devices the weights are split over."""
    if kind == "model":
        mesh = keras.distribution.DeviceMesh((4, 2), ["batch", "model"])
        layout = keras.distribution.LayoutMap(mesh)
        layout["dense.*kernel"] = (None, "model")
        distribution = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    else:
        distribution = keras.distribution.DataParallel(devices=keras.distribution.list_devices())
    with distribution.scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(2)])
        model.compile(kopt.LBFGS(), "mse")
        x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
        arguments = {"batch_size": 32, "shuffle": False, "verbose": 0}
        before = model.evaluate(x, x[:, :2], batch_size=32, verbose=0)
        model.fit(x, x[:, :2], epochs=25, callbacks=[kopt.callbacks.LineSearchMonitor()], **arguments)
        after = model.evaluate(x, x[:, :2], batch_size=32, verbose=0)
        assert after == pytest.approx(model.optimizer.loss, rel=1e-4)
        assert after < 0.05 * before
        history = kopt.minimize(model, x, x[:, :2], max_evals=20, verbose=0)
        assert history.history["loss"][-1] < after


@TENSORFLOW
@every_class
def test_in_the_scope_of_a_strategy_but_out_of_a_replica(row):
    with mirrored().scope():
        w = keras.Variable(START)
        optimizer = row.make(gradient_accumulation_steps=2, clipnorm=0.5)
        for g in STREAM:
            optimizer.apply([ops.convert_to_tensor(g)], [w])
    twin = keras.Variable(START)
    train("eager", row.make(gradient_accumulation_steps=2, clipnorm=0.5), [twin], [[g] for g in STREAM])
    assert equal([w], [twin])


@TENSORFLOW
def test_what_overwrites_its_variable_is_the_mean_of_the_replicas():
    import tensorflow as tf

    strategy = mirrored()
    with strategy.scope():
        w = keras.Variable(START)
        w.overwrite_with_gradient = True
        optimizer = kopt.SGD()
        optimizer.build([w])
        optimizer.apply([ops.ones((2, 3)) * 4], [w])  # out of a replica there is one only
        assert equal([w], [np.full((2, 3), 4.0)])
    tf.function(strategy.run)(lambda g: optimizer.apply([g], [w]), args=(distributed(strategy, START),))
    near([w], [START / 2])


@TENSORFLOW
@every_class
def test_strategies_that_are_refused(row):
    import tensorflow as tf

    central = tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"])
    for strategy in (tf.distribute.MultiWorkerMirroredStrategy(), central):
        name = type(strategy).__name__
        with (
            strategy.scope(),
            pytest.raises(ValueError, match=f"^`strategy` must be one of those .*MirroredStrategy, .*'{name}'$"),
        ):
            row.make()
    outside = row.make()
    with (
        mirrored().scope(),
        pytest.raises(ValueError, match="^`strategy` must be the one in whose scope "),
    ):
        dense(outside).fit(X, Y, verbose=0)
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        dense(row.make()).fit(X, Y, verbose=0)


@TENSORFLOW
def test_a_parameter_server_is_refused_by_name(monkeypatch):
    import tensorflow as tf

    from kopt import backends

    server = object.__new__(tf.distribute.ParameterServerStrategy)  # a real one waits for its cluster
    monkeypatch.setattr(backends, "strategy", lambda: server)
    with pytest.raises(
        ValueError, match="^`strategy` must be one of those .* Received: strategy='ParameterServerStrategy"
    ):
        kopt.Adam()


# What Keras does in the same case. A test here that fails after an upgrade may mean that Keras has mended it.


@TENSORFLOW
@pytest.mark.parametrize("clip", [{"clipnorm": 1.0}, {"clipvalue": 1.0}, {"global_clipnorm": 1.0}], ids=str)
def test_keras_clips_before_it_sums(clip):
    """Both replicas see 2 and send half of it; the sum is 2, clipped 1. Keras sends 1 and 1."""

    def moved(optimizer):
        strategy = mirrored()
        with strategy.scope():
            w = keras.Variable(np.ones(1, "float32"))
            optimizer = optimizer(0.1, **clip)
            optimizer.build([w])
        strategy.run(lambda: optimizer.apply([ops.full((1,), 1.0)], [w]))
        return float(w.numpy()[0])

    assert moved(kopt.SGD) == pytest.approx(0.9)
    assert moved(keras.optimizers.SGD) == pytest.approx(0.8)


@TENSORFLOW
@pytest.mark.parametrize(
    "more", [{"gradient_accumulation_steps": 2}, {"use_ema": True, "ema_overwrite_frequency": 2}], ids=str
)
def test_keras_cannot_branch_within_a_replica(more):
    for cls in (kopt.SGD, keras.optimizers.SGD):
        with mirrored().scope():
            model = dense(cls(0.1, **more))
        if cls is kopt.SGD:
            model.fit(X, Y, batch_size=8, verbose=0)
        else:
            with pytest.raises(Exception, match="merge_call"):
                model.fit(X, Y, batch_size=8, verbose=0)
