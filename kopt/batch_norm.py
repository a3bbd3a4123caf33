"""The moving statistics of batch normalization, estimated anew for the weights that a model has."""

import math

import keras
import numpy as np

from kopt import _keras, backends, checks, weights
from kopt.batches import batches, check_batches


def update_bn(model, data, batch_size: int = 32) -> None:
    """Estimate the moving statistics of all `BatchNormalization` layers anew, in one compiled pass through the data.

    Averaged weights need it: the statistics in the model are those of other weights. The mean of a layer is the mean
    over all rows, and the variance is pooled: the mean of the batches' variances, and the variance of their means.
    Nothing else changes: no weight, no random state, no metric. Layers that are frozen, or have `momentum=1`, are left
    alone. Dropout is active, as when the statistics of training are made. Some 50 batches say enough.

    Each batch weighs by its rows, so it is not exact for layers behind a mask, or where sequences differ in length from
    batch to batch, nor for a layer that is called several times; and a layer behind another one sees that with the
    statistics of the batch, as in training, so that the size of a batch matters.

    Args:
        model: A model with its weights.
        data: What the model was trained on: arrays `x` or `(x, y)`, a `tf.data.Dataset`, a `PyDataset`, a `DataLoader`;
            with several inputs, as for `fit`. What stands for `y` is not used. A dataset that shuffles by itself is
            another order on from then on, also for who trains with it.
        batch_size: How arrays are split.

    Example:

    >>> import keras, kopt, numpy as np
    >>> layer = keras.layers.BatchNormalization()
    >>> model = keras.Sequential([keras.Input((1,)), layer])
    >>> kopt.update_bn(model, np.array([[1.0], [2.0], [6.0]]))
    >>> keras.ops.convert_to_numpy(layer.moving_mean).tolist()
    [3.0]
    """
    check_batches("data", data)
    statistics = Statistics(model)
    weights.assign(statistics.variables, statistics.estimate(data, checks.count(1)("batch_size", batch_size)))


def layers_of(model) -> list:
    """The layers of a model that normalize batches."""
    return [one for one in _keras.layers_of(model) if isinstance(one, keras.layers.BatchNormalization)]


class Statistics:
    """The moving means and variances of a model, and the compiled pass that estimates them."""

    def __init__(self, model):
        if not isinstance(model, keras.Model):
            checks.refuse("model", "a keras.Model", model)
        _keras.fetch_state(model)
        self.model = model
        layers = layers_of(model)
        if wrong := [layer.name for layer in layers if layer.renorm]:
            checks.refuse("model", "one without `renorm=True` in its BatchNormalization", wrong)
        if wrong := [layer.name for layer in layers if not layer.built]:
            checks.refuse("model", "built, so that its BatchNormalization has statistics", wrong)
        self.layers = list({id(layer): layer for layer in layers}.values())
        self.variables = [one for layer in self.layers for one in (layer.moving_mean, layer.moving_variance)]
        places = {id(variable): place for place, variable in enumerate(model.non_trainable_variables)}
        self.places = [places[id(variable)] for variable in self.variables]
        self.run = self._run if getattr(model, "run_eagerly", False) else backends.compiled(self._run)

    def _run(self, trainable, others, x):
        """What the variables that are not trained become in one step of training."""
        _, others = self.model.stateless_call(trainable, others, x, training=True)
        return others

    def _after(self, trainable, others, x):
        """The statistics after that step, and all these variables, with the random state for the next."""
        with backends.unrecorded():
            others = self.run(trainable, others, x)
        return [keras.ops.convert_to_numpy(others[place]).astype("float64") for place in self.places], others

    def estimate(self, data, batch_size=32) -> list[np.ndarray]:
        """The statistics over the data; those of layers that take no part stay."""
        kept = weights.arrays(self.variables)
        if not self.layers:
            return kept
        random_state = backends.random_state()
        try:
            return self._estimate(data, batch_size, kept)
        finally:
            backends.set_random_state(random_state)  # torch's Dropout draws from it

    def _estimate(self, data, batch_size, kept):
        _keras.fetch_state(self.model)
        trainable, others = (
            [backends.read(variable, variable.dtype) for variable in variables]
            for variables in (self.model.trainable_variables, self.model.non_trainable_variables)
        )
        shares, pooled = None, Pooled()
        for x in batches(data, batch_size):
            before = others
            found, others = self._after(trainable, self._set(before, keras.ops.zeros_like), x)
            if shares is None:
                shares = self._shares(found, self._after(trainable, self._set(before, keras.ops.ones_like), x)[0])
            found = [value / (share or 1) for value, share in zip(found, shares, strict=True)]
            pooled.add(keras.tree.flatten(x)[0].shape[0], found[::2], found[1::2])
        if shares is None:
            checks.refuse("data", "not empty", data)
        new = [value for pair in zip(pooled.means, pooled.variances, strict=True) for value in pair]
        return [value.astype(old.dtype) if share else old for value, old, share in zip(new, kept, shares, strict=True)]

    def _set(self, others, fill) -> list:
        """The variables that are not trained, with something else in the places of the statistics."""
        return [fill(value) if place in set(self.places) else value for place, value in enumerate(others)]

    def _shares(self, from_zeros, from_ones) -> list[float]:
        """How much of a statistic is data after one step: `1 - momentum**k` of a layer that is called k times.

        What is left of a one is `momentum**k`; in float32 that is enough to tell k. A frozen layer has k = 0.
        """
        found = []
        for layer, zero, one in zip(self.layers, from_zeros[::2], from_ones[::2], strict=True):
            left = float(np.median(one - zero))
            m = layer.momentum
            calls = max(1, round(math.log(left) / math.log(m))) if 0 < m < 1 and left > 0 else 1
            share = 0.0 if m >= 1 or left > (1 + m) / 2 else 1 - m**calls
            found += [share, share]
        return found


class Pooled:
    """The means and variances over the rows of all batches, from those of each."""

    def __init__(self):
        self.rows, self.means, self.variances = 0, 0.0, 0.0

    def add(self, rows, means, variances) -> None:
        self.rows += rows
        share = rows / self.rows
        if share == 1:
            self.means, self.variances = list(means), list(variances)
            return
        for i, (mean, variance) in enumerate(zip(means, variances, strict=True)):
            off = mean - self.means[i]
            self.means[i] += share * off
            self.variances[i] += share * (variance - self.variances[i] + (1 - share) * off**2)
