"""Which variables: chosen by layer, by model, by variable, or by a regular expression over paths."""

import re

from kopt import _keras


def select(argument: str, keys: list, variables: list) -> set[int]:
    """The positions in `variables` that any of `keys` picks; a key that picks none is an error."""
    chosen = set()
    for key in keys:
        hits = {i for i, variable in enumerate(variables) if _picks(key, variable)}
        if not hits:
            paths = [_keras.path_of(v) for v in variables]
            shown = ", ".join(paths[:8]) + (f", ... ({len(paths)} in all)" if len(paths) > 8 else "")
            name = key if isinstance(key, str) else getattr(key, "name", key)
            raise ValueError(f"`{argument}` matches none of the variables {shown}. Received: {argument}={name!r}")
        chosen |= hits
    return chosen


def _picks(key, variable) -> bool:
    if isinstance(key, str):
        return re.search(key, _keras.path_of(variable)) is not None
    return any(variable is own for own in getattr(key, "weights", [key]))


def patterns(keys: list) -> list[str]:
    """The same choice as regular expressions, which a config can hold."""
    return [key if isinstance(key, str) else _pattern(key) for key in keys]


def _pattern(key) -> str:
    paths = [_keras.path_of(v) for v in getattr(key, "weights", [key])]
    if not paths:  # a layer that is not built has no variables yet
        return rf"(^|/){re.escape(key.name)}/"
    # Loading drops the name of a `Sequential` from the front of a path: all but the last two parts may be missing.
    fronts = [(path.split("/")[:-2], "/".join(path.split("/")[-2:])) for path in paths]
    whole = ["".join(f"({re.escape(part)}/)?" for part in front) + re.escape(tail) for front, tail in fronts]
    return "^(" + "|".join(dict.fromkeys(whole)) + ")$"
