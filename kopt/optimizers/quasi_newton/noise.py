"""What makes a loss noisy, found in a model and in data before a search begins."""

import warnings

from kopt import _keras, batch_norm, checks

AMOUNTS = "rate", "stddev", "dropout", "recurrent_dropout"  # how layers call how much noise they make
LAG = "lag behind weights that move this fast"


def random_layers(model) -> list[str]:
    """The layers of which it can be seen that they draw at random in training."""
    return [
        layer.name
        for layer in _keras.layers_of(model)
        if _keras.generators_of(layer) and any(getattr(layer, name, 0) for name in AMOUNTS)
    ]


def check_model(model, who: str, drawing: list[str], happens=LAG) -> None:
    """Refuse a model with layers that draw at random, and warn of one that normalizes batches."""
    if drawing:
        allowed = f"without layers that draw at random, for {who}, which asks the same loss again and again"
        checks.refuse("model", allowed, drawing)
    coarse = sorted({layer.compute_dtype for layer in _keras.layers_of(model)} & {"float16", "bfloat16"})
    if coarse:
        allowed = f"with layers that compute in float32 or float64, for {who}, which needs the digits"
        checks.refuse("model", allowed, f"layers in {', '.join(coarse)}")
    warn_of_moving([layer.name for layer in batch_norm.layers_of(model) if layer.trainable], who, happens)


def check_names(paths, who: str) -> None:
    """Warn of batch normalization where there are only the paths of the variables."""
    warn_of_moving(sorted({part for path in paths for part in path.split("/") if "batch_norm" in part}), who)


def warn_of_moving(found: list[str], who: str, happens=LAG) -> None:
    if found:
        warnings.warn(
            f"{who}: the moving statistics of {', '.join(found)} {happens}. Freeze these layers, or call "
            "`kopt.update_bn(model, x)` afterwards.",
            stacklevel=4,
        )
