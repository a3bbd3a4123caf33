"""What a fit tells the schedules in it: seven integers in a variable, so that another fit needs no other step.

`schedules.time.CLOCK` names them. They change only when an epoch begins: within one, the optimizer's own count of
updates tells the time. Where a schedule is the optimizer's learning rate, the variable belongs to the optimizer from
then on, but no file holds it.
"""

import numpy as np

from kopt import _keras, checks
from kopt._keras import stepping
from kopt.schedules.base import Schedule
from kopt.schedules.time import CLOCK, UNKNOWN, Time

SAMPLES = 500  # the moments of a fit at which the values of a schedule are looked at before it begins


class Span:
    """How long a fit is: what Keras tells a callback, and how many batches an update has."""

    def __init__(self, params, accumulation):
        params = params or {}
        self.epochs, self.accumulation = params.get("epochs") or 0, accumulation
        self.batches = max(params.get("steps") or 0, 0)  # of an epoch; 0: the data do not say

    def time(self, epoch, done) -> Time:
        if not self.batches:
            return Time(done, epoch=epoch, lacking=UNKNOWN)
        total = self.batches * self.epochs if self.epochs else None
        return Time(done // self.accumulation, done, epoch, self.batches, total, self.accumulation, UNKNOWN)

    def check(self, schedule, base=1.0, check=checks.finite, name="schedule") -> None:
        """Refuse a schedule that this fit cannot tell enough, is too short for, or has a value beyond its range."""
        schedule.validate(self.time(0, 0))
        if self.batches:
            done = np.unique(np.linspace(0, max(self.batches * self.epochs - 1, 0), SAMPLES).astype("int64"))
            times = self.time(done // self.batches, done)
        else:
            times = self.time(np.arange(max(self.epochs, 1)), np.zeros(max(self.epochs, 1), "int64"))
        try:
            values = np.atleast_1d(schedule.value(times, base))
        except ValueError as error:
            raise ValueError(f"{schedule} cannot be followed here: {error}") from None
        for value in (values.min(), values.max()):
            check(name, float(value))


def begin(clock) -> None:
    """Before a fit: where its time begins is for its first epoch to say, or for a backup."""
    clock.assign(np.array([*_keras.to_numpy(clock)[:-1], 1], "int32"))


def turn(clock, epoch, updates, span) -> None:
    """Tell that an epoch begins, after so many updates of the optimizer in its life.

    The first epoch of a fit says where its time begins: at 0, or where `initial_epoch` has it.
    """
    origin, *_, is_fresh = _keras.to_numpy(clock).tolist()
    if is_fresh:
        origin = updates - epoch * span.batches // span.accumulation
    clock.assign(np.array([origin, epoch, updates, span.batches, span.accumulation, span.epochs, 0], "int32"))


class Rates:
    """The clocks of the schedules that are the learning rates of a model's optimizers."""

    def __init__(self, model):
        self.optimizers = []
        whole = getattr(model, "optimizer", None)
        for optimizer in stepping.nested(whole):
            schedule = stepping.rate_source(optimizer)
            if isinstance(schedule, Schedule) and schedule.stands_alone and schedule.needs_clock():
                self.optimizers.append((optimizer, schedule))
                if schedule.clock is None:
                    with stepping.where_made(optimizer):
                        schedule.clock = add(optimizer)
                stepping.keep_unfiled(whole, optimizer, schedule.clock)

    def begin(self, params) -> None:
        for optimizer, schedule in self.optimizers:
            Span(params, stepping.batches_per_count(optimizer)).check(schedule, check=checks.nonnegative)
            begin(schedule.clock)

    def turn(self, model, epoch, params) -> None:  # asked for, the model takes its state back from JAX
        for optimizer, schedule in self.optimizers:
            updates = int(_keras.to_numpy(stepping.counter(optimizer)))
            turn(schedule.clock, epoch, updates, Span(params, stepping.batches_per_count(optimizer)))


def add(optimizer):
    """A clock, in the optimizer."""
    shape, aggregation = (len(CLOCK),), "only_first_replica"
    clock = optimizer.add_variable(shape, "zeros", dtype="int32", aggregation=aggregation, name="clock")
    clock.assign(np.array([0, 0, 0, 1, 1, 1, 1], "int32"))
    return clock
