"""A table of what moves in a model, and how much."""

import keras
import numpy as np

from kopt import _keras, checks
from kopt._keras import stepping
from kopt.optimizers import groups

HEAD = "group", "multiplier", "variables", "parameters", "first variable", "batch normalization"


def describe(model, multipliers=None, print_fn=None) -> None:
    """Print which weights of a model have which multiplier, a line for each group.

    Args:
        model: The model.
        multipliers: What would be given to an optimizer as `multipliers`, to see it before. By default those that the
            optimizer has with which the model was compiled.
        print_fn: What gets each line; `print` by default.

    Example:
        >>> import keras, kopt
        >>> base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="features")], name="base")
        >>> model = keras.Sequential([base, keras.layers.Dense(1, name="head")], name="model")
        >>> model.compile(kopt.Adam(multipliers={base: 0.1}), loss="mse")
        >>> kopt.describe(model)
        group       multiplier  variables  parameters  first variable        batch normalization
        base               0.1          2          15  base/features/kernel  -
        all others           1          2           4  model/head/kernel     -
    """
    if not isinstance(model, keras.Model):
        checks.refuse("model", "a keras.Model", model)
    if not model.built:
        checks.refuse("model", "built: call it once, or give it an `Input`", model.name)
    rows = [HEAD, *(_row(model, *entry) for entry in _entries(model, multipliers))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    for row in rows:
        cells = [
            cell.rjust(w) if 1 <= i <= 3 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        (print_fn or print)("  ".join(cells).rstrip())


def _entries(model, multipliers):
    """The groups: name, multiplier and variables."""
    trained = list(model.trainable_variables)
    if multipliers is not None:
        found = groups.parsed("multipliers", multipliers)
        used = [(found, [group.number for group in found], trained)]
    else:
        optimizers = stepping.nested(getattr(model, "optimizer", None))
        with_groups = [one for one in optimizers if getattr(one, "factors", None) is not None]
        used = [(one.factors.groups, list(one.factors.numbers()), _trained_by(one, trained)) for one in with_groups]
    left = {id(variable): variable for variable in trained}
    for found, numbers, variables in used:
        owner = groups.assigned("multipliers", found, variables)
        for place, (group, number) in enumerate(zip(found, numbers, strict=True)):
            chosen = [v for v, i in zip(variables, owner, strict=True) if i == place and v.trainable]
            for variable in chosen:
                left.pop(id(variable), None)
            yield group.name, f"{number:.4g}", chosen
    if left:
        yield "all others" if used else "all", "1", list(left.values())
    frozen = _keras.frozen_in(model)
    if frozen:
        yield "not trainable", "-", frozen


def _trained_by(optimizer, trained) -> list:
    return stepping.trained_by(optimizer) if optimizer.built else trained


def _row(model, name, multiplier, variables) -> tuple:
    chosen = {id(variable) for variable in variables}
    norms = [layer for layer in _keras.layers_of(model) if isinstance(layer, keras.layers.BatchNormalization)]
    norms = [layer for layer in norms if chosen & {id(variable) for variable in layer.weights}]
    moving = sum(layer.trainable for layer in norms)
    parts = [f"{moving} with statistics that move"] * bool(moving)
    parts += [f"{len(norms) - moving} in inference"] * (len(norms) > moving)
    size = sum(int(np.prod(variable.shape)) for variable in variables)
    first = _keras.path_of(variables[0]) if variables else "-"
    return name, multiplier, str(len(variables)), f"{size:,}", first, ", ".join(parts) or "-"
