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
    penalties = penalties_of(objective, known, guard.untrained if loss is None else loss, explode)
    values = objective_values(results, objective)
    diverged = guard.diverged or not all(map(math.isfinite, values))
    if objective.name in known and objective.direction == "min" and values:
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
        epochs = [dict(zip(results.history, row, strict=True)) for row in zip(*results.history.values(), strict=True)]
        return [float(objective.get_value(logs)) for logs in epochs if objective.has_value(logs)]
    if isinstance(results, dict):
        return [float(results[objective.name])] if objective.name in results else []
    return [float(results)] if isinstance(results, (int, float, np.floating)) else []


def penalties_of(objective, known, loss, explode) -> dict:
    """Finite stand-ins for the objectives of a training that diverged: worse than untrained, but not by much."""
    names, found = getattr(objective, "name_to_direction", {objective.name: objective.direction}), {}
    for name, direction in names.items():
        base = known.get(name, loss if direction == "min" else None)
        if base is None or not math.isfinite(base):
            found[name] = 1.0 if direction == "min" else 0.0
        else:
            found[name] = limit(base, explode) if direction == "min" else base
    return found


def untrained(model, *args, **kwargs) -> dict:
    """The metrics of the model as it is, on the validation data, or on some of the training data without such."""
    given = inspect.signature(keras.Model.fit).bind_partial(model, *args, **kwargs).arguments
    x, y, held = given.get("x"), given.get("y"), given.get("validation_data")
    size = {"batch_size": given["batch_size"]} if given.get("batch_size") else {}
    if hasattr(held, "__next__"):  # a generator, which can be read once
        return {}
    if held is not None:
        data, prefix = held, "val_"
        size |= {"steps": given["validation_steps"]} if given.get("validation_steps") else {}
    else:
        data, prefix = (x, y) if y is not None else x, ""
    if backends.is_dataset(data):
        data, size = data.take(BATCHES), {}
    elif isinstance(data, (tuple, list)) and len(data) <= 3:
        data = keras.tree.map_structure(lambda part: None if part is None else part[:ROWS], tuple(data))
    elif held is None and not hasattr(data, "shape"):  # a generator or a PyDataset, which may not be read twice
        return {}
    else:
        size = {} if not hasattr(data, "shape") else size
    inputs = keras.utils.unpack_x_y_sample_weight(data) if isinstance(data, tuple) else (data, None, None)
    x, y, weights = (*inputs, None, None)[:3]
    found = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True, **size)
    found = {prefix + name: float(value) for name, value in found.items() if math.isfinite(value)}
    if not prefix and given.get("validation_split"):
        found |= {f"val_{name}": value for name, value in found.items()}
    return found


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
