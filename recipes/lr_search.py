"""A learning rate in three steps: a range test, a search from coarse to fine, and a look at what the answer means.

What: 1,797 images of handwritten digits (8 x 8, scikit-learn's), 1,200 to train and 597 to validate; a network of one
hidden layer of 64; SGD with momentum, a constant rate, 15 epochs. The range test takes as long as three epochs, the
search as twelve trainings. Then the network is trained at a rate far too low, at the answer, and at rates too high.

Claim (Stanford's CS231n, lecture 7): search on a log scale, coarse first, then fine; and the shape of a loss curve
tells whether a rate is too low (still falling), good, or too high (stays high, or explodes).
When it says little: a schedule that decays the rate stands higher rates than a constant one has; search with the
schedule that you are going to train with (`kopt.tuner.optimizer`, or in `build`).

The script runs as it is over several processes: python -m kopt.tuner.launch --workers 2 recipes/lr_search.py --out out
Over several machines, start it on each with KERASTUNER_ORACLE_IP and KERASTUNER_ORACLE_PORT of the first and
KERASTUNER_TUNER_ID, "chief" there and another name on each of the others, and --out on a disk that they share.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import kopt
import kopt.tuner

TIMES = {"a hundredth": 0.01, "the answer": 1.0, "10 times": 10.0, "50 times": 50.0}
NEXT = """
Next: put your own model into `build` and your own data into `search`. Stop it whenever you like: started again with the
same --out it goes on. Then train for as long as you want at the rate it prints, and look again if you change the batch
size, the schedule or the rule."""


def digits():
    images, labels = load_digits(return_X_y=True)
    return train_test_split(
        (images / 16).astype("float32"), labels, train_size=1200, test_size=597, random_state=0, stratify=labels
    )


def network(learning_rate):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(kopt.SGD(learning_rate, momentum=0.9), loss=loss, metrics=["accuracy"])
    return model


def build(hp):
    return network(kopt.tuner.learning_rate(hp, rule="momentum"))


def curves(data, rate, epochs):
    """The training loss of each epoch, at the rate, far below it and above it."""
    x, _, y, _ = data
    found = {}
    for name, times in TIMES.items():
        keras.utils.set_random_seed(0)
        losses = network(rate * times).fit(x, y, batch_size=32, epochs=epochs, verbose=0).history["loss"]
        found[name] = [float(loss) if math.isfinite(loss) else None for loss in losses]
    return found


def draw(record, result, losses, file):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("The picture needs matplotlib: pip install 'kopt[recipes]'") from None
    figure = Figure(figsize=(9, 10), layout="constrained")
    first, second, third = figure.subplots(3, 1)
    kopt.plot.rate_range(record, ax=first)
    kopt.plot.search(result, ax=second)
    second.set_yscale("log")
    picture = kopt.plot.rates({TIMES[name] * result.learning_rate: loss for name, loss in losses.items()}, ax=third)
    first.set_title("the range test: 100 steps, no trace")
    second.set_title("the search: coarse, fine, confirmed")
    third.set_title("what the rate does to the training loss")
    picture.save(file)


def parsed(args):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, help="how long a training is in the end")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--out", type=Path, help="a directory for the trials, the report, the picture and the figures")
    parser.add_argument("--check", action="store_true", help="fail if the answer is not the best of the curves")
    parser.add_argument("--smoke", action="store_true", help="a quick look")
    parser.add_argument("--quiet", action="store_true", help="print the answer only")
    given = parser.parse_args(args)
    if given.epochs < 1:
        parser.error("--epochs must be 1 or more")
    if given.seed < 0:
        parser.error("--seed must be 0 or more")
    if given.out and given.out.exists() and not given.out.is_dir():
        parser.error(f"--out must be a directory: {given.out}")
    return given


def main(args=None):
    given, data = parsed(args), digits()
    x, x_val, y, y_val = data
    stages, epochs = ([(3, 1), (2, 1)], 1) if given.smoke else (None, given.epochs)
    with tempfile.TemporaryDirectory() as scratch:
        search = kopt.tuner.LearningRateSearch(
            build, "val_loss", stages=stages, confirm=2 if given.smoke else 3, seed=given.seed,
            directory=str(given.out or scratch), project_name="trials",
        )  # fmt: skip
        search.search(
            x, y, validation_data=(x_val, y_val), epochs=epochs, batch_size=32, verbose=0 if given.quiet else 1
        )
        result = search.result
    if os.environ.get("KERASTUNER_TUNER_ID", "chief") != "chief":
        return None  # a worker of several: the chief reports
    print(f"\n{result}")
    if result.learning_rate is None:
        raise SystemExit("no learning rate was found")
    losses = curves(data, result.learning_rate, 2 if given.smoke else given.epochs)
    print(f"\ntraining loss after {len(losses['the answer'])} epochs, one seed ({keras.backend.backend()}):")
    for name, values in losses.items():
        last = "diverged" if values[-1] is None else f"{values[-1]:.3g}"
        print(f"  {name:<12}{TIMES[name] * result.learning_rate:>9.2g}  {last}")
    figures = {"learning_rate": result.learning_rate, "interval": result.interval, "cliff": result.cliff,
               "trials": result.trials, "losses": losses}  # fmt: skip
    if given.out:
        result.report(given.out / "report.md")
        draw(result.range_tests[0], result, losses, given.out / "lr_search.png")
        (given.out / "result.json").write_text(json.dumps(figures, indent=1))
        print(f"\nWrote {given.out / 'lr_search.png'}, report.md and result.json")
    if not given.quiet:
        print(NEXT)
    ends = {name: math.inf if values[-1] is None else values[-1] for name, values in losses.items()}
    if given.check and min(ends, key=ends.get) != "the answer":
        raise SystemExit(f"the claim does not hold: {ends}")
    return figures


if __name__ == "__main__":
    main()
