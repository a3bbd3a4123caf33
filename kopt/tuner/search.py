"""`LearningRateSearch`: a learning rate from coarse to fine, confirmed with fresh seeds, with its evidence."""

import contextlib
import copy
import inspect
import json
import os
import time
import warnings

import keras
import keras_tuner
import numpy as np

from kopt import checks, finder
from kopt.callbacks.finder import LearningRateFinder
from kopt.tuner import building, engine, oracle, plan, reading, trial
from kopt.tuner.result import SearchResult
from kopt.tuner.wrap import KEPT, Wrapped, keep_best

SHORT, MIDDLE = 10, 3  # the first stages have so many times fewer epochs than the last
FIT = "batch_size", "sample_weight", "class_weight", "shuffle", "steps_per_epoch"  # what a range test is told, too


class LearningRateSearch(engine.Tuner):
    """Search the learning rate of a model on a log scale: coarse first, then fine, then with fresh seeds.

    1. A range test (`kopt.find_learning_rate`) looks at the whole range at once.
    2. Each stage trains with rates spread over its range, all from the same seed, for a budget of epochs. A training is
       ended when its loss explodes. Where the best rate lies at an edge, all diverge or none moves the model, the range
       widens and the stage goes on. The next stage looks at the best again, around it, and below it: longer trainings
       want lower rates.
    3. The lowest rate above the best that diverges is narrowed down, which costs a few of the shortest trials.
    4. The best rates are trained with fresh seeds; a rate that diverges with one of them is out, as are those above it.
       The answer is the lowest that is not worse than the best, seed by seed, by more than a standard error.

    It is a `keras_tuner.Tuner`: `directory` and `project_name` say where its trials are, and a search that was killed
    goes on there when the program is started again. It runs over several processes and machines with KerasTuner's chief
    and workers (`python -m kopt.tuner.launch`). What the model decides besides the rate keeps its default.

    Args:
        build: A function of `hp` that returns a compiled model and asks for `kopt.tuner.learning_rate(hp)`, or for an
            `hp.Float` called "learning_rate", whose range it is then; a function of `learning_rate`; or a compiled
            model, which is copied for each trial, weights and all.
        objective: A metric of the logs, or a `keras_tuner.Objective`. A trial counts its mean over the last tenth of
            the epochs.
        min_learning_rate: The lowest rate, at first; by default what `build` says, or 1e-6.
        max_learning_rate: The highest rate, at first; by default what `build` says, or 10.
        stages: The number of trials and their epochs for each stage; by default 9 with a tenth of the epochs of
            `search`, 5 with a third and 3 with all.
        confirm: With how many fresh seeds the best are trained; 0 trusts the last stage.
        top: How many rates are confirmed.
        batch_sizes: Several batch sizes to search at the same time; each stage leaves half of them.
        range_test: Whether to begin with a range test, which needs a "loss" in the logs of each batch.
        max_widen: How often a stage may widen its range.
        explode: How many times the untrained loss is too much.
        keep_weights: "none", "best" (of the best trial), or "all": the weights at the end of trials.
        seed: What all seeds and rates follow from.
        directory: Where to keep the trials; the working directory, if nothing is said.
        project_name: The folder in it.
        overwrite: Whether to begin anew where there is a search already.

    Example:
        >>> import keras, kopt.tuner, numpy as np, tempfile
        >>> def build(learning_rate):
        ...     model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        ...     model.compile(keras.optimizers.SGD(learning_rate), loss="mse")
        ...     return model
        >>> search = kopt.tuner.LearningRateSearch(
        ...     build, "val_loss", stages=[(4, 1), (2, 2)], confirm=2, directory=tempfile.mkdtemp())
        >>> x = np.random.default_rng(0).normal(size=(64, 2))
        >>> search.search(x, x.sum(1), validation_data=(x, x.sum(1)), epochs=2, batch_size=8, verbose=0)
        >>> 0.01 < search.best_learning_rate < search.cliff
        True
    """

    def __init__(
        self,
        build,
        objective="val_loss",
        *,
        min_learning_rate: float | None = None,
        max_learning_rate: float | None = None,
        stages=None,
        confirm: int = 3,
        top: int = 2,
        batch_sizes=None,
        range_test: bool = True,
        max_widen: int = 2,
        explode: float = 3.0,
        keep_weights: str = "none",
        seed: int = 0,
        directory: str | None = None,
        project_name: str = "learning_rate_search",
        overwrite: bool = False,
    ):
        self.stages = checks.optional(_stages)("stages", stages)
        self.confirm, self.top = checks.count(0)("confirm", confirm), checks.count(1)("top", top)
        sizes = checks.several(checks.count(1), "a list of integers of 1 or more")
        self.batch_sizes = list(dict.fromkeys(checks.optional(sizes)("batch_sizes", batch_sizes) or [])) or None
        self.range_test = checks.boolean("range_test", range_test)
        self.max_widen = checks.count(0)("max_widen", max_widen)
        self.keep_weights = checks.one_of(*KEPT)("keep_weights", keep_weights)
        self.seed, self.fit_verbose = checks.count(0)("seed", seed), 0
        hypermodel = Wrapped(building.of_hp(build), seed, explode, "none", None)
        if not isinstance(objective, (str, keras_tuner.Objective)) or hasattr(objective, "name_to_direction"):
            checks.refuse("objective", "the name of one metric, or a keras_tuner.Objective", objective)
        directory = checks.optional(checks.path)("directory", directory)
        try:
            os.makedirs(directory or ".", exist_ok=True)
        except OSError as error:
            checks.refuse("directory", f"a folder, or a path where one can be made ({error})", directory)
        with _as_raised():
            super().__init__(
                oracle.CoarseToFine(objective, 2**31), hypermodel, directory=directory,
                project_name=checks.text("project_name", project_name),
                overwrite=checks.boolean("overwrite", overwrite),
            )  # fmt: skip
            self.low, self.high = building.range_of(hypermodel, min_learning_rate, max_learning_rate)
        self.settings: plan.Settings | None = None
        self._result, self._was_idle = None, False

    def search(self, *fit_args, epochs: int | None = None, verbose=1, **fit_kwargs):
        """Run the search, or go on with it.

        Args:
            *fit_args: As for `fit`: the data.
            epochs: How long a training is in the end.
            verbose: 0 says nothing, 1 a line for each trial, 2 what `fit` says, too.
            **fit_kwargs: As for `fit`: `validation_data`, `batch_size`, `callbacks`, ...
        """
        if epochs is None and self.stages is None:
            checks.refuse("epochs", "given: how long a training is in the end", None)
        longest = checks.optional(checks.count(1))("epochs", epochs) or self.stages[-1][1]
        if self.stages and longest != self.stages[-1][1]:
            checks.refuse("epochs", f"left out, or those of the last of `stages`: {self.stages[-1][1]}", epochs)
        for name in ("initial_epoch", *(["batch_size"] if self.batch_sizes else [])):
            if name in fit_kwargs:
                checks.refuse(name, "left out" + " beside `batch_sizes`" * (name == "batch_size"), fit_kwargs[name])
        has_own_fit = self.hypermodel.has_own_fit
        given = fit_kwargs if has_own_fit else _bound(fit_args, fit_kwargs)
        for name in ("x", "validation_data"):
            if hasattr(given.get(name), "__next__"):
                checks.refuse(name, "data that can be read again, for every trial: no generator", given[name])
        if self.batch_sizes and not (has_own_fit or trial.are_arrays(given.get("x"))):
            checks.refuse("batch_sizes", "None beside data that come in batches", self.batch_sizes)
        fit_kwargs["callbacks"] = _callbacks(fit_kwargs.get("callbacks"))
        stages = self.stages or _default_stages(longest)
        has_range_test = self.range_test and not has_own_fit and given.get("x") is not None
        self.settings = plan.Settings(
            self.low, self.high, stages, self.confirm, tuple(self.batch_sizes or (None,)), self.top, self.max_widen,
            has_range_test, self.seed,
        )  # fmt: skip
        shown = 1 if verbose == "auto" else checks.count(0)("verbose", verbose)
        self.fit_verbose, self._result = "auto" if shown > 1 else 0, None
        if not engine.is_worker():
            self._check_project(given)
            self.oracle.begin(self.settings, _print if shown else lambda line: None)
        with _as_raised():
            if not engine.is_chief() and not has_own_fit:
                building.check_rate_counts(self.hypermodel, (self.low, self.high))
            super().search(*fit_args, **fit_kwargs)
        if shown and not engine.is_worker():
            print("\n".join(["", *self.result.verdict()]))
        if self.result.is_complete and self.result.learning_rate is None:
            warnings.warn(" ".join([*self.result.notes[-1:], *self.result.verdict()]), stacklevel=2)

    def _check_project(self, given) -> None:
        """Refuse to go on with the search of another model or other data; what can be told of them lies in a file."""
        path, here = os.path.join(self.project_dir, "search.json"), {"explode": self.hypermodel.explode}
        with _as_raised():
            model = self.hypermodel.build(keras_tuner.HyperParameters())
        here["model"] = [list(weight.shape) for weight in model.weights]
        here["optimizer"] = type(model.optimizer).__name__
        for name in ("x", "y", "validation_data", "batch_size", "steps_per_epoch", "validation_split"):
            here[name] = _described(given.get(name))
        if self.oracle.trials and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                there = json.load(file)
            for name in here:
                if there.get(name) != here[name]:
                    what = f"here is a search with {name}={there.get(name)!r}, not {here[name]!r}"
                    checks.refuse("overwrite", f"True, or `project_name` another one: {what}", False)
        engine.write_json(path, here)

    def pre_create_trial(self):
        if self._was_idle:
            time.sleep(0.2)  # KerasTuner asks again at once
        self._was_idle = True

    def on_trial_begin(self, trial):
        self._was_idle = False
        super().on_trial_begin(trial)

    def run_trial(self, one, *args, **kwargs):
        with trial.fatal(f"Trial {one.trial_id}"):
            return self._run_trial(one, args, kwargs)

    def _run_trial(self, one, args, kwargs):
        hp, values = one.hyperparameters, one.hyperparameters.values
        keras.utils.clear_session()
        model = self.hypermodel.build(hp)
        kwargs = kwargs | ({"batch_size": values[oracle.SIZE]} if oracle.SIZE in values else {})
        if values[oracle.KIND] == "range test":
            return self._run_range_test(one, model, args, kwargs)
        kwargs |= {"callbacks": copy.deepcopy(kwargs.get("callbacks") or []), "verbose": self.fit_verbose}
        objective = self.oracle.objective
        done = self.hypermodel.train(hp, model, objective, args, kwargs | {"epochs": values[oracle.EPOCHS]})
        found = trial.objective_values(done.results, objective)
        if not found and not done.diverged:
            raise keras_tuner.errors.FatalValueError(
                f"`fit` must return a History, the objective, or a dict with {objective.name!r}. "
                f"Received: fit(...)={done.results!r}"
            )
        score = done.penalty if done.diverged else float(np.mean(found[-max(1, len(found) // 10) :]))
        filename = None if self.keep_weights == "none" else self.keep_weights_of(one, model)
        if self.keep_weights == "best":
            keep_best(self, one, score, filename)
        return self._told(done.untrained, score, kopt_diverged=float(done.diverged))

    def _run_range_test(self, one, model, args, kwargs):
        objective, explode = self.oracle.objective, self.hypermodel.explode
        given = _bound(args, kwargs)
        given = {name: given[name] for name in ("x", "y", *FIT) if given.get(name) is not None}
        limits = {"min_learning_rate": self.settings.low, "max_learning_rate": self.settings.high}
        known = trial.untrained(model, *args, **kwargs)
        record = finder.find_learning_rate(model, **given, **limits, explode=explode, verbose=0)
        engine.write_json(os.path.join(self.get_trial_dir(one.trial_id), reading.RECORD), record.to_dict())
        loss = known.get("val_loss", known.get("loss", record.initial_loss))
        penalty = trial.penalties_of(objective, known, loss, explode)[objective.name]
        found = {"kopt_suggestion": record.suggestion, "kopt_diverged_at": record.diverged_at}
        return self._told(known, penalty, kopt_diverged=0.0, **{n: v for n, v in found.items() if v is not None})

    def _told(self, known, score, **others) -> dict:
        name = self.oracle.objective.name
        return {name: score, **others} | ({"kopt_untrained": known[name]} if name in known else {})

    @property
    def result(self) -> SearchResult:
        """What was found so far, read from the files of the trials, in whatever process."""
        if self.settings is None:
            raise RuntimeError("There is no result before `search`, which also goes on with a search that has ended")
        if self._result is None or not self._result.is_complete:
            self._result = reading.result_in(self.project_dir, self.settings, self.oracle.objective)
        return self._result

    @property
    def best_learning_rate(self) -> float | None:
        """The rate to train with."""
        return self.result.learning_rate

    @property
    def best_batch_size(self) -> int | None:
        """The batch size to train with, if several were tried."""
        return self.result.batch_size

    @property
    def interval(self) -> tuple[float, float] | None:
        """The rates that are as good, as far as is known."""
        return self.result.interval

    @property
    def stable_max(self) -> float | None:
        """The highest rate below `cliff` that did not diverge."""
        return self.result.stable_max

    @property
    def cliff(self) -> float | None:
        """The lowest rate above `best_learning_rate` that diverged."""
        return self.result.cliff

    def report(self, path=None) -> str:
        """The result in Markdown, written to a file if `path` says where."""
        return self.result.report(path)

    def get_best_hyperparameters(self, num_trials=1):
        """The hyperparameters with the rate that was found; of more than one trial, those with the best scores."""
        if num_trials != 1 or self.best_learning_rate is None:
            return super().get_best_hyperparameters(num_trials)
        hp = engine.made_with(self.oracle).get_space()
        hp.values[oracle.RATE] = self.best_learning_rate
        return [hp]

    def get_best_models(self, num_models=1):
        """The models of the trials with the best scores, as they were trained; `keep_weights` must have kept them."""
        if self.keep_weights == "none":
            checks.refuse("keep_weights", "'best' or 'all', for models as they were trained; or `build_best()`", "none")
        return super().get_best_models(num_models)

    def build_best(self) -> keras.Model:
        """A fresh model with the rate that was found. Train it with `best_batch_size`, if several were tried, and where
        the rate has a kopt schedule without a length of its own, with a callback of kopt."""
        if self.best_learning_rate is None:
            raise RuntimeError(" ".join(["There is no best model.", *self.result.notes[-1:]]))
        return self.hypermodel.build(self.get_best_hyperparameters()[0])


def _bound(args, kwargs) -> dict:
    """The arguments of `fit` by name."""
    return inspect.signature(keras.Model.fit).bind_partial(None, *args, **kwargs).arguments


@contextlib.contextmanager
def _as_raised():
    """What the user's functions raise goes on as it was, without the exception by which it ends KerasTuner's search."""
    caught = None
    try:
        yield
    except keras_tuner.errors.FatalError as error:
        caught = error.__cause__ or error
    if caught is not None:
        raise caught  # out here, so that it keeps its own cause and context


def _callbacks(given) -> list:
    """The callbacks for `fit`, of which none may take the rate into its own hands."""
    listed = [given] if isinstance(given, keras.callbacks.Callback) else given or []
    allowed = "callbacks of Keras or kopt, without `LearningRateFinder`"
    is_fit = isinstance(listed, (list, tuple)) and all(isinstance(one, keras.callbacks.Callback) for one in listed)
    if not is_fit or any(isinstance(one, LearningRateFinder) for one in listed):
        checks.refuse("callbacks", allowed, given)
    return list(listed)


def _described(data):
    """What tells data from other data, for a file: shapes, numbers, and the kind of anything else."""
    if data is None or isinstance(data, (int, float, str)):
        return data
    parts = keras.tree.flatten(data)
    return [list(part.shape) if hasattr(part, "shape") else type(part).__name__ for part in parts]


def _print(line) -> None:
    print(f"LearningRateSearch: {line}", flush=True)


def _stages(name, value) -> tuple:
    """Pairs of a number of trials and their epochs."""
    allowed = "a list of pairs: the number of trials and their epochs, 1 or more each, no epochs below those before"
    pair = checks.several(checks.count(1), allowed)
    found = checks.several(lambda name, one: tuple(pair(name, one)), allowed)(name, value)
    if any(len(one) != 2 for one in found) or sorted(found, key=lambda one: one[1]) != found:
        checks.refuse(name, allowed, value)
    return tuple(found)


def _default_stages(epochs) -> tuple:
    return (9, max(1, round(epochs / SHORT))), (5, max(1, round(epochs / MIDDLE))), (3, epochs)
