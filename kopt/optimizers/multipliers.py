"""Multipliers around an optimizer of Keras."""

from functools import partial

import keras

from kopt import _keras, backends, checks
from kopt._keras import stepping
from kopt._keras.wrapper import Wrapper
from kopt.optimizers import factors, groups
from kopt.optimizers.base import Optimizer

_OWN_THE_WEIGHTS = "ScheduleFreeAdamW", "ScheduleFreeSGD", "Lookahead"


@_keras.register
class Multipliers(Wrapper):
    """One of Keras's optimizers, of whose updates some variables take more or less than all.

    After each update a weight in a group is `old + multiplier * (new - old)`. With 0 it stays as it is, to the bit,
    whatever momentum or weight decay there is; with 1 it is as without the multiplier, to the bit. The optimizer's
    clipping, learning rate and count of updates stay those of all variables together, and its moments go on as if
    nothing were held back: a weight that is let go later moves on as one that was never held.

    kopt's optimizers need no wrapper: they take the argument `multipliers`.

    When to use it: to train a network that was trained before, whose lower layers shall move less than a new head.
    A multiplier of 0 costs as much time as any other; `keras.Layer.trainable` saves it where a layer stays as it is for
    good. The statistics of batch normalization are no weights of the optimizer and go on moving:
    `kopt.callbacks.StagedUnfreeze` holds them, too.

    Args:
        inner_optimizer: The optimizer, or its name. Not one that keeps weights of its own beside the model's, as
            `ScheduleFreeAdamW` does, nor one with `use_ema`: average with `kopt.callbacks.PolyakAveraging`.
        multipliers: A dict of layers, models or regular expressions, which `re.search` looks for in a variable's path,
            with a number of 0 or more for each. The first that picks a variable counts, one that picks none is an
            error, and what none picks takes all of its updates. `optimizer.multipliers["base"] = 0.1` takes effect at
            the next step, compiled or not.
        name: Name of the optimizer.

    Example:
        >>> import keras, kopt
        >>> base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)], name="base")
        >>> model = keras.Sequential([base, keras.layers.Dense(1)])
        >>> optimizer = kopt.Multipliers(keras.optimizers.Adam(0.01), {base: 0.0})
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(keras.ops.ones((8, 4)), keras.ops.ones((8, 1)), verbose=0)
        >>> optimizer.multipliers
        {'base': 0.0}
        >>> optimizer.multipliers["base"] = 0.1

    Differs from `keras.optimizers.MultiOptimizer`, which gives each group of variables an optimizer of its own, with
    its own rate, clipping and count.
    """

    def __init__(self, inner_optimizer, multipliers, name=None):
        inner = keras.optimizers.get(inner_optimizer)
        self._check(inner)
        found = groups.parsed("multipliers", multipliers)
        if not found:
            checks.refuse("multipliers", "a dict with at least one entry", multipliers)
        super().__init__(inner, name)
        self.__dict__["factors"] = factors.Factors(self, found)
        self.__dict__["group_of"] = {}  # id of a variable -> the position of its group

    @staticmethod
    def _check(inner) -> None:
        kind = type(inner).__name__
        if isinstance(inner, Optimizer):
            checks.refuse("inner_optimizer", f"one of Keras's; kopt's take `multipliers=` (kopt.{kind})", kind)
        if isinstance(inner, _keras.OptimizerBridge):
            checks.refuse("inner_optimizer", "one that updates each weight by itself", kind)
        if stepping.within(inner):
            checks.refuse("inner_optimizer", f"one that updates variables itself; put Multipliers into {kind}", kind)
        if owns_weights(inner):
            checks.refuse("inner_optimizer", "one that keeps no weights of its own beside the model's", kind)
        if inner.use_ema:
            allowed = "one without `use_ema`, whose average would be of other weights; use PolyakAveraging"
            checks.refuse("inner_optimizer", allowed, kind)

    @property
    def multipliers(self):
        """The multipliers by the names of their groups; assign to one, and the next step uses it."""
        return self.factors

    @multipliers.setter
    def multipliers(self, value):
        if value is not self.factors:
            self.factors.assign(value)

    def build(self, variables):
        """Create the state of the optimizer within, unless it is there, and find the variables of the groups."""
        if self.built:
            return
        variables = list(variables)
        owner = self.factors.owner(variables)
        super().build(variables)
        self.group_of.update({id(v): i for v, i in zip(variables, owner, strict=True) if i is not None})

    @backends.as_written
    def apply(self, grads, trainable_variables=None):
        """Do one step of the optimizer within, of which each variable takes its share."""
        if not self.built:
            if trainable_variables is None:
                checks.refuse("trainable_variables", "given at the first step, if `build` was not called", None)
            with backends.eagerly():
                self.build(trainable_variables)
        variables = self.trained if trainable_variables is None else list(trainable_variables)
        blending = partial(factors.blending_around, self.inner_optimizer, lambda: self._taken(variables))
        stepping.apply_in(blending, self.inner_optimizer, grads, trainable_variables)

    def _taken(self, variables):
        shares = backends.numbers(self.factors.variable, checks.held_dtype())
        places = [(variable, self.group_of.get(id(variable))) for variable in variables]
        return [(variable, shares[place]) for variable, place in places if place is not None]

    def get_config(self):
        return super().get_config() | {"multipliers": self.factors.config()}


def owns_weights(optimizer) -> bool:
    """Whether an optimizer keeps weights of its own, from which it makes those of the model at each step."""
    return any(base.__name__ in _OWN_THE_WEIGHTS for base in type(optimizer).__mro__)
