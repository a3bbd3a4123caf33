"""Momentum annealed from 0.5 to 0.99, beside momenta that stay: each at its own rate, in three settings.

What: 1,797 images of handwritten digits (8 x 8, scikit-learn's), 640 to train, 300 to validate, 857 to test; one hidden
layer of 64; SGD. The settings: batches of 32 for 15 epochs at a constant rate; the same with a rate that decays to zero
along a cosine; and 60 steps with the gradient of all images. Each arm gets, in each setting, the rate with the least
validation error of thirteen (1/1024 to 4), on 6 seeds that are used for nothing else. Seeds 100 and up are tested: each
has its own split, first weights and order, the same for each arm.

Claim (Stanford's CS231n, class 6): start with a momentum of about 0.5 and anneal it to 0.99 or so over multiple epochs.
Expected on TensorFlow 2.21, Keras 3.15.1 (2026-11), percent of errors on the test images, 16 seeds:

    momentum                none          0.5          0.9         0.99   0.5 to 0.99   the same, mean
    constant rate     4.11 ± 1.2   3.85 ± 0.5   3.72 ± 0.6   5.47 ± 1.0    6.45 ± 2.2       4.17 ± 1.2
    decaying rate     3.98 ± 0.7   3.76 ± 0.6   3.46 ± 0.6   7.38 ± 1.3    3.54 ± 0.5       3.80 ± 0.6
    all images        4.96 ± 1.0   3.97 ± 0.6   4.41 ± 0.6   6.23 ± 1.1    3.70 ± 0.5       4.00 ± 0.5

Where gradients have no noise, annealing beats every momentum that stays; with a rate that decays it is as good as 0.9.
When it does not help: with small batches at a constant rate it does harm. Steps grow as rate / (1 - momentum), by 50,
when they should get shorter; with `form="average"` ("mean"), where they do not grow, it does none. Time: two minutes on
two cores.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import ops
from scipy.stats import wilcoxon
from sklearn.datasets import load_digits

import kopt
from kopt.callbacks import CosineDecay, MomentumAnneal

TRAIN, HIDDEN, RATES, TUNING_SEEDS = 640, 64, [2.0**power for power in range(-10, 3)], range(6)
ANNEALED, OF_MEAN = "0.5 to 0.99", "0.5 to 0.99, mean"
ARMS = {  # arm -> the optimizer's arguments, a color
    "none": ({}, "#999999"),
    "0.5": ({"momentum": 0.5}, "#E69F00"),
    "0.9": ({"momentum": 0.9}, "#0072B2"),
    "0.99": ({"momentum": 0.99}, "#CC79A7"),
    ANNEALED: ({"momentum": 0.5}, "#D55E00"),
    OF_MEAN: ({"momentum": 0.5, "form": "average"}, "#009E73"),
}
CONSTANT, DECAYING, WHOLE = "constant rate", "decaying rate", "all images a step"
SETTINGS = {CONSTANT: (32, 15), DECAYING: (32, 15), WHOLE: (TRAIN, 60)}  # images a step, epochs
WORSE = [(CONSTANT, arm) for arm in ("none", "0.5", "0.9")]  # than these annealing is worse, with p < 0.05
BETTER = [(DECAYING, "0.99"), *((WHOLE, arm) for arm in ("none", "0.9", "0.99"))]  # and than these, better


def digits(seeds):
    """Images (row, seed, pixel) and labels (row, seed): to train, to validate, to test."""
    images, labels = load_digits(return_X_y=True)
    order = np.stack([np.random.default_rng([seed, 1]).permutation(len(labels)) for seed in seeds], 1)
    return [((images[part] / 16).astype("float32"), labels[part]) for part in np.split(order, [TRAIN, TRAIN + 300])]


def network(seeds, rates, optimizer):
    """A network for each rate and seed, side by side. For SGD, a factor on a loss is a factor on the rate."""
    keras.utils.clear_session()
    shape, more = (len(rates), len(seeds)), {"bias_axes": "rso", "kernel_initializer": "zeros"}
    hidden = keras.layers.EinsumDense("bsi,rsio->brso", (*shape, HIDDEN), activation="relu", **more)
    last = keras.layers.EinsumDense("brsi,rsio->brso", (*shape, 10), **more)
    model, draws = keras.Sequential([keras.Input((len(seeds), 64)), hidden, last]), [*map(np.random.default_rng, seeds)]
    for kernel in (hidden.kernel, last.kernel):
        first = np.stack([draw.normal(0, (2 / kernel.shape[2]) ** 0.5, kernel.shape[2:]) for draw in draws])
        kernel.assign(np.broadcast_to(first, kernel.shape))

    def loss(y, logits):
        y = ops.broadcast_to(ops.expand_dims(y, 1), ops.shape(logits)[:-1])
        losses = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
        return ops.sum(losses * ops.reshape(ops.convert_to_tensor(rates, losses.dtype), (-1, 1)), (1, 2))

    model.compile(optimizer, loss=loss)
    return model


def errors(model, data):
    """Percent of the images, (rate, seed); where the weights exploded, all."""
    logits = ops.convert_to_numpy(model(data[0]))
    right = (logits.argmax(-1) == data[1][:, None]) & np.isfinite(logits).all(-1)
    return 100 * (1 - right.mean(0))


def train(arm, setting, seeds, rates, epochs):
    """The validation and the test error of each rate and seed."""
    (x, y), *others = digits(seeds)
    callbacks = [MomentumAnneal(0.5, 0.99)] * (arm in (ANNEALED, OF_MEAN)) + [CosineDecay()] * (setting == DECAYING)
    model, batch = network(seeds, rates, kopt.SGD(1.0, **ARMS[arm][0])), SETTINGS[setting][0]
    order = np.concatenate([np.random.default_rng(epoch).permutation(TRAIN) for epoch in range(epochs)])
    passes = {"batch_size": batch, "steps_per_epoch": TRAIN // batch, "epochs": epochs, "callbacks": callbacks}
    model.fit(x[order], y[order], **passes, shuffle=False, verbose=0)
    return [errors(model, data) for data in others]


def compare(setting, rates, found) -> list[dict]:
    """The annealed momentum beside each other arm, seed by seed."""
    rows, spread = [], lambda values: values.std(ddof=1) if len(values) > 1 else 0.0
    for arm, test in found.items():
        better = test - found[ANNEALED]
        row = {"setting": setting, "momentum": arm, "rate": rates[arm], "error": test.mean(), "sd": spread(test)}
        if arm != ANNEALED:
            p = float(wilcoxon(better).pvalue) if len(test) > 1 and better.any() else 1.0
            row |= {"margin": better.mean(), "wins": int((better > 0).sum()), "p": p}
        rows.append(row)
    return rows


def holds(setting, momentum, margin, p, **_):
    """What is claimed beside this arm; where nothing is, annealing loses no quarter of a point."""
    sign = ((setting, momentum) in BETTER) - ((setting, momentum) in WORSE)
    return sign * margin > 0 and p < 0.05 if sign else setting == CONSTANT or margin > -0.25


def show(rows, seeds):
    print(f"\n{rows[0]['setting']:17}     rate      test error   annealing is better by        in        p")
    for row in rows:
        line = f"{row['momentum']:17} {row['rate']:8.3g}   {row['error']:5.2f} ± {row['sd']:4.2f} %"
        if "margin" in row:
            line += f"   {row['margin']:15.2f} points {row['wins']:3} of {seeds} {row['p']:8.1g}"
        print(line, flush=True)


def draw(curves, rows, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.8 + 3.6 * len(curves), 4.4), layout="constrained")
    panels = dict(zip(curves, figure.subplots(1, len(curves), sharey=True, squeeze=False)[0], strict=True))
    for row in rows:
        axes, arm, color = panels[row["setting"]], row["momentum"], ARMS[row["momentum"]][1]
        axes.plot(RATES, curves[row["setting"]][arm], "--" if arm == OF_MEAN else "-", label=arm, color=color)
        axes.errorbar(row["rate"], row["error"], row["sd"], color=color, marker="o", ms=6, capsize=3)
    for setting, axes in panels.items():
        axes.set(xscale="log", xlabel="learning rate", title=setting, ylim=(2, 16))
        axes.spines[["top", "right"]].set_visible(False)
    panels[rows[0]["setting"]].set_ylabel("error, %: lines validation, dots test images")
    axes.legend(frameon=False, title="momentum", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=120, metadata={"Software": None})


def arguments(argv):
    add = (parser := argparse.ArgumentParser(description=__doc__.splitlines()[0])).add_argument
    add("--seeds", type=int, help="trainings of each kind (default 16)")
    add("--first-seed", type=int, default=100, help="the others follow (default 100)")
    add("--settings", nargs="+", choices=SETTINGS, metavar="SETTING", help=f"some of {', '.join(SETTINGS)}")
    add("--smoke", action="store_true", help="two seeds, two epochs, two arms, one setting; fails if they do not learn")
    add("--check", action="store_true", help="fail unless the claims hold")
    add("--out", type=Path, help="folder for the picture and the figures; without it nothing is written")
    args = parser.parse_args(argv)
    args.seeds = (2 if args.smoke else 16) if args.seeds is None else args.seeds
    args.settings = args.settings or ([DECAYING] if args.smoke else list(SETTINGS))
    if args.seeds < 1 or args.first_seed < len(TUNING_SEEDS) or (args.check and (args.seeds < 8 or args.smoke)):
        parser.error("--seeds must be 1 or more, --first-seed 6 or more; --check wants 8 seeds and no --smoke")
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder; {args.out} is a file")
    return args


def main(argv=None):
    args = arguments(argv)
    print(f"Keras {keras.__version__} on {keras.backend.backend()}")
    seeds, arms = range(args.first_seed, args.first_seed + args.seeds), ["0.9", ANNEALED] if args.smoke else ARMS
    rows, curves, runs = [], {}, {}
    for setting in args.settings:
        epochs = 2 if args.smoke else SETTINGS[setting][1]
        rates, curves[setting], found = {}, {}, {}
        for arm in arms:
            curves[setting][arm] = train(arm, setting, TUNING_SEEDS, RATES, epochs)[0].mean(1).tolist()
            rates[arm] = RATES[int(np.argmin(curves[setting][arm]))]
            found[arm] = train(arm, setting, seeds, [rates[arm]], epochs)[1][0]
        rows += compare(setting, rates, found)
        show(rows[-len(found) :], args.seeds)
        runs[setting] = {arm: test.tolist() for arm, test in found.items()}
    result = {"rows": rows, "runs": runs, "curves": curves, "rates": RATES, "keras": keras.__version__}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(curves, rows, args.out / "momentum_anneal.png")
        print(f"\nFigures and picture are in {args.out}")
    if args.smoke and max(row["error"] for row in rows) > 50:
        raise SystemExit("an arm did not learn")
    wrong = [f"{row['setting']}, {row['momentum']}" for row in rows if "margin" in row and not holds(**row)]
    if args.check and wrong:
        raise SystemExit(f"the claim does not hold beside {'; '.join(wrong)}")
    return result


if __name__ == "__main__":
    main()
