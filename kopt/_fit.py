"""Into a running `fit`: its callbacks, and its data put at a position. Reaches into Keras, like `_keras.py`.

Keras has no way to ask for either. Every private name used here has a test in `tests/test_keras_internals.py`.
"""

import contextlib
import itertools
import sys

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random import seed_generator
from keras.src.trainers.data_adapters import array_slicing, get_data_adapter
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

SEEDS = keras.random.SeedGenerator


class Fit:
    """The `fit` that calls a hook of a callback: its list of callbacks, and what hands out its batches."""

    def __init__(self, callback):
        self.model = callback.model
        self.callback_list = self.epoch_iterator = None
        for frame in frames():
            found = frame.f_locals
            if isinstance(found.get("self"), keras.callbacks.CallbackList):
                self.callback_list = self.callback_list or found["self"]
            elif found.get("self") is self.model and "epoch_iterator" in found:
                self.epoch_iterator = found["epoch_iterator"]
                break

    @property
    def callbacks(self) -> list:
        return self.callback_list.callbacks if self.callback_list else []

    def move_last(self, callback) -> bool:
        """Give a callback the last place in the list, so that its hooks run after all others; whether it has it.

        A hook runs while Keras goes through the list, so Keras comes to the new place, too.
        """
        callbacks = self.callbacks
        if not callbacks or callbacks[-1] is callback:
            return True
        callbacks[callbacks.index(callback)] = keras.callbacks.Callback()
        callbacks.append(callback)
        return False

    def wait_for_batches(self) -> None:
        """Call the hooks of a batch before the next one: Keras calls those of a lone callback in a thread on JAX."""
        if self.callback_list:
            self.callback_list._async_train = False

    def build(self) -> None:
        """Build model, metrics and optimizer, which TensorFlow puts off until the first step."""
        dataset = getattr(self.epoch_iterator, "_distributed_dataset", None)
        if dataset is not None:
            with contextlib.suppress(RuntimeError):  # a model without `call`, but a step of its own, trains as well
                self.model._symbolic_build(data_batch=dataset.element_spec)
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)

    def start_at(self, epoch) -> None:
        """Let this `fit`, and no later one, begin with another epoch than it was told."""
        self.model._initial_epoch = Once(epoch).of(self.model)

    @property
    def num_batches(self) -> int | None:
        """The batches of an epoch, where they are known."""
        return getattr(self.epoch_iterator, "num_batches", None)

    def feed(self, seed) -> "Feed | None":
        """The data, if it can be put at a position: what `kopt.data.seekable` made, or arrays."""
        iterator = self.epoch_iterator
        adapter = getattr(iterator, "data_adapter", None)
        if type(adapter) is ArrayDataAdapter:
            adapter = iterator.data_adapter = ordered_arrays(adapter, seed)
            if hasattr(iterator, "_distributed_dataset"):
                iterator._distributed_dataset = each_pass(adapter, iterator._distribute_strategy)
        return Feed(iterator) if isinstance(adapter, Passes) and iterator.num_batches else None


class Once(int):
    """The first epoch of one `fit`: it leaves the model when `fit` asks whether it is there."""

    def of(self, model):
        self.model = model
        return self

    def __bool__(self):
        self.model._initial_epoch = None
        return self != 0


class Feed:
    """Data at a position: how many passes through it have begun, and how many batches of the last one were taken."""

    def __init__(self, epoch_iterator):
        self.epoch_iterator, self.begun, self.start = epoch_iterator, 0, 0
        adapter, take = epoch_iterator.data_adapter, epoch_iterator._get_iterator

        def counted():
            if epoch_iterator.steps_per_epoch is None and not adapter.is_epoch_new:
                return ()  # Keras asks for one more at the end of an epoch, and does not use it
            adapter.is_epoch_new = False
            adapter.position = self.begun, self.start
            self.begun, self.start = self.begun + 1, 0
            return take()

        epoch_iterator._get_iterator = counted

    def position(self, ended: bool) -> list[int]:
        """Where the next batch comes from: the pass, and the batch in it; `ended` says that the epoch is over."""
        iterator = self.epoch_iterator
        if ended and (iterator._current_iterator is None or iterator.steps_per_epoch is None):
            return [self.begun, 0]
        return [self.begun - 1, iterator._steps_seen]

    def end(self) -> None:
        """Let go what hands out batches."""
        self.epoch_iterator.data_adapter.end()

    def seek(self, position, step, then) -> None:
        """Begin the next epoch at its batch `step`, which comes from this position; call `then` just before it."""
        iterator, (self.begun, self.start) = self.epoch_iterator, position
        if iterator.steps_per_epoch:  # such an epoch goes on with the pass that is there
            iterator._steps_seen = self.start - step
            iterator._current_iterator = iter(iterator._get_iterator())

        def from_step():
            del iterator._enumerate_iterator  # the method again, from the next epoch on
            for number, item in enumerate(
                itertools.dropwhile(lambda item: item[0] < step, iterator._enumerate_iterator())
            ):
                if number == 0:
                    then()
                yield item

        iterator._enumerate_iterator = from_step


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


def variables_of(model) -> list:
    """All that a model keeps: what it lists, and what layers hold beside that, such as the states of a stateful RNN."""
    listed = [*model.variables, *model.metrics_variables]
    known = {id(variable) for variable in listed}
    others = [getattr(value, "state", value) if isinstance(value, SEEDS) else value for value in _held(model)]
    others = {id(value): value for value in others if isinstance(value, keras.Variable)}
    return [*model.variables, *(variable for key, variable in others.items() if key not in known)]


def optimizers_of(model) -> list:
    """The optimizer that the model was compiled with, and others that it or a layer holds for a step of its own."""
    found = [model.optimizer, *(value for value in _held(model) if isinstance(value, keras.optimizers.Optimizer))]
    return list({id(optimizer): optimizer for optimizer in found}.values())


def _held(model):
    """What the attributes of a model, its layers and its losses hold."""
    for layer in [
        *model._flatten_layers(),
        *(loss for loss in keras.tree.flatten(model.loss) if hasattr(loss, "call")),
    ]:
        values, seen = list(vars(layer).values())[::-1], set()
        while values:
            value = values.pop()
            inner = list(value.values()) if isinstance(value, dict) else value
            if not isinstance(inner, (list, tuple)):
                yield value
            elif id(value) not in seen and inner and not isinstance(inner[0], (str, int, float)):
                seen.add(id(value))
                values.extend(reversed(inner))


def trained_by(optimizer) -> list:
    return list(getattr(optimizer, "_trainable_variables", ()))


def adapted(data) -> DataAdapter:
    """Keras's adapter of a Dataset or a PyDataset."""
    return get_data_adapter(data)


def global_seeds() -> list:
    """The variable of the generator that Keras draws from where no seed is given, if it was used."""
    generator = global_state.get_global_attribute(seed_generator.GLOBAL_SEED_GENERATOR)
    return [] if generator is None else [generator.state]


def make_global_seeds() -> list:
    return [seed_generator.global_seed_generator().state]


def frames():
    """The frames of the callers, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
