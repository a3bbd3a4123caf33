"""Batches of 8 to 512 images, at equal epochs and at equal updates, and two rules of scaling the rate with the batch.

What: 1,797 images of handwritten digits (8 x 8, scikit-learn's), 1,024 to train, 300 to validate, 473 to test; one
hidden layer of 32; SGD with momentum 0.9, a rate that warms up in the first tenth and decays along a cosine. Each size
gets 12 epochs, or 192 updates. The rate of size 8, and of each in the arm "tuned", has the least validation error of
nine (1/128 to 2), on 6 seeds used for nothing else. Seeds 100 and up are tested; each has its own split and weights.

Claims: k times the batch, k times the rate (Goyal et al., 2017, https://arxiv.org/abs/1706.02677); or the square root
of k (Krizhevsky, 2014, https://arxiv.org/abs/1404.5997).
Expected on TensorFlow 2.21, Keras 3.15.1 (2026-11), percent of errors on the test images, 12 seeds:

    12 epochs      8       16 images           32           64          128          256          512
    constant               3.07 ± .8    3.54 ± .8    4.97 ± 1.2   7.21 ± 1.4   12.7 ± 2.0   38.7 ± 8.4
    square root            2.87 ± .9    3.14 ± .7    3.51 ± .8    4.21 ± .9    6.25 ± 1.1   8.70 ± 2.0
    linear                 2.78 ± .6    2.77 ± .7    3.33 ± .7    4.72 ± 1.0   55.6 ± 20    87.8 ± 3.0
    tuned      2.82 ± .7   2.78 ± .6    2.77 ± .7    3.33 ± .7    3.79 ± .9    6.50 ± 1.5   8.70 ± 2.0

Up to 64 the linear rule is what tuning finds; at 128 it costs nearly two points, and at 256 it explodes.
When it does not help: no rule replaces updates. 512 images in 12 epochs are 24 updates, too few at any rate. At equal
updates larger batches are better, with the square root at every size. Time: two minutes on two cores.
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
from kopt.callbacks import CosineDecay, WarmUp

TRAIN, HIDDEN, EPOCHS, UPDATES = 1024, 32, 12, 192
SIZES, RATES, TUNING_SEEDS = [8, 16, 32, 64, 128, 256, 512], [2.0**power for power in range(-7, 2)], range(6)
POWERS = {"constant": 0.0, "square root": 0.5, "linear": 1.0}  # of k times the batch
COLORS = {"constant": "#999999", "square root": "#0072B2", "linear": "#D55E00", "tuned": "#009E73"}
BUDGETS = {"equal epochs": lambda size: EPOCHS * TRAIN // size, "equal updates": lambda size: UPDATES}
CLAIMS = [  # budget, size and rule of what is better, with p < 0.05, and of what is worse
    ("equal epochs", 64, "linear", 64, "constant"),
    *((budget, size, "square root", size, "linear") for budget in BUDGETS for size in (256, 512)),
    *(("equal updates", size, "square root", 8, "square root") for size in (32, 128, 512)),
    ("equal epochs", 8, "tuned", 512, "tuned"),
]


def digits(seeds):
    """Images (row, seed, pixel) and labels (row, seed): to train, to validate, to test."""
    images, labels = load_digits(return_X_y=True)
    order = np.stack([np.random.default_rng([seed, 1]).permutation(len(labels)) for seed in seeds], 1)
    return [(images[part].astype("uint8"), labels[part]) for part in np.split(order, [TRAIN, TRAIN + 300])]


def network(seeds, rates):
    """A network for each rate and seed, side by side. For SGD, a factor on a loss is a factor on the rate."""
    keras.utils.clear_session()
    shape, more = (len(rates), len(seeds)), {"bias_axes": "rso", "kernel_initializer": "zeros"}
    hidden = keras.layers.EinsumDense("bsi,rsio->brso", (*shape, HIDDEN), activation="relu", **more)
    last = keras.layers.EinsumDense("brsi,rsio->brso", (*shape, 10), **more)
    images, scaled = keras.Input((len(seeds), 64), dtype="uint8"), keras.layers.Rescaling(1 / 16)
    model, draws = keras.Sequential([images, scaled, hidden, last]), [np.random.default_rng(seed) for seed in seeds]
    for kernel in (hidden.kernel, last.kernel):
        first = np.stack([draw.normal(0, (2 / kernel.shape[2]) ** 0.5, kernel.shape[2:]) for draw in draws])
        kernel.assign(np.broadcast_to(first, kernel.shape))

    def loss(y, logits):
        y = ops.broadcast_to(ops.expand_dims(y, 1), ops.shape(logits)[:-1])
        losses = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
        return ops.sum(losses * ops.reshape(ops.convert_to_tensor(rates, losses.dtype), (-1, 1)), (1, 2))

    model.compile(kopt.SGD(1.0, momentum=0.9), loss=loss)
    return model


def errors(model, data):
    """Percent of the images, (rate, seed); where the weights exploded, all."""
    logits = ops.convert_to_numpy(model(data[0]))
    right = (logits.argmax(-1) == data[1][:, None]) & np.isfinite(logits).all(-1)
    return 100 * (1 - right.mean(0))


def train(size, updates, seeds, rates):
    """The validation and the test error of each rate and seed."""
    (x, y), *others = digits(seeds)
    model, passes = network(seeds, rates), -(-updates * size // TRAIN)
    order = np.concatenate([np.random.default_rng(number).permutation(TRAIN) for number in range(passes)])
    order, callbacks = order[: updates * size], [WarmUp(steps=-(-updates // 10)), CosineDecay()]
    model.fit(x[order], y[order], batch_size=size, shuffle=False, callbacks=callbacks, verbose=0)
    return [errors(model, data) for data in others]


def sweep(budget, sizes, seeds, shorter=1):
    """A row for each size and rule, with the rate and the test error of each seed."""
    rows, first = [], None
    for size in sizes:
        updates = max(1, BUDGETS[budget](size) // shorter)
        tuned = RATES[int(train(size, updates, TUNING_SEEDS, RATES)[0].mean(1).argmin())]
        first = first or tuned
        rates = [first * (size / sizes[0]) ** power for power in POWERS.values()] + [tuned]
        for rule, rate, test in zip(COLORS, rates, train(size, updates, seeds, rates)[1], strict=True):
            row = {"budget": budget, "size": size, "updates": updates, "rule": rule, "rate": rate, "error": test.mean()}
            rows.append(row | {"sd": test.std(ddof=1) if len(test) > 1 else 0.0, "errors": test.tolist()})
    return rows


def show(rows) -> dict:
    """Print a table. By rule: up to which size the error is less than a point above that of the smallest."""
    print(f"\n{rows[0]['budget']:13} updates" + "".join(f"{rule:>14} " for rule in COLORS) + " test error, %")
    for row in rows:
        lead = f"{row['size']:6} images{row['updates']:8}" if row["rule"] == "constant" else ""
        print(f"{lead}{row['error']:8.2f} ± {row['sd']:4.1f}", end="\n" if row["rule"] == "tuned" else "")
    far = [row for row in rows if row["error"] >= rows[0]["error"] + 1]
    ends = {rule: min([row["size"] for row in far if row["rule"] == rule], default=np.inf) for rule in COLORS}
    reached = {rule: max(row["size"] for row in rows if row["size"] < end) for rule, end in ends.items()}
    print("not a point worse up to", ", ".join(f"{size} ({rule})" for rule, size in reached.items()), flush=True)
    return reached


def compare(rows) -> list[dict]:
    """What is claimed, seed by seed."""
    of, found = {(row["budget"], row["size"], row["rule"]): np.array(row["errors"]) for row in rows}, []
    for budget, *one, size, rule in CLAIMS:
        if (better := (budget, *one)) in of and (worse := (budget, size, rule)) in of:
            margin = of[worse] - of[better]
            p = float(wilcoxon(margin).pvalue) if margin.any() else 1.0
            text = "{}: {} images, {}, better than {} images, {}".format(*better, *worse[1:])
            found.append({"claim": text, "margin": margin.mean(), "wins": int((margin > 0).sum()), "p": p})
    return found


def draw(rows, file):
    from matplotlib.figure import Figure

    panels = dict.fromkeys(row["budget"] for row in rows)
    figure = Figure(figsize=(1.4 + 4.4 * len(panels), 4.2), layout="constrained")
    for budget, axes in zip(panels, figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], strict=True):
        for at, (rule, color) in enumerate(COLORS.items()):
            of = [row for row in rows if (row["budget"], row["rule"]) == (budget, rule)]
            x, y, sd = np.array([(row["size"], row["error"], row["sd"]) for row in of]).T
            line = {"color": color, "fmt": "o--" if rule == "tuned" else "o-", "ms": 4, "capsize": 2}
            axes.errorbar(x * 1.04 ** (at - 1.5), y, sd, label=rule, **line)
        axes.set(xscale="log", yscale="log", xlabel="images in a batch", title=budget, ylim=(2, 100))
        axes.set_xticks(x, [f"{size:.0f}" for size in x])
        axes.set_yticks(ticks := [2, 3, 5, 10, 20, 50, 100], map(str, ticks))
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("test error, %")
    axes.legend(frameon=False, title="rate", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=120, metadata={"Software": None})


def arguments(argv):
    add = (parser := argparse.ArgumentParser(description=__doc__.splitlines()[0])).add_argument
    add("--seeds", type=int, help="trainings of each kind (default 12)")
    add("--first-seed", type=int, default=100, help="the others follow (default 100)")
    add("--budgets", nargs="+", choices=BUDGETS, metavar="BUDGET", help=f"some of {', '.join(BUDGETS)}")
    add("--smoke", action="store_true", help="two seeds, two sizes, two epochs; fails if the smaller does not learn")
    add("--check", action="store_true", help="fail unless the claims hold")
    add("--out", type=Path, help="folder for the picture and the figures; without it nothing is written")
    args = parser.parse_args(argv)
    args.seeds = (2 if args.smoke else 12) if args.seeds is None else args.seeds
    args.budgets = args.budgets or list(BUDGETS)[: 1 if args.smoke else None]
    if args.seeds < 1 or args.first_seed < len(TUNING_SEEDS) or (args.check and (args.seeds < 8 or args.smoke)):
        parser.error("--seeds must be 1 or more, --first-seed 6 or more; --check wants 8 seeds and no --smoke")
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder; {args.out} is a file")
    return args


def main(argv=None):
    args, rows, reached = arguments(argv), [], {}
    print(f"Keras {keras.__version__} on {keras.backend.backend()}")
    seeds, sizes = range(args.first_seed, args.first_seed + args.seeds), [32, 512] if args.smoke else SIZES
    for budget in args.budgets:
        found = sweep(budget, sizes, seeds, shorter=6 if args.smoke else 1)
        rows, reached[budget] = rows + found, show(found)
    result = {"rows": rows, "reach": reached, "claims": compare(rows), "keras": keras.__version__}
    for claim in result["claims"]:
        print("{claim}: by {margin:.2f} points, in {wins} of {}, p = {p:.1g}".format(args.seeds, **claim))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(rows, args.out / "batch_size.png")
        print(f"\nFigures and picture are in {args.out}")
    if args.smoke and rows[0]["error"] > 50:
        raise SystemExit("the smaller batch did not learn")
    wrong = [claim["claim"] for claim in result["claims"] if claim["p"] >= 0.05 or claim["margin"] <= 0]
    wrong += [f"a linear rate up to {of['linear']}" for of in [reached.get("equal epochs")] if of and of["linear"] < 64]
    if args.check and wrong:
        raise SystemExit(f"the claim does not hold: {'; '.join(wrong)}")
    return result


if __name__ == "__main__":
    main()
