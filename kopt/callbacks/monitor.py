"""The numbers that were in use, step by step."""

import numpy as np
from keras import ops

from kopt import _keras, backends, checks
from kopt._keras import stepping
from kopt.callbacks import drive
from kopt.callbacks.base import InStep
from kopt.schedules.time import at_most


class RateMonitor(InStep):
    """Keep the learning rate of every update, and other numbers of the optimizer, in a buffer within the step.

    After `fit`, or after an epoch, `history` has an array for each. The logs get the last value of each epoch.
    `kopt.plot.schedule(monitor)` draws it. It takes no time of the host between steps.

    Args:
        hyperparameters: The numbers, as `kopt.callbacks.Schedule` names them.
        capacity: How many updates an epoch may have; needed only where the data do not say how many batches there are.
        name: What the callback is called in a file and in messages.

    Example:
        >>> import keras, kopt, numpy as np
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile("adam", loss="mse")
        >>> monitor = kopt.callbacks.RateMonitor()
        >>> callbacks = [kopt.callbacks.WarmUp(steps=4), monitor]
        >>> history = model.fit(np.ones((6, 1)), np.ones(6), batch_size=1, verbose=0, callbacks=callbacks)
        >>> (monitor.history["learning_rate"] * 1000).round(2).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    left_behind = (*InStep.left_behind, "_kept")
    order = 1  # after those that set the numbers
    _kept = None  # id of an optimizer -> the count, and by name its buffer and what it reads

    def __init__(self, hyperparameters=("learning_rate",), *, capacity: int | None = None, name: str | None = None):
        super().__init__(name)
        names = checks.several(checks.text, "a name or a list of names")
        if isinstance(hyperparameters, str):
            hyperparameters = [checks.text("hyperparameters", hyperparameters)]
        self.hyperparameters = names("hyperparameters", hyperparameters)
        self.capacity = checks.optional(checks.count(1))("capacity", capacity)
        self.history: dict[str, np.ndarray] = {}

    def get_state(self):
        return {"history": self.history}

    def set_state(self, state):
        self.history = dict(state["history"])

    def prepare(self, model):
        self._kept, self.history = {}, {}
        if not (self.capacity or self._batches()):
            checks.refuse("capacity", "given where the data do not say how many batches an epoch has", None)

    def _batches(self) -> int:
        return max((self.params or {}).get("steps") or 0, 0)

    def install(self, optimizer):
        updates = -(-self._batches() // (optimizer.gradient_accumulation_steps or 1))
        room = self.capacity or updates
        if room < updates:
            checks.refuse("capacity", f"no less than the {updates} updates of an epoch", self.capacity)
        count = self.add_variable(optimizer, dtype="int32", name="kept")
        read = {name: drive.reader(optimizer, name) for name in self.hyperparameters}
        buffers = {name: self.add_variable(optimizer, (room,), name=f"{name}_kept") for name in self.hyperparameters}
        self._kept[id(optimizer)] = count, room, {name: (buffers[name], read[name]) for name in self.hyperparameters}

    def before_update(self, optimizer):
        count, room, kept = self._kept[id(optimizer)]
        place = at_most(backends.number(count, "int32"), room - 1)
        for buffer, read in kept.values():
            value = ops.reshape(ops.cast(read(), buffer.dtype), (1,))
            buffer.assign(ops.slice_update(buffer.value, [place], value))

    def after_update(self, optimizer, variables, happened):
        count, *_ = self._kept[id(optimizer)]  # what did not happen, the next value overwrites
        if happened is True:
            backends.count_up(count)
        else:
            count.assign(count + ops.cast(happened, "int32"))

    def on_epoch_end(self, epoch, logs=None):
        optimizers = [one for one in stepping.updating(self.model.optimizer) if id(one) in self._kept]
        for optimizer, suffix in zip(optimizers, stepping.suffixes(optimizers), strict=True):
            count, room, kept = self._kept[id(optimizer)]
            done = int(_keras.to_numpy(count))
            if done > room:
                checks.refuse("capacity", f"no less than the updates of an epoch, which were {done}", self.capacity)
            for name, (buffer, _) in kept.items():
                values = _keras.to_numpy(buffer)[:done].astype("float64")
                before = self.history.get(name + suffix, values[:0])
                self.history[name + suffix] = np.concatenate([before, values])
                if logs is not None and done:
                    logs.setdefault(name + suffix, float(values[-1]))
            count.assign(0)
