"""What a backup costs: milliseconds of a save, its size, and what it adds to training, beside Keras's callback.

A model of four large layers with Adam. `python tests/bench/backup.py --help` lists the sizes.
"""

import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import kopt

EPOCHS, STEPS, BATCH = 6, 4, 32


def model(width):
    made = keras.Sequential([keras.Input((width,)), *(keras.layers.Dense(width) for _ in range(4))])
    made.compile(kopt.Adam(1e-3), "mse")
    return made


def seconds(made, data, callbacks) -> float:
    """Of an epoch, the median without the first, which compiles."""
    marks = []
    mark = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: marks.append(time.perf_counter()))
    made.fit(*data, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=[mark, *callbacks])
    return statistics.median(np.diff(marks[1:]))


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--width", type=int, default=2048, help="of each of the four layers (2048: 201 MB are saved)"
    )
    arguments.add_argument("--smoke", action="store_true", help="small, to see that it runs")
    given = arguments.parse_args()
    width = 64 if given.smoke else given.width
    data = [np.random.default_rng(0).normal(size=(STEPS * BATCH, width)).astype("float32")] * 2
    made = model(width)
    made.optimizer.build(made.trainable_variables)
    size = sum(int(np.prod(v.shape)) * 4 for v in [*made.variables, *made.optimizer.variables])
    ways = {
        "no backup": lambda folder: [],
        "kopt, each epoch": lambda folder: [kopt.callbacks.BackupAndRestore(folder, verbose=0)],
        "Keras, each epoch": lambda folder: [keras.callbacks.BackupAndRestore(folder)],
        "Keras, double_checkpoint": lambda folder: [keras.callbacks.BackupAndRestore(folder, double_checkpoint=True)],
    }
    found = {name: [] for name in ways}
    for _ in range(1 if given.smoke else 3):  # interleaved: the machine is not the same from minute to minute
        for name, make in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(seconds(made, data, make(folder)))
    plain = min(found["no backup"])
    print(f"{keras.backend.backend()}: {size / 1e6:.0f} MB, an epoch of {STEPS} steps takes {plain * 1e3:.0f} ms")
    for name, times in found.items():
        print(f"{name:26}{(min(times) - plain) * 1e3:8.0f} ms a save")


if __name__ == "__main__":
    main()
