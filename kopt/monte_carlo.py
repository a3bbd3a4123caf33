"""Predictions of a model whose random layers stay random: their mean, and how far they are apart."""

from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from kopt import _keras, backends, batch_norm, checks, scores
from kopt._keras import modes
from kopt.batches import batches, check_batches
from kopt.ensemble import Way, resolved


@dataclass(frozen=True, eq=False)
class MonteCarlo:
    """What `mc_predict` has found; of a model with several outputs each field has their structure."""

    passes: int
    mean: Any  # of the predictions; this and all others are NumPy arrays
    spread: Any  # the standard deviation over the passes, which estimates that over all there could be (n - 1)
    entropy: Any = field(
        repr=False
    )  # of the mean of the probabilities, in nats; None where the output is none of classes
    mutual_information: Any = field(repr=False)  # how much of it is there because the passes differ


def mc_predict(
    model,
    x,
    n: int = 20,
    *,
    batch_size: int = 32,
    layers=None,
    seed: int | None = None,
    verbose: int = 0,
) -> MonteCarlo:
    """Predict `n` times with the random layers active, as in training, and say how far the predictions are apart.

    With dropout this is Monte Carlo dropout. Active are the layers that regularize at random: Keras's dropout of all
    kinds and its noise, dropout within attention and recurrent layers, kopt's layers, and layers of your own that hold
    a `keras.random.SeedGenerator`. All else is as in `predict`: batch normalization uses its statistics, and data
    augmentation does nothing. No more is kept than the sums, and the data are read once, each batch in `n` passes.

    The model stays as it is, and so do its compiled functions; only random layers without a seed given here have moved
    on in their draws.

    When to use it: for a guess at how sure a model is that was trained with such layers. How large the spread is hangs
    on the rates of the layers; several trained models (`kopt.Ensemble`) tell more.

    Args:
        model: A model with its weights.
        x: Its inputs, as arrays, a `tf.data.Dataset`, a `PyDataset` or a `DataLoader`; of `(x, y)` in these `y` is not
            used. A generator is not taken.
        n: How many passes there are.
        batch_size: How arrays are split.
        layers: The layers to be active instead, or their names; with a layer goes all that is within it but batch
            normalization. An augmentation is active if it is named.
        seed: For the same result each time. Then the layers' own random states are neither used nor changed.
        verbose: 1 for a progress bar.

    Returns:
        An object with `mean`, `spread` (the standard deviation over the passes) and `passes`; and, where the loss or
        the last activation says that the outputs are classes, as for `kopt.Ensemble`, `entropy` and
        `mutual_information`, else None. These two are of the probabilities, also where the outputs are logits. The
        entropy of the mean is high where the model is unsure; the mutual information is the part of it that is there
        because the passes differ, rather than because each of them is unsure.

    Example:
        >>> import keras, kopt, numpy as np
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
        >>> x = np.ones((3, 4), "float32")
        >>> found = kopt.mc_predict(model, x, n=200, seed=0)
        >>> found.mean.shape, bool(found.spread.min() > 0)
        ((3, 1), True)

    Reference: Gal and Ghahramani, "Dropout as a Bayesian approximation", ICML 2016.
    """
    if not isinstance(model, keras.Model):
        checks.refuse("model", "a keras.Model", model)
    if not model.built:
        checks.refuse("model", "built, so that it has weights", model.name)
    x = check_batches("x", (x,) if isinstance(x, tuple) else x)  # as for `predict`, a tuple is several inputs
    n, batch_size = checks.count(2)("n", n), checks.count(1)("batch_size", batch_size)
    seed, verbose = checks.optional(checks.count(0))("seed", seed), checks.count(0)("verbose", verbose)
    active = _active(model, layers)
    _keras.fetch_state(model)
    passes = Passes(model, active)
    random_state, seeds = backends.random_state(), passes.seeds
    try:
        if seed is not None:
            backends.seed_random_state(seed)
            passes.begin(seed)
        found = [passes.through(batch, n) for batch in _shown(x, batch_size, verbose)]
    finally:
        if seed is not None:
            backends.set_random_state(random_state)
    if not found:
        checks.refuse("x", "not empty", x)
    if seed is None:
        for variable, value in zip(seeds, passes.states, strict=True):
            variable.assign(value)
    return _together(found, n)


def _active(model, layers) -> list:
    """The layers that are called as in training."""
    if layers is None:
        found = modes.random_layers(model)
        return found or checks.refuse(
            "model", "one with a random layer, such as Dropout, of a rate above 0", model.name
        )
    within = _keras.layers_of(model)
    named = layers if isinstance(layers, (list, tuple)) else [layers]
    allowed = "a layer of the model, the name of one, or a list of such"
    if not named or any(not isinstance(one, (str, keras.layers.Layer)) for one in named):
        checks.refuse("layers", allowed, layers)
    found = [[layer for layer in within if one is layer or one == layer.name] for one in named]
    if not all(found):
        checks.refuse("layers", allowed, layers)
    parts = [part for several in found for layer in several for part in _keras.layers_of(layer)]
    if not any(_keras.generators_of(part) for part in parts):
        checks.refuse("layers", "random, or layers with random ones in them", layers)
    return parts


class Passes:
    """A model that is compiled with some of its layers active."""

    def __init__(self, model, active):
        self.model, self.active = model, active
        self.seeds = modes.seeds_of(model)
        self.states = [backends.copied(variable) for variable in self.seeds]
        self.ways = None
        known = {id(variable) for variable in self.seeds}
        self.variables = [variable for variable in model.variables if id(variable) not in known]
        self.values = [backends.read(variable, variable.dtype) for variable in self.variables]
        self.run = self._run if getattr(model, "run_eagerly", False) else backends.compiled(self._run)

    def begin(self, seed) -> None:
        """Let all draws follow from a seed."""
        drawn = np.random.default_rng(seed).integers(2**31, size=(len(self.seeds), 2))
        drawn[:, 1] = 0  # which Keras counts up
        self.states = [keras.ops.cast(state, v.dtype) for state, v in zip(drawn, self.seeds, strict=True)]

    def _run(self, values, states, x):
        """The outputs for a batch, and the states for the next pass."""
        known = [*zip(self.variables, values, strict=True), *zip(self.seeds, states, strict=True)]
        with (
            modes.called_with(self.active, training=True),
            modes.called_with(batch_norm.layers_of(self.model), training=False),
            keras.StatelessScope(state_mapping=known) as scope,
        ):
            outputs = self.model(x, training=False)
            return outputs, [scope.get_current_value(seed) for seed in self.seeds]

    def through(self, x, n) -> list:
        """What `n` passes of a batch come to: the structure of the outputs with a `Moments` for each."""
        moments = None
        for _ in range(n):
            with backends.unrecorded():
                outputs, self.states = self.run(self.values, self.states, x)
            flat = [_array(one) for one in keras.tree.flatten(outputs)]
            self.ways = self.ways or _ways(self.model, flat)
            moments = moments or [Moments(way) for way in self.ways]
            for one, value in zip(moments, flat, strict=True):
                one.add(value)
        return keras.tree.pack_sequence_as(outputs, moments) if keras.tree.is_nested(outputs) else moments[0]


class Moments:
    """The mean and the variance of arrays that come one after the other, and what the entropies need."""

    def __init__(self, way):
        self.way, self.count, self.mean, self.squares = way, 0, 0.0, 0.0
        self.probabilities, self.entropies = 0.0, 0.0  # their means

    def add(self, value) -> None:
        self.count += 1
        off = value - self.mean
        self.mean = self.mean + off / self.count
        self.squares = self.squares + off * (value - self.mean)
        if not self.way.is_numbers:
            p = self.way.probabilities(value)
            self.probabilities = self.probabilities + (p - self.probabilities) / self.count
            self.entropies = self.entropies + (scores.entropy(p) - self.entropies) / self.count

    def result(self, dtype) -> list:
        """The mean, the standard deviation, the entropy and the mutual information."""
        found = [self.mean, np.sqrt(self.squares / (self.count - 1))]
        if not self.way.is_numbers:
            entropy = scores.entropy(self.probabilities)
            found += [entropy, np.maximum(entropy - self.entropies, 0)]
        return [*(one.astype(dtype) for one in found), None, None][:4]


def _array(output):
    return keras.ops.convert_to_numpy(keras.ops.cast(output, backends.wide(_keras.dtype_of(output)))).astype("float64")


def _ways(model, flat) -> list:
    """What each output stands for; numbers, where nothing tells."""
    try:
        names = resolved("auto", model)
    except ValueError:
        names = "mean"
    names = names if isinstance(names, list) else [names] * len(flat)
    return [Way(name, (len(one), 1, *one.shape[1:])) for name, one in zip(names, flat, strict=True)]


def _together(found, n) -> MonteCarlo:
    """The result of all batches."""
    dtype = keras.config.floatx() if keras.config.floatx() == "float64" else "float32"
    joined = []
    for parts in zip(*map(keras.tree.flatten, found), strict=True):
        columns = zip(*(one.result(dtype) for one in parts), strict=True)
        joined.append([None if column[0] is None else np.concatenate(column) for column in columns])
    if not keras.tree.is_nested(found[0]):
        return MonteCarlo(n, *joined[0])
    return MonteCarlo(n, *(keras.tree.pack_sequence_as(found[0], column) for column in zip(*joined, strict=True)))


def _shown(x, batch_size, verbose):
    """The batches, with a bar that moves on."""
    rows = getattr(keras.tree.flatten(x)[0], "shape", None)
    bar = keras.utils.Progbar(-(-rows[0] // batch_size) if rows else None) if verbose else None
    done = 0
    for batch in batches(x, batch_size):
        yield batch
        done += 1
        if bar is not None:
            bar.update(done)
    if bar is not None and not rows:
        bar.update(done, finalize=True)
