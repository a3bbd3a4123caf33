"""Regularizers on and off, with ten labels a class: what each is worth beside nothing, and what mc_predict sees.

What: 1,797 images of handwritten digits (8 x 8, scikit-learn's), 100 labeled, all others to test; a network of eight
convolutions with residuals and two dense layers; Adam in batches of 25 for 240 steps, a rate of 0.002 that decays along
a cosine. One thing is added at a time. Its strength is the best of three (two for pooling) on seeds 0 to 5, which are
used for nothing else (`--tune` prints it), by errors on test images. Seeds 100 and up are tested; each has its own
labels, first weights and order, the same for each arm. Beside them, what is no network.

Expected on TensorFlow 2.21, Keras 3.15.1 (2026-11), percent of errors, 16 seeds, and by how much that is better than
none, with the standard error; the p-values are of single comparisons, of which there are nine:

    none                 11.06 ± 1.1                         DropBlock2D             10.07 ± 1.5   0.99 ± .33  p .02
    weight decay         10.47 ± 1.1    0.59 ± .18  p .01    FractionalMaxPooling2D  10.10 ± 1.6   0.96 ± .56  p .1
    Dropout              10.23 ± 1.3    0.83 ± .24  p .008   DropConnectConv2D       10.95 ± 1.1   0.11 ± .24  p .5
    DropConnectDense     10.06 ± 1.0    1.00 ± .32  p .008   DropPath                11.68 ± 1.5  -0.62 ± .27  p .08
    logistic regression   9.91 ± 1.2    1.15 ± .37  p .02    SVM                      7.35 ± 1.1   3.71 ± .33  p 3e-5

Claim (Ghiasi et al., 2018, https://arxiv.org/abs/1810.12890): DropBlock2D, which was the best on the tuning seeds, is
better than none; and wrong answers have more entropy than right ones.
mc_predict, 20 passes of the networks with Dropout: the entropy of wrong answers is 0.88, of right ones 0.21. That tells
them apart (AUROC 0.911), and no better than the entropy of one plain prediction (0.916); the mean of the passes is
wrong about 10.3 %, one prediction about 10.2 %.
When it does not help: digits are small. DropPath is for networks with many more blocks, DropBlock2D for larger maps; a
support vector machine is better than all of this. Where labels are few, more data, or weights that were trained before,
are worth more. Time: five minutes on one core.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers
from scipy.special import softmax
from scipy.stats import entropy, wilcoxon
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC

import kopt
from kopt.layers import DropBlock2D, DropConnectConv2D, DropConnectDense, DropPath, FractionalMaxPooling2D

PER_CLASS, BATCH, STEPS, RATE, TUNING_SEEDS = 10, 25, 240, 2e-3, range(6)
NONE = "none"
ARMS = {  # arm -> the strengths that were compared on the tuning seeds, the best of them, what it is
    NONE: ([0], 0, "the network alone"),
    "weight decay": ([0.01, 0.1, 1.0], 1.0, "kopt.AdamW(weight_decay={})"),
    "Dropout": ([0.2, 0.35, 0.5], 0.2, "keras.layers.Dropout({}), around the dense layer"),
    "DropPath": ([0.1, 0.2, 0.4], 0.4, "kopt.layers.DropPath, rates growing to {}"),
    "DropConnectDense": ([0.2, 0.35, 0.5], 0.5, "kopt.layers.DropConnectDense(64, {})"),
    "DropConnectConv2D": ([0.02, 0.05, 0.1], 0.05, "kopt.layers.DropConnectConv2D(..., {})"),
    "DropBlock2D": ([0.1, 0.2, 0.3], 0.1, "kopt.layers.DropBlock2D({}, block_size=2), after each stage"),
    "FractionalMaxPooling2D": ([1.44, 2], 1.44, "kopt.layers.FractionalMaxPooling2D({}, overlapping=True)"),
}
WITHOUT = {"SVM": SVC(C=10, gamma="scale"), "logistic regression": LogisticRegression(C=1.0, max_iter=1000)}
HELPS, WATCHED = "DropBlock2D", "Dropout"  # what is claimed to help; whose passes mc_predict looks at


def digits(seed):
    """Ten images of each class to train, all others to test."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    order = np.random.default_rng([seed, 1]).permutation(len(labels))
    chosen = np.concatenate([order[labels[order] == label][:PER_CLASS] for label in range(10)])
    rest = np.setdiff1d(order, chosen)
    return (images[chosen], labels[chosen]), (images[rest], labels[rest])


def network(arm, strength):
    """Two stages of two residual blocks, and a dense layer; `arm` is the one thing that differs."""

    def conv(filters, size=3):
        if arm == "DropConnectConv2D":
            return DropConnectConv2D(filters, size, strength, padding="same")
        return layers.Conv2D(filters, size, padding="same")

    def block(x, rate):
        y = conv(x.shape[-1])(layers.ReLU()(conv(x.shape[-1])(x)))
        return layers.ReLU()(x + (DropPath(rate)(y) if rate else y))

    pool = FractionalMaxPooling2D(strength, True) if arm == "FractionalMaxPooling2D" else layers.MaxPooling2D()
    rates = kopt.layers.drop_path_rates([2, 2], strength if arm == "DropPath" else 0.0)
    x = inputs = keras.Input((8, 8, 1))
    for filters, of_stage in zip((16, 32), rates, strict=True):
        if filters > 16:
            x = pool(x)
        x = layers.ReLU()(conv(filters)(x))
        for rate in of_stage:
            x = block(x, rate)
        x = DropBlock2D(strength, 2)(x) if arm == "DropBlock2D" else x
    x = layers.Flatten()(x)
    x = layers.Dropout(strength)(x) if arm == "Dropout" else x
    x = DropConnectDense(64, strength)(x) if arm == "DropConnectDense" else layers.Dense(64)(x)
    x = layers.ReLU()(x)
    x = layers.Dropout(strength)(x) if arm == "Dropout" else x
    model = keras.Model(inputs, layers.Dense(10)(x))
    schedule = keras.optimizers.schedules.CosineDecay(RATE, STEPS)
    optimizer = kopt.AdamW(schedule, weight_decay=strength) if arm == "weight decay" else kopt.Adam(schedule)
    model.compile(optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    optimizer.build(model.trainable_variables)
    return model, [keras.ops.convert_to_numpy(variable).copy() for variable in optimizer.variables]


def begin(model, fresh, seed):
    """The weights, draws and optimizer of a seed: nothing is compiled anew, and the weights are those of every arm."""
    for variable, value in zip(model.optimizer.variables, fresh, strict=True):
        variable.assign(value)
    draw = np.random.default_rng([seed, 2])
    trained = {id(variable) for variable in model.trainable_variables}
    for variable in model.trainable_variables:
        scale = (2 / np.prod(variable.shape[:-1])) ** 0.5 if len(variable.shape) > 1 else 0.0
        variable.assign(draw.normal(0, 1, variable.shape) * scale)
    for number, variable in enumerate(v for v in model.variables if id(v) not in trained):
        variable.assign(np.array([1000 * seed + number, 0]).astype(variable.dtype))  # the state of a random layer


def train(arm, strength, seeds, steps, watched=False):
    """The test error of each seed, and what `mc_predict` says of each, if watched."""
    keras.utils.clear_session()
    (model, fresh), errors, seen = network(arm, strength), [], []
    for seed in seeds:
        (x, y), (x_test, y_test) = digits(seed)
        begin(model, fresh, seed)
        draw = np.random.default_rng([seed, 3])
        order = np.concatenate([draw.permutation(len(x)) for _ in range(-(-steps * BATCH // len(x)))])[: steps * BATCH]
        model.fit(x[order], y[order], batch_size=BATCH, shuffle=False, verbose=0)
        logits = model.predict(x_test, batch_size=600, verbose=0)
        errors.append(100 * float((logits.argmax(-1) != y_test).mean()))
        if watched:
            seen.append(watch(model, logits, x_test, y_test))
    return np.array(errors), seen


def watch(model, logits, x, y) -> dict:
    """Twenty passes beside one: errors, and how well the entropy tells the wrong answers from the right ones."""
    found = kopt.mc_predict(model, x, n=20, batch_size=600, seed=0)
    wrong_once, wrong = logits.argmax(-1) != y, found.mean.argmax(-1) != y
    return {
        "error, one pass": 100 * float(wrong_once.mean()),
        "error, mean of 20": 100 * float(wrong.mean()),
        "entropy where right": float(found.entropy[~wrong].mean()),
        "entropy where wrong": float(found.entropy[wrong].mean()),
        "AUROC, one pass": float(roc_auc_score(wrong_once, entropy(softmax(logits, 1), axis=1))),
        "AUROC, mean of 20": float(roc_auc_score(wrong, found.entropy)),
        "AUROC, mutual information": float(roc_auc_score(wrong, found.mutual_information)),
    }


def others(name, seeds):
    """The test error of what is no network."""
    errors = []
    for seed in seeds:
        (x, y), (x_test, y_test) = digits(seed)
        model = WITHOUT[name].fit(x.reshape(len(x), -1), y)
        errors.append(100 * float((model.predict(x_test.reshape(len(x_test), -1)) != y_test).mean()))
    return np.array(errors)


def compare(found) -> list[dict]:
    """Each arm beside none, seed by seed: better by how much, with the standard error of the mean."""
    rows = []
    for arm, errors in found.items():
        spread = (lambda values: values.std(ddof=1)) if len(errors) > 1 else lambda values: 0.0
        row = {"arm": arm, "strength": ARMS[arm][1] if arm in ARMS else "", "error": errors.mean()}
        row |= {"sd": spread(errors), "errors": errors.tolist()}
        if arm != NONE:
            better = found[NONE] - errors
            p = float(wilcoxon(better).pvalue) if len(errors) > 1 and better.any() else 1.0
            row |= {"margin": better.mean(), "se": spread(better) / len(errors) ** 0.5, "p": p}
            row["wins"] = int((better > 0).sum())
        rows.append(row)
    return rows


def show(row, seeds):
    line = f"{row['arm']:24} {row['strength']:>8} {row['error']:6.2f} ± {row['sd']:4.2f} %"
    if "margin" in row:
        line += f" {row['margin']:10.2f} ± {row['se']:4.2f} {row['wins']:5} of {seeds:2} {row['p']:8.1g}"
    print(line, flush=True)


def draw(rows, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.2 + 0.38 * len(rows)), layout="constrained")
    axes, beside = figure.subplots(), [row for row in rows if row["arm"] != NONE][::-1]
    for at, row in enumerate(beside):
        sure, color = row["p"] < 0.05, "#0072B2" if row["arm"] in ARMS else "#999999"
        line = {"color": color, "marker": "o", "mfc": color if sure else "white", "ms": 7, "capsize": 3}
        axes.errorbar(row["margin"], at, xerr=2 * row["se"], **line)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(beside)), [row["arm"] for row in beside])
    axes.set_xlabel(
        "better than no regularizer by, points of test error, ± 2 standard errors\nfilled: p < 0.05; gray: no network"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120, metadata={"Software": None})


def arguments(argv):
    add = (parser := argparse.ArgumentParser(description=__doc__.splitlines()[0])).add_argument
    add("--seeds", type=int, help="trainings of each kind (default 16)")
    add("--first-seed", type=int, default=100, help="the others follow (default 100)")
    add("--arms", nargs="+", choices=[arm for arm in ARMS if arm != NONE], metavar="ARM", help="beside none, some only")
    add("--smoke", action="store_true", help="two seeds, short trainings, one arm; fails if they do not learn")
    add("--check", action="store_true", help="fail unless the claims hold")
    add("--tune", action="store_true", help="compare the strengths on seeds 0 to 5, and do nothing else")
    add("--out", type=Path, help="folder for the picture and the figures; without it nothing is written")
    args = parser.parse_args(argv)
    args.seeds = (2 if args.smoke else 16) if args.seeds is None else args.seeds
    args.arms = [NONE, *(args.arms or ([WATCHED] if args.smoke else [arm for arm in ARMS if arm != NONE]))]
    if args.seeds < 1 or args.first_seed < len(TUNING_SEEDS):
        parser.error("--seeds must be 1 or more, --first-seed 6 or more")
    if args.check and (args.seeds < 8 or args.smoke or args.tune or not {HELPS, WATCHED} <= {*args.arms}):
        parser.error(f"--check wants 8 seeds, no --smoke, no --tune, and {HELPS} and {WATCHED} among --arms")
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder; {args.out} is a file")
    return args


def main(argv=None):
    args = arguments(argv)
    print(f"Keras {keras.__version__} on {keras.backend.backend()}")
    seeds, steps = range(args.first_seed, args.first_seed + args.seeds), 60 if args.smoke else STEPS
    if args.tune:
        return tune(args.arms)
    print(f"{10 * PER_CLASS} images to train, {1797 - 10 * PER_CLASS} to test, {steps} steps, {args.seeds} seeds\n")
    print(f"{'regularizer':24} {'strength':>8}     test error   better than none by       in        p")
    found, seen = {}, []
    for arm in [*args.arms, *WITHOUT]:
        if arm in ARMS:
            found[arm], looked = train(arm, ARMS[arm][1], seeds, steps, watched=arm == WATCHED)
            seen = looked or seen
        else:
            found[arm] = others(arm, seeds)
        rows = compare(found)
        show(rows[-1], args.seeds)
    means = {name: float(np.mean([one[name] for one in seen])) for name in (seen or [{}])[0]}
    if means:
        print(f"\nmc_predict of the networks with {WATCHED}, means over the seeds:")
        print("\n".join(f"  {name:26} {value:6.3f}" for name, value in means.items()))
    result = {"rows": rows, "mc_predict": seen, "keras": keras.__version__}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(rows, args.out / "regularizers.png")
        print(f"\nFigures and picture are in {args.out}")
    if args.smoke and max(row["error"] for row in rows) > 60:
        raise SystemExit("an arm did not learn")
    lost = [row for row in rows if row["arm"] == HELPS and not (row["margin"] > 0 and row["p"] < 0.05)]
    wrong = [f"{HELPS} is not better than {NONE}"] * len(lost)
    if any(one["entropy where wrong"] <= one["entropy where right"] for one in seen):
        wrong.append("wrong answers have no more entropy than right ones")
    if args.check and wrong:
        raise SystemExit(f"the claim does not hold: {'; '.join(wrong)}")
    return result


def tune(arms):
    """The mean test error of each strength on seeds that are used for nothing else."""
    found = {}
    for arm in arms:
        for strength in ARMS[arm][0]:
            found[f"{arm}, {strength}"] = train(arm, strength, TUNING_SEEDS, STEPS)[0].mean()
            print(f"{arm:24} {strength:>8} {found[f'{arm}, {strength}']:6.2f} %", flush=True)
    return found


if __name__ == "__main__":
    main()
