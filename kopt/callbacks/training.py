"""What a running fit is made of, as a tree that a store can hold: collected, compared, put back."""

import math
import random
import re

import numpy as np

from kopt import _keras, backends
from kopt._keras import stepping
from kopt.callbacks import stock


def collect(model, callbacks, within_epoch) -> dict:
    """Everything that decides how the training goes on, but for the position in the data."""
    return {
        "weights": weights(model),
        "optimizers": [_optimizer(optimizer, model) for optimizer in _keras.optimizers_of(model)],
        "metrics": _arrays(model.metrics_variables) if within_epoch else {},
        "callbacks": states(callbacks),
        "random": random_state(),
    }


def expect(model, arrays) -> None:
    """Refuse a backup of other weights before any is read; `arrays` are names with shapes and dtypes."""
    shapes = [shape for name, (shape, _) in arrays.items() if name.startswith("weights/")]
    here = [tuple(variable.shape) for variable in _keras.variables_of(model)]
    if sum(map(math.prod, shapes)) > sum(map(math.prod, here)):
        counts = f"{sum(map(math.prod, here))} here, {sum(map(math.prod, shapes))} in the backup"
        raise ValueError(f"The backup is of another model, with more weights: {counts}.")


def restore(model, callbacks, tree) -> None:
    """Put back what `collect` found. Nothing is changed if a variable or the list of callbacks does not fit."""
    optimizers = _keras.optimizers_of(model)
    _build(optimizers, model, tree["optimizers"])
    pairs = [(_keras.variables_of(model), tree["weights"], "weights")]
    pairs += [
        (one.variables, saved["state"], "optimizer") for one, saved in zip(optimizers, tree["optimizers"], strict=False)
    ]
    pairs += [(model.metrics_variables, tree["metrics"], "metrics")] if tree["metrics"] else []
    faults = [fault for pair in pairs for fault in _differences(*pair)]
    if len(optimizers) != len(tree["optimizers"]):
        faults.append(f"{len(optimizers)} optimizers here, {len(tree['optimizers'])} in the backup")
    if faults:
        shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise ValueError(f"The backup is of another model or optimizer: {shown}.")
    mine = keyed(callbacks)
    if mine.keys() != tree["callbacks"].keys():
        raise ValueError(
            f"The callbacks with state are {_listed(mine)}, but the backup has {_listed(tree['callbacks'])}. "
            "Give `fit` the same callbacks to resume."
        )
    for variables, saved, _ in pairs:
        for variable, array in zip(variables, saved.values(), strict=True):
            variable.assign(array)
    for key, callback in mine.items():
        stock.set_state(callback, tree["callbacks"][key])
    set_random_state(tree["random"])


def weights(model) -> dict[str, np.ndarray]:
    return _arrays(_keras.variables_of(model))


def states(callbacks) -> dict:
    return {key: stock.get_state(callback) for key, callback in keyed(callbacks).items()}


def nonfinite(arrays) -> list[str]:
    """The names of the arrays that are not finite."""
    floats = {name: array for name, array in arrays.items() if "float" in array.dtype.name}
    return [name for name, array in floats.items() if not np.isfinite(array.astype("float64")).all()]


def keyed(callbacks) -> dict:
    """The callbacks with state, by class and name, and by number where these are alike."""
    found: dict = {}
    for callback in filter(stock.has_state, callbacks):
        kind, name = type(callback).__name__, getattr(callback, "name", None)
        key = f"{kind}:{name}" if name and name != kind else kind
        number = sum(other.split("#")[0] == key for other in found)
        found[f"{key}#{number + 1}" if number else key] = callback
    return found


def random_state() -> dict:
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    return {
        "python": {"version": version, "words": np.array(words, "uint64"), "gauss": gauss},
        "numpy": numpy if numpy["bit_generator"] == "MT19937" else None,
        "backend": backends.random_state(),
        "keras": [_keras.to_numpy(seed) for seed in _keras.global_seeds()],
    }


def set_random_state(state) -> None:
    python = state["python"]
    seeds = _keras.make_global_seeds() if state["keras"] else []  # draws from Python's state where there is none yet
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if state["numpy"]:
        np.random.set_state(state["numpy"])
    backends.set_random_state(state["backend"])
    for variable, value in zip(seeds, state["keras"], strict=True):
        variable.assign(value)


def _arrays(variables) -> dict[str, np.ndarray]:
    return {
        f"{place}:{_keras.path_of(variable)}": _keras.to_numpy(variable) for place, variable in enumerate(variables)
    }


def _optimizer(optimizer, model) -> dict:
    """Its state, and the places of the variables that it trains, for one that is built in the first step."""
    places = {id(variable): place for place, variable in enumerate(model.trainable_variables)}
    trained = [places.get(id(variable)) for variable in stepping.trained_by(optimizer)]
    return {"state": _arrays(optimizer.variables), "trains": np.array(trained) if None not in trained else None}


def _build(optimizers, model, saved) -> None:
    """Build the optimizers that were built when it was saved."""
    variables = model.trainable_variables
    for optimizer, there in zip(optimizers, saved, strict=False):
        places = there["trains"]
        if not optimizer.built and places is not None and len(places) and places.max() < len(variables):
            optimizer.build([variables[place] for place in places])


def _differences(variables, saved, kind) -> list[str]:
    if len(variables) != len(saved):
        return [f"{kind}: {len(variables)} variables here, {len(saved)} in the backup"]
    faults = []
    for variable, (name, array) in zip(variables, saved.items(), strict=True):
        path = _keras.path_of(variable)
        here = f"`{path}` of {tuple(variable.shape)} {_keras.dtype_of(variable)}"
        there = f"`{name.split(':', 1)[1]}` of {array.shape} {array.dtype.name}"
        if _unnumbered(here) != _unnumbered(there):
            faults.append(f"{kind}: {here} here, {there} in the backup")
    return faults


def _unnumbered(text) -> str:
    """Without the numbers that Keras gives to layers and generators, which are others in the next process."""
    return re.sub(r"_\d+(?=[/_`])", "", text)


def _listed(keys) -> str:
    return ", ".join(keys) or "none"
