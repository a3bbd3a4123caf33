"""How much of an update each variable takes: the multipliers of groups of variables.

    w = old + m (new - old);    old where m = 0, new where m = 1, both to the bit

It is the applied update that is scaled. A rule such as Adam does not see a scaled gradient; a scaled learning rate
stays in the velocity of `SGD`, and does not hold back a decay. The state goes on as if the multiplier were 1. What lies
between the two, or beyond, has its constraint applied once more: it need not hold there.
"""

import contextlib
from collections.abc import Mapping

import numpy as np
from keras import ops

from kopt import _keras, backends, checks
from kopt.numerics import behind, lerp
from kopt.optimizers import groups, kernels
from kopt.optimizers.rule import Argument


class Factors(Mapping):
    """The multipliers of an optimizer by the names of their groups; assign to one, and the next step uses it.

    Args:
        optimizer: The optimizer, which gets a variable with all of them.
        found: The groups.
    """

    def __init__(self, optimizer, found):
        self.groups, self.names = found, [group.name for group in found]
        self.known = np.array([group.number for group in found], checks.held_dtype())
        self.variable = optimizer.add_variable(
            (len(found),),
            lambda shape, dtype: ops.convert_to_tensor(self.known, dtype),
            dtype=checks.held_dtype(),
            aggregation="only_first_replica",
            name=VARIABLE,
        )
        self.portable = None

    def owner(self, variables) -> list[int | None]:
        """For each variable the position of its group, if it is in one; from then on a config can tell them again."""
        owner = groups.assigned("multipliers", self.groups, variables)
        self.portable = [groups.portable("multipliers", group.keys, variables) for group in self.groups]
        return owner

    def numbers(self) -> np.ndarray:
        """All of them; where no value can be read, those that were last known."""
        with contextlib.suppress(NotImplementedError, TypeError):
            self.known = _keras.to_numpy(self.variable)
        return self.known

    def __getitem__(self, key):
        return float(str(self.numbers()[self._place(key)]))

    def __setitem__(self, key, value):
        self.assign({key: value})

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)

    def __repr__(self):
        return repr(dict(self))

    def _place(self, key) -> int:
        for place, group in enumerate(self.groups):
            if any(key is one for one in group.keys):
                return place
        name = key if isinstance(key, str) else groups.name_of(key)
        if name not in self.names:
            raise KeyError(f"`multipliers` has {', '.join(map(repr, self.names))}. Received: {name!r}")
        return self.names.index(name)

    def assign(self, given) -> None:
        """Assign to some of them."""
        if not isinstance(given, Mapping):
            checks.refuse("multipliers", f"a dict of some of {', '.join(map(repr, self.names))}", given)
        numbers = self.numbers().copy()
        for key, value in given.items():
            try:
                place = self._place(key)
            except KeyError:
                allowed = f"a dict of some of {', '.join(map(repr, self.names))}, as it was made"
                checks.refuse("multipliers", allowed, given)
            numbers[place] = checks.nonnegative(f"multipliers[{self.names[place]!r}]", value)
        _keras.assign("multipliers", self.variable, numbers)
        self.known = numbers

    def config(self) -> list:
        """The groups as a config holds them, with the numbers in use."""
        keys = self.portable or [groups.portable("multipliers", group.keys, []) for group in self.groups]
        return [{"name": n, "keys": k, "number": self[n]} for n, k in zip(self.names, keys, strict=True)]


VARIABLE = "multipliers"


class Multipliers(Argument):
    """The argument `multipliers`: None, or `Factors`."""

    def __init__(self):
        super().__init__(checks.optional(groups.parsed))

    def __get__(self, optimizer, owner=None):
        return self if optimizer is None else optimizer.factors

    def __set__(self, optimizer, value):
        if optimizer.ready and value is not optimizer.factors:
            if optimizer.factors is None:
                checks.refuse(self.name, "given when the optimizer is made, to be changed later", value)
            optimizer.factors.assign(value)


@contextlib.contextmanager
def blending(optimizer, taken):
    """A context in which an optimizer updates variables; when it ends, each has taken its share of the update.

    Args:
        optimizer: The optimizer, of which the masters of 16-bit weights take the same share.
        taken: For each variable that takes another share than all, the variable, the share, which is a number or a
            tensor, and the rows that the update is confined to, or None.
    """
    weights = [Weight(optimizer, variable, share, rows) for variable, share, rows in taken if not is_number(share, 1)]
    yield
    blend(weights)


@contextlib.contextmanager
def blending_around(optimizer, taken):
    """The same around the whole `apply` of an optimizer, on every replica; `taken()` has variables and shares."""
    weights = []

    def copy():
        for variable, share in taken():
            is_weight = not getattr(variable, "overwrite_with_gradient", False)  # as Keras's float8 scales are
            if is_weight and not is_number(share, 1):
                weights.append(Weight(optimizer, variable, share))

    with backends.unrecorded():
        backends.once_for_all_replicas(copy)
    yield
    with backends.unrecorded():
        backends.once_for_all_replicas(lambda: blend(weights))


def blend(weights) -> None:
    """Let each weight take its share; in a step of TensorFlow's that XLA does not compile, it compiles this."""

    def all_of_them():
        for weight in weights:
            weight.blend()

    is_graph = backends.BACKEND == "tensorflow" and not backends.is_eager() and backends.strategy() is None
    if is_graph and all(weight.fits_island for weight in weights) and kernels.compiles():
        kernels.island(all_of_them)
    else:
        all_of_them()


class Weight:
    """A weight before an update, and how much of it it takes."""

    def __init__(self, optimizer, variable, share, rows=None):
        self.optimizer, self.variable, self.share, self.rows = optimizer, variable, share, rows
        self.dtype = backends.wide(_keras.dtype_of(variable))
        is_ours = isinstance(optimizer, _keras.OptimizerBridge)
        self.master = optimizer.held(variable).master if is_ours else None
        self.constraint = constraint_of(optimizer, variable) if rows is None else None
        self.before = backends.detached(self.read())

    def read(self):
        if self.rows is not None:
            return backends.read_rows(self.rows, self.variable, self.dtype)
        if self.master is None:
            return backends.read(self.variable, self.dtype)
        return behind(
            backends.read(self.variable, _keras.dtype_of(self.variable)), backends.read(self.master, self.dtype)
        )

    @property
    def fits_island(self) -> bool:
        return self.rows is None and self.constraint is None and backends.is_on_cpu(self.variable)

    def blend(self) -> None:
        after = self.read()
        if is_number(self.share, 0):
            after = self.before
        elif isinstance(self.share, float):
            after = self._part(after, self.share)
        else:
            share = ops.cast(self.share, self.dtype)
            part = ops.where(share == 0, self.before, self._part(after, share))
            after = ops.where(share == 1, after, part)
        if self.rows is not None:
            backends.assign_rows(self.rows, self.variable, after)
            return
        if self.master is not None:
            self.optimizer.assign(self.master, after)
        self.optimizer.assign(self.variable, after)

    def _part(self, after, share):
        part = lerp(self.before, after, share)
        return part if self.constraint is None else self.constraint(part)


def constraint_of(optimizer, variable):
    """The constraint of a variable; a replica's own copy does not know it."""
    if backends.strategy() is not None and isinstance(optimizer, _keras.OptimizerBridge):
        variable = optimizer.trained[optimizer.index_of(variable)]
    return getattr(variable, "constraint", None)


def is_number(share, number) -> bool:
    return isinstance(share, float) and share == number
