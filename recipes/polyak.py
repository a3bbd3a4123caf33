"""One training, many averages: the raw weights, EMA, SWA and every width after the fact, with batch normalization.

What: 1,797 images of handwritten digits (8 x 8, scikit-learn's), 600 to train, 300 to validate, 897 to test; three
hidden layers of 64 with batch normalization; SGD in batches of 32, at a constant rate of 0.1 with momentum 0.9, for 12
epochs (228 steps). Seeds 100 and up: each has its own split, first weights and order, the same for each arm. Two
trainings a seed: one with Keras's average (`use_ema=True, ema_momentum=0.995`), one with kopt's callbacks, out of which
all other arms come.

Claim (Polyak and Juditsky, 1992; Izmailov et al., 2018): at a constant rate, averaged weights beat the last ones. Part
of what averaging seems to gain is due to statistics of batch normalization that are estimated anew, so there is an arm
for that alone.
Expected on TensorFlow 2.21, Keras 3.15.1 (2026-11): see the table in README.md.
When it says little: with a rate that decays to zero there is nothing left to average, and the arms are alike.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from scipy.stats import wilcoxon
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import kopt

EPOCHS, BATCH, RATE, MOMENTUM, SWA_FROM = 12, 32, 0.1, 0.995, 6
RAW, KERAS, EMA, SWA, BEST = "raw", "Keras's EMA", "EMA", "SWA", "post hoc, chosen"
ARMS = {  # arm -> what it is
    RAW: "the last weights",
    "raw, update_bn": "the same, with statistics of batch normalization estimated anew",
    KERAS: f"use_ema=True, ema_momentum={MOMENTUM}",
    "EMA, no update_bn": f"PolyakAveraging({MOMENTUM})",
    EMA: f"PolyakAveraging({MOMENTUM}, update_bn=x)",
    SWA: f'PolyakAveraging(kind="uniform", start_epoch={SWA_FROM}, update_bn=x)',
    BEST: "posthoc(select=validation)",
}
COLORS = {RAW: "#999999", EMA: "#0072B2", SWA: "#D55E00"}


def digits(seed):
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    x, rest, y, others = train_test_split(images, labels, train_size=600, random_state=seed, stratify=labels)
    x_val, x_test, y_val, y_test = train_test_split(rest, others, train_size=300, random_state=seed, stratify=others)
    return (x, y), (x_val, y_val), (x_test, y_test)


def network(seed, **arguments):
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((64,))]
    for _ in range(3):
        layers += [keras.layers.Dense(64), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    model = keras.Sequential([*layers, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(RATE, momentum=0.9, **arguments), loss=loss, metrics=["accuracy"])
    return model


class Batches(keras.utils.PyDataset):
    """The rows in an order of their own. Keras on TensorFlow, once seeds are set, has the same in every epoch."""

    def __init__(self, x, y, seed):
        super().__init__()
        order = np.random.default_rng(seed).permutation(len(x))
        self.x, self.y = x[order], y[order]

    def __len__(self):
        return -(-len(self.x) // BATCH)

    def __getitem__(self, i):
        rows = slice(i * BATCH, (i + 1) * BATCH)
        return self.x[rows], self.y[rows]


def fit(model, data, seed, epochs, callbacks=()):
    batches = kopt.data.seekable(lambda number: Batches(*data, [seed, number]))
    model.fit(batches, epochs=epochs, verbose=0, callbacks=list(callbacks))
    return model


def error(model, data) -> float:
    """Percent of the images that it is wrong about."""
    return 100 * (1 - model.evaluate(*data, verbose=0, return_dict=True)["accuracy"])


class Curve(keras.callbacks.Callback):
    """The error of the raw weights and of each average, when an epoch ends."""

    def __init__(self, averages, data):
        super().__init__()
        self.averages, self.data, self.errors_ = averages, data, {name: [] for name in (RAW, *averages)}

    def on_epoch_end(self, epoch, logs=None):
        self.errors_[RAW].append(error(self.model, self.data))
        for name, average in self.averages.items():
            if average.updates_:
                with average.applied():
                    self.errors_[name].append(error(self.model, self.data))


def train(seed, epochs, watched):
    """The error of every arm on the test images, from two trainings; the curves of the second, if watched, and it."""
    train_set, validation, test = digits(seed)
    errors = {KERAS: error(fit(network(seed, use_ema=True, ema_momentum=MOMENTUM), train_set, seed, epochs), test)}

    kept = {"update_bn": train_set[0], "segment_every_epochs": 1, "validate": "raw", "on_train_end": "raw"}
    averages = {
        EMA: kopt.callbacks.PolyakAveraging(MOMENTUM, **kept),
        SWA: kopt.callbacks.PolyakAveraging(kind="uniform", start_epoch=min(SWA_FROM, epochs - 1), **kept, name="swa"),
    }
    plain = kopt.callbacks.PolyakAveraging(MOMENTUM, validate="raw", on_train_end="raw", name="plain")
    model, curve = network(seed), Curve(averages, test)
    fit(model, train_set, seed, epochs, [*averages.values(), plain, *([curve] if watched else [])])
    errors[RAW] = error(model, test)
    for name, average in {**averages, "EMA, no update_bn": plain}.items():
        with average.applied():
            errors[name] = error(model, test)
    ema = averages[EMA]
    errors[BEST] = error(ema.posthoc(select=validation), test)
    kopt.update_bn(model, train_set[0])
    errors["raw, update_bn"] = error(model, test)
    return errors, curve.errors_, ema


def widths(ema, test):
    """The error of each width, out of the segments of one training."""
    updates = [of_one["updates"] for (of_one,) in ema.segments_]  # of the one optimizer
    total = sum(updates)
    windows = np.geomspace(2 * updates[0], total, 6).round().astype(int).tolist()
    tails = [(i + 1) / len(ema.segments_) for i in range(len(ema.segments_))]
    return (
        [(w, error(ema.posthoc(window_steps=w), test)) for w in windows],
        [(tail * total, error(ema.posthoc(tail=tail), test)) for tail in tails],
    )


def compare(runs) -> list[dict]:
    """kopt's EMA beside each other arm, seed by seed."""
    rows = []
    for arm in ARMS:
        errors = np.array([run[arm] for run in runs])
        better = errors - np.array([run[EMA] for run in runs])
        row = {"arm": arm, "error": errors.mean(), "sd": errors.std(ddof=1) if len(runs) > 1 else 0.0}
        if arm != EMA:
            p = float(wilcoxon(better).pvalue) if len(runs) > 1 and better.any() else 1.0
            row |= {"margin": better.mean(), "wins": int((better > 0).sum()), "p": p}
        rows.append(row)
    return rows


def show(rows, seeds):
    print(f"\n{'arm':18} {'test error':>14}   {'EMA is better by':>16} {'in':>7}   {'p':>6}")
    for row in rows:
        line = f"{row['arm']:18} {row['error']:6.2f} ± {row['sd']:4.2f} %"
        if "margin" in row:
            line += f"   {row['margin']:9.2f} points {row['wins']:3} of {seeds}   {row['p']:6.4f}"
        print(line)


def draw(curves, by_width, errors, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = len(curves[RAW])
    for name, values in curves.items():
        left.plot(range(epochs - len(values) + 1, epochs + 1), values, color=COLORS[name], label=name, lw=1.8)
    left.set(xlabel="epoch", ylabel="test error, %", title="One training, at the end of each epoch")
    windows, tails = by_width
    for label, color, pairs in (("EMA over so many", COLORS[EMA], windows), ("mean of the last", COLORS[SWA], tails)):
        right.plot(*zip(*pairs, strict=True), color=color, marker="o", ms=4, label=label)
    right.axhline(errors[RAW], color=COLORS[RAW], ls=":", label=RAW)
    right.set(xlabel="updates", xscale="log", title="The same training, averaged afterwards")
    ticks = [updates for updates in (10, 20, 50, 100, 200, 500, 1000) if tails[0][0] / 2 <= updates <= 2 * tails[-1][0]]
    right.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    right.minorticks_off()
    right.set_ylim(0, 1.15 * errors[RAW])
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylim(0, min(30, max(max(values) for values in curves.values()) * 1.05))
    figure.savefig(file, dpi=120, metadata={"Software": None})


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, help="trainings of each kind (default 8)")
    add("--first-seed", type=int, default=100, help="the others follow (default 100)")
    add("--epochs", type=int, help=f"of each training (default {EPOCHS})")
    add("--smoke", action="store_true", help="one seed and three epochs, unless given")
    add(
        "--check",
        action="store_true",
        help="fail unless EMA beats the raw weights, both ways, and Keras's EMA with p < 0.05",
    )
    add("--out", type=Path, help="folder for the picture and the figures; without it nothing is written")
    add("--no-plots", action="store_true", help="write the figures only")
    args = parser.parse_args(argv)
    args.seeds = args.seeds if args.seeds is not None else 1 if args.smoke else 8
    args.epochs = args.epochs if args.epochs is not None else 3 if args.smoke else EPOCHS
    if args.seeds < 1 or args.epochs < 2:
        parser.error("--seeds must be 1 or more, --epochs 2 or more")
    if args.check and args.seeds < 6:
        parser.error("--check wants 6 seeds or more; with fewer no difference has p < 0.05")
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder; {args.out} is a file")
    return args


def main(argv=None):
    args = arguments(argv)
    about = {"keras": keras.__version__, "backend": keras.backend.backend()}
    print("Keras {keras} on {backend}".format(**about))
    runs = []
    last = args.first_seed + args.seeds - 1
    for seed in range(args.first_seed, last + 1):
        errors, curves, ema = train(seed, args.epochs, watched=seed == last)
        runs.append(errors)
        print(f"seed {seed}: " + ", ".join(f"{arm} {errors[arm]:.2f}" for arm in (RAW, KERAS, EMA, SWA)), flush=True)
    rows = compare(runs)
    show(rows, args.seeds)
    by_width = widths(ema, digits(seed)[2])
    print("\nThe last training, averaged afterwards:")
    for label, pairs in zip(("EMA over", "mean of the last"), by_width, strict=True):
        print(f"  {label:16} " + ", ".join(f"{updates:.0f}: {value:.2f} %" for updates, value in pairs))
    result = {"rows": rows, "runs": runs, "curves": curves, "widths": by_width, **about}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        if not args.no_plots:
            draw(curves, by_width, errors, args.out / "polyak.png")
        print(f"\nFigures and picture are in {args.out}")
    of = {row["arm"]: row for row in rows}
    beaten = [arm for arm in (RAW, "raw, update_bn", KERAS) if of[arm].get("p", 1) < 0.05 and of[arm]["margin"] > 0]
    if args.check and len(beaten) < 3:
        raise SystemExit(f"EMA was better with p < 0.05 than {', '.join(beaten) or 'nothing'} only")
    return result


if __name__ == "__main__":
    main()
