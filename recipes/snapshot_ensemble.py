"""Snapshot ensembles: one training that comes to rest several times, beside what else its epochs could be spent on.

What: 1,797 images of handwritten digits (8 x 8, scikit-learn's), 300 to train, 300 to validate, 1,197 to test; 20 % of
the training labels are drawn at random, and each image is moved by up to a pixel and gets noise, otherwise in each
epoch; two hidden layers of 64; SGD in batches of 30 with momentum 0.9 and an L2 penalty, 80 epochs. Seeds 100 and up:
each has its own split, first weights and order, the same for each arm.

Claim (Huang et al., 2017): the mean of what the snapshots of one training predict is better than a single training of
the same length. Theirs has a step schedule at a rate that was not searched for; here there is also one whose schedule
and rate are the best of several, and one whose weights are averaged. `--tune` prints that search, for all sides, on
other seeds, by the error on the test images.
Expected on TensorFlow 2.21, Keras 3.15.1 (2026-11): see the tables in snapshot_ensemble.md.
When it says little, or the opposite: `--regime noisy`, `clean`, `shifted` and `long`.
"""

import argparse
import functools
import json
import os
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from scipy.stats import wilcoxon
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import kopt
from kopt import scores

TRAIN, BATCH = 300, 30
STEPS = TRAIN // BATCH
AT_ONCE = STEPS if keras.backend.backend() != "torch" else 1  # steps between two looks; Keras on torch has 1 only
REGIMES = {  # `noise`: the share of the training labels that are drawn at random; `moving`: whether images are
    # moved by up to a pixel and get noise, otherwise in each epoch.
    "both": {"noise": 0.2, "moving": True, "epochs": 80},
    "noisy": {"noise": 0.2, "moving": False, "epochs": 40},
    "clean": {"noise": 0.0, "moving": False, "epochs": 60},
    "shifted": {"noise": 0.0, "moving": True, "epochs": 60},
    "long": {"noise": 0.0, "moving": True, "epochs": 200},
}
FOUND = {  # by `--tune`: a schedule and its rate; the rate to average at; the highest rate of cycles, and how many
    "both": {"single": ("step", 0.05), "average": 0.05, "snapshots": (0.1, 5)},
    "noisy": {"single": ("step", 0.01), "average": 0.01, "snapshots": (0.2, 8)},
    "clean": {"single": ("step", 0.1), "average": 0.1, "snapshots": (0.2, 10)},
    "shifted": {"single": ("cosine", 0.1), "average": 0.05, "snapshots": (0.1, 3)},
}
FOUND["long"] = FOUND["shifted"]
NOISY = "both", "noisy"  # with all arms, on 30 seeds
PAPER = "step", 0.1
SINGLE, STEP, AVERAGE, SINGLES = "tuned single", "step schedule", "average", "single cycles"
SNAPSHOTS = "snapshots"
ARMS = {  # arm -> what it is
    SINGLE: "one training, with the best schedule and rate",
    STEP: "one training, with the paper's schedule: a tenth of the rate after 50 % and 75 %",
    AVERAGE: "one training at a constant rate; the mean of its weights in the second half, by PolyakAveraging",
    "no cycles": "the mean of what the tuned single predicts at as many moments",
    SINGLES: "as many short trainings as cycles, each from weights of its own",
    SNAPSHOTS: "SnapshotEnsemble(cycles)",
    "last snapshot": "the last of them alone",
    "last 3": "build(last=3)",
    "greedy": 'build(select="greedy", data=validation)',
    "soup": "soup()",
    "5 tuned singles": "the mean of five trainings of full length",
}
FEW = SINGLE, STEP, AVERAGE, SINGLES, SNAPSHOTS, "last snapshot", "soup"  # in the other regimes
RATES = 0.005, 0.01, 0.02, 0.05, 0.1, 0.2  # of single trainings; what `--tune` tries
PEAKS, CYCLES = (0.02, 0.05, 0.1, 0.2), (3, 5, 8, 10)  # of snapshots
TUNING_SEEDS = 12


def digits(seed, noise):
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    x, rest, y, others = train_test_split(images, labels, train_size=TRAIN, random_state=seed, stratify=labels)
    x_val, x_test, y_val, y_test = train_test_split(rest, others, train_size=300, random_state=seed, stratify=others)
    random = np.random.default_rng([seed, 1])
    wrong = random.permutation(TRAIN)[: round(noise * TRAIN)]
    y[wrong] = random.integers(0, 10, len(wrong))
    return (x, y), (x_val, y_val), (x_test, y_test)


def moved(x, random):
    """Each image shifted by -1, 0 or 1 pixel in both directions, with noise."""
    padded = np.pad(x.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    down, right = random.integers(0, 3, (2, len(x), 1, 1))
    rows, columns = np.arange(8)[:, None] + down, np.arange(8) + right
    shifted = padded[np.arange(len(x))[:, None, None], rows, columns].reshape(-1, 64)
    return shifted + random.normal(0, 0.1, shifted.shape).astype("float32")


def laid_out(data, seed, epochs, moving):
    """The rows of all epochs, one epoch after the other, each in an order of its own."""
    x, y = data
    parts = []
    for epoch in range(epochs):
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(len(x))
        parts.append((moved(x[order], random) if moving else x[order], y[order]))
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def network(rate):
    hidden = [keras.layers.Dense(64, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10, activation="softmax")])
    optimizer = kopt.SGD(rate, momentum=0.9, l2=1e-4)
    model.compile(optimizer, loss="sparse_categorical_crossentropy", steps_per_execution=AT_ONCE)
    optimizer.build(model.trainable_variables)
    return model


def first_weights(model, seed) -> list:
    """He's normal weights, and zeros for biases."""
    random = np.random.default_rng([seed, 2])
    shapes = [variable.shape for variable in model.variables]
    return [random.normal(0, (2 / shape[0]) ** 0.5, shape) if len(shape) == 2 else np.zeros(shape) for shape in shapes]


@functools.cache
def planned(kind, rate, epochs):
    """A model whose rate goes down by itself, so that it can be compiled once and trained often, and its optimizer's
    variables before that."""
    if kind == "cosine":
        schedule = kopt.schedules.CosineDecay(steps=STEPS * epochs, initial=rate)
    else:
        drops = [STEPS * epochs // 2, STEPS * epochs * 3 // 4]
        schedule = kopt.schedules.Staircase(drops, [0.1, 0.01], per="step", initial=rate)
    model = network(schedule)
    return model, [np.array(keras.ops.convert_to_numpy(variable)) for variable in model.optimizer.variables]


def fit(model, seed, rows, epochs, *callbacks):
    model.set_weights(first_weights(model, seed))
    plan = {"batch_size": BATCH, "steps_per_epoch": STEPS, "epochs": epochs, "shuffle": False}  # the epochs follow
    model.fit(*rows, **plan, verbose=0, callbacks=list(callbacks))


def probabilities(model, x):
    return keras.ops.convert_to_numpy(model(x))


class Watch(keras.callbacks.Callback):
    """What the model predicts when an epoch ends."""

    def __init__(self, x):
        super().__init__()
        self.x, self.predicted = x, []

    def on_epoch_end(self, epoch, logs=None):
        self.predicted.append(probabilities(self.model, self.x))


class Task:
    """The data of one seed, and who judges predictions for them."""

    def __init__(self, seed, regime, epochs):
        self.seed, self.epochs, self.moving = seed, epochs, REGIMES[regime]["moving"]
        self.train, self.validation, self.test = digits(seed, REGIMES[regime]["noise"])
        self.x = np.concatenate([self.validation[0], self.test[0]])

    def rows(self, seed, epochs):
        return laid_out(self.train, seed, epochs, self.moving)

    def single(self, kind, rate, number=0, *callbacks, epochs=None):
        """The predictions of one training; `number` 0 has the first weights and the order of the other arms."""
        seed, epochs = self.seed + 1000 * number, epochs or self.epochs
        model, fresh = planned(kind, rate, epochs)
        for variable, value in zip(model.optimizer.variables, fresh, strict=True):
            variable.assign(value)
        fit(model, seed, self.rows(seed, epochs), epochs, *callbacks)
        return probabilities(model, self.x)

    def average(self, rate):
        model = network(rate)
        averaging = kopt.callbacks.PolyakAveraging(kind="uniform", start_epoch=self.epochs // 2)
        fit(model, self.seed, self.rows(self.seed, self.epochs), self.epochs, averaging)
        return probabilities(model, self.x)

    def snapshots(self, rate, cycles):
        watch = Watch(self.x)
        snap = kopt.callbacks.SnapshotEnsemble(cycles, rate, validation_data=self.validation, verbose=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The (members are|ensemble is)")  # they are counted below
            fit(network(rate), self.seed, self.rows(self.seed, self.epochs), self.epochs, snap, watch)
        return snap, watch

    def scores(self, p) -> dict:
        """The error on the test images in percent; loss and calibration error at the temperature of the validation."""
        own, rest = p[: len(self.validation[0])], p[len(self.validation[0]) :]
        temperature = scores.Classes(self.validation[1], 10).temperature(own)
        found = scores.Classes(self.test[1], 10).scores(scores.tempered(rest, temperature))
        raw = scores.Classes(self.test[1], 10).scores(rest)
        kept = {"error": 100 * (1 - raw["accuracy"]), "nll": found["nll"], "ece": found["ece"]}
        return kept | {"temperature": temperature, "raw_nll": raw["nll"], "raw_ece": raw["ece"]}


def train(seed, regime, epochs, arms):
    """The scores of every arm, from trainings of one seed; the curves of the snapshots, and their callback."""
    task = Task(seed, regime, epochs)
    settings = FOUND[regime]
    single, (peak, cycles) = settings["single"], settings[SNAPSHOTS]
    snap, watch = task.snapshots(peak, cycles)
    taken = [record["epoch"] for record in snap.snapshots_]
    lengths = np.diff([0, *taken]).tolist()
    one = Watch(task.x)
    found = {
        SINGLE: task.single(*single, 0, one),
        STEP: task.single(*PAPER),
        AVERAGE: task.average(settings[AVERAGE]),
        "no cycles": np.mean([one.predicted[end - 1] for end in taken], axis=0),
        SINGLES: np.mean([task.single("cosine", peak, i, epochs=n) for i, n in enumerate(lengths)], axis=0),
        SNAPSHOTS: probabilities(snap.ensemble, task.x),
        "last snapshot": watch.predicted[-1],
        "last 3": probabilities(snap.build(last=3), task.x),
        "soup": probabilities(snap.soup(), task.x),
    }
    if "greedy" in arms:
        found["greedy"] = probabilities(snap.build(select="greedy", data=task.validation), task.x)
    if "5 tuned singles" in arms:
        others = [task.single(*single, i) for i in range(1, 5)]
        found["5 tuned singles"] = np.mean([found[SINGLE], *others], axis=0)
    so_far = [np.mean([watch.predicted[end - 1] for end in taken[: i + 1]], axis=0) for i in range(len(taken))]
    curves = {
        "raw": [task.scores(p)["error"] for p in watch.predicted],
        "ensemble": [(end, task.scores(p)["error"]) for end, p in zip(taken, so_far, strict=True)],
        "rate": rates(peak, lengths),
    }
    return {arm: task.scores(found[arm]) for arm in arms}, curves, snap


def rates(peak, lengths):
    """The rate at each step of cycles of so many epochs."""
    waves = [kopt.schedules.CosineDecay(steps=STEPS * n, initial=peak).preview(STEPS * n) for n in lengths]
    return [(i / STEPS, float(rate)) for i, rate in enumerate(np.concatenate(waves))]


def compare(runs) -> list[dict]:
    """The snapshots beside each other arm, seed by seed."""
    rows, tested = [], []
    of = {arm: np.array([run[arm]["error"] for run in runs]) for arm in runs[0]}
    for arm, errors in of.items():
        low, high = interval(errors)
        row = {"arm": arm, "error": errors.mean(), "sd": errors.std(ddof=1) if len(runs) > 1 else 0.0}
        row |= {"error_low": low, "error_high": high}
        row |= {name: float(np.mean([run[arm][name] for run in runs])) for name in runs[0][arm] if name != "error"}
        if arm != SNAPSHOTS:
            better = errors - of[SNAPSHOTS]
            low, high = interval(better)
            p = float(wilcoxon(better).pvalue) if len(runs) > 1 and better.any() else 1.0
            row |= {"margin": better.mean(), "low": low, "high": high, "wins": int((better > 0).sum()), "p": p}
            tested.append(row)
        rows.append(row)
    least = 0.0
    for i, row in enumerate(sorted(tested, key=lambda row: row["p"])):  # Holm's correction
        least = row["p"] = max(least, min(1.0, row["p"] * (len(tested) - i)))
    return rows


def interval(values):
    """Where the mean lies with 95 % confidence: the percentiles of 10,000 bootstrap samples."""
    picked = np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))
    return [float(bound) for bound in np.percentile(values[picked].mean(1), [2.5, 97.5])]


def show(rows, seeds):
    columns = f"{'test error':>14} {'T':>5} {'NLL':>6} {'ECE':>6}"
    print(f"\n{'arm':15} {columns}   {'snapshots are better by':>30} {'in':>8}   {'p':>8}")
    for row in rows:
        line = f"{row['arm']:15} {row['error']:6.2f} ± {row['sd']:4.2f} %"
        line += f" {row['temperature']:5.2f} {row['nll']:6.3f} {row['ece']:6.3f}"
        if "margin" in row:
            bounds = f"({row['low']:+.2f} to {row['high']:+.2f})"
            line += f"   {row['margin']:+6.2f} points {bounds:>16} {row['wins']:2} of {seeds:2}   {row['p']:8.2g}"
        print(line)
    print("T: the temperature that fits the validation images best. NLL, ECE: of the test images, at T. In brackets:")
    print("95 %, from a bootstrap over seeds. p: Wilcoxon's for pairs, after Holm's correction.")


def told(of_each):
    """How different the members were, and how often `fit` would have warned, out of `results_` of all trainings."""
    return {
        "disagreement": float(np.mean([one["diversity"]["disagreement"] for one in of_each])),
        "alike": sum(one["alike"] for one in of_each),
        "worse than the last": sum(one["worse"] for one in of_each),
    }


def tune(regime, epochs, seeds):
    """Mean test errors of the single trainings and of the snapshots at each setting, the best ones marked."""
    tried = {}
    for kind in ("step", "cosine"):
        tried |= {("single", kind, rate): [] for rate in RATES}
    tried |= {(AVERAGE, "constant", rate): [] for rate in RATES}
    tried |= {(SNAPSHOTS, peak, cycles): [] for peak in PEAKS for cycles in CYCLES if cycles <= epochs}
    task = None
    predict = {
        "single": lambda *how: task.single(*how),
        AVERAGE: lambda _, rate: task.average(rate),
        SNAPSHOTS: lambda *how: probabilities(task.snapshots(*how)[0].ensemble, task.x),
    }
    for seed in range(seeds):
        task = Task(seed, regime, epochs)
        for (arm, *how), errors in tried.items():
            errors.append(task.scores(predict[arm](*how))["error"])
        print(f"seed {seed}", end="\n" if seed == seeds - 1 else ", ", flush=True)
    means = {setting: float(np.mean(errors)) for setting, errors in tried.items()}
    best = [min((one for one in means if one[0] == arm), key=means.get) for arm in predict]
    for setting, mean in means.items():
        how = "rate {1:g}, {2} cycles" if setting[0] == SNAPSHOTS else "{1}, rate {2:g}"
        mark = "   <- the best" if setting in best else ""
        print(f"{setting[0]:10} {how.format(*setting):20} {mean:6.2f} %{mark}")
    return {"tried": [[*setting, mean] for setting, mean in means.items()], "best": best}


def draw(curves, rows, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    rate = left.twinx()
    rate.plot(*zip(*curves["rate"], strict=True), color="#999999", lw=0.8)
    top = max(value for _, value in curves["rate"])
    rate.set(ylim=(0, 3 * top), yticks=[0, top])
    rate.set_ylabel("learning rate", color="#777777", loc="bottom")
    rate.tick_params(colors="#777777")
    raw, ensemble = curves["raw"], curves["ensemble"]
    left.plot(range(1, len(raw) + 1), raw, color="#0072B2", lw=1.5, label="the model, after each epoch")
    left.plot(*zip(*ensemble, strict=True), color="#D55E00", marker="o", ms=5, lw=1.5, label="the snapshots so far")
    lowest, highest = min(min(raw), min(error for _, error in ensemble)), np.percentile(raw, 95)
    left.set_ylim(max(0, lowest - 0.6 * (highest - lowest)), highest + 0.35 * (highest - lowest))
    left.set(xlabel="epoch", ylabel="test error, %", title="One training")
    left.set_zorder(rate.get_zorder() + 1)
    left.patch.set_visible(False)
    left.legend(frameon=False, loc="upper right")
    by_error = sorted(rows, key=lambda row: -row["error"])
    for i, row in enumerate(by_error):
        color = "#D55E00" if row["arm"] == SNAPSHOTS else "#0072B2"
        right.plot([row["error_low"], row["error_high"]], [i, i], color=color, lw=1.5)
        right.plot(row["error"], i, "o", color=color, ms=6)
        right.annotate(f"{row['error']:.1f}", (row["error_high"], i), (6, 0), textcoords="offset points", va="center")
    right.set_yticks(range(len(by_error)), [row["arm"] for row in by_error])
    right.margins(x=0.15)
    right.set(xlabel="test error, %", title="Mean of all seeds, 95 % interval")
    for axes in (left, rate, right):
        axes.spines["top"].set_visible(False)
    right.spines["right"].set_visible(False)
    figure.savefig(file, dpi=120, metadata={"Software": None})


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--regime", choices=REGIMES, default="both", help="which data and length (default both)")
    add("--seeds", type=int, help="how many (default 30; 12 where labels are clean, and for --tune)")
    add("--first-seed", type=int, default=100, help="the others follow (default 100)")
    add("--epochs", type=int, help="of each training (default: the regime's)")
    add("--tune", action="store_true", help=f"print the search for rates and cycles instead, on {TUNING_SEEDS} seeds")
    add("--smoke", action="store_true", help="one seed and ten epochs, unless given")
    add("--check", action="store_true", help="fail unless snapshots beat both single trainings")
    add("--out", type=Path, help="folder for the picture and the figures; without it nothing is written")
    add("--no-plots", action="store_true", help="write the figures only")
    args = parser.parse_args(argv)
    regime = REGIMES[args.regime]
    if args.seeds is None:
        args.seeds = 1 if args.smoke else TUNING_SEEDS if args.tune else 30 if args.regime in NOISY else 12
    args.epochs = args.epochs if args.epochs is not None else 10 if args.smoke else regime["epochs"]
    if args.seeds < 1 or args.epochs < 10:
        parser.error("--seeds must be 1 or more, --epochs 10 or more")
    if args.check and (args.seeds < 10 or args.regime != "both" or args.tune):
        parser.error("--check wants 10 seeds or more in the regime both; fewer tell little")
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder; {args.out} is a file")
    return args


def main(argv=None):
    args = arguments(argv)
    about = {"keras": keras.__version__, "backend": keras.backend.backend(), "regime": args.regime}
    print("Keras {keras} on {backend}, {regime}".format(**about))
    if args.tune:
        result = tune(args.regime, args.epochs, args.seeds) | about
        write(args, result)
        return result
    arms = [arm for arm in ARMS if args.regime in NOISY or arm in FEW]
    runs, of_each = [], []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        found, curves, snap = train(seed, args.regime, args.epochs, arms)
        runs.append(found)
        of_each += snap.results_
        said = ", ".join(f"{arm} {found[arm]['error']:.2f}" for arm in (SINGLE, AVERAGE, SINGLES, SNAPSHOTS))
        print(f"seed {seed}: {said}", flush=True)
    rows, members = compare(runs), told(of_each)
    show(rows, args.seeds)
    print(f"\nTwo snapshots disagree on {100 * members['disagreement']:.1f} % of the validation images in the mean.")
    print(f"Warned that they are nearly the same function: {members['alike']} of {args.seeds} trainings;")
    print(f"that the ensemble is worse than its last member: {members['worse than the last']} of {args.seeds}.")
    print("\nThe last training, as SnapshotEnsemble tells it of the validation images:")
    snap.summary()
    result = {"rows": rows, "members": members, "runs": runs, "curves": curves, **about}
    write(args, result, lambda file: draw(curves, rows, file))
    lost = [row for row in rows if row["arm"] in (SINGLE, STEP) and row["low"] <= 0]
    if args.check and lost:
        said = "; ".join("{arm} by {margin:.2f} points ({low:.2f} to {high:.2f})".format(**row) for row in lost)
        raise SystemExit(f"snapshots were not clearly better than {said}")
    return result


def write(args, result, picture=None):
    if not args.out:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    if picture and not args.no_plots:
        picture(args.out / "snapshot_ensemble.png")
    print(f"\nFigures and picture are in {args.out}")


if __name__ == "__main__":
    main()
