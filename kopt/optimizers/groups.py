"""Which variables: chosen by layer, by model, by variable, or by a regular expression over paths.

A config cannot hold a layer, and a path can lose its front when a model is loaded (Keras drops the name of a
`Sequential` from it). So a config holds the tail of a path, `dense/kernel`, and its place among those with this tail.
"""

import re

from kopt import _keras


def select(argument: str, keys: list, variables: list) -> set[int]:
    """The positions in `variables` that any of `keys` picks; a key that picks none is an error."""
    chosen = set()
    for key in keys:
        hits = _hits(key, variables)
        if not hits and not _is_frozen(key):
            paths = [_keras.path_of(v) for v in variables]
            shown = ", ".join(paths[:8]) + (f", ... ({len(paths)} in all)" if len(paths) > 8 else "")
            name = key if isinstance(key, (str, dict)) else getattr(key, "path", None) or key.name
            raise ValueError(f"`{argument}` must match a trainable variable: {shown}. Received: {argument}={name!r}")
        chosen |= hits
    return chosen


def portable(keys: list, variables: list) -> list:
    """Keys that a config can hold, and that pick the same variables when the fronts of their paths are gone."""
    tails = [_tail(v) for v in variables]
    found = []
    for key in keys:
        hits = _hits(key, variables)
        if isinstance(key, dict) or (
            isinstance(key, str) and hits == {i for i, t in enumerate(tails) if re.search(key, t)}
        ):
            found.append(key)
        elif hits:
            found += [{"path": tails[i], "place": tails[:i].count(tails[i])} for i in sorted(hits)]
        elif not isinstance(key, str):  # nothing is built, or the layer is frozen: the name must do
            found.append(rf"(^|/){re.escape(key.name if hasattr(key, 'weights') else _tail(key))}(/|$)")
        else:
            found.append(key)
    return found


def _hits(key, variables: list) -> set[int]:
    if isinstance(key, str):
        return _found(key, [_keras.path_of(v) for v in variables])
    if isinstance(key, dict):
        return set([i for i, v in enumerate(variables) if _tail(v) == key["path"]][key["place"] :][:1])
    return {i for i, v in enumerate(variables) if any(v is own for own in _weights(key))}


def _found(pattern: str, paths: list[str]) -> set[int]:
    return {i for i, path in enumerate(paths) if re.search(pattern, path)}


def _tail(variable) -> str:
    return "/".join(_keras.path_of(variable).split("/")[-2:])


def _weights(key) -> list:
    """The variables of a layer or model; a variable stands for itself."""
    return getattr(key, "weights", [key])


def _is_frozen(key) -> bool:
    return not isinstance(key, (str, dict)) and bool(_weights(key)) and not any(w.trainable for w in _weights(key))
