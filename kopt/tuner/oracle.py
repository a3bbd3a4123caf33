"""KerasTuner's oracle for `plan.course`: which trial is next, and a line for each that has ended."""

import dataclasses
import math
import time

import keras_tuner
import numpy as np

from kopt import checks
from kopt.tuner import engine, plan
from kopt.tuner.arm import Outcome
from kopt.tuner.building import RATE
from kopt.tuner.wrap import SEED

ITEM, KIND, EPOCHS, SIZE = "kopt/item", "kopt/kind", "kopt/epochs", "kopt/batch_size"
FIELDS = {KIND: "kind", EPOCHS: "epochs", SEED: "seed", SIZE: "batch_size"}  # in a trial, in an item


@dataclasses.dataclass
class Progress:
    """How far a search is."""

    items: list  # all that was planned so far, in order
    trials: dict  # the place of an item -> its trial
    notes: list[str]
    answer: plan.Answer | None = None  # once nothing is left to try

    @property
    def untried(self) -> list[int]:
        return [place for place in range(len(self.items)) if place not in self.trials]


def progress(settings, trials, objective, check=False) -> Progress:
    """Go through the plan with what is known of the trials; they may be checked to be of this search."""
    known = {trial.hyperparameters.values[ITEM]: trial for trial in trials if ITEM in trial.hyperparameters.values}
    here = Progress([], known, [])
    course = plan.course(settings, here.notes.append)
    try:
        batch = next(course)
        while True:
            start = len(here.items)
            here.items += batch
            found = [known.get(place) for place in range(start, len(here.items))]
            if check:
                for item, trial in zip(batch, found, strict=True):
                    _check_same(item, trial, objective)
            if not all(trial and trial.status in engine.ENDED for trial in found):
                return here
            batch = course.send([outcome_of(trial, objective) for trial in found])
    except StopIteration as end:
        here.answer = end.value
        return here


def _check_same(item, trial, objective) -> None:
    if trial is not None:
        values, is_scored = trial.hyperparameters.values, trial.status == "COMPLETED"
        same = all(values.get(name) == getattr(item, field) for name, field in FIELDS.items())
        same &= abs(values[RATE] / item.learning_rate - 1) <= 1e-6
        if not same or (is_scored and not trial.metrics.exists(objective.name)):
            what = f"trial {trial.trial_id}, at {values[RATE]:.3g}, is of a search with other arguments"
            checks.refuse("overwrite", f"True, or `project_name` another one: {what}", False)


def outcome_of(trial, objective) -> Outcome:
    """What the plan is told of a trial that has ended."""
    if trial.status == "FAILED":
        return Outcome(float("inf"), failed=True)
    sign = -1 if objective.direction == "max" else 1

    def read(name):
        return float(trial.metrics.get_last_value(name)) if trial.metrics.exists(name) else None

    untrained = read("kopt_untrained")
    return Outcome(
        sign * read(objective.name),
        bool(read("kopt_diverged")),
        untrained=None if untrained is None else sign * untrained,
        suggestion=read("kopt_suggestion"),
        diverged_at=read("kopt_diverged_at"),
    )


class CoarseToFine(engine.Oracle):
    """The oracle of `LearningRateSearch`."""

    def __init__(self, objective, max_failed):
        super().__init__(objective=objective, max_consecutive_failed_trials=max_failed)
        self.settings: plan.Settings | None = None
        self.say, self.told = None, 0  # how lines are said; how many notes have been
        self.started: dict[str, float] = {}
        self.spent: list[tuple[int, float]] = []  # epochs and seconds of the trials that this process has seen
        self.verbose = 0

    def begin(self, settings, say) -> None:
        self.settings, self.say = settings, say
        here = progress(settings, self.trials.values(), self.objective, check=True)
        ended = sum(trial.status in engine.ENDED for trial in here.trials.values())
        if ended:
            say(f"goes on after {ended} trials")
        self.told = len(here.notes)

    def progress(self) -> Progress:
        return progress(self.settings, self.trials.values(), self.objective)

    def populate_space(self, trial_id):
        here = self.progress()
        for note in here.notes[self.told :]:
            self.say(note)
        self.told = len(here.notes)
        if here.answer is not None:
            return {"status": "STOPPED"}
        if not here.untried:
            return {"status": "IDLE"}
        place = here.untried[0]
        item = here.items[place]
        values = {hp.name: hp.default for hp in self.hyperparameters.space}
        values |= {RATE: item.learning_rate, ITEM: place, KIND: item.kind, EPOCHS: item.epochs, SEED: item.seed}
        return {"status": "RUNNING", "values": values | ({SIZE: item.batch_size} if item.batch_size else {})}

    @keras_tuner.synchronized
    def create_trial(self, tuner_id):
        trial = super().create_trial(tuner_id)
        if trial.status == "RUNNING":
            self.started[trial.trial_id] = time.monotonic()
        return trial

    @keras_tuner.synchronized
    def end_trial(self, trial):
        super().end_trial(trial)
        seconds = time.monotonic() - self.started.pop(trial.trial_id, time.monotonic())
        self.spent.append((trial.hyperparameters.values[EPOCHS], seconds))
        self.say(self.line(self.trials[trial.trial_id]))

    def line(self, trial) -> str:
        """What is said of a trial that has ended."""
        values, outcome, here = trial.hyperparameters.values, outcome_of(trial, self.objective), self.progress()
        ended = sum(one.status in engine.ENDED for one in here.trials.values())
        size = f", batch size {values[SIZE]}" if SIZE in values else ""
        later = self._later(here)
        head = f"{ended}/{len(here.items) + sum(count for count, _ in later)} {values[KIND]}: "
        if values[KIND] == "range test":
            found = "suggests no rate" if outcome.suggestion is None else f"suggests {outcome.suggestion:.2g}"
            tail = "" if outcome.diverged_at is None else f", explodes at {outcome.diverged_at:.2g}"
            return f"{head}{found}{tail}{size}"
        what = f"{values[RATE]:.2e}{size}, {values[EPOCHS]} epoch{'s' * (values[EPOCHS] != 1)}, "
        why = (trial.message or "").strip().splitlines()[-1:]  # which does not come through from a worker
        value = (
            ": ".join(["failed", *why]) if outcome.failed else "diverged" if outcome.diverged else f"{trial.score:.4g}"
        )
        return f"{head}{what}{self.objective.name} {value}{self._best(values[EPOCHS])}{self._left(here, later)}"

    def get_best_trials(self, num_trials=1):
        found = super().get_best_trials(len(self.trials))
        return [trial for trial in found if trial.hyperparameters.values.get(KIND) != "range test"][:num_trials]

    def _best(self, epochs) -> str:
        """The best so far of as long trainings."""
        same = [trial for trial in self.trials.values() if trial.hyperparameters.values[EPOCHS] == epochs]
        good = [trial for trial in same if trial.status in engine.ENDED and outcome_of(trial, self.objective).is_good]
        if not good:
            return ""
        best = min(good, key=lambda trial: outcome_of(trial, self.objective).score)
        return f" (best {best.score:.4g} at {best.hyperparameters.values[RATE]:.2e})"

    def _later(self, here) -> list[tuple[int, int]]:
        """The trials that are not planned yet, as far as can be told, and how many epochs they have together."""
        known, stages = {item.kind for item in here.items}, self.settings.stages
        arms = len(self.settings.batch_sizes)  # of which each stage leaves half
        counts = {f"stage {i + 1}": (n * math.ceil(arms / 2**i), epochs) for i, (n, epochs) in enumerate(stages)}
        counts["confirm"] = self.settings.confirm * self.settings.top, stages[-1][1]
        return [(n, n * epochs) for kind, (n, epochs) in counts.items() if kind not in known and not here.answer]

    def _left(self, here, later) -> str:
        """The time that is left, at so many seconds a trial and an epoch."""
        left = [(1, here.items[place].epochs) for place in here.untried] + later
        epochs, seconds = np.array(self.spent).T
        costs = np.linalg.lstsq(np.stack([np.ones_like(epochs), epochs], 1), seconds, rcond=None)[0]
        seconds = float(np.sum(np.array(left) @ costs.clip(0))) / max(len(self.tuner_ids), 1) if left else 0
        return f"; about {_duration(seconds)} left" if seconds else ""


def _duration(seconds) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
