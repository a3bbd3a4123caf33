"""Moments that begin late: how large a step is that an optimizer takes for a new one of its own.

Adam divides its means by `1 - beta**t`, since they begin at 0; t counts all updates. Those of a variable that was
frozen have begun k updates ago, when that correction was over: a step would be too large by

    (1 - beta_1**k) / sqrt(1 - beta_2**k) * sqrt(1 - beta_2**t) / (1 - beta_1**t),

which is 3.2 at k = 1 and 6.5 at k = 10 if t is large. What is here is one over that. It is for the whole update, also
for what of it is weight decay, which a new optimizer would not hold back at its first steps.
"""

import keras
import numpy as np
from keras import ops

from kopt import _keras, backends, checks
from kopt._keras import stepping
from kopt.numerics import bias_correction
from kopt.optimizers.adagrad import Adagrad
from kopt.optimizers.adam import Adam
from kopt.optimizers.adamw import AdamW
from kopt.optimizers.rmsprop import RMSprop
from kopt.optimizers.sgd import SGD

BOTH = keras.optimizers.Adam, Adam, AdamW  # divide the mean of g and that of g² (Keras's AdamW is an Adam)
FIRST = (keras.optimizers.Adamax,)  # the mean of g only
NONE = (
    *(SGD, RMSprop, Adagrad),
    *(getattr(keras.optimizers, name) for name in ("SGD", "RMSprop", "Adagrad", "Adadelta", "Lion")),
)  # a new state is as good as any


def check(callback, optimizer, whole) -> None:
    """Refuse, for engine "trainable", what cannot do with a part of its variables."""
    asked = 'one that can train a part of its variables; `engine="multiplier"` works with all'
    if any(isinstance(one, keras.optimizers.MultiOptimizer) for one in stepping.nested(whole)):
        checks.refuse("optimizer", asked, type(whole).__name__)
    if not isinstance(optimizer, (*BOTH, *FIRST, *NONE)):
        checks.refuse("optimizer", asked, type(optimizer).__name__)
    if backends.BACKEND == "jax":  # where the step of an optimizer has the weights alone that it trains
        for part in stepping.Step.of(optimizer).parts:
            if part is not callback and part.needs_all:
                allowed = f'without {part.name} on JAX, which needs all weights; `engine="multiplier"` has them'
                checks.refuse("callbacks", allowed, part.name)


def correction(optimizer):
    """The function of k and t for an optimizer; None where nothing is to be corrected."""
    names = ("beta_1", "beta_2") if isinstance(optimizer, BOTH) else ("beta_1",)
    if isinstance(optimizer, NONE) or getattr(optimizer, "bias_correction", True) is False:
        return None

    def factor(k, t):
        first, *second = (_ratio(_beta(optimizer, name), k, t) for name in names)
        return first / second[0] ** 0.5 if second else first

    return factor


def _beta(optimizer, name):
    held = getattr(optimizer, "hyper_variables", {}).get(name, getattr(optimizer, name))
    return backends.number(held, checks.held_dtype())


def _ratio(beta, k, t):
    """How much more has been corrected at t than should be at k."""
    k, t = (ops.cast(x, checks.held_dtype()) if ops.is_tensor(x) else float(x) for x in (k, t))
    return bias_correction(beta, t) / bias_correction(beta, k)


def is_cold(optimizer, variables) -> bool:
    """Whether the optimizer's state of these variables is still all zero."""
    if isinstance(optimizer, _keras.OptimizerBridge):
        kept = [slot for variable in variables for slot in optimizer.held(variable).slots]
        return not any(np.any(np.asarray(slot) if hasattr(slot, "whole") else _keras.to_numpy(slot)) for slot in kept)
    chosen = {_mark(variable) for variable in variables}
    marks = sorted({_mark(variable) for variable in stepping.trained_by(optimizer)}, key=len, reverse=True)
    kept = stepping.own_variables(optimizer)
    owners = [next((mark for mark in marks if slot.name.startswith(mark)), None) for slot in kept]
    return not any(np.any(_keras.to_numpy(slot)) for slot, mark in zip(kept, owners, strict=True) if mark in chosen)


def _mark(variable) -> str:
    """How the names of what Keras's optimizers keep for a variable begin."""
    return _keras.path_of(variable).replace("/", "_") + "_"
