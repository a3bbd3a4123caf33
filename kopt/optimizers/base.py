"""The base of every optimizer: its step, its config and its state, derived from a rule and what the class declares."""

import difflib
import inspect
from typing import TypedDict

import keras

from kopt import _keras, checks
from kopt.optimizers import execution, groups, state
from kopt.optimizers.rule import MASTER, Argument, At, Choice, Hyper, Slot

_KERAS = {  # arguments that Keras's own base reads
    "clipnorm": checks.optional(checks.positive),
    "clipvalue": checks.optional(checks.positive),
    "global_clipnorm": checks.optional(checks.positive),
    "use_ema": checks.boolean,
    "ema_momentum": checks.closed_fraction,
    "ema_overwrite_frequency": checks.optional(checks.count(1)),
    "loss_scale_factor": checks.optional(checks.positive),
    "gradient_accumulation_steps": checks.optional(checks.count(2)),
    "name": checks.optional(checks.text),
}
_DEFAULTS = {"use_ema": False, "ema_momentum": 0.99}  # of the common arguments; the others are None
_ELSEWHERE = {"lr": "learning_rate", "alpha": "learning_rate", "eps": "epsilon", "decay": "weight_decay"}


class Common(TypedDict, total=False):
    """The arguments that every optimizer takes; `Optimizer` documents them."""

    weight_decay: float | None
    l2: float | None
    exclude_from_decay: object
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    loss_scale_factor: float | None
    gradient_accumulation_steps: int | None
    name: str | None


class Optimizer(_keras.OptimizerBridge):
    """The base of kopt's optimizers; not to be used itself.

    A subclass gives a `rule`, the `slots` that the rule keeps, and its arguments as `Hyper` or `Choice`. Numbers are
    read, changed and saved like the learning rate: `optimizer.momentum = 0.99` in a callback takes effect at the next
    step, compiled or not. Under `LossScaleOptimizer` assign to its `inner_optimizer`.

    Args:
        learning_rate: A number, a `LearningRateSchedule`, or a callable without arguments.
        weight_decay: Decoupled decay: each step also subtracts `learning_rate * weight_decay * w`. None: no decay.
        l2: Coupled decay: `l2 * w` is added to the gradient, which then goes through the rule. None: no such term.
        exclude_from_decay: What neither decay touches: layers, models, variables, or regular expressions that
            `re.search` finds in a variable's path; one or a list. One that matches nothing is an error.
        clipnorm: Scale each gradient down to this norm.
        clipvalue: Clip each entry of a gradient to plus or minus this.
        global_clipnorm: Scale all gradients together down to this norm. At most one of the three clips.
        use_ema: Keep an exponential moving average of the weights, which replaces them when `fit` ends.
        ema_momentum: Weight of the past in that average.
        ema_overwrite_frequency: Also replace the weights by their average every so many steps.
        loss_scale_factor: Multiply the loss, and divide the gradients, by this.
        gradient_accumulation_steps: Average the gradients of so many steps, then update once.
        name: Name of the optimizer.
    """

    rule = None
    slots: tuple[Slot, ...] = ()
    weight_decay = Hyper(checks.optional(checks.nonnegative))
    l2 = Hyper(checks.optional(checks.nonnegative))
    exclude_from_decay = Choice(checks.optional(checks.keys))

    def __init__(self, learning_rate, **arguments):
        declared = self.declared()
        arguments = {"weight_decay": None, "l2": None, "exclude_from_decay": None} | arguments
        for name in arguments.keys() - declared.keys() - _KERAS.keys():
            raise ValueError(self._unknown(name, arguments[name]))
        learning_rate = checks.learning_rate("learning_rate", learning_rate)
        own = {name: argument.checked(arguments[name]) for name, argument in declared.items()}
        common = {name: check(name, arguments[name]) for name, check in _KERAS.items() if name in arguments}
        self.check_together(own)
        if own["exclude_from_decay"] and own["weight_decay"] is None and own["l2"] is None:
            checks.refuse("exclude_from_decay", "None without `weight_decay` or `l2`", arguments["exclude_from_decay"])

        # Plain dictionaries, set past Keras's tracking: `add_scalar` tracks the variables.
        self.__dict__.update(given=own, hyper_variables={}, choices={}, paths=(), waiting={})
        super().__init__(learning_rate, **common)
        for name, argument in declared.items():
            if isinstance(argument, Choice):
                self.choices[name] = own[name]
            elif own[name] is not None:
                self.hyper_variables[name] = self.add_scalar(name, own[name])

    def check_together(self, given: dict) -> None:
        """Refuse arguments that are right one by one but not together."""

    @classmethod
    def declared(cls) -> dict[str, Argument]:
        """The arguments of this class that are `Hyper` or `Choice`, in the order of its constructor."""
        found = {n: a for base in reversed(cls.__mro__) for n, a in vars(base).items() if isinstance(a, Argument)}
        order = [*inspect.signature(cls.__init__).parameters, *found]
        return dict(sorted(found.items(), key=lambda item: order.index(item[0])))

    def _unknown(self, name, value) -> str:
        allowed = ["learning_rate", *self.declared(), *_KERAS]
        near = [_ELSEWHERE[name]] if name in _ELSEWHERE else difflib.get_close_matches(name, allowed, 1)
        hint = f"Did you mean `{near[0]}`?" if near else "It takes " + ", ".join(f"`{a}`" for a in allowed) + "."
        return f"`{type(self).__name__}` has no argument `{name}`. {hint} Received: {name}={value!r}"

    # The step

    def build(self, variables):
        """Create the slots of `variables`. Keras calls it at the first step; call it to use the optimizer by hand."""
        if self.built:
            return
        variables = list(variables)
        excluded = groups.select("exclude_from_decay", self.exclude_from_decay or [], variables)
        with _keras.eagerly():
            self.paths = tuple(_keras.path_of(v) for v in variables)
            super().build(variables)
            self._rule, self._slots = self.rule, tuple(self.slots)
            self._reads = inspect.signature(self._rule).parameters.keys() & self.declared().keys()
            self._held = tuple(self._hold(v, decayed=i not in excluded) for i, v in enumerate(variables))
            self._dtypes = tuple(dict.fromkeys(held.dtype for held in self._held))
            if self.waiting:
                state.load_slots(self, self.waiting)
                self.waiting.clear()

    def _hold(self, variable, decayed: bool) -> execution.Held:
        dtype = _keras.dtype_of(variable)
        if "float" not in dtype:
            raise ValueError(f"A trainable variable must be of floats. Received: {_keras.path_of(variable)} of {dtype}")
        wide = _keras.wide(dtype)

        def slot(slot, initial):
            return self.add_slot(variable, slot.name, initial, wide)

        if getattr(variable, "overwrite_with_gradient", False):  # Keras assigns the gradient itself
            return execution.Held(wide, (), None, decayed)
        slots = tuple(slot(s, _keras.constant(s.initial)) for s in self._slots)
        master = slot(MASTER, lambda shape, dtype: _keras.read(variable, dtype)) if wide != dtype else None
        return execution.Held(wide, slots, master, decayed)

    def scalars(self, learning_rate) -> dict[str, execution.Shared]:
        """What all variables share in this step, for each dtype of the arithmetic."""
        return {dtype: self._shared(dtype, learning_rate) for dtype in self._dtypes}

    def _shared(self, dtype, learning_rate) -> execution.Shared:
        rate = _keras.read(learning_rate, dtype)
        numbers = {name: _keras.read(variable, dtype) for name, variable in self.hyper_variables.items()}
        arguments = {name: value for name, value in (self.choices | numbers).items() if name in self._reads}
        decay = numbers.get("weight_decay")
        return execution.Shared(
            at=At(_keras.read(self.iterations, dtype) + 1, rate),
            arguments=arguments,
            l2=numbers.get("l2"),
            shrink=None if decay is None else 1 - rate * decay,
        )

    def update_step(self, gradient, variable, learning_rate):
        """Update one variable. `learning_rate` is a rate, or what `scalars` made of it for the whole step."""
        shared = learning_rate if isinstance(learning_rate, dict) else self.scalars(learning_rate)
        held = self._held[self.index_of(variable)]
        execution.plain(self._rule, gradient, variable, held, shared[held.dtype], self.assign)

    # Arguments and state

    @property
    def learning_rate(self):
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        value = checks.learning_rate("learning_rate", value)
        if isinstance(value, float) and self.rate_is_scheduled():
            checks.refuse("learning_rate", "a schedule or a callable, as at the start, to be replaced", value)
        keras.optimizers.Optimizer.learning_rate.fset(self, value)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Keras's way to say `exclude_from_decay`, before build."""
        self.exclude_from_decay = [*(self.exclude_from_decay or []), *(var_list or []), *(var_names or [])] or None

    def get_config(self):
        config = super().get_config()
        if not self.rate_is_scheduled():
            config["learning_rate"] = _keras.number(super().learning_rate)
        for name, argument in self.declared().items():
            value = getattr(self, name)
            if isinstance(argument, Hyper) and argument.opens_slot and not value:
                value = self.given[name]  # the slots must be made again; the state holds the number in use
            config[name] = value
        if self.exclude_from_decay:
            config["exclude_from_decay"] = groups.patterns(self.exclude_from_decay)
        return config

    def save_own_variables(self, store):
        state.save(self, store)

    def load_own_variables(self, store):
        state.load(self, store)

    def set_weights(self, weights):
        if len(weights) != len(self.variables):
            raise ValueError(f"`weights` must have {len(self.variables)} arrays. Received: {len(weights)} arrays")
        super().set_weights(weights)

    def __repr__(self):
        defaults = {name: p.default for name, p in inspect.signature(type(self).__init__).parameters.items()}
        config = self.get_config()
        shown = {n: config[n] for n in config if n != "name" and config[n] != defaults.get(n, _DEFAULTS.get(n))}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"
