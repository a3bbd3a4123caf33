"""The base of every callback: its state, its copies, and its part in the compiled step.

A callback with a part in the step adds variables to the optimizer and code around its `apply`. Both leave when `fit`
ends: Keras drops the whole state of an optimizer whose variables do not match a file, with no more than a warning.
"""

import copy

import keras

from kopt import _keras, checks


class Callback(keras.callbacks.Callback):
    """The base of kopt's callbacks.

    A subclass with state that a resumed training needs gives it in `get_state` and takes it in `set_state`. A copy,
    which KerasTuner makes for each trial, has neither the model nor what else `left_behind` names: None in their place.

    Args:
        name: What the callback is called in a file and in messages; by default the name of its class.
    """

    left_behind: tuple[str, ...] = ("_model", "params")

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

    def __getstate__(self):
        return vars(self) | dict.fromkeys(vars(self).keys() & set(self.left_behind))

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(self.__getstate__(), memo))
        return twin


class InStep(Callback):
    """A callback with a part in the compiled step, for the length of a `fit`.

    A subclass overrides some of `prepare`, `install`, `before_update`, `after_update` and `finish`. All but the
    first are called for every optimizer that updates variables itself: the one within a `LossScaleOptimizer`, each of a
    `MultiOptimizer`. Several such callbacks take their turns in the order of the list. A subclass that overrides a hook
    of Keras calls `super()`'s, too, and adds what it keeps of a running `fit`, variables above all, to `left_behind`.

    Installed is what `set_model` has announced, once `fit` makes its train function: before `on_train_begin` of any
    callback. `evaluate` and `predict`, which call `set_model` as well, make none, so that nothing comes of it there.
    """

    left_behind = (*Callback.left_behind, "_announced", "_training", "_begun")
    _announced = _training = _begun = None  # the `_Training` to come; the one it is in; whether that has begun

    def prepare(self, model) -> None:
        """Forget the last `fit`, and refuse a model that the callback is not for; called once before `install`."""

    def install(self, optimizer) -> None:
        """Add what variables are needed, by `add_variable` and `add_slot`. The optimizer is built."""

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

    def finish(self, optimizer) -> None:
        """Read the variables for the last time; after a `fit` that raised it is not called."""

    def add_variable(self, optimizer, shape=(), initializer="zeros", dtype=None, name=None):
        """A variable in the optimizer, to be called in `install`; by default a scalar of the dtype for numbers."""
        dtype = dtype or checks.held_dtype()
        aggregation = "only_first_replica"
        return optimizer.add_variable(shape, initializer, dtype=dtype, aggregation=aggregation, name=name)

    def add_slot(self, optimizer, reference, name, initializer="zeros", dtype=None):
        """A variable in the optimizer like one of the model, to be called in `install`."""
        return _keras.add_slot(optimizer, reference, name, initializer, dtype)

    def set_model(self, model):
        super().set_model(model)
        _Training.of(model).announce(self)

    def on_train_begin(self, logs=None):
        if self._announced:  # nobody has made a train function: a loop of the user's own
            self._announced.begin_late()
        elif self._training is None:  # nobody has called `set_model`: a CallbackList that is used again
            _Training.of(self._model).begin_late(self)
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
        if not self._begun:
            return
        if self._training is None:
            raise RuntimeError(f"{self.name} was taken out of the step by another `fit` within the one that ends here")
        try:
            for step in self._training.steps:
                self.finish(step.optimizer)
        finally:
            self._training.remove(self)


def settle(model) -> None:
    """Install what waits for the model's weights. For who makes them in a `fit` before TensorFlow does, at step one."""
    found = vars(model).get("make_train_function")
    if isinstance(found, _Training):
        found.settle()


class _Training:
    """What the callbacks have in the training of one model; it stands in place of its `make_train_function`.

    That is the first thing that only a training calls: there the announced come in, and what a `fit` that raised has
    left goes out. Such is left if `model.history` is another than it was, since each `fit` makes one anew.
    """

    def __init__(self, model):
        self.model, self.make = model, model.make_train_function
        self.put_back = _keras.stand_in(model, "make_train_function", self)
        self.announced: list[tuple] = []  # pairs of a part and the history at the time
        self.parts, self.steps, self.history = [], [], None
        self.undo = []  # what takes back what was put into the optimizer, beside the steps

    @classmethod
    def of(cls, model) -> "_Training":
        found = vars(model).get("make_train_function")
        return found if isinstance(found, cls) else cls(model)

    def __call__(self, force=False):
        for part, history in self.announced:
            if history is not self.history_now():  # of an `evaluate` that raised before it began
                self.withdraw(part)
        if self.announced:
            self.begin()
        elif self.history is not self.history_now():
            self.clear()
        return self.make(force)

    def history_now(self):
        return getattr(self.model, "history", None)

    def announce(self, part) -> None:
        if part._announced:
            part._announced.withdraw(part)
        part._announced = self
        self.announced.append((part, self.history_now()))

    def withdraw(self, part) -> None:
        self.announced = [pair for pair in self.announced if pair[0] is not part]
        part._announced = None
        self.go_if_idle()

    def begin_late(self, *parts) -> None:
        """Begin where a train function may have been made already."""
        made = getattr(self.model, "train_function", None)
        self.join(parts) if parts else self.begin()
        if made is not None:
            self.make()

    def begin(self) -> None:
        """Install those who are announced; what any other has left in the optimizer goes."""
        parts = [part for part, _ in self.announced]
        optimizer = getattr(self.model, "optimizer", None)
        if not callable(getattr(optimizer, "apply", None)):
            self.announced = []
            names = ", ".join(part.name for part in parts)
            checks.refuse("optimizer", f"one of Keras or kopt in `compile`, for {names}", optimizer)
        left = [part for step in map(_keras.Step.of, _keras.updating(optimizer)) if step for part in step.parts]
        for part in [*self.parts, *left, *parts]:
            if part._training:
                part._training.remove(part)
        self.announced = []
        self.join(parts)

    def join(self, parts) -> None:
        self.history = self.history_now()
        for part in parts:
            part._announced, part._training, part._begun = None, self, False
        self.parts += parts
        self.model.train_function = None  # one that was compiled before knows nothing of the parts
        try:
            for part in parts:
                part.prepare(self.model)
            self.settle()
        except BaseException:
            self.clear()
            raise

    def settle(self) -> None:
        """Install the parts, once the optimizer can be built."""
        model, optimizer = self.model, self.model.optimizer
        if not optimizer.built and not _keras.has_all_weights(model):
            if not self.undo:
                self.undo = [_keras.before_first_step(optimizer, model, self.settle)]
            return
        if not optimizer.built:
            with _keras.where_made(optimizer):
                optimizer.build(model.trainable_variables)
        self.take_back()
        self.steps = [_keras.Step.of(one) or _keras.Step(one) for one in _keras.updating(optimizer)]
        self.undo = [_keras.hide_in_files(optimizer, self.steps)]
        for part in self.parts:
            for step in self.steps:
                if not any(part is other for other in step.parts):
                    step.install(part)

    def take_back(self) -> None:
        for undo in self.undo:
            undo()
        self.undo = []

    def remove(self, part) -> None:
        for step in self.steps:
            step.remove(part)
        self.parts = [other for other in self.parts if other is not part]
        part._training = None
        self.model.train_function = None
        if not self.parts:
            self.take_back()
            self.steps = []
        self.go_if_idle()

    def clear(self) -> None:
        for part in self.parts:
            self.remove(part)

    def go_if_idle(self) -> None:
        if not self.parts and not self.announced:
            self.put_back()
