"""What makes a loss noisy, found in a model and in data before a search begins."""

import warnings

import keras

from kopt import _keras, batch_norm, checks

_RANDOM = (
    keras.layers.AlphaDropout, keras.layers.Dropout, keras.layers.GaussianDropout, keras.layers.GaussianNoise,
    keras.layers.SpatialDropout1D, keras.layers.SpatialDropout2D, keras.layers.SpatialDropout3D,
)  # fmt: skip


def random_layers(model) -> list[str]:
    """The layers that draw at random in training."""
    return [
        layer.name
        for layer in _keras.layers_of(model)
        if isinstance(layer, _RANDOM) and (getattr(layer, "rate", 0) or getattr(layer, "stddev", 0))
    ]


def check_model(model, who: str) -> None:
    """Refuse a model that draws at random, and warn of one that normalizes batches."""
    if found := random_layers(model):
        allowed = f"without layers that draw at random, for {who}, which asks the same loss again and again"
        checks.refuse("model", allowed, found)
    found = [layer.name for layer in batch_norm.layers_of(model) if layer.trainable]
    if found:
        warnings.warn(
            f"{who}: the moving statistics of {', '.join(found)} lag behind weights that move this fast. Freeze these "
            "layers, or call `kopt.update_bn(model, x)` afterwards.",
            stacklevel=3,
        )
