"""Data at a position: what comes from batch `start` of pass `n` on is what came there before."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import kopt
from kopt._keras import passes
from tests.conftest import BACKEND

ROWS = 10
seekable = kopt.data.seekable


class Items(keras.utils.PyDataset):
    def __init__(self, number=0, **arguments):
        super().__init__(**arguments)
        self.number = number

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return np.full((2, 1), i + 10 * self.number, "float32"), np.zeros((2, 1), "float32")


def pairs(size=1):
    x = np.arange(float(ROWS), dtype="float32").reshape(ROWS, 1)
    return tf.data.Dataset.from_tensor_slices((x, x)).batch(size)


def arrays(shuffle, x=None):
    x = np.arange(ROWS).reshape(ROWS, 1) if x is None else x
    adapter = passes.ArrayDataAdapter(x, x, batch_size=3, shuffle=shuffle)
    return passes.ordered_arrays(adapter, seed=5)


WAYS = {
    "arrays": lambda: arrays(False),
    "shuffled": lambda: arrays(True),
    "in batches": lambda: arrays("batch"),
    "items": lambda: seekable(Items()),
    "items shuffled": lambda: seekable(Items(), shuffle=True, seed=3),
    "items by workers": lambda: seekable(Items(workers=2), shuffle=True),
    "items made": lambda: seekable(Items),
    "dataset": lambda: seekable(pairs(2)),
    "dataset made": lambda: seekable(lambda n: pairs().unbatch().shuffle(ROWS, seed=n).batch(3), num_batches=4),
}


def taken(adapter):
    """The batches of an adapter, as the backend's `fit` reads them."""
    if BACKEND == "tensorflow":
        return [batch[0].numpy().ravel().tolist() for batch in adapter.get_tf_dataset()]
    if BACKEND == "jax":
        return [np.asarray(batch[0]).ravel().tolist() for batch in adapter.get_jax_iterator()]
    return [batch[0].cpu().numpy().ravel().tolist() for batch in adapter.get_torch_dataloader()]


@pytest.mark.parametrize("way", WAYS)
def test_every_position_can_be_taken(way):
    data = WAYS[way]()
    passes = [taken(data.rest(n, 0)) for n in range(3)]
    assert all(len(batches) == data.num_batches for batches in passes)
    again = WAYS[way]()
    for n in (2, 0, 1):
        for start in range(data.num_batches):
            assert taken(again.rest(n, start)) == passes[n][start:]
    assert (passes[0] == passes[1]) == (way in ("arrays", "items", "dataset"))


def test_one_pass_follows_the_other():
    data = WAYS["shuffled"]()
    expected = [taken(data.rest(n, 0)) for n in range(2)]
    assert [[batch[0].ravel().tolist() for batch in data.get_numpy_iterator()] for _ in range(2)] == expected


@pytest.mark.parametrize("way", WAYS)
def test_fit_sees_each_batch_once(way):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    data = WAYS[way]()
    model.fit(data, epochs=2, verbose=0)
    assert int(model.optimizer.iterations) == 2 * data.num_batches


def test_arrays_of_all_kinds_are_ordered():
    x = {"a": np.arange(ROWS), "b": (keras.ops.arange(ROWS), np.ones((ROWS, 2)))}
    for batch in arrays(True, x).get_numpy_iterator():
        (x, _) = batch
        assert np.array_equal(x["a"], x["b"][0])
        assert x["b"][1].shape == (len(x["a"]), 2)


def test_the_order_of_arrays_moves_no_random_state():
    before = kopt.callbacks.training.random_state()
    taken(arrays(True).rest(0, 0))
    after = kopt.callbacks.training.random_state()
    assert np.array_equal(before["python"]["words"], after["python"]["words"])
    assert np.array_equal(before["numpy"]["state"]["key"], after["numpy"]["state"]["key"])
    assert all(np.array_equal(before["backend"][key], after["backend"][key]) for key in before["backend"])


class Draws(Items):
    def __getitem__(self, i):
        return np.random.random((2, 1)), np.zeros((2, 1))


class Shuffles(Items):
    def on_epoch_end(self):
        pass


@pytest.mark.parametrize(("arguments", "match"), [
    ({"source": np.ones(3)}, "`source` must be a tf.data.Dataset, a keras.utils.PyDataset, or a function"),
    ({"source": lambda n: [1]}, "or a function of the number of a pass that returns one. Received: source="),
    ({"source": pairs(2).shuffle(ROWS)}, "the same whenever it is read; its first batches were others"),
    ({"source": lambda n: pairs().shuffle(ROWS)}, "lambda n: dataset.shuffle\\(size, seed=n\\)"),
    ({"source": Shuffles()}, "without `on_epoch_begin` and `on_epoch_end`"),
    ({"source": Draws()}, "the same whenever it is read"),
    ({"source": pairs(), "shuffle": True}, "`shuffle` must be False with a tf.data.Dataset"),
    ({"source": pairs(), "shuffle": 1}, "`shuffle` must be True or False"),
    ({"source": pairs(), "num_batches": 0}, "`num_batches` must be an integer of 1 or more"),
    ({"source": pairs(), "seed": -1}, "`seed` must be an integer of 0 or more"),
])  # fmt: skip
def test_what_cannot_be_repeated_is_refused(arguments, match):
    keras.utils.set_random_seed(1)
    with pytest.raises(ValueError, match=match):
        seekable(**arguments)


def test_what_fit_would_not_use_is_refused():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="`class_weight` must be None beside `kopt.data.seekable"):
        model.fit(seekable(Items()), class_weight={0: 1.0}, verbose=0)


def test_a_pass_goes_on_in_the_next_epoch():
    """Keras ends what its workers do when an epoch ends, and cannot go on."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(seekable(Items(workers=2)), steps_per_epoch=2, epochs=3, verbose=0)
    assert int(model.optimizer.iterations) == 6
