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

WRAPPER = 4  # scalars that a LossScaleOptimizer puts before the variables of the optimizer that it wraps


def save(optimizer, store) -> None:
    arrays = {name: _keras.to_numpy(v) for name, v in _own(optimizer).items()}
    if not optimizer.built:  # what was loaded and is not used yet is saved again
        arrays |= {name: array for name, array in optimizer.waiting.items() if _untouched(optimizer, name)}
    for place, (name, array) in enumerate(arrays.items()):
        store[f"{place}:{name}"] = array


def load(optimizer, store) -> None:
    """Assign what the file holds; an optimizer that is not built keeps it in `waiting` until it is."""
    arrays = _read(optimizer, store)
    scalars = {name: array for name, array in arrays.items() if ":" not in name}
    faults = _differences({name for name in _own(optimizer) if ":" not in name}, scalars)
    if not faults and optimizer.built:
        arrays, faults = _matched(optimizer, arrays)
    if faults:
        raise ValueError(
            f"The saved state does not fit {_title(optimizer)}: {_list(faults)}. Compile with the optimizer that was "
            "saved, or leave its state out: `load_model(..., compile=False)`, `load_weights(..., skip_mismatch=True)`."
        )
    if optimizer.built:
        for name, variable in _own(optimizer).items():
            if name in arrays:
                variable.assign(arrays[name])
    else:
        before = {name: _keras.to_numpy(v) for name, v in _own(optimizer).items()}
        optimizer.__dict__.update(waiting=arrays, before=before)


def settle(optimizer) -> None:
    """At build: take what waits, but for scalars that were assigned since. What does not fit is named and let go."""
    arrays, faults = _matched(optimizer, optimizer.waiting)
    if faults:
        warnings.warn(
            f"The state that was loaded does not fit {_title(optimizer)}: {_list(faults)}. Training starts with fresh "
            "state.",
            stacklevel=2,
        )
    else:
        for name, variable in _own(optimizer).items():
            if name in arrays and _untouched(optimizer, name):
                variable.assign(arrays[name])
    optimizer.waiting.clear()


def _own(optimizer) -> dict:
    """The optimizer's variables by name, in their order: `iteration`, `v:dense.kernel`, `v:dense.kernel#2`."""
    seen: Counter[str] = Counter()
    own = {}
    for variable in optimizer.variables:
        slot, path = optimizer.named.get(id(variable), (None, None))
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
    own, inner = _own(optimizer), list(arrays.values())[WRAPPER:]
    if len(own) == len(inner) and all(tuple(v.shape) == a.shape for v, a in zip(own.values(), inner, strict=True)):
        return dict(zip(own, inner, strict=True))  # saved under mixed_float16, loaded without it: Keras unwraps
    raise ValueError(
        f"The saved state does not fit {_title(optimizer)}: it was written by another kind of optimizer. Leave it out: "
        "`load_model(..., compile=False)`, `load_weights(..., skip_mismatch=True)`."
    )


def _matched(optimizer, arrays: dict) -> tuple[dict, list[str]]:
    """The arrays under the optimizer's own names, and what does not fit."""
    own = _own(optimizer)
    slots, saved = ([name for name in names if ":" in name] for names in (own, arrays))
    if not saved and arrays.get("iteration", 1) == 0:
        return arrays, []  # saved before it was built: the slots start as they are
    same = len(slots) == len(saved) and all(map(_alike, slots, saved))
    if set(slots) != set(saved) and same:
        renamed = dict(zip(saved, slots, strict=True))
        arrays = {renamed.get(name, name): array for name, array in arrays.items()}
    faults = _differences(own, arrays)
    faults += [
        f"{name} has shape {tuple(own[name].shape)} here and {arrays[name].shape} in the file"
        for name in own
        if name in arrays and tuple(own[name].shape) != arrays[name].shape
    ]
    return arrays, faults


def _alike(one: str, other: str) -> bool:
    return _tail(one) == _tail(other)


def _tail(name: str) -> tuple[str, ...]:
    """Slot, layer and variable without the numbers that Keras gives to layers, and those of repeated names."""
    slot, path = name.split("#")[0].split(":", 1)
    return slot, *(re.sub(r"_\d+$", "", part) for part in path.split(".")[-2:])


def _differences(own, saved) -> list[str]:
    rate = {"learning_rate"}  # a number here may be a schedule there
    return [f"{name} is not in the file" for name in own if name not in saved and name not in rate] + [
        f"{name} is in the file only" for name in saved if name not in own and name not in rate
    ]


def _untouched(optimizer, name: str) -> bool:
    """Whether a variable holds what it held when the file was loaded."""
    own = _own(optimizer)
    return name not in own or name not in optimizer.before or np.array_equal(
        _keras.to_numpy(own[name]), optimizer.before[name]
    )  # fmt: skip


def _title(optimizer) -> str:
    return f"the optimizer '{optimizer.name}' ({type(optimizer).__name__})"


def _list(faults: list[str]) -> str:
    return "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")
