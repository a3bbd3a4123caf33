"""An optimizer's state out of a file that has more of it than the optimizer has.

Keras numbers the variables of its optimizers, `optimizer/vars/0`, `1`, ..., and takes them only if there are as many as
in the file. Those of kopt's have names. `LossScaleOptimizer` and `MultiOptimizer` have a place for themselves and one
for each optimizer within them: `optimizer/inner_optimizer`, `optimizer/optimizers/adam`.
"""

import re
from collections import Counter
from functools import partial

import keras

from kopt import _keras, checks, keras_files
from kopt._keras import stepping
from kopt.optimizers import state


def load_optimizer(model, path) -> list[str]:
    """Load the state of a model's optimizer from a file in which there is more.

    Keras drops the whole state of an optimizer, with no more than a warning, if a file has variables that the optimizer
    has not: those, for instance, that something had added to it when `ModelCheckpoint` wrote the file in the middle of
    a `fit`. This takes what the optimizer knows and leaves the rest out: with Keras's optimizers, what comes after
    their own; with kopt's, what has another name. All is checked before anything is assigned.

    Only numbers are read: no config, no pickle, nothing outside the file.

    Args:
        model: The model, compiled. Its optimizer is built if it has not been.
        path: A `.keras` or `.weights.h5` file of the same model with the same kind of optimizer.

    Returns:
        The entries that were left out.

    Example:
        >>> import keras, tempfile
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> model.compile("adam")
        >>> model.optimizer.build(model.trainable_variables)
        >>> _ = model.optimizer.iterations.assign(7)
        >>> added = model.optimizer.add_variable((3,), name="added")
        >>> again = keras.models.clone_model(model)
        >>> again.compile("adam")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_weights(f"{folder}/all.weights.h5")
        ...     load_optimizer(again, f"{folder}/all.weights.h5")
        ['optimizer/vars/6']
        >>> int(again.optimizer.iterations)
        7
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        checks.refuse("model", "compiled with an optimizer", model)
    with keras_files.opened(path) as file:
        if not optimizer.built:
            if not stepping.has_all_weights(model):
                checks.refuse("model", "built: call it once, or give it an `Input`", model.name)
            with stepping.where_made(optimizer):
                optimizer.build(model.trainable_variables)
        if _keras.is_away(optimizer.iterations):
            checks.refuse("model", "`self.model` in a callback, which fetches the state from the step", model.name)
        with stepping.without_parts(optimizer):
            found = [_fitted(one, place, file, path) for one, place in _places(optimizer, "optimizer")]
        for assign, _ in found:
            assign()
    return [entry for _, left in found for entry in left]


def _places(optimizer, place):
    """The optimizer and those within it, and where each is in a file."""
    yield optimizer, place
    if hasattr(optimizer, "inner_optimizer"):
        yield from _places(optimizer.inner_optimizer, f"{place}/inner_optimizer")
    elif isinstance(optimizer, keras.optimizers.MultiOptimizer):
        seen: Counter[str] = Counter()
        for one in optimizer.optimizers:
            name = snake_case(type(one).__name__)
            number = f"_{seen[name]}" if seen[name] else ""
            seen[name] += 1
            yield from _places(one, f"{place}/optimizers/{name}{number}")


def snake_case(name: str) -> str:
    """The name of a class as Keras writes it in a file."""
    name = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _fitted(optimizer, place, file, path):
    """What assigns an optimizer's own state, all of it checked, and the entries that are left out."""
    entries = keras_files.entries(file, f"{place}/vars", path)
    if not entries:
        raise ValueError(f"There is no state of the optimizer '{optimizer.name}' at {place!r} in {str(path)!r}.")
    if isinstance(optimizer, _keras.OptimizerBridge):
        own = state.named_variables(optimizer)
        kept, faults = _by_name(optimizer, own, entries)
    else:
        own = dict(enumerate(stepping.own_variables(optimizer)))
        kept = {key: entries[key] for key in map(str, own) if key in entries}
        faults = _misfits(own, {int(key): entry for key, entry in kept.items()})
    if faults:
        raise ValueError(
            f"The optimizer's state in {str(path)!r} does not fit '{optimizer.name}' ({type(optimizer).__name__}): "
            f"{'; '.join(faults[:6])}. It must be of the same model and the same kind of optimizer."
        )
    arrays = {key: keras_files.array(entry) for key, entry in kept.items()}
    is_whole = optimizer in stepping.updating(optimizer)  # a wrapper's place holds what is within it once more
    left = [f"{place}/vars/{key}" for key in sorted(entries.keys() - kept.keys(), key=_number)] if is_whole else []
    if isinstance(optimizer, _keras.OptimizerBridge):
        return partial(optimizer.load_own_variables, arrays), left
    return partial(_assign, own.values(), list(arrays.values())), left


def _assign(variables, arrays) -> None:
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)


def _misfits(own, entries) -> list[str]:
    """What is missing or of another shape or kind, in words."""
    faults = []
    for key, variable in own.items():
        name, shape = getattr(variable, "path", key), tuple(variable.shape)
        if key not in entries:
            faults.append(f"{name} (entry {key}) has shape {shape} here and is not in the file")
        elif entries[key].shape != shape:
            faults.append(f"{name} (entry {key}) has shape {shape} here and {entries[key].shape} in the file")
        elif ("int" in _keras.dtype_of(variable)) != (entries[key].dtype.kind in "iub"):
            faults.append(f"{name} (entry {key}) is {_keras.dtype_of(variable)} here, not so in the file")
    return faults


def _by_name(optimizer, own, entries):
    """The entries that one of kopt's optimizers knows, though the layers may have other numbers, and what is wrong."""
    names = {key: key.split(":", 1)[1] for key in entries if ":" in key}
    if len(names) < len(entries):
        return {}, ["it is of another kind of optimizer"]

    def known(name):
        return name in own or (":" in name and any(":" in mine and state.is_alike(name, mine) for mine in own))

    kept = {key: entries[key] for key in sorted(names, key=_number) if known(names[key])}
    slots = {names[key]: entry for key, entry in kept.items() if ":" in names[key]}
    scalars = {names[key]: entry for key, entry in kept.items() if ":" not in names[key]}
    own_scalars = {name: variable for name, variable in own.items() if ":" not in name}
    faults = state.differences(own_scalars, scalars)
    faults += _misfits({name: v for name, v in own_scalars.items() if name in scalars}, scalars)
    return kept, faults + state.matched(optimizer, slots)[1]


def _number(key: str) -> int:
    return int(re.match(r"\d+", key)[0])
