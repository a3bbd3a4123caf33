"""Optimizers as a user may say them: by name, with a rate or without one, or as they are."""

from collections import Counter
from collections.abc import Mapping

import keras

from kopt import checks
from kopt._keras import stepping
from kopt.optimizers.named import RULES, SOLVERS
from kopt.optimizers.quasi_newton.optimizer import QuasiNewton

LABELS = {
    "sgd": "SGD", "momentum": "momentum", "nesterov": "Nesterov", "adagrad": "Adagrad", "rmsprop": "RMSprop",
    "adam": "Adam", "adamw": "AdamW", "lbfgs": "L-BFGS", "bfgs": "BFGS", "ssbfgs": "SSBFGS", "ssbroyden": "SSBroyden",
}  # fmt: skip
TRIES = 19  # for each whose rate nobody has said


def asked(optimizers) -> list[tuple]:
    """Labels and what is meant by each: a name with a rate or without one, or an optimizer."""
    allowed = "a name, an optimizer, a list of these, or a dict from labels to them"
    if isinstance(optimizers, (str, keras.optimizers.Optimizer)):
        optimizers = [optimizers]
    if not isinstance(optimizers, (list, tuple, Mapping)) or not optimizers:
        checks.refuse("optimizers", allowed, optimizers)
    if isinstance(optimizers, Mapping):
        pairs = [(checks.sentence("optimizers", label), one) for label, one in optimizers.items()]
    else:
        pairs = [(_label(one), one) for one in optimizers]
        count, seen = Counter(label for label, _ in pairs), Counter()
        for place, (label, one) in enumerate(pairs):
            seen[label] += 1
            pairs[place] = (f"{label} {seen[label]}" if count[label] > 1 else label, one)
    for _, one in pairs:
        if not isinstance(one, (str, keras.optimizers.Optimizer)):
            checks.refuse("optimizers", allowed, one)
    return pairs


def _label(one) -> str:
    if isinstance(one, str):
        word = one.split("=")[0].strip()
        return LABELS.get(word.lower(), word)
    kind = type(one)
    return ("keras." if kind.__module__.startswith("keras") else "") + kind.__name__


def made(one, tune) -> tuple:
    """The optimizer, and how many rates to try: as many as are asked for, or some if none is known to be good."""
    if not isinstance(one, str):
        return _copy(one), tune if _is_tunable(one) else None
    word, sign, given = (part.strip() for part in one.partition("="))
    name = word.lower()
    if name in SOLVERS:
        if sign:
            checks.refuse("optimizers", f"without a rate where there is none: {word!r}", one)
        return SOLVERS[name](check_noise=False), None  # there is none
    make = RULES.get(name) or _of_keras(word)
    if make is None:
        names = ", ".join(map(repr, [*RULES, *SOLVERS]))
        checks.refuse("optimizers", f"of {names}, or of Keras's optimizers, such as 'keras.Lion'", one)
    optimizer = make(_number(one, given) if sign else 1e-3)
    return optimizer, (tune or (None if sign else TRIES)) if _is_tunable(optimizer) else None


def _number(one, text):
    try:
        return checks.nonnegative("optimizers", float(text))
    except ValueError:
        return checks.refuse("optimizers", "with a finite number of 0 or more behind '='", one)


def _of_keras(word):
    """One of Keras's optimizers at a learning rate, if it is one that needs nothing else."""
    kind = getattr(keras.optimizers, word.removeprefix("keras."), None) if word.startswith("keras.") else None
    if not isinstance(kind, type) or not issubclass(kind, keras.optimizers.Optimizer):
        return None
    around = keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer
    return None if kind in around else lambda rate: kind(learning_rate=rate)


def _copy(optimizer):
    """One of the same config; a gradient that is not finite ends a run, it raises nothing."""
    if stepping.within(optimizer):
        checks.refuse("optimizers", "without others in them: give the inner one", type(optimizer).__name__)
    try:
        config = optimizer.get_config()
        if config.get("nonfinite") == "raise":
            config["nonfinite"] = "apply"
        return type(optimizer).from_config(config)
    except Exception as error:
        allowed = f"such that a copy can be made from its config ({error})"
        return checks.refuse("optimizers", allowed, type(optimizer).__name__)


def _is_tunable(optimizer) -> bool:
    return not isinstance(optimizer, QuasiNewton) and rate_of(optimizer) is not None


def rate_of(optimizer):
    """The learning rate, if it is one number."""
    if isinstance(optimizer, QuasiNewton):
        return None
    rate = optimizer.get_config().get("learning_rate")
    return float(rate) if isinstance(rate, (int, float)) else None
