"""What multipliers cost, and what freezing saves, on the backend in KERAS_BACKEND.

First the optimizer's step by itself: with and without multipliers, kopt's and around Keras's. Then the step of a
training in which the body of a small convolutional network rests: with each engine of `StagedUnfreeze`, and as Keras
has it, `trainable = False` before `compile`. The arms take turns; read the ratios.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parents[2]))

import keras
import numpy as np

import kopt
from tests.bench import arms, step
from tests.bench.epochs import BATCH, Times

EVERYTHING = {".": 0.1}  # a regular expression that fits each path
OPTIMIZERS = {
    "kopt.Adam": lambda: kopt.Adam(1e-3),
    "kopt.Adam again": lambda: kopt.Adam(1e-3),
    "kopt.Adam(multipliers=...)": lambda: kopt.Adam(1e-3, multipliers=EVERYTHING),
    "Keras's Adam": lambda: keras.optimizers.Adam(1e-3),
    "kopt.Multipliers(Keras's Adam)": lambda: kopt.Multipliers(keras.optimizers.Adam(1e-3), EVERYTHING),
}
STAGED = kopt.callbacks.StagedUnfreeze
TRAININGS = {  # arm -> whether the body is trainable in `compile`, callbacks
    "all is trained": lambda base: (True, []),
    'engine="multiplier"': lambda base: (True, [STAGED({0: {base: 0.0}})]),
    'engine="trainable"': lambda base: (True, [STAGED({0: {base: 0.0}}, engine="trainable")]),
    "trainable = False": lambda base: (False, []),
}


def network():
    layers = keras.layers
    body = [layers.Conv2D(width, 3, 2, "same", activation="relu") for width in (32, 64, 128)]
    base = keras.Sequential([keras.Input((32, 32, 3)), *body, layers.GlobalAveragePooling2D()])
    return keras.Sequential([base, layers.Dense(10)]), base


def milliseconds(arm, steps, epochs) -> list[float]:
    """Of a step in each epoch but the first, which compiles."""
    keras.utils.set_random_seed(0)
    model, base = network()
    base.trainable, callbacks = TRAININGS[arm](base)
    model.compile(kopt.Adam(1e-3), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).normal(size=(steps * BATCH, 32, 32, 3)).astype("float32")
    y, times = np.arange(len(x)) % 10, Times()
    model.fit(x, y, batch_size=BATCH, epochs=epochs + 1, shuffle=False, verbose=0, callbacks=[*callbacks, times])
    return [1e3 * seconds / steps for seconds in times.seconds[1:]]


def printed(title, middle) -> None:
    first = next(iter(middle.values()))
    print(f"\n{title}: {first:.2f} ms")
    for arm, value in middle.items():
        print(f"  {arm:30} {value:8.2f}  {value / first:.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small shapes, few steps")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    backend = keras.backend.backend()
    print(f"Keras {keras.__version__} on {backend}; milliseconds, and their ratio to the first")
    shapes = arms.SMOKE_SHAPES if args.smoke else dict(list(arms.SHAPES.items())[:2])
    for name, those in shapes.items():
        for xla in (False, True) if backend == "tensorflow" else (backend == "jax",):
            steps = {arm: arms.of_keras(make(), those, xla) for arm, make in OPTIMIZERS.items()}
            times = step.measure(steps, 2 if args.smoke else 15)
            printed(f"{name}{', XLA' * xla}", {arm: time_["ms"] for arm, time_ in times.items()})
    steps, epochs, rounds = (2, 1, 1) if args.smoke else (20, 3, args.rounds)
    found = {arm: [] for arm in TRAININGS}
    for _ in range(rounds):
        for arm in TRAININGS:
            found[arm] += milliseconds(arm, steps, epochs)
    printed("a training whose body rests", {arm: float(np.median(values)) for arm, values in found.items()})


if __name__ == "__main__":
    main()
