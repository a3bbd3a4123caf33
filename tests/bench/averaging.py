"""Time a training step with Keras's average of the weights and with kopt's, on the backend in KERAS_BACKEND.

Epochs within one `fit` are timed, the first left out; the arms take turns. "none again" is what nothing differs from
itself. What an average costs is the time above "none"; the last column is the time over that of `use_ema`.
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

import kopt
from tests.bench import epochs as bench

SIZES = {"20 layers of 64": (20, 64), "4 layers of 512": (4, 512)}


class ByHand(keras.callbacks.Callback):
    """What users write: the average in NumPy, after each batch."""

    average = None

    def on_train_batch_end(self, batch, logs=None):
        now = self.model.get_weights()
        self.average = self.average or now
        self.average = [0.995 * a + 0.005 * w for a, w in zip(self.average, now, strict=True)]


ARMS = {  # name -> arguments of the optimizer, and callbacks
    "none": lambda: ({}, []),
    "none again": lambda: ({}, []),
    "use_ema": lambda: ({"use_ema": True, "ema_momentum": 0.995}, []),
    "PolyakAveraging": lambda: ({}, [kopt.callbacks.PolyakAveraging()]),
    "with segments": lambda: ({}, [kopt.callbacks.PolyakAveraging(segment_every_epochs=1)]),
    "each 10th update": lambda: ({}, [kopt.callbacks.PolyakAveraging(update_every_steps=10)]),
    "in NumPy, by hand": lambda: ({}, [ByHand()]),
}


def applies(cls, depth, width, rounds, calls=50) -> dict[str, float]:
    """Milliseconds of the optimizer's `apply` alone, without a graph, in each arm: the median of blocks of calls."""
    prepared = {}
    for arm in ("none", "none again", "use_ema", "PolyakAveraging"):
        arguments, callbacks = ARMS[arm]()
        model = bench.network(cls(1e-3, **arguments), depth, width)
        listed = keras.callbacks.CallbackList(callbacks, model=model)
        listed.on_train_begin()
        model.make_train_function()
        variables = model.trainable_variables
        gradients = [keras.ops.ones_like(variable.value) * 1e-3 for variable in variables]
        prepared[arm] = lambda optimizer=model.optimizer, g=gradients, v=variables: optimizer.apply(g, v)
    seconds = {arm: [] for arm in prepared}
    for _ in range(10 * rounds):
        for arm, apply in prepared.items():
            start = time.perf_counter()
            for _ in range(calls):
                apply()
            seconds[arm].append((time.perf_counter() - start) / calls)
    return {arm: 1e3 * float(np.median(values[1:])) for arm, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a small network, few steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    args = parser.parse_args()
    steps, epochs, rounds = (20, 2, 1) if args.smoke else (200, 4, args.rounds)
    sizes = {"2 layers of 8": (2, 8)} if args.smoke else {size: SIZES[size] for size in args.sizes}
    print(f"Keras {keras.__version__} on {keras.backend.backend()}; milliseconds of a step, median of {rounds} rounds")
    for cls in (keras.optimizers.Adam, kopt.Adam):
        for size, shape in sizes.items():
            whose = cls.__module__.split(".")[0]
            if keras.backend.backend() == "torch":
                alone = applies(cls, *shape, rounds)
                of = (alone["PolyakAveraging"] - alone["none"]) / (alone["use_ema"] - alone["none"])
                said = ", ".join(f"{arm} {value:.3f}" for arm, value in alone.items())
                print(
                    f"\n{whose}.Adam, {size}: `apply` alone {said}: what kopt's adds is {of:.3f} of what Keras's adds"
                )
            found = {arm: [] for arm in ARMS}
            for _ in range(rounds):
                for arm, make in ARMS.items():
                    arguments, callbacks = make()
                    optimizer = cls(1e-3, **arguments)
                    found[arm] += bench.milliseconds(optimizer, callbacks, *shape, steps, epochs)
            middle = {arm: float(np.median(values)) for arm, values in found.items()}
            low, high = np.percentile(found["none"], [25, 75]) / middle["none"]
            print(f"\n{whose}.Adam, {size}: none {middle['none']:.3f}, quartiles {low:.2f}-{high:.2f}")
            print(f"  {'':20} {'ms':>7}  {'above none':>10}  {'/ none':>6}  {'/ use_ema':>9}")
            for arm, value in middle.items():
                above, theirs = value - middle["none"], middle["use_ema"]
                print(f"  {arm:20} {value:7.3f}  {above:10.3f}  {value / middle['none']:6.3f}  {value / theirs:9.3f}")


if __name__ == "__main__":
    main()
