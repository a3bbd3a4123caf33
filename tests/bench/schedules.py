"""Time a training step with and without a schedule in it, on the backend in KERAS_BACKEND.

Epochs within one `fit` are timed, the first left out; the arms take turns. "none again" is what nothing differs from
itself: a schedule costs nothing that can be seen if it lies inside that.
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
from tests.bench import epochs as bench

WIDTHS = {"small": 32, "middle": 512}


def stock(steps):
    return keras.optimizers.schedules.CosineDecay(1e-3, steps)


def arms(steps):
    """Name -> the learning rate, and callbacks."""
    return {
        "none": lambda: (1e-3, []),
        "none again": lambda: (1e-3, []),
        "CosineDecay()": lambda: (1e-3, [kopt.callbacks.CosineDecay()]),
        "WarmUp, CosineDecay": lambda: (1e-3, [kopt.callbacks.WarmUp(epochs=1), kopt.callbacks.CosineDecay()]),
        "RateMonitor": lambda: (1e-3, [kopt.callbacks.RateMonitor()]),
        "Keras's schedule": lambda: (stock(steps), []),
        "assigned each batch": lambda: (1e-3, [Assign()]),
    }


class Assign(keras.callbacks.Callback):
    """What Keras's users do for a rate that changes at every step."""

    def on_train_batch_begin(self, batch, logs=None):
        self.model.optimizer.learning_rate = 1e-3 / (1 + 1e-3 * batch)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="the small network, few steps")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    steps, epochs, rounds = (20, 2, 1) if args.smoke else (200, 4, args.rounds)
    print(f"Keras {keras.__version__} on {keras.backend.backend()}; milliseconds of a step, median of {rounds} rounds")
    for cls in (keras.optimizers.Adam, kopt.Adam):
        for name, width in list(WIDTHS.items())[: 1 if args.smoke else None]:
            found = {arm: [] for arm in arms(steps * (epochs + 1))}
            for _ in range(rounds):
                for arm, make in arms(steps * (epochs + 1)).items():
                    rate, callbacks = make()
                    found[arm] += bench.milliseconds(cls(rate), callbacks, 4, width, steps, epochs)
            middle = {arm: float(np.median(values)) for arm, values in found.items()}
            low, high = np.percentile(found["none"], [25, 75]) / middle["none"]
            whose = cls.__module__.split(".")[0]
            print(f"\n{whose}.Adam, {name}: none {middle['none']:.3f}, quartiles {low:.2f}-{high:.2f}")
            for arm, value in middle.items():
                print(f"  {arm:20} {value:7.3f}  {value / middle['none']:.3f}")


if __name__ == "__main__":
    main()
