"""Freezing and unfreezing by stages, in one `fit`."""

import contextlib

import keras
import numpy as np

from kopt import _keras, backends, checks
from kopt._keras import modes, stepping
from kopt.callbacks import clock, cold
from kopt.callbacks import stages as formulas
from kopt.callbacks.base import InStep
from kopt.optimizers import factors
from kopt.optimizers.multipliers import owns_weights
from kopt.optimizers.quasi_newton.optimizer import QuasiNewton
from kopt.schedules.time import Length, Time, at_least, at_most

PREFIX = "multiplier/"  # of the logs, followed by the name of a group


class StagedUnfreeze(InStep):
    """Train the head of a network first and its body later, and less: each stage in the same `fit`.

    A stage is an epoch and the multipliers that hold from it on. What a weight takes of each update of the optimizer is
    multiplied: with 0 it stays as it is, to the bit, and nothing is compiled anew when a stage begins. Any optimizer of
    Keras or kopt goes on with its state, its schedule and its count of updates.

        frozen = {0: {base: 0.0}, 3: {base: 0.1}}

    Which multiplier holds follows from the epoch alone, so that `initial_epoch` and `kopt.callbacks.BackupAndRestore`
    go on in the middle. When `fit` ends all weights are free again. The logs have `multiplier/<name>` for each group.

    When to use it: a body that was trained before, a new head, and few data: the first gradients of a random head would
    spoil the body. It is no universal win: where there are many data, or the head is good, training all from the start
    does as well. A model with a `train_step` of its own and a second optimizer has only its `optimizer` staged.

    Args:
        stages: A dict from epochs to multipliers, as `{0: {base: 0.0}, 3: {base: 0.1}}`; or a list of dicts with
            `epoch`, `multipliers` and, to get there in a straight line, `ramp_epochs` or `ramp_steps`. Multipliers are
            a dict of layers, models or regular expressions, which `re.search` looks for in a variable's path, with a
            number of 0 or more for each. The first that picks a variable counts; a later stage may pick a part of what
            an earlier one has. What no stage has picked yet has 1.
        engine: "multiplier": gradients of frozen weights are computed, and the optimizer's moments go on as if nothing
            were frozen. "trainable": they are not computed, which saves time in proportion, and each stage that freezes
            other weights is compiled anew. The moments of the frozen begin at 0 then; the first updates after it are
            corrected so that they are as large as those of a new optimizer. Without that, Adam's are up to 6.5 times
            as large.
        freeze_bn: Keep batch normalization to which a stage gives less than 1 in inference for the whole `fit`, so that
            its statistics stay as they are. They would move however small the multiplier is.
        verbose: 1: print the multipliers when they change.
        name: What the callback is called in a file and in messages; by default the name of its class.

    Example:
        >>> import keras, kopt, numpy as np
        >>> base = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)], name="base")
        >>> model = keras.Sequential([base, keras.layers.Dense(1)])
        >>> model.compile("adam", loss="mse")
        >>> staged = kopt.callbacks.StagedUnfreeze({0: {base: 0.0}, 2: {base: 0.1}})
        >>> history = model.fit(np.ones((4, 2)), np.ones(4), epochs=3, verbose=0, callbacks=[staged])
        >>> history.history["multiplier/base"]
        [0.0, 0.0, 0.1]

    Reference:
        Howard & Ruder, Universal language model fine-tuning for text classification, 2018,
        https://arxiv.org/abs/1801.06146, for unfreezing by stages.
    """

    left_behind = (*InStep.left_behind, "_parts", "_whole", "_frozen", "_own_flags", "_held")
    shared = ("stages",)  # layers are what they are
    _parts = _whole = _held = None
    _frozen: frozenset = frozenset()  # the ids of the variables that are not trained now
    _own_flags = ()  # pairs of a variable and whether it was trainable before

    def __init__(self, stages, *, engine: str = "multiplier", freeze_bn: bool = True, verbose: int = 0, name=None):
        super().__init__(name)
        self.stages = formulas.parsed(stages)
        self.engine = checks.one_of("multiplier", "trainable")("engine", engine)
        self.freeze_bn = checks.boolean("freeze_bn", freeze_bn)
        self.verbose = checks.count(0)("verbose", verbose)

    def prepare(self, model):
        if not stepping.has_all_weights(model):
            checks.refuse("model", "built: call it once, or give it an `Input`", model.name)
        self._parts, self._frozen, self._own_flags = {}, frozenset(), ()
        norms = [layer for layer in _keras.layers_of(model) if isinstance(layer, keras.layers.BatchNormalization)]
        statistics = [layer.moving_mean for layer in norms]
        self._whole = formulas.tracks(self.stages, [*model.trainable_variables, *statistics])
        held = {id(variable) for track in self._whole if track.is_held_back for variable in track.variables}
        norms = [layer for layer in norms if held & {id(variable) for variable in layer.weights}]
        self._held = contextlib.ExitStack()
        if self.freeze_bn:
            self._held.enter_context(modes.called_with(norms, training=False))
        if self.engine == "trainable":
            trained = {id(variable): variable for variable in model.trainable_variables}
            chosen = [v for track in self._whole for v in track.variables if id(v) in trained]
            self._own_flags = tuple((variable, variable.trainable) for variable in chosen)

    def install(self, optimizer):
        if isinstance(optimizer, QuasiNewton):
            checks.refuse("optimizer", f"one that updates each weight by itself, for {self.name}", optimizer.name)
        if owns_weights(optimizer):
            kind = type(optimizer).__name__
            checks.refuse("optimizer", "one that keeps no weights of its own beside the model's", kind)
        if optimizer.use_ema:
            allowed = f"False for {self.name}: the average would replace what is held; use PolyakAveraging"
            checks.refuse("use_ema", allowed, True)
        self._parts[id(optimizer)] = _Part(self, optimizer, self._whole)

    def installed(self, optimizer):
        part = self._parts[id(optimizer)]
        span = self._span(optimizer)
        span.check(part.tracks, part.clock.value, checks.nonnegative, "stages")
        if self.engine == "trainable":
            cold.check(self, optimizer, self.model.optimizer)
            part.begin(optimizer, span, self.params.get("epochs") or 0)
            self._held.callback(stepping.apply_to_part(self.model.optimizer))

    def _span(self, optimizer):
        return clock.Span(self.params, optimizer.gradient_accumulation_steps or 1)

    @contextlib.contextmanager
    def during_update(self, optimizer):
        part = self._parts[id(optimizer)]
        with factors.blending_around(optimizer, lambda: part.taken(optimizer)):
            yield

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        optimizers = stepping.updating(self.model.optimizer)  # by the model: JAX hands out its state
        for optimizer in optimizers:
            updates = int(_keras.to_numpy(optimizer.iterations))
            self._parts[id(optimizer)].clock.turn(epoch, updates, self._span(optimizer))
        if self.verbose:
            self._tell(epoch)
        if self.engine == "trainable":
            self._train_others(epoch, self._span(optimizers[0]))

    def _train_others(self, epoch, span) -> None:
        """Freeze what is frozen for the whole epoch, and compile the step anew if that is something else."""
        frozen = {id(v) for track in self._whole if track.is_frozen(epoch, span) for v in track.variables}
        for variable, own in self._own_flags:
            variable.trainable = own and id(variable) not in frozen
        if frozen != self._frozen:
            self._frozen = frozenset(frozen)
            self.model.make_train_function(force=True)

    def _tell(self, epoch) -> None:
        for track in self._whole:
            turn = next((turn for turn in track.turns if turn.epoch == epoch), None)
            if turn is not None:
                ramp = "" if turn.ramp is None else f", in {turn.ramp}"
                print(f"Epoch {epoch + 1}: multiplier of {track.name!r} is {turn.multiplier:g}{ramp}")

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        optimizer = stepping.updating(self.model.optimizer)[0]
        last = int(_keras.to_numpy(optimizer.iterations)) - 1
        time = Time.told(last, _keras.to_numpy(self._parts[id(optimizer)].clock.variable).tolist())
        for track in self._whole:
            self.note(logs, PREFIX + track.name, float(str(np.float32(track.value(time)))))

    def let_go(self):
        if self._own_flags:  # less what has been frozen since: after an interrupt one may freeze, and compile
            resting = [layer for layer in _keras.layers_of(self._model) if not layer.trainable]
            resting = {id(weight) for layer in resting for weight in _keras.own_weights(layer)}
            for variable, own in self._own_flags:
                variable.trainable = own and id(variable) not in resting
        if self._held is not None:
            self._held.close()
        self._frozen, self._own_flags = frozenset(), ()


class _Part:
    """What the callback has in the step of one optimizer."""

    def __init__(self, callback, optimizer, tracks):
        own = {id(variable) for variable in stepping.trained_by(optimizer)}
        self.tracks = [track for track in tracks if any(id(v) in own for v in track.variables)]
        self.variables = [[v for v in track.variables if id(v) in own] for track in self.tracks]
        self.clock = clock.Clock(clock.add(optimizer), self._values)
        self.active: list = []  # for each track the epochs at which it begins and ends to be trained
        self.warm = self.correction = None
        if callback.engine == "trainable":  # for each track, whether it was trained before; all updates before this fit
            self.warm = callback.add_variable(optimizer, (len(self.tracks) + 1,), dtype="int32", name="warm")

    def _values(self, time):
        values = [np.asarray(track.value(time) + 0.0 * time.epoch) for track in self.tracks]
        return np.stack(values or [0.0])

    def begin(self, optimizer, span, epochs) -> None:
        """Find out when each track is trained, and how many updates its moments have had before."""
        self.correction = cold.correction(optimizer)
        warm = [not cold.is_cold(optimizer, own) for own in self.variables]
        self.warm.assign(np.array([*warm, _keras.to_numpy(optimizer.iterations)], "int32"))
        for track in self.tracks:
            frozen = [track.is_frozen(epoch, span) for epoch in range(min(epochs, track.stays(span) + 1))]
            edges = [epoch for epoch, rests in enumerate(frozen) if rests != ([True, *frozen][epoch])]
            self.active.append(edges or [0])
        if self.correction is not None and any(edges != [0] for edges in self.active) and not span.batches:
            allowed = '"multiplier" where the data do not say how many batches an epoch has'
            checks.refuse("engine", allowed, "trainable")

    def taken(self, optimizer) -> list:
        """The variables, each with its share of the update that comes: tensor code."""
        updates = backends.number(optimizer.iterations, "int32")
        time = Time.told(updates, backends.numbers(self.clock.variable, "int32"))
        found = []
        for place, (track, variables) in enumerate(zip(self.tracks, self.variables, strict=True)):
            share = track.value(time)
            if self.correction is not None:
                share = share * self.correction(self._updates(place, time, updates) + 1, updates + 1)
            share = float(share) if backends.BACKEND == "torch" else share
            found += [(variable, share) for variable in variables if variable.trainable]
        return found

    def _updates(self, place, time, updates):
        """How many updates the moments of a track have had, of all there were: a cold one has none from before."""
        origin = backends.numbers(self.clock.variable, "int32")[0]  # all updates before that time
        *warm, begun = backends.numbers(self.warm, "int32")
        count = warm[place] * origin
        for i, epoch in enumerate(self.active[place]):
            count = count + time.since(Length(epochs=epoch)).steps * (-1 if i % 2 else 1)
        return at_most(at_least(count), updates - (1 - warm[place]) * begun)
