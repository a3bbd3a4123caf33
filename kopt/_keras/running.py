"""Into a running `fit`: its callbacks, and its data put at a position. Keras has no way to ask for either."""

import contextlib
import itertools

import keras

from kopt._keras import frames, passes


class Fit:
    """The `fit` that calls a hook of a callback: its list of callbacks, and what hands out its batches."""

    def __init__(self, callback):
        self.model = callback.model
        self.callback_list = self.epoch_iterator = None
        self.validation_data = None  # what `fit` was given, or has split off
        self.is_inner = False  # whether it runs within another `fit` with the same callback
        for frame in frames():
            found = frame.f_locals
            if isinstance(found.get("self"), keras.callbacks.CallbackList):
                self.callback_list = self.callback_list or found["self"]
            elif found.get("self") is self.model and "epoch_iterator" in found:
                self.epoch_iterator = self.epoch_iterator or found["epoch_iterator"]
                self.validation_data = found.get("validation_data")
            lists = [value for value in found.values() if isinstance(value, keras.callbacks.CallbackList)]
            self.is_inner |= any(one is not self.callback_list and callback in one.callbacks for one in lists)

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

    @property
    def is_generator(self) -> bool:
        """Whether the data can be read only once."""
        return passes.is_generator(getattr(self.epoch_iterator, "data_adapter", None))

    @property
    def has_run_dry(self) -> bool:
        """Whether an epoch has emptied a generator; Keras would begin the next with its first two batches again."""
        return self.is_generator and self.epoch_iterator._current_iterator is None

    @property
    def arrays(self) -> tuple[int, int, bool] | None:
        """Of arrays: how many rows there are, how many in a batch, and whether they are shuffled."""
        adapter = getattr(self.epoch_iterator, "data_adapter", None)
        if not passes.are_arrays(adapter):
            return None
        return adapter._num_samples, adapter._batch_size, bool(adapter._shuffle)

    def feed(self, seed) -> "Feed | None":
        """The data, if it can be put at a position: what `kopt.data.seekable` made, or arrays."""
        iterator = self.epoch_iterator
        adapter = getattr(iterator, "data_adapter", None)
        if passes.are_arrays(adapter):
            adapter = iterator.data_adapter = passes.ordered_arrays(adapter, seed)
            if hasattr(iterator, "_distributed_dataset"):
                iterator._distributed_dataset = passes.each_pass(adapter, iterator._distribute_strategy)
        return Feed(iterator) if isinstance(adapter, passes.Passes) and iterator.num_batches else None


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
            items = itertools.dropwhile(lambda item: item[0] < step, iterator._enumerate_iterator())
            for item in itertools.islice(items, 1):
                then()
                yield item
            yield from items

        iterator._enumerate_iterator = from_step
