"""Every update rule on the same small network: how fast, how good, how much time a step.

What: 1,797 images of handwritten digits (8 x 8, scikit-learn's), 1,200 to train and 597 to test; a network of two
hidden layers of 64; 300 steps of 64 images for every rule, 3 seeds. The seed decides the first weights and the order of
the images; the split is fixed. Each rule runs at its own rate of seven: the one with the least training loss over a run
(`--tune`), the same search for each.

Claim (Stanford's CS231n, lecture 7): momentum and the adaptive rules reach a given loss in fewer steps than plain SGD.
Expected on TensorFlow 2.21, Keras 3.15.1 (2026-11): see the table in README.md, which `make demo` reprints.
When it says little: small data and a small network forgive much; the ranking of rules differs from task to task, and
with the rate of each. Differences of half a point of accuracy are within the spread over seeds.
"""

import argparse
import csv
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import kopt

RULES = {  # rule -> the optimizer at a rate, the rate that --tune found, a color that the color-blind can tell
    "SGD": (kopt.SGD, 0.3, "#999999"),
    "momentum": (lambda rate: kopt.SGD(rate, momentum=0.9), 0.1, "#E69F00"),
    "Nesterov": (lambda rate: kopt.SGD(rate, momentum=0.9, nesterov=True), 0.1, "#D55E00"),
    "Adagrad": (kopt.Adagrad, 0.03, "#009E73"),
    "RMSprop": (kopt.RMSprop, 0.01, "#CC79A7"),
    "Adam": (kopt.Adam, 0.01, "#0072B2"),
    "AdamW": (kopt.AdamW, 0.01, "#000000"),
}
RATES = [1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0]
TARGET = 0.1  # of the smoothed training loss
NEXT = """
Next: take the rule that fits from the README's table and put it in your own `model.compile`. Before you try another
rule, try a rate three times lower and three times higher; `--tune` shows how much the rate decides."""


def digits():
    images, labels = load_digits(return_X_y=True)
    return train_test_split(
        (images / 16).astype("float32"), labels, train_size=1200, test_size=597, random_state=0, stratify=labels
    )


def network():
    hidden = [keras.layers.Dense(64, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])


class StepLosses(keras.callbacks.Callback):
    """The loss of every batch, and when it ended. Keras logs the mean over the epoch so far; this undoes the mean."""

    def __init__(self):
        super().__init__()
        self.losses_, self.times_ = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.total_ = 0.0

    def on_train_batch_end(self, batch, logs=None):
        total = logs["loss"] * (batch + 1)
        self.losses_.append(total - self.total_)
        self.times_.append(time.perf_counter())
        self.total_ = total


def train(make, rate, train_set, test_set, seed, steps, batch_size):
    """One run: the loss at each step, the accuracy on the test images, milliseconds a step."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    x, y = train_set
    model, record = network(), StepLosses()
    model.compile(make(rate), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng, wanted = np.random.default_rng(seed), steps * batch_size
    order = np.concatenate([rng.permutation(len(x)) for _ in range(wanted // len(x) + 1)])[:wanted]
    model.fit(x[order], y[order], batch_size=batch_size, shuffle=False, verbose=0, callbacks=[record])
    answers = keras.ops.convert_to_numpy(model(test_set[0])).argmax(1)
    return {
        "losses": record.losses_,
        "accuracy": float((answers == test_set[1]).mean()),
        "ms_per_step": 1e3 * float(np.median(np.diff(record.times_))),
    }


def tune(rules, data, say, **budget):
    """The rate of each rule with the least training loss, averaged over the steps of a run."""
    best = {}
    for name in rules:
        runs = {rate: train(RULES[name][0], rate, *data, seed=99, **budget) for rate in RATES}
        losses = {rate: np.mean(run["losses"]) for rate, run in runs.items()}
        best[name] = min(losses, key=lambda rate: np.nan_to_num(losses[rate], nan=np.inf))
        say(f"{name:9} {best[name]:g}, of " + ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in losses.items()))
    return best


def draw(runs, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, results in runs.items():
        color = RULES[name][2]
        curves = np.array([kopt.exponentially_weighted_average(r["losses"], window=10) for r in results])
        steps = np.arange(1, curves.shape[1] + 1)
        axes.plot(steps, curves.mean(0), color=color, label=name, lw=1.8, ls="--" if name == "AdamW" else "-")
        axes.fill_between(steps, curves.min(0), curves.max(0), color=color, alpha=0.12, lw=0)
    axes.axhline(TARGET, color="black", lw=0.8, ls=":")
    axes.annotate(f"target {TARGET}", (1, TARGET), xytext=(2, 3), textcoords="offset points", fontsize=9)
    axes.set(yscale="log", xlabel="step", ylabel="training loss (mean over about 10 steps)", xlim=(1, None))
    axes.set_title("Handwritten digits: the same network and budget under each rule", loc="left")
    axes.legend(frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120, metadata={"Software": None})


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, help="runs of each rule (default 3)")
    add("--steps", type=int, help="steps of each run (default 300)")
    add("--batch-size", type=int, default=64, help="images a step (default 64)")
    add("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE", help="some rules only")
    add("--tune", action="store_true", help="find the rates anew first; takes a minute")
    add("--smoke", action="store_true", help="one seed and 60 steps, unless given; fails if a rule does not learn")
    add("--check", action="store_true", help="fail unless every rule reaches the target in fewer steps than SGD")
    add("--out", type=Path, help="folder for the picture and the figures; without it nothing is written")
    add("--no-plots", action="store_true", help="write the figures only")
    add("--quiet", action="store_true", help="print the table only")
    args = parser.parse_args(argv)
    args.seeds = args.seeds if args.seeds is not None else 1 if args.smoke else 3
    args.steps = args.steps if args.steps is not None else 60 if args.smoke else 300
    if args.seeds < 1 or args.steps < 2 or not 1 <= args.batch_size <= 1200:
        parser.error("--seeds must be 1 or more, --steps 2 or more, --batch-size from 1 to 1200")
    if args.check and ("SGD" not in args.rules or args.smoke):
        parser.error("--check compares with SGD over whole runs; leave it among the --rules, and --smoke out")
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder; {args.out} is a file")
    return args


def summary(name, rate, results):
    """The row of one rule in the table."""
    accuracy = [100 * r["accuracy"] for r in results]
    below = [kopt.exponentially_weighted_average(r["losses"], window=10) <= TARGET for r in results]
    return {
        "rule": name,
        "rate": rate,
        "accuracy": float(np.mean(accuracy)),
        "sd": float(np.std(accuracy, ddof=1)) if len(results) > 1 else 0.0,
        "steps_to_target": 1 + float(np.mean([b.argmax() for b in below])) if all(b.any() for b in below) else None,
        "ms_per_step": float(np.median([r["ms_per_step"] for r in results])),
    }


def show(table):
    print(f"\n{'rule':9} {'rate':>6}  test accuracy   steps to loss {TARGET}   ms a step")
    for row in table:
        steps = "not reached" if row["steps_to_target"] is None else f"{row['steps_to_target']:.0f}"
        line = f"{row['rule']:9} {row['rate']:6g}  {row['accuracy']:5.1f} ± {row['sd']:3.1f} %  "
        print(f"{line}{steps:>17}   {row['ms_per_step']:9.2f}")


def write(folder, config, result, runs, plots):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    with open(folder / "history.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["rule", "seed", "step", "loss"])
        for name, results in runs.items():
            for seed, run in enumerate(results):
                rows.writerows([name, seed, step, f"{loss:.6g}"] for step, loss in enumerate(run["losses"], 1))
    if plots:
        draw(runs, folder / "losses.png")


def main(argv=None):
    args = arguments(argv)
    say = (lambda *_: None) if args.quiet else lambda line: print(line, flush=True)
    x, x_test, y, y_test = digits()
    data, budget = ((x, y), (x_test, y_test)), {"steps": args.steps, "batch_size": args.batch_size}
    about = {"keras": keras.__version__, "backend": keras.backend.backend()}
    say(f"{len(x)} images to train, {len(x_test)} to test; {args.steps} steps of {args.batch_size} each")
    say("Keras {keras} on {backend}".format(**about))
    rates = tune(args.rules, data, say, **budget) if args.tune else {name: RULES[name][1] for name in args.rules}

    runs = {name: [] for name in args.rules}
    for name, results in runs.items():
        for seed in range(args.seeds):
            results.append(train(RULES[name][0], rates[name], *data, seed, **budget))
            say(f"{name:9} seed {seed}: accuracy {results[-1]['accuracy']:.1%}, loss {results[-1]['losses'][-1]:.3f}")
    table = [summary(name, rates[name], results) for name, results in runs.items()]
    show(table)

    result = {"table": table, "target": TARGET, **about}
    if args.out:
        write(args.out, {**vars(args), "out": str(args.out), "rates": rates}, result, runs, not args.no_plots)
        say(f"\nFigures, losses and picture are in {args.out}")
    say(NEXT)
    if args.smoke and not all(r["accuracy"] > 0.5 for results in runs.values() for r in results):
        raise SystemExit("a rule did not learn")
    steps = {row["rule"]: row["steps_to_target"] or np.inf for row in table}
    if args.check and not all(n < steps["SGD"] for rule, n in steps.items() if rule != "SGD"):
        raise SystemExit("a rule was no faster than SGD")
    return result


if __name__ == "__main__":
    main()
