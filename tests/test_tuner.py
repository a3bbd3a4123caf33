"""`optimizer`, `learning_rate` and `wrap` under the four tuners of KerasTuner."""

import gc
import math
import pathlib

import keras
import keras_tuner
import numpy as np
import pytest
from keras import layers

import kopt
import kopt.tuner
from kopt.tuner.guard import Guard
from kopt.tuner.spaces import RULES
from kopt.tuner.trial import untrained
from kopt.tuner.wrap import LAST
from tests.conftest import BACKEND, FLOATX
from tests.training import in_turn, numpy

pytestmark = [
    pytest.mark.skipif(FLOATX != "float32", reason="a search is the same in any precision"),
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),  # of KerasTuner's Gaussian process
    pytest.mark.filterwarnings(
        "ignore:`shuffle=True` was passed, but will be ignored"
    ),  # Keras, where nobody passed it
]
ON_TENSORFLOW = pytest.mark.skipif(BACKEND != "tensorflow", reason="nothing in it knows of a backend")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 2)).astype("float32")
Y = X @ np.array([[1.0], [-2.0]], "float32")
DATA = {"x": X, "y": Y, "validation_data": (X, Y), "batch_size": 8, "verbose": 0}  # three steps an epoch
STEPS = 3
EAGER = {"run_eagerly": BACKEND == "tensorflow"}  # a trace for each trial takes longer than its training


@pytest.fixture(autouse=True)
def few_objects():
    """A trial collects garbage: leave it nothing from before to look at."""
    gc.freeze()


def network(optimizer, built=True, loss="mse", **compiled):
    model = keras.Sequential([*([keras.Input((2,))] if built else []), layers.Dense(1)])
    model.compile(optimizer, loss=loss, **EAGER | compiled)
    return model


def build(hp):
    return network(kopt.SGD(kopt.tuner.learning_rate(hp, "sgd")))


def tuner_of(name, model, directory, objective="val_loss", trials=3, **given):
    given |= {"objective": objective, "directory": str(directory), "overwrite": True, "seed": given.get("seed", 1)}
    if name == "Hyperband":
        return keras_tuner.Hyperband(model, **{"max_epochs": 4, "factor": 2} | given)
    if name == "BayesianOptimization":
        given["num_initial_points"] = given.get("num_initial_points", 2)
    return getattr(keras_tuner, name)(model, max_trials=trials, **given)


TUNERS = "RandomSearch", "BayesianOptimization", "Hyperband", "GridSearch"
NOT_FINITE = {"inf": math.inf, "nan": math.nan}
every_tuner = pytest.mark.parametrize("name", TUNERS)


def metric(trial, name):
    return trial.metrics.get_last_value(name)


def trials_of(tuner):
    return [tuner.oracle.trials[one] for one in sorted(tuner.oracle.trials)]


class Simulated(keras_tuner.HyperModel):
    """A model that is not trained: `score(rate)` is what its `fit` returns."""

    def __init__(self, score):
        super().__init__()
        self.score = score

    def build(self, hp):
        rate = hp.Float("learning_rate", 1e-6, 1e2, sampling="log", default=1e-2)
        return network(kopt.SGD(rate))

    def fit(self, hp, model, *args, **kwargs):
        for callback in kwargs["callbacks"]:
            if hasattr(callback, "filepath"):  # KerasTuner's: Hyperband reads what it saves
                model.save_weights(callback.filepath)
        return self.score(hp.get("learning_rate"))


@every_tuner
def test_optimizer_in_every_tuner(name, tmp_path):
    def of(hp):
        schedules = ["constant", "cosine", "one_cycle"]
        return network(kopt.tuner.optimizer(hp, rules=["sgd", "momentum", "adam"], schedules=schedules))

    tuner = tuner_of(name, kopt.tuner.wrap(of), tmp_path)
    tuner.search(**DATA, epochs=2)
    trials = trials_of(tuner)
    assert {trial.status for trial in trials} == {"COMPLETED"}
    assert len(trials) >= 3
    for trial in trials:
        values = trial.hyperparameters.values
        low, high = RULES[values["rule"]][1]
        assert low <= values[f"{values['rule']}_learning_rate"] <= high
        assert math.isfinite(trial.score)
        assert metric(trial, "kopt_diverged") in (0, 1)
    (model,) = tuner.get_best_models()
    assert model.optimizer.iterations > 0  # with the optimizer's state


def test_spaces():
    hp = keras_tuner.HyperParameters()
    made = kopt.tuner.optimizer(hp, rules=["momentum", "nesterov", "adam"], schedules=["constant", "one_cycle"])
    assert isinstance(made, kopt.SGD)
    assert sorted(one.name for one in hp.space) == [
        "adam_learning_rate",
        "momentum",
        "momentum_learning_rate",
        "nesterov_learning_rate",
        "nesterov_momentum",
        "peak_at",
        "rule",
        "schedule",
    ]
    assert {one.name for one in hp.space if one.conditions} == {one.name for one in hp.space} - {"rule", "schedule"}
    assert sorted(hp.values) == ["momentum", "momentum_learning_rate", "rule", "schedule"]
    for one in hp.space:
        if one.name.endswith("rate"):
            assert (one.sampling, one.default) == ("log", pytest.approx(math.sqrt(one.min_value * one.max_value)))
    hp.values |= {"rule": "adam", "schedule": "one_cycle", "adam_learning_rate": 0.01, "peak_at": 0.5}
    made = kopt.tuner.optimizer(hp, rules=["momentum", "nesterov", "adam"], schedules=["constant", "one_cycle"])
    assert isinstance(made, kopt.Adam)
    assert isinstance(made.get_config()["learning_rate"], dict)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule(rule):
    hp = keras_tuner.HyperParameters()
    made = kopt.tuner.optimizer(hp, rules=rule, schedules="constant")
    low, high = RULES[rule][1]
    assert float(made.learning_rate) == pytest.approx(math.sqrt(low * high))
    assert {one.name for one in hp.space} - {"learning_rate"} <= {"momentum", f"{rule}_momentum"}
    assert kopt.tuner.learning_rate(keras_tuner.HyperParameters(), rule) == pytest.approx(math.sqrt(low * high))


def test_within_a_scope_of_names():
    hp = keras_tuner.HyperParameters()
    with hp.name_scope("head"):
        kopt.tuner.optimizer(hp, rules=["sgd", "adam"], schedules=["constant"])
    assert sorted(one.name for one in hp.space) == ["head/adam_learning_rate", "head/rule", "head/sgd_learning_rate"]
    assert sorted(hp.values) == ["head/rule", "head/sgd_learning_rate"]


def test_around_a_range_test():
    rates = np.geomspace(1e-4, 10, 60)
    record = kopt.RangeTest(rates, 1 / (1 + 100 * rates) + rates**2, initial_loss=1.0, beta=0.5)
    for around, high in ((record, math.inf), (0.02, 0.2)):
        hp = keras_tuner.HyperParameters()
        middle = kopt.tuner.learning_rate(hp, around=around)
        (space,) = hp.space
        suggestion = record.suggestion if around is record else 0.02
        assert space.min_value == pytest.approx(suggestion / 10)
        assert space.max_value <= min(suggestion * 10.001, high * 1.001)
        assert space.min_value < middle < space.max_value
    flat = kopt.RangeTest(rates, np.ones(60), initial_loss=1.0)
    assert kopt.tuner.learning_rate(keras_tuner.HyperParameters(), "adam", around=flat) == pytest.approx(1e-3)
    exploded = kopt.RangeTest(rates[:3], [1.0, np.nan, np.nan], initial_loss=np.nan, stopped="diverged")
    assert kopt.tuner.learning_rate(keras_tuner.HyperParameters(), "adam", around=exploded) == pytest.approx(1e-3)


def test_refusals():
    hp = keras_tuner.HyperParameters()
    for wrong in ("lion", 3, None):
        with pytest.raises(ValueError, match="`rule` must be one of 'sgd', "):
            kopt.tuner.learning_rate(hp, rule=wrong)
    for wrong in ([], ["sgd", "lion"], 3):
        with pytest.raises(ValueError, match="`rules` must be"):
            kopt.tuner.optimizer(hp, rules=wrong)
        with pytest.raises(ValueError, match="`schedules` must be"):
            kopt.tuner.optimizer(hp, schedules=wrong)
    for wrong in (0, -1.0, "0.1", math.nan):
        with pytest.raises(ValueError, match="`around` must be"):
            kopt.tuner.learning_rate(hp, around=wrong)
    with pytest.raises(ValueError, match=r"`build` must be a function `build\(hp\)`"):
        kopt.tuner.wrap(3)


@pytest.mark.parametrize(("name", "value"), in_turn(dict(zip(TUNERS, TUNERS, strict=True)), NOT_FINITE))
def test_a_loss_that_is_not_finite_ends_no_search(name, value, tmp_path):
    """KerasTuner alone scores infinity as perfect, or gives up after three NaN."""

    def of(hp):
        rate = kopt.tuner.learning_rate(hp, "sgd")

        def loss(y, predicted):
            squares = (y - predicted) ** 2
            return keras.ops.mean(keras.ops.where(squares > 1e6, value, squares), -1)

        return network(kopt.SGD(rate * 1e6 if rate > 1e-3 else rate), loss=loss)

    tuner = tuner_of(name, kopt.tuner.wrap(of), tmp_path, trials=5)
    tuner.search(**DATA, epochs=2)
    trials = trials_of(tuner)
    assert {trial.status for trial in trials} == {"COMPLETED"}
    high = [trial for trial in trials if trial.hyperparameters.values["learning_rate"] > 1e-3]
    assert len(high) >= 2
    assert all(metric(trial, "kopt_diverged") == (trial in high) for trial in trials)
    assert all(math.isfinite(trial.score) for trial in trials)
    best = tuner.oracle.get_best_trials()[0]
    assert best not in high


@pytest.mark.parametrize("value", [math.inf, pytest.param(math.nan, marks=pytest.mark.slow)])
def test_bayesian_optimization_keeps_away_from_what_diverges(value, tmp_path):
    model = Simulated(lambda rate: value if rate > 0.03 else 0.2 + 0.1 * abs(math.log10(rate / 3e-3)))
    tuner = tuner_of("BayesianOptimization", kopt.tuner.wrap(model), tmp_path, trials=16, num_initial_points=6)
    tuner.search(verbose=0)
    later = trials_of(tuner)[8:]
    assert sum(metric(trial, "kopt_diverged") for trial in later) <= 3
    best = tuner.get_best_hyperparameters()[0].get("learning_rate")
    assert abs(math.log10(best / 3e-3)) < 1


def test_hyperband_promotes_to_the_last_rung(tmp_path):
    """Where half of all diverge: without a penalty no bracket would promote."""
    model = Simulated(lambda rate: math.nan if rate > 1e-2 else abs(math.log10(rate)))
    tuner = tuner_of("Hyperband", kopt.tuner.wrap(model), tmp_path, max_epochs=8)
    tuner.search(verbose=0)
    rungs = [trial.hyperparameters.values["tuner/epochs"] for trial in trials_of(tuner)]
    assert rungs.count(8) >= 4  # one of each bracket
    assert {trial.status for trial in trials_of(tuner)} == {"COMPLETED"}


class AtRungs(keras.callbacks.Callback):
    """Where the optimizer stands when trainings begin and end; no copy is made of it."""

    def __init__(self):
        super().__init__()
        self.begun, self.ended = [], []

    def __deepcopy__(self, memo):
        return self

    def state(self):
        optimizer = self.model.optimizer
        return int(optimizer.iterations), numpy(optimizer.variables), self.params["epochs"]

    def on_train_begin(self, logs=None):
        self.begun.append((self.model.optimizer.built, *self.state()))

    def on_train_end(self, logs=None):
        self.ended.append(self.state())


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")  # of an unbuilt model, by KerasTuner
def test_hyperband_goes_on_with_the_optimizer(built, tmp_path):
    def of(hp):
        rate = kopt.tuner.learning_rate(hp, "adam")
        return network(kopt.Adam(kopt.schedules.CosineDecay(initial=rate)), built)

    seen = AtRungs()
    tuner = tuner_of("Hyperband", kopt.tuner.wrap(of), tmp_path, max_epochs=4)
    tuner.search(**DATA, callbacks=[seen])
    trials = trials_of(tuner)
    ended = {trial.trial_id: state for trial, state in zip(trials, seen.ended, strict=True)}
    promoted = 0
    for trial, (is_built, iterations, variables, _) in zip(trials, seen.begun, strict=True):
        values = trial.hyperparameters.values
        assert iterations == values["tuner/initial_epoch"] * STEPS
        if parent := values.get("tuner/trial_id"):
            promoted += 1
            assert is_built
            assert len(variables) == len(ended[parent][1])
            # The rate and the time of its schedule are another's; what Adam keeps goes on to the bit.
            slots, before = (
                [v for v in some if v.shape and v.dtype.kind == "f"] for some in (variables, ended[parent][1])
            )
            assert len(slots) == len(before) == 2
            assert all(np.array_equal(a, b) and np.any(a) for a, b in zip(slots, before, strict=True))
        assert ended[trial.trial_id][0] == values["tuner/epochs"] * STEPS
        assert ended[trial.trial_id][2] == 4  # every rung is laid out for the last one
    assert promoted >= 3
    assert (pathlib.Path(tuner.project_dir) / f"trial_{trials[0].trial_id}" / LAST).exists()


@pytest.mark.parametrize("horizon", [None, 6])
def test_schedules_last_as_long_as_they_should(horizon, tmp_path):
    rates = {}

    class Rates(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            rates.setdefault(epoch, float(self.model.optimizer.learning_rate))

        def __deepcopy__(self, memo):
            return self

    def of(hp):
        kopt.tuner.learning_rate(hp, "sgd")
        return network(kopt.SGD(kopt.schedules.Linear(initial=0.01)))

    wrapped = kopt.tuner.wrap(of, horizon_epochs=horizon)
    tuner = tuner_of("RandomSearch", wrapped, tmp_path, trials=1)
    tuner.search(**DATA, epochs=3, callbacks=[Rates()])
    length = horizon or 3
    expected = [0.01 * (1 - (epoch + 1) / length) for epoch in range(3)]
    np.testing.assert_allclose(list(rates.values()), expected, atol=0.01 / length / STEPS * 1.01)


@pytest.mark.parametrize("objective", ["val_loss", "val_mae"])
def test_penalties_to_minimise(objective, tmp_path):
    penalties(objective, tmp_path, lambda trial: 3 * metric(trial, f"kopt_untrained_{objective}"))


def test_penalty_of_a_training_loss_beside_validation_data(tmp_path):
    """The untrained model is judged by the validation data then."""
    penalties("loss", tmp_path, lambda trial: 3 * metric(trial, "kopt_untrained_val_loss"))


def penalties(objective, directory, expected, **given):
    def of(hp):
        kopt.tuner.learning_rate(hp, "sgd")
        return network(kopt.SGD(1e4), metrics=["mae", "accuracy"])

    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(of, **given), directory, objective, trials=1)
    tuner.search(**DATA, epochs=2)
    (trial,) = trials_of(tuner)
    assert metric(trial, "kopt_diverged") == 1
    assert trial.score == pytest.approx(expected(trial), rel=1e-5)
    return trial


@ON_TENSORFLOW
def test_penalties_to_maximise_and_of_several(tmp_path):
    penalties("val_accuracy", tmp_path, lambda trial: metric(trial, "kopt_untrained_val_accuracy"))
    names = ["val_loss", keras_tuner.Objective("val_accuracy", "max")]
    penalties(names, tmp_path, lambda trial: 3 * metric(trial, "kopt_untrained_val_loss")
              - metric(trial, "kopt_untrained_val_accuracy"))  # fmt: skip
    names = ["val_loss", "val_mae"]
    penalties(names, tmp_path, lambda trial: 3 * metric(trial, "kopt_untrained_val_loss")
              + 3 * metric(trial, "kopt_untrained_val_mae"))  # fmt: skip
    penalties("val_loss", tmp_path, lambda trial: 5 * metric(trial, "kopt_untrained_val_loss"), explode=5)


@ON_TENSORFLOW
def test_penalty_where_the_untrained_model_has_no_finite_loss(tmp_path):
    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(build), tmp_path, trials=4)
    tuner.search(X, Y * np.nan, validation_data=(X, Y * np.nan), epochs=1, verbose=0)
    assert [trial.score for trial in trials_of(tuner)] == [1.0] * 4


@pytest.mark.parametrize("objective", ["loss", None])
def test_a_fit_that_returns_a_number(objective, tmp_path):
    model = Simulated(lambda rate: math.inf if rate > 1e-2 else rate)
    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(model), tmp_path, objective, trials=6)
    tuner.search(X, Y, verbose=0)
    trials = trials_of(tuner)
    diverged = [trial for trial in trials if trial.hyperparameters.values["learning_rate"] > 1e-2]
    assert 0 < len(diverged) < 6
    assert all(metric(trial, "kopt_diverged") == (trial in diverged) for trial in trials)
    for trial in diverged:
        assert trial.score == pytest.approx(3 * metric(trial, "kopt_untrained_loss"), rel=1e-5)


@ON_TENSORFLOW
def test_a_fit_that_returns_a_dict(tmp_path):
    model = Simulated(lambda rate: {"val_loss": math.nan if rate > 1e-2 else rate, "extra": 7.0})
    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(model), tmp_path, trials=6)
    tuner.search(X, Y, verbose=0)
    diverged = [trial for trial in trials_of(tuner) if metric(trial, "kopt_diverged")]
    assert 0 < len(diverged) < 6
    assert all(math.isfinite(trial.score) and metric(trial, "extra") == 7 for trial in trials_of(tuner))


@ON_TENSORFLOW
@pytest.mark.parametrize("returned", [None, "text", {"other": 1.0}])
def test_what_a_fit_must_return(returned, tmp_path):
    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(Simulated(lambda rate: returned)), tmp_path)
    with pytest.raises(keras_tuner.errors.FatalError, match=r"HyperModel.fit\(\)"):
        tuner.search(X, Y, verbose=0)
    assert len(trials_of(tuner)) == 1


def first_weights(directory, seed, trials=2, executions=2):
    """The weights with which trainings begin, and the scores of the trials."""
    seen = []

    class First(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            seen.append(self.model.get_weights()[0].tobytes())

        def __deepcopy__(self, memo):
            return self

    wrapped = kopt.tuner.wrap(build, seed=seed)
    tuner = tuner_of("RandomSearch", wrapped, directory, trials=trials, executions_per_trial=executions)
    tuner.search(**DATA, epochs=1, callbacks=[First()])
    return seen, [trial.score for trial in trials_of(tuner)]


def test_seeds(tmp_path):
    (first, scores), (again, same) = (first_weights(tmp_path, 0) for _ in range(2))
    assert first[0] == first[2]  # the same for every trial
    assert first[1] == first[3]
    assert first[0] != first[1]  # another for each execution
    assert (again, same) == (first, scores)  # and the same another time
    other, _ = first_weights(tmp_path, 1, trials=1)
    assert not set(other) & set(first)


def kept(tuner):
    return sorted(path.parent.name for path in pathlib.Path(tuner.project_dir).glob("trial_*/checkpoint*.h5"))


@pytest.mark.parametrize("keep", ["all", "best", "none"])
def test_weights_that_are_kept(keep, tmp_path):
    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(build, keep_weights=keep), tmp_path, trials=4)
    tuner.search(**DATA, epochs=2)
    best = tuner.oracle.get_best_trials()[0]
    assert (
        kept(tuner) == {"all": [f"trial_{i}" for i in range(4)], "best": [f"trial_{best.trial_id}"], "none": []}[keep]
    )
    if keep != "none":
        (model,) = tuner.get_best_models()
        assert model.evaluate(X, Y, verbose=0) == pytest.approx(best.score, rel=1e-4)


@ON_TENSORFLOW
def test_hyperband_keeps_what_its_rungs_need(tmp_path):
    tuner = tuner_of("Hyperband", kopt.tuner.wrap(build, keep_weights="none"), tmp_path, max_epochs=2)
    tuner.search(**DATA)
    assert {trial.status for trial in trials_of(tuner)} == {"COMPLETED"}


def test_an_optimizer_given_to_the_tuner(tmp_path):
    """KerasTuner makes it anew from its config, schedule and all."""
    optimizer = kopt.Adam(kopt.schedules.WarmUp(1) * kopt.schedules.CosineDecay(initial=0.01))

    def of(hp):
        hp.Choice("units", [1, 2])
        return network("sgd")

    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(of), tmp_path, trials=2, optimizer=optimizer)
    tuner.search(**DATA, epochs=2)
    assert {trial.status for trial in trials_of(tuner)} == {"COMPLETED"}
    (model,) = tuner.get_best_models()
    assert type(model.optimizer) is kopt.Adam
    assert model.optimizer.get_config()["learning_rate"] == optimizer.get_config()["learning_rate"]


class MineError(Exception):
    pass


@pytest.mark.parametrize("where", ["build", "build later", "fit"])
def test_your_errors_end_the_search_at_once(where, tmp_path):
    count = iter(range(100))

    class Raises(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if where == "fit":
                raise MineError("in fit")

    def of(hp):
        rate = kopt.tuner.learning_rate(hp, "sgd")
        if where == "build" or (where == "build later" and next(count) == 2):
            raise MineError("in build")
        return network(kopt.SGD(rate))

    with pytest.raises(keras_tuner.errors.FatalError, match="raised MineError: in (build|fit)") as caught:
        tuner_of("RandomSearch", kopt.tuner.wrap(of), tmp_path).search(**DATA, epochs=1, callbacks=[Raises()])
    cause = caught.value.__cause__
    assert type(cause) is MineError
    names = []
    trace = cause.__traceback__
    while trace:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert names[-1] == ("on_epoch_begin" if where == "fit" else "of")
    assert len(list(tmp_path.glob("*/trial_*"))) <= 2


def test_a_model_that_is_too_large_is_one_failed_trial(tmp_path):
    count = iter(range(100))

    def of(hp):
        if next(count) == 1:
            raise MemoryError("OOM")
        return build(hp)

    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(of), tmp_path)
    tuner.search(**DATA, epochs=1)
    assert [trial.status for trial in trials_of(tuner)] == ["FAILED", "COMPLETED", "COMPLETED"]


@pytest.mark.parametrize("made", [None, 3, "uncompiled"])
def test_what_a_build_must_return(made, tmp_path):
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)]) if made == "uncompiled" else made
    with pytest.raises(TypeError, match="`build` must be a function that returns a compiled model"):
        tuner_of("RandomSearch", kopt.tuner.wrap(lambda hp: model), tmp_path)


def test_an_objective_that_is_not_logged(tmp_path):
    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(build), tmp_path)
    with pytest.raises(
        ValueError, match="`objective` must be one of what the training logs: loss; give `validation_da"
    ):
        tuner.search(X, Y, epochs=5, verbose=0)
    assert len(trials_of(tuner)) == 1
    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(build), tmp_path, keras_tuner.Objective("f1", "max"))
    with pytest.raises(ValueError, match="what the training logs: loss, val_loss. Received: objective='f1'"):
        tuner.search(**DATA, epochs=5)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return STEPS

    def __getitem__(self, i):
        return X[i * 8 : i * 8 + 8], Y[i * 8 : i * 8 + 8]


def dataset(**_):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)


def generator():
    while True:
        yield X[:8], Y[:8]


INPUTS = {
    "validation_split": lambda: {"x": X, "y": Y, "validation_split": 0.25, "batch_size": 8},
    "dataset": lambda: {"x": dataset(), "validation_data": dataset()},
    "PyDataset": lambda: {"x": Batches(), "validation_data": Batches()},
    "dataset, arrays": lambda: {"x": dataset(), "validation_data": (X, Y)},
    "weights": lambda: {"x": X, "y": Y, "sample_weight": np.ones(24), "validation_data": (X, Y, np.ones(24))},
    "generators": lambda: {
        "x": generator(), "steps_per_epoch": 2, "validation_data": generator(), "validation_steps": 2,
    },
    "validation steps": lambda: {"x": X, "y": Y, "validation_data": dataset().repeat(), "validation_steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(kind, tmp_path):
    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(build), tmp_path, trials=1)
    tuner.search(**INPUTS[kind](), epochs=1, verbose=0)
    (trial,) = trials_of(tuner)
    assert trial.status == "COMPLETED"
    known = [name for name in trial.metrics.metrics if name.startswith("kopt_untrained_val_loss")]
    assert bool(known) == (kind not in ("PyDataset", "generators")) or kind == "PyDataset"


@ON_TENSORFLOW
@pytest.mark.parametrize("kind", ["validation_split", "dataset", "PyDataset", "weights"])
def test_inputs_of_a_search(kind, tmp_path):
    search = kopt.tuner.LearningRateSearch(build, stages=[(1, 1)], confirm=0, max_widen=0, directory=str(tmp_path))
    search.search(**INPUTS[kind](), epochs=1, verbose=0)
    assert [row["kind"] for row in search.result.trials][:2] == ["range test", "stage 1"]
    assert {row["status"] for row in search.result.trials} == {"COMPLETED"}


def test_the_untrained_loss_is_that_of_evaluate(tmp_path):
    weights = np.linspace(0, 2, 24)
    held = X * 2, Y, weights
    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(build), tmp_path, trials=1)
    tuner.search(X, Y, validation_data=held, epochs=1, batch_size=8, verbose=0)
    (trial,) = trials_of(tuner)
    model = tuner.hypermodel.build(trial.hyperparameters.copy())
    expected = model.evaluate(*held[:2], sample_weight=weights, batch_size=8, verbose=0)
    assert metric(trial, "kopt_untrained_val_loss") == pytest.approx(expected, rel=1e-5)


HEAVY = {"sample_weight": np.full(24, 10.0)}


@pytest.mark.parametrize(
    ("objective", "given"),
    [("loss", HEAVY), ("val_loss", HEAVY | {"validation_split": 0.25}), ("loss", {"class_weight": {0: 10.0, 1: 10.0}})],
    ids=["weights", "split", "classes"],
)
def test_weights_of_rows_are_no_divergence(objective, given, tmp_path):
    """The untrained loss is weighed as the training's is."""

    def careful(hp):
        return network(kopt.SGD(kopt.tuner.learning_rate(hp, around=1e-4)))

    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(careful), tmp_path, objective, trials=1)
    tuner.search(X, (Y > 0).astype("float32"), epochs=1, batch_size=8, verbose=0, **given)
    assert [metric(trial, "kopt_diverged") for trial in trials_of(tuner)] == [0.0]


@ON_TENSORFLOW
def test_old_ways_of_a_hypermodel(tmp_path):
    """`declare_hyperparameters`, and a `fit` that has hyperparameters itself."""

    class Old(keras_tuner.HyperModel):
        def declare_hyperparameters(self, hp):
            hp.Float("learning_rate", 1e-3, 1e-1, sampling="log")

        def build(self, hp):
            return network(kopt.SGD(hp.get("learning_rate")))

        def fit(self, hp, model, *args, **kwargs):
            return model.fit(*args, **kwargs | {"batch_size": hp.Choice("batch_size", [8, 24])})

    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(Old()), tmp_path)
    tuner.search(**DATA, epochs=1)
    assert {trial.status for trial in trials_of(tuner)} == {"COMPLETED"}
    assert "batch_size" in trials_of(tuner)[-1].hyperparameters.values


@ON_TENSORFLOW
def test_a_schedule_of_a_few_epochs_needs_no_callback(tmp_path):
    """Under `wrap` any fit has one, also one of the user's own."""

    class Own(keras_tuner.HyperModel):
        def build(self, hp):
            return network(kopt.tuner.optimizer(hp, rules="sgd", schedules="cosine"))

        def fit(self, hp, model, *args, **kwargs):
            return model.fit(*args, **kwargs)

    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(Own()), tmp_path, trials=2)
    tuner.search(**DATA, epochs=2)
    assert {trial.status for trial in trials_of(tuner)} == {"COMPLETED"}


def test_the_weights_of_the_best_mean_over_executions_are_kept(tmp_path):
    scores = iter([0.4, 0.4, 0.3, 0.9, 0.5, 0.2])

    class Model(keras_tuner.HyperModel):
        def build(self, hp):
            return network(kopt.SGD(hp.Float("rate", 0.1, 1.0)))

        def fit(self, hp, model, *args, callbacks, **kwargs):
            for callback in callbacks:
                callback.set_model(model)
                callback.set_params({})
            logs = {"loss": next(scores)}
            for callback in callbacks:
                if hasattr(callback, "filepath"):
                    callback.on_epoch_end(0, logs)
            return logs

    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(Model(), keep_weights="best"), tmp_path, "loss",
                     executions_per_trial=2)  # fmt: skip
    tuner.search()
    best = tuner.oracle.get_best_trials(1)[0].trial_id
    assert [path.parent.name for path in tmp_path.rglob("*.weights.h5")] == [f"trial_{best}"]


def test_the_penalty_of_data_that_is_read_once(tmp_path):
    """The first batch tells what the untrained loss is: a trial that diverged is worse than those that did not."""
    model = kopt.tuner.wrap(lambda hp: network(kopt.SGD(hp.Float("rate", 1e-4, 1e6, sampling="log"))))

    def batches():
        while True:
            yield X, 100 * Y

    tuner = tuner_of("RandomSearch", model, tmp_path, "loss", trials=4)
    tuner.search(batches(), steps_per_epoch=30, verbose=0)
    ranked = sorted(tuner.oracle.trials.values(), key=lambda trial: trial.score)
    flags = [metric(trial, "kopt_diverged") for trial in ranked]
    assert flags == sorted(flags)
    assert flags[-1] == 1


@pytest.mark.parametrize("steps", [1, 7, 16])
def test_the_guard_looks_whatever_the_steps_of_an_execution(steps):
    guard = Guard(1.0, 3.0)
    model = guard.set_model(network("sgd")) or guard.model
    guard.on_epoch_begin(0)
    for batch in range(steps - 1, 200, steps):
        guard.on_train_batch_end(batch, {"loss": 1.0 if batch < steps else 100.0})
    assert guard.diverged
    assert model.stop_training


@pytest.mark.parametrize("own", [{"train": X}, {"scale": 2}])
def test_a_fit_with_arguments_of_its_own(own, tmp_path):
    class Model(keras_tuner.HyperModel):
        def build(self, hp):
            return network(kopt.SGD(hp.Float("rate", 0.1, 1.0)))

        def fit(self, hp, model, *args, **kwargs):
            return {"loss": 1.0}

    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(Model()), tmp_path, "loss", trials=1)
    tuner.search(**own)
    assert trials_of(tuner)[0].status == "COMPLETED"


def test_logs_of_some_epochs_only(tmp_path):
    class Sometimes(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch:
                logs["later"] = 1.0

    tuner = tuner_of("RandomSearch", kopt.tuner.wrap(build), tmp_path, trials=1)
    tuner.search(**DATA, epochs=2, callbacks=[Sometimes()])
    assert trials_of(tuner)[0].status == "COMPLETED"


def test_a_list_of_inputs_without_targets():
    a, b = keras.Input((2,)), keras.Input((2,))
    model = keras.Model([a, b], keras.layers.Dense(1, activity_regularizer="l2")(a + b))
    model.compile("sgd", loss=None)
    assert untrained(model, [X, X])["loss"] > 0
