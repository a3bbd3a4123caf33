"""All four tuners of KerasTuner with kopt's spaces, in a plain installation: `make test-plain` runs this file."""

import tempfile

import keras
import keras_tuner
import numpy as np

import kopt.tuner

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = X.sum(1, keepdims=True)
TUNERS = {
    "RandomSearch": {"max_trials": 3},
    "BayesianOptimization": {"max_trials": 4, "num_initial_points": 2},
    "GridSearch": {"max_trials": 3},
    "Hyperband": {"max_epochs": 3, "factor": 3},
}


def build(hp):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(kopt.tuner.optimizer(hp), loss="mse")
    return model


def best_of(name, directory):
    """The best loss that a tuner finds, and how many trials it took."""
    wrapped = kopt.tuner.wrap(build)
    tuner = getattr(keras_tuner, name)(wrapped, objective="val_loss", seed=1, directory=directory, **TUNERS[name])
    epochs = {} if name == "Hyperband" else {"epochs": 2}
    tuner.search(X, Y, validation_data=(X, Y), batch_size=8, verbose=0, **epochs)
    trials = tuner.oracle.trials.values()
    assert {trial.status for trial in trials} == {"COMPLETED"}
    return min(trial.score for trial in trials), len(trials)


def main():
    for name in TUNERS:
        with tempfile.TemporaryDirectory() as directory:
            loss, count = best_of(name, directory)
        print(f"{name}: {loss:.3g} after {count} trials ({keras.backend.backend()})")


if __name__ == "__main__":
    main()
