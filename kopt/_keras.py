"""The only file that reaches into Keras: the bridge from Keras's optimizer to kopt's, and small helpers.

Every private name used here has a test in `tests/test_keras_internals.py` that fails when Keras changes it.
"""

import contextlib

import keras
import numpy as np

from kopt import backends, checks

register = keras.saving.register_keras_serializable(package="kopt")


def dtype_of(variable) -> str:
    return keras.backend.standardize_dtype(variable.dtype)


def to_numpy(variable) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable))


def number(variable, known: float) -> float:
    """The value of a scalar variable as the shortest float that is stored as it: 0.9, not 0.8999999761581421.

    Where no value can be read, while a step is compiled or in the hands of JAX, it is the one that is `known`.
    """
    try:
        return float(str(to_numpy(variable)[()]))
    except (NotImplementedError, TypeError):
        return known


def memory(variable):
    """What a Keras variable holds, whatever the scope; anything else is a variable of the backend's own."""
    return getattr(variable, "_value", variable)


def is_stateless() -> bool:
    """Whether a `keras.StatelessScope` keeps what is assigned, so that no variable may be changed in place."""
    with keras.StatelessScope(initialize_variables=False) as scope:
        return scope.original_scope is not None


def is_away(variable) -> bool:
    """Whether a variable's value is in the hands of JAX, which holds the values itself between two steps of `fit`."""
    return getattr(variable, "_value", 0) is None


def assign(name, variable, value) -> None:
    """Assign to a variable, unless JAX would lose it."""
    if is_away(variable):
        raise ValueError(
            f"`{name}` must be assigned through `self.model.optimizer`, which fetches the state from the running step, "
            f"not through a reference from before. Received: {name}={value!r}"
        )
    variable.assign(value)


def constant(value):
    """An initializer; Keras's own rounds a number to float32 on its way to float64."""
    return lambda shape, dtype: keras.ops.full(shape, keras.ops.convert_to_tensor(value, dtype), dtype)


class OptimizerBridge(keras.optimizers.Optimizer):
    """Keras's optimizer with its private attributes under plain names.

    Of what it does in a step, the learning rate's getter and `assign` are left; `optimizers/gradients.py` is the rest.
    """

    def __init__(self, learning_rate, name=None):
        self.__dict__["named"] = {}  # id of a variable -> its slot and the path of the model's variable
        self.__dict__["stateless"] = False  # whether `stateless_apply` runs
        super().__init__(learning_rate, name=name)
        if not self.rate_is_computed() and keras.config.floatx() != checks.held_dtype():  # 16 bits would round it
            self._untrack_variable(self._learning_rate)
            self._learning_rate = self.add_scalar("learning_rate", learning_rate)

    def __setattr__(self, name, value):
        """Keras wraps and tracks what is assigned; the value of a property or an argument is not to be kept so."""
        if hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def add_scalar(self, name, value, dtype=None):
        """A scalar variable of this optimizer, saved and compiled like its slots."""
        return self.add_variable(
            shape=(),
            initializer=constant(value),
            dtype=dtype or checks.held_dtype(),
            aggregation="only_first_replica",
            name=name,
        )

    def add_variable_from_reference(self, reference_variable, name=None, initializer="zeros", dtype=None):
        """Keras's method, with a dtype of its own and a record of what the variable is for."""
        native = reference_variable.value if isinstance(reference_variable, keras.Variable) else reference_variable
        path = path_of(reference_variable)
        with self.home.extended.colocate_vars_with(native) if self.home else contextlib.nullcontext():
            variable = self.add_variable(
                shape=reference_variable.shape,
                initializer=initializer,
                dtype=dtype or dtype_of(reference_variable),
                layout=getattr(reference_variable, "_layout", None),
                name=f"{path.replace('/', '_').replace(':', '_')}_{name or 'var'}",
            )
        self.named[id(variable)] = name or "var", path
        return variable

    def index(self, variables):
        """Note the variables to be trained; from then on the optimizer is built."""
        self.__dict__["_trainable_variables"] = list(variables)
        self._trainable_variables_indices.update({self._var_key(v): i for i, v in enumerate(variables)})
        self.built = True

    @property
    def trained(self) -> list:
        """The variables that the optimizer was built with."""
        return self._trainable_variables

    def index_of(self, variable) -> int | None:
        """The position of a variable in that list, if it is there."""
        return self._trainable_variables_indices.get(self._var_key(variable))

    @property
    def iterations(self):
        """The number of updates applied, however many steps were accumulated or skipped between them."""
        return self._iterations

    @property
    def home(self):
        """The `tf.distribute` strategy in whose scope the optimizer was made; None on other backends."""
        return getattr(self, "_distribution_strategy", None)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        self.__dict__["stateless"] = True
        try:
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)
        finally:
            self.__dict__["stateless"] = False

    def show_averages(self, variables, averages):
        """Let Keras's `SwapEMAWeights` find the moving averages, if it can swap them: it cannot between two dtypes."""
        if all(a is None or dtype_of(v) == dtype_of(a) for v, a in zip(variables, averages, strict=True)):
            self.__dict__["_model_variables_moving_average"] = averages

    def rate_source(self):
        """The schedule, the callable, or the variable that the learning rate comes from."""
        return self._learning_rate

    def rate_now(self):
        """The learning rate of this step; on torch a schedule is asked on the host, not to wait for a device."""
        schedule = self._learning_rate
        if keras.backend.backend() == "torch" and isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
            with keras.device("cpu"):
                return schedule(keras.ops.convert_to_tensor(backends.number(self.iterations, "int32"), "int32"))
        return self.learning_rate

    def rate_is_computed(self) -> bool:
        return not isinstance(self._learning_rate, keras.Variable)


def path_of(variable) -> str:
    """The path of a Keras variable; the name of a `tf.Variable`, which has no path."""
    return getattr(variable, "path", variable.name)


# What a callback has in an optimizer for the length of a fit


def nested(optimizer) -> list:
    """The optimizer and those within it: one in a LossScaleOptimizer, several in a MultiOptimizer."""
    inner = []
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = [optimizer.inner_optimizer]
    elif isinstance(optimizer, keras.optimizers.MultiOptimizer):
        inner = optimizer.optimizers
    return [optimizer, *(found for one in inner for found in nested(one))]


def updating(optimizer) -> list:
    """Those of them that update variables themselves; one that no variable falls to is never built."""
    wrappers = keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer
    return [one for one in nested(optimizer) if not isinstance(one, wrappers) and one.built]


def trained_by(optimizer) -> list:
    """The variables that an optimizer was built with, all of them whichever have a gradient in a step."""
    return list(optimizer._trainable_variables)


def has_all_weights(model) -> bool:
    """Whether every layer has its weights; TensorFlow makes some only when it traces the first step."""
    return all(layer.built for layer in model._flatten_layers())


@contextlib.contextmanager
def where_made(optimizer):
    """Out of any function that TensorFlow traces, and in the scope of the strategy that the optimizer was made in."""
    home = getattr(optimizer, "_distribution_strategy", None)
    with backends.eagerly(), home.scope() if backends.is_strategy(home) else contextlib.nullcontext():
        yield


def once_for_all_replicas(function) -> None:
    """Call `function` where it can assign to variables: under a strategy, outside its replicas."""
    context = backends._replica_context()
    if context is None:
        function()
    else:
        merge = backends.tf.__internal__.distribute.interim.maybe_merge_call
        merge(lambda _: function(), context.strategy)


def add_slot(optimizer, reference, name, initializer, dtype=None):
    """A variable of an optimizer for one of a model, where that is and laid out like it."""
    if isinstance(optimizer, OptimizerBridge):
        return optimizer.add_variable_from_reference(reference, name, initializer, dtype)
    home = getattr(optimizer, "_distribution_strategy", None)
    with home.extended.colocate_vars_with(backends.native(reference)) if home else contextlib.nullcontext():
        return optimizer.add_variable(
            shape=reference.shape,
            initializer=initializer,
            dtype=dtype or dtype_of(reference),
            layout=getattr(reference, "_layout", None),
            name=f"{path_of(reference).replace('/', '_').replace(':', '_')}_{name}",
        )


def stand_in(owner, name, function):
    """Put a function in place of a method of one object; what is returned puts back what was there."""
    previous = vars(owner).get(name)
    vars(owner)[name] = function

    def put_back():
        if vars(owner).get(name) is function:  # else somebody has put another in its place, which calls this one
            del vars(owner)[name]
            if previous is not None:
                vars(owner)[name] = previous

    return put_back


def before_first_step(optimizer, model, prepare):
    """Build the optimizer at its first `apply` and call `prepare` before it goes on; what is returned takes it back."""

    @backends.as_written
    def apply(grads, trainable_variables=None):
        put_back()
        if not optimizer.built:
            with where_made(optimizer):
                optimizer.build(list(model.trainable_variables if trainable_variables is None else trainable_variables))
        prepare()
        optimizer.apply(grads, trainable_variables)

    put_back = stand_in(optimizer, "apply", apply)
    return put_back


def hide_in_files(optimizer, steps):
    """Let no file hold, or be asked for, what parts have added; what is returned takes it back."""

    def hiding(method):
        def call(store):
            with contextlib.ExitStack() as stack:
                for step in steps:
                    stack.enter_context(step.hidden())
                method(store)

        return call

    names = "save_own_variables", "load_own_variables"
    undo = [stand_in(one, name, hiding(getattr(one, name))) for one in nested(optimizer) for name in names]
    return lambda: [put_back() for put_back in undo]


class Step:
    """Stands in place of an optimizer's `apply` while callbacks have a part in the step.

    While it does, the optimizer's list of variables is another one, so that its own is as it was when the last part
    leaves: TensorFlow cannot save a list to a checkpoint any more once something was taken out of it.
    """

    def __init__(self, optimizer):
        self.optimizer, self.apply = optimizer, optimizer.apply
        self.parts, self.added = [], {}  # in the order of installation; id of a part -> its variables

        @backends.as_written
        def apply(grads, trainable_variables=None):
            self.run(list(grads), trainable_variables)

        apply.step = self
        self.put_back = stand_in(optimizer, "apply", apply)
        self.own = optimizer._variables
        self._show(list(self.own))

    @staticmethod
    def of(optimizer) -> "Step | None":
        return getattr(vars(optimizer).get("apply"), "step", None)

    def _show(self, variables) -> None:
        """Let this list be the optimizer's, for what is tracked from now on, too."""
        store = self.optimizer._tracker.config
        store["variables"] = store["variables"][0], variables
        self.shown = vars(self.optimizer)["_variables"] = variables

    def run(self, grads, variables) -> None:
        if not grads or not self.parts:
            self.apply(grads, variables)
            return
        trained, counts = trained_by(self.optimizer), []
        with backends.unrecorded():
            once_for_all_replicas(lambda: self._before(counts))
        self.apply(grads, variables)
        with backends.unrecorded():
            once_for_all_replicas(lambda: self._after(trained, counts))

    def _before(self, counts) -> None:
        if self.optimizer.gradient_accumulation_steps or getattr(self.optimizer, "nonfinite", "apply") != "apply":
            counts.append(self.optimizer.iterations + 0)  # a copy: torch counts in place
        for part in self.parts:
            part.before_update(self.optimizer)

    def _after(self, trained, counts) -> None:
        happened = self.optimizer.iterations > counts[-1] if counts else True
        for part in self.parts:
            part.after_update(self.optimizer, trained, happened)

    def install(self, part) -> None:
        """Let the part add its variables; from then on it is in the step."""
        known = {id(variable) for variable in self.shown}
        self.parts.append(part)
        try:
            with where_made(self.optimizer):
                part.install(self.optimizer)
        finally:
            self.added[id(part)] = [variable for variable in self.shown if id(variable) not in known]

    def remove(self, part) -> None:
        self.parts = [other for other in self.parts if other is not part]
        for variable in self.added.pop(id(part), []):
            self.optimizer._untrack_variable(variable)
            getattr(self.optimizer, "named", {}).pop(id(variable), None)
        if not self.parts:
            self._go()

    def _go(self) -> None:
        """Give the optimizer its own list back, less what it has let go in the meantime, and with what it has taken."""
        left, own = {id(variable) for variable in self.shown}, {id(variable) for variable in self.own}
        for i in reversed([i for i, variable in enumerate(self.own) if id(variable) not in left]):
            del self.own[i]
        self.own.extend(variable for variable in self.shown if id(variable) not in own)
        self._show(self.own)
        self.put_back()

    @contextlib.contextmanager
    def hidden(self):
        """The optimizer without what its parts have added."""
        added = {id(variable) for variables in self.added.values() for variable in variables}
        shown = self.optimizer._variables
        vars(self.optimizer)["_variables"] = [variable for variable in shown if id(variable) not in added]
        try:
            yield
        finally:
            vars(self.optimizer)["_variables"] = shown


@contextlib.contextmanager
def without_parts(optimizer):
    """The optimizer and those within it as they are when no callback has a part in the step."""
    with contextlib.ExitStack() as stack:
        for step in filter(None, map(Step.of, nested(optimizer))):
            stack.enter_context(step.hidden())
        yield


def own_variables(optimizer) -> list:
    """The variables of an optimizer without those of the optimizers within it."""
    return list(optimizer._variables)
