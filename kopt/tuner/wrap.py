"""`wrap`: what any tuner of KerasTuner lacks for learning rates, around the function that builds the model."""

import contextlib
import functools
import os

import keras
import keras_tuner
import numpy as np

from kopt import checks
from kopt.tuner import engine, trial
from kopt.tuner.plan import seed_of

SEED = "kopt/seed"  # of the training, where a search says it
KEPT = "all", "best", "none"
LAST = "kopt_last.weights.h5"  # how a rung of Hyperband ended, beside KerasTuner's file of its best epoch


class Wrapped(keras_tuner.HyperModel):
    """What `wrap` makes of a `build` function."""

    def __init__(self, build, seed, explode, keep_weights, horizon_epochs):
        super().__init__()
        if isinstance(build, keras.Model) or not callable(getattr(build, "build", build)):
            allowed = "a function `build(hp)` that returns a compiled model, or a keras_tuner.HyperModel"
            checks.refuse("build", allowed, build)
        self.inner = build
        self.seed = checks.count(0)("seed", seed)
        self.explode = checks.above_one("explode", explode)
        self.keep_weights = checks.one_of(*KEPT)("keep_weights", keep_weights)
        self.horizon_epochs = checks.optional(checks.count(1))("horizon_epochs", horizon_epochs)
        self.policy, self.distribution = keras.config.dtype_policy(), keras.distribution.distribution()
        self.execution = 0  # how often the model of these hyperparameters has been trained already
        self.trained = None  # the hyperparameters of the last training
        self.scores: list = []  # of the trainings of these hyperparameters

    def declare_hyperparameters(self, hp):
        if isinstance(self.inner, keras_tuner.HyperModel):
            self.inner.declare_hyperparameters(hp)

    def build(self, hp):
        self.execution = self.execution if hp is self.trained else 0
        keras.config.set_dtype_policy(self.policy)  # KerasTuner clears the session, and with it these two
        keras.distribution.set_distribution(self.distribution)
        seed = hp.values.get(SEED)
        keras.utils.set_random_seed(seed_of(self.seed, self.execution) if seed is None else seed)
        with trial.fatal("`build`"):
            model = getattr(self.inner, "build", self.inner)(hp)
        if not isinstance(model, keras.Model) or not model.compiled:
            raise keras_tuner.errors.FatalTypeError(
                f"`build` must be a function that returns a compiled model. Received: build(hp)={model!r}"
            )
        if model.built and isinstance(model.optimizer, keras.optimizers.Optimizer):
            model.optimizer.build(model.trainable_variables)  # or files would load without its state
        return model

    def fit(self, hp, model, *args, **kwargs):
        running = Running(hp, kwargs)
        before = running.resume(model) if running.is_promoted else None
        kwargs["callbacks"] = running.callbacks(self.keep_weights)
        horizon = self.horizon_epochs or running.horizon
        done = self.train(hp, model, running.objective, args, kwargs, before, horizon)
        running.save(model)
        self.scores = [*(self.scores if self.execution else []), running.score(done)]
        self.trained, self.execution = hp, self.execution + 1
        if self.keep_weights == "best" and not running.is_rung and self.execution == running.executions:
            running.keep_best(self.scores)
        return told(done, running.objective)

    @property
    def has_own_fit(self) -> bool:
        """Whether the user's `fit` trains, and not the model's."""
        return getattr(type(self.inner), "fit", keras_tuner.HyperModel.fit) is not keras_tuner.HyperModel.fit

    def train(self, hp, model, objective, args, kwargs, before=None, horizon=None) -> trial.Training:
        """Train by the user's own `fit`, if there is one, or the model's."""
        fit = functools.partial(self.inner.fit, hp, model) if self.has_own_fit else model.fit
        with trial.fatal("The training"):
            return trial.train(fit, model, objective, self.explode, args, kwargs, before=before, horizon=horizon)


def wrap(build, *, seed: int = 0, explode: float = 3.0, keep_weights: str = "all", horizon_epochs: int | None = None):
    """A `build` function for any tuner of KerasTuner, so that it can be trusted with learning rates.

    Around the function, and around the `fit` of every trial:

    - **Divergence.** A training is stopped when its loss is not finite or stays above `explode` times the untrained
      one. Its objective is then a finite penalty, about `explode` times the untrained value (of a metric to maximise,
      the untrained value), and its metric `kopt_diverged` is 1. KerasTuner by itself scores an infinite loss as
      perfect (`BayesianOptimization`), promotes nobody (`Hyperband`), or ends the search after three NaN.
    - **Hyperband** goes on with the weights, the optimizer's state and the step with which the last rung ended.
      Schedules are laid out for the longest training that there can be, and do not begin anew with each rung.
    - **Schedules** of kopt learn from `fit` how long they are.
    - **Seeds.** The same for every trial, another for each of `executions_per_trial`.
    - **Errors** of yours (not a model that is too large for the memory) end the search at once, with their traceback.

    Args:
        build: A function of `hp` that returns a compiled model, or a `keras_tuner.HyperModel`, whose `fit` is used too.
        seed: What the seeds of the trainings follow from.
        explode: How many times the untrained loss is too much.
        keep_weights: "all" keeps the weights of each trial's best epoch, as KerasTuner does, "best" those of the best
            trial, "none" none. Hyperband needs all.
        horizon_epochs: How many epochs schedules are laid out for; by default those of `fit`, or Hyperband's
            `max_epochs`.

    Returns:
        A `keras_tuner.HyperModel`.

    Example:
        >>> import keras, keras_tuner, kopt.tuner, numpy as np, tempfile
        >>> def build(hp):
        ...     model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        ...     model.compile(kopt.SGD(kopt.tuner.learning_rate(hp, rule="sgd")), loss="mse")
        ...     return model
        >>> tuner = keras_tuner.RandomSearch(
        ...     kopt.tuner.wrap(build), objective="val_loss", max_trials=2, seed=1, directory=tempfile.mkdtemp())
        >>> x = np.ones((8, 2))
        >>> tuner.search(x, x[:, 0], validation_data=(x, x[:, 0]), epochs=1, verbose=0)
        >>> tuner.get_best_hyperparameters()[0].get("learning_rate") < 1
        True
    """
    return Wrapped(build, seed, explode, keep_weights, horizon_epochs)


def told(done, objective):
    """What KerasTuner is given: a penalty where the training diverged, and the flag that says so."""
    results, flag = done.results, float(done.diverged)
    extra = {"kopt_diverged": flag} | ({} if done.loss is None else {"kopt_untrained_loss": done.loss})
    extra |= {f"kopt_untrained_{name}": value for name, value in done.untrained.items()}
    if isinstance(results, keras.callbacks.History):
        epochs = max(map(len, results.history.values()), default=0)
        if done.diverged:
            epochs = max(epochs, 1)
            results.history = {name: _finite(values) for name, values in results.history.items()}
            results.history |= {name: [penalty] * epochs for name, penalty in done.penalties.items()}
        results.history |= {name: [value] * epochs for name, value in extra.items()}
        return results
    if isinstance(results, dict):
        return results | extra | ({objective.name: done.penalty} if done.diverged else {})
    if not isinstance(results, (int, float, np.floating)):
        return results  # which KerasTuner refuses
    return {objective.name: done.penalty if done.diverged else float(results)} | extra


def _finite(values) -> list[float]:
    return [float(value) if np.isfinite(value) else float(np.finfo("float32").max) for value in values]


class Running:
    """What KerasTuner tells of the trial that runs: its tuner, its callbacks, its rung of Hyperband."""

    def __init__(self, hp, kwargs):
        self.hp, self.given = hp, list(kwargs.get("callbacks") or [])
        self.tuner, self.trial = next(
            ((one.tuner, one.trial) for one in self.given if hasattr(one, "tuner") and hasattr(one, "trial")),
            (None, None),
        )
        self.objective = self.tuner.oracle.objective if self.tuner else keras_tuner.Objective(trial.DEFAULT, "min")
        self.is_rung = "tuner/epochs" in hp.values
        self.is_promoted = bool(hp.values.get("tuner/trial_id"))

    @property
    def executions(self) -> int:
        return getattr(self.tuner, "executions_per_trial", 1)

    @property
    def horizon(self) -> int | None:
        """The epochs of Hyperband's last rung."""
        return getattr(engine.made_with(self.tuner.oracle), "max_epochs", None) if self.is_rung else None

    def callbacks(self, keep_weights) -> list:
        """Those that are given, without the one that saves weights if none are to be kept."""
        drops = keep_weights == "none" and not self.is_rung
        return [one for one in self.given if not (drops and self._saves(one))]

    @staticmethod
    def _saves(callback) -> bool:
        return type(callback).__name__ == "SaveBestEpoch"

    def resume(self, model) -> dict:
        """Go on as the last rung ended; what is known of the untrained model."""
        parent = self.hp.values["tuner/trial_id"]
        model.optimizer.build(model.trainable_variables)
        model.load_weights(os.path.join(self.tuner.get_trial_dir(parent), LAST))
        metrics, prefix = self.tuner.oracle.get_trial(parent).metrics, "kopt_untrained_"
        names = [name for name in metrics.metrics if name.startswith(prefix)]
        return {name.removeprefix(prefix): metrics.get_last_value(name) for name in names}

    def save(self, model) -> None:
        if self.is_rung:
            model.save_weights(os.path.join(self.tuner.get_trial_dir(self.trial.trial_id), LAST))
            best = next((one.filepath for one in self.given if self._saves(one)), None)
            if best and not os.path.exists(best):  # no epoch had a finite objective; KerasTuner reads it all the same
                model.save_weights(best)

    def score(self, done) -> float:
        """The best epoch, as KerasTuner has it."""
        values = [done.penalty] if done.diverged else trial.objective_values(done.results, self.objective)
        return (min if self.objective.direction == "min" else max)(values, default=done.penalty)

    def keep_best(self, scores) -> None:
        saver = next(filter(self._saves, self.given), None)
        if saver:
            keep_best(self.tuner, self.trial, float(np.mean(scores)), os.path.basename(saver.filepath))


def keep_best(tuner, one, score, filename) -> None:
    """Delete the weights of a trial that has just got a score, or those of the best before, whichever is worse."""
    best = next((other for other in tuner.oracle.get_best_trials(1) if other.score is not None), None)
    if best is not None:
        loser = best if tuner.oracle.objective.better_than(score, best.score) else one
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(tuner.get_trial_dir(loser.trial_id), filename))
