"""What callbacks have in an optimizer's step for the length of a fit."""

import contextlib

import keras

from kopt import _keras, backends


def nested(optimizer) -> list:
    """The optimizer and those within it, however deep."""
    return [optimizer, *(found for one in within(optimizer) for found in nested(one))]


def within(optimizer) -> list:
    """The optimizers that one hands its gradients to: one in a LossScaleOptimizer, several in a MultiOptimizer."""
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        return optimizer.optimizers
    return [optimizer.inner_optimizer] if hasattr(optimizer, "inner_optimizer") else []


def updating(optimizer) -> list:
    """Those of them that update variables themselves; one that no variable falls to is never built."""
    return [one for one in nested(optimizer) if not within(one) and one.built]


def trained_by(optimizer) -> list:
    """The variables that an optimizer was built with, all of them whichever have a gradient in a step."""
    return list(optimizer._trainable_variables)


def rate_source(optimizer):
    """Where the learning rate comes from: a variable, a schedule, or a callable."""
    standing_in = vars(optimizer).get("_rate_source") if optimizer is not None else None
    return getattr(optimizer, "_learning_rate", None) if standing_in is None else standing_in


def stand_in_for_rate(optimizer, variable):
    """Put a variable in place of the schedule or callable of a learning rate; what is returned takes it back."""
    held = vars(optimizer)
    held["_rate_source"], held["_learning_rate"] = held["_learning_rate"], variable

    def put_back():
        if "_rate_source" in held:
            held["_learning_rate"] = held.pop("_rate_source")

    return put_back


def suffixes(optimizers) -> list[str]:
    """What tells several optimizers apart in logs."""
    names = [optimizer.name for optimizer in optimizers]
    if len(names) == 1:
        return [""]
    return [f"_{name}" if names.count(name) == 1 else f"_{name}_{i}" for i, name in enumerate(names)]


def home_of(optimizer):
    """The `tf.distribute` strategy in whose scope an optimizer was made; None without one."""
    home = getattr(optimizer, "_distribution_strategy", None)
    return home if backends.is_strategy(home) else None


def counter(optimizer):
    """What an optimizer gives its schedule: the updates it has done; the batches if it is Keras's and accumulates."""
    return optimizer._iterations


def batches_per_count(optimizer) -> int:
    """How many batches that counter counts as one."""
    return (optimizer.gradient_accumulation_steps or 1) if isinstance(optimizer, _keras.OptimizerBridge) else 1


def has_all_weights(model) -> bool:
    """Whether every layer has its weights; TensorFlow makes some only when it traces the first step."""
    return all(layer.built for layer in _keras.layers_of(model))


@contextlib.contextmanager
def where_made(optimizer):
    """Out of any function that TensorFlow traces, and in the scope of the strategy that the optimizer was made in."""
    home = home_of(optimizer)
    with backends.eagerly(), home.scope() if home else contextlib.nullcontext():
        yield


def build_if_several(optimizer, model) -> None:
    """Build a MultiOptimizer, which does not know its optimizers before, if the model's weights are there."""
    several = [one for one in nested(optimizer) if isinstance(one, keras.optimizers.MultiOptimizer) and not one.built]
    if several and has_all_weights(model):
        with where_made(optimizer):
            optimizer.build(model.trainable_variables)


def add_slot(optimizer, reference, name, initializer, dtype=None):
    """A variable of an optimizer for one of a model, where that is and laid out like it."""
    if isinstance(optimizer, _keras.OptimizerBridge):
        return optimizer.add_variable_from_reference(reference, name, initializer, dtype)
    home = getattr(optimizer, "_distribution_strategy", None)
    with home.extended.colocate_vars_with(backends.native(reference)) if home else contextlib.nullcontext():
        return optimizer.add_variable(
            shape=reference.shape,
            initializer=initializer,
            dtype=dtype or _keras.dtype_of(reference),
            layout=getattr(reference, "_layout", None),
            name=f"{_keras.path_of(reference).replace('/', '_').replace(':', '_')}_{name}",
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
        def call(*arguments):
            with contextlib.ExitStack() as stack:
                for step in steps:
                    stack.enter_context(step.hidden())
                return method(*arguments)

        return call

    names = "save_own_variables", "load_own_variables", "get_config"
    undo = [stand_in(one, name, hiding(getattr(one, name))) for one in nested(optimizer) for name in names]
    return lambda: [put_back() for put_back in undo]


def apply_to_part(optimizer):
    """Let JAX's step update some of an optimizer's variables, those that are trainable; what is returned ends that."""

    def standing_in(one):
        def stateless_apply(optimizer_variables, grads, trainable_variables):
            chosen = [variable for variable in trained_by(one) if variable.trainable]
            if len(chosen) == len(trained_by(one)):
                return whole(optimizer_variables, grads, trainable_variables)
            pairs = [
                *zip(chosen, trainable_variables, strict=True),
                *zip(one.variables, optimizer_variables, strict=True),
            ]
            vars(one)["stateless"] = True
            try:
                with keras.StatelessScope(state_mapping=pairs) as scope:
                    one.apply(grads, chosen)
            finally:
                vars(one)["stateless"] = False
            return tuple([scope.get_current_value(v) for v in found] for found in (chosen, one.variables))

        whole = one.stateless_apply
        return stand_in(one, "stateless_apply", stateless_apply)

    scaled = keras.optimizers.LossScaleOptimizer
    undo = [standing_in(one) for one in nested(optimizer) if not isinstance(one, scaled)]
    return lambda: [put_back() for put_back in undo]


class Unfiled:
    """A variable that an optimizer keeps, and that no file of it holds."""

    def __init__(self, optimizer, variable):
        self.optimizer, self.variable = optimizer, variable

    def hidden(self):
        return without(self.optimizer, [self.variable])


@contextlib.contextmanager
def without(optimizer, variables):
    """The optimizer without some of its variables."""
    shown, left_out = optimizer._variables, {id(variable) for variable in variables}
    vars(optimizer)["_variables"] = [variable for variable in shown if id(variable) not in left_out]
    try:
        yield
    finally:
        vars(optimizer)["_variables"] = shown


def keep_unfiled(whole, optimizer, variable) -> None:
    """Let an optimizer, which is another or within it, keep a variable from now on, and no file hold it."""
    if all(variable is not other for other in optimizer._variables):
        optimizer._track_variable(variable)
    known = vars(whole).setdefault("_unfiled", set())
    if id(variable) not in known:
        known.add(id(variable))
        hide_in_files(whole, [Unfiled(optimizer, variable)])


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
        with backends.unrecorded(), backends.after(grads):
            backends.once_for_all_replicas(lambda: self._before(counts))
        with contextlib.ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.during_update(self.optimizer))
            self.apply(grads, variables)
        with backends.unrecorded(), backends.after(grads):
            backends.once_for_all_replicas(lambda: self._after(trained, counts))

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
        self.parts = sorted([*self.parts, part], key=lambda one: one.order)
        try:
            with where_made(self.optimizer):
                part.install(self.optimizer)
        finally:
            self.added[id(part)] = [variable for variable in self.shown if id(variable) not in known]

    def remove(self, part) -> None:
        if any(part is other for other in self.parts):
            part.leave(self.optimizer)
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
        """The optimizer without what its parts have added, and with its own numbers in their places."""
        added = [variable for variables in self.added.values() for variable in variables]
        with without(self.optimizer, added), contextlib.ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.aside(self.optimizer))
            yield


def apply_in(context, optimizer, grads, variables) -> None:
    """Call an optimizer's `apply` with the update itself in a context; the parts of callbacks are around that."""

    def apply(grads, variables=None):
        with context():
            update(grads, variables)

    step = Step.of(optimizer)
    if step is None:
        update = optimizer.apply
        apply(grads, variables)
        return
    update, step.apply = step.apply, apply
    try:
        optimizer.apply(grads, variables)
    finally:
        step.apply = update


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
