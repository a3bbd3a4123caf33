"""KerasTuner with files that survive a kill. This file and `mends.py` are all that reaches into it."""

import json
import os

import keras_tuner
from keras_tuner.src import backend
from keras_tuner.src.engine import metrics_tracking

ENDED = "COMPLETED", "FAILED"


def write_json(path: str, tree) -> None:
    """Write a file so that there is always a whole one: KerasTuner writes in place, and a kill would tear it."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(tree, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Oracle(keras_tuner.Oracle):
    """An oracle whose files are whole at any moment, and which goes on from whatever is there."""

    @keras_tuner.synchronized
    def create_trial(self, tuner_id):
        trial = super().create_trial(tuner_id)
        if trial.status == "RUNNING" and trial.metrics.metrics:  # a kill came between its metrics and its end
            trial.metrics = metrics_tracking.MetricsTracker()
        return trial

    def save(self):
        write_json(self._get_oracle_fname(), self.get_state())

    def _save_trial(self, trial):
        write_json(os.path.join(self._get_trial_dir(trial.trial_id), "trial.json"), trial.get_state())

    def reload(self):
        super().reload()
        waiting = [one for one in self.trials if self.trials[one].status not in ENDED]
        self._retry_queue = sorted(waiting, reverse=True)  # taken from its end
        self.start_order = sorted(self.trials)
        self.end_order += [one for one in sorted(self.trials) if one not in waiting and one not in self.end_order]


class Tuner(keras_tuner.Tuner):
    """A tuner like that; it can go on where several workers have begun, and the other way round."""

    def __init__(self, oracle, hypermodel, directory, project_name, overwrite):
        overwrite = overwrite and not is_worker()
        folder = os.path.join(directory or ".", project_name)
        own = os.path.join(folder, f"{os.environ.get('KERASTUNER_TUNER_ID', 'tuner0')}.json")
        if os.path.exists(os.path.join(folder, "oracle.json")) and not os.path.exists(own) and not overwrite:
            write_json(own, {})
        super().__init__(oracle, hypermodel, directory=directory, project_name=project_name, overwrite=overwrite)

    def reload(self):
        try:
            super().reload()
        except ValueError as error:  # of JSON
            message = (
                f"A file in {self.project_dir} is damaged: {error}. Give another `project_name`, or `overwrite=True`"
            )
            raise RuntimeError(message) from error

    def save(self):
        if not is_worker():
            self.oracle.save()
        write_json(self._get_tuner_fname(), self.get_state())

    def keep_weights_of(self, trial, model) -> str:
        """Write the weights where `get_best_models` looks for them, and what builds an unbuilt model; the name."""
        path = self._get_checkpoint_fname(trial.trial_id)
        model.save_weights(path)
        write_json(self._get_build_config_fname(trial.trial_id), model.get_build_config())
        return os.path.basename(path)


def is_worker() -> bool:
    """Whether this process trains for a chief in another one."""
    return "KERASTUNER_ORACLE_IP" in os.environ and not is_chief()


def is_chief() -> bool:
    """Whether this process hands out trials, and trains none."""
    return "KERASTUNER_ORACLE_IP" in os.environ and "chief" in os.environ.get("KERASTUNER_TUNER_ID", "")


def made_with(oracle):
    """The oracle that a worker was made with, which only asks the chief's."""
    return getattr(oracle, "_oracle", oracle)


def trials_in(folder: str) -> dict:
    """The trials whose files are in a project's folder, by id."""
    files = backend.io.glob(os.path.join(folder, "trial_*", "trial.json"))
    found = [keras_tuner.engine.trial.Trial.load(path) for path in sorted(files)]
    return {trial.trial_id: trial for trial in found}
