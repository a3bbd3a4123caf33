"""What is changed in KerasTuner where `launch.py` has started the process, so that a search ends whoever dies."""

import datetime
import functools
import inspect
import os
import time
from collections.abc import Callable

import grpc
import keras_tuner
from keras_tuner.engine.base_tuner import BaseTuner
from keras_tuner.engine.trial import TrialStatus
from keras_tuner.src import utils


def around_new_tuners(before: Callable, after: Callable):
    """Have every new tuner take `overwrite` from `before(project, overwrite)`, and show itself to `after(tuner)`."""
    made = BaseTuner.__init__

    @functools.wraps(made)
    def init(self, *args, **kwargs):
        given = inspect.signature(made).bind(self, *args, **kwargs)
        given.apply_defaults()
        of = given.arguments
        project = os.path.join(of["directory"] or ".", of["project_name"] or "untitled_project")
        of["overwrite"] = before(project, of["overwrite"])
        made(*given.args, **given.kwargs)
        after(self)

    BaseTuner.__init__ = init


def stop_after_failures():
    """Have an oracle end the search at too many failures in a row, where its error would keep its lock for ever."""
    judged = keras_tuner.Oracle._check_consecutive_failures

    def check(oracle):
        try:
            judged(oracle)
        except RuntimeError as error:
            if not hasattr(oracle, "stopped_by"):  # trials that others are running may fail after it
                print(f"The search is stopped. {error}")
            oracle.stopped_by = error
            stop(oracle)

    keras_tuner.Oracle._check_consecutive_failures = check


def stop(oracle: keras_tuner.Oracle):
    """Have an oracle answer STOPPED to all who ask for a trial from now on."""
    oracle._retry_queue.clear()
    oracle.populate_space = lambda trial_id: {"status": "STOPPED"}


def leave_trials_to_workers(oracle: keras_tuner.Oracle):
    """Have a chief that is started again take its workers to run what they ran, where it would hand that out anew."""
    for worker, name in utils.load_json(oracle._get_oracle_fname())["ongoing_trials"].items():
        trial, display = oracle.trials[name], oracle._display
        oracle._retry_queue = [other for other in oracle._retry_queue if other != name]  # where `reload` has put it
        if trial.status == TrialStatus.RUNNING:  # the file says so of the last trials that have ended, too
            oracle.ongoing_trials[worker] = trial
            display.search_start = display.search_start or datetime.datetime.now()
            display.trial_start.setdefault(name, datetime.datetime.now())  # saved only with the next trial
            display.trial_number.setdefault(name, oracle.start_order.index(name) + 1)


def restore_grid(oracle: keras_tuner.Oracle):
    """Have a grid search go on where it was; of itself it saves no order, and ends early or fails."""

    def compare(one: str, other: str) -> int:
        return oracle._compare(*(oracle.trials[name].hyperparameters.values for name in (one, other)))

    if not isinstance(oracle, keras_tuner.oracles.GridSearchOracle):
        return
    for name in sorted(oracle.trials, key=functools.cmp_to_key(compare)):
        oracle._ordered_ids.insert(name)
        oracle._populate_next.append(name)


class Patient:
    """The calls that a worker sends, repeated while a chief that has died is started again."""

    def __init__(self, stub):
        self.stub = stub

    def __getattr__(self, name: str) -> Callable:
        def call(request, **options):
            while True:
                try:
                    return getattr(self.stub, name)(request, **options)
                except grpc.RpcError as error:
                    if error.code() != grpc.StatusCode.UNAVAILABLE:
                        raise
                time.sleep(0.1)

        return call


def outlast_chief(tuner: BaseTuner):
    """Have a worker wait for a chief that is started again, where it would fail and its trial with it."""
    tuner.oracle.stub = Patient(tuner.oracle.stub)


def serve_until(wait: Callable[[], None]):
    """Have a chief whose search is over answer until `wait` returns, and then end at once.

    By itself it asks every 20 s who is left, does not know of workers that have not asked yet, and may wait for a lock
    that an oracle's method has kept when it raised.
    """
    from keras_tuner.src.distribute import oracle_chief  # late, as KerasTuner does: it settles which protobuf is used

    def gone(oracle) -> bool:
        wait()
        return True

    oracle_chief.exit_chief = gone
