"""What a user may give a search to build models: a function of `hp` or of the rate, a HyperModel, or a model."""

import functools
import inspect
import json
import math

import keras
import keras_tuner

from kopt import checks, weights

RATE = "learning_rate"  # what the hyperparameter is called
RANGE = 1e-6, 10.0  # where nobody says another


def of_hp(build):
    """`build` as KerasTuner wants it."""
    if isinstance(build, keras.Model):
        config = build.optimizer.get_config() if build.compiled else {}
        if not isinstance(config.get(RATE), (int, float)):
            checks.refuse("build", "a model that is compiled with an optimizer, its learning rate a number", build)
        of_rate = functools.partial(_copied, build)
    elif callable(build) and next(iter(inspect.signature(build).parameters), None) == RATE:
        of_rate = build
    else:
        return build
    default = math.sqrt(math.prod(RANGE))
    return lambda hp: of_rate(hp.Float(RATE, *RANGE, sampling="log", default=default))


def _copied(model, rate):
    twin = weights.copy_of(model)
    twin.optimizer.learning_rate = rate
    return twin


def range_of(hypermodel, low, high) -> tuple[float, float]:
    """The range that is given, or the one that `build` asks for."""
    hp = keras_tuner.HyperParameters()
    hypermodel.build(hp)
    asked = next((one for one in hp.space if one.name == RATE), None)
    if not isinstance(asked, keras_tuner.engine.hyperparameters.Float):
        allowed = 'a function that asks for kopt.tuner.learning_rate(hp), or hp.Float("learning_rate", ...)'
        checks.refuse("build", allowed, [one.name for one in hp.space])
    low = checks.positive("min_learning_rate", asked.min_value if low is None else low)
    high = checks.positive("max_learning_rate", asked.max_value if high is None else high)
    if high <= low:
        checks.refuse("max_learning_rate", f"greater than `min_learning_rate` ({low!r})", high)
    return low, high


def check_rate_counts(hypermodel, rates) -> None:
    """Refuse a model whose optimizer is the same whatever the rate."""
    found = []
    for rate in rates:
        hp = keras_tuner.HyperParameters()
        hp.values[RATE] = rate
        model = hypermodel.build(hp)
        try:
            config = json.dumps(keras.optimizers.serialize(model.optimizer), default=repr)
        except (TypeError, ValueError):  # no config tells
            return
        found.append(json.loads(config, object_hook=_without_name))
    if found[0] == found[1]:
        allowed = "a function whose optimizer has the learning rate that it asks for"
        checks.refuse("build", allowed, found[0])


def _without_name(config) -> dict:
    return {name: value for name, value in config.items() if name != "name"}
