"""A training that is killed and started again ends where it would have ended. `tests/resume.py` is what is killed."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.conftest import BACKEND, FLOATX
from tests.resume import SCENARIOS

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the trainings are forked"),
    pytest.mark.skipif(FLOATX != "float32", reason="what is saved is saved alike"),
]
KILLS = int(os.environ.get("KOPT_SOAK", 30 if BACKEND == "tensorflow" else 5))
SEED = int(os.environ.get("KOPT_SEED", 0))
HOOKS = [("on_train_batch_end", 21), ("on_epoch_begin", 3), ("on_epoch_end", 1), ("on_train_batch_end", 13)]
WHERE = dict(zip(SCENARIOS, HOOKS * 9, strict=False))  # each scenario is killed in one of these
WHERE["everything"] = ("on_epoch_begin", 3)  # where what is drawn is restored once, not once more before a batch


class Trainings:
    """The process that forks a training for each order."""

    def __init__(self):
        root = Path(__file__).parents[1]
        environment = {**os.environ, "KERAS_BACKEND": BACKEND, "PYTHONPATH": str(root), "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, "-m", "tests.resume"]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment, cwd=root)
        assert self.process.stdout.readline() == "ready\n"
        self.references, self.seconds = {}, {}

    def run(self, scenario, directory, **order):
        self.process.stdin.write(json.dumps({"scenario": scenario, "directory": str(directory), **order}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert not any(line.startswith("error") for line in answer["said"]), answer["said"][-1]
        return answer

    def result(self, answer):
        kind, _, text = answer["said"][-1].partition(" ")
        return json.loads(text) if kind == "result" else None

    def reference(self, scenario):
        if scenario not in self.references:
            with tempfile.TemporaryDirectory() as directory:
                start = time.monotonic()
                self.references[scenario] = self.result(self.run(scenario, directory))
                self.seconds[scenario] = time.monotonic() - start
        return self.references[scenario]


@pytest.fixture(scope="module")
def trainings():
    made = Trainings()
    yield made
    with made.process:
        made.process.stdin.close()


def was_killed(answer):
    return answer["status"] == 9


FAST = "shuffled", "steps", "polyak", "star"


@pytest.mark.parametrize("scenario", [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SCENARIOS])  # fmt: skip
def test_a_killed_training_ends_the_same(scenario, trainings, tmp_path):
    hook, number = WHERE[scenario]
    assert was_killed(trainings.run(scenario, tmp_path, kill={"hook": hook, "number": number}))
    assert trainings.result(trainings.run(scenario, tmp_path)) == trainings.reference(scenario)


POINTS = {  # an operation of the disk, counted from the opening, which writes a file and removes it; or a hook
    "before a file": {"operation": "create", "number": 2},
    "a part of an array": {"operation": "write", "number": 5, "part": 0.25},
    "half an array": {"operation": "write", "number": 9, "part": 0.5},
    "most of an array": {"operation": "write", "number": 12, "part": 0.75},
    "before the sync": {"operation": "sync", "number": 2},
    "before the rename": {"operation": "rename", "number": 1},
    "before the folder's sync": {"operation": "sync_folder", "number": 1},
    "between data and manifest": {"operation": "create", "number": 3},
    "half a manifest": {"operation": "rename", "number": 2},
    "before its folder's sync": {"operation": "sync_folder", "number": 2},
    "while pruning": {"operation": "unlink", "number": 2},
    "between two removals": {"operation": "unlink", "number": 3},
    "a later save": {"operation": "rename", "number": 6},
    "before the restoring": {"hook": "on_train_begin", "number": 0},
    "after the restoring": {"hook": "on_epoch_begin", "number": 0},
    "a batch": {"hook": "on_train_batch_end", "number": 22},
    "before the save of an epoch": {"hook": "on_epoch_end", "number": 3},
    "after the last save": {"hook": "on_train_end", "number": 0},
}


AROUND_A_SNAPSHOT = {
    "before the first": {"hook": "on_train_batch_end", "number": 12},
    "before its file": {"operation": "create", "number": 2},
    "half of it": {"operation": "write", "number": 2, "part": 0.5},
    "before it has its name": {"operation": "rename", "number": 1},
    "between data and manifest": {"operation": "rename", "number": 2},
    "before the training is saved": {"operation": "write", "number": 25},
    "between two": {"hook": "on_train_batch_end", "number": 30},
    "before the second": {"operation": "create", "number": 2},
    "half of the second": {"operation": "write", "number": 2, "part": 0.5},
    "after the last": {"hook": "on_train_end", "number": 0},
}


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="the store is the same on all backends")
@pytest.mark.parametrize(("scenario", "points"), [("steps", POINTS), ("star", AROUND_A_SNAPSHOT)])
def test_killed_at_every_kind_of_moment(trainings, tmp_path, scenario, points):
    """One training, killed at one point after the other; with snapshots, they and their ensemble are the same."""
    for name, point in points.items():
        assert was_killed(trainings.run(scenario, tmp_path, kill=point)), name
    assert trainings.result(trainings.run(scenario, tmp_path)) == trainings.reference(scenario)


def done(answer):
    """The steps that were done when a training began, and when it ended."""
    said = [line.split(" ", 1) for line in answer["said"]]
    begun = [int(rest) for word, rest in said if word == "begin"]
    ended = [int(rest) for word, rest in said if word == "done"]
    return (begun or [None])[0], (ended or begun or [None])[-1]


@pytest.mark.slow
def test_killed_at_any_moment(trainings, tmp_path_factory):
    """Random kills: nothing unreadable, nothing different, and no more work lost than lies between two saves."""
    moments, killed, runs, furthest = random.Random(SEED), 0, 0, 0
    scenario, directory = "steps", tmp_path_factory.mktemp("run")
    while killed < KILLS:
        trainings.reference(scenario)
        answer = trainings.run(scenario, directory, after=moments.uniform(0.1, 0.9) * trainings.seconds[scenario])
        begin, end = done(answer)
        if begin is not None:
            assert furthest - begin <= SCENARIOS[scenario].steps, answer["said"]
            furthest = max(furthest, end)
        if was_killed(answer):
            killed += 1
            continue
        assert trainings.result(answer) == trainings.reference(scenario)
        runs += 1
        scenario = moments.choice(["steps", "everything", "seek_function"])
        directory, furthest = tmp_path_factory.mktemp("run"), 0
    print(f"{killed} kills, {runs} trainings ended, each as if it had not been killed")
