"""Which variables: chosen by layer, by model, by variable, or by a regular expression over paths.

A config cannot hold a layer. It holds, for each variable of the layer, the tail of its path and where the variable
stood among those of the optimizer: Keras may number layers anew when a model is loaded, and drops the name of a
`Sequential` from the front of a path. What cannot be told apart for sure is refused.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kopt import _keras, checks


@dataclass(frozen=True)
class Group:
    """Variables that have a number in common: what it is called, what picks them, and the number."""

    name: str
    keys: list
    number: float


def parsed(argument: str, value) -> list[Group]:
    """The groups of a dict or list of pairs, of a layer, model, variable, pattern or list of these, and a number."""
    allowed = "a dict of layers, models or regular expressions, with a number of 0 or more for each"
    if isinstance(value, Mapping):
        value = list(value.items())
    if not isinstance(value, (list, tuple)):
        checks.refuse(argument, allowed, value)
    found, seen = [], Counter()
    for entry in value:
        if isinstance(entry, Mapping) and entry.keys() == {"name", "keys", "number"}:  # as a config holds it
            entry = entry["name"], entry["keys"], entry["number"]
        elif isinstance(entry, (list, tuple)) and len(entry) == 2:
            entry = None, *entry
        else:
            checks.refuse(argument, allowed, value)
        name, keys, number = entry
        keys = [] if isinstance(keys, list) and not keys else checks.keys(argument, keys)
        name = name or _joined([name_of(key) for key in keys])
        number = checks.nonnegative(f"{argument}[{name!r}]", number)
        seen[name] += 1
        found.append(Group(name if seen[name] == 1 else f"{name}#{seen[name]}", keys, number))
    return found


def _joined(names: list[str]) -> str:
    """The names of a group's keys; of many, the first and the last."""
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, ..., {names[-1]}"


def name_of(key) -> str:
    """What a layer, a model, a variable or a pattern is called."""
    if isinstance(key, str):
        return key
    return key["path"] if isinstance(key, dict) else getattr(key, "name", None) or _keras.path_of(key)


def assigned(argument: str, found: list[Group], variables: list) -> list[int | None]:
    """For each variable the first group that picks it; one that picks none, or only what others have, is an error."""
    owner: list[int | None] = [None] * len(variables)
    for number, group in enumerate(found):
        hits = select(argument, group.keys, variables)
        left = [i for i in hits if owner[i] is None]
        if hits and not left:
            first = found[min(owner[i] for i in hits)].name
            allowed = f"such that each key picks a variable that none before it does; {first!r} has all of this one's"
            checks.refuse(argument, allowed, group.name)
        for i in left:
            owner[i] = number
    return owner


def select(argument: str, keys: list, variables: list) -> set[int]:
    """The positions in `variables` that any of `keys` picks; a pattern or an object that picks none is an error."""
    chosen = set()
    for key in keys:
        hits = _hits(argument, key, variables)
        if not hits and not isinstance(key, dict) and not _is_frozen(key):
            paths = [_keras.path_of(v) for v in variables]
            shown = ", ".join(paths[:8]) + (f", ... ({len(paths)} in all)" if len(paths) > 8 else "")
            name = key if isinstance(key, str) else getattr(key, "path", None) or key.name
            raise ValueError(f"`{argument}` must match a trainable variable: {shown}. Received: {argument}={name!r}")
        chosen |= hits
    return chosen


def portable(argument: str, keys: list, variables: list) -> list:
    """Keys that a config can hold, and that pick the same variables of a model that was loaded."""
    tails, found = [_tail(v) for v in variables], []
    for key in keys:
        hits = sorted(_hits(argument, key, variables))
        placed = [{"path": tails[i], "place": i, "of": len(tails)} for i in hits]
        if isinstance(key, str):  # it stays as it is, unless it needs the front of a path
            found += [key] if set(hits) == _found(key, tails) else placed
        elif isinstance(key, dict):
            found += placed or [key]
        elif _weights(key):
            own = [w for w in _weights(key) if not any(w is v for v in variables)]
            found += placed + [{"path": _tail(w), "place": None, "of": None} for w in own]
        else:  # a layer that is not built
            found.append(rf"(^|/){re.escape(key.name)}/")
    return found


def _hits(argument: str, key, variables: list) -> set[int]:
    if isinstance(key, str):
        return _found(key, [_keras.path_of(v) for v in variables])
    if not isinstance(key, dict):
        return {i for i, v in enumerate(variables) if any(v is own for own in _weights(key))}
    tails = [_tail(v) for v in variables]
    if key["of"] == len(tails) and _stem(tails[key["place"]]) == _stem(key["path"]):
        return {key["place"]}
    hits = {i for i, tail in enumerate(tails) if tail == key["path"]}
    if len(hits) > 1:
        raise ValueError(
            f"`{argument}` must be given anew: {len(hits)} variables of this model are called {key['path']!r}, and "
            f"others are trainable than before. Received: {argument}={key!r}"
        )
    return hits


def _found(pattern: str, paths: list[str]) -> set[int]:
    return {i for i, path in enumerate(paths) if re.search(pattern, path)}


def _tail(variable) -> str:
    return "/".join(_keras.path_of(variable).split("/")[-2:])


def _stem(tail: str) -> str:
    """The tail without the numbers that Keras gives to layers."""
    return re.sub(r"_\d+(?=/|$)", "", tail)


def _weights(key) -> list:
    """The variables of a layer or model; a variable stands for itself."""
    return getattr(key, "weights", [key])


def _is_frozen(key) -> bool:
    return not isinstance(key, str) and bool(_weights(key)) and not any(w.trainable for w in _weights(key))
