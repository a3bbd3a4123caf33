"""The base of every optimizer: its step, its config and its state, derived from a rule and what the class declares."""

import inspect
from typing import TypedDict

import keras

from kopt import _keras, backends, checks
from kopt.optimizers import execution, factors, gradients, groups, state
from kopt.optimizers.rule import Choice, Declared, Hyper, Slot, traits

_DEFAULTS = {  # of the common arguments; the others are None
    "track_gradient_norm": False,
    "nonfinite": "apply",
    "use_ema": False,
    "ema_momentum": 0.99,
    "sparse": "exact",
}
_RENAMED = {"lr": "learning_rate", "eps": "epsilon", "decay": "weight_decay", "alpha": "rho", "wd": "weight_decay"}


class Common(TypedDict, total=False):
    """The arguments that every optimizer takes; `Optimizer` documents them."""

    weight_decay: float | None
    l2: float | None
    exclude_from_decay: object
    multipliers: object
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    track_gradient_norm: bool
    nonfinite: str
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    loss_scale_factor: float | None
    gradient_accumulation_steps: int | None
    sparse: str
    name: str | None


class Optimizer(Declared, _keras.OptimizerBridge):
    """The base of kopt's optimizers; not to be used itself.

    A subclass gives a `rule`, the `slots` that the rule keeps, and its arguments as `Hyper` or `Choice`. Numbers are
    read, changed and saved like the learning rate: `optimizer.momentum = 0.99` in a callback takes effect at the next
    step, compiled or not. Under `LossScaleOptimizer` assign to its `inner_optimizer`.

    Args:
        learning_rate: A number, a `LearningRateSchedule`, or a callable without arguments, which is called when the
            step is compiled (at every step only where nothing is compiled). A number can change at any time; after
            build it cannot become a schedule.
        weight_decay: Decoupled decay: each step also subtracts `learning_rate * weight_decay * w`. None: no decay.
        l2: Coupled decay: `l2 * w` is added to the gradient, which then goes through the rule. None: no such term.
        exclude_from_decay: What neither decay touches: layers, models, variables, or regular expressions that
            `re.search` finds in a variable's path; one or a list. One that matches nothing is an error.
        multipliers: How much of each update some variables take: a dict of layers, models or regular expressions,
            which `re.search` looks for in a variable's path, with a number for each. The first that picks a variable
            counts, one that picks none is an error, and what none picks takes all. With 0 weights stay as they are, to
            the bit, whatever momentum or decay. `optimizer.multipliers["base"] = 0.1` takes effect at the next step.
        clipnorm: Scale each gradient down to this norm.
        clipvalue: Clip each entry of a gradient to plus or minus this.
        global_clipnorm: Scale all gradients together down to this norm. At most one of the three clips.
        track_gradient_norm: Keep the norm of all gradients together, before clipping, in `gradient_norm`.
        nonfinite: What to do with a gradient that has an infinite entry or NaN, or one whose square overflows where
            the rule squares it, all before clipping. "apply": update with it. "skip": leave weights, state, average
            and `iterations` as they were, and count it in `skipped_steps`. "raise": the same, and a FloatingPointError
            says at which update and in which variable: at once where nothing is compiled, as TensorFlow's
            InvalidArgumentError in a TensorFlow graph; under XLA and in JAX's `fit` no step is done any more and
            `fit` raises when it ends, or `raise_nonfinite()` when you call it, for instance at the end of an epoch.
            Under `LossScaleOptimizer`, which drops bad gradients itself, none of it is seen.
        use_ema: Keep an exponential moving average of the weights, which replaces them when `fit` ends.
        ema_momentum: Weight of the past in that average.
        ema_overwrite_frequency: Also replace the weights by their average every so many steps.
        loss_scale_factor: Multiply the loss, and divide the gradients, by this.
        gradient_accumulation_steps: Average the gradients of so many steps, a window, then update once. `iterations`,
            which drives schedules and averages, counts the updates. A bad gradient under `nonfinite` drops its window.
            Give the last step of a window all variables, None for those without a gradient: others do not move.
        sparse: What a gradient of chosen rows does, which `Embedding` has on TensorFlow. "exact": what the same
            gradient with zeros in all other rows would do. That costs no more than the rows with `SGD` without
            momentum and with `Adagrad`, where zeros change nothing, unless the weights decay; any other rule goes
            through the whole table. "lazy": only the rows in the batch are updated, with their slots, and decay; for
            a rule with momentum or means this is another algorithm, in which rows that rest keep their momentum.
        name: Name of the optimizer.
    """

    rule = None
    slots: tuple[Slot, ...] = ()
    squares = False  # whether the rule squares the gradient, which then may overflow
    weight_decay = Hyper(checks.optional(checks.nonnegative))
    l2 = Hyper(checks.optional(checks.nonnegative))
    exclude_from_decay = Choice(checks.optional(checks.keys))
    multipliers = factors.Multipliers()
    clipnorm = Hyper(checks.optional(checks.positive))
    clipvalue = Hyper(checks.optional(checks.positive))
    global_clipnorm = Hyper(checks.optional(checks.positive))
    track_gradient_norm = Choice(checks.boolean)
    nonfinite = Choice(checks.one_of("apply", "skip", "raise"))
    use_ema = Choice(checks.boolean)
    ema_momentum = Choice(checks.closed_fraction)
    ema_overwrite_frequency = Choice(checks.optional(checks.count(1)))
    loss_scale_factor = Choice(checks.optional(checks.positive))
    gradient_accumulation_steps = Choice(checks.optional(checks.count(2)))
    sparse = Choice(checks.one_of("exact", "lazy"))

    def __init__(self, learning_rate, *, name=None, **arguments):
        if type(self).rule is None:
            raise TypeError("`kopt.Optimizer` has no rule of its own; use one of its subclasses, such as `kopt.Adam`")
        declared = self.declared()
        if unknown := sorted(arguments.keys() - declared):
            self.refuse_unknown(unknown[0], arguments[unknown[0]], ["learning_rate", *declared, "name"], _RENAMED)
        arguments = {argument: _DEFAULTS.get(argument) for argument in declared} | arguments
        learning_rate = checks.learning_rate("learning_rate", learning_rate)
        name = checks.optional(checks.text)("name", name)
        backends.check_strategy()
        arguments = {argument: declared[argument].check(argument, value) for argument, value in arguments.items()}
        self.check_together(arguments)

        # Plain dictionaries, set past Keras's tracking: `add_scalar` tracks the variables.
        self.__dict__.update(ready=False, choices={}, hyper_variables={}, known={}, opened={})
        self.__dict__.update(waiting={}, before={}, loaded={})  # `state.load` says what they hold
        self.__dict__["factors"] = None  # what `multipliers` shows
        self.__dict__.update(readings={}, plan=None)  # the variables of `gradients.readings`; what `lists` keeps
        super().__init__(learning_rate, name=name)
        self.known["learning_rate"] = learning_rate
        for argument, value in arguments.items():
            if isinstance(declared[argument], factors.Multipliers):
                self.__dict__["factors"] = factors.Factors(self, value) if value else None
            elif isinstance(declared[argument], Choice):
                self.choices[argument] = value
            elif value is not None:
                self.hyper_variables[argument] = self.add_scalar(argument, value)
                self.known[argument] = value
        self.__dict__["ready"] = True

    def __init_subclass__(cls, **arguments):
        super().__init_subclass__(**arguments)
        if "update_step" in vars(cls):
            raise TypeError(f"`{cls.__name__}` must give a `rule` and `slots` instead of `update_step`")

    def numbers(self) -> dict[str, Hyper]:
        """The arguments that are numbers, and are given: those that can change during `fit`."""
        return {name: argument for name, argument in self.declared().items() if name in self.hyper_variables}

    def check_together(self, arguments: dict) -> None:
        """Refuse arguments that are right one by one but not together."""
        if arguments["exclude_from_decay"] and arguments["weight_decay"] is None and arguments["l2"] is None:
            checks.refuse("exclude_from_decay", "None without `weight_decay` or `l2`", arguments["exclude_from_decay"])
        if arguments["ema_overwrite_frequency"] is not None and not arguments["use_ema"]:
            allowed = "None without `use_ema=True`"
            checks.refuse("ema_overwrite_frequency", allowed, arguments["ema_overwrite_frequency"])
        if arguments["multipliers"] and arguments["ema_overwrite_frequency"] is not None:
            allowed = "None beside `multipliers`: the average would move what they hold"
            checks.refuse("ema_overwrite_frequency", allowed, arguments["ema_overwrite_frequency"])
        for condition, where in (
            (backends.BACKEND != "tensorflow", f"on {backends.BACKEND}, where no gradient has rows"),
            (backends.strategy() is not None, "under a `tf.distribute` strategy, which sums whole tables"),
            (arguments["gradient_accumulation_steps"], "beside `gradient_accumulation_steps`: a sum has no rows"),
        ):
            if arguments["sparse"] == "lazy" and condition:
                checks.refuse("sparse", f'"exact" {where}', "lazy")
        clips = [name for name in gradients.CLIPS if arguments[name] is not None]
        if len(clips) > 1:
            checks.refuse(clips[1], f"None beside `{clips[0]}`", arguments[clips[1]])

    def opens(self, name: str) -> bool:
        """Whether the slot that the number `name` needs is there, or will be at build."""
        return bool(self.opened.get(name) if self.built else getattr(self, name))

    # The step

    def build(self, variables):
        """Create the slots of `variables`. Keras calls it at the first step; call it to use the optimizer by hand."""
        if self.built:
            return
        backends.check_strategy(self.home)
        variables = self._checked(variables)
        excluded = groups.select("exclude_from_decay", self.exclude_from_decay or [], variables)
        owner = self.factors.owner(variables) if self.factors else [None] * len(variables)
        with backends.eagerly():
            for name, argument in self.declared().items():
                if isinstance(argument, Hyper) and argument.opens_slot:  # state that waits brings its slot along
                    self.opened[name] = getattr(self, name) or (float(self.before[name]) if self.loaded else 0.0)
            self.index(variables)
            self.__dict__.update(used_rule=self.rule, traits=traits(self.rule), slots_in_use=tuple(self.slots))
            if self.sparse == "lazy" and not self.traits.elementwise:
                checks.refuse("sparse", '"exact" with a rule that is not declared `elementwise`', "lazy")
            self._rule_arguments = inspect.signature(self.used_rule).parameters.keys() & self.declared().keys()
            for name, (shape, dtype) in gradients.readings(self).items():
                self.readings[name] = self.add_variable(shape, dtype=dtype, aggregation="only_first_replica", name=name)
                self.named[id(self.readings[name])] = "reading", name
            self.__dict__["all_held"] = execution.hold(self, variables, excluded, owner)
            self.__dict__["held_of"] = dict(zip(map(id, variables), self.all_held, strict=True))  # the quick way to it
            self.__dict__["overwrites"] = any(held.overwritten for held in self.all_held)
            self.__dict__["dtypes"] = list(dict.fromkeys(held.dtype for held in self.all_held))
            if self.use_ema:
                self.show_averages(variables, [held.average for held in self.all_held])
            if self.exclude_from_decay:
                kept = groups.portable("exclude_from_decay", self.exclude_from_decay, variables)
                self.choices["exclude_from_decay"] = kept
            if self.loaded:
                state.settle(self)

    def _checked(self, variables) -> list:
        variables = list(variables)
        for variable in variables:
            if not isinstance(variable, keras.Variable) and not hasattr(variable, "assign"):
                checks.refuse("variables", "a list of variables", variable)
            if "float" not in _keras.dtype_of(variable):
                path, dtype = _keras.path_of(variable), _keras.dtype_of(variable)
                raise ValueError(f"`variables` must be of floats. Received: variables={path!r} of {dtype}")
        if len({id(variable) for variable in variables}) < len(variables):
            checks.refuse("variables", "a list without repetitions", [_keras.path_of(v) for v in variables])
        return variables

    @property
    def everything(self) -> list:
        """All variables that a step may change."""
        return [*self.trained, *self.variables]

    def rule_arguments(self, numbers: dict) -> dict:
        """The arguments that the rule reads, those that are numbers as given."""
        return {name: value for name, value in (self.choices | numbers).items() if name in self._rule_arguments}

    @property
    def parts(self) -> list:
        """The variables as a file holds them: in place of a slab, each piece with what else its variable has."""
        kept = [part for held in self.all_held for part in held.parts] if self.built else []
        own = {id(getattr(part, "whole", part)) for part in kept}
        return [variable for variable in self.variables if id(variable) not in own] + kept

    def held(self, variable) -> execution.Held:
        """What the optimizer keeps for a variable."""
        held = self.held_of.get(id(variable))
        return self.all_held[self.index_of(variable)] if held is None else held

    @backends.as_written
    def apply(self, grads, trainable_variables=None):
        """Do one step. `optimizers/gradients.py` says what happens in it, in order.

        Args:
            grads: A gradient for each variable, or None where there is none.
            trainable_variables: The variables; by default all that the optimizer was built with. The first call
                builds the optimizer, if nothing has before.
        """
        if trainable_variables is None and not self.built:
            checks.refuse("trainable_variables", "given at the first step, if `build` was not called", None)
        grads = checks.listed("grads", grads)
        variables = self.trained
        if trainable_variables is not None:
            variables = checks.listed("trainable_variables", trainable_variables)
        if not grads and not variables:
            return
        gradients.check(grads, variables if self.built else self._checked(variables))
        with backends.unrecorded():
            self.build(variables)
            self._check_known(variables)
            with keras.name_scope(self.name):
                gradients.take(self, grads, variables)

    def _check_known(self, variables) -> None:
        backends.check_strategy(self.home)
        unknown = [
            _keras.path_of(variable)
            for variable in variables
            if id(variable) not in self.held_of and self.index_of(variable) is None
        ]
        if unknown:
            known = [_keras.path_of(variable) for variable in self.trained[:3]]
            allowed = f"among the {len(self.trained)} that the optimizer was built with ({', '.join(known)}, ...)"
            if not known:
                allowed = "known, but the optimizer was built with none: build the model first"
            checks.refuse("trainable_variables", allowed, unknown)

    @backends.as_written
    def update_step(self, gradient, variable, learning_rate):
        """Update one variable by itself, at this rate."""
        with backends.unrecorded():
            execution.update(self, [variable], [gradient], execution.scalars(self, learning_rate))

    def finalize_variable_values(self, var_list):
        """Raise what `nonfinite="raise"` has left to say; replace the variables by their averages."""
        if not self.built or _keras.is_away(self.iterations):  # not to hide an error on its way through JAX's `fit`
            return
        self.raise_nonfinite()
        if self.use_ema and _keras.to_numpy(self.iterations):
            known = [v for v in var_list if self.index_of(v) is not None and self.held(v).average is not None]
            averages = [self.held(v).average for v in known]
            backends.on_every_copy(lambda v, average: self.assign(v, backends.copied(average)), known, averages)

    @property
    def skipped_steps(self):
        """How many updates were left out because of `nonfinite`."""
        return self._reading("skipped_steps", 'nonfinite="skip"` or `nonfinite="raise"')

    @property
    def gradient_norm(self):
        """The norm of all gradients together, before clipping, at the last update."""
        return self._reading("gradient_norm", "track_gradient_norm=True")

    def _reading(self, name, asked_by):
        if name not in gradients.readings(self):
            raise AttributeError(f"`{name}` is kept only with `{asked_by}`")
        return self.readings[name] if self.built else 0

    def raise_nonfinite(self):
        """Raise the FloatingPointError that `nonfinite="raise"` could not raise in a compiled step, if there is one.

        Training can go on after it, with the weights as they were before the bad gradient. In a JAX loop of your own,
        assign to `optimizer.variables` before what `stateless_apply` returned.
        """
        if _keras.is_away(self.iterations):
            allowed = "called through `self.model.optimizer`, which fetches the state from the running step"
            checks.refuse("raise_nonfinite", allowed, self.name)
        gradients.raise_waiting(self)

    # Arguments and state

    @property
    def learning_rate(self):
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        if backends.is_symbolic(value):  # in a step being traced: nothing to judge yet
            keras.optimizers.Optimizer.learning_rate.fset(self, value)
            return
        value = checks.learning_rate("learning_rate", value)
        computed, number = self.rate_is_computed(), isinstance(value, float)
        if computed and (self.built or number):
            checks.refuse("learning_rate", "the schedule or callable that it was at build", value)
        if self.built and not number:
            checks.refuse("learning_rate", "a number, as it was at build", value)
        if number:
            _keras.assign("learning_rate", super().learning_rate, value)
            self.known["learning_rate"] = value
        else:
            keras.optimizers.Optimizer.learning_rate.fset(self, value)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Keras's way to say `exclude_from_decay`, before build."""
        self.exclude_from_decay = [*(self.exclude_from_decay or []), *(var_list or []), *(var_names or [])] or None

    def get_config(self):
        if self.rate_is_computed():
            rate = super().get_config()["learning_rate"]
        else:
            rate = _keras.number(super().learning_rate, self.known["learning_rate"])
        config = {"name": self.name, "learning_rate": rate, **self.arguments()}
        if self.exclude_from_decay:
            keys = self.exclude_from_decay
            config["exclude_from_decay"] = list(keys) if self.built else groups.portable("exclude_from_decay", keys, [])
        if self.factors is not None:
            config["multipliers"] = self.factors.config()
        # A number that is zero by now made a slot: it must be made again, and the state holds the number in use.
        return config | {name: value for name, value in self.opened.items() if value and not config[name]}

    def save_own_variables(self, store):
        state.save(self, store)

    def load_own_variables(self, store):
        state.load(self, store)
        if "nonfinite_waiting" in self.readings:  # what was wrong then is over
            self.readings["nonfinite_waiting"].assign(0)

    def set_weights(self, weights):
        if len(weights) != len(self.variables):
            checks.refuse("weights", f"a list of {len(self.variables)} arrays", f"{len(weights)} arrays")
        super().set_weights(weights)

    def __repr__(self):
        if not self.__dict__.get("ready"):
            return object.__repr__(self)
        rate = self.rate_source() if self.rate_is_computed() else self.get_config()["learning_rate"]
        return self.shown({"learning_rate": rate, **self.arguments()}, dict(_DEFAULTS))
