"""How many evaluations a minimisation needs beside others, and how many a second `minimize` makes beside `fit`.

The problems of `tests/problems.py`: for each method how many are solved, to three shares of f(start) - f*, and the
evaluations over those that both kopt and the other have solved; `--all` prints every problem. Then a network of 337
weights on 256 rows: evaluations a second, by `fit` and by `minimize`, without what they take to compile.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_ENABLE_X64", "1")

import keras
import numpy as np

import kopt
from tests import profiles
from tests.problems import PROBLEMS

TAUS = 1e-3, 1e-5, 1e-8
ROWS = 256


def peers():
    found = {"scipy": profiles.by_scipy}
    if keras.backend.backend() == "torch":
        found["torch"] = profiles.by_torch
    if keras.backend.backend() == "jax":
        found["optax"] = profiles.by_optax
    return found


def profile(dtype, problems, every) -> None:
    print(f"\n{dtype}: solved of {len(problems)}, and evaluations over what both have solved (kopt / the other)")
    for tau in TAUS:
        if tau < 1e-5 and dtype == "float32":
            continue
        ours = profiles.counts(profiles.by_kopt, dtype, tau, problems)
        line = f"  to {tau:.0e}   kopt {profiles.solved(ours)}"
        others = {name: profiles.counts(by, dtype, tau, problems) for name, by in peers().items()}
        for name, theirs in others.items():
            both = profiles.on_common(ours, theirs)
            line += f"   {name} {profiles.solved(theirs)} ({both[0]} / {both[1]})"
        print(line)
        if every and tau == profiles.TAU[dtype]:
            for problem in problems:
                row = "".join(f"{counts[problem.name] or '-':>8}" for counts in (ours, *others.values()))
                print(f"    {problem.name:<30}{row}")


def network():
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(16, activation="tanh") for _ in range(2)]
    model = keras.Sequential([keras.Input((2,)), *hidden, keras.layers.Dense(1)])
    model.compile(kopt.LBFGS(gtol=0, ftol=0, check_noise=False), loss="mse")
    return model


class Clock(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.times = []

    def on_epoch_end(self, epoch, logs=None):
        self.times.append(time.perf_counter())


def speeds(evaluations, rounds) -> None:
    """Evaluations a second, in turns."""
    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, 2)).astype("float32")
    y = np.sin(x[:, :1]) * x[:, 1:]
    model, found = network(), {"fit": [], "fit, one long epoch": [], "minimize": []}
    many = [np.tile(part, (evaluations, 1)) for part in (x, y)]
    arguments = {"batch_size": ROWS, "shuffle": False, "verbose": 0}
    model.fit(x, y, epochs=2, **arguments)
    for _ in range(rounds):
        begun = time.perf_counter()
        model.fit(x, y, epochs=evaluations, **arguments)
        found["fit"].append(evaluations / (time.perf_counter() - begun))
        begun = time.perf_counter()
        model.fit(*many, **arguments)
        found["fit, one long epoch"].append(evaluations / (time.perf_counter() - begun))
        clock, method = Clock(), kopt.LBFGS(gtol=0, ftol=0)
        kopt.minimize(
            network(), x, y, method, max_evals=3 * evaluations, chunk=evaluations, callbacks=[clock], verbose=0
        )
        found["minimize"].append(2 * evaluations / (clock.times[-1] - clock.times[0]))  # the first chunk compiles
    base = statistics.median(found["fit, one long epoch"])
    print(f"\nevaluations a second, {model.count_params()} weights, {ROWS} rows, {keras.backend.backend()}")
    for name, rates in found.items():
        rate = statistics.median(rates)
        print(f"  {name:<22}{rate:>9.0f}   {rate / base:.2f} of the long epoch")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few problems, few evaluations")
    parser.add_argument("--all", action="store_true", help="print every problem")
    parser.add_argument("--only", choices=["problems", "speed"])
    given = parser.parse_args()
    if given.only != "problems":
        speeds(*((20, 1) if given.smoke else (200, 5)))
    if given.only != "speed":
        for dtype in ("float64", "float32"):
            profile(dtype, PROBLEMS[:3] if given.smoke else PROBLEMS, given.all)


if __name__ == "__main__":
    main()
