"""How torch updates many variables at once: by its kernels, or by a rule on tiles of as much as stays in the cache.

To collect the lists of tensors for that would cost more than the step of many small variables does, so they are kept
while the variables stay where they are.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kopt import _keras, backends, numerics
from kopt.optimizers import kernels, slabs
from kopt.optimizers.program import Program

if backends.BACKEND == "torch":
    import torch

TILE = 2**20  # entries that a rule works on at a time on a CPU, so that its results stay in the cache


def update(optimizer, variables, gradients, shared) -> list:
    """Update what can be updated together; the variables that are left, each with its gradient."""
    if not optimizer.traits.elementwise or _keras.is_stateless():  # there nothing may be changed in place
        return list(zip(variables, gradients, strict=True))
    plan = optimizer.plan
    if plan is None or not plan.holds(variables):
        plan = optimizer.__dict__["plan"] = Plan(optimizer, variables)
    for group in plan.groups:
        group.update(optimizer, [gradients[i].contiguous().resolve_neg() for i in group.places], shared[group.dtype])
    return [(variables[i], gradients[i]) for i in plan.left]


class Plan:
    """How to update some variables: in groups, but those that are `left` one by one."""

    def __init__(self, optimizer, variables):
        self.variables, self.left, alike = list(variables), [], {}
        for i, variable in enumerate(variables):
            held, memory = optimizer.held(variable), _keras.memory(variable)
            if not memory.is_contiguous():
                self.left.append(i)
            else:
                alike.setdefault((held.dtype, held.decayed, memory.device), []).append(i)
        self.groups = [Group(optimizer, variables, places) for places in alike.values()]
        kept = [part for variable in variables for part in optimizer.held(variable).parts]
        self.read = list({id(v): v for v in [*variables, *(getattr(part, "whole", part) for part in kept)]}.values())
        self.memories = list(map(_keras.memory, self.read))
        self.pointers = list(map(_pointer, self.memories))

    def holds(self, variables) -> bool:
        """Whether it is a plan for these variables, and they and their slots are where they were."""
        return (
            len(variables) == len(self.variables)
            and all(map(operator.is_, variables, self.variables))
            and all(map(operator.is_, map(_keras.memory, self.read), self.memories))
            and list(map(_pointer, self.memories)) == self.pointers
            and all(map(_contiguous, self.memories))
        )


class Group:
    """Variables that are updated together: their places among all, their weights, and a list for each slot.

    The weight of a variable of 16 bits is its master, and `narrow` has the variable itself.
    """

    def __init__(self, optimizer, variables, places):
        self.places, self.all_held = places, [optimizer.held(variables[i]) for i in places]
        self.dtype, self.decayed = self.all_held[0].dtype, self.all_held[0].decayed
        self.weights = [_keras.memory(variables[i] if h.master is None else h.master)
                        for i, h in zip(places, self.all_held, strict=True)]  # fmt: skip
        masters = [j for j, held in enumerate(self.all_held) if held.master is not None]
        self.narrow = {j: _keras.memory(variables[places[j]]) for j in masters}
        self.slots = [list(map(_memory, column)) for column in zip(*(h.slots for h in self.all_held), strict=True)]
        self.tiles, self.rooms = None, []  # made when they are needed

    def update(self, optimizer, gradients, shared) -> None:
        for i, memory in self.narrow.items():
            master = self.weights[i]
            if memory.device.type != "cpu" or not torch.equal(master.to(memory.dtype), memory):
                master.copy_(numerics.behind(memory, master))
        self._update(optimizer, gradients, shared)
        for i, memory in self.narrow.items():
            memory.copy_(self.weights[i])

    def _update(self, optimizer, gradients, shared) -> None:
        """By torch's kernel, or else by the rule, tile by tile."""
        l2, decay = (shared.l2 or 0.0, shared.decay or 0.0) if self.decayed else (0.0, 0.0)
        kernel = kernels.find(optimizer.traits.kernel, shared.at, shared.arguments, self.weights[0].device.type)
        if kernel and (not decay or (not l2 and kernels.takes_decay(kernel, decay))):
            decays = {"decay": decay} if decay else {}
            kernel(self.weights, gradients, *self.slots, at=shared.at, l2=l2, **decays, **shared.arguments)
            return
        if self.tiles is None:
            self.tiles = list(self._cut())
        if kernel:
            way = Beside(partial(kernel, at=shared.at, **shared.arguments), l2, decay)
        else:
            way = Program(_whole(optimizer.used_rule, l2, decay, shared), len(self.slots), self.weights[0])
        for tile in self.tiles:
            tile.update(way, [gradients[i] for i in tile.members], self.rooms)

    def _cut(self):
        """The group in tiles: all that share a slab, and of the others each by itself, in parts where it is large."""
        if self.weights[0].device.type != "cpu":
            yield Tile(range(len(self.weights)), self.weights, self.slots, listed=True)
            return
        together = {}
        for i, held in enumerate(self.all_held):
            piece = held.slots[0] if held.slots else None
            together.setdefault(id(piece.slab) if isinstance(piece, slabs.Piece) else -i, []).append(i)
        for members in together.values():
            if len(members) > 1:  # in the order of their slab, whatever the order they came in
                members.sort(key=lambda i: self.all_held[i].slots[0].place)
            weights, slots = [_flat(self.weights[i]) for i in members], self.all_held[members[0]].slots
            if len(members) > 1 and len(members) == len(slots[0].slab.sizes):
                yield Tile(members, weights, [[_flat(_keras.memory(piece.whole))] for piece in slots])
                continue
            slots = [[_flat(column[i]) for i in members] for column in self.slots]
            if len(members) > 1 or len(weights[0]) <= TILE:
                yield Tile(members, weights, slots)
                continue
            for start in range(0, len(weights[0]), TILE):
                cut = slice(start, start + TILE)
                yield Tile(members, [weights[0][cut]], [[slot[cut]] for (slot,) in slots], cut)


@dataclass
class Tile:
    """What a rule works on at a time: the weights of some members of a group, and what holds their slots.

    On a CPU they are flat, and the slots of all members of a slab are one tensor. Elsewhere they are `listed` as they
    are.
    """

    members: list
    weights: list
    slots: list
    cut: slice | None = None  # the part of a member that is larger than a tile
    listed: bool = False

    def __post_init__(self):
        self.size = sum(weight.numel() for weight in self.weights)
        self.starts = {backends.start(tensor) for tensors in (self.weights, *self.slots) for tensor in tensors}

    def update(self, way, gradients, rooms) -> None:
        """Update the weights and the slots; `rooms` is memory that was used before."""
        if self.listed:
            results = way.run_on_lists([gradients, self.weights, *self.slots])
        else:
            gradients = [gradient.view(-1) for gradient in gradients]
            gradients = gradients if self.cut is None else [gradients[0][self.cut]]
            inputs = [x if i in way.used else x[:1] for i, x in enumerate((gradients, self.weights, *self.slots))]
            free = self._free(rooms, way.rooms + sum(len(parts) > 1 for parts in inputs))
            inputs = [torch.cat(parts, out=free.pop()) if len(parts) > 1 else parts[0] for parts in inputs]
            results = way.run(inputs, free)
        step, *values = map(_parts, results, (self.weights, *self.slots))
        values = [self._apart(parts, slot) for parts, slot in zip(values, self.slots, strict=True)]
        torch._foreach_sub_(self.weights, step)
        for slot, parts in zip(self.slots, values, strict=True):
            if parts[0] is not slot[0]:
                torch._foreach_copy_(slot, parts)

    def _free(self, rooms, count) -> list:
        """So many of the rooms, of the size of this tile."""
        if len(rooms) < count or any(len(room) < self.size for room in rooms):
            size = max([self.size, *map(len, rooms)])
            with torch.inference_mode(False):  # the next step may be outside of it
                rooms[:] = [torch.empty(size, dtype=self.weights[0].dtype) for _ in range(max(count, len(rooms)))]
        return [room[: self.size] for room in rooms[:count]]

    def _apart(self, parts, slot) -> list:
        """The parts as they are now, whatever is written before them."""
        if parts[0] is slot[0]:
            return parts
        return [part.clone() if backends.start(part) in self.starts else part for part in parts]


@dataclass
class Beside:
    """A kernel's step with a decay that the kernel cannot do: both together are rounded once, with the weight."""

    kernel: Callable
    l2: float
    decay: float
    rooms, used = 1, range(9)  # all inputs

    def run(self, inputs, rooms) -> list:
        gradient, weight, *slots = inputs
        gradient = gradient + self.l2 * weight if self.l2 else gradient
        moved = torch.mul(weight, -self.decay, out=rooms[0])
        self.kernel([moved], [gradient], *([slot] for slot in slots))
        return [moved.neg_(), *slots]

    def run_on_lists(self, inputs) -> list:
        gradients, weights, *slots = inputs
        gradients = torch._foreach_add(gradients, weights, alpha=self.l2) if self.l2 else gradients
        moved = torch._foreach_mul(weights, -self.decay)
        self.kernel(moved, gradients, *slots)
        return [torch._foreach_neg(moved), *slots]


def _whole(rule, l2, decay, shared):
    """The rule with what else a step does."""

    def whole(gradient, weight, *slots):
        gradient = gradient + l2 * weight if l2 else gradient
        step, *values = rule(gradient, weight, *slots, at=shared.at, **shared.arguments)
        return step + decay * weight if decay else step, *values

    return whole


def _parts(value, like) -> list:
    """A result in parts like these; what is the same for all entries becomes one for each."""
    if isinstance(value, (list, tuple)):
        return value
    if torch.is_tensor(value) and value.dim():
        return [value] if len(like) == 1 else value.split([part.numel() for part in like])
    return [torch.as_tensor(value, dtype=part.dtype, device=part.device).expand_as(part) for part in like]


def _memory(slot):
    return slot.view() if isinstance(slot, slabs.Piece) else _keras.memory(slot)


def _flat(tensor):
    return tensor.detach().view(-1)


_pointer, _contiguous = operator.methodcaller("data_ptr"), operator.methodcaller("is_contiguous")
