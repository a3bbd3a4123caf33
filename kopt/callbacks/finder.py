"""The learning-rate range test as a callback: rates that rise from step to step, the loss after each, and no trace."""

import math
import warnings

import keras
import numpy as np

from kopt import _keras, backends, checks, weights
from kopt._keras import running, stepping
from kopt.callbacks import training
from kopt.callbacks.install import settle
from kopt.callbacks.schedule import Driving
from kopt.range_test import RangeTest
from kopt.schedules.base import Schedule
from kopt.schedules.time import arithmetic, at_most


class Sweep(Schedule):
    """Each step the same factor more, from the one rate to the other."""

    def __init__(self, minimum, maximum, steps):
        self.minimum, self.maximum, self.steps = minimum, maximum, steps
        self.initial = minimum

    def formula(self, time):
        step = at_most(time.units(unit_steps=1), self.steps - 1.0)
        per_step = math.log(self.maximum / self.minimum) / max(self.steps - 1, 1)
        return arithmetic(step).exp(step * per_step)


class LearningRateFinder(Driving):
    """Try learning rates that rise at every step, and keep the loss after each; the training itself leaves no trace.

    `fit` ends when all rates were tried or the loss has exploded. Then the model, its optimizer and metrics and all
    random states are, to the bit, what they were when training began, and `record` is a `kopt.RangeTest`.
    `kopt.find_learning_rate` does the same in one call, also where the data end sooner; there, too, is what the
    arguments mean.

    The callback reads the loss of every batch, so that each is waited for, and resets the metrics before each: what
    Keras logs is the mean over the epoch so far. It is for a `fit` of its own, without other callbacks that drive the
    rate. After a `fit` that was broken off, call `restore()`.

    Args:
        min_learning_rate: The first rate.
        max_learning_rate: The last rate.
        steps: How many rates to try.
        beta: How much the past weighs in the smoothed loss.
        explode: The loss counts as exploded, smoothed, when it has risen by so many times what it was at first.
        verbose: 0 says nothing, 1 shows a bar and the result. `fit(verbose=0)` does not matter.
        name: What the callback is called in messages.

    Example:
        >>> import keras, kopt, numpy as np
        >>> keras.utils.set_random_seed(0)
        >>> x = np.random.normal(size=(1024, 4))
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", loss="mse")
        >>> finder = kopt.callbacks.LearningRateFinder(verbose=0)
        >>> history = model.fit(x, x.sum(1), batch_size=16, epochs=2, verbose=0, callbacks=[finder])
        >>> finder.record.stopped, 0.001 < finder.record.suggestion < 0.3
        ('diverged', True)
    """

    left_behind = (*Driving.left_behind, "_kept", "_bar", "_fit")
    _kept = _bar = _fit = None  # what was there before; the progress bar; the running `fit`

    def __init__(
        self,
        min_learning_rate: float = 1e-7,
        max_learning_rate: float = 10.0,
        steps: int = 100,
        *,
        beta: float = 0.9,
        explode: float = 3.0,
        verbose: int = 1,
        name: str | None = None,
    ):
        super().__init__(name)
        self.min_learning_rate = checks.positive("min_learning_rate", min_learning_rate)
        self.max_learning_rate = checks.positive("max_learning_rate", max_learning_rate)
        if self.max_learning_rate <= self.min_learning_rate:
            allowed = f"greater than `min_learning_rate` ({self.min_learning_rate!r})"
            checks.refuse("max_learning_rate", allowed, max_learning_rate)
        self.steps = checks.count(3)("steps", steps)
        self.beta, self.explode = checks.fraction("beta", beta), checks.positive("explode", explode)
        self.verbose = checks.count(0)("verbose", verbose)
        self.record: RangeTest | None = None
        self._sweep = Sweep(self.min_learning_rate, self.max_learning_rate, self.steps)

    def driven(self, optimizer):
        return {"learning_rate": self._sweep}

    def installed(self, optimizer):
        super().installed(optimizer)
        others = [one for one in self.drives(optimizer)["learning_rate"].schedules if one is not self._sweep]
        if others:
            checks.refuse("callbacks", f"without others that drive the rate beside {self.name}", others)

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._fit = running.Fit(self)
        self._fit.build()
        settle(self.model)
        self._fit.wait_for_batches()
        self._keep()
        self._tried, self._origin = self._sweep.preview(self.steps), self._count()
        self.record, self._losses, self._stopped = None, {}, None  # losses by the updates before them
        self._batches = 0
        shown = ["learning_rate", "loss"]
        self._bar = keras.utils.Progbar(self.steps, stateful_metrics=shown) if self.verbose else None

    def on_train_batch_begin(self, batch, logs=None):
        self.model.reset_metrics()
        self._first, self._before = batch, self._count() - self._origin

    def on_train_batch_end(self, batch, logs=None):
        if "loss" not in (logs or {}):
            checks.refuse("loss", "in what the training step of the model logs", sorted(logs or {}))
        loss, updates = float(logs["loss"]), self._count() - self._origin
        self._batches += batch - self._first + 1
        for before in range(self._before, max(updates, self._before + 1)):  # several with `steps_per_execution`
            self._losses.setdefault(before, []).append(loss)
        record = self._so_far()
        done = len(record.losses)
        if self._bar and done:
            self._bar.update(done, [("learning_rate", record.learning_rates[-1]), ("loss", loss)])
        if not np.isfinite(loss) or record.has_exploded(self.explode):
            self._stopped = "diverged"
        elif updates > self.steps:
            self._stopped = "end"
        if self._stopped:
            self.model.stop_training = True

    def _count(self) -> int:
        """The updates that the optimizer has done: fewer than batches if it accumulates or skips some."""
        return int(_keras.to_numpy(stepping.updating(self.model.optimizer)[0].iterations))

    def _so_far(self) -> RangeTest:
        """The record of the rates that were tried: to each belongs the mean loss of the batches of the next update."""
        losses = [float(np.mean(self._losses[n])) for n in sorted(self._losses) if n <= self.steps] or [math.nan]
        return RangeTest(self._tried[: len(losses) - 1], losses[1:], losses[0], self._stopped or "data", self.beta)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if self._fit.has_run_dry:
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        self.record = self._so_far()
        done = len(self.record.losses)
        is_lent = self._fit.is_generator
        self.restore()
        if self._bar:
            print("\n" * (done < self.steps) + str(self.record))
        if is_lent:
            lent = (
                f"{self.name} has used up {self._batches} batches of the generator; they are gone, as are those that "
                "Keras has read ahead."
            )
            warnings.warn(lent, stacklevel=2)
        if not self._stopped:
            short = f"{self.name} had tried {done} of {self.steps} rates when `fit` or its data ended."
            warnings.warn(short, stacklevel=2)

    def _keep(self) -> None:
        """Remember what the training is going to change."""
        model = self.model
        kept = [*_keras.variables_of(model), *model.metrics_variables]
        kept += [variable for one in _keras.optimizers_of(model) for variable in one.variables]
        self._kept = kept, [backends.copied(variable) for variable in kept], training.random_state()

    def restore(self) -> None:
        """Put everything back as it was when the last `fit` with this callback began."""
        _keras.fetch_state(self._model)
        if self._training:  # `fit` was broken off
            self._training.remove(self)
        if self._kept is None:
            return
        (variables, values, random), self._kept, self._fit = self._kept, None, None
        weights.assign(variables, values)
        training.set_random_state(random)
