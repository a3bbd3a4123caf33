"""The learning-rate range test in one call."""

import contextlib
import warnings

from kopt import _keras, checks
from kopt._keras import stepping
from kopt.callbacks.finder import LearningRateFinder
from kopt.optimizers.quasi_newton.optimizer import QuasiNewton
from kopt.range_test import RangeTest


def find_learning_rate(
    model,
    x=None,
    y=None,
    *,
    min_learning_rate: float = 1e-7,
    max_learning_rate: float = 10.0,
    steps: int = 100,
    beta: float = 0.9,
    explode: float = 3.0,
    verbose="auto",
    **fit_arguments,
) -> RangeTest:
    """Train with learning rates that rise at every step, and tell which of them make the loss fall.

    The model is trained from where it stands, with the optimizer, loss and step of `compile`, until the last rate was
    tried or the loss has exploded. Then everything is put back to the bit: weights, statistics, the optimizer with its
    slots, count and rate, metrics, random states. An optimizer that was not built is not built afterwards; a model that
    was not built is. A second call finds the same. What cannot be put back are batches that a generator has lent, of
    which a warning tells, and the place of a `tf.data.Dataset` in its own shuffling.

    A suggestion is a place to begin: it comes from one short run, and a rate that is good for a hundred steps can be
    too high for a long training without a schedule. `kopt.tuner.LearningRateSearch` tries rates in earnest.

    Args:
        model: A compiled model. Its learning rate may be a schedule, whose place the rising rate takes.
        x: The inputs, or any data that `fit` takes.
        y: The targets.
        min_learning_rate: The first rate.
        max_learning_rate: The last rate.
        steps: How many rates to try, one for each update.
        beta: How much the past weighs in the smoothed loss, in [0, 1).
        explode: The loss counts as exploded when, smoothed, it has risen from its lowest by so many times what it was
            at first, or what it has fallen by if that is more.
        verbose: 0 says nothing, 1 or "auto" shows a bar and the result.
        **fit_arguments: Others of `fit`: `batch_size`, `sample_weight`, `class_weight`, `shuffle`, `steps_per_epoch`.

    Returns:
        A `kopt.RangeTest`; its `suggestion` is None if the loss has not fallen. `kopt.plot.rate_range` draws it.

    Example:
        >>> import keras, kopt, numpy as np
        >>> keras.utils.set_random_seed(0)
        >>> x = np.random.normal(size=(1024, 4))
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", loss="mse")
        >>> found = kopt.find_learning_rate(model, x, x.sum(1), batch_size=16, verbose=0)
        >>> 0.001 < found.suggestion < found.diverged_at
        True
    """
    if not getattr(model, "compiled", False) or getattr(model, "optimizer", None) is None:
        checks.refuse("model", "a compiled model, with an optimizer", model)
    if isinstance(model.optimizer, QuasiNewton):
        checks.refuse("model", "compiled with an optimizer that has a learning rate", model.optimizer)
    for name in ("epochs", "initial_epoch", "callbacks", "validation_data", "validation_split"):
        if name in fit_arguments:
            checks.refuse(name, "left out: a range test is one short training without them", fit_arguments[name])
    if verbose not in ("auto", 0, 1, 2):
        checks.refuse("verbose", "'auto', 0, 1 or 2", verbose)
    shown = 1 if verbose == "auto" else int(verbose)
    given = {"beta": beta, "explode": explode, "verbose": shown, "name": "find_learning_rate"}
    finder = LearningRateFinder(min_learning_rate, max_learning_rate, steps, **given)
    window = max(one.gradient_accumulation_steps or 1 for one in stepping.nested(model.optimizer))
    epochs = 2 * (finder.steps + 1) * window  # enough, of one batch each, even if some updates are skipped
    with _as_it_was(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Your input ran out of data")
        warnings.filterwarnings("ignore", "`shuffle=True` was passed")  # which nobody has
        try:
            model.fit(x, y, epochs=epochs, verbose=0, callbacks=[finder], **fit_arguments)
        finally:
            finder.restore()
    return finder.record


@contextlib.contextmanager
def _as_it_was(model):
    """Let a model have, after another `fit`, the history and the flag of the last one, and an unbuilt optimizer."""
    names = "history", "stop_training"
    kept = {name: getattr(model, name) for name in names if hasattr(model, name)}
    optimizer, twin = model.optimizer, None
    if not getattr(optimizer, "built", True):
        # where no config can make one, the optimizer itself is built
        with contextlib.suppress(Exception), stepping.where_made(optimizer):
            twin = type(optimizer).from_config(optimizer.get_config())
    if twin is not None:
        _keras.exchange_optimizer(model, twin)
    try:
        yield
    finally:
        if twin is not None:
            _keras.exchange_optimizer(model, optimizer)
        for name in names:
            if name in kept:
                setattr(model, name, kept[name])
            elif hasattr(model, name):
                delattr(model, name)
