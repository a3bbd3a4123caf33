"""How callbacks drive one number of one optimizer: several of them together, and with what writes to it from outside.

In the step, before the optimizer's own `apply`:

    scale *= number / last  where somebody else has written to the number since the last step
    last = number = scale * value * factors

`value` is that of the one schedule that has a value of its own, or the optimizer's own number, from before the fit.
"""

import contextlib

from keras import ops

from kopt import _keras, backends, checks
from kopt._keras import stepping
from kopt.schedules.time import Time, arithmetic

FLOATS = "weight_decay", "beta_1", "beta_2", "rho"  # Keras's optimizers read them as numbers, in arithmetic alone


class Drive:
    """A number that the schedules of some callbacks share; here, one that nothing else writes to."""

    def __init__(self, part, optimizer, name, own, dtype=None):
        def add(what, value, dtype):
            return part.add_variable(optimizer, (), _keras.constant(value), dtype, f"{name}_{what}")

        self.optimizer, self.name, self.first = optimizer, name, part
        self.dtype = dtype or checks.held_dtype()
        self.own, self.scale, self.last = add("own", own, None), add("scale", 1.0, None), add("last", own, self.dtype)
        self.schedules = []  # pairs of a schedule and its clock

    def join(self, schedule, clock) -> None:
        both = [one for one, _ in self.schedules if not one.is_factor] + [schedule]
        if len(both) > 1 and not schedule.is_factor:
            allowed = f"such that only one gives `{self.name}` a value of its own, and the others are factors"
            checks.refuse("callbacks", allowed, both)
        self.schedules.append((schedule, clock))

    def step(self) -> None:
        """Set the number for the next update."""
        scale, last = (self._number(variable) for variable in (self.scale, self.last))
        number = self.outside()
        if number is not None:
            xp = arithmetic(number, last)
            written = xp.logical_and(xp.not_equal(number, last), xp.not_equal(last, 0))
            scale = xp.where(written, scale * (number / xp.where(last == 0, xp.ones_like(last), last)), scale)
            self._set(self.scale, scale)
        updates = backends.number(self.optimizer.iterations, "int32")
        value, factor = self.base(), scale
        for schedule, clock in self.schedules:
            time = Time.told(updates, backends.numbers(clock, "int32"))
            if schedule.is_factor:
                factor = factor * schedule.formula(time)
            else:
                value = schedule.value(time, value)
        self._set(self.last, value * factor)
        self.write(value * factor)

    def _number(self, variable):
        return backends.number(variable, checks.held_dtype())

    def _set(self, variable, value) -> None:
        dtype = _keras.dtype_of(variable)
        backends.set_number(variable, ops.cast(value, dtype) if ops.is_tensor(value) else float(value))

    def base(self):
        return self._number(self.own)

    def outside(self):
        """The number as it stands; None if nothing but this writes to it."""

    def write(self, value) -> None:
        """Put the number where the optimizer reads it."""

    def during_update(self):
        return contextlib.nullcontext()

    def aside(self):
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Take what was written after the last step."""

    def leave(self) -> None:
        """Put the optimizer's own number back."""

    def own_now(self) -> float:
        return float(_keras.to_numpy(self.own)) * float(_keras.to_numpy(self.scale))

    def in_use(self) -> float:
        return float(_keras.to_numpy(self.last))


class OfVariable(Drive):
    """A number in a variable: the learning rate, and the other numbers of kopt's optimizers."""

    def __init__(self, part, optimizer, name, variable):
        super().__init__(part, optimizer, name, float(_keras.to_numpy(variable)), _keras.dtype_of(variable))
        self.variable = variable

    def outside(self):
        return self._number(self.variable)

    def write(self, value):
        self._set(self.variable, value)

    @contextlib.contextmanager
    def aside(self):
        there = float(_keras.to_numpy(self.variable))
        self._put_own()
        mine = float(_keras.to_numpy(self.variable))
        try:
            yield
        finally:
            found = float(_keras.to_numpy(self.variable))
            if found != mine:  # a file was read
                self.own.assign(found)
                self.scale.assign(1.0)
            self.variable.assign(there)

    def _put_own(self) -> None:
        self.variable.assign(self.own_now())

    def finish(self):
        there, last = float(_keras.to_numpy(self.variable)), self.in_use()
        if there != last and last:
            self.scale.assign(float(_keras.to_numpy(self.scale)) * there / last)
        self._put_own()
        self.last.assign(_keras.to_numpy(self.variable))

    def leave(self):
        if float(_keras.to_numpy(self.variable)) == self.in_use():  # else somebody has written another since
            self._put_own()


class OfSource(Drive):
    """A learning rate from a schedule or a callable, in whose place stands what is in use."""

    def __init__(self, part, optimizer, name):
        self.source = stepping.rate_source(optimizer)
        super().__init__(part, optimizer, name, float(_keras.to_numpy(optimizer.learning_rate)))
        self.put_back = stepping.stand_in(optimizer, "_learning_rate", stepping.InUse(self.last))

    def base(self):
        return stepping.computed_rate(self.optimizer, self.source)

    @contextlib.contextmanager
    def aside(self):
        stands_in = stepping.rate_source(self.optimizer)
        self.put_back()
        try:
            yield
        finally:
            self.put_back = stepping.stand_in(self.optimizer, "_learning_rate", stands_in)

    def leave(self):
        self.put_back()


class OfFloat(Drive):
    """A number of Keras's optimizers, in whose place a variable stands during an update."""

    def __init__(self, part, optimizer, name):
        self.float = float(getattr(optimizer, name))
        super().__init__(part, optimizer, name, self.float)

    @contextlib.contextmanager
    def during_update(self):
        is_number = backends.BACKEND == "torch"
        vars(self.optimizer)[self.name] = self._number(self.last) if is_number else self.last
        try:
            yield
        finally:
            vars(self.optimizer)[self.name] = self.float


def make(part, optimizer, name) -> Drive:
    """What drives a number of this optimizer; one that it has not is refused."""
    source = stepping.rate_source(optimizer)
    if name == "learning_rate":
        if hasattr(source, "assign"):
            return OfVariable(part, optimizer, name, source)
        return OfSource(part, optimizer, name)
    kind, is_ours = type(optimizer).__name__, isinstance(optimizer, _keras.OptimizerBridge)
    if is_ours and name in optimizer.numbers():
        if optimizer.numbers()[name].opens_slot and not optimizer.opens(name):
            allowed = f"one that {kind} keeps state for: it was built with {name}=0"
            checks.refuse("hyperparameter", allowed, name)
        return OfVariable(part, optimizer, name, optimizer.hyper_variables[name])
    if not is_ours and name in FLOATS and isinstance(getattr(optimizer, name, None), (int, float)):
        return OfFloat(part, optimizer, name)
    if not is_ours and isinstance(getattr(optimizer, name, None), (int, float)):
        hint = "use kopt.SGD" if kind == "SGD" else f"use kopt.{kind}" if kind == "RMSprop" else "use one of kopt's"
        allowed = f"one that Keras's {kind} can change during `fit` ({names(optimizer)}): it fixes `{name}`; {hint}"
        checks.refuse("hyperparameter", allowed, name)
    return checks.refuse("hyperparameter", f"one of those of this {kind}: {names(optimizer)}", name)


def found(optimizer, name) -> Drive | None:
    """What drives the number already."""
    parts = stepping.Step.of(optimizer).parts
    return next((part.drives(optimizer)[name] for part in parts if name in part.drives(optimizer)), None)


def reader(optimizer, name):
    """A function without arguments for the number as it is in the next update."""
    source = stepping.rate_source(optimizer)

    def read():
        driven = found(optimizer, name)
        if driven is not None:
            return backends.number(driven.last, driven.dtype)
        if name == "learning_rate":
            if hasattr(source, "assign"):
                return backends.number(source, _keras.dtype_of(source))
            return stepping.computed_rate(optimizer, source)
        if isinstance(optimizer, _keras.OptimizerBridge):
            return backends.number(optimizer.hyper_variables[name], checks.held_dtype())
        return getattr(optimizer, name)

    is_ours = isinstance(optimizer, _keras.OptimizerBridge)
    known = ["learning_rate", *(optimizer.numbers() if is_ours else [n for n in FLOATS if hasattr(optimizer, n)])]
    if name not in known:
        checks.refuse("hyperparameters", f"of those of this {type(optimizer).__name__}: {', '.join(known)}", name)
    return read


def names(optimizer) -> str:
    """The numbers that can be driven, as text."""
    if isinstance(optimizer, _keras.OptimizerBridge):
        found = list(optimizer.numbers())
    else:
        found = [name for name in FLOATS if isinstance(getattr(optimizer, name, None), (int, float))]
    return ", ".join(["learning_rate", *found])


def check(optimizer, name):
    """What a value of the number may be."""
    if name == "learning_rate" or not isinstance(optimizer, _keras.OptimizerBridge):
        return checks.nonnegative if name in ("learning_rate", "weight_decay") else checks.fraction
    return optimizer.numbers()[name].check
