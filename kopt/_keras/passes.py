"""Data that can be put at a position, as one of Keras's adapters; what Keras takes apart, put together in order."""

import sys

import keras
import numpy as np
from keras.src.trainers.data_adapters import array_slicing, get_data_adapter
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.data_adapter import DataAdapter
from keras.src.trainers.data_adapters.generator_data_adapter import GeneratorDataAdapter

from kopt._keras import frames


class Passes(DataAdapter):
    """Data that is the same whenever the same pass through it is asked for.

    `rest(n, start)` gives Keras's adapter of pass `n`, from batch `start` on.
    """

    def __init__(self, rest, num_batches):
        self.rest, self._num_batches = rest, num_batches
        self.position, self.is_epoch_new = (0, 0), True  # the position of the next iterator
        self.adapter = None  # of the pass that was asked for last

    def begin(self):
        self.check()
        self.end()
        self.adapter = self.rest(*self.position)
        self.adapter.on_epoch_begin()
        self.position = self.position[0] + 1, 0
        return self.adapter

    def end(self) -> None:
        adapter, self.adapter = self.adapter, None
        if adapter is not None:
            adapter.on_epoch_end()

    def on_epoch_begin(self):
        self.is_epoch_new = True

    def on_epoch_end(self):
        """Nothing: with `steps_per_epoch` a pass goes on in the next epoch."""

    def check(self) -> None:
        """Refuse what `fit` was given beside the data, and would not use."""
        for frame in frames():
            found = frame.f_locals
            if found.get("x") is self and "class_weight" in found:
                for name in ("y", "sample_weight", "class_weight"):
                    if found[name] is not None:
                        allowed = "None beside `kopt.data.seekable(...)`, whose batches hold it"
                        raise ValueError(f"`{name}` must be {allowed}. Received: {name}={found[name]!r:.60}")

    def get_numpy_iterator(self):
        return self.begin().get_numpy_iterator()

    def get_jax_iterator(self):
        return self.begin().get_jax_iterator()

    def get_torch_dataloader(self):
        return self.begin().get_torch_dataloader()

    def get_tf_dataset(self):
        owner = sys._getframe(1).f_locals.get("self")
        return each_pass(self, getattr(owner, "_distribute_strategy", None))

    @property
    def num_batches(self):
        return self._num_batches

    @property
    def batch_size(self):
        return None


def each_pass(passes, strategy):
    """A dataset for TensorFlow's `fit`, made anew for each pass; on the devices of a strategy."""
    import tensorflow as tf

    class EachPass(tf.distribute.DistributedDataset):
        element_spec = passes.rest(0, 0).get_tf_dataset().element_spec

        def __iter__(self):
            dataset = passes.begin().get_tf_dataset()
            return iter(strategy.experimental_distribute_dataset(dataset) if strategy else dataset)

    return EachPass()


def is_generator(adapter) -> bool:
    return isinstance(adapter, GeneratorDataAdapter)


def are_arrays(adapter) -> bool:
    return type(adapter) is ArrayDataAdapter


def ordered_arrays(adapter, seed) -> Passes:
    """Arrays in an order that follows from the seed and the number of the pass."""
    samples, size, shuffle, shared = adapter._num_samples, adapter._batch_size, adapter._shuffle, {}

    def rest(n, start):
        order = np.arange(samples)
        if shuffle == "batch":
            random = np.random.default_rng([seed, n])
            order = np.concatenate([random.permutation(order[i : i + size]) for i in range(0, samples, size)])
        elif shuffle:
            order = np.random.default_rng([seed, n]).permutation(samples)
        return Chosen(adapter, order[start * size :], shared)

    return Passes(rest, adapter.num_batches)


class Chosen(ArrayDataAdapter):
    """Keras's adapter of arrays, for these rows in this order."""

    def __init__(self, adapter, rows, shared):
        self.__dict__.update(adapter.__dict__, _shuffle=False)
        self.shared = shared  # by all passes: the arrays as TensorFlow's tensors
        size = self._batch_size
        self.batches = [rows[i : i + size] for i in range(0, len(rows), size)]

    def _get_iterator(self, convert, inputs):
        for rows in self.batches:
            yield keras.tree.map_structure(lambda x, rows=rows: convert(x, indices=rows), inputs, none_is_leaf=False)

    def get_torch_dataloader(self):
        import torch

        loader = super().get_torch_dataloader()
        batches = [rows.tolist() for rows in self.batches]
        own = torch.Generator()  # a loader draws from torch's random state, which is not to move
        return torch.utils.data.DataLoader(
            loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn, generator=own
        )

    def get_tf_dataset(self):
        import tensorflow as tf

        if not self.shared:
            inputs = array_slicing.convert_to_sliceable(self._inputs, target_backend="tensorflow")
            inputs = keras.tree.lists_to_tuples(inputs)
            self.shared["inputs"] = tf.data.Dataset.from_tensors(inputs).repeat()
        whole = [rows for rows in self.batches if len(rows) == self._batch_size]
        rows = tf.data.Dataset.from_tensor_slices(np.reshape(whole, (len(whole), self._batch_size)).astype("int64"))
        for part in self.batches[len(whole) :]:
            rows = rows.concatenate(tf.data.Dataset.from_tensors(part.astype("int64")))

        def gather(rows, inputs):
            def gather_one(x):
                if isinstance(x, array_slicing.TensorflowSparseWrapper):
                    return array_slicing.slice_tensorflow_sparse_wrapper(x, rows)
                return tf.gather(x, rows) if tf.is_tensor(x) else None if isinstance(x, (list, tuple, dict)) else x

            return keras.tree.traverse(gather_one, inputs)

        pairs = tf.data.Dataset.zip((rows, self.shared["inputs"]))
        options = tf.data.Options()
        options.experimental_optimization.apply_default_optimizations = False  # they copy the arrays
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
        batches = pairs.map(gather, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return batches.with_options(options).prefetch(tf.data.AUTOTUNE)


def adapted(x, y=None, sample_weight=None, batch_size=None) -> DataAdapter:
    """Keras's adapter of a Dataset or a PyDataset, or of arrays in batches, in their order."""
    return get_data_adapter(x, y, sample_weight, batch_size)
