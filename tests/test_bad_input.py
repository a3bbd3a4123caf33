"""Every argument of everything public against values of every kind: taken or refused as the catalogue declares."""

import decimal
import fractions
import inspect
import json
import re

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from tests.catalog import INSTEAD, KINDS, NEEDED, PUBLIC, TRIED_ELSEWHERE
from tests.test_data import Items


def values():
    """Values of every kind, made anew: numbers at and beyond the borders, other types, other libraries."""
    yield from (None, True, False, "", "0.1", "(", "a/b", "bias", "velocity", "average", "skip", "raise", b"", b"1")
    yield from ([], [0.1], [1, 2], (), {}, {"a": 1}, set(), object(), 1j, float, len, lambda: 0.1, lambda step: 0.1)
    yield from (float("nan"), float("inf"), -float("inf"), -0.0, -1, -1e-9, 0, 0.0, 1e-60, 1e-30, 0.1, 0.5, 1 - 1e-9)
    yield from (1, 1.0, 1 + 1e-9, 1.5, 2, 2.5, 3, 1e39, 2**31 - 1, 2**31, 2**63, 10**400, -(10**400))
    yield from (np.float32(0.5), np.float64(0.5), np.float16(0.5), np.int64(2), np.uint8(3), np.bool_(True))
    yield from (np.array(0.5), np.array(2), np.array([0.5]), np.ones(2), np.float32("nan"), np.str_("0.5"))
    yield from (decimal.Decimal("0.5"), fractions.Fraction(1, 2))
    yield from (ops.convert_to_tensor(0.5), ops.convert_to_tensor(2), ops.ones(1), ops.ones((2, 2)))
    yield from (keras.Variable(0.5), keras.layers.Dense(1), keras.layers.Dense, keras.Sequential([]))
    yield from (["bias", "("], ["bias", 3], ["bias", "kernel"])
    yield from (keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9), kopt.schedules.CosineDecay())
    yield from ([2, 3], [3, 2], [1, 2.5], [0.5, 0.25], (0.1, 0.5), [0.0, 1.0], np.array([1, 2]), ["momentum", "beta_1"])


def number(value):
    """The value as a number, as it is held in float32; NaN where it is none."""
    taken = (int, float, np.number, decimal.Decimal, fractions.Fraction)
    scalar = isinstance(value, np.ndarray) or ops.is_tensor(value) or isinstance(value, keras.Variable)
    if isinstance(value, bool) or not (isinstance(value, taken) or (scalar and tuple(value.shape) == ())):
        return np.nan
    if isinstance(value, int) and abs(value) > 1e300:
        return np.nan
    with np.errstate(over="ignore"):
        held = np.float32(ops.convert_to_numpy(value) if scalar else float(value))
    if not np.isfinite(held):
        return np.nan
    return held if abs(held) >= np.finfo("float32").tiny else 0.0


def exactly(value):
    value = ops.convert_to_numpy(value) if isinstance(value, keras.Variable) else value
    return number(value) if np.isnan(number(value)) else float(value)


def whole(value):
    dtype = "int" if isinstance(value, int) else str(getattr(value, "dtype", ""))
    return int(value) if not isinstance(value, bool) and "int" in dtype and np.ndim(value) == 0 else -1


def expression(value):
    try:
        return isinstance(value, str) and value != "" and bool(re.compile(value))
    except re.error:
        return False


def keys(value):
    def one(key):
        return expression(key) or isinstance(key, (keras.layers.Layer, keras.Variable))

    several = isinstance(value, (list, tuple))
    return bool(value) and all(map(one, value)) if several else one(value)


def groups(value):
    """A dict or a list of pairs; the only ones among the values are empty, or one of a pattern and a number."""
    return isinstance(value, (dict, list, tuple)) and (len(value) == 0 or value == {"a": 1})


def series(value):
    if isinstance(value, (str, bytes, dict, set, decimal.Decimal, fractions.Fraction)):
        return False
    try:
        array = np.asarray(ops.convert_to_numpy(value) if ops.is_tensor(value) else value)
    except (TypeError, ValueError):
        return False
    return array.dtype.kind in "biuf" and array.ndim > 0


def rate(value):
    none = [lambda: 0.1]  # what takes no argument
    takes_none = inspect.isfunction(value) and inspect.signature(value) == inspect.signature(none[0])
    schedule = isinstance(value, keras.optimizers.schedules.LearningRateSchedule)
    return takes_none or (schedule and getattr(value, "stands_alone", True)) or number(value) >= 0


def several(value, legal):
    return (
        isinstance(value, (list, tuple, np.ndarray))
        and np.shape(value)[:1] not in ((), (0,))
        and all(map(legal, value))
    )


LEGAL = {
    "groups": groups,
    "stages": lambda v: False,  # none of these is
    "rate": rate,
    "finite": lambda v: not np.isnan(number(v)),
    "positive": lambda v: number(v) > 0,
    "nonnegative": lambda v: number(v) >= 0 and exactly(v) >= 0,
    "window": lambda v: 1 <= number(v) < 2**53 and exactly(v) >= 1,
    "fraction": lambda v: 0 <= number(v) < 1 and 0 <= exactly(v) < 1,
    "share": lambda v: 0 < number(v) <= 1 and exactly(v) <= 1,
    "inner": lambda v: 0 < number(v) < 1,
    "epochs": lambda v: 0 < number(v) < 2**31,
    "names": lambda v: LEGAL["text"](v) or several(v, LEGAL["text"]),
    "two counts": lambda v: several(v, lambda n: whole(n) > 0) and len(v) == 2 and v[0] < v[1],
    "two nonnegatives": lambda v: several(v, lambda n: number(n) >= 0) and len(v) == 2,
    "two inners": lambda v: several(v, LEGAL["inner"]) and len(v) == 2 and v[0] <= v[1],
    "schedule": lambda v: isinstance(v, kopt.schedules.Schedule),
    "closed_fraction": lambda v: 0 <= number(v) <= 1 and 0 <= exactly(v) <= 1,
    "ratio": lambda v: number(v) > 1 or (several(v, lambda n: number(n) > 1) and len(v) == 2),
    "size": lambda v: 0 < whole(v) < 2**31 or (several(v, lambda n: whole(n) > 0) and len(v) == 2),
    "boolean": lambda v: isinstance(v, (bool, np.bool_)),
    "text": lambda v: isinstance(v, str) and v != "" and "/" not in v,
    "sentence": lambda v: isinstance(v, str) and v != "",
    "keys": keys,
    "series": series,
    "exact": lambda v: isinstance(v, str) and v == "exact",
    "path": lambda v: isinstance(v, str) and v != "",
    "data": lambda v: isinstance(v, keras.utils.PyDataset),
    "batches with targets": lambda v: False,  # none of these is
    "batches": lambda v: (isinstance(v, np.ndarray) or ops.is_tensor(v)) and len(v.shape) > 0,
}


def legal(kind, value):
    if kind.endswith("?"):
        return value is None or legal(kind[:-1], value)
    if kind.startswith("count "):
        return int(kind.split()[1]) <= whole(value) < 2**31
    if "|" in kind:
        return isinstance(value, str) and value in kind.split("|")
    return LEGAL[kind](value)


def arguments(target):
    """The names of the arguments of something public, as its constructor and the base declare them."""
    if target in (kopt.Optimizer, kopt.QuasiNewton):
        return set()
    names = set(inspect.signature(target).parameters)
    return names - {"common"} | ({*target.declared(), "name"} if hasattr(target, "declared") else set())


def test_every_public_argument_is_declared():
    assert {kopt.At, kopt.Slot, kopt.Optimizer, kopt.callbacks.BackupAndRestore} < set(PUBLIC.values())
    assert KINDS.keys() == set(PUBLIC.values())
    for target, kinds in KINDS.items():
        assert arguments(target) == kinds.keys(), target.__name__


@pytest.fixture
def variables_made(monkeypatch):
    made, original = [], keras.Variable.__init__
    monkeypatch.setattr(keras.Variable, "__init__", lambda self, *a, **k: made.append(1) or original(self, *a, **k))
    return made


def refused(act, name, value, made):
    """Whether the value is refused, and if so as everything must be."""
    before = len(made)
    try:
        act()
    except ValueError as error:
        message = str(error)
    else:
        return False
    shown = re.escape(f"Received: {name}={value!r}")
    assert re.search(rf"`{name}`.* {shown}", message, re.DOTALL), f"{name}={value!r}: {message}"
    assert len(made) == before, f"{name}={value!r} was refused after a variable was made"
    return True


CASES = [(target, kinds) for target, kinds in KINDS.items() if kinds and target not in TRIED_ELSEWHERE]


@pytest.mark.parametrize(("target", "kinds"), CASES, ids=[target.__name__ for target, _ in CASES])
def test_arguments_are_taken_or_refused_as_declared(target, kinds, variables_made, record_property):
    start = {
        "Slot": {"name": "m", "doc": "mean"},
        "exponentially_weighted_average": {"values": [1.0]},
        "BackupAndRestore": {"directory": "somewhere"},
        "seekable": {"source": Items()},
        "Schedule": {"hyperparameter": "momentum", "schedule": kopt.schedules.Constant()},
        "StagedUnfreeze": {"stages": {0: {"a": 1}}},
        "Staircase": {"boundaries": [1, 2], "factors": [0.1, 0.2]},
        "WarmUp": {"steps": 2},
        "CosineRestarts": {"cycle_steps": 2},
        "CyclicalRate": {"max_learning_rate": 3e38, "cycle_steps": 2},
        "DropPath": {"rate": 0.1},
        "DropConnectDense": {"units": 2, "rate": 0.1},
        "DropConnectConv2D": {"filters": 2, "kernel_size": 3, "rate": 0.1},
        "DropBlock2D": {"rate": 0.1},
        "FractionalMaxPooling2D": {"pool_ratio": 1.5},
        "WarmUpStableDecay": {"warmup_steps": 1, "decay_epochs": 1},
    }
    cases, every = 0, list(values())
    for name, kind in kinds.items():
        for value in every:
            needed = {} if value is None else NEEDED.get(name, {})
            given = {k: v for k, v in needed.items() if k in kinds}
            given = start.get(target.__name__, {}) | given
            if name in INSTEAD:
                given = {k: v for k, v in given.items() if k != INSTEAD[name]}
                given |= {INSTEAD[name]: 0.5 if INSTEAD[name] == "base" else 1} if value is None else {}
            given = {k: v for k, v in (given | {name: value}).items() if k in kinds}
            made = []
            wrong = refused(lambda given=given, made=made: made.append(target(**given)), name, value, variables_made)
            assert wrong != legal(kind, value), (
                f"{target.__name__}({name}={value!r}) is {'refused' if wrong else 'taken'}"
            )
            if made and hasattr(made[0], "get_config") and not callable(value):
                json.dumps(made[0].get_config())
            cases += 1
    assert cases == len(kinds) * len(every) > 150
    record_property("cases", cases)


ASSIGNED = [(target, kinds) for target, kinds in CASES if hasattr(target, "declared")]


@pytest.mark.parametrize("built", [False, True], ids=["before build", "after"])
@pytest.mark.parametrize(("target", "kinds"), ASSIGNED, ids=[target.__name__ for target, _ in ASSIGNED])
def test_assignments_are_taken_or_refused_as_declared(target, kinds, built, variables_made, record_property):
    given = {"nonnegative?": 0.1, "positive?": 1.0, "positive": 0.1, "fraction": 0.9, "count 1?": 2, "count 2?": 2}
    w, cases = keras.Variable(np.ones(2), name="bias"), 0

    def make(name, kind):
        needed = {k: v for k, v in NEEDED.get(name, {}).items() if k in kinds}
        start = {name: given[kind]} if kind in given else {}
        optimizer = target(**needed, **start)
        if built:
            optimizer.build([w])
        return optimizer

    own = inspect.signature(target).parameters.keys()
    same = {name for name in kinds.keys() - own if getattr(target, name, None) is getattr(kopt.Optimizer, name, 0)}
    # Nothing reads `name` after the constructor; an assignment of multipliers names some of those there are.
    elsewhere = {"name", "multipliers"} | (set() if target is kopt.SGD else same)
    for name, kind in kinds.items():
        if name in elsewhere:
            continue
        optimizer = make(name, kind)
        config = optimizer.get_config()
        changes = hasattr(getattr(target, name), "opens_slot") or name == "learning_rate"
        for value in values():
            allowed = legal(kind, value) and not (value is None and changes)
            if built and name == "learning_rate":
                allowed = allowed and not callable(value)
            elif built and not changes:  # fixed: no more than the value it has
                plain = value if np.isnan(number(value)) else exactly(value)
                allowed = allowed and type(value) is not list and plain == config[name]
            act = lambda value=value, name=name, optimizer=optimizer: setattr(optimizer, name, value)  # noqa: E731
            wrong = refused(act, name, value, variables_made)
            assert wrong != allowed, f"{target.__name__}.{name} = {value!r} is {'refused' if wrong else 'taken'}"
            if wrong:
                assert optimizer.get_config() == config
            else:
                optimizer = make(name, kind)
                config = optimizer.get_config()
            cases += 1
    record_property("cases", cases)


@pytest.mark.parametrize("target", [target for target, _ in ASSIGNED], ids=lambda target: target.__name__)
def test_unknown_and_contradictory_arguments(target, variables_made):
    beside = {"exclude_from_decay": "b", "weight_decay": None, "l2": None}
    clips = {"clipvalue": 1.0, "clipnorm": 1.0}, {"global_clipnorm": 1.0, "clipnorm": 1.0}
    for bad in ({"lr": 0.1}, {"decay": 0.1}, {"nonsense": 1}, beside, *clips):
        name = next(iter(bad))
        with pytest.raises(ValueError, match=rf"^.*`{name}`.* Received: {name}=.*$"):
            target(**bad)
    assert not variables_made
