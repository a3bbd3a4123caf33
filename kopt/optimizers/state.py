"""The state of an optimizer by name: what it is called in a file, and how a file is matched to an optimizer.

A file holds `0:iteration`, `1:learning_rate`, ... for scalars and `5:v:dense.kernel` for slot `v` of `dense/kernel`:
place, slot, path. Names decide. Where they differ, the places do, if slot, layer, variable and shape agree at each:
Keras numbers layers anew in every model it builds (`dense_4` for `dense`), and drops the prefix of a `Sequential` on
loading.
"""

import re
from collections import Counter

import numpy as np


def save(optimizer, store) -> None:
    for place, (name, variable) in enumerate(zip(names(optimizer), optimizer.variables, strict=True)):
        store[f"{place}:{name}"] = variable.numpy()


def load(optimizer, store) -> None:
    """Assign what the file holds. The slots of an optimizer that is not built wait in `optimizer.waiting`."""
    keys = list(store.keys())
    if not all(re.match(r"\d+:.", key) for key in keys):
        _refuse(optimizer, ["it was written by another kind of optimizer"])
    arrays = {key.split(":", 1)[1]: np.asarray(store[key]) for key in sorted(keys, key=lambda k: int(k.split(":")[0]))}
    scalars = {name: arrays.pop(name) for name in list(arrays) if ":" not in name}

    own = {name: v for name, v in zip(names(optimizer), optimizer.variables, strict=True) if ":" not in name}
    faults = _differences(own, scalars, but={"learning_rate"})  # a number here may be a schedule there
    if faults:
        _refuse(optimizer, faults)
    if not optimizer.built:
        optimizer.waiting.update(arrays)
    elif arrays or scalars["iteration"] != 0:  # saved before it was built, it has no slots: they start as they are
        load_slots(optimizer, arrays)
    for name in own.keys() & scalars.keys():
        own[name].assign(scalars[name])


def load_slots(optimizer, arrays: dict[str, np.ndarray]) -> None:
    own = {name: v for name, v in zip(names(optimizer), optimizer.variables, strict=True) if ":" in name}
    places = list(zip(own, arrays, strict=False))
    if own.keys() != arrays.keys() and len(own) == len(arrays) and all(_tail(a) == _tail(b) for a, b in places):
        arrays = dict(zip(own, arrays.values(), strict=True))
    faults = _differences(own, arrays)
    faults += [
        f"{name} has shape {tuple(own[name].shape)} here and {arrays[name].shape} in the file"
        for name in own
        if name in arrays and tuple(own[name].shape) != arrays[name].shape
    ]
    if faults:
        _refuse(optimizer, faults)
    for name, variable in own.items():
        variable.assign(arrays[name])


def names(optimizer) -> list[str]:
    """One name for each of the optimizer's variables, in their order: `iteration`, or `v:dense.kernel`."""
    seen: Counter[str] = Counter()
    unique = []
    for variable in optimizer.variables:
        slot, path = optimizer.named.get(id(variable), (None, None))
        name = variable.name if slot is None else f"{slot}:{path.replace('/', '.')}"
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def _tail(name: str) -> tuple[str, ...]:
    """Slot, layer and variable without the numbers that Keras gives to layers."""
    slot, path = name.split(":", 1)
    return slot, *(re.sub(r"_\d+$", "", part) for part in path.split(".")[-2:])


def _differences(own, saved, but=frozenset()) -> list[str]:
    return [f"{name} is not in the file" for name in own if name not in saved and name not in but] + [
        f"{name} is in the file only" for name in saved if name not in own and name not in but
    ]


def _refuse(optimizer, faults: list[str]):
    shown = "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")
    raise ValueError(
        f"The saved state does not fit the optimizer '{optimizer.name}' ({type(optimizer).__name__}): {shown}. "
        "Compile with the optimizer that was saved, or leave its state out: `load_model(..., compile=False)`, "
        "`load_weights(..., skip_mismatch=True)`."
    )
