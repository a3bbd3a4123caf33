"""What a learning rate does to the loss: far too low, too low, good, too high, and one at which the loss explodes.

What: 1,200 images of handwritten digits (8 x 8, scikit-learn's); one hidden layer of 64; SGD with momentum 0.9, batches
of 32, a constant rate, 15 epochs, 5 seeds. The loss is that of training, in the mean of each epoch, the first included.

Claim (Stanford's CS231n, lecture 7): at a rate that is too low the loss falls slowly, as if along a line; at a high one
it falls faster at first, even faster than at the good one, and then stays higher; at one that is much too high it
explodes; at a good one it falls fast and far.
Expected on TensorFlow 2.21, Keras 3.15.1 (2026-11), training loss, mean of 5 seeds; 2.30 is that of a guess:

      rate  judged      epoch 1   epoch 2   epoch 5  epoch 15
    0.0003  too low        2.38      2.34      2.23      1.95
     0.003  too low        2.28      2.01       1.3     0.388
       0.1  good           1.13     0.268     0.103    0.0194
       0.4  too high      0.986     0.584     0.386     0.323
        10  too high       33.7      7.35      7.09      6.17

When it says little: a schedule that decays the rate makes good what is too high at a constant one, and a longer
training what is too low. `recipes/lr_search.py` searches the rate. Time: a minute on two cores.
"""

import argparse
import json
import math
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from sklearn.datasets import load_digits

import kopt

TRAIN, HIDDEN, EPOCHS = 1200, 64, 15
FAR, LOW, GOOD, HIGH, EXPLODES = RATES = 0.0003, 0.003, 0.1, 0.4, 10.0
GUESS = math.log(10)


def train(rate, seed, epochs):
    """The History of a training."""
    images, labels = load_digits(return_X_y=True)
    picked = np.random.default_rng(seed).permutation(len(labels))[:TRAIN]
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(HIDDEN, activation="relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(kopt.SGD(rate, momentum=0.9), loss=loss)
    x, y = (images[picked] / 16).astype("float32"), labels[picked]
    return model.fit(x, y, batch_size=32, epochs=epochs, verbose=0)


def table(picture) -> list[dict]:
    """Each rate, what is said of it, and its mean loss after some epochs."""
    rows = []
    for rate, judged in zip(picture.data["rates"], picture.data["judgements"], strict=True):
        mean = picture.data[f"{rate:g} mean"]
        after = {epoch: float(mean[epoch - 1]) for epoch in (1, 2, 5, len(mean)) if epoch <= len(mean)}
        rows.append({"rate": float(rate), "judged": str(judged), "after": {str(n): loss for n, loss in after.items()}})
    return rows


def show(rows):
    print(f"\n{'rate':>8}  {'judged':<8}" + "".join(f"{'epoch ' + n:>10}" for n in rows[0]["after"]))
    for row in rows:
        print(f"{row['rate']:8g}  {row['judged']:<8}" + "".join(f"{loss:10.3g}" for loss in row["after"].values()))


def lost(curves) -> list[str]:
    """What does not hold of the claim. `curves` has, for each rate, the losses (seed, epoch)."""
    of = {rate: np.array(losses, "float64") for rate, losses in curves.items()}
    good, high, low = of[GOOD], of[HIGH], np.stack([of[FAR], of[LOW]])
    holds = {
        "too low: the loss falls at every epoch": (np.diff(low) < 0).all(),
        "too low: in the end it is five times that at the good rate": (low[..., -1] > 5 * good[:, -1]).all(),
        "too high: after an epoch it is lower than at lower rates": (high[:, 0] < low[..., 0]).all(),
        "too high: and, in the mean, than at the good one": high[:, 0].mean() < good[:, 0].mean(),
        "too high: in the end it is higher than at the good one": (high[:, -1] > good[:, -1]).all(),
        "good: in the end it is a fiftieth of a guess's": (good[:, -1] < GUESS / 50).all(),
        "explodes: it is never as low as a guess's, or not finite": not (of[EXPLODES] <= GUESS).any(),
    }
    return [claim for claim, is_so in holds.items() if not is_so]


def arguments(argv):
    add = (parser := argparse.ArgumentParser(description=__doc__.splitlines()[0])).add_argument
    add("--seeds", type=int, help="trainings at each rate (default 5)")
    add("--first-seed", type=int, default=100, help="the others follow (default 100)")
    add("--smoke", action="store_true", help="one seed, two epochs, three rates; fails if the good one does not learn")
    add("--check", action="store_true", help="fail unless the claims hold")
    add("--out", type=Path, help="folder for the picture and the figures; without it nothing is written")
    add("--quiet", action="store_true", help="print nothing but where the files are")
    args = parser.parse_args(argv)
    args.seeds = (1 if args.smoke else 5) if args.seeds is None else args.seeds
    if args.seeds < 1 or args.first_seed < 0 or (args.check and (args.seeds < 3 or args.smoke)):
        parser.error("--seeds must be 1 or more, --first-seed 0 or more; --check wants 3 seeds and no --smoke")
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder; {args.out} is a file")
    return args


def main(argv=None):
    args = arguments(argv)
    seeds, epochs = range(args.first_seed, args.first_seed + args.seeds), 2 if args.smoke else EPOCHS
    rates = (FAR, GOOD, EXPLODES) if args.smoke else RATES
    histories = {rate: [train(rate, seed, epochs) for seed in seeds] for rate in rates}
    picture = kopt.plot.rates(histories)
    rows = table(picture)
    if not args.quiet:
        print(f"Keras {keras.__version__} on {keras.backend.backend()}, {args.seeds} seeds")
        show(rows)
    curves = {rate: [history.history["loss"] for history in of_rate] for rate, of_rate in histories.items()}
    plain = {f"{rate:g}": [[n if math.isfinite(n) else None for n in one] for one in of] for rate, of in curves.items()}
    result = {"rows": rows, "curves": plain, "keras": keras.__version__}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        picture.axes[0].set_title("one network, trained at five learning rates")
        picture.save(args.out / "rates.png")
        print(f"\nFigures and picture are in {args.out}")
    if args.smoke and not np.diff(curves[GOOD]).max() < 0:
        raise SystemExit("the good rate did not learn")
    if args.check and (wrong := lost(curves)):
        raise SystemExit(f"the claim does not hold: {'; '.join(wrong)}")
    return result


if __name__ == "__main__":
    main()
