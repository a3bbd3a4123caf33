"""The base of every schedule: a formula of time that is a Keras schedule, a callback's, and a hyperparameter's."""

import inspect

import keras
import numpy as np

from kopt import backends, checks
from kopt.schedules.time import UNTOLD, Length, Time

BARS = "▁▂▃▄▅▆▇█"
TERMS = 3  # how tightly the printed forms bind: a product 2, a sequence 1


def algebra():
    """The expressions, which are schedules themselves."""
    from kopt.schedules import algebra

    return algebra


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """The base of kopt's schedules.

    A schedule is a factor, by which something is multiplied: the optimizer's own learning rate in a callback
    (`kopt.callbacks.Schedule`). With `initial=` it stands by itself and can be an optimizer's `learning_rate`.

    Schedules combine: `a * b` is their product, `0.1 * a` is scaled, `a >> b` is first `a` for its length, then `b`
    from its beginning, `a.lasting(epochs=5)` gives a length to what has none or another, `a.repeat()` begins again,
    `a.offset(epochs=5)` begins at a later point. They print as such an expression, are equal if they print alike, and
    are saved by class and numbers.

    One whose length is open, or counted in epochs, learns from any callback of kopt in `fit` how long that is.

    To write one, say in `formula` what the factor is at a `time`: of `time.units()`, epochs as a float, or
    `time.units(unit_steps=1)`, steps as a float, and keep the arguments under their own names.

    Example:
        >>> import kopt
        >>> schedule = kopt.schedules.WarmUp(steps=2) >> kopt.schedules.CosineDecay(initial=0.4, steps=4)
        >>> schedule
        WarmUp(steps=2) >> CosineDecay(steps=4, initial=0.4)
        >>> schedule.preview(7).round(3).tolist()
        [0.0, 0.2, 0.4, 0.341, 0.2, 0.059, 0.0]
    """

    initial: float | None = None
    length: Length | None = None  # None: it has no end
    clock = None  # a variable with what `fit` has told, as `time.CLOCK` lists it
    binds = TERMS

    def formula(self, time):
        """What the base is multiplied by at a `time`."""
        raise NotImplementedError(f"`{type(self).__name__}` must give a `formula`")

    def value(self, time, base):
        """The value at a `time`; a factor is one of the `base`."""
        return (base if self.initial is None else self.initial) * self.formula(time)

    def validate(self, time) -> None:
        """Refuse a fit that is too short; `time` is its first moment."""

    def check_base(self, base) -> None:
        """Refuse a base that the schedule is not for."""

    @property
    def is_factor(self) -> bool:
        return self.initial is None

    @property
    def stands_alone(self) -> bool:
        """Whether it has a value without being told a base."""
        return not self.is_factor

    def needs_clock(self) -> bool:
        """Whether it must be told by `fit` what an epoch is, or how long all is."""
        try:
            self.value(Time(0, 0), 1.0)
        except ValueError:
            return True
        return False

    def __call__(self, step):
        if self.stands_alone:
            return keras.ops.convert_to_tensor(self.value(self._time(step), None), checks.held_dtype())
        raise ValueError(
            f"`learning_rate` must be a number, not a factor of one: add `initial=` to {self}, or give it to "
            f"`fit`: `callbacks=[kopt.callbacks.Schedule('learning_rate', ...)]`. Received: learning_rate={self}"
        )

    def _time(self, step) -> Time:
        is_tensor = isinstance(step, keras.Variable) or keras.ops.is_tensor(step) or hasattr(step, "handle")
        step = backends.number(step, "int32") if is_tensor else np.asarray(step)[()]
        if self.clock is None:
            return Time(step, step, lacking=f"{self} cannot say its value: {UNTOLD}")
        return Time.told(step, backends.numbers(self.clock, "int32"))

    def preview(self, steps: int, *, steps_per_epoch: int | None = None, base: float = 1.0) -> np.ndarray:
        """The values at the steps 0, 1, ... of a fit that has so many.

        Args:
            steps: How many steps; a schedule of open length ends there.
            steps_per_epoch: How many of them an epoch has, for one that counts epochs.
            base: What a factor multiplies.
        """
        steps = checks.count(1)("steps", steps)
        batches = checks.optional(checks.count(1))("steps_per_epoch", steps_per_epoch)
        self.check_base(checks.finite("base", base))
        values = self.value(Time.of_steps(np.arange(steps), steps, batches, repr(self)), checks.finite("base", base))
        return np.broadcast_to(np.asarray(values, "float64"), steps).copy()

    def sparkline(self, steps: int, *, width: int = 60, steps_per_epoch: int | None = None, base: float = 1.0) -> str:
        """The same as a line of text, for a terminal."""
        values = self.preview(steps, steps_per_epoch=steps_per_epoch, base=base)
        low, high = values.min(), values.max()
        seen = values[np.linspace(0, steps - 1, min(checks.count(2)("width", width), steps)).round().astype(int)]
        heights = (seen - low) / ((high - low) or 1) * (len(BARS) - 1)
        return "".join(BARS[round(height)] for height in heights) + f"  {low:.3g} to {high:.3g}"

    def __mul__(self, other):
        return algebra().product(self, other)

    def __rmul__(self, other):
        return algebra().product(other, self)

    def __rshift__(self, other):
        return algebra().joined(self, other)

    def repeat(self, times: int | None = None):
        """Again whenever its length is over: so many times, then it stays at its end; None: always."""
        return algebra().Repeated(self, times)

    def offset(self, *, epochs: float | None = None, steps: int | None = None):
        """As if so many epochs or steps had been done before."""
        return algebra().Offset(self, epochs=epochs, steps=steps)

    def lasting(self, *, epochs: float | None = None, steps: int | None = None):
        """With this length, so that another can follow by `>>`; one of open length ends there."""
        return algebra().Lasting(self, epochs=epochs, steps=steps)

    def get_config(self) -> dict:
        return {name: getattr(self, name) for name in self._defaults()}

    @classmethod
    def _defaults(cls) -> dict:
        """The arguments of the constructor with their defaults."""
        if cls.__init__ is object.__init__:
            return {}
        return {name: p.default for name, p in list(inspect.signature(cls.__init__).parameters.items())[1:]}

    def __getstate__(self):
        return vars(self) | {"clock": None}  # which belongs to an optimizer

    def __repr__(self):
        shown = {name: value for name, value in self.get_config().items() if value != self._defaults()[name]}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def __eq__(self, other):
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash(repr(self))
