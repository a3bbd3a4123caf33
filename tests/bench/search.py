"""The learning rates that searches choose, trained again with fresh seeds, beside KerasTuner's own tuners.

Small real problems of scikit-learn, a rule and a network for each, a constant rate. Every search may spend as many
epochs as `kopt.tuner.LearningRateSearch` has spent on the problem; all look at 1e-6 to 10, and KerasTuner's do not end
after three NaN. The rate that a search chooses is trained with fresh seeds, the same for all, to the last epoch. The
regret is how much higher the validation loss is than at the best of a grid of rates (mean over these seeds), as a share
of what training there gains on the untrained model. A loss of more than three times the untrained one, or NaN, counts
as three times. (scikit-learn's Linnerud is left out: 20 rows, where seeds differ by more than there is to gain.)
"""

import argparse
import contextlib
import functools
import io
import json
import math
import os
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import keras_tuner
import numpy as np
from sklearn import datasets
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import kopt
import kopt.tuner

LOW, HIGH, EPOCHS, WORST = 1e-6, 10.0, 15, 3.0
GRID, STAGES = np.geomspace(1e-5, 10, 31), None  # kopt's own stages
PROBLEMS = {  # data, optimizer at a rate, hidden units, batch size
    "digits, momentum": (datasets.load_digits, lambda r: kopt.SGD(r, momentum=0.9), (32,), 32),
    "digits, Adam": (datasets.load_digits, kopt.Adam, (32, 32), 32),
    "breast cancer, SGD": (datasets.load_breast_cancer, kopt.SGD, (16,), 16),
    "wine, Adagrad": (datasets.load_wine, kopt.Adagrad, (16,), 8),
    "iris, Nesterov": (datasets.load_iris, lambda r: kopt.SGD(r, momentum=0.9, nesterov=True), (8,), 8),
    "diabetes, RMSprop": (datasets.load_diabetes, kopt.RMSprop, (16,), 16),
    "diabetes, SGD": (datasets.load_diabetes, kopt.SGD, (16,), 16),
}


class Problem:
    """One problem. Its model is built and compiled once; `build` gives it fresh weights of the seed and a rate."""

    def __init__(self, name):
        load, make, units, self.batch_size = PROBLEMS[name]
        x, y = load(return_X_y=True)
        is_class = y.ndim == 1 and np.issubdtype(y.dtype, np.integer)
        split = train_test_split(x, y, test_size=0.35, random_state=0, stratify=y if is_class else None)
        scaler = StandardScaler().fit(split[0])
        x, held = (scaler.transform(part).astype("float32") for part in split[:2])
        y, truth = split[2:]
        if not is_class:
            y, truth = (part.reshape(len(part), -1) for part in (y, truth))
            y, truth = ((part - y.mean(0)) / y.std(0) for part in (y, truth))
        self.data, self.validation = (x, y), (held, truth)
        outputs = int(y.max()) + 1 if is_class else y.shape[1]
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if is_class else "mse"
        hidden = [keras.layers.Dense(unit, activation="relu") for unit in units]
        self.model = keras.Sequential([keras.Input(x.shape[1:]), *hidden, keras.layers.Dense(outputs)])
        self.model.compile(make(0.1), loss=loss)
        self.model.optimizer.build(self.model.trainable_variables)
        self.known: dict[tuple, float] = {}
        self.state = [np.array(keras.ops.convert_to_numpy(v)) for v in self.model.optimizer.variables]

    def build(self, rate):
        for layer in self.model.layers:
            layer.kernel.assign(keras.initializers.GlorotUniform(np.random.randint(2**31))(layer.kernel.shape))
            layer.bias.assign(np.zeros(layer.bias.shape))
        for variable, value in zip(self.model.optimizer.variables, self.state, strict=True):
            variable.assign(value)
        self.model.optimizer.learning_rate = rate
        return self.model

    def of(self, hp):
        middle = math.sqrt(LOW * HIGH)
        return self.build(hp.Float("learning_rate", LOW, HIGH, sampling="log", default=middle))

    @property
    def given(self) -> dict:
        return {"validation_data": self.validation, "batch_size": self.batch_size, "verbose": 0}

    def trained(self, rate, seed) -> float:
        """The validation loss in the end."""
        if (rate, seed) not in self.known:
            keras.utils.set_random_seed(seed)
            loss = self.build(rate).fit(*self.data, epochs=EPOCHS, **self.given).history["val_loss"][-1]
            worst = WORST * self.untrained
            self.known[rate, seed] = min(float(loss), worst) if math.isfinite(loss) else worst
        return self.known[rate, seed]

    @functools.cached_property
    def untrained(self) -> float:
        losses = []
        for seed in range(5):
            keras.utils.set_random_seed(seed)
            losses.append(self.build(0.1).evaluate(*self.validation, verbose=0))
        return float(np.mean(losses))

    def best(self, seeds) -> tuple[float, float]:
        """The best rate of the grid and its mean loss; rates that are far worse with one seed are not gone on with."""
        once = {rate: self.trained(rate, seeds[0]) for rate in GRID}
        likely = sorted(once, key=once.get)[: len(GRID) // 3]
        means = {rate: np.mean([self.trained(rate, seed) for seed in seeds]) for rate in likely}
        rate = min(means, key=means.get)
        return float(rate), float(means[rate])


class Count(keras.callbacks.Callback):
    """How many epochs were trained, in a list that copies share."""

    epochs: list = []

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(1)


def by_kopt(problem, budget, seed, folder):
    search = kopt.tuner.LearningRateSearch(
        problem.of, "val_loss", min_learning_rate=LOW, max_learning_rate=HIGH, stages=STAGES, seed=seed,
        directory=folder,
    )  # fmt: skip
    search.search(*problem.data, epochs=EPOCHS, callbacks=[Count()], **problem.given)
    steps = -(-len(problem.data[0]) // problem.batch_size)
    Count.epochs += [1] * math.ceil(sum(len(test.losses) for test in search.result.range_tests) / steps)
    return search.best_learning_rate


def by_tuner(make):
    def search(problem, budget, seed, folder):
        tuner = make(problem.of, budget, seed=1 + 1000 * seed, directory=folder)
        keras.utils.set_random_seed(seed)
        epochs = {} if isinstance(tuner, keras_tuner.Hyperband) else {"epochs": EPOCHS}
        tuner.search(*problem.data, callbacks=[Count()], **epochs, **problem.given)
        return tuner.get_best_hyperparameters()[0].get("learning_rate")

    return search


COMMON = {"objective": "val_loss", "max_consecutive_failed_trials": 10**6}


def hyperband(build, budget, **arguments):
    """Round after round until the epochs are spent."""
    tuner = keras_tuner.Hyperband(build, max_epochs=EPOCHS, factor=3, hyperband_iterations=99, **COMMON, **arguments)
    populate = tuner.oracle.populate_space
    tuner.oracle.populate_space = lambda id: populate(id) if len(Count.epochs) < budget else {"status": "STOPPED"}
    return tuner


SEARCHES = {
    "kopt": by_kopt,
    "RandomSearch": by_tuner(
        lambda build, budget, **a: keras_tuner.RandomSearch(build, max_trials=round(budget / EPOCHS), **COMMON, **a)
    ),
    "BayesianOptimization": by_tuner(
        lambda build, budget, **a: keras_tuner.BayesianOptimization(
            build, max_trials=round(budget / EPOCHS), **COMMON, **a
        )
    ),
    "Hyperband": by_tuner(hyperband),
}


def measured(names, searches, seeds, fresh, show, allowed=None):
    """A row for each problem, search and seed: the rate, the epochs spent, the regret with each fresh seed.

    The first search spends what it wants, the others as many epochs as it has spent, or as are `allowed`.
    """
    rows = []
    for name in names:
        problem = Problem(name)
        rate, least = problem.best(fresh)
        gain = problem.untrained - least
        show(f"\n{name}: untrained {problem.untrained:.3g}, best of the grid {least:.3g} at {rate:.2g}")
        for seed in range(seeds):
            budget = allowed
            for method in searches:
                begun = time.perf_counter()
                Count.epochs.clear()
                with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                    rate = SEARCHES[method](problem, budget, seed, folder)
                spent = len(Count.epochs)
                budget = budget or spent
                losses = [WORST * problem.untrained if rate is None else problem.trained(rate, one) for one in fresh]
                regrets = [(loss - least) / gain for loss in losses]
                rows.append(
                    {"problem": name, "search": method, "seed": seed, "rate": rate, "epochs": spent, "regrets": regrets}
                )
                seconds = time.perf_counter() - begun
                show(
                    f"  {method:<22}{rate or math.nan:>10.2e}{spent:>6} epochs   regret median "
                    f"{np.median(regrets):>7.2%}, worst {max(regrets):>8.2%}   {seconds:.0f} s"
                )
    return rows


def table(rows) -> str:
    head = f"{'search':<22}{'epochs':>8}{'median regret':>16}{'standard error':>16}{'mean':>9}"
    lines = [f"{head}{'worst seed':>12}{'diverged':>10}"]
    for method in dict.fromkeys(row["search"] for row in rows):
        own = [row for row in rows if row["search"] == method]
        regrets = np.array([row["regrets"] for row in own])
        random = np.random.default_rng(0)
        again = [np.median(regrets[random.integers(len(own), size=len(own))]) for _ in range(2000)]
        share = np.mean(regrets > 1)
        epochs = np.mean([row["epochs"] for row in own])
        lines.append(
            f"{method:<22}{epochs:>8.0f}{np.median(regrets):>16.2%}{np.std(again):>16.2%}{regrets.mean():>9.2%}"
            f"{regrets.max():>12.1%}{share:>10.1%}"
        )
    return "\n".join(lines)


def small():
    """Trainings of two epochs, few of them: to see that it runs."""
    global EPOCHS, GRID, STAGES
    EPOCHS, GRID, STAGES = 2, GRID[::10], [(4, 1), (2, 2)]


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--smoke", action="store_true", help="one problem and seed, short trainings; KerasTuner's tuners run two"
    )
    parser.add_argument("--seeds", type=int, default=3, help="searches of each kind")
    parser.add_argument("--fresh", type=int, default=5, help="seeds for the chosen rate")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS)
    parser.add_argument(
        "--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES), help="kopt is always among them"
    )
    parser.add_argument("--out", help="a file for the rows, as JSON")
    given = parser.parse_args(given)
    if given.smoke:
        small()
    names = given.problems or list(PROBLEMS)[slice(4, 5) if given.smoke else slice(None)]
    searches = dict.fromkeys(["kopt", *given.searches])  # first, as the others may spend what it has spent
    seeds, fresh = (1, 1) if given.smoke else (given.seeds, given.fresh)
    allowed = 2 * EPOCHS if given.smoke else None
    rows = measured(names, searches, seeds, range(1000, 1000 + fresh), print, allowed)
    print(f"\n{table(rows)}")
    if given.out:
        os.makedirs(os.path.dirname(given.out) or ".", exist_ok=True)
        with open(given.out, "w", encoding="utf-8") as file:
            json.dump(rows, file)


if __name__ == "__main__":
    main()
