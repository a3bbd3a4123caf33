"""A model with other weights for a while, and a model of its own with them."""

import contextlib
import hashlib
import warnings

import numpy as np

from kopt import _keras, backends


@contextlib.contextmanager
def keeping(model, variables):
    """A context after which variables of a model are as they were, to the bit; it gives what that is.

    Nothing is added or subtracted, so that NaN, infinities and any scale come back, too, whatever is raised.
    """
    _keras.fetch_state(model)
    kept = [backends.copied(variable) for variable in variables]
    try:
        yield kept
    finally:
        _keras.fetch_state(model)  # what JAX still has of the time in between must not come later
        assign(variables, kept)


def assign(variables, values) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def arrays(variables) -> list:
    """What the variables hold, in NumPy arrays of their own."""
    return [_keras.to_numpy(variable) for variable in variables]


def digest(arrays) -> str:
    """What tells these arrays from any others, NaN and all."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def copy_of(model, compiled=True):
    """A model like this one, with the same values in variables of its own.

    It is compiled like the model, with an optimizer that begins anew, unless `compiled` is False.
    """
    try:
        twin = _keras.made_from_config(model)
    except Exception as error:
        raise ValueError(
            f"A copy of this {type(model).__name__} cannot be made from its config, which Keras needs for `.keras` "
            f"files as well: give it `get_config`, or put the weights into the model itself. {error}"
        ) from error
    pairs = list(zip(_keras.layers_of(model), _keras.layers_of(twin), strict=False))
    shapes, theirs = ([tuple(v.shape) for v in one.variables] for one in (model, twin))
    if shapes != theirs or any(type(layer) is not type(other) for layer, other in pairs):
        raise ValueError(
            f"A copy of {type(model).__name__} has other variables than the model: it must build them in `build`, or "
            "be functional. Or put the weights into the model itself."
        )
    _keras.fetch_state(model)
    for layer, other in pairs:
        other.trainable = layer.trainable
        _keras.hand_over(layer, other)
    assign(twin.variables, [backends.copied(variable) for variable in model.variables])  # seeds, too
    if compiled and model.compiled:
        try:
            _keras.compile_like(twin, model)
        except Exception as error:
            warnings.warn(f"The copy is not compiled: no config can make its metrics. {error}", stacklevel=3)
    return twin
