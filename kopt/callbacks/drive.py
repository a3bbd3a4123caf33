"""How callbacks drive one number of one optimizer: several of them together, and with what writes to it from outside.

In the step, before the optimizer's own `apply`:

    scale = number / plain  where somebody else has written to the number since the last step
    plain = value * factors
    last = number = scale * plain

`value` is that of the one schedule that has a value of its own, or the optimizer's own number, from before the fit. A
number that is written where the factors are 0 is taken for `scale * own`.
"""

import contextlib

import keras
from keras import ops

from kopt import _keras, backends, checks
from kopt._keras import stepping
from kopt.callbacks import clock
from kopt.optimizers.quasi_newton.optimizer import QuasiNewton
from kopt.schedules.time import Time, arithmetic

FLOATS = "weight_decay", "beta_1", "beta_2", "rho"  # Keras's optimizers read them as numbers, in arithmetic alone


class Drive:
    """A number in a variable that schedules share: the learning rate, and the other numbers of kopt's optimizers."""

    def __init__(self, part, optimizer, name, variable, own):
        def add(what, value, dtype=None):
            return part.add_variable(optimizer, (), _keras.constant(value), dtype, f"{name}_{what}")

        self.optimizer, self.name, self.first, self.variable = optimizer, name, part, variable
        self.own, self.scale, self.plain = add("own", own), add("scale", 1.0), add("plain", own)
        self.last = add("last", own, _keras.dtype_of(variable))
        self.schedules = []
        self.clock = clock.Clock(clock.add(optimizer), lambda time: self.value(time, self.own_now()))

    def join(self, schedule) -> None:
        both = [one for one in [*self.schedules, schedule] if not one.is_factor]
        if len(both) > 1:
            allowed = f"such that only one gives `{self.name}` a value of its own, and the others are factors"
            checks.refuse("callbacks", allowed, both)
        self.schedules.append(schedule)

    def check(self, span) -> None:
        """Refuse, when all have joined, what cannot be in this fit."""
        for schedule in self.schedules:
            schedule.check_base(self.own_now())
        span.check(self.schedules, self.clock.value, ranges(self.optimizer, self.name), self.name)

    def value(self, time, own):
        """The number at a moment, by the schedules alone."""
        factor, value = 1.0, own
        for schedule in self.schedules:
            if schedule.is_factor:
                factor = factor * schedule.formula(time)
            else:
                value = schedule.value(time, own)
        return value * factor

    def step(self) -> None:
        """Set the number for the next update."""
        number, last, scale, plain, own = map(_number, (self.variable, self.last, self.scale, self.plain, self.own))
        scale = _scale(number, last, scale, plain, own)
        updates = backends.number(self.optimizer.iterations, "int32")
        time = Time.told(updates, backends.numbers(self.clock.variable, "int32"))
        plain = self.value(time, self.base())
        for variable, value in ((self.scale, scale), (self.plain, plain), (self.last, scale * plain)):
            _set(variable, value)
        _set(self.variable, scale * plain)

    def base(self):
        """What the optimizer's own number is at this step."""
        return _number(self.own)

    def take_written(self) -> None:
        """Take what was written to the number since the last step."""
        now = [read(one) for one in (self.variable, self.last, self.scale, self.plain, self.own)]
        self.scale.assign(float(_scale(*now)))
        self.last.assign(_keras.to_numpy(self.variable))

    def own_now(self) -> float:
        return read(self.own) * read(self.scale)

    @contextlib.contextmanager
    def aside(self):
        """The optimizer's own number in its place, for files; one that is read from a file replaces it."""
        self.take_written()
        there = read(self.variable)
        self.variable.assign(self.own_now())
        mine = read(self.variable)
        try:
            yield
        finally:
            found = read(self.variable)
            if found != mine:
                self.own.assign(found)
                self.scale.assign(1.0)
            self.variable.assign(there)

    def during_update(self):
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Put the optimizer's own number back, with what was written after the last step."""
        self.take_written()
        self.leave()

    def leave(self) -> None:
        """Put it back, unless somebody has written another since the fit was broken off."""
        if read(self.variable) == read(self.last):
            self.variable.assign(self.own_now())


class OfSource(Drive):
    """A learning rate from a schedule or a callable, in whose place a variable stands."""

    def __init__(self, part, optimizer, name):
        self.source = stepping.rate_source(optimizer)
        rate = float(_number(_keras.computed_rate(optimizer, self.source)))
        variable = part.add_variable(optimizer, (), _keras.constant(rate), name="learning_rate_in_use")
        super().__init__(part, optimizer, name, variable, rate)
        self.put_back = stepping.stand_in_for_rate(optimizer, variable)

    def base(self):
        return _number(_keras.computed_rate(self.optimizer, self.source))

    @contextlib.contextmanager
    def aside(self):
        self.put_back()
        try:
            yield
        finally:
            self.put_back = stepping.stand_in_for_rate(self.optimizer, self.variable)

    def leave(self):
        self.put_back()


class OfFloat(Drive):
    """A number of Keras's optimizers, which is a float: for the length of an update a variable stands in its place."""

    def __init__(self, part, optimizer, name):
        self.float = float(getattr(optimizer, name))
        variable = part.add_variable(optimizer, (), _keras.constant(self.float), name=f"{name}_in_use")
        super().__init__(part, optimizer, name, variable, self.float)

    @contextlib.contextmanager
    def during_update(self):
        is_number = backends.BACKEND == "torch"
        vars(self.optimizer)[self.name] = _number(self.variable) if is_number else self.variable
        try:
            yield
        finally:
            vars(self.optimizer)[self.name] = self.float

    def take_written(self):
        if getattr(self.optimizer, self.name) != self.float:
            self.float = float(getattr(self.optimizer, self.name))
            self.own.assign(self.float)

    def aside(self):
        return contextlib.nullcontext()

    def leave(self):
        pass


def read(variable) -> float:
    return float(_keras.to_numpy(variable))


def _number(variable):
    return backends.number(variable, checks.held_dtype())


def _set(variable, value) -> None:
    if backends.BACKEND == "torch":
        backends.set_number(variable, float(value), None if _keras.is_stateless() else _keras.memory(variable))
    else:
        backends.set_number(variable, ops.cast(value, _keras.dtype_of(variable)))


def _scale(number, last, scale, plain, own):
    """The scale with which the number is what was written to it."""
    xp = arithmetic(number)
    base = xp.where(plain == 0, own, plain)
    written = xp.logical_and(xp.not_equal(number, last), xp.not_equal(base, 0))
    return xp.where(written, number / xp.where(base == 0, 1.0, base), scale)


def make(part, optimizer, name) -> Drive:
    """What drives a number of this optimizer; one that cannot be driven is refused."""
    kind, is_ours = type(optimizer).__name__, isinstance(optimizer, _keras.OptimizerBridge)
    if isinstance(optimizer, QuasiNewton):
        checks.refuse("hyperparameter", f"of another optimizer: {kind} has none that can change during `fit`", name)
    if name not in names(optimizer):
        allowed = f"one of those that this {kind} can change during `fit` ({', '.join(names(optimizer))})"
        if not is_ours and isinstance(getattr(optimizer, name, None), (int, float)):
            allowed += f": Keras's fixes `{name}` when the step is compiled; use kopt.{kind}"
        checks.refuse("hyperparameter", allowed, name)
    if name == "learning_rate":
        source = stepping.rate_source(optimizer)
        is_held = isinstance(source, keras.Variable)
        return Drive(part, optimizer, name, source, read(source)) if is_held else OfSource(part, optimizer, name)
    if not is_ours:
        return OfFloat(part, optimizer, name)
    if optimizer.numbers()[name].opens_slot and not optimizer.opens(name):
        checks.refuse("hyperparameter", f"one that {kind} keeps state for: it was built with {name}=0", name)
    variable = optimizer.hyper_variables[name]
    return Drive(part, optimizer, name, variable, read(variable))


def names(optimizer) -> list[str]:
    """The numbers that can be driven."""
    if isinstance(optimizer, QuasiNewton):
        return []
    if isinstance(optimizer, _keras.OptimizerBridge):
        return ["learning_rate", *optimizer.numbers()]
    return ["learning_rate", *(name for name in FLOATS if isinstance(getattr(optimizer, name, None), (int, float)))]


def ranges(optimizer, name):
    """What a value of the number may be."""
    if name != "learning_rate" and isinstance(optimizer, _keras.OptimizerBridge):
        return optimizer.numbers()[name].check
    return checks.nonnegative if name in ("learning_rate", "weight_decay") else checks.fraction


def own_rate(optimizer) -> float:
    """The learning rate that the optimizer has by itself, if that is a number."""
    driven = found(optimizer, "learning_rate")
    return read(stepping.rate_source(optimizer)) if driven is None else driven.own_now()


def found(optimizer, name) -> Drive | None:
    """What drives the number already."""
    parts = stepping.Step.of(optimizer).parts
    return next((part.drives(optimizer)[name] for part in parts if name in part.drives(optimizer)), None)


def reader(optimizer, name):
    """A function without arguments for the number as it is in the next update."""
    if name not in names(optimizer):
        allowed = f"of those of this {type(optimizer).__name__}: {', '.join(names(optimizer))}"
        checks.refuse("hyperparameters", allowed, name)

    def read():
        driven, source = found(optimizer, name), stepping.rate_source(optimizer)
        if driven is not None:
            return _number(driven.last)
        if name == "learning_rate":
            return _number(source if isinstance(source, keras.Variable) else _keras.computed_rate(optimizer, source))
        if isinstance(optimizer, _keras.OptimizerBridge):
            return _number(optimizer.hyper_variables[name])
        return getattr(optimizer, name)

    return read
