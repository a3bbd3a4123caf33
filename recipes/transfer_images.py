"""Fine-tuning a network of keras.applications on few images: your own, or some of CIFAR-10; five plans compared.

What: MobileNetV2 (alpha 0.35, 96 x 96) with the weights of ImageNet and a new head; 10 labeled images of each class, up
to 500 others to test; Adam in batches of 16 for 150 steps, the same for each plan, on 3 draws of the labels. Beside the
plans: training from scratch, and logistic regression on pixels and on the features of the body. Your images are a
folder with a folder for each class: `--data DIR`. Weights and CIFAR-10 are fetched by Keras, once.

Where weights or images cannot be had, or with `--offline`, which never touches the network, others stand in: a small
network trained on 1,000 digits (8 x 8, scikit-learn's) as to which they are, and for images 797 other digits as to
whether they have a closed loop. That shows the plans; it says nothing of weights of ImageNet, and the recipe says so.

Claim (Yosinski et al., 2014, https://arxiv.org/abs/1411.1792): a trained body beats new weights in every draw. With
`--check` it must, with pretrained weights; without, it only looks whether all losses are finite, and says so.
Expected `--offline` on TensorFlow 2.21, Keras 3.15.1 (2026-11), percent right of 500 other digits, 10 labels a class:

    scratch    probe        fine_tune    layer_decay   one rate     logistic regression on pixels   on features
    76.2 ± 3   86.7 ± 5     87.1 ± 2     85.6 ± 2      81.7 ± 5     74.1 ± 3                        87.7 ± 2

With MobileNetV2's weights it was not measured: where this was written they could not be had.
When it does not help: the order of the plans but scratch is within the noise of three draws, and logistic regression on
the features, which trains nothing, is as good. On images that are unlike photographs, or with thousands of labels,
scratch may be as good. Time: a minute or two offline; with MobileNetV2, by a few of its steps, ten to twenty.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import kopt

SIZE, SMALL, BATCH, TESTED, BOTTOM = 96, 32, 16, 500, 0.03  # 0.03 = 0.75 ** 12, BEiT's lowest block
PIXELS, FEATURES, SCRATCH, FINE_TUNE = "logistic regression, pixels", "the same, features", "scratch", "fine_tune"
PLANS = {  # plan -> what it is
    SCRATCH: "the body's first weights, all at one rate",
    "probe": "fine_tune(body_multiplier=0): the head alone",
    FINE_TUNE: "fine_tune(body_multiplier=0.1): the head alone for a third, then the body, too",
    "layer_decay": "all from the start, multipliers falling from 1 to 0.03",
    "one rate": "all from the start at one rate",
}


class Body:
    """MobileNetV2 with the weights of ImageNet; or, if these cannot be had, a small network trained on digits."""

    def __init__(self, offline, epochs):
        self.pretrained, self.size, self.rate = not offline, SIZE, 1e-3
        if self.pretrained:
            try:
                self.weights = self.made("imagenet").get_weights()
            except Exception as error:  # of whatever kind a download has
                print(f"The weights of MobileNetV2 cannot be had: {first_line(error)}")
                self.pretrained = False
        if not self.pretrained:
            print("NO PRETRAINED WEIGHTS: a small network trained on digits stands in; figures tell nothing of them.")
            self.size, self.rate = SMALL, 5e-3
            (x, y), _ = digits()
            body, model = self.model(10, fresh=True)
            model.compile(kopt.Adam(self.rate), loss="sparse_categorical_crossentropy")
            model.fit(x, y, batch_size=32, epochs=epochs, verbose=0)
            kopt.update_bn(model, x)
            self.weights = body.get_weights()

    def made(self, weights=None):
        shape = (self.size, self.size, 3)
        if self.pretrained:
            more = {"input_shape": shape, "alpha": 0.35, "include_top": False, "pooling": "avg"}
            return keras.applications.MobileNetV2(weights=weights, **more)
        parts = [keras.Input(shape)]
        for filters in (8, 16, 32):
            parts += [layers.Conv2D(filters, 3, 2, "same"), layers.BatchNormalization(), layers.ReLU()]
        return keras.Sequential([*parts, layers.GlobalAveragePooling2D()], name="body")

    def model(self, classes, fresh=False):
        """The body, and it with a new head; the images are scaled as MobileNetV2 has learned them, to [-1, 1]."""
        body = self.made()
        if not fresh:
            body.set_weights(self.weights)
        images = keras.Input((self.size, self.size, 3))
        features = body(layers.Rescaling(1 / 127.5, -1)(images))
        return body, keras.Model(images, layers.Dense(classes, "softmax", name="head")(features))


def first_line(error) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]


def digits():
    """1,000 digits with what they are, and 797 others with whether they have a closed loop (0, 6, 8, 9); 0 to 255."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = np.repeat((255 / 16 * images[order]).reshape(-1, 8, 8, 1), 3, -1).astype("float32")
    images, labels = images.repeat(SMALL // 8, 1).repeat(SMALL // 8, 2), labels[order]
    return (images[:1000], labels[:1000]), (images[1000:], np.isin(labels[1000:], (0, 6, 8, 9)).astype("int64"))


def photographs(folder, offline, size):
    """Images (0 to 255), labels and where they come from."""
    if folder:
        more = {"image_size": (size, size), "batch_size": None, "shuffle": False, "verbose": False}
        data = keras.utils.image_dataset_from_directory(folder, **more)
        images, labels = zip(*data.as_numpy_iterator(), strict=True)
        return np.stack(images), np.array(labels), f"{folder}: {', '.join(data.class_names)}"
    if not offline:
        try:
            (x, y), _ = keras.datasets.cifar10.load_data()
            return x, y.ravel().astype("int64"), "CIFAR-10"
        except Exception as error:
            print(f"CIFAR-10 cannot be had: {first_line(error)}")
    print("NO PHOTOGRAPHS: digits, with or without a closed loop, stand in for them.")
    return *digits()[1], "scikit-learn's digits: closed loop or not"


def split(images, labels, per_class, seed, size):
    """As many images of each class to train, and up to 500 others to test."""
    order = np.random.default_rng([seed, 1]).permutation(len(labels))
    chosen = np.concatenate([order[labels[order] == label][:per_class] for label in np.unique(labels)])
    rest = order[~np.isin(order, chosen)][:TESTED]
    resized = layers.Resizing(size, size)
    scaled = [keras.ops.convert_to_numpy(resized(images[part].astype("float32"))) for part in (chosen, rest)]
    return (scaled[0], labels[chosen]), (scaled[1], labels[rest])


def train(plan, body, data, seed, steps):
    """A network that was trained by a plan, its last loss and the seconds it took."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    x, y = data
    epochs = max(2, round(steps / -(-len(x) // BATCH)))
    base, model = body.model(int(y.max()) + 1, fresh=plan == SCRATCH)
    passes, began = {"batch_size": BATCH, "verbose": 0}, time.perf_counter()
    levels = len(set(kopt.layer_decay(model, 0.9).values()))
    decay = kopt.layer_decay(model, BOTTOM ** (1 / (levels - 1))) if plan == "layer_decay" else None
    model.compile(kopt.Adam(body.rate, multipliers=decay), loss="sparse_categorical_crossentropy")
    if plan in ("probe", FINE_TUNE):
        head, multiplier = max(1, epochs // 3), 0.1 if plan == FINE_TUNE else 0.0
        stages = {"head_epochs": head, "epochs": epochs - head, "body_multiplier": multiplier}
        history = kopt.fine_tune(model, base, x, y, **stages, engine="trainable", **passes)
    else:
        history = model.fit(x, y, epochs=epochs, **passes)
        kopt.update_bn(model, x)  # MobileNetV2's statistics would take thousands of steps to arrive (momentum 0.999)
    return model, history.history["loss"][-1], time.perf_counter() - began


def right(model, data) -> float:
    """Percent of the images that it is right about."""
    return 100 * float((model.predict(data[0], batch_size=100, verbose=0).argmax(-1) == data[1]).mean())


def beside(body, data, test) -> dict:
    """What logistic regression is right about: on the pixels, at a fourth of the size, and on the body's features."""
    base, _ = body.model(2)
    features = lambda x: base.predict(x / 127.5 - 1, batch_size=100, verbose=0)  # noqa: E731
    pixels = lambda x: x[:, 2::4, 2::4].reshape(len(x), -1)  # noqa: E731
    found = {}
    for name, seen in ((PIXELS, pixels), (FEATURES, features)):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(seen(data[0]), data[1])
        found[name] = 100 * float(model.score(seen(test[0]), test[1]))
    return found


def show(rows, seeds):
    print(f"\n{'plan':29} {'accuracy':>10}            better than scratch by        in  seconds")
    for row in rows:
        line = f"{row['plan']:29} {row['accuracy']:10.2f} ± {row['sd']:5.2f} %"
        if "margin" in row:
            line += f" {row['margin']:21.2f} points {row['wins']:3} of {seeds}"
        print(f"{line:76} {row['seconds']:6.1f}" if "seconds" in row else line)


def draw(rows, seeds, title, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes, rows = figure.subplots(), rows[::-1]
    for at, row in enumerate(rows):
        axes.plot(row["runs"], [at] * len(row["runs"]), "o", color="#999999", ms=4)
        axes.plot(row["accuracy"], at, "|", color="#0072B2" if row["plan"] in PLANS else "black", ms=18, mew=3)
    axes.set_yticks(range(len(rows)), [row["plan"] for row in rows])
    axes.set_xlabel(f"accuracy on other images, %: {seeds} draws of the labels, and their mean")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120, metadata={"Software": None})


def arguments(argv):
    add = (parser := argparse.ArgumentParser(description=__doc__.splitlines()[0])).add_argument
    add("--data", type=Path, help="folder with a folder of images for each class (default CIFAR-10)")
    add("--offline", action="store_true", help="never touch the network: a small network and digits stand in")
    add("--per-class", type=int, help="labeled images of each class (default 10)")
    add("--steps", type=int, help="of each training, in whole epochs (default 150)")
    add("--seeds", type=int, help="draws of the labels (default 3)")
    add("--first-seed", type=int, default=100, help="the others follow (default 100)")
    add("--plans", nargs="+", choices=PLANS, metavar="PLAN", help=f"some of {', '.join(PLANS)}; and scratch")
    add("--smoke", action="store_true", help="offline, one draw, ten steps, two plans")
    add("--check", action="store_true", help="fail unless fine_tune beats scratch (offline: unless losses are finite)")
    add("--out", type=Path, help="folder for the picture and the figures; without it nothing is written")
    args = parser.parse_args(argv)
    for name, smoke, default in (("per_class", 10, 10), ("steps", 10, 150), ("seeds", 1, 3)):
        if getattr(args, name) is None:
            setattr(args, name, smoke if args.smoke else default)
    chosen = args.plans or ([FINE_TUNE] if args.smoke else PLANS)
    args.offline, args.plans = args.offline or args.smoke, [plan for plan in PLANS if plan in (SCRATCH, *chosen)]
    if min(args.per_class, args.seeds) < 1 or args.steps < 2 or args.first_seed < 0:
        parser.error("--per-class and --seeds must be 1 or more, --steps 2 or more, --first-seed 0 or more")
    if args.check and (args.smoke or FINE_TUNE not in args.plans):
        parser.error(f"--check wants {FINE_TUNE} among --plans, and no --smoke")
    if args.data and (not args.data.is_dir() or sum(one.is_dir() for one in args.data.iterdir()) < 2):
        parser.error(f"--data must be a folder with a folder of images for each of two classes or more: {args.data}")
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder; {args.out} is a file")
    return args


def main(argv=None):
    args = arguments(argv)
    print(f"Keras {keras.__version__} on {keras.backend.backend()}")
    body = Body(args.offline, epochs=min(20, max(5, args.steps // 5)))
    images, labels, source = photographs(args.data, args.offline, body.size)
    fewest = np.bincount(labels).min()
    if fewest < args.per_class + 1:
        raise SystemExit(f"--per-class must be less than the {fewest} images of the smallest class")
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs, losses, seconds = {}, [], {}
    print(f"{source}; {args.per_class} labels a class, {args.steps} steps, images of {body.size} x {body.size}\n")
    base, model = body.model(len(np.unique(labels)))
    kopt.describe(model, {base: 0.1})
    for seed in seeds:
        data, test = split(images, labels, args.per_class, seed, body.size)
        for name, accuracy in beside(body, data, test).items():
            runs.setdefault(name, []).append(accuracy)
        for plan in args.plans:
            model, loss, took = train(plan, body, data, seed, args.steps)
            losses.append(float(loss))
            runs.setdefault(plan, []).append(right(model, test))
            seconds.setdefault(plan, []).append(took)
    rows = []
    for plan, values in runs.items():
        row = {"plan": plan, "accuracy": float(np.mean(values)), "runs": values}
        row["sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        if plan in seconds:
            row["seconds"] = float(np.mean(seconds[plan]))
        if plan != SCRATCH:
            better = np.subtract(values, runs[SCRATCH])
            row |= {"margin": float(better.mean()), "wins": int((better > 0).sum())}
        rows.append(row)
    show(rows, args.seeds)
    result = {"rows": rows, "source": source, "pretrained": body.pretrained, "keras": keras.__version__}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(rows, args.seeds, source, args.out / "transfer_images.png")
        print(f"\nFigures and picture are in {args.out}")
    if (args.smoke or args.check) and not np.isfinite(losses).all():
        raise SystemExit("a loss is not finite")
    if args.check and not body.pretrained:
        print("\nWithout pretrained weights the claim was not checked, only that all losses are finite.")
    elif args.check and next(row for row in rows if row["plan"] == FINE_TUNE)["wins"] < args.seeds:
        raise SystemExit("the claim does not hold: fine_tune is not better than scratch in every draw")
    return result


if __name__ == "__main__":
    main()
