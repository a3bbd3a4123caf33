"""The state of an optimizer by name: what it is called in a file, and how a file is matched to an optimizer.

A file holds `0:iteration`, `1:learning_rate`, ... for scalars and `5:v:dense.kernel` for slot `v` of `dense/kernel`:
place, slot, path. Names decide. Where they differ, the places do, if slot, layer, variable and shape agree at each:
Keras numbers layers anew in every model it builds (`dense_4` for `dense`), and drops the prefix of a `Sequential` on
loading.
"""

import re
import warnings
from collections import Counter

import numpy as np

from kopt import _keras
from kopt.optimizers.factors import VARIABLE
from kopt.optimizers.rule import MASTER

WINDOW = ("reading:", "gradient_sum:")  # what starts at zero where a file has none
WRAPPERS = (4, 2)  # scalars that a LossScaleOptimizer puts before those of the optimizer in it, built and not built


def save(optimizer, store) -> None:
    arrays = {name: _keras.to_numpy(v) for name, v in named_variables(optimizer).items()} | optimizer.waiting
    for place, (name, array) in enumerate(arrays.items()):
        store[f"{place}:{name}"] = array


def load(optimizer, store) -> None:
    """Assign what the file holds; the slots wait in `waiting` while the optimizer is not built."""
    if not store.keys():
        return  # Keras asks for a part that the file does not have, and has said so
    arrays = _read(optimizer, store)
    slots = {name: arrays.pop(name) for name in list(arrays) if ":" in name}
    scalars = {name: v for name, v in named_variables(optimizer).items() if ":" not in name}
    if VARIABLE in arrays and VARIABLE in scalars and arrays[VARIABLE].shape != tuple(scalars[VARIABLE].shape):
        del arrays[VARIABLE]  # of other groups: those of the constructor are meant
    fresh = not slots and arrays.get("iteration", 1) == 0  # saved before it was built
    faults = differences(scalars, arrays)
    if optimizer.built and not fresh and not faults:
        slots, faults = matched(optimizer, slots)
    if faults:
        raise ValueError(
            f"The saved state does not fit {_title(optimizer)}: {_list(faults)}. Compile with the optimizer that was "
            "saved, or leave its state out: `load_model(..., compile=False)`, `load_weights(..., skip_mismatch=True)`."
        )
    before = {name: _keras.to_numpy(v) for name, v in scalars.items()}
    for name, variable in scalars.items():
        if name in arrays:
            variable.assign(arrays[name])
    if not optimizer.built:
        optimizer.__dict__.update(waiting=slots, before=before, loaded={} if fresh else arrays)
        return
    initial = {slot.name: slot.initial for slot in optimizer.slots_in_use}
    for name, variable in named_variables(optimizer).items():
        if name in slots:
            variable.assign(slots[name])
        elif (fresh and ":" in name) or name.startswith(WINDOW):
            variable.assign(np.full(variable.shape, initial.get(name.split(":")[0], 0.0)))


def settle(optimizer) -> None:
    """At build: take the slots that wait. What does not fit is named and let go, with the scalars that came with it."""
    slots, faults = matched(optimizer, optimizer.waiting)
    own = named_variables(optimizer)
    if not faults:
        for name, array in slots.items():
            if name in own:
                own[name].assign(array)
        optimizer.waiting.clear()
        optimizer.loaded.clear()
        return
    for name, array in optimizer.loaded.items():
        if name in own and np.array_equal(_keras.to_numpy(own[name]), array):  # not assigned since
            own[name].assign(optimizer.before[name])
    optimizer.waiting.clear()
    optimizer.loaded.clear()
    warnings.warn(
        f"The state that was loaded does not fit {_title(optimizer)}: {_list(faults)}. Training starts afresh.",
        stacklevel=2,
    )


def named_variables(optimizer) -> dict:
    """The optimizer's variables by name, in their order: `iteration`, `v:dense.kernel`, `v:dense.kernel#2`."""
    seen: Counter[str] = Counter()
    own = {}
    for variable in optimizer.parts:
        slot, path = optimizer.named.get(id(variable), (None, None))
        if (slot, path) == ("reading", "nonfinite_waiting"):  # an error of this run, not of the next
            continue
        name = variable.name if slot is None else f"{slot}:{path.replace('/', '.')}"
        seen[name] += 1
        own[name if seen[name] == 1 else f"{name}#{seen[name]}"] = variable
    return own


def _read(optimizer, store) -> dict[str, np.ndarray]:
    """A file's arrays by name, in their places."""
    keys = sorted(store.keys(), key=lambda key: int(re.match(r"\d*", key)[0] or 0))
    arrays = {key: np.asarray(store[key]) for key in keys}
    if all(re.match(r"\d+:.", key) for key in keys):
        return {key.split(":", 1)[1]: array for key, array in arrays.items()}
    own = named_variables(optimizer)
    for wrapper in WRAPPERS:  # saved under mixed_float16, loaded without it: Keras unwraps
        inner = list(arrays.values())[wrapper:]
        variables = optimizer.variables
        if wrapper == WRAPPERS[1]:
            variables = [own[name] for name in own if ":" not in name]
        if len(variables) != len(inner) or inner[0].dtype.kind != "i":  # the first is the iteration
            continue
        if all(tuple(v.shape) == array.shape for v, array in zip(variables, inner, strict=True)):
            held = {id(variable): array for variable, array in zip(variables, inner, strict=True)}
            return {name: _part(v, held) for name, v in own.items() if id(getattr(v, "whole", v)) in held}
    raise ValueError(
        f"The saved state does not fit {_title(optimizer)}: it was written by another kind of optimizer (or by a "
        "LossScaleOptimizer around one that was built, as this one must be first). Leave it out: "
        "`load_model(..., compile=False)`, `load_weights(..., skip_mismatch=True)`."
    )


def _part(variable, held) -> np.ndarray:
    """The array of a variable, or of a piece of a slab, among those held by the id of the variable."""
    return variable.cut(held[id(variable.whole)]) if hasattr(variable, "whole") else held[id(variable)]


def matched(optimizer, arrays: dict) -> tuple[dict, list[str]]:
    """The saved slots under the optimizer's own names, and what does not fit."""
    own = {name: v for name, v in named_variables(optimizer).items() if ":" in name}
    readings = {name: array for name, array in arrays.items() if name.startswith("reading:")}
    slots = {name: array for name, array in arrays.items() if name not in readings}
    mine = [name for name in own if not name.startswith("reading:")]
    if set(mine) != slots.keys() and len(mine) == len(slots) and all(map(is_alike, mine, slots)):
        slots = dict(zip(mine, slots.values(), strict=True))
    if any(name.startswith("gradient_sum:") and name not in slots for name in own):  # a window without its sums
        readings.pop("reading:micro_step", None)
        readings.pop("reading:met", None)
    arrays = slots | readings
    faults = differences(own, arrays)
    faults += [
        f"{name} has shape {tuple(own[name].shape)} here and {arrays[name].shape} in the file"
        for name in own
        if name in arrays and tuple(own[name].shape) != arrays[name].shape
    ]
    return arrays, faults


def is_alike(one: str, other: str) -> bool:
    return _tail(one) == _tail(other)


def _tail(name: str) -> tuple[str, ...]:
    """Slot, layer and variable without the numbers that Keras gives to layers, and those of repeated names."""
    slot, path = name.split("#")[0].split(":", 1)
    return slot, *(re.sub(r"_\d+$", "", part) for part in path.split(".")[-2:])


def differences(own, saved) -> list[str]:
    return [f"{name} is not in the file" for name in own if name not in saved and not _may_differ(name)] + [
        f"{name} is in the file only" for name in saved if name not in own and not _may_differ(name)
    ]


def _may_differ(name: str) -> bool:
    """The rate may be a schedule on one side, and the multipliers others; a master follows from the weight where the
    file has none; readings and sums start at zero."""
    return name in ("learning_rate", VARIABLE) or name.startswith((f"{MASTER.name}:", *WINDOW))


def _title(optimizer) -> str:
    return f"the optimizer '{optimizer.name}' ({type(optimizer).__name__})"


def _list(faults: list[str]) -> str:
    return "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")
