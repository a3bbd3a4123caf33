"""What the layers draw."""

import keras
from keras import ops

from kopt import checks

FORMATS = "channels_last", "channels_first"


def check_format(value):
    """The data format, Keras's own if none is given."""
    return checks.optional(checks.one_of(*FORMATS))("data_format", value) or keras.config.image_data_format()


def check_seed(value):
    return checks.optional(checks.count(0))("seed", value)


def survivors(shape, rate, seed):
    """True with the probability `1 - rate`. It is drawn in float32: 16 bits know too few numbers near 0."""
    return keras.random.uniform(shape, dtype="float32", seed=seed) >= rate


def dropped(x, rate, seed, shape=None):
    """`x / (1 - rate)` where something survives and 0 elsewhere; `shape` says what lives or dies together."""
    kept = survivors(ops.shape(x) if shape is None else shape, rate, seed)
    return ops.where(kept, x / (1 - rate), ops.zeros_like(x))
