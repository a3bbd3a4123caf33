"""Multipliers that fall from the head of a network to its input."""

import re

import keras

from kopt import _keras, checks

NORMALIZATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
    keras.layers.RMSNormalization,
    keras.layers.UnitNormalization,
)


def layer_decay(model, decay: float = 0.75, levels: list | None = None, min_multiplier: float = 0.0) -> dict:
    """Multipliers for `multipliers=` that fall from level to level, from the output of a model down to its input.

        m = max(min_multiplier, decay ** levels above)

    The last level, which is the head as a rule, has 1, the one below it `decay`, and so on: lower layers have learned
    what is the same for many tasks, and should move less. The decay of 0.75 is that of BEiT's fine-tuning.

    Args:
        model: The model, with its weights.
        decay: The factor from one level to the next below it.
        levels: What the levels are, from the input to the output: layers, models, regular expressions, or lists of
            these, as the blocks of a large network. By default every layer with trainable weights of its own is a
            level, in the order of the model; a normalization belongs to the layer before it.
        min_multiplier: No multiplier is smaller.

    Returns:
        A dict from layer to multiplier; of `levels`, a list of pairs.

    Example:
        >>> import keras, kopt
        >>> layers = [keras.layers.Dense(3, name=name) for name in ("low", "middle", "head")]
        >>> model = keras.Sequential([keras.Input((4,)), *layers])
        >>> {layer.name: multiplier for layer, multiplier in kopt.layer_decay(model, 0.5).items()}
        {'head': 1.0, 'middle': 0.5, 'low': 0.25}
        >>> model.compile(kopt.AdamW(1e-3, multipliers=kopt.layer_decay(model)), loss="mse")

    Reference:
        Bao, Dong, Piao & Wei, BEiT: BERT pre-training of image transformers, 2022, https://arxiv.org/abs/2106.08254.
    """
    if not isinstance(model, keras.Model):
        checks.refuse("model", "a keras.Model", model)
    decay = checks.share("decay", decay)
    min_multiplier = checks.closed_fraction("min_multiplier", min_multiplier)

    def at(above):
        return max(min_multiplier, decay**above)

    if levels is not None:
        levels = [keys if isinstance(keys, (list, tuple)) else [keys] for keys in checks.listed("levels", levels)]
        levels = [checks.keys("levels", list(keys)) for keys in levels]
        return [(keys, at(above)) for above, keys in enumerate(reversed(levels))]
    found = levels_of([model])
    if not found:
        checks.refuse("model", "one with trainable weights: build it first", getattr(model, "name", model))
    return {layer: at(above) for above, level in enumerate(reversed(found)) for layer in level}


def levels_of(models) -> list[list]:
    """The layers of models with trainable weights, from the input to the output, each with its normalizations."""
    found: list[list] = []
    for layer in [layer for model in models for layer in _layers(model)]:
        if found and isinstance(layer, NORMALIZATIONS):
            found[-1].append(layer)
        else:
            found.append([layer])
    return found


def _layers(model) -> list:
    """The layers with trainable weights of their own, in the order of the model."""
    if not isinstance(model, keras.Model):
        return [model] if model.trainable_variables else []
    seen: set[int] = set()
    found: list = []
    for layer in _within(model):
        own = {id(variable) for variable in layer.trainable_variables} - seen
        found += [layer] if own else []
        seen |= own
    # A model of one's own may have weights beside its layers: embeddings of positions, as a rule.
    beside = [variable for variable in model.trainable_variables if id(variable) not in seen]
    return [*(f"^{re.escape(_keras.path_of(variable))}$" for variable in beside), *found]


def _within(model):
    """The layers in a model and in the models in it."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _within(layer)
        else:
            yield layer
