"""How a quasi-Newton optimizer stands: in the logs, and its best point in the model whenever somebody looks."""

import contextlib
import warnings

from kopt import _keras, checks
from kopt._keras import running
from kopt.callbacks.base import Callback
from kopt.callbacks.showing import around_keeping, around_validation
from kopt.optimizers.quasi_newton import noise, search
from kopt.optimizers.quasi_newton.optimizer import WHY, QuasiNewton


class LineSearchMonitor(Callback):
    """Follow `kopt.LBFGS` or one of its kin: log its numbers, stop when it has ended, show its best point.

    Each epoch's logs get `accepted_loss`, the loss at the best point, `gradient_norm`, its largest entry there,
    `step_size`, `evaluations`, `iterations` and `status`: 0 while it runs, and otherwise the place of its word in
    `LineSearchMonitor.STATUS`. (`loss` is that of the points that the search tried in the epoch.)

    Between two steps the model has the point that is to be tried next. Validation, and callbacks that keep or save
    weights (`ModelCheckpoint`, `EarlyStopping`, KerasTuner's) are given the best point instead. `BackupAndRestore`
    saves what is there, so that a resumed search goes on to the bit.

    Give it a place before the callbacks that read these logs, and tell them the direction, as in
    `EarlyStopping("accepted_loss", mode="min")`. A point that was tried may have a loss of NaN, at which
    `TerminateOnNaN` would end a search that is well.

    Before the first step it refuses what makes the loss noisy: arrays in several batches, unless `accumulate_steps`
    takes them together, and layers that draw at random; it warns of batch normalization and of a last batch that is
    shorter than the others.

    Args:
        stop_on_convergence: Whether to stop `fit` when the optimizer has ended, for whatever reason.
        verbose: 0 says nothing, 1 why the optimizer has ended. `fit(verbose=0)` is 0.
        name: What the callback is called in a file and in messages.

    Example:
        >>> import keras, kopt, numpy as np
        >>> keras.utils.set_random_seed(0)
        >>> x = np.linspace(-1, 1, 32, dtype="float32")[:, None]
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(kopt.LBFGS(), loss="mse")
        >>> monitor = kopt.callbacks.LineSearchMonitor()
        >>> history = model.fit(x, 2 * x + 1, batch_size=len(x), epochs=99, verbose=0, callbacks=[monitor])
        >>> len(history.history["accepted_loss"]) < 20, model.optimizer.status
        (True, 'gradient')
    """

    STATUS = search.STATUS
    left_behind = (*Callback.left_behind, "_undo")
    _undo = ()  # what takes back what was put in place of methods of the model and of other callbacks

    def __init__(self, stop_on_convergence: bool = True, verbose: int = 1, name: str | None = None):
        super().__init__(name)
        self.stop_on_convergence = checks.boolean("stop_on_convergence", stop_on_convergence)
        self.verbose = checks.count(0)("verbose", verbose)

    @property
    def optimizer(self) -> QuasiNewton:
        """The optimizer that is followed."""
        found = getattr(self.model, "optimizer", None)
        if not isinstance(found, QuasiNewton):
            checks.refuse("optimizer", f"kopt.LBFGS or one of its kin in `compile`, for {self.name}", found)
        return found

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._take_back()
        fit, optimizer = running.Fit(self), self.optimizer
        noise.check_model(self.model, optimizer.name, noise.random_layers(self.model))
        self._check_batches(fit, optimizer.accumulate_steps)
        optimizer.follow()
        optimizer.show("trial" if self._is_single(optimizer.accumulate_steps) else "point")
        keepers = [one for one in fit.callbacks if _keras.keeping_method(one)]
        self._undo = [around_validation(self, self.model, self.best_point)]
        self._undo += [around_keeping(one, self.best_point) for one in keepers]

    def _is_single(self, accumulate_steps) -> bool:
        """Whether this `fit` makes one evaluation only.

        It goes on with the trial, or many of them would look at one point for ever; others begin with the point, and
        see whether its loss is what it was.
        """
        return self.params.get("epochs") == 1 and self.params.get("steps") == (accumulate_steps or 1)

    def _check_batches(self, fit, accumulate_steps) -> None:
        if fit.arrays is None:
            return
        rows, size, shuffled = fit.arrays
        batches = -(-rows // size)
        if batches != (accumulate_steps or 1):
            allowed = f"{rows}, all rows, or `accumulate_steps` the number of batches: {batches}"
            checks.refuse("batch_size", allowed, size)
        if batches > 1 and shuffled:
            checks.refuse("shuffle", "False beside `accumulate_steps`: the same batches make the same loss", True)
        if batches > 1 and rows % size:
            warnings.warn(
                f"The last batch has {rows % size} rows, the others {size}, and counts as much: the loss is the mean "
                f"of the batches' means. A `batch_size` that divides {rows} mends it.",
                stacklevel=2,
            )

    @contextlib.contextmanager
    def best_point(self):
        """A context in which the model has the best point so far, and then again what it had."""
        _keras.fetch_state(self.model)
        optimizer = getattr(self.model, "optimizer", None)  # another one, after a `fit` that was broken off
        at_trial = isinstance(optimizer, QuasiNewton) and optimizer.is_at("trial")
        if at_trial:
            optimizer.show("point")
        try:
            yield
        finally:
            if at_trial:
                _keras.fetch_state(self.model)
                optimizer.show("trial")

    def on_epoch_end(self, epoch, logs=None):
        optimizer = self.optimizer
        if logs is not None:
            logs |= {
                "accepted_loss": optimizer.loss,
                "gradient_norm": optimizer.gradient_norm,
                "step_size": optimizer.step_size,
                "evaluations": optimizer.evaluations,
                "iterations": int(_keras.to_numpy(optimizer.iterations)),
                "status": search.STATUS.index(optimizer.status),
            }
        if optimizer.status != "running" and self.stop_on_convergence:
            self.model.stop_training = True
            if self.verbose and self.params.get("verbose", 1) != 0:
                print(f"\n{self.name}: {optimizer.name} has ended after {optimizer.evaluations} evaluations: "
                      f"{WHY[optimizer.status]}")  # fmt: skip

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        self._take_back()

    def _take_back(self) -> None:
        for undo in self._undo or ():
            undo()
        self._undo = []
