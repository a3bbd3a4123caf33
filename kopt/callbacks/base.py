"""The base of every callback: its state, its copies, and its part in the compiled step.

A callback with a part in the step adds variables to the optimizer and code around its `apply`. Both leave when `fit`
ends: Keras drops the whole state of an optimizer whose variables do not match a file, with no more than a warning.
"""

import contextlib
import copy

import keras

from kopt import checks
from kopt._keras import stepping
from kopt.callbacks.clock import Rates
from kopt.callbacks.install import Installation


class Callback(keras.callbacks.Callback):
    """The base of kopt's callbacks.

    A subclass with state that a resumed training needs gives it in `get_state` and takes it in `set_state`. A copy,
    which KerasTuner makes for each trial, has neither the model nor what else `left_behind` names: None in their place.

    Each of them tells the schedules that are the learning rate of an optimizer how long the `fit` is. A subclass that
    overrides `set_model`, `on_train_begin`, `on_epoch_begin` or `on_train_end` calls `super()`'s.

    Args:
        name: What the callback is called in a file and in messages; by default the name of its class.
    """

    left_behind: tuple[str, ...] = ("_model", "params", "_rates")
    shared: tuple[str, ...] = ()  # arguments that a copy has in common with this one: data
    _rates = ()  # the clocks of schedules

    def __init__(self, name: str | None = None):
        super().__init__()
        self.name = checks.optional(checks.text)("name", name) or type(self).__name__

    def get_state(self) -> dict:
        """The state beside the optimizer's variables: dicts and lists of numbers, strings and NumPy arrays."""
        return {}

    def set_state(self, state: dict) -> None:
        """Go on from what `get_state` has returned."""
        if state:
            checks.refuse("state", f"empty for {self.name}, which keeps none", state)

    def note(self, logs, key, value) -> None:
        """Write a value into the logs, if there are any, under a key that no other callback has."""
        if logs is not None:
            while key in logs:
                key += f"_{self.name}"
            logs[key] = value

    def set_model(self, model):
        super().set_model(model)
        self._rates = Rates(model)

    def on_train_begin(self, logs=None):
        if self._rates:
            self._rates.begin(self.params)

    def on_epoch_begin(self, epoch, logs=None):
        if self._rates:
            self._rates.turn(self.model, epoch, self.params)

    def on_train_end(self, logs=None):
        if self._rates:
            self._rates.end(self.model)

    def __getstate__(self):
        return vars(self) | dict.fromkeys(vars(self).keys() & set(self.left_behind))

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = type(self).__new__(type(self))
        memo |= {id(getattr(self, name)): getattr(self, name) for name in self.shared}
        vars(twin).update(copy.deepcopy(self.__getstate__(), memo))
        return twin


class InStep(Callback):
    """A callback with a part in the compiled step, for the length of a `fit`.

    A subclass overrides some of `prepare`, `install`, `installed`, `before_update`, `during_update`, `after_update`,
    `aside`, `finish`, `leave` and `let_go`. All but the first and the last are called for every optimizer that updates
    variables itself: the one within a `LossScaleOptimizer`, each of a `MultiOptimizer`. Several such callbacks take
    their turns in the order of the list. A subclass that overrides a hook of Keras calls `super()`'s, too, and adds
    what it keeps of a running `fit`, variables above all, to `left_behind`.

    Installed is what `set_model` has announced, once `fit` makes its train function: before `on_train_begin` of any
    callback. `evaluate` and `predict`, which call `set_model` as well, make none, so that nothing comes of it there.
    """

    left_behind = (*Callback.left_behind, "_announced", "_training", "_begun")
    order = 0  # those with a higher number come later, wherever they are in the list
    needs_all = False  # whether it reads every weight in the step, which JAX has not where only some are trained
    _announced = _training = _begun = None  # the `Installation` to come; the one it is in; whether that has begun

    def prepare(self, model) -> None:
        """Forget the last `fit`, and refuse a model that the callback is not for; called once before `install`."""

    def install(self, optimizer) -> None:
        """Add what variables are needed, by `add_variable` and `add_slot`. The optimizer is built."""

    def installed(self, optimizer) -> None:
        """Look at what is there, once all parts are installed; `fit` refuses what this refuses."""

    def drives(self, optimizer) -> dict:
        """What the callback drives of the optimizer's numbers, by name: a `drive.Drive` each."""
        return {}

    def before_update(self, optimizer) -> None:
        """Tensor code that runs before the optimizer's `apply`, in the step."""

    def after_update(self, optimizer, variables, happened) -> None:
        """Tensor code that runs after the optimizer's `apply`, in the step.

        Args:
            optimizer: The optimizer.
            variables: All variables that it trains.
            happened: Whether `apply` has updated them: True where it always does, and otherwise, under gradient
                accumulation or kopt's `nonfinite`, a boolean tensor, for `backends.when` or `ops.where`.
        """

    def during_update(self, optimizer):
        """A context in which the optimizer's `apply` runs."""
        return contextlib.nullcontext()

    def aside(self, optimizer):
        """A context in which the optimizer's own numbers are in their places; files are written and read in it."""
        return contextlib.nullcontext()

    def leave(self, optimizer) -> None:
        """Put back what `install` has changed: after `finish`, or in the next `fit` if this one raised."""

    def let_go(self) -> None:
        """Called once when the callback is out of the step, whatever has happened, if `fit` had let it in."""

    def finish(self, optimizer) -> None:
        """Read the variables for the last time; after a `fit` that raised it is not called."""

    def add_variable(self, optimizer, shape=(), initializer="zeros", dtype=None, name=None):
        """A variable in the optimizer, to be called in `install`; by default a scalar of the dtype for numbers."""
        dtype = dtype or checks.held_dtype()
        aggregation = "only_first_replica"
        return optimizer.add_variable(shape, initializer, dtype=dtype, aggregation=aggregation, name=name)

    def add_slot(self, optimizer, reference, name, initializer="zeros", dtype=None):
        """A variable in the optimizer like one of the model, to be called in `install`."""
        return stepping.add_slot(optimizer, reference, name, initializer, dtype)

    def set_model(self, model):
        super().set_model(model)
        Installation.of(model).announce(self)

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        if self._announced:  # nobody has made a train function: a loop of the user's own
            self._announced.begin_late()
        elif self._training is None:  # nobody has called `set_model`: a CallbackList that is used again
            Installation.of(self._model).begin_late(self)
        if self._begun:
            self._training.clear()
            checks.refuse("callbacks", "a list with each callback once", f"{self.name} twice")
        self._begun = True

    def on_test_begin(self, logs=None):
        if self._announced:
            self._announced.withdraw(self)

    def on_predict_begin(self, logs=None):
        self.on_test_begin(logs)

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        if not self._begun:
            return
        if self._training is None:
            raise RuntimeError(f"{self.name} was taken out of the step by another `fit` within the one that ends here")
        try:
            for step in self._training.steps:
                self.finish(step.optimizer)
        finally:
            self._training.remove(self)
