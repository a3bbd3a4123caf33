"""Sets of weights that a user names: arrays, models, files."""

import os

import keras
import numpy as np

from kopt import _keras, checks, weights
from kopt.ensemble import Ensemble
from kopt.landscape.evaluation import as_it_was

ALLOWED = (
    "weights as `get_weights` gives them, a model like this one, a file that `load_weights` takes, a list of these, "
    "or a kopt.Ensemble of models like this one"
)


def points_of(model, points) -> list[list]:
    """The arrays of all weights, of each point; those of the model itself if there is none."""
    if points is None:
        _keras.fetch_state(model)
        return [weights.arrays(model.weights)]
    given = points.models if isinstance(points, Ensemble) else points
    given = [given] if isinstance(given, (keras.Model, str, os.PathLike)) or _is_set(given) else given
    if not isinstance(given, (list, tuple)) or not given:
        checks.refuse("points", ALLOWED, points)
    for one in given:
        _check(model, one, points)
    return [_arrays(model, one) for one in given]


def _is_set(given) -> bool:
    return isinstance(given, (list, tuple)) and bool(given) and all(hasattr(part, "shape") for part in given)


def _check(model, one, points) -> None:
    if isinstance(one, (str, os.PathLike)):
        if not os.path.exists(checks.path("points", one)):
            checks.refuse("points", "files that there are", one)
        return
    if not isinstance(one, keras.Model) and not _is_set(one):
        checks.refuse("points", ALLOWED, points)
    shapes, theirs = ([tuple(part.shape) for part in parts] for parts in (model.weights, _parts(one)))
    if theirs != shapes:
        allowed = f"weights of this model: {len(shapes)} arrays, of the shapes {shapes}"
        checks.refuse("points", allowed, theirs)


def _parts(one) -> list:
    return one.weights if isinstance(one, keras.Model) else one


def _arrays(model, one) -> list:
    if isinstance(one, (str, os.PathLike)):
        return _loaded(model, one)
    if isinstance(one, keras.Model):
        _keras.fetch_state(one)
    arrays = [np.array(keras.ops.convert_to_numpy(part)) for part in _parts(one)]
    return [array.astype(_keras.dtype_of(own)) for array, own in zip(arrays, model.weights, strict=True)]


def _loaded(model, path) -> list:
    with _keras.without_optimizers([model]), as_it_was(model):  # a file may have the state of an optimizer as well
        try:
            model.load_weights(path)
        except Exception as error:
            raise ValueError(
                f"`points` must be files of weights of this model ({error}). Received: points={str(path)!r}"
            ) from error
        return weights.arrays(model.weights)
