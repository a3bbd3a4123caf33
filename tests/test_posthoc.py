"""Any average after the training, from the means of its segments."""

import keras
import numpy as np
import pytest

import kopt
from kopt.callbacks.segments import Segments
from tests import oracles
from tests.test_callback_base import Weights, place
from tests.training import X, Y, near, network, numpy

Polyak = kopt.callbacks.PolyakAveraging


def train(callback, *others, epochs=8, **more):
    keras.utils.set_random_seed(0)
    model = network(keras.optimizers.SGD(0.1))
    model.fit(X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=[callback, *others], **more)
    return model


def series():
    """The weights after each update, a list for each variable."""
    watch = Weights()
    model = train(watch)
    return [[weights[place(variable)] for weights in watch.updates] for variable in model.trainable_variables]


@pytest.mark.parametrize(("tail", "steps"), [(1.0, 48), (0.5, 24), (0.25, 12), (1 / 8, 6)])
@pytest.mark.parametrize("at_end", ["averaged", "raw"])
def test_a_tail_is_exact(tail, steps, at_end):
    callback = Polyak(momentum=0.9, segment_every_epochs=1, on_train_end=at_end)
    train(callback)
    found = callback.posthoc(tail=tail)
    near(found.trainable_variables, [np.mean(one[-steps:], 0) for one in series()], 1e-6)


def test_segments_that_do_not_end_with_the_training():
    callback = Polyak(segment_every_epochs=3)
    train(callback)
    assert [one["updates"] for (one,) in callback.segments_] == [18, 18]
    near(callback.posthoc(tail=1.0).trainable_variables, [np.mean(one, 0) for one in series()], 1e-6)
    near(callback.posthoc(tail=0.25).trainable_variables, [np.mean(one[-12:], 0) for one in series()], 1e-6)
    callback = Polyak(segment_every_epochs=2, start_epoch=1, update_every_steps=2)
    train(callback)
    assert [one["updates"] for (one,) in callback.segments_] == [12, 12, 12]
    near(callback.posthoc(tail=1.0).trainable_variables, [np.mean(one[7::2], 0) for one in series()], 1e-6)


@pytest.mark.parametrize("window", [1, 40, 100, 400])
def test_a_window_is_near(window):
    """The bound of the module: a window of four segments and more within 3 % of how far the weights have moved."""
    rng = np.random.default_rng(0)
    weights = np.cumsum(rng.normal(size=(400, 50)), 0)  # a random walk: nothing is smooth
    closed = [{"updates": 10, "means": [weights[i : i + 10].mean(0)]} for i in range(0, 400, 10)]
    segments = Segments(closed)
    (found,) = segments.mean(segments.shares(window_steps=window))
    if window == 1:
        assert np.array_equal(found, closed[-1]["means"][0])
        return
    exact = oracles.polyak(list(weights), momentum=1 - 1 / window)
    assert np.linalg.norm(found - exact) < 0.03 * np.linalg.norm(weights[-1] - exact)


def test_shares_are_those_of_the_updates():
    closed = [{"updates": n, "means": [np.ones(1)]} for n in (3, 5, 2, 4)]
    segments = Segments([*closed[:2], {"updates": 0, "means": []}, *closed[2:]])
    m = 1 - 1 / 6
    every = m ** np.arange(14)[::-1] / np.sum(m ** np.arange(14))
    expected = [every[a:b].sum() for a, b in ((0, 3), (3, 8), (8, 10), (10, 14))]
    np.testing.assert_allclose(segments.shares(window_steps=6), expected)
    np.testing.assert_allclose(segments.shares(tail=0.5), [0, 1 / 7, 2 / 7, 4 / 7])
    np.testing.assert_allclose(segments.shares(tail=1e-9), [0, 0, 0, 1])
    assert segments.total == 14
    assert {"tail": 1.0} in segments.candidates()


def test_select_takes_the_best_by_loss():
    callback = Polyak(segment_every_epochs=1)
    model = train(callback)
    before = numpy(model.variables)
    found = callback.posthoc(select=(X, Y))
    losses = [one["loss"] for one in callback.tried_]
    assert len(losses) == 6  # windows of 4 segments and of 8; tails of 1, 2, 4 and 8
    assert all(np.array_equal(a, b) for a, b in zip(before, numpy(model.variables), strict=True))
    np.testing.assert_allclose(found.evaluate(X, Y, verbose=0), min(losses), rtol=1e-5)
    for one in callback.tried_:
        arguments = {name: value for name, value in one.items() if name != "loss"}
        loss = callback.posthoc(**arguments).evaluate(X, Y, verbose=0)
        np.testing.assert_allclose(loss, one["loss"], rtol=1e-5)


def test_in_the_middle_of_a_fit():
    seen = []
    callback = Polyak(segment_every_epochs=2)
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(numpy(callback.posthoc(tail=1.0).trainable_variables))
    )
    train(callback, look, epochs=3)
    near(seen[2], [np.mean(one[:18], 0) for one in series()], 1e-6)


def test_with_batch_normalization():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    callback = Polyak(segment_every_epochs=1, update_bn=X)
    model.fit(X, Y, batch_size=4, epochs=4, verbose=0, callbacks=[callback])
    twin = callback.posthoc(tail=0.5)
    statistics = numpy([twin.layers[1].moving_mean, twin.layers[1].moving_variance])
    kopt.update_bn(twin, X)
    near([twin.layers[1].moving_mean, twin.layers[1].moving_variance], statistics, 1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "`window_steps` must be given, or `tail`, or `select`"),
        ({"tail": 0.5, "window_steps": 5}, "`tail` must be left out beside `window_steps`"),
        ({"tail": 0}, "`tail` must be a number in"),
        ({"tail": 1.5}, "`tail` must be a number in"),
        ({"window_steps": 0.5}, "`window_steps` must be a number of 1 or more"),
        ({"select": "best"}, "`select` must be .x, y."),
        ({"select": X}, "`select` must be .x, y."),
    ],
)
def test_refusals(wrong, message):
    callback = Polyak(segment_every_epochs=1)
    train(callback, epochs=1)
    with pytest.raises(ValueError, match=f"^{message}.* Received: "):
        callback.posthoc(**wrong)


def test_without_segments_it_is_refused():
    callback = Polyak()
    with pytest.raises(ValueError, match="^`segment_every_epochs` must be given to the callback before `fit`"):
        callback.posthoc(tail=0.5)
    with pytest.raises(RuntimeError, match="has averaged nothing yet"):
        Polyak(segment_every_epochs=1).posthoc(tail=0.5)
