"""A model with other weights for a while, and a model of its own with them."""

import contextlib

from kopt import _keras, backends


@contextlib.contextmanager
def holding(model, variables, values):
    """A context in which variables of a model have these values; afterwards each is as it was, to the bit.

    Nothing is added or subtracted, so that NaN, infinities and any scale come back, too, whatever is raised.
    """
    _keras.fetch_state(model)
    kept = [backends.copied(variable) for variable in variables]
    try:
        assign(variables, values)
        yield
    finally:
        _keras.fetch_state(model)  # what JAX still has of the time in between must not come later
        assign(variables, kept)


def assign(variables, values) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def arrays(variables) -> list:
    """What the variables hold, in NumPy arrays of their own."""
    return [_keras.to_numpy(variable) for variable in variables]


def copy_of(model):
    """A model like this one, with the same values in variables of its own.

    It is compiled like the model, with an optimizer that begins anew.
    """
    try:
        twin = _keras.made_from_config(model)
    except Exception as error:
        raise ValueError(
            f"A copy of this {type(model).__name__} cannot be made from its config, which Keras needs for `.keras` "
            f"files as well; use `with avg.applied():`, and save its weights there. {error}"
        ) from error
    shapes, theirs = ([tuple(v.shape) for v in one.variables] for one in (model, twin))
    if shapes != theirs:
        raise ValueError(
            f"A copy of {type(model).__name__} has other variables than the model; it must build them in `build`, or "
            "be functional. Use `with avg.applied():`, and save its weights there."
        )
    if model.compiled:
        _keras.compile_like(twin, model)
    _keras.fetch_state(model)
    assign(twin.variables, [backends.copied(variable) for variable in model.variables])
    return twin
