"""Snapshot ensembles: one training that comes to rest several times, and a model of each rest."""

import contextlib
import functools
import itertools
import math
import operator
import os
import warnings

import keras
import numpy as np

from kopt import _keras, batch_norm, checks, ensemble, schedules, scores, weights
from kopt._keras import running, stepping
from kopt.batches import check_batches, pairs
from kopt.callbacks import drive, report
from kopt.callbacks.backup import BackupAndRestore
from kopt.callbacks.polyak import PolyakAveraging
from kopt.callbacks.schedule import Driving
from kopt.callbacks.shelf import DTYPES, Shelf


class SnapshotEnsemble(Driving):
    """Let the learning rate fall to its lowest several times in one `fit`, and keep the model each time: an ensemble.

        rate(t) = low + (high - low) / 2 * (cos(pi * t / T) + 1),       t steps into a cycle of T

    At the end of each cycle, before the rate jumps up again, the weights are kept: a snapshot. `ensemble` is one
    `keras.Model` that predicts the mean of what all of them predict. The rate is that of every step, in the compiled
    step. Cycles end with epochs; what is left of `epochs / cycles` makes the first ones an epoch longer.

    When to use it: where the gradients are noisy to the end (noisy labels, augmentation, small batches), so that what
    each cycle comes to is different, and cycles are long enough to come to rest. On small clean data, or with cycles
    that are too short, a single training with one long decay is as good, or better; what is printed helps to tell.

    Beside others: what multiplies the rate (`kopt.callbacks.WarmUp`) does so here, too; whatever else gives it a value
    of its own is refused. With `PolyakAveraging(on_train_end="averaged")` the snapshots are those of the averages.
    `EarlyStopping` ends the training in the middle of a cycle, which then has no snapshot. After the training the model
    has the weights of its last step.

    With a `directory`, snapshots lie in it, and a program that was killed and is started again goes on from the last
    one, to the bit, as with `BackupAndRestore`, which does it (and puts arrays in an order of its own): its state is in
    `training` there. To go on from a later moment, give `fit` a `kopt.callbacks.BackupAndRestore` of your own. A second
    `fit` has a directory of its own in there, `fit-2`. In a search of KerasTuner, give no directory: all trials would
    share it.

    Attributes:
        snapshots_: What there is: a dict for each with `cycle`, `epoch` (how many were done) and `learning_rate`.
        results_: What the validation data say, a dict for each output: the scores of the `members`, of the `ensemble`
            and of the first ones together (`so_far`), the `differences` between any two members, and more.
            `kopt.plot.snapshots` draws them.

    Args:
        cycles: How many; as many snapshots.
        max_learning_rate: The rate at the beginning of each cycle. None: the optimizer's own. For SGD on images 0.1 or
            0.2 is usual; what is best for a single training may be too low.
        min_learning_rate: What the rate falls to.
        cycle_mult: How many times longer each cycle is than the one before.
        topology: "sequential": each cycle begins where the last one has ended. "star": at the first snapshot (StarSSE),
            for fine-tuning, where members should not get far from what was pre-trained.
        storage: Where snapshots are until they are used: "ram", "disk", or "auto": in memory, unless all together take
            more than a quarter of what is free. On disk without a `directory` they are in a temporary one.
        directory: Where snapshots lie for good, and the state of the training.
        dtype: "float32": as they are. "float16" or "bfloat16": matrices take half the memory; vectors, such as the
            statistics of batch normalization, what float16 cannot hold, and what a star begins at stay as they are.
        validation_data: What snapshots and ensemble are judged on, without sample weights; by default all of that of
            `fit`. What each snapshot predicts on it stays in memory.
        verbose: 0 says nothing, 1 what each snapshot and the ensemble so far are worth, and a table in the end.
        combine: What the outputs are, as for `kopt.Ensemble`.
        on_save_error: "raise" ends the training when a snapshot cannot be written, for instance because the disk is
            full; "warn" warns and keeps it in memory. Earlier ones stay as they are.
        name: What the callback is called in a file and in messages.

    Example:
        >>> import keras, kopt, numpy as np
        >>> keras.utils.set_random_seed(0)
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, activation="softmax")])
        >>> model.compile(kopt.SGD(0.5), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        >>> x = np.random.default_rng(0).normal(size=(64, 2))
        >>> y = (x.sum(1) > 0).astype(int)
        >>> snap = kopt.callbacks.SnapshotEnsemble(cycles=2, verbose=0)
        >>> history = model.fit(x, y, epochs=5, batch_size=8, verbose=0, callbacks=[snap])
        >>> [snapshot["epoch"] for snapshot in snap.snapshots_]
        [3, 5]
        >>> snap.ensemble.predict(x, verbose=0).shape
        (64, 2)

    Reference: Huang et al., "Snapshot ensembles: train 1, get M for free", ICLR 2017. Sadrtdinov et al., "To stay or
    not to stay in the pre-train basin", NeurIPS 2023.
    """

    left_behind = (
        *Driving.left_behind, "_trained", "_shelf", "_backup", "_report", "_averaging", "_made", "_ways", "_unjudged",
    )  # fmt: skip
    shared = ("validation_data",)
    _trained = _shelf = _backup = _report = _averaging = _made = _ways = _unjudged = None

    def __init__(
        self,
        cycles: int = 5,
        max_learning_rate: float | None = None,
        min_learning_rate: float = 0.0,
        cycle_mult: float = 1.0,
        topology: str = "sequential",
        storage: str = "auto",
        directory=None,
        dtype: str = "float32",
        validation_data=None,
        verbose: int = 1,
        combine="auto",
        on_save_error: str = "raise",
        name: str | None = None,
    ):
        super().__init__(name)
        self.cycles = checks.count(1)("cycles", cycles)
        self.max_learning_rate = checks.optional(checks.positive)("max_learning_rate", max_learning_rate)
        self.min_learning_rate = checks.nonnegative("min_learning_rate", min_learning_rate)
        if max_learning_rate is not None and self.min_learning_rate >= self.max_learning_rate:
            allowed = f"below `max_learning_rate`, which is {self.max_learning_rate:g}"
            checks.refuse("min_learning_rate", allowed, min_learning_rate)
        self.cycle_mult = checks.positive("cycle_mult", cycle_mult)
        self.topology = checks.one_of("sequential", "star")("topology", topology)
        self.storage = checks.one_of("auto", "ram", "disk")("storage", storage)
        directory = checks.optional(checks.path)("directory", directory)
        self.directory = None if directory is None else os.path.abspath(directory)
        self.dtype = checks.one_of(*DTYPES)("dtype", dtype)
        is_given = validation_data is not None
        self.validation_data = check_batches("validation_data", validation_data, True) if is_given else None
        self.verbose = checks.count(0)("verbose", verbose)
        self.combine = ensemble.check_combine("combine", combine)
        self.on_save_error = checks.one_of("raise", "warn")("on_save_error", on_save_error)
        self.fits: list[int] = []  # after how many epochs each `fit` has ended

    # In the step

    def prepare(self, model):
        super().prepare(model)
        epochs = (self.params or {}).get("epochs") or 0
        if epochs < self.cycles:
            checks.refuse("cycles", f"at most the epochs of `fit`, which are {epochs}", self.cycles)
        if not ((self.params or {}).get("steps") or 0) > 0:
            allowed = "given where the data do not say how many batches an epoch has"
            checks.refuse("steps_per_epoch", allowed, None)
        self._trained, self._made = model, None
        self._ways = ensemble.resolved(self.combine, model)

    @property
    def lengths(self) -> list[int]:
        """How many epochs each cycle of the running `fit` has."""
        return split(self.params["epochs"], self.cycles, self.cycle_mult)

    @property
    def ends(self) -> list[int]:
        """How many epochs are done when a cycle ends."""
        return list(itertools.accumulate(self.lengths))

    def driven(self, optimizer):
        high = self.max_learning_rate
        if high is None:
            if not isinstance(stepping.rate_source(optimizer), keras.Variable):
                checks.refuse("max_learning_rate", "given where the optimizer's own rate is a schedule", None)
            high = drive.own_rate(optimizer)
        if self.min_learning_rate >= high:
            allowed = f"below the rate at the beginning of a cycle, which is {high:g}"
            checks.refuse("min_learning_rate", allowed, self.min_learning_rate)
        return {"learning_rate": waves(self.lengths, high, self.min_learning_rate)}

    # Beside others in a fit

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        fit = running.Fit(self)
        try:
            self._check_list(fit.callbacks)
            self._begin(fit)
        except BaseException:
            self.let_go()
            self._training.clear()
            raise

    def _check_list(self, listed) -> None:
        theirs = [one for one in listed if isinstance(one, keras.callbacks.LearningRateScheduler)]
        if theirs:
            allowed = f"without another that gives the learning rate a value of its own, beside {self.name}"
            checks.refuse("callbacks", allowed, [type(one).__name__ for one in theirs])
        averaging = [one for one in listed if isinstance(one, PolyakAveraging) and one.at_end == "averaged"]
        self._averaging = averaging[0] if averaging else None

    def _begin(self, fit) -> None:
        place = self.directory
        if place is not None and self.fits:
            place = os.path.join(place, f"fit-{len(self.fits) + 1}")
        if place is not None and any(isinstance(one, keras.callbacks.BackupAndRestore) for one in fit.callbacks):
            allowed = f"with `kopt.callbacks.BackupAndRestore`, or none, beside {self.name} with a `directory`"
            checks.refuse("callbacks", allowed, "keras.callbacks.BackupAndRestore")
        self._shelf = Shelf(self.storage, place, self.cycles, self.dtype, self.on_save_error)
        self._report = self._reporter(fit.validation_data)
        backs_up = any(isinstance(one, BackupAndRestore) for one in fit.callbacks)
        if place is not None and fit.callbacks and not backs_up:
            backup = AtCycles(os.path.join(place, "training"), self)
            backup.set_params(self.params)
            backup.set_model(self._model)
            fit.callbacks.append(backup)  # Keras, which goes through the list, comes to it as the last

    def _reporter(self, of_fit):
        """What judges the snapshots, if there are data for it."""
        name, data = "validation_data", self.validation_data
        try:
            if data is None and of_fit is not None:
                data = check_batches(name, of_fit, True)
            found = None if data is None else report.Report(self._trained, self._ways, data)
            if found and self._trained.built:
                found.check()
        except (ValueError, TypeError, IndexError) as error:
            if self.validation_data is not None:
                raise ValueError(f"`{name}` must be such that outputs can be judged by it: {error}") from error
            self._unjudged = f"the validation data of `fit` cannot judge the snapshots: {error}"
            self._say(self._unjudged)
            return None
        self._unjudged = "`fit` had no `validation_data`" if found is None else None
        return found

    def on_epoch_begin(self, epoch, logs=None):
        is_first = self._epoch is None
        super().on_epoch_begin(epoch, logs)
        if not len(self._shelf) and len(found := self._shelf.strangers()) >= max(2, self.cycles):
            allowed = f"another one, or empty: {len(found)} snapshots lie there that no backup here goes on from"
            checks.refuse("directory", allowed, self._shelf.directory)
        missing = sum(end <= epoch for end in self.ends) - len(self._shelf)
        if is_first and missing:
            why = f"`fit` begins at epoch {epoch + 1} of {self.ends[-1]}, over which the cycles are laid"
            warnings.warn(f"{self.name} will lack the first {missing} of {self.cycles} snapshots: {why}.", stacklevel=2)
        if self.topology == "star" and epoch in self.ends and len(self._shelf):
            self._begin_at(self._shelf.get(0))

    def _begin_at(self, arrays) -> None:
        """Let the training go on from the first snapshot: the weights, and what the optimizer had then."""
        variables, slots = self._trained.variables, _slots(self._trained)
        for variable, array in zip([*variables, *slots], arrays, strict=True):
            if "float" in _keras.dtype_of(variable):  # not the states of random generators, which would repeat
                variable.assign(array.astype(_keras.dtype_of(variable)))

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if epoch + 1 in self.ends:
            self._take(epoch + 1)

    def _take(self, epoch) -> None:
        model = self.model  # which lets the variables have their values, on JAX
        first = stepping.updating(model.optimizer)[0]
        rate = drive.read(self.drives(first)["learning_rate"].last)
        averaging = self._averaging if self._averaging is not None and self._averaging.updates_ else None
        with averaging.applied() if averaging else contextlib.nullcontext():
            arrays = weights.arrays(model.variables)
        is_center = self.topology == "star" and not len(self._shelf)
        if is_center:
            arrays += weights.arrays(_slots(model))
        record = {"cycle": self.ends.index(epoch) + 1, "epoch": epoch, "learning_rate": rate}
        self._shelf.put(record, arrays, as_they_are=is_center)
        self._made = None
        found = self._judged()
        said = "".join(f"; {report.line(one)}" for one in found)
        lines = [f"cycle {record['cycle']} of {self.cycles}, epoch {epoch}, rate {rate:.2g}{said}"]
        for one in found:
            lines += report.verdict(one, self.snapshots_)
        self._say("\n".join(lines), True)

    def on_train_end(self, logs=None):
        was_begun = self._begun
        super().on_train_end(logs)
        if not was_begun:
            return
        self.fits.append(0 if self._epoch is None else self._epoch + 1)
        if not len(self._shelf):
            done = "`fit` had no epoch to do" if self._epoch is None else f"`fit` ended after epoch {self.fits[-1]}"
            ended = f"{done}, before the first cycle, at {self.ends[0]}"
            warnings.warn(f"{self.name} has taken no snapshot: {ended}.", stacklevel=2)
            return
        found = self._judged()
        self._say(self._table(found))
        for text in (text for one in found for text in report.warnings_of(one)):
            warnings.warn(text, stacklevel=2)

    def let_go(self):
        if self._shelf is not None:
            self._shelf.close()

    def get_state(self):
        taken = self._shelf.state() if self._shelf else []
        return {"snapshots": taken, "epoch": self._epoch, "ends": self.ends if self.params else []}

    def set_state(self, state):
        if state["ends"] != self.ends:
            allowed = f"such that cycles end after epochs {state['ends']}, as in the backup, and not after {self.ends}"
            checks.refuse("cycles", allowed, self.cycles)
        self._shelf.restore(state["snapshots"])
        self._epoch = state["epoch"]

    def _say(self, text, in_epoch=False) -> None:
        shown = (self.params or {}).get("verbose", 1)
        if self.verbose and shown != 0:
            print("\n" * (in_epoch and shown == 1) + f"{self.name}: {text}")  # not on the line of the progress bar

    # What there is

    @property
    def snapshots_(self) -> list[dict]:
        records = self._shelf.records if self._shelf else []
        return [{name: value for name, value in record.items() if name != "weights"} for record in records]

    @property
    def results_(self) -> list[dict]:
        self._check_any()
        return self._results()

    def _check_any(self) -> None:
        if not self._shelf or not len(self._shelf):
            raise RuntimeError(f"{self.name} has taken no snapshot yet: it does when a cycle of `fit` has ended")

    def _results(self) -> list[dict]:
        if self._report is None:
            return []
        while len(self._report.members) < len(self._shelf):
            with self._holding(len(self._report.members)):
                self._report.see()
        return self._report.results()

    def _judged(self) -> list[dict]:
        """The same within a `fit`, which goes on if it cannot be said."""
        try:
            return self._results()
        except Exception as error:
            warnings.warn(f"{self.name} cannot judge the snapshots: {error!r}", stacklevel=2)
            self._report = None
            return []

    @contextlib.contextmanager
    def _holding(self, i):
        """A context in which the model has the weights of a snapshot."""
        variables = self._trained.variables
        with weights.keeping(self._trained, variables):
            weights.assign(variables, self._weights(i, variables))
            yield

    def _weights(self, i, variables) -> list:
        """The weights of a snapshot, in the types of the variables that they are for."""
        arrays = self._shelf.get(i)[: len(variables)]
        shapes, here = ([tuple(one.shape) for one in side] for side in (arrays, variables))
        if shapes != here:
            allowed = f"a model with the variables of the one that was trained: {shapes}, not {here}"
            raise ValueError(f"A snapshot cannot be put into the model, which must be {allowed}.")
        return [array.astype(_keras.dtype_of(one)) for array, one in zip(arrays, variables, strict=True)]

    def summary(self) -> None:
        """Print what the validation data say of each snapshot and of all together."""
        print(f"{self.name}: {self._table(self.results_)}")

    def _table(self, found) -> str:
        count = len(self._shelf)
        lines = [line for one in found for line in report.table(one, self.snapshots_)]
        without = [f"  cycle {one['cycle']}, epoch {one['epoch']}" for one in self.snapshots_]
        return "\n".join([f"{count} snapshot{'s' * (count > 1)}", *(lines or without)])

    # What is made of it

    @property
    def ensemble(self) -> ensemble.Ensemble:
        """All snapshots as one model."""
        if self._made is None:
            self._made = self.build()
        return self._made

    def build(self, last: int | None = None, select: str | None = None, temperature: str | None = None, data=None):
        """An ensemble of some of the snapshots, as one model.

        Args:
            last: Only so many, from the end.
            select: "greedy": those, and as often, that together have the least loss on the data, the negative
                log-likelihood or the mean square (Caruana et al., 2004).
            temperature: "fit": the one with the least negative log-likelihood on the data.
            data: As for `evaluate`; by default what snapshots are validated on.
        """
        judged_on = self._checked(last, select, temperature, data)
        places = range(len(self._shelf))[-(last or 0) :]
        made = self._ensemble([self._copy(i) for i in places])
        if not (select or temperature):
            return made
        names = ensemble.names_of(self._trained)
        batches = pairs(judged_on, report.ROWS)
        members, targets = report.predicted(made.side_by_side(), batches, names)
        members = [np.swapaxes(one, 0, 1) for one in members]
        judges, members = zip(*report.judged(self._trained, made.combine, members, targets), strict=True)
        counts = scores.chosen(members, judges) if select else [1] * len(made.models)
        if not counts:
            checks.refuse("select", "None where no snapshot has a finite loss on the data, or no row counts", select)
        fitted = None
        if temperature:
            means = [np.average(one, axis=0, weights=counts) for one in members]
            fitted = [
                judge.temperature(mean) if judge and isinstance(judge, scores.Classes) else None
                for judge, mean in zip(judges, means, strict=True)
            ]
        taken = [(model, count) for model, count in zip(made.models, counts, strict=True) if count]
        models, counts = zip(*taken, strict=True)
        return self._ensemble(list(models), counts, fitted)

    def _ensemble(self, models, counts=None, temperature=None):
        combine = self._ways
        if temperature and not isinstance(combine, list):
            (temperature,) = temperature
        made = ensemble.Ensemble(models, combine=combine, weights=counts, temperature=temperature)
        if self._trained.compiled:
            _keras.compile_like(made, self._trained, but=("optimizer",))
        return made

    def _checked(self, last, select, temperature, data):
        """The data to judge on, if there is anything to judge."""
        self._check_any()
        checks.optional(checks.count(1))("last", last)
        if last is not None and last > len(self._shelf):
            checks.refuse("last", f"at most the number of snapshots, which is {len(self._shelf)}", last)
        checks.optional(checks.one_of("greedy"))("select", select)
        checks.optional(checks.one_of("fit"))("temperature", temperature)
        if temperature and set(self._ways if isinstance(self._ways, list) else [self._ways]) == {"mean"}:
            checks.refuse("temperature", "None where the outputs are numbers", temperature)
        if data is not None and not (select or temperature):
            checks.refuse("data", "given for `select` or `temperature` only", data)
        if data is not None:
            return check_batches("data", data, True)
        if (select or temperature) and self._report is None:
            why = "`select`" if select else "`temperature`"
            checks.refuse("data", f"given for {why}, as {self._unjudged}", None)
        return self._report and self._report.data

    def _copy(self, i):
        """A model of its own with the weights of a snapshot."""
        with self._holding(i):
            return weights.copy_of(self._trained, compiled=False)

    def soup(self, last: int | None = None, update_bn=None) -> keras.Model:
        """One model with the mean of the weights of all snapshots, which costs no more than one of them to run.

        It is as good as the ensemble where the snapshots lie in one valley, as in fine-tuning, and worse than any of
        them where they do not.

        Args:
            last: Only so many snapshots, from the end.
            update_bn: Data for `kopt.update_bn`; needed if the model has batch normalization.
        """
        self._checked(last, None, None, None)
        if update_bn is not None:
            check_batches("update_bn", update_bn)
        variables = self._trained.variables
        places = range(len(self._shelf))[-(last or 0) :]
        members = [self._weights(i, variables) for i in places]
        if update_bn is None and self._statistics_differ(variables, members):
            checks.refuse("update_bn", "data to estimate the statistics of batch normalization on", None)
        mean = [mean_of(arrays) for arrays in zip(*members, strict=True)]
        with weights.keeping(self._trained, variables):
            weights.assign(variables, mean)
            made = weights.copy_of(self._trained)
        if update_bn is not None:
            batch_norm.update_bn(made, update_bn)
        return made

    def _statistics_differ(self, variables, members) -> bool:
        """Whether the statistics of batch normalization differ, as they do unless it is frozen."""
        layers = batch_norm.layers_of(self._trained)
        theirs = {id(variable) for layer in layers for variable in layer.non_trainable_variables}
        return any(
            not np.array_equal(members[0][i], other[i])
            for i, variable in enumerate(variables)
            if id(variable) in theirs
            for other in members[1:]
        )


class AtCycles(BackupAndRestore):
    """Saves the training when a cycle has ended."""

    def __init__(self, directory, snapshots):
        super().__init__(directory, on_save_error=snapshots.on_save_error, verbose=snapshots.verbose)
        self.snapshots, self.ends = snapshots, list(snapshots.fits)

    def _place(self):
        return self.directory

    def _shown(self):
        return self.snapshots.directory

    def ends_interval(self, epoch):
        return epoch + 1 in self.snapshots.ends


def split(epochs: int, cycles: int, mult: float) -> list[int]:
    """The epochs of each cycle, each `mult` times as long as the one before as nearly as can be, and at least one."""
    shares = [math.exp((i - (cycles - 1) * (mult > 1)) * math.log(mult)) for i in range(cycles)]
    exact = [epochs * share / sum(shares) for share in shares]
    lengths = [max(1, math.floor(one + 1e-9)) for one in exact]
    while sum(lengths) != epochs:
        step = 1 if sum(lengths) < epochs else -1
        spare = [
            step * (one - length) if length + step > 0 else -math.inf
            for one, length in zip(exact, lengths, strict=True)
        ]
        lengths[spare.index(max(spare))] += step
    return lengths


def waves(lengths, high: float, low: float):
    """One half wave down for each length, in epochs."""
    parts = [
        (schedules.CosineRestarts(length, initial=high, final=low / high), length * len(list(alike)))
        for length, alike in itertools.groupby(lengths)
    ]
    return functools.reduce(operator.rshift, [part.lasting(epochs=epochs) for part, epochs in parts])


def mean_of(arrays):
    """The mean of arrays of floats; of anything else, the last."""
    if "float" not in arrays[0].dtype.name:
        return arrays[-1]
    return np.mean([array.astype("float64") for array in arrays], axis=0).astype(arrays[0].dtype)


def _slots(model) -> list:
    """What the optimizer keeps for the variables, without what callbacks have added and without its own numbers."""
    scalars = tuple(one.path.replace("/", "_") for one in model.trainable_variables if not len(one.shape))
    with stepping.without_parts(model.optimizer):
        return [one for one in model.optimizer.variables if len(one.shape) or one.name.startswith(scalars)]
