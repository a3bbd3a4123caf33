"""Spaces of KerasTuner for learning rates and optimizers."""

import contextlib
import math

from kopt import checks
from kopt import schedules as ks
from kopt.optimizers import named
from kopt.range_test import RangeTest

RULES = {  # rule -> the optimizer at a rate, and at a momentum if it has one; its rates; whether it has a momentum
    rule: (named.RULES[rule], rates, rule in ("momentum", "nesterov"))
    for rule, rates in {
        "sgd": (1e-4, 10.0),
        "momentum": (1e-5, 1.0),
        "nesterov": (1e-5, 1.0),
        "adagrad": (1e-4, 1.0),
        "rmsprop": (1e-5, 0.1),
        "adam": (1e-5, 0.1),
        "adamw": (1e-5, 0.1),
    }.items()
}
SCHEDULES = {  # schedule -> the learning rate that it makes of its highest, and where that lies
    "constant": lambda rate, peak_at: rate,
    "linear": lambda rate, peak_at: ks.Linear(initial=rate),
    "cosine": lambda rate, peak_at: ks.CosineDecay(initial=rate),
    "one_cycle": lambda rate, peak_at: ks.OneCycle(rate, peak_at=peak_at),
}
MOMENTA = [0.5, 0.9, 0.95, 0.99]
PEAKS = [0.1, 0.3, 0.5]
DECADES = 1.0  # on each side of what a range test suggests


def learning_rate(hp, rule: str = "adam", around=None, *, name: str = "learning_rate") -> float:
    """A learning rate as a hyperparameter, on a log scale.

    Args:
        hp: KerasTuner's hyperparameters, as `build(hp)` gets them.
        rule: Whose range: "sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam" or "adamw".
        around: A `kopt.RangeTest` or a rate; the range is then a decade on each side of it, and ends where the loss
            exploded.
        name: What the hyperparameter is called.

    Returns:
        The rate of this trial.

    Example:
        >>> import keras_tuner, kopt.tuner
        >>> hp = keras_tuner.HyperParameters()
        >>> round(kopt.tuner.learning_rate(hp, rule="adam"), 6)
        0.001
        >>> hp.space[0].min_value, hp.space[0].max_value, hp.space[0].sampling
        (1e-05, 0.1, 'log')
    """
    low, high = RULES[checks.one_of(*RULES)("rule", rule)][1]
    if around is not None:
        low, high = _around(around, (low, high))
    default = math.sqrt(low * high)
    return hp.Float(checks.sentence("name", name), low, high, sampling="log", default=default)


def _around(around, otherwise) -> tuple[float, float]:
    is_record = isinstance(around, RangeTest)
    middle = around.suggestion if is_record else checks.positive("around", around)
    if middle is None:
        return otherwise
    high = middle * 10**DECADES
    if is_record and around.diverged_at and around.diverged_at > middle:
        high = min(high, around.diverged_at)
    return middle / 10**DECADES, high


def optimizer(hp, rules=("sgd", "momentum", "adam"), schedules=("constant", "cosine")):
    """An optimizer as hyperparameters: the rule, its learning rate and momentum, and a schedule.

    Each rule has a rate of its own, called "sgd_learning_rate" and so on, in a range that suits it; where there is one
    rule alone it is "learning_rate". Momentum is searched only where a rule has one. Schedules last as long as `fit`: a
    callback of kopt must be in it, which `kopt.tuner.wrap` sees to.

    Args:
        hp: KerasTuner's hyperparameters, as `build(hp)` gets them.
        rules: Of "sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam" and "adamw".
        schedules: Of "constant", "linear", "cosine" and "one_cycle", whose highest rate is the learning rate.

    Returns:
        An optimizer for `compile`.

    Example:
        >>> import keras_tuner, kopt.tuner
        >>> hp = keras_tuner.HyperParameters()
        >>> kopt.tuner.optimizer(hp, rules=["momentum", "adam"], schedules=["constant"])
        SGD(learning_rate=0.0031622776, momentum=0.9)
        >>> sorted(hp.values)
        ['momentum', 'momentum_learning_rate', 'rule']
    """
    rules, schedules = _chosen("rules", rules, RULES), _chosen("schedules", schedules, SCHEDULES)
    rule = hp.Choice("rule", rules) if len(rules) > 1 else rules[0]
    rates, momenta = {}, {}
    for one in rules:
        with _scope(hp, "rule", [one], rules):
            rates[one] = learning_rate(hp, one, name=f"{one}_learning_rate" if len(rules) > 1 else "learning_rate")
            if RULES[one][2]:
                momenta[one] = hp.Choice("momentum" if one == "momentum" else f"{one}_momentum", MOMENTA, default=0.9)
    schedule = hp.Choice("schedule", schedules) if len(schedules) > 1 else schedules[0]
    peak_at = None
    if "one_cycle" in schedules:
        with _scope(hp, "schedule", ["one_cycle"], schedules):
            peak_at = hp.Choice("peak_at", PEAKS, default=0.3)
    momentum = {"momentum": momenta[rule]} if rule in momenta else {}
    return RULES[rule][0](SCHEDULES[schedule](rates[rule], peak_at), **momentum)


def _chosen(name, given, known) -> list[str]:
    given = [given] if isinstance(given, str) else given
    names = checks.several(checks.one_of(*known), "a list of " + ", ".join(map(repr, known)))(name, given)
    return list(dict.fromkeys(names))


def _scope(hp, parent, values, choices):
    """Where a hyperparameter is only there for some values of another, if there is a choice."""
    return hp.conditional_scope(parent, values) if len(choices) > 1 else contextlib.nullcontext()
