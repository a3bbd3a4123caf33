"""Training that was killed and started again ends where it would have ended."""

import dataclasses
import os
import random
import time
import warnings

import keras

from kopt import _keras, checks, manifest
from kopt._keras import running
from kopt.callbacks import stock, training
from kopt.callbacks.base import Callback
from kopt.callbacks.install import settle
from kopt.store import Store

NOT_SEEKABLE = (
    "the data cannot be put at a position (`kopt.data.seekable` tells how it could; it wants `num_batches` where the "
    "length is not known)"
)
COMPLETED: set[str] = set()  # the directories of the trainings that have ended in this process
IN_A_ROW = 3  # saves that may fail one after the other with `on_save_error="warn"`


@dataclasses.dataclass
class Run:
    """The `fit` that is running."""

    fit: running.Fit
    store: Store
    seed: int  # of the order of arrays
    feed: running.Feed | None = None  # the data, if it can be put at a position
    tree: dict | None = None  # to go on from, until the first batch
    sought: bool = False  # whether the data was put at its position
    epoch: int = 0  # this one
    before: int = 0  # steps done in earlier epochs
    step: int = 0  # steps done in this one
    saved: int = 0  # steps done at the last save, or the last that failed
    failed: int = 0  # saves that failed in a row
    constants: list[str] = dataclasses.field(default_factory=list)  # weights not finite before training: masks


class BackupAndRestore(Callback):
    """Save everything that training consists of, and go on from there when the program is started again.

    A program that was killed, at any moment, and started again ends with the same weights, optimizer, history and
    callbacks as one that was not, to the bit, on the same machine and versions. Saved are the weights and other
    variables of the model, the optimizer, metrics, the random states of Keras (`SeedGenerator`s of layers and losses),
    Python, NumPy and the backend, the position in the data, and the state of callbacks: Keras's own that have one,
    kopt's, and any with `get_state()` and `set_state(state)`. The program must build the same model and callbacks anew.

    When `fit` is over the last state stays: a second run of the program finds the training complete, and with more
    `epochs` goes on. Use one directory for one run. A callback that is given to several `fit`s, one after the other,
    saves the later ones in `fit-2`, `fit-3`, ... of its directory. Another callback in the same process is refused a
    directory where a training has been completed. What a callback has stopped by `stop_training` stays stopped; to end
    for a time limit and go on later, raise `KeyboardInterrupt` instead.

    What it cannot see it cannot save: what a function given to `LambdaCallback` or `LearningRateScheduler` remembers,
    and files that other callbacks write (`CSVLogger` needs `append=True` to go on). An optimizer beside the compiled
    one, for a `train_step` of your own, is saved if the model holds it in an attribute; build it before `fit`.

    Data: arrays, shuffled or not, and `kopt.data.seekable(...)` go on at the very batch. Other data goes on at the
    beginning of an epoch, and what is random in it is not what it would have been. Arrays are shuffled by kopt while
    this callback is there: the order follows from a seed and the number of the epoch. (Keras on TensorFlow, once seeds
    are set, has the same order in every epoch.) Randomness of TensorFlow's own stateful operations (`tf.random.uniform`
    in a layer) has no state that could be saved; `keras.random` with a `SeedGenerator` has.

    Args:
        directory: Where to save. What is not kopt's in it is left alone. One process at a time may use it.
        save_every_epochs: Save when so many epochs have ended; None for no such saves. The last epoch is always saved.
        save_every_steps: Also save each time so many steps (batches) are done, counted through all epochs. With
            `steps_per_execution` the next moment at which Keras can. A save waits for the device; without it, batches
            are not waited for. Where the data cannot be put at a position, the save is left to the end of the epoch.
        keep: How many saves to keep. The last but one takes over if the last is damaged.
        on_save_error: "raise" ends training when a save fails, for instance because the disk is full; "warn" warns, and
            raises when three fail in a row. Earlier saves stay as they are.
        delete_checkpoint: Whether to delete the saves when `fit` is over, as Keras does.
        verbose: 0 says nothing, 1 where training goes on and what cannot be exact, 2 each save. `fit(verbose=0)` is 0.

    Example:

    >>> import keras, kopt, numpy as np, tempfile
    >>> x, y = np.ones((64, 4)), np.zeros((64, 1))
    >>> def train(epochs):
    ...     keras.utils.set_random_seed(0)
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     model.compile(kopt.Adam(0.01), loss="mse")
    ...     backup = kopt.callbacks.BackupAndRestore(directory, verbose=0)
    ...     return model.fit(x, y, epochs=epochs, callbacks=[backup], verbose=0)
    >>> directory = tempfile.mkdtemp()
    >>> len(train(epochs=2).history["loss"])
    2
    >>> len(train(epochs=5).history["loss"])  # the first two come from the backup
    5
    """

    left_behind = (*Callback.left_behind, "run")

    def __init__(
        self,
        directory,
        save_every_epochs=1,
        save_every_steps=None,
        keep=2,
        on_save_error="raise",
        delete_checkpoint=False,
        verbose=1,
    ):
        super().__init__()
        self.directory = os.path.abspath(checks.path("directory", directory))
        self.save_every_epochs = checks.optional(checks.count(1))("save_every_epochs", save_every_epochs)
        self.save_every_steps = checks.optional(checks.count(1))("save_every_steps", save_every_steps)
        if save_every_epochs is None and save_every_steps is None:
            checks.refuse("save_every_epochs", "given without `save_every_steps`", None)
        self.keep = checks.count(1)("keep", keep)
        self.on_save_error = checks.one_of("raise", "warn")("on_save_error", on_save_error)
        self.delete_checkpoint = checks.boolean("delete_checkpoint", delete_checkpoint)
        self.verbose = checks.count(0)("verbose", verbose)
        self.ends: list[int] = []  # the last epochs of the `fit`s that this callback has seen to their end
        self.run = None  # what belongs to the running `fit`
        self.async_safe = save_every_steps is None  # let JAX go on while the hook of a batch, which does nothing, runs

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        fit = running.Fit(self)
        self._check(fit)
        if not fit.move_last(self):
            return  # and be called again, after all others
        fit.build()
        settle(self.model)
        store = self.run.store if self.run else Store(self._place(), self.keep)
        store.open()
        self.run = Run(fit, store, random.randrange(2**31), constants=training.nonfinite(training.weights(self.model)))
        tree = self._loaded(store)
        if tree:
            self.run.seed = tree["data"]["seed"]
        self.run.feed = fit.feed(self.run.seed)
        if self.save_every_steps:
            fit.wait_for_batches()
        for limit in self._limits(fit):
            self._say(limit)
        manifest.encode(training.states(fit.callbacks), ("callbacks",), {})  # what cannot be saved is refused now
        if tree:
            self._resume(tree)

    def _loaded(self, store) -> dict | None:
        loaded = store.load(lambda arrays: training.expect(self.model, arrays))
        if loaded and loaded.tree["after"] != self.ends:
            self._say("begins anew: the `fit` before this one ended at another epoch than it did then")
            return None
        return loaded and loaded.tree

    def _limits(self, fit) -> list[str]:
        """What cannot be as it should, in words."""
        found = stock.limits(fit.callbacks)
        if self.save_every_steps and self.run.feed is None:
            found.append(f"saves when epochs end: {NOT_SEEKABLE}")
        if late := [optimizer.name for optimizer in _keras.optimizers_of(self.model) if not optimizer.built]:
            found.append(f"cannot be exact to the last bit unless {', '.join(late)} is built before `fit`")
        return found

    def _check(self, fit):
        model = self.model
        if getattr(model, "optimizer", None) is None:
            raise ValueError("`BackupAndRestore` needs a model that was compiled with an optimizer.")
        rivals = [c for c in fit.callbacks if isinstance(c, (BackupAndRestore, keras.callbacks.BackupAndRestore))]
        if len(rivals) > 1:
            checks.refuse("callbacks", "a list with one that backs up and restores", rivals)
        if fit.is_inner:
            checks.refuse("callbacks", "others than those of the `fit` around this one", self)

    def _shown(self) -> str:
        """What a message calls the directory."""
        return self.run.store.directory

    def _place(self) -> str:
        """The directory of this `fit`: each has its own, so that a program of several finds the end of each again."""
        return os.path.join(self.directory, f"fit-{len(self.ends) + 1}") if self.ends else self.directory

    def _resume(self, tree) -> None:
        """Go on from a backup: at once, and again after the hooks that begin an epoch if it was made within one."""
        run, epochs = self.run, self.params["epochs"]
        self._check_position(tree)
        training.restore(self.model, run.fit.callbacks, tree)
        run.epoch, run.step, run.before = tree["epoch"], tree["step"], tree["before"]
        run.saved = run.before + run.step
        where = f"{run.store.directory} (saved {tree['time']})"
        if tree["stopped"] or run.epoch >= epochs:
            if run.store.directory in COMPLETED:
                allowed = "another one for another training: in this process, one has been completed there"
                checks.refuse("directory", allowed, self._shown())
            how = "had been stopped" if tree["stopped"] else "was complete"
            self._say(f"training {how} after epoch {run.epoch} of {epochs}; nothing to do. From {where}")
            run.fit.start_at(epochs)
            return
        batch = f", batch {run.step + 1} of {run.fit.num_batches}" if run.step else ""
        inexact = f". The data begins anew, and what is random in it is not what it would have been: {NOT_SEEKABLE}"
        self._say(f"goes on at epoch {run.epoch + 1} of {epochs}{batch}, from {where}{'' if run.feed else inexact}")
        run.fit.start_at(run.epoch)
        run.tree = tree
        run.sought = bool(run.feed and tree["data"]["position"])
        if run.sought:
            run.feed.seek(tree["data"]["position"], run.step, self._settle)

    def _check_position(self, tree) -> None:
        step, batches, spe = tree["step"], self.run.fit.num_batches, self.model.steps_per_execution
        if step and self.run.feed is None:
            raise ValueError(f"The backup is of batch {step} of an epoch, but {NOT_SEEKABLE}.")
        if (step or (tree["data"]["position"] or [0, 0])[1]) and tree["data"]["batches"] != batches:
            was = tree["data"]["batches"]
            raise ValueError(f"The backup is of batch {step} of {was}, but an epoch of this data has {batches}.")
        if step and step % spe:
            checks.refuse("steps_per_execution", f"a divisor of {step}, the batch of the backup", spe)

    def _settle(self) -> None:
        """Just before the first batch: what the hooks that begin an epoch did, they had done when it was saved."""
        tree, self.run.tree = self.run.tree, None
        if tree and tree["step"]:
            training.restore(self.model, self.run.fit.callbacks, tree)

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        run = self.run
        if run.tree:
            if epoch != run.tree["epoch"]:
                there = run.tree["epoch"]
                raise RuntimeError(f"`fit` begins at epoch {epoch}, but the backup goes on at epoch {there}.")
            if not run.sought:
                run.tree = None
        else:
            run.step = 0
        run.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.save_every_steps is None:
            return
        run, batches = self.run, self.run.fit.num_batches
        run.step = min(batch + 1, batches or batch + 1)
        if run.feed and run.step != batches and self._is_due() and not self.model.stop_training:
            self._save(run.epoch, run.step)  # where the epoch ends, its end saves

    def _is_due(self) -> bool:
        done, every = self.run.before + self.run.step, self.save_every_steps
        return every is not None and done // every > self.run.saved // every

    def ends_interval(self, epoch) -> bool:
        """Whether to save at the end of this epoch."""
        return bool(self.save_every_epochs) and (epoch + 1) % self.save_every_epochs == 0

    def on_epoch_end(self, epoch, logs=None):
        run, stopped = self.run, self.model.stop_training
        due = self._is_due() or self.ends_interval(epoch) or stopped or epoch + 1 >= self.params["epochs"]
        run.before, run.step = run.before + run.step, 0
        if due:
            self._save(epoch + 1, 0, stopped)

    def _save(self, epoch, step, stopped=False) -> None:
        run = self.run
        run.saved = run.before + run.step
        tree = training.collect(self.model, run.fit.callbacks, within_epoch=bool(step)) | {
            "epoch": epoch,
            "step": step,
            "before": run.before,
            "stopped": bool(stopped),
            "after": self.ends,
            "data": {
                "seed": run.seed,
                "batches": run.fit.num_batches,
                "position": run.feed.position(ended=not step) if run.feed else None,
            },
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        if bad := [name.split(":", 1)[1] for name in training.nonfinite(tree["weights"]) if name not in run.constants]:
            warnings.warn(f"Not saved at epoch {epoch}, step {step}: {', '.join(bad[:3])} not finite.", stacklevel=2)
            return
        try:
            number = run.store.save(tree)
        except OSError as error:
            run.failed += 1
            if self.on_save_error == "raise" or run.failed >= IN_A_ROW:
                raise
            warnings.warn(f"Not saved at epoch {epoch}, step {step}: {error}", stacklevel=2)
            return
        run.failed = 0
        self._say(f"saved epoch {epoch}, step {step} as {number} in {run.store.directory}", 2)

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        run, self.run = self.run, None
        self.ends.append(run.epoch)
        COMPLETED.add(run.store.directory)
        if run.feed:
            run.feed.end()
        try:
            if self.delete_checkpoint:
                run.store.clear()
        finally:
            run.store.close()

    def _say(self, text, least=1) -> None:
        if self.verbose >= least and self.params.get("verbose", 1) != 0:
            print(f"BackupAndRestore {text}")
