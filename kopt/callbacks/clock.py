"""What a fit tells the schedules in it: integers in a variable, so that another fit needs no other step.

`schedules.time.CLOCK` names them. They change only when an epoch begins: within one, the optimizer's own count of
updates tells the time. Where a schedule is the optimizer's learning rate, the variable belongs to the optimizer from
then on, but no file holds it.
"""

import numpy as np

from kopt import _keras, checks
from kopt._keras import stepping
from kopt.schedules.base import Schedule
from kopt.schedules.time import CLOCK, END, UNKNOWN, Time

SAMPLES = 500  # the moments of a fit at which the values of a schedule are looked at before it begins


class Span:
    """How long a fit is: what Keras tells a callback, and how many batches an update has."""

    def __init__(self, params, accumulation):
        params = params or {}
        self.epochs, self.accumulation = params.get("epochs") or 0, accumulation
        self.batches = max(params.get("steps") or 0, 0)  # of an epoch; 0: the data do not say
        self.total = min(self.batches * self.epochs, END)

    def time(self, epoch, done, steps=None) -> Time:
        """The moment after so many epochs and batches, in numbers; without a count of batches, after so many steps."""
        if not self.batches:
            return Time(steps, epoch=epoch, lacking=UNKNOWN)
        total = self.total if self.epochs else None
        return Time(done // self.accumulation, done, epoch, self.batches, total, self.accumulation, UNKNOWN)

    def check(self, schedules, value, check, name) -> None:
        """Refuse schedules that this fit tells too little, or is too short for, and a `value(time)` out of range."""
        for schedule in schedules:
            schedule.validate(self.time(0, 0, 0))
        if self.batches:
            done = np.unique(np.linspace(0, max(self.total - 1, 0), SAMPLES).astype("int64"))
            times = self.time(done // self.batches, done)
        else:
            epochs = np.arange(min(max(self.epochs, 1), SAMPLES))
            times = self.time(epochs, None, 0 * epochs)
        try:
            values = np.atleast_1d(value(times))
        except ValueError as error:
            listed = ", ".join(map(repr, schedules))
            raise ValueError(f"{listed} cannot be followed here: {error}") from None
        for extreme in (values.min(), values.max()):
            check(name, float(extreme))

    def check_start(self, value, epoch) -> None:
        """Refuse to begin at a later epoch where nobody can say how many steps there were before."""
        if epoch and not self.batches:
            try:
                value(self.time(epoch, None))
            except ValueError:
                why = "0 for schedules that count steps, where the data do not say how many batches an epoch has"
                checks.refuse("initial_epoch", why, epoch)


class Clock:
    """The clock of one optimizer, and who reads it."""

    def __init__(self, variable, value):
        self.variable, self.value = variable, value  # `value(time)` is what is read from it, for refusals

    def begin(self) -> None:
        """Before a fit: where its time begins is for its first epoch to say, or for a backup."""
        self.variable.assign(np.array([*_keras.to_numpy(self.variable)[:-1], 1], "int32"))

    def turn(self, epoch, updates, span) -> None:
        """Tell that an epoch begins, after so many updates of the optimizer in its life.

        The first epoch of a fit says where its time begins: at 0, or where `initial_epoch` has it.
        """
        origin, *_, is_fresh = _keras.to_numpy(self.variable).tolist()
        if is_fresh:
            span.check_start(self.value, epoch)
            origin = updates - epoch * span.batches // span.accumulation
        begun = min(epoch * span.batches, END - span.batches)
        told = [origin, epoch, updates, begun, span.batches, span.accumulation, span.total, 0]
        self.variable.assign(np.array(told, "int32"))

    def end(self, updates) -> None:
        """After a fit: time goes on with the updates, where another fit tells nothing."""
        origin, epoch, _, begun, batches, *rest, _ = _keras.to_numpy(self.variable).tolist()
        begun = min(begun + batches, END - batches)
        self.variable.assign(np.array([origin, epoch + 1, updates, begun, batches, *rest, 1], "int32"))


def add(optimizer):
    """The variable of a clock, in the optimizer."""
    shape, aggregation = (len(CLOCK),), "only_first_replica"
    variable = optimizer.add_variable(shape, "zeros", dtype="int32", aggregation=aggregation, name="clock")
    variable.assign(np.array([0, 0, 0, 0, 1, 1, 1, 1], "int32"))
    return variable


class Rates:
    """The clocks of the schedules that are the learning rates of a model's optimizers."""

    def __init__(self, model):
        self.found = []
        whole = getattr(model, "optimizer", None)
        stepping.build_if_several(whole, model)
        for optimizer in stepping.nested(whole):
            schedule = stepping.rate_source(optimizer)
            if isinstance(schedule, Schedule) and schedule.stands_alone and schedule.needs_clock():
                if schedule.clock is None:
                    with stepping.where_made(optimizer):
                        schedule.clock = add(optimizer)
                stepping.keep_unfiled(whole, optimizer, schedule.clock)
                value = lambda time, schedule=schedule: schedule.value(time, None)  # noqa: E731
                self.found.append((optimizer, schedule, Clock(schedule.clock, value)))

    def __len__(self):
        return len(self.found)

    def begin(self, params) -> None:
        for optimizer, schedule, clock in self.found:
            span = Span(params, stepping.batches_per_count(optimizer))
            span.check([schedule], clock.value, checks.nonnegative, "learning_rate")
            clock.begin()

    def turn(self, model, epoch, params) -> None:  # asked for, the model takes its state back from JAX
        for optimizer, _, clock in self.found:
            updates = int(_keras.to_numpy(stepping.counter(optimizer)))
            clock.turn(epoch, updates, Span(params, stepping.batches_per_count(optimizer)))

    def end(self, model) -> None:
        for optimizer, _, clock in self.found:
            clock.end(int(_keras.to_numpy(stepping.counter(optimizer))))
