"""How much of itself each group of weights moves at an update."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
from keras import ops

from kopt import _keras, backends, checks
from kopt._keras import stepping
from kopt.callbacks.averages import is_averaged
from kopt.callbacks.base import InStep
from kopt.numerics import behind
from kopt.optimizers import groups
from kopt.optimizers.quasi_newton.optimizer import QuasiNewton

PREFIX = "update_ratio/"  # of the logs, followed by the name of a group


class UpdateRatio(InStep):
    """Measure how much of itself each group of weights moves at an update: `|change| / |weights|`.

    The logs of each epoch get `update_ratio/<group>`: the mean of the norms of all changes in the epoch, over the mean
    of the norms of the weights before them. While the weights change little, that is the mean of the ratios; weights
    that begin at 0, as those of a new head may, do not make it explode. About 1e-3 is healthy: far more and the
    weights are thrown about, far less and they hardly learn. `kopt.plot.groups(history)` draws it.

    What is measured is what the step has done in the end: with momentum, weight decay, clipping, constraints and
    multipliers, wherever `StagedUnfreeze` is in the list. What does not move has 0, to the bit. Only updates count:
    neither steps that add to an accumulated gradient nor steps that are skipped. An epoch without an update has 0; the
    ratio is inf where all of a group's weights were 0 before the only update of an epoch that has moved them. Weights
    of 16 bits that the optimizer keeps in 32, too, are measured there. All weights are read once more before and after
    each update, which is the more of a step the smaller the batches are.

    Each group is measured over those of its weights that are trainable at the time. Of several optimizers in a
    `MultiOptimizer`, each measures its own weights; a group that is split between them has a log for each, which ends
    with the optimizer's name.

    Args:
        groups: What to measure together: a list of layers, models or regular expressions, which `re.search` looks for
            in a variable's path, a group each; or a dict from names to one or several of these. The first that picks a
            variable counts, and what none picks is not measured. By default each layer with weights of its own is a
            group, which is called as the path of its weights in the model.
        name: What the callback is called in a file and in messages; by default the name of its class.

    Example:
        >>> import keras, kopt, numpy as np
        >>> layers = [keras.layers.Dense(2, kernel_initializer="ones", use_bias=False, name=name) for name in "ab"]
        >>> model = keras.Sequential([keras.Input((1,)), *layers])
        >>> model.compile(kopt.SGD(0.001, multipliers={"a/": 0.0}), loss=lambda y, predicted: predicted - y)
        >>> history = model.fit(np.ones((4, 1)), np.ones((4, 2)), verbose=0, callbacks=[kopt.callbacks.UpdateRatio()])
        >>> {name: round(values[0], 6) for name, values in history.history.items() if name.startswith("update")}
        {'update_ratio/a': 0.0, 'update_ratio/b': 0.0005}

    Reference:
        Karpathy, Li & Johnson, CS231n: Neural networks 3, 2015, https://cs231n.github.io/neural-networks-3/#ratio
    """

    left_behind = (*InStep.left_behind, "_found", "_parts")
    shared = ("groups",)  # layers are what they are
    order = 1  # after those that change weights
    _found = None  # name of a group -> its variables
    _parts = None  # id of an optimizer -> what of them it trains

    def __init__(self, groups=None, name: str | None = None):
        super().__init__(name)
        self.groups = checks.optional(_checked)("groups", groups)

    def prepare(self, model):
        self._found, self._parts = None, {}

    def install(self, optimizer):
        if isinstance(optimizer, QuasiNewton):
            allowed = f"one whose every step is an update, for {self.name}; a line search goes back and forth"
            checks.refuse("optimizer", f"{allowed}, which LineSearchMonitor follows", optimizer.name)
        if self._found is None:
            model = self.model
            known = {id(v) for one in stepping.updating(model.optimizer) for v in stepping.trained_by(one)}
            trained = [v for v in model.trainable_variables if id(v) in known and is_averaged(v)]
            self._found = _by_layer(model, trained) if self.groups is None else _by_key(self.groups, trained)
        own = {id(variable) for variable in stepping.trained_by(optimizer)}
        parts = {name: [v for v in variables if id(v) in own] for name, variables in self._found.items()}
        parts = {name: variables for name, variables in parts.items() if variables}
        if parts:
            self._parts[id(optimizer)] = _Part(self, optimizer, parts)

    def before_update(self, optimizer):
        if part := self._parts.get(id(optimizer)):
            part.remember()

    def after_update(self, optimizer, variables, happened):
        if part := self._parts.get(id(optimizer)):
            part.measure(happened)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        optimizers = stepping.updating(self.model.optimizer)
        found = {name: {} for name in self._found or ()}
        for optimizer, suffix in zip(optimizers, stepping.suffixes(optimizers), strict=True):
            if part := self._parts.get(id(optimizer)):
                for name, ratio in part.ratios().items():
                    found[name][suffix] = ratio
        for name, ratios in found.items():
            for suffix, ratio in (ratios or {"": 0.0}).items():
                self.note(logs, PREFIX + name + suffix * (len(ratios) > 1), ratio)

    def let_go(self):
        self._found, self._parts = None, {}


class _Part:
    """What is measured in the step of one optimizer."""

    def __init__(self, callback, optimizer, parts):
        self.names, self.sizes = list(parts), [len(variables) for variables in parts.values()]
        self.variables = [variable for variables in parts.values() for variable in variables]
        self.dtypes = [backends.wide(_keras.dtype_of(variable)) for variable in self.variables]
        is_ours = isinstance(optimizer, _keras.OptimizerBridge)
        self.masters = [optimizer.held(variable).master if is_ours else None for variable in self.variables]
        self.has_masters = any(master is not None for master in self.masters)
        self.sums = callback.add_variable(optimizer, (2, len(parts)), name="update_ratios")
        self.before = []
        self.room = []  # on torch, where the weights are copied to: new memory for them takes longer than all else

    def read(self) -> list:
        """The weights as they are now; a zero for one that is not trainable, which JAX does not have in the step."""
        if backends.BACKEND == "torch" and not self.has_masters and not _keras.is_stateless():
            held = [_keras.memory(one) if one.trainable else ops.zeros(()) for one in self.variables]
            return backends.cast_all(held, self.dtypes)
        listed = zip(self.variables, self.dtypes, self.masters, strict=True)
        return [_read(*one) if one[0].trainable else ops.zeros((), one[1]) for one in listed]

    def remember(self) -> None:
        """Before a step: tensor code."""
        self.before = self.read()
        if backends.BACKEND == "torch":
            shaped = zip(self.variables, self.dtypes, strict=True)
            self.room = self.room or [ops.zeros(tuple(one.shape), dtype) for one, dtype in shaped]
            self.before = [room.copy_(now) for room, now in zip(self.room, self.before, strict=True)]

    def measure(self, happened) -> None:
        """After a step: tensor code."""
        before, after = self.before, self.read()  # here, for a loop would carry what is read in it
        self.before = []

        def add():
            found = [self.norms(before)]
            pairs = zip(before, after, strict=True)
            is_torch = backends.BACKEND == "torch"
            found.append(self.norms([old.sub_(new) if is_torch else old - new for old, new in pairs]))
            self.sums.assign_add(ops.cast(ops.stack(found), self.sums.dtype))

        backends.when(happened, add, [self.sums])

    def norms(self, arrays):
        """The norm of each group."""
        if backends.BACKEND == "torch":
            return backends.norms(backends.split(backends.norms(arrays), self.sizes))
        squares = iter([ops.cast(ops.sum(ops.square(array)), self.sums.dtype) for array in arrays])
        return ops.stack([ops.sqrt(sum(next(squares) for _ in range(size))) for size in self.sizes])

    def ratios(self) -> dict[str, float]:
        """Of the updates since this was last called, by the names of the groups."""
        weights, moved = _keras.to_numpy(self.sums).astype("float64")
        self.sums.assign(np.zeros(self.sums.shape))
        with np.errstate(divide="ignore", invalid="ignore"):
            return dict(zip(self.names, np.where(moved == 0, 0.0, moved / weights).tolist(), strict=True))


def _read(variable, dtype, master):
    """A weight; the wide one behind a narrow one, if there is one."""
    if master is None:
        return backends.read(variable, dtype)
    return behind(backends.read(variable, _keras.dtype_of(variable)), backends.read(master, dtype))


def _checked(name, value):
    """A list of keys, or a dict from names to lists of keys."""
    if not isinstance(value, Mapping):
        return checks.keys(name, value)
    allowed = "a dict from names to layers, models or regular expressions, or a list of these"
    if not value:
        checks.refuse(name, allowed, value)
    try:
        return {checks.sentence(name, key): checks.keys(name, keys) for key, keys in value.items()}
    except ValueError:
        return checks.refuse(name, allowed, value)


def _by_key(given, variables) -> dict[str, list]:
    """The variables of each group."""
    if isinstance(given, dict):
        found = [groups.Group(name, keys, 1.0) for name, keys in given.items()]
    else:
        found = groups.parsed("groups", [(key, 1.0) for key in given])
    owner = groups.assigned("groups", found, variables)
    return {
        group.name: [variable for variable, place in zip(variables, owner, strict=True) if place == number]
        for number, group in enumerate(found)
    }


def _by_layer(model, variables) -> dict[str, list]:
    """The variables of each layer, by the path that they have in common, below the model."""
    layer_of = {id(v): id(layer) for layer in _keras.layers_of(model) for v in _keras.own_weights(layer)}
    together: dict[int, list] = {}
    for variable in variables:
        together.setdefault(layer_of.get(id(variable), id(variable)), []).append(variable)
    found, seen = {}, Counter()
    for of_layer in together.values():
        path, _, own = _keras.path_of(of_layer[0]).removeprefix(f"{model.name}/").rpartition("/")
        name = path or own
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name}#{seen[name]}"] = of_layer
    return found
