"""A hyperparameter that follows a schedule, in the compiled step."""

import contextlib

from kopt import _keras, checks, schedules
from kopt._keras import stepping
from kopt.callbacks import clock, drive
from kopt.callbacks.base import InStep


class Driving(InStep):
    """A callback that drives numbers of the optimizer by schedules: what `driven` says."""

    left_behind = (*InStep.left_behind, "_drives", "_epoch")
    _drives = _epoch = None

    def driven(self, optimizer) -> dict:
        """The schedules of this optimizer's numbers, by name."""
        raise NotImplementedError

    def prepare(self, model):
        self._drives, self._epoch = {}, None

    def install(self, optimizer):
        is_ours = isinstance(optimizer, _keras.OptimizerBridge)
        if optimizer.gradient_accumulation_steps and not is_ours and stepping.home_of(optimizer):
            allowed = "None under a strategy, where Keras's own accumulation fails; use one of kopt's optimizers"
            checks.refuse("gradient_accumulation_steps", allowed, optimizer.gradient_accumulation_steps)
        drives = self._drives[id(optimizer)] = {}
        for name, schedule in self.driven(optimizer).items():
            one = drive.found(optimizer, name) or drive.make(self, optimizer, name)
            one.join(schedule)
            drives[name] = one

    def installed(self, optimizer):
        for one in self._own_drives(optimizer):
            one.check(self._span(optimizer))
            if self._epoch is not None:  # the optimizer was built in the first step
                one.clock.turn(self._epoch, int(_keras.to_numpy(optimizer.iterations)), self._span(optimizer))

    def _span(self, optimizer):
        return clock.Span(self.params, optimizer.gradient_accumulation_steps or 1)

    def drives(self, optimizer):
        return (self._drives or {}).get(id(optimizer), {})

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self._epoch, whole = epoch, self.model.optimizer  # by the model: JAX hands out its state
        for optimizer in stepping.updating(whole):
            for one in self._own_drives(optimizer):
                one.take_written()
                one.clock.turn(epoch, int(_keras.to_numpy(optimizer.iterations)), self._span(optimizer))

    def before_update(self, optimizer):
        for one in self._own_drives(optimizer):
            one.step()

    @contextlib.contextmanager
    def during_update(self, optimizer):
        with contextlib.ExitStack() as stack:
            for one in self._own_drives(optimizer):
                stack.enter_context(one.during_update())
            yield

    @contextlib.contextmanager
    def aside(self, optimizer):
        with contextlib.ExitStack() as stack:
            for one in self._own_drives(optimizer):
                stack.enter_context(one.aside())
            yield

    def finish(self, optimizer):
        for one in self._own_drives(optimizer):
            one.finish()

    def leave(self, optimizer):
        for one in self._own_drives(optimizer):
            one.leave()

    def _own_drives(self, optimizer) -> list:
        """The drives that this callback made, and others have joined."""
        return [one for one in self.drives(optimizer).values() if one.first is self]

    def on_epoch_end(self, epoch, logs=None):
        optimizers = stepping.updating(self.model.optimizer)
        for optimizer, suffix in zip(optimizers, stepping.suffixes(optimizers), strict=True):
            for name, one in self.drives(optimizer).items():
                if logs is not None:
                    logs[f"{name}{suffix}"] = drive.read(one.last)


class Schedule(Driving):
    """Drive a number of the optimizer by a schedule, at every step, in the compiled step.

    A factor multiplies the optimizer's own number, the one it has when `fit` begins; several factors multiply, so that
    `callbacks=[WarmUp(epochs=2), CosineDecay()]` warms up what decays. A schedule with a value of its own (`initial=`)
    takes its place; only one callback may have such a one. When `fit` ends, the optimizer has its own number again.

    What else writes to the number (`ReduceLROnPlateau`, a callback of yours) changes it in that ratio from then on;
    where the factors are zero, what is written is taken for the number without them.
    `optimizer.learning_rate` is the rate in use, and `History` and the logs of callbacks further down the list have,
    for each epoch, that of its last step.

    Time begins anew with each `fit`, at the epoch `initial_epoch`. Steps are updates of the optimizer: under gradient
    accumulation there are fewer than batches. Each optimizer in a `MultiOptimizer` keeps a number of its own.

    Args:
        hyperparameter: "learning_rate"; of kopt's optimizers every number, such as "momentum", of Keras's
            "weight_decay", "beta_1", "beta_2" and "rho".
        schedule: One of `kopt.schedules`.
        name: What the callback is called in a file and in messages; by default the name of its class.

    Example:
        >>> import keras, kopt, numpy as np
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(kopt.Adam(0.1), loss="mse")
        >>> decay = kopt.callbacks.Schedule("beta_1", kopt.schedules.Linear(0.9, 0.5, initial=1.0))
        >>> history = model.fit(np.ones((4, 1)), np.ones(4), batch_size=1, epochs=2, verbose=0, callbacks=[decay])
        >>> [round(value, 3) for value in history.history["beta_1"]]
        [0.75, 0.55]
    """

    def __init__(self, hyperparameter: str, schedule: schedules.Schedule, *, name: str | None = None):
        super().__init__(name)
        self.hyperparameter = checks.text("hyperparameter", hyperparameter)
        if not isinstance(schedule, schedules.Schedule):
            checks.refuse("schedule", "one of kopt.schedules", schedule)
        self.schedule = schedule

    def driven(self, optimizer):
        return {self.hyperparameter: self.schedule}
