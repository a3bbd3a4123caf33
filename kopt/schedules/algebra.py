"""Schedules made of schedules. They print as the expression that makes them: `WarmUp(epochs=2) >> CosineDecay()`."""

import keras

from kopt import _keras, checks
from kopt.schedules.base import TERMS, Schedule
from kopt.schedules.decays import Constant
from kopt.schedules.time import Length, arithmetic, at_most

PRODUCT, SEQUENCE = 2, 1


def product(first, second):
    """`first * second`, of schedules or a schedule and a number."""
    for one in (first, second):
        if isinstance(one, keras.optimizers.schedules.LearningRateSchedule):
            _schedules([one])
    return Product(*(one if isinstance(one, Schedule) else Constant(one) for one in (first, second)))


def joined(first, second):
    """`first >> second`; what is joined already is not nested."""
    return Joined([part for one in (first, second) for part in (one.parts if isinstance(one, Joined) else [one])])


def _schedules(parts) -> list:
    for part in parts:
        if not isinstance(part, Schedule):
            checks.refuse("schedule", "one of kopt's", part)
    return list(parts)


def _longest(lengths) -> Length | None:
    """What lasts as long as all of these: None if one of them has no end, or they are of different units."""
    if not lengths or None in lengths:
        return None
    if any(length.is_open for length in lengths):
        return Length()
    in_one_unit = all((length + lengths[0]) is not None for length in lengths)
    return max(lengths, key=lambda length: length.epochs or length.steps) if in_one_unit else None


class Expression(Schedule):
    """A schedule made of others."""

    def bracketed(self, part, least) -> str:
        return f"({part!r})" if part.binds < least else repr(part)

    def check_base(self, base):
        for part in self.parts:
            part.check_base(base)

    def get_config(self):
        return keras.saving.serialize_keras_object(super().get_config())

    @classmethod
    def from_config(cls, config):
        return cls(**{name: keras.saving.deserialize_keras_object(value) for name, value in config.items()})


@_keras.register
class Product(Expression):
    """`first * second`: one is a factor of the other."""

    binds = PRODUCT

    def __init__(self, first, second):
        self.first, self.second = self.parts = _schedules([first, second])
        if not (first.is_factor or second.is_factor):
            checks.refuse("schedules", "a factor and another: only one can have a value of its own", [first, second])
        self.length = _longest([part.length for part in (first, second) if type(part) is not Constant])

    is_factor = property(lambda self: self.first.is_factor and self.second.is_factor)
    stands_alone = property(lambda self: self.first.stands_alone or self.second.stands_alone)
    initial = property(lambda self: self.second.initial if self.first.is_factor else self.first.initial)

    def value(self, time, base):
        own, factor = (self.second, self.first) if self.first.is_factor else (self.first, self.second)
        return own.value(time, base) * factor.formula(time)

    def formula(self, time):
        return self.first.formula(time) * self.second.formula(time)

    def validate(self, time):
        self.first.validate(time)
        self.second.validate(time)

    def __repr__(self):
        if type(self.first) is Constant and self.first.is_factor:
            return f"{self.first.factor!r} * {self.bracketed(self.second, TERMS)}"
        return f"{self.bracketed(self.first, PRODUCT)} * {self.bracketed(self.second, TERMS)}"


@_keras.register
class Joined(Expression):
    """`first >> second >> ...`: each for its length, then the next from its beginning."""

    binds = SEQUENCE

    def __init__(self, parts):
        self.parts = _schedules(parts)
        for part in parts[:-1]:
            if part.length is None or part.length.is_open:
                allowed = "with a length, such as `.lasting(epochs=5)`, where another schedule follows"
                checks.refuse("schedule", allowed, part)
        total = parts[0].length
        for part in parts[1:]:
            total = None if None in (total, part.length) else Length() if part.length.is_open else total + part.length
        self.length = total
        values = {part.initial for part in parts if not part.is_factor}
        if len(values) > 1 and any(part.is_factor for part in parts):
            allowed = "factors of one value: they have several, so each needs its own `initial=`"
            checks.refuse("schedules", allowed, self)

    is_factor = property(lambda self: all(part.is_factor for part in self.parts))
    stands_alone = property(lambda self: self.initial is not None)
    initial = property(lambda self: next((part.initial for part in self.parts if not part.is_factor), None))

    def value(self, time, base):
        base = base if self.initial is None else self.initial
        return self._at(time, lambda part, time: part.value(time, base))

    def formula(self, time):
        return self._at(time, lambda part, time: part.formula(time))

    def _at(self, time, ask):
        values, ends = [], []
        for part in self.parts[:-1]:
            values.append(ask(part, time.within(part.length)))
            ends.append(time.is_over(part.length))
            time = time.since(part.length)
        value = ask(self.parts[-1], time)
        for end, before in zip(reversed(ends), reversed(values), strict=True):
            value = arithmetic(end).where(end, value, before)
        return value

    def validate(self, time):
        for part in self.parts[:-1]:
            time.must_hold(self, part.length)
            part.validate(time.within(part.length))
            time = time.since(part.length)
        if self.parts[-1].length is not None and self.parts[-1].length.is_open:
            time.must_go_on(self)
        self.parts[-1].validate(time)

    def __repr__(self):
        return " >> ".join(self.bracketed(part, PRODUCT) for part in self.parts)


class Changed(Expression):
    """One schedule at another time."""

    def _of(self, schedule):
        self.schedule, self.length, self.parts = schedule, schedule.length, [schedule]

    is_factor = property(lambda self: self.schedule.is_factor)
    stands_alone = property(lambda self: self.schedule.stands_alone)
    initial = property(lambda self: self.schedule.initial)

    def moved(self, time):
        raise NotImplementedError

    def value(self, time, base):
        return self.schedule.value(self.moved(time), base)

    def formula(self, time):
        return self.schedule.formula(self.moved(time))

    def validate(self, time):
        self.schedule.validate(self.moved(time))

    def __repr__(self):
        method, arguments = self.called()
        return f"{self.bracketed(self.schedule, TERMS)}.{method}({arguments})"


@_keras.register
class Repeated(Changed):
    """`schedule.repeat(times)`."""

    def __init__(self, schedule, times: int | None = None):
        self._of(schedule)
        self.times = checks.optional(checks.count(1))("times", times)
        if self.length is None or self.length.is_open:
            checks.refuse("schedule", "with a length, such as `.lasting(epochs=5)`, to be repeated", schedule)
        self.cycle = self.schedule.length
        self.length = None if times is None else self.cycle * self.times

    def moved(self, time):
        done, _ = time.cycles(self.cycle)
        if self.times is not None:  # after the last, it stays at the end
            done = at_most(done, self.times - 1)
        return time.since(self.cycle, done).until(self.cycle).within(self.cycle)

    def validate(self, time):
        self.schedule.validate(time)

    def called(self):
        return "repeat", "" if self.times is None else str(self.times)


@_keras.register
class Offset(Changed):
    """`schedule.offset(epochs=...)`."""

    def __init__(self, schedule, *, epochs: float | None = None, steps: int | None = None):
        self._of(schedule)
        self.by = Length.of(epochs, steps, needed=True)
        self.epochs, self.steps = self.by.epochs, self.by.steps

    def moved(self, time):
        return time.ahead(self.by)

    def called(self):
        return "offset", str(self.by)


@_keras.register
class Lasting(Changed):
    """`schedule.lasting(epochs=...)`."""

    def __init__(self, schedule, *, epochs: float | None = None, steps: int | None = None):
        self._of(schedule)
        self.length = Length.of(epochs, steps, needed=True)
        self.epochs, self.steps = self.length.epochs, self.length.steps

    def moved(self, time):
        return time.within(self.length)

    def called(self):
        return "lasting", str(self.length)
