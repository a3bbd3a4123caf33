"""Where the slots of small variables live: side by side in one flat variable for each slot, a slab.

A compiled step pays for each variable that it holds, however small. Which variables share a slab follows from their
sizes, dtypes and devices, never from how a step is run; only where variables are sharded or replicated each has slots
of its own. A file knows nothing of slabs: it has an entry for each variable and slot. (One that Keras's
`LossScaleOptimizer` writes has the slabs: it numbers the variables. `state.py` reads both.)
"""

import keras
import numpy as np
from keras import ops

from kopt import _keras, backends

SMALL = 2**14  # entries of the largest variable that goes into a slab
MEMBERS = 64  # variables in a slab at most: the time to compile grows faster than their number


def layout(variables, home) -> list[list[int]]:
    """The positions of the variables that share a slab."""
    if backends.is_strategy(home) or keras.distribution.distribution() is not None:
        return []
    alike: dict[tuple, list[int]] = {}
    for i, variable in enumerate(variables):
        overwritten, place = getattr(variable, "overwrite_with_gradient", False), backends.place(variable)
        if 0 < np.prod(variable.shape) <= SMALL and not overwritten and place is not None:
            alike.setdefault((backends.wide(_keras.dtype_of(variable)), place), []).append(i)
    groups = [found[i : i + MEMBERS] for found in alike.values() for i in range(0, len(found), MEMBERS)]
    return [group for group in groups if len(group) > 1]


class Slab:
    """The flat variables, one for each slot, that a group of small variables shares."""

    def __init__(self, optimizer, slots, variables, dtype):
        self.sizes = [int(np.prod(v.shape)) for v in variables]
        self.ends = np.cumsum(self.sizes).tolist()
        self.wholes = [
            optimizer.add_variable((self.ends[-1],), _keras.constant(slot.initial), dtype, name=f"slab_{slot.name}")
            for slot in slots
        ]
        self.pieces = []  # for each variable, its piece of each slot
        for i, variable in enumerate(variables):
            self.pieces.append(tuple(Piece(whole, self, i, tuple(variable.shape)) for whole in self.wholes))
            for slot, piece in zip(slots, self.pieces[-1], strict=True):
                optimizer.named[id(piece)] = slot.name, _keras.path_of(variable)

    def read(self, whole, members, dtype):
        """The slots of some members, one after the other in their order."""
        value = backends.read(whole, dtype)
        if len(members) == len(self.sizes):
            return value
        return ops.concatenate([value[self.ends[i] - self.sizes[i] : self.ends[i]] for i in members])

    def write(self, whole, members, value) -> None:
        """Assign what `read` gives."""
        if len(members) < len(self.sizes):
            kept, parts, taken = backends.read(whole, whole.dtype), [], 0
            for i, size in enumerate(self.sizes):
                if i in members:
                    parts.append(value[taken : taken + size])
                    taken += size
                else:
                    parts.append(kept[self.ends[i] - size : self.ends[i]])
            value = ops.concatenate(parts)
        whole.assign(value)


class Piece:
    """The part of a slab that is the slot of one variable, to be read and assigned like a variable."""

    def __init__(self, whole, slab, place, shape):
        self.whole, self.slab, self.place, self.shape = whole, slab, place, shape
        self.dtype = whole.dtype

    @property
    def value(self):
        return ops.reshape(self.slab.read(self.whole, [self.place], self.dtype), self.shape)

    def assign(self, value):
        value = ops.convert_to_tensor(value, self.dtype)
        self.slab.write(self.whole, [self.place], ops.reshape(value, (self.slab.sizes[self.place],)))

    def view(self):
        """The piece of the slab's memory, which torch has: what is done to it in place is done to the slab."""
        return self.cut(_keras.memory(self.whole).detach())

    def cut(self, array):
        """The piece of an array of the slab."""
        end = self.slab.ends[self.place]
        return array[end - self.slab.sizes[self.place] : end].reshape(self.shape)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(ops.convert_to_numpy(self.value), dtype)
