"""Stages of a training: from which epoch on which weights have which multiplier, as formulas of time.

What a group of weights has at a moment follows from the moment alone, so that a training that goes on at a later epoch
goes on as it was. A weight has 1 before the first stage that picks it, and in a ramp moves on from what it has to what
the stage says.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kopt import checks
from kopt.optimizers import groups
from kopt.schedules.time import Length, arithmetic


@dataclass(frozen=True)
class Stage:
    """What begins at an epoch: groups with their multipliers, and how long they take to get there."""

    epoch: int
    groups: list
    ramp: Length | None


def parsed(value) -> list[Stage]:
    """The stages of a dict from epochs to multipliers, or of a list of dicts."""
    allowed = (
        "a dict of epochs with the multipliers from each on, such as {0: {base: 0.0}, 3: {base: 0.1}}, or a list of "
        "dicts with `epoch`, `multipliers` and, if they are ramped, `ramp_epochs` or `ramp_steps`"
    )
    known = {"epoch", "multipliers", "ramp_epochs", "ramp_steps"}
    if not isinstance(value, (Mapping, list, tuple)) or not value:
        checks.refuse("stages", allowed, value)
    listed = value
    if isinstance(value, Mapping):
        listed = [{"epoch": epoch, "multipliers": multipliers} for epoch, multipliers in value.items()]
    stages: list[Stage] = []
    for number, given in enumerate(listed):
        if not isinstance(given, Mapping) or not {"epoch", "multipliers"} <= given.keys() <= known:
            checks.refuse("stages", allowed, value)
        epoch = given["epoch"]
        if isinstance(epoch, bool) or not isinstance(epoch, (int, np.integer)) or epoch < 0:
            checks.refuse("stages", f"of epochs that are integers of 0 or more, not {epoch!r}", value)
        if stages and epoch <= stages[-1].epoch:
            checks.refuse(f"stages[{number}]['epoch']", f"later than {stages[-1].epoch}, the one before", epoch)
        found = groups.parsed(f"stages[{number}]['multipliers']", given["multipliers"])
        ramp = Length.of(given.get("ramp_epochs"), given.get("ramp_steps"), prefix="ramp_")
        stages.append(Stage(int(epoch), found, None if ramp.is_open else ramp))
    return stages


@dataclass(frozen=True)
class Turn:
    """From an epoch on, the multiplier of some weights is, or moves to, another."""

    epoch: int
    multiplier: float
    ramp: Length | None


class Track:
    """The multiplier of the weights that the same stages pick, as a formula of time."""

    def __init__(self, name, turns, variables):
        self.name, self.turns, self.variables = name, turns, variables

    def __repr__(self):
        return f"the stages of {self.name!r}"

    def validate(self, time) -> None:
        """Refuse a fit that the formula cannot be followed in."""
        self.value(time)

    def value(self, time):
        """The multiplier at a moment."""
        value = 1.0
        for turn in self.turns:
            xp, epoch = arithmetic(time.epoch), time.epoch
            target = turn.multiplier
            if turn.ramp is not None:
                share = time.since(Length(epochs=turn.epoch)).share(turn.ramp)
                target = xp.where(share >= 1, turn.multiplier, value + share * (turn.multiplier - value))
            value = xp.where(epoch >= turn.epoch, target, value)
        return value

    def stays(self, span) -> int:
        """The epoch from which on nothing changes any more."""
        last = 0
        for turn in self.turns:
            ramp = 0 if turn.ramp is None else turn.ramp.epochs
            if ramp is None:  # in steps
                ramp = turn.ramp.steps * span.accumulation / max(span.batches, 1)
            last = max(last, turn.epoch + int(np.ceil(ramp)))
        return last

    def is_frozen(self, epoch, span) -> bool:
        """Whether the multiplier is 0 for the whole of an epoch."""
        first = span.batches * epoch
        last = first + max(span.batches - 1, 0)
        steps = first // span.accumulation, last // span.accumulation
        moments = [span.time(epoch, done, done_steps) for done, done_steps in zip((first, last), steps, strict=True)]
        return all(float(self.value(moment)) == 0 for moment in moments)

    @property
    def is_held_back(self) -> bool:
        """Whether a stage lets it move less than the rest."""
        return any(turn.multiplier < 1 for turn in self.turns)


def tracks(stages, variables) -> list[Track]:
    """The variables by what the stages give them; those that no stage picks are in none."""
    turns: list[list] = [[] for _ in variables]
    names: list[str] = [""] * len(variables)
    for number, stage in enumerate(stages):
        owner = groups.assigned(f"stages[{number}]['multipliers']", stage.groups, variables)
        for i, place in enumerate(owner):
            if place is not None:
                names[i] = stage.groups[place].name
                turns[i].append(Turn(stage.epoch, stage.groups[place].number, stage.ramp))
    alike: dict[tuple, list[int]] = {}
    for i, of_variable in enumerate(turns):
        if of_variable:
            alike.setdefault((names[i], *of_variable), []).append(i)
    seen: Counter[str] = Counter()
    found = []
    for (name, *of_track), places in alike.items():
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name}#{seen[name]}"
        found.append(Track(unique, of_track, [variables[i] for i in places]))
    return found
