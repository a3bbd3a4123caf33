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

RULES = {  # rule -> optimizer at a rate, and the rate that --tune found
    "SGD": (kopt.SGD, 0.3),
    "momentum": (lambda rate: kopt.SGD(rate, momentum=0.9), 0.1),
    "Nesterov": (lambda rate: kopt.SGD(rate, momentum=0.9, nesterov=True), 0.1),
    "Adagrad": (kopt.Adagrad, 0.03),
    "RMSprop": (kopt.RMSprop, 0.01),
    "Adam": (kopt.Adam, 0.01),
    "AdamW": (kopt.AdamW, 0.01),
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
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


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
    per_epoch = len(x) // batch_size
    order = np.concatenate([np.random.default_rng(seed + e).permutation(len(x))[: per_epoch * batch_size]
                            for e in range(-(-steps // per_epoch))])[: steps * batch_size]  # fmt: skip
    model.fit(x[order], y[order], batch_size=batch_size, shuffle=False, verbose=0, callbacks=[record])
    answers = keras.ops.convert_to_numpy(model(test_set[0])).argmax(1)
    return {
        "losses": record.losses_,
        "accuracy": float((answers == test_set[1]).mean()),
        "ms_per_step": 1e3 * float(np.median(np.diff(record.times_))),
    }


def steps_to_target(losses):
    smooth = kopt.exponentially_weighted_average(losses, window=10)
    reached = np.flatnonzero(smooth <= TARGET)
    return int(reached[0]) + 1 if len(reached) else None


def tune(data, say, **budget):
    """The rate of each rule with the least training loss, averaged over the steps of a run."""
    best = {}
    for name, (make, _) in RULES.items():
        losses = {rate: np.mean(train(make, rate, *data, seed=99, **budget)["losses"]) for rate in RATES}
        best[name] = min(losses, key=lambda rate: np.nan_to_num(losses[rate], nan=np.inf))
        say(f"{name:9} {best[name]:g}, of " + ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in losses.items()))
    return best


def draw(runs, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    colors = ["#999999", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#0072B2", "#000000"]
    for (name, results), color in zip(runs.items(), colors, strict=False):
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
    pyplot.close(figure)


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each rule (default 3)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each run (default 300)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step (default 64)")
    parser.add_argument(
        "--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE", help="some rules only"
    )
    parser.add_argument("--tune", action="store_true", help="find the rates anew first; takes a minute")
    parser.add_argument("--smoke", action="store_true", help="one seed and 60 steps, in seconds; checks that all learn")
    parser.add_argument(
        "--out", type=Path, help="folder for the picture and the figures; without it nothing is written"
    )
    parser.add_argument("--no-plots", action="store_true", help="write the figures only")
    parser.add_argument("--quiet", action="store_true", help="print the table only")
    args = parser.parse_args(argv)
    if min(args.seeds, args.steps, args.batch_size) < 1 or args.batch_size > 1200:
        parser.error("--seeds, --steps and --batch-size must be 1 or more, and --batch-size at most 1200")
    if args.smoke:
        args.seeds, args.steps = 1, 60
    return args


def main(argv=None):
    args = arguments(argv)
    say = (lambda *_: None) if args.quiet else lambda line: print(line, flush=True)
    x, x_test, y, y_test = digits()
    data = (x, y), (x_test, y_test)
    budget = {"steps": args.steps, "batch_size": args.batch_size}
    say(f"{len(x)} images to train, {len(x_test)} to test; {args.steps} steps of {args.batch_size}; "
        f"Keras {keras.__version__} on {keras.backend.backend()}")  # fmt: skip
    rates = {name: rate for name, (_, rate) in RULES.items()} | (tune(data, say, **budget) if args.tune else {})

    runs = {name: [] for name in args.rules}
    for name, results in runs.items():
        for seed in range(args.seeds):
            results.append(train(RULES[name][0], rates[name], *data, seed, **budget))
            say(f"{name:9} seed {seed}: accuracy {results[-1]['accuracy']:.1%}, loss {results[-1]['losses'][-1]:.3f}")

    table = []
    for name, results in runs.items():
        accuracy = [100 * r["accuracy"] for r in results]
        reached = [steps_to_target(r["losses"]) for r in results]
        table.append({
            "rule": name,
            "rate": rates[name],
            "accuracy": float(np.mean(accuracy)),
            "sd": float(np.std(accuracy, ddof=1)) if args.seeds > 1 else 0.0,
            "steps_to_target": None if None in reached else float(np.mean(reached)),
            "ms_per_step": float(np.median([r["ms_per_step"] for r in results])),
        })  # fmt: skip
    print(f"\n{'rule':9} {'rate':>6}  test accuracy   steps to loss {TARGET}   ms a step")
    for row in table:
        steps = "not reached" if row["steps_to_target"] is None else f"{row['steps_to_target']:.0f}"
        print(f"{row['rule']:9} {row['rate']:6g}  {row['accuracy']:5.1f} ± {row['sd']:3.1f} %  "
              f"{steps:>17}   {row['ms_per_step']:9.2f}")  # fmt: skip

    result = {"table": table, "target": TARGET, "keras": keras.__version__, "backend": keras.backend.backend()}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        config = {**vars(args), "out": str(args.out), "rates": rates}
        (args.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        with open(args.out / "history.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["rule", "seed", "step", "loss"])
            writer.writerows([n, s, t, f"{v:.6g}"] for n, rs in runs.items() for s, r in enumerate(rs)
                             for t, v in enumerate(r["losses"], 1))  # fmt: skip
        if not args.no_plots:
            draw(runs, args.out / "losses.png")
            say(f"\nLoss curves: {args.out / 'losses.png'}; figures: {args.out / 'result.json'}")
    say(NEXT)
    if args.smoke and not all(
        np.isfinite(r["losses"]).all() and r["accuracy"] > 0.5 for rs in runs.values() for r in rs
    ):
        raise SystemExit("a rule did not learn")
    return result


if __name__ == "__main__":
    main()
