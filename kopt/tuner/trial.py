"""One training of a search: the data it is judged by, the guard that goes along, and what came of it as numbers."""

import contextlib
import dataclasses
import inspect
import math

import keras
import keras_tuner
import numpy as np

from kopt import backends
from kopt.tuner.guard import Guard, limit

ROWS = 1024  # of arrays, by which the untrained model is judged
BATCHES = 8  # the same of a dataset
DEFAULT = "default_objective"  # what KerasTuner calls a number that `fit` returns, where no objective is named
OUT_OF_MEMORY = "ResourceExhausted", "RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory"


@dataclasses.dataclass
class Training:
    """What came of a training."""

    results: object  # as the user's `fit` has returned it: a History, a dict or a number
    diverged: bool
    untrained: dict  # metrics of the model before training, as in the logs
    penalties: dict  # in place of the objectives, where it diverged
    penalty: float  # the same as one number
    loss: float | None  # of the model before training


def train(fit, model, objective, explode, args, kwargs, *, before=None, horizon=None) -> Training:
    """Call `fit` with a guard among its callbacks, and judge what it returns.

    `before` is what is known of the untrained model, as `untrained` gives it, if this one has been trained already.
    """
    known = untrained(model, *args, **kwargs) if before is None else before
    loss = known.get("val_loss", known.get("loss"))
    guard = Guard(loss, explode, lambda logs: check_objective(objective, logs), horizon)
    results = fit(*args, **kwargs | {"callbacks": [*(kwargs.get("callbacks") or []), guard]})
    values = objective_values(results, objective)
    penalties = penalties_of(objective, known, guard.untrained if loss is None else loss, explode, values)
    diverged = guard.diverged or not all(map(math.isfinite, values))
    if known.get(objective.name) and objective.direction == "min" and values:
        diverged |= values[-1] > limit(known[objective.name], explode)
    return Training(results, diverged, known, penalties, float(objective.get_value(penalties)), guard.untrained)


def check_objective(objective, logs) -> None:
    """Stop the whole search if what it goes by is not there."""
    if not objective.has_value(logs) and objective.name != DEFAULT:
        have = ", ".join(sorted(logs)) or "nothing"
        hint = "; give `validation_data` or `validation_split`" if "val_" in objective.name else ""
        raise keras_tuner.errors.FatalValueError(
            f"`objective` must be one of what the training logs: {have}{hint}. Received: objective={objective.name!r}"
        )


def objective_values(results, objective) -> list[float]:
    """The objective of each epoch, or the one number that a `fit` has returned."""
    if isinstance(results, keras.callbacks.History):
        names = [name for name in names_of(objective) if name in results.history]
        epochs = [dict(zip(names, row, strict=True)) for row in zip(*map(results.history.get, names), strict=False)]
        return [float(objective.get_value(logs)) for logs in epochs if objective.has_value(logs)]
    if isinstance(results, dict):
        return [float(results[objective.name])] if objective.name in results else []
    return [float(results)] if isinstance(results, (int, float, np.floating)) else []


def names_of(objective) -> dict:
    """The metrics of an objective, which may be several, and their directions."""
    return getattr(objective, "name_to_direction", {objective.name: objective.direction})


def penalties_of(objective, known, loss, explode, values=()) -> dict:
    """Finite stand-ins for the objectives of a training that diverged: worse than untrained, but not by much.

    Where nothing is known of a metric to maximise, its lowest value in the training stands in.
    """
    found = {}
    for name, direction in names_of(objective).items():
        base = known.get(name, loss if direction == "min" else min(filter(math.isfinite, values), default=None))
        if base is None or not math.isfinite(base):
            found[name] = 1.0 if direction == "min" else 0.0
        else:
            found[name] = limit(base, explode) if direction == "min" else base
    return found


def untrained(model, *args, **kwargs) -> dict:
    """The metrics of the model as it is, on the validation data, or on some of the training data without such.

    Nothing is known where these can be read only once, or are not what `Model.fit` takes.
    """
    try:
        given = inspect.signature(keras.Model.fit).bind_partial(model, *args, **kwargs).arguments
    except TypeError:
        return {}
    held, steps, size = given.get("validation_data"), given.get("validation_steps"), given.get("batch_size")
    if hasattr(held, "__next__"):
        return {}
    if held is not None:
        prefix, size = "val_", given.get("validation_batch_size") or size
        x, y, weights = keras.utils.unpack_x_y_sample_weight(tuple(held) if isinstance(held, list) else held)
    else:
        prefix, steps, data = "", None, (given.get("x"), given.get("y"), given.get("sample_weight"))
        if given.get("class_weight"):
            return {}  # with which `evaluate` cannot weigh
        if backends.is_dataset(data[0]):
            x, y, weights = data[0].take(BATCHES), None, None
        elif are_arrays(data[0]):
            x, y, weights = keras.tree.map_structure(lambda part: None if part is None else part[:ROWS], data)
        else:
            return {}
    how = {"steps": steps} if steps else {}
    how |= {"batch_size": size} if size and are_arrays(x) else {}
    found = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True, **how)
    found = {prefix + name: float(value) for name, value in found.items() if math.isfinite(value)}
    if not prefix and given.get("validation_split"):
        found |= {f"val_{name}": value for name, value in found.items()}
    return found


def are_arrays(x) -> bool:
    """Whether it is an array, or a structure of arrays."""
    parts = keras.tree.flatten(x)
    return bool(parts) and all(hasattr(part, "shape") for part in parts)


@contextlib.contextmanager
def fatal(where: str):
    """KerasTuner is told to end the search at once where something raises, unless only this model was too large."""
    try:
        yield
    except (keras_tuner.errors.FatalError, keras_tuner.errors.FailedTrialError):
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or any(word in f"{type(error).__name__} {error}" for word in OUT_OF_MEMORY):
            raise keras_tuner.errors.FailedTrialError(f"{where} ran out of memory: {error}") from error
        raise keras_tuner.errors.FatalError(f"{where} raised {type(error).__name__}: {error}") from error
