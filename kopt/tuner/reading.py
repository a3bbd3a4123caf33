"""A search as it lies in its folder: the record of its trials, in whatever process."""

import json
import os

from kopt.range_test import RangeTest
from kopt.tuner import engine, oracle, plan
from kopt.tuner.result import SearchResult

RECORD = "range_test.json"  # in the folder of its trial


def result_in(folder, settings, objective) -> SearchResult:
    """What was found so far."""
    trials = engine.trials_in(folder)
    here = oracle.progress(settings, trials.values(), objective)
    answer, sign = here.answer or plan.Answer(), -1 if objective.direction == "max" else 1
    return SearchResult(
        objective=objective.name,
        direction=objective.direction,
        learning_rate=answer.learning_rate,
        batch_size=answer.batch_size,
        interval=answer.interval,
        stable_max=answer.stable_max,
        cliff=answer.cliff,
        score=None if answer.score is None else sign * answer.score,
        error=answer.error,
        trials=[_row(here.trials[place], objective) for place in sorted(here.trials)],
        notes=here.notes,
        range_tests=list(_records(folder, trials)),
        is_complete=here.answer is not None,
    )


def _row(one, objective) -> dict:
    values, is_scored = one.hyperparameters.values, one.status == "COMPLETED"
    diverged = is_scored and oracle.outcome_of(one, objective).diverged
    is_result = is_scored and not diverged and values[oracle.KIND] != "range test"  # and no stand-in for one
    return {
        "kind": values[oracle.KIND],
        "learning_rate": values[oracle.RATE],
        "batch_size": values.get(oracle.SIZE),
        "epochs": values[oracle.EPOCHS],
        "seed": values[oracle.SEED],
        "score": float(one.score) if is_result else None,
        "diverged": diverged,
        "status": one.status,
    }


def _records(folder, trials):
    for one in trials:
        path = os.path.join(folder, f"trial_{one}", RECORD)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                yield RangeTest.from_dict(json.load(file))
