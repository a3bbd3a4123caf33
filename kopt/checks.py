"""What an argument may be: one function for each kind, each returning the value in plain Python or refusing it.

Every refusal is a ValueError of one form: what the argument must be, and `Received: name=value`.
"""

import inspect
import math
import operator
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

Check = Callable[[str, Any], Any]


def refuse(name: str, allowed: str, value: Any):
    raise ValueError(f"`{name}` must be {allowed}. Received: {name}={value!r}")


def held_dtype() -> str:
    """The dtype in which an optimizer holds a number: the default one, but never less than float32."""
    return "float64" if keras.config.floatx() == "float64" else "float32"


def _held(number: float) -> float:
    """The number as it counts once it is held: 1 - 1e-9 is 1, and what processors flush to zero is 0."""
    with np.errstate(over="ignore"):
        kept = float(np.asarray(number, held_dtype()))
    return kept if abs(kept) >= np.finfo(held_dtype()).tiny else 0.0


def _range(allowed: str, inside: Callable[[float], bool]) -> Check:
    def check(name: str, value: Any) -> float:
        number = _number(name, allowed, value)
        for judged, where in ((number, ""), (_held(number), f", also when rounded to {held_dtype()}")):
            if not (math.isfinite(judged) and inside(judged)):
                refuse(name, allowed + where, value)
        return number

    return check


def _number(name: str, allowed: str, value: Any) -> float:
    """A real scalar of any library as a float; text, truth values, containers and complex numbers are refused."""
    if isinstance(value, keras.Variable):
        value = keras.ops.convert_to_numpy(value)
    dtype = str(getattr(value, "dtype", type(value).__name__))
    scalar = getattr(value, "shape", ()) == () and hasattr(value, "__float__")
    if not scalar or "bool" in dtype or "complex" in dtype or isinstance(value, (str, bytes)):
        refuse(name, allowed, value)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, NotImplementedError):
        refuse(name, allowed, value)


positive = _range("a finite number greater than 0", lambda x: x > 0)
nonnegative = _range("a finite number of 0 or more", lambda x: x >= 0)
finite = _range("a finite number", lambda x: True)
epochs = _range("a number of epochs greater than 0, below 2**31", lambda x: 0 < x < 2**31)
above_one = _range("a finite number greater than 1", lambda x: x > 1)
window = _range("a number of 1 or more, below 2**53", lambda x: 1 <= x < 2**53)
fraction = _range("a number in [0, 1)", lambda x: 0 <= x < 1)
share = _range("a number in (0, 1]", lambda x: 0 < x <= 1)
inner = _range("a number in (0, 1)", lambda x: 0 < x < 1)
closed_fraction = _range("a number in [0, 1]", lambda x: 0 <= x <= 1)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        refuse(name, "True or False", value)
    return bool(value)


def text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value or "/" in value:
        refuse(name, "a non-empty string without '/'", value)
    return value


def sentence(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        refuse(name, "a non-empty string", value)
    return value


def path(name: str, value: Any) -> str:
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        refuse(name, "a path", value)
    return text


def count(least: int) -> Check:
    def check(name: str, value: Any) -> int:
        allowed = f"an integer of {least} or more, below 2**31"
        try:
            number = -1 if isinstance(value, (bool, np.bool_)) else operator.index(value)
        except (TypeError, AttributeError):
            number = -1
        return number if least <= number < 2**31 else refuse(name, allowed, value)

    return check


def one_of(*options: str) -> Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            refuse(name, "one of " + ", ".join(map(repr, options)), value)
        return value

    return check


def either(word: str, check: Check) -> Check:
    """A word, or what another check allows."""

    def judge(name: str, value: Any) -> Any:
        if isinstance(value, str) and value == word:
            return value
        try:
            return check(name, value)
        except ValueError as error:
            raise ValueError(str(error).replace(f"`{name}` must be ", f"`{name}` must be {word!r} or ", 1)) from None

    return judge


def optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def listed(name: str, value: Any) -> list:
    if not isinstance(value, Iterable) or hasattr(value, "shape"):
        refuse(name, "a list", value)
    return list(value)


def several(check: Check, what: str) -> Check:
    """A list of at least one, each of which is right."""

    def judge(name: str, value: Any) -> list:
        if not isinstance(value, (list, tuple, np.ndarray)) or getattr(value, "ndim", 1) == 0 or not len(value):
            refuse(name, what, value)
        try:
            return [check(name, item) for item in value]
        except ValueError:
            return refuse(name, what, value)

    return judge


def is_several(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray)) and getattr(value, "ndim", 1) > 0


def one_or_several(check: Check, what: str) -> Check:
    """A list of what is right, of one if one is given."""

    def judge(name: str, value: Any) -> list:
        try:
            return several(check, what)(name, value if is_several(value) else [value])
        except ValueError:
            return refuse(name, what, value)

    return judge


def pair(check: Check, what: str) -> Check:
    """A value for the height and one for the width, or one for both."""

    def judge(name: str, value: Any) -> tuple:
        found = one_or_several(check, what)(name, value)
        found = found if is_several(value) else found * 2
        return tuple(found) if len(found) == 2 else refuse(name, what, value)

    return judge


def learning_rate(name: str, value: Any) -> Any:
    """A number of 0 or more, a schedule, or a callable without arguments."""
    allowed = "a finite number of 0 or more, a LearningRateSchedule, or a callable that takes no argument"
    if not getattr(value, "stands_alone", True):
        refuse(name, f"{allowed}; a factor of a learning rate becomes one with `initial=`", value)
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return value
    if callable(value) and not isinstance(value, (type, keras.layers.Layer)) and takes(value, 0):
        return value
    return _range(allowed, lambda x: x >= 0)(name, value)


def takes(function: Callable, count: int) -> bool:
    """Whether it can be called with so many arguments, as far as that is known."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature
        return True
    return True


def keys(name: str, value: Any) -> list:
    """Layers, models, variables, or regular expressions over variable paths; one alone stands for a list of one."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    allowed = "a layer, a model, a variable, a regular expression, or a list of these"
    if not values:
        refuse(name, allowed, value)
    for key in values:
        if isinstance(key, str) and key:
            try:
                re.compile(key)
            except re.error as error:
                refuse(name, f"{allowed} ({key!r} is not a regular expression: {error})", value)
        elif isinstance(key, dict):  # as a config holds it; see optimizers/groups.py
            if key.keys() != {"path", "place", "of"}:
                refuse(name, allowed, value)
        elif isinstance(key, type) or not (hasattr(key, "path") or hasattr(key, "weights")):
            refuse(name, allowed, value)
    return values
