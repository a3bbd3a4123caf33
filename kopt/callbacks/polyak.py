"""Polyak averaging: the mean of the weights, in the compiled step."""

import contextlib
import warnings

import keras
import numpy as np

from kopt import _keras, checks, weights
from kopt._keras import running, stepping
from kopt.batches import check_batches
from kopt.callbacks.averages import Averaged, Averaging, exponential, is_averaged, uniform
from kopt.callbacks.base import InStep
from kopt.callbacks.clock import Span
from kopt.callbacks.segments import Segments
from kopt.callbacks.showing import Showing, around_keeping, around_validation
from kopt.optimizers.quasi_newton.optimizer import QuasiNewton

MOMENTUM = 0.995
OWN = "val_averaged_"  # what the metrics of the average are called beside those of the raw weights
FOR_EMA = {
    "momentum": MOMENTUM,
    "bias_correction": True,
    "warmup_steps": 0,
    "window_steps": None,
    "window_epochs": None,
}


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

    While `fit` runs the model trains with its own weights. The callback shows the average by putting it into the model
    for a moment:

    - `validate="averaged"`: the validation of `fit` is that of the average; so `val_loss` is its loss. `"raw"`: of the
      weights as they are. `"both"`: of these, and `val_averaged_loss`, ... are the average's on `validation_data`.
    - `keras.callbacks.ModelCheckpoint`, and KerasTuner, save the weights that their metric was measured on.
    - `on_train_end="averaged"`: the model ends with the average, after `EarlyStopping(restore_best_weights=True)` with
      the average of the best epoch (`applied` and `averaged_model` have the last one). `"raw"`: it ends with the
      weights as they are, and so does a `fit` that raises.
    - Any other callback sees the weights as they are; one that needs the average says `with avg.applied(): ...`.
    - `evaluate` and `predict` show the average if the callback is in their `callbacks`.

    The next `fit` with the same callback goes on from the raw weights and the average, so that four `fit`s of one
    epoch, each with its `initial_epoch`, equal one of four. Where the weights were changed since, or the last `fit` was
    broken off, it averages anew from the weights that the model has, and warns. With another callback, or none,
    training goes on from what the model was left with: the average.

    The average takes the memory of the weights on the device, and on the host, when `fit` has ended, twice that.

    Attributes:
        updates_: How many updates are in the average.
        segments_: The means of the segments so far, for each optimizer.
        tried_: What `posthoc(select=...)` has tried, with the loss of each.

    Args:
        momentum: The weight of the past, in [0, 1).
        kind: "ema" or "uniform".
        start_epoch: The epoch at which averaging begins; the first is 0. Validation before it is of the raw weights.
        update_every_steps: Average each so many updates; `momentum` is raised to that power, so that the window stays.
        bias_correction: Without it, the first weights count for all those before them, as in Keras.
        warmup_steps: So many updates long the window grows from 1 to its length, in proportion to the updates done, so
            that the beginning is forgotten. TensorFlow's `min(momentum, (1 + t) / (10 + t))` is one of about 9 windows.
        window_steps: Give this instead of `momentum` to say over how many updates: `momentum = 1 - 1 / window_steps`.
        window_epochs: The same in epochs.
        update_bn: Data for `kopt.update_bn`: whenever the average is shown, the statistics of batch normalization are
            those of the averaged weights. Take what the model was trained on, or some 50 batches of it, that do not
            shuffle themselves. It is one pass an epoch if the average is validated, and one for each that `posthoc`
            tries. Arrays are read in batches of 32.
        validate: "averaged", "raw" or "both". Before `start_epoch`, all three are of the raw weights.
        validation_data: What the average is validated on, for "both": as for `fit`.
        on_train_end: "averaged" or "raw".
        segment_every_epochs: Keep the mean of the weights over each so many epochs, of which `posthoc` makes any other
            average after the training. That takes one more slot, and on the host the memory of the weights for each;
            kopt's `BackupAndRestore` saves all of them each time.
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
        *InStep.left_behind, "_of", "_past", "_trained", "_showing", "_raw", "_left", "_epoch", "_siblings", "_readers",
        "_undo", "_shown", "segments_", "tried_",
    )  # fmt: skip
    shared = ("update_bn", "validation_data")
    needs_all = True
    _of = None  # id of an optimizer -> its `Averaging`, or `Averaged` when `fit` is over
    _past = None  # the same of the last `fit`, if this one goes on from it
    _trained = _showing = None  # the model, and what puts other weights into it
    _raw = None  # when `fit` is over: what training would go on from
    _left = None  # and the digest of what the model was left with
    _epoch = None
    _siblings = _readers = None  # in the same `fit`: those of this class; those that go by a metric of this one
    _undo = None  # what takes back what was put in place of methods of the model and of other callbacks
    _shown = None  # what a hook of `evaluate` or `predict` has put into the model
    segments_ = tried_ = None

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
        is_given = validation_data is not None
        self.validation_data = check_batches("validation_data", validation_data, True) if is_given else None
        self.at_end = checks.one_of("averaged", "raw")("on_train_end", on_train_end)
        self.segment_every_epochs = checks.optional(checks.count(1))("segment_every_epochs", segment_every_epochs)
        self._check_together(momentum)

    def _check_together(self, momentum) -> None:
        given = {name: value for name in FOR_EMA if (value := getattr(self, name)) != FOR_EMA[name]}
        if momentum is not MOMENTUM:  # a 0.995 that was written out is another object
            given = {"momentum": momentum} | given
        for name, value in given.items() if self.kind == "uniform" else ():
            checks.refuse(name, "left out with `kind='uniform'`, where all weights count alike", value)
        _check_one({name: given[name] for name in ("momentum", "window_steps", "window_epochs") if name in given})
        if self.warmup_steps and not self.bias_correction:
            checks.refuse("bias_correction", "True beside `warmup_steps`, which leaves nothing to correct", False)
        if (self.validate == "both") != (self.validation_data is not None):
            allowed = "what the average is validated on, with `validate='both'`, and None without"
            checks.refuse("validation_data", allowed, self.validation_data)

    # In the step

    def prepare(self, model):
        for part in self._training.parts:  # the average that another has left in the model goes, too
            if isinstance(part, PolyakAveraging) and part._is_on(model, part._left):
                weights.assign(part._changed(), part._raw)
        goes_on = self._left is not None and self._is_on(model, weights.digest(self._raw))
        if not goes_on:
            if model is self._trained and self.updates_:
                why = "its weights were changed since" if self._left else "that was broken off"
                warnings.warn(f"{self.name} averages anew, not on from the last `fit`: {why}.", stacklevel=2)
            self._trained, self._showing = model, Showing(model, self.update_bn)
            self.segments_, self.tried_ = [], []
        self._past = list(self._of.values()) if goes_on else []
        self._of, self._raw, self._left, self._epoch = {}, None, None, None

    def _is_on(self, model, digest) -> bool:
        """Whether the last `fit` has ended on the model, and what an average changes of it is that of the digest."""
        if self._left is None or model is not self._trained:
            return False
        averaged = {id(variable) for variable in self._averaged()}
        if averaged != {id(one) for one in model.trainable_variables if is_averaged(one)}:
            return False
        return weights.digest(weights.arrays(self._changed())) == digest

    def install(self, optimizer):
        if isinstance(optimizer, QuasiNewton):
            allowed = f"another beside {self.name}: an average would be of the points that a line search tries"
            checks.refuse("optimizer", allowed, optimizer)
        if getattr(optimizer, "use_ema", False):
            checks.refuse("use_ema", f"False beside {self.name}: its average would come into the weights", True)
        span = Span(self.params, optimizer.gradient_accumulation_steps or 1)
        every, is_late, in_segments = self.update_every_steps, self.start_epoch > 0, bool(self.segment_every_epochs)
        averaging = Averaging(self, optimizer, self._share(span), every, is_late, in_segments)
        self._of[id(optimizer)] = averaging
        for past in self._past:
            if list(map(id, past.variables)) == list(map(id, averaging.variables)):
                averaging.set_state(past.kept)
        if self._epoch is not None:  # the optimizer was built in the first step
            averaging.tell(self._epoch >= self.start_epoch)

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
        self._of[id(optimizer)].update(happened)

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self._epoch = epoch
        for averaging in self._now():
            averaging.tell(epoch >= self.start_epoch)

    # Beside others in a fit

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        model, listed = self.model, running.Fit(self).callbacks or [self]
        self._siblings = [one for one in listed if isinstance(one, PolyakAveraging)]
        self._readers = [one for one in listed if self._reads_average(one)]
        keepers = [one for one in listed if self._keeps_average(one)]
        try:
            self._check_list(listed, [*keepers, *self._readers])
        except ValueError:
            self._training.clear()
            raise
        self._undo = []
        if self.validate == "averaged":
            self._undo = [around_validation(self, model, self._average_in_fit)]
        self._undo += [around_keeping(callback, self._average_in_fit) for callback in keepers]

    def _check_list(self, listed, after) -> None:
        """Refuse a list in which another says the same, or goes by the average before it is there."""
        for name, attribute, value in (
            ("validate", "validate", "averaged"),
            ("validate", "validate", "both"),
            ("on_train_end", "at_end", "averaged"),
        ):
            if [getattr(one, attribute) for one in self._siblings].count(value) > 1:
                checks.refuse(name, f"{value!r} in one of several PolyakAveraging at most", value)
        before = listed[: listed.index(self)]
        if late := {id(one): type(one).__name__ for one in after if one in before}:
            allowed = f"a list with {self.name} before all that go by its average ({', '.join(late.values())})"
            checks.refuse("callbacks", allowed, [type(one).__name__ for one in listed])

    def _reads_average(self, callback) -> bool:
        """Whether the callback goes by a metric that this one writes to the logs."""
        return self.validate == "both" and _keras.metric_of(callback).startswith(OWN)

    def _keeps_average(self, callback) -> bool:
        """Whether what the callback keeps of the model should be the average."""
        if _keras.keeping_method(callback) is None:
            return False
        if isinstance(callback, keras.callbacks.EarlyStopping):  # what it keeps is what the model ends with
            return self.at_end == "averaged"
        metric = _keras.metric_of(callback)
        is_validated = self.validate == "averaged" and metric.startswith("val_") and not metric.startswith(OWN)
        return is_validated or self._reads_average(callback)

    def _average_in_fit(self):
        """The average in the model, as long as `fit` runs."""
        return self._average_if_any() if self._training is not None else contextlib.nullcontext()

    def let_go(self):
        for undo in self._undo or ():
            undo()
        self._undo = None

    def on_epoch_end(self, epoch, logs=None):
        every, done = self.segment_every_epochs, epoch + 1 - self.start_epoch
        if every and done > 0 and done % every == 0:
            self.segments_.append(self._stretches())
            for averaging in self._now():
                averaging.segment.reset()
        if self.validate == "both" and logs is not None:
            with self._average_if_any():
                found = self._evaluated(self.validation_data)
            logs.update({f"{OWN}{name}": value for name, value in found.items()})
            for callback in self._readers:
                _keras.tell_direction(callback, _keras.metric_of(callback).replace(OWN, "val_"))

    def _evaluated(self, judged) -> dict:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(judged)
        return self._trained.evaluate(x, y, sample_weight=sample_weight, verbose=0, return_dict=True)

    def get_state(self):
        return {"segments": self.segments_}

    def set_state(self, state):
        self.segments_ = list(state["segments"])

    def on_train_end(self, logs=None):
        if self._of and self._begun:
            for one in self._siblings:
                one._note_raw()
            with self._average_if_any() if self.at_end == "averaged" else contextlib.nullcontext():
                left = weights.arrays(self._changed())
            self._of = {key: Averaged(averaging) for key, averaging in self._of.items()}
            weights.assign(self._changed(), left)
            self._left = weights.digest(left)
            if not self.updates_:
                why = f"`start_epoch` is {self.start_epoch}" if self.start_epoch else "no update was applied"
                warnings.warn(f"{self.name} has averaged nothing: {why}. The model has its own weights.", stacklevel=2)
        super().on_train_end(logs)

    def _note_raw(self) -> None:
        """Keep the raw weights, before any average is put into the model for good."""
        if self._of and self._raw is None:
            self._now()
            self._raw = weights.arrays(self._changed())

    # What there is

    def _now(self) -> list:
        """What is averaged of each optimizer; JAX has handed out the values of its variables."""
        if self._of and self._left is None:
            _keras.fetch_state(self._trained)
        return list((self._of or {}).values())

    def _counts(self) -> tuple[int, ...]:
        """How many updates are in the average of each optimizer."""
        return tuple(averaging.count() for averaging in self._now())

    @property
    def updates_(self) -> int:
        """How many updates are in the average."""
        return max(self._counts(), default=0)

    def _averaged(self) -> list:
        return [variable for averaging in self._of.values() for variable in averaging.variables]

    def _changed(self) -> list:
        """All variables of the model that change when an average is shown."""
        return self._showing.changed(self._averaged())

    def _stretches(self) -> list[dict]:
        """The open segment of each optimizer."""
        return [averaging.stretch() for averaging in self._now()]

    # Showing it

    def applied(self, which: str = "averaged"):
        """A context in which the model has the averaged weights; afterwards it is as it was, whatever is raised.

        Args:
            which: "averaged", or "raw" for those that the training goes on from.
        """
        which = checks.one_of("averaged", "raw")("which", which)
        self._check_any()
        if which == "averaged":
            means = [mean for averaging in self._now() for mean in averaging.means()]
            return self._showing.holding(self._averaged(), means, self._counts())
        raw = self._raw or self._showing.own  # what the model has by itself, if it has anything else
        return self._showing.holding(self._averaged(), raw) if raw else contextlib.nullcontext()

    def _check_any(self) -> None:
        if not self.updates_:
            when = f"; it begins at epoch {self.start_epoch}" if self.start_epoch else ""
            raise RuntimeError(f"{self.name} has averaged nothing yet{when}")

    def _average_if_any(self):
        return self.applied() if self.updates_ else contextlib.nullcontext()

    def averaged_model(self) -> keras.Model:
        """A model of its own with the averaged weights, to keep, save or go on with; nothing of the callback is in it.

        It is compiled like the one that was trained, with an optimizer that begins anew.
        """
        with self.applied():
            return weights.copy_of(self._trained)

    def posthoc(self, *, window_steps=None, tail=None, select=None) -> keras.Model:
        """A model of its own with another average over the same training, made of the means of its segments.

        Args:
            window_steps: An exponentially weighted average over about so many updates. Take four segments or more:
                each is taken as a whole.
            tail: The mean over this share of the updates, counted from the end; exact where a segment begins there.
            select: Data as for `evaluate`. Of windows from four segments up and tails of 1, 2, 4, ... segments, take
                the one with the least loss on it. `tried_` has the loss of each.
        """
        given = {"window_steps": window_steps, "tail": tail, "select": select}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            checks.refuse("window_steps", "given, or `tail`, or `select`", None)
        _check_one(given)
        checks.optional(checks.window)("window_steps", window_steps)
        checks.optional(checks.share)("tail", tail)
        if not self.segment_every_epochs:
            checks.refuse("segment_every_epochs", "given to the callback before `fit`", None)
        self._check_any()
        segments = [Segments(of_one) for of_one in zip(*self.segments_, self._stretches(), strict=True)]
        if select is not None:
            judged = check_batches("select", select, True)
            longest = max(segments, key=lambda one: one.total)
            self.tried_ = [one | {"loss": self._loss(segments, one, judged)} for one in longest.candidates()]
            best = min(self.tried_, key=lambda one: np.nan_to_num(one["loss"], nan=np.inf))
            given = {name: value for name, value in best.items() if name != "loss"}
        with self._holding_mean(segments, given):
            return weights.copy_of(self._trained)

    def _holding_mean(self, segments, arguments):
        means = [
            mean
            for averaging, one in zip(self._now(), segments, strict=True)
            for mean in (one.mean(one.shares(**arguments)) if len(one) else averaging.means())
        ]
        return self._showing.holding(self._averaged(), means)

    def _loss(self, segments, arguments, judged) -> float:
        with self._holding_mean(segments, arguments):
            return self._evaluated(judged)["loss"]

    def on_test_begin(self, logs=None):
        super().on_test_begin(logs)
        if not _keras.fits_of(self._model):  # `fit` puts the average in around its own validation
            self._show()

    def on_test_end(self, logs=None):
        self._hide()

    def on_predict_begin(self, logs=None):
        super().on_predict_begin(logs)
        self._show()

    def on_predict_end(self, logs=None):
        self._hide()

    def _show(self) -> None:
        """Put the average into the model until `_hide`: Keras calls one hook of a callback and then another.

        If Keras raises between the two, the average is taken out when the next `fit` begins.
        """
        self._hide()
        model = self._model
        anew = lambda *args, **more: (self._hide(), model.fit(*args, **more))[1]  # noqa: E731
        if model is not self._trained:
            raise RuntimeError(f"{self.name} has averaged the weights of another model, or of none")
        shown = contextlib.ExitStack()
        shown.enter_context(self._average_if_any() if self._training else self.applied())
        shown.callback(stepping.stand_in(model, "fit", anew))
        self._shown = shown

    def _hide(self) -> None:
        shown, self._shown = self._shown, None
        if shown is not None:
            shown.close()


def _check_one(given) -> None:
    """Refuse the second of arguments that say the same."""
    first, *others = given or [None]
    for name in others:
        checks.refuse(name, f"left out beside `{first}`", given[name])
