"""What makes a loss noisy, found in a model and in data before a search begins."""

import warnings

from kopt import _keras, batch_norm, checks

AMOUNTS = "rate", "stddev", "dropout", "recurrent_dropout"  # how layers call how much noise they make


def random_layers(model) -> list[str]:
    """The layers of which it can be seen that they draw at random in training."""
    return [
        layer.name
        for layer in _keras.layers_of(model)
        if _keras.generators_of(layer) and any(getattr(layer, name, 0) for name in AMOUNTS)
    ]


def check_model(model, who: str, drawing: list[str]) -> None:
    """Refuse a model with layers that draw at random, and warn of one that normalizes batches."""
    if drawing:
        allowed = f"without layers that draw at random, for {who}, which asks the same loss again and again"
        checks.refuse("model", allowed, drawing)
    found = [layer.name for layer in batch_norm.layers_of(model) if layer.trainable]
    if found:
        warnings.warn(
            f"{who}: the moving statistics of {', '.join(found)} lag behind weights that move this fast. Freeze these "
            "layers, or call `kopt.update_bn(model, x)` afterwards.",
            stacklevel=3,
        )
