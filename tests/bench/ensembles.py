"""Time the predictions of five models in a row and as one `kopt.Ensemble`, on the backend in KERAS_BACKEND.

2,048 rows in batches of 256, the arms take turns, the first round is left out. "vectorised" is the way not taken: one
program over stacked weights, by `keras.ops.vectorized_map`; it is for networks that are alike only.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parents[2]))

import keras
import numpy as np
from keras import layers, ops

import kopt

ROWS, BATCH, COUNT = 2048, 256, 5
X = np.random.default_rng(0).normal(size=(ROWS, 8, 8, 1)).astype("float32")


def small():
    return [layers.Flatten(), layers.Dense(64, activation="relu"), layers.Dense(64, activation="relu")]


def convolutional():
    found = [layers.Conv2D(16, 3, padding="same", activation="relu"), layers.Conv2D(32, 3, activation="relu")]
    return [*found, layers.GlobalAveragePooling2D()]


NETWORKS = {"two layers of 64": small, "two convolutions": convolutional}


def network(kind, seed):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((8, 8, 1)), *NETWORKS[kind](), layers.Dense(10, activation="softmax")])


class Vectorised(keras.Model):
    """All members in one call of the first, over their stacked weights."""

    def __init__(self, models):
        super().__init__()
        self.member = models[0]
        self.stacked = [
            ops.stack([ops.copy(one.value) for one in ones]) for ones in zip(*(m.weights for m in models), strict=True)
        ]
        self.built = True

    def call(self, x):
        one = lambda weights: self.member.stateless_call(weights, [], x)[0]  # noqa: E731
        return ops.mean(ops.vectorized_map(one, [*self.stacked]), 0)


def compare(kind, rounds):
    models = [network(kind, seed) for seed in range(COUNT)]
    ensemble, vectorised = kopt.Ensemble(models), Vectorised(models)

    def predict(model):
        return model.predict(X, batch_size=BATCH, verbose=0)

    arms = {
        "one model": lambda: predict(models[0]),
        "one after the other": lambda: np.mean([predict(model) for model in models], axis=0),
        "Ensemble": lambda: predict(ensemble),
        "vectorised": lambda: predict(vectorised),
    }
    found = {arm: [] for arm in arms}
    outputs = {}
    for _ in range(rounds + 1):
        for arm, run in list(arms.items()):
            start = time.perf_counter()
            try:
                outputs[arm] = run()
            except Exception as error:
                print(f"  {arm}: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
                del arms[arm], found[arm]
                continue
            found[arm].append(time.perf_counter() - start)
    for arm in list(found)[2:]:
        assert np.allclose(outputs[arm], outputs["one after the other"], atol=1e-5), arm
    loop = np.array(found["one after the other"][1:])
    print(f"\n{kind}: milliseconds, quartiles; the loop over this, and the first call in seconds")
    for arm, seconds in found.items():
        times = np.array(seconds[1:])
        low, middle, high = 1e3 * np.percentile(times, [25, 50, 75])
        ratio = np.median(loop / times)
        print(f"  {arm:20} {middle:7.1f}  {low:6.1f}-{high:<6.1f} {ratio:6.2f}  {seconds[0]:5.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two rounds")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    print(f"Keras {keras.__version__} on {keras.backend.backend()}: {COUNT} models, {ROWS} rows")
    for kind in NETWORKS:
        compare(kind, 2 if args.smoke else args.rounds)


if __name__ == "__main__":
    main()
