"""Polyak averaging: the mean of the weights, in the compiled step."""

import contextlib
import dataclasses
import warnings

import keras
import numpy as np

from kopt import _keras, backends, checks, weights
from kopt._keras import running, stepping
from kopt.batch_norm import Statistics, check_batches
from kopt.callbacks.averages import Average, exponential, is_averaged, uniform
from kopt.callbacks.base import InStep
from kopt.callbacks.clock import Span
from kopt.callbacks.segments import Segments

MOMENTUM = 0.995
OWN = "val_averaged_"  # what the metrics of the average are called beside those of the raw weights
FOR_EMA = {
    "momentum": MOMENTUM,
    "bias_correction": True,
    "warmup_steps": 0,
    "window_steps": None,
    "window_epochs": None,
}


@dataclasses.dataclass
class Kept:
    """What is kept in one optimizer while it trains."""

    average: Average
    segment: Average | None  # since the last segment was closed
    going: keras.Variable  # whether averaging has begun; None where it begins at once
    seen: keras.Variable  # the updates since then; None where each is averaged

    @property
    def variables(self):
        return self.average.variables

    def state(self) -> dict:
        found = {"average": self.average.state(), "segment": self.segment and self.segment.state()}
        return found | {"seen": None if self.seen is None else int(_keras.to_numpy(self.seen))}

    def set_state(self, state) -> None:
        self.average.set_state(state["average"])
        if self.segment:
            self.segment.set_state(state["segment"])
        if self.seen is not None:
            self.seen.assign(state["seen"])


@dataclasses.dataclass
class Ended:
    """What is left of a `fit` that has ended."""

    variables: list  # for each optimizer those that are averaged
    states: list  # of what was kept in each
    raw: list  # what training would go on from
    left: list  # what the model was left with


class PolyakAveraging(InStep):
    """Average the weights at every update, in the compiled step, and use the average to validate and in the end.

        average = average + (w - average) / n,           n = 1 + momentum + ... + momentum**(updates - 1)

    for `kind="ema"`, which is `momentum * average + (1 - momentum) * w` corrected for its beginning: a mean in which
    weights count `momentum**age`, over about `1 / (1 - momentum)` updates. For `kind="uniform"` it is the mean of all
    weights since `start_epoch` (Polyak and Ruppert's average; with a constant or cyclical rate, stochastic weight
    averaging). It takes in what a step has made of the weights, constraints included, once for each applied update:
    not for a skipped one, and not for a batch that is only accumulated.

    When to use it: with gradients that stay noisy (small batches, noisy labels) and a rate that does not decay to
    zero. It does not replace the decay of the rate, and after one to zero there is little left to average.

    While `fit` runs the model trains with its own weights. What the callback shows are the averaged ones, always by
    putting them into the model for a moment:

    - `validate="averaged"`: the validation of `fit` is that of the average; so `val_loss` is its loss. `"raw"`: of the
      weights as they are. `"both"`: of these, and `val_averaged_loss`, ... are the average's on `validation_data`.
    - `keras.callbacks.ModelCheckpoint` saves the weights that its metric was measured on.
    - `on_train_end="averaged"`: the model ends with the average, after `EarlyStopping(restore_best_weights=True)` with
      the average of the best epoch. `"raw"`: it ends with the weights as they are.
    - A callback of your own that needs the average says `with avg.applied(): ...`.

    The next `fit` with the same callback goes on where this one ended, with the weights as they are and the same
    average, unless somebody else has changed the weights: four of one epoch are as one of four. Models with
    `BatchNormalization` want `update_bn`: the statistics in the model are of other weights than the average.

    With `segment_every_epochs`, `posthoc` makes any other average after the training.

    Args:
        momentum: The weight of the past, in [0, 1).
        kind: "ema" or "uniform".
        start_epoch: The epoch at which averaging begins; the first is 0. Validation before it is of the raw weights.
        update_every_steps: Average each so many updates; `momentum` is raised to that power, so that the window stays.
        bias_correction: Without it, the first weights count for all those before them, as in Keras.
        warmup_steps: So many updates long the window grows from 1 to its length, in proportion to the updates done, so
            that the beginning is forgotten. TensorFlow's `min(momentum, (1 + t) / (10 + t))` is about 9 windows.
        window_steps: Give this instead of `momentum` to say over how many updates: `momentum = 1 - 1 / window_steps`.
        window_epochs: The same in epochs.
        update_bn: Data for `kopt.update_bn`; each time the average is shown, the statistics of batch normalization are
            those of the averaged weights. Take what the model was trained on, or some 50 batches of it.
        validate: "averaged", "raw" or "both".
        validation_data: What the average is validated on, for "both": as for `fit`.
        on_train_end: "averaged" or "raw".
        segment_every_epochs: Keep the mean of the weights of so many epochs, each, for `posthoc`. That takes one more
            slot, and each time the memory of the weights on the host; `BackupAndRestore` saves them, too.
        name: What the callback is called in a file and in messages.

    Example:
        >>> import keras, kopt, numpy as np
        >>> keras.utils.set_random_seed(0)
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(kopt.SGD(0.1), loss="mse")
        >>> x, y = np.ones((64, 1)), np.random.default_rng(0).normal(size=(64, 1))
        >>> avg = kopt.callbacks.PolyakAveraging(window_epochs=1)
        >>> history = model.fit(x, y, batch_size=1, epochs=4, verbose=0, callbacks=[avg])
        >>> averaged = model.evaluate(x, y, verbose=0)
        >>> with avg.applied("raw"):
        ...     raw = model.evaluate(x, y, verbose=0)
        >>> averaged < raw
        True

    Reference: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM Journal on Control and
    Optimization 30(4), 1992. Izmailov et al., "Averaging weights leads to wider optima and better generalization",
    UAI 2018.
    """

    left_behind = (
        *InStep.left_behind,
        *("_kept", "_ended", "_trained", "_bn", "_moments", "_epoch", "_raw", "_siblings", "_readers", "_undo"),
        *("_shown", "_is_held"),
    )
    shared = ("update_bn", "validation_data")
    _kept = None  # id of an optimizer -> its `Kept`
    _ended = None  # what the last `fit` has left
    _trained = None  # the model
    _bn = _moments = None  # its `Statistics`; the counts of the averages they were estimated for, and what they were
    _epoch = None
    _raw = None  # the weights without any average, when training has ended
    _siblings = ()  # those of this class in the same `fit`
    _readers = ()  # the callbacks that go by the metrics of the average
    _undo = None  # what takes back what was put into the model and into other callbacks
    _shown = None  # what a hook of `evaluate` or `predict` has put into the model
    _is_held = None  # whether the model has other weights than its own now

    def __init__(
        self,
        momentum: float = MOMENTUM,
        kind: str = "ema",
        start_epoch: int = 0,
        update_every_steps: int = 1,
        bias_correction: bool = True,
        warmup_steps: int = 0,
        window_steps: float | None = None,
        window_epochs: float | None = None,
        update_bn=None,
        validate: str = "averaged",
        validation_data=None,
        on_train_end: str = "averaged",
        segment_every_epochs: int | None = None,
        name: str | None = None,
    ):
        super().__init__(name)
        self.momentum = checks.fraction("momentum", momentum)
        self.kind = checks.one_of("ema", "uniform")("kind", kind)
        self.start_epoch = checks.count(0)("start_epoch", start_epoch)
        self.update_every_steps = checks.count(1)("update_every_steps", update_every_steps)
        self.bias_correction = checks.boolean("bias_correction", bias_correction)
        self.warmup_steps = checks.count(0)("warmup_steps", warmup_steps)
        self.window_steps = checks.optional(checks.window)("window_steps", window_steps)
        self.window_epochs = checks.optional(checks.epochs)("window_epochs", window_epochs)
        self.update_bn = None if update_bn is None else check_batches("update_bn", update_bn)
        self.validate = checks.one_of("averaged", "raw", "both")("validate", validate)
        self.validation_data = validation_data
        if validation_data is not None:
            check_batches("validation_data", validation_data)
        self.at_end = checks.one_of("averaged", "raw")("on_train_end", on_train_end)
        self.segment_every_epochs = checks.optional(checks.count(1))("segment_every_epochs", segment_every_epochs)
        self._check_together()
        self.segments_: list[dict] = []
        self.tried_: list[dict] = []  # by `posthoc(select=...)`

    def _check_together(self) -> None:
        given = {name: value for name in FOR_EMA if (value := getattr(self, name)) != FOR_EMA[name]}
        for name, value in given.items() if self.kind == "uniform" else ():
            checks.refuse(name, f"{FOR_EMA[name]} with `kind='uniform'`, where all weights count alike", value)
        one_of = [name for name in ("momentum", "window_steps", "window_epochs") if name in given]
        if len(one_of) > 1:
            checks.refuse(one_of[1], f"{FOR_EMA[one_of[1]]} beside `{one_of[0]}`", given[one_of[1]])
        if self.warmup_steps and not self.bias_correction:
            checks.refuse("bias_correction", "True beside `warmup_steps`, which leaves nothing to correct", False)
        if (self.validate == "both") != (self.validation_data is not None):
            allowed = "what the average is validated on, with `validate='both'`, and None without"
            checks.refuse("validation_data", allowed, self.validation_data)

    # In the step

    def prepare(self, model):
        self._hide()
        if self._is_held:
            raise RuntimeError(f"`fit` cannot run while {self.name} has other weights in the model")
        for part in self._training.parts:  # the average that another has left in the model goes, too
            if isinstance(part, PolyakAveraging) and part._has_left(model, "left"):
                weights.assign(part._changed(), part._ended.raw)
        goes_on = self._has_left(model, "raw")
        self._kept, self._moments, self._epoch, self._raw = {}, None, None, None
        if not goes_on:
            self._trained, self._ended, self._bn, self.segments_ = model, None, None, []

    def _has_left(self, model, which) -> bool:
        """Whether a `fit` with this callback ended on the model, and its weights are those it left, or the raw ones."""
        if self._ended is None or model is not self._trained:
            return False
        averaged = {id(variable) for variable in self._averaged()}
        if averaged != {id(one) for one in model.trainable_variables if is_averaged(one)}:
            return False
        now, then = weights.arrays(self._changed()), getattr(self._ended, which)
        return all(one.tobytes() == other.tobytes() for one, other in zip(now, then, strict=True))

    def install(self, optimizer):
        span = Span(self.params, optimizer.gradient_accumulation_steps or 1)
        average = Average(self, optimizer, "average", self._share(span))
        segment = Average(self, optimizer, "segment", uniform) if self.segment_every_epochs else None
        going = self.add_variable(optimizer, dtype="int32", name="averaging") if self.start_epoch else None
        seen = self.add_variable(optimizer, dtype="int32", name="seen") if self.update_every_steps > 1 else None
        kept = self._kept[id(optimizer)] = Kept(average, segment, going, seen)
        mine = [id(variable) for variable in kept.variables]
        for variables, state in zip(self._ended.variables, self._ended.states, strict=True) if self._ended else ():
            if [id(variable) for variable in variables] == mine:
                kept.set_state(state)
        if self._epoch is not None:  # the optimizer was built in the first step
            self._tell(kept)

    def _share(self, span):
        if self.kind == "uniform":
            return uniform
        momentum, window = self.momentum, self.window_steps
        if self.window_epochs:
            if not span.batches:
                allowed = "None where the data do not say how many batches an epoch has; give `window_steps`"
                checks.refuse("window_epochs", allowed, self.window_epochs)
            window = max(1.0, self.window_epochs * span.batches / span.accumulation)
        if window:
            momentum = 1 - 1 / window
        every = self.update_every_steps
        return exponential(momentum**every, self.bias_correction, self.warmup_steps / every)

    def after_update(self, optimizer, variables, happened):
        kept, due = self._kept[id(optimizer)], happened
        if kept.going is not None:
            due = backends.both(due, backends.number(kept.going, "int32") > 0)
        if kept.seen is not None:
            backends.when(due, lambda: backends.count_up(kept.seen), [kept.seen])
            due = backends.both(due, backends.number(kept.seen, "int32") % self.update_every_steps == 0)
        means = [mean for mean in (kept.average, kept.segment) if mean]
        now, written = kept.average.weights(), [variable for mean in means for variable in mean.written()]
        backends.when(due, lambda: [mean.take_in(now) for mean in means], written)

    # In a fit

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        model, listed = self.model, running.Fit(self).callbacks
        self._siblings = [one for one in listed if isinstance(one, PolyakAveraging)] or [self]
        for name, attribute in (("validate", "validate"), ("on_train_end", "at_end")):
            if [getattr(one, attribute) for one in self._siblings].count("averaged") > 1:
                self._training.clear()
                checks.refuse(name, "'averaged' in one of several PolyakAveraging at most", "averaged")
        before = listed[: listed.index(self)] if self in listed else []
        if late := [type(one).__name__ for one in before if self._keeps_average(one) or self._reads_average(one)]:
            self._training.clear()
            allowed = f"a list with {self.name} before all that go by its average ({', '.join(late)})"
            checks.refuse("callbacks", allowed, [type(one).__name__ for one in listed])
        self._readers = [one for one in listed if self._reads_average(one)]
        self._take_back()
        self._undo = [stepping.stand_in(model, "evaluate", self._guarded(model.evaluate))]
        for callback in filter(self._keeps_average, listed):
            name = _keras.keeping_method(callback)
            self._undo.append(stepping.stand_in(callback, name, self._with_average(callback, name)))

    def _reads_average(self, callback) -> bool:
        """Whether the callback goes by a metric that this one writes to the logs."""
        return self.validate == "both" and str(getattr(callback, "monitor", "")).startswith(OWN)

    def _keeps_average(self, callback) -> bool:
        """Whether what the callback keeps of the model should be the average."""
        if _keras.keeping_method(callback) is None:
            return False
        if isinstance(callback, keras.callbacks.EarlyStopping):  # what it keeps is what the model ends with
            return self.at_end == "averaged"
        is_validated = self.validate == "averaged" and callback.monitor.startswith("val_")
        return is_validated or self._reads_average(callback)

    def _with_average(self, callback, name):
        original = getattr(callback, name)

        def call(*args, **kwargs):
            is_mine = self._training is not None and callback.model is self._trained
            with self._average_if_any() if is_mine else contextlib.nullcontext():
                return original(*args, **kwargs)

        return call

    def _guarded(self, evaluate):
        """`evaluate` that hides the average also if it raises, and no hook of its end is called."""

        def call(*args, **kwargs):
            shown = self._shown
            try:
                return evaluate(*args, **kwargs)
            finally:
                if self._shown is not shown:
                    self._hide()

        return call

    def _take_back(self) -> None:
        for undo in self._undo or ():
            undo()
        self._undo = None

    def leave(self, optimizer):
        self._take_back()

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        _keras.fetch_state(self._trained)
        self._epoch = epoch
        for kept in self._kept.values():
            self._tell(kept)

    def _tell(self, kept) -> None:
        if kept.going is not None:
            kept.going.assign(int(self._epoch >= self.start_epoch))

    def on_epoch_end(self, epoch, logs=None):
        model, every, done = self.model, self.segment_every_epochs, epoch + 1 - self.start_epoch
        if every and done > 0 and done % every == 0:
            self._close_segment()
        if self.validate == "both" and logs is not None:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(self.validation_data)
            with self._average_if_any():
                found = model.evaluate(x, y, sample_weight=sample_weight, verbose=0, return_dict=True)
            logs.update({f"{OWN}{name}": value for name, value in found.items()})
            for callback in self._readers:
                _keras.tell_direction(callback, callback.monitor.replace(OWN, "val_"))

    def _close_segment(self) -> None:
        if segment := self._open_segment():
            self.segments_.append(segment)
            for kept in self._kept.values():
                kept.segment.reset()

    def _open_segment(self) -> dict | None:
        found = [state["segment"] for state in self._states()]
        if not found or not found[0]["count"]:
            return None
        means = [mean for one in found for mean in one["means"]]
        return {"updates": found[0]["count"] * self.update_every_steps, "means": means}

    def get_state(self):
        return {"segments": self.segments_}

    def set_state(self, state):
        self.segments_ = list(state["segments"])

    def on_train_end(self, logs=None):
        if self._kept and self._begun:
            _keras.fetch_state(self._trained)
            for one in self._siblings:
                one._note_raw()
            variables = [kept.variables for kept in self._kept.values()]
            self._ended = Ended(variables, self._states(), self._raw, [])
            with self._average_if_any() if self.at_end == "averaged" else contextlib.nullcontext():
                self._ended.left = weights.arrays(self._changed())
            weights.assign(self._changed(), self._ended.left)
            if not self.updates_:
                why = f"`start_epoch` is {self.start_epoch}" if self.start_epoch else "no update was applied"
                warnings.warn(f"{self.name} has averaged nothing: {why}. The model has its own weights.", stacklevel=2)
            self._kept = self._raw = None
        super().on_train_end(logs)

    def _note_raw(self) -> None:
        """Keep the raw weights, before any average is put into the model for good."""
        if self._kept and self._raw is None:
            self._raw = weights.arrays(self._changed())

    # Showing it

    @property
    def updates_(self) -> int:
        """How many updates are in the average."""
        return max(self._counts(), default=0)

    def applied(self, which: str = "averaged"):
        """A context in which the model has the averaged weights; afterwards it is as it was, whatever is raised.

        Args:
            which: "averaged", or "raw" for those that the training would go on from.
        """
        which = checks.one_of("averaged", "raw")("which", which)
        self._hide()
        self._check_average()
        if which == "averaged":
            return self._holding(self._averages(), self._counts())
        if self._kept:  # `fit` is running: the model has them
            return contextlib.nullcontext()
        return weights.holding(self._trained, self._changed(), self._ended.raw)

    def averaged_model(self) -> keras.Model:
        """A model of its own with the averaged weights, to keep, save or go on with; nothing of the callback is in it.

        It is compiled like the one that was trained, with an optimizer that begins anew.
        """
        with self.applied():
            return weights.copy_of(self._trained)

    def posthoc(self, *, window_steps=None, tail=None, select=None) -> keras.Model:
        """A model of its own with another average over the same training, made of the means of its segments.

        Args:
            window_steps: An exponentially weighted average over about so many updates; within 3 % of what it would have
                been if that is four segments or more.
            tail: The mean over this share of the updates, counted from the end; exact where a segment begins there.
            select: Data as for `evaluate`. Of windows from four segments up and tails of 1, 2, 4, ... segments, take
                the one with the least loss on it. `tried_` has the loss of each.
        """
        given = {"window_steps": window_steps, "tail": tail, "select": select}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            checks.refuse("window_steps", "given, or `tail`, or `select`, and only one of them", window_steps)
        checks.optional(checks.window)("window_steps", window_steps)
        checks.optional(checks.share)("tail", tail)
        segments = self._segments()
        if select is not None:
            check_batches("select", select)
            self.tried_ = [one | {"loss": self._loss(segments, one, select)} for one in segments.candidates()]
            best = min(self.tried_, key=lambda one: np.nan_to_num(one["loss"], nan=np.inf))
            given = {name: value for name, value in best.items() if name != "loss"}
        with self._holding(segments.mean(segments.shares(**given))):
            return weights.copy_of(self._trained)

    def _segments(self) -> Segments:
        if not self.segment_every_epochs:
            checks.refuse("segment_every_epochs", "given to the callback before `fit`", None)
        self._check_average()
        return Segments(self.segments_, self._open_segment())

    def _loss(self, segments, arguments, judged) -> float:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(judged)
        with self._holding(segments.mean(segments.shares(**arguments))):
            return self._trained.evaluate(x, y, sample_weight=sample_weight, verbose=0, return_dict=True)["loss"]

    def on_test_begin(self, logs=None):
        super().on_test_begin(logs)
        if self.validate == "averaged":
            self._show()

    def on_test_end(self, logs=None):
        self._hide()

    def on_predict_begin(self, logs=None):
        super().on_test_begin(logs)
        self._show()

    def on_predict_end(self, logs=None):
        self._hide()

    def _show(self) -> None:
        """Put the average into the model until `_hide`; Keras has a hook for the one and another for the other."""
        self._hide()
        if self._model is not self._trained:
            raise RuntimeError(f"{self.name} has averaged the weights of another model, or of none")
        shown = contextlib.ExitStack()
        shown.enter_context(self._average_if_any() if self._training else self.applied())
        self._shown = shown

    def _hide(self) -> None:
        shown, self._shown = self._shown, None
        if shown is not None:
            shown.close()

    def _average_if_any(self):
        return self.applied() if self.updates_ else contextlib.nullcontext()

    def _check_average(self) -> None:
        if not self.updates_:
            when = f"; it begins at epoch {self.start_epoch}" if self.start_epoch else ""
            raise RuntimeError(f"{self.name} has averaged nothing yet{when}")

    @contextlib.contextmanager
    def _holding(self, means, counts=None):
        """The model with these means, and the statistics of batch normalization that belong to them."""
        before, self._is_held = self._is_held, True
        try:
            with (
                weights.holding(self._trained, self._averaged(), means),
                weights.holding(self._trained, self._normalized(), self._estimated(counts)),
            ):
                yield
        finally:
            self._is_held = before

    def _estimated(self, counts) -> list:
        """The statistics for the weights that the model has; they are known if it had the average of these counts."""
        if self.update_bn is None:
            return []
        if counts is None or self._moments is None or self._moments[0] != counts:
            moments = self._bn.estimate(self.update_bn)
            if counts is None:
                return moments
            self._moments = counts, moments
        return self._moments[1]

    def _normalized(self) -> list:
        """The variables of batch normalization that are estimated anew."""
        if self.update_bn is None:
            return []
        self._bn = self._bn or Statistics(self._trained)
        return self._bn.variables

    def _averaged(self) -> list:
        found = [kept.variables for kept in self._kept.values()] if self._kept else self._ended.variables
        return [variable for variables in found for variable in variables]

    def _changed(self) -> list:
        """All variables of the model that another weight of an average changes."""
        return [*self._averaged(), *self._normalized()]

    def _averages(self) -> list:
        if self._kept:
            _keras.fetch_state(self._trained)
            return [backends.copied(slot) for kept in self._kept.values() for slot in kept.average.slots]
        return [mean for state in self._ended.states for mean in state["average"]["means"]]

    def _states(self) -> list[dict]:
        if self._kept:
            _keras.fetch_state(self._trained)
            return [kept.state() for kept in self._kept.values()]
        return self._ended.states if self._ended else []

    def _counts(self) -> tuple[int, ...]:
        """How many updates are in the average of each optimizer."""
        if self._kept:
            _keras.fetch_state(self._trained)
            return tuple(int(_keras.to_numpy(kept.average.count)) for kept in self._kept.values())
        return tuple(state["average"]["count"] for state in self._ended.states) if self._ended else ()
