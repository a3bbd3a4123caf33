"""How long a training step takes, from the epochs within one `fit`."""

import time

import keras
import numpy as np

BATCH = 32


class Times(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


def network(optimizer, depth, width):
    """So many layers of the same width, compiled."""
    layers = [keras.layers.Dense(width, activation="relu") for _ in range(depth)]
    model = keras.Sequential([keras.Input((width,)), *layers, keras.layers.Dense(1)])
    model.compile(optimizer, loss="mse")
    return model


def milliseconds(optimizer, callbacks, depth, width, steps, epochs) -> list[float]:
    """Of a step in each epoch but the first, which compiles."""
    keras.utils.set_random_seed(0)
    model, times = network(optimizer, depth, width), Times()
    x = np.random.default_rng(0).normal(size=(steps * BATCH, width)).astype("float32")
    model.fit(x, x[:, :1], batch_size=BATCH, epochs=epochs + 1, shuffle=False, verbose=0, callbacks=[*callbacks, times])
    return [1e3 * seconds / steps for seconds in times.seconds[1:]]
