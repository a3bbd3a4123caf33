"""Time a training step of a table of embeddings on TensorFlow: kopt's optimizers beside Keras's, and two lookups.

Keras's `Embedding` reads the whole table to look up a batch, which copies it once its rows have been updated in place.
`Lookup` asks the variable for the rows.
"""

import time

import keras
import numpy as np

import kopt

ARMS = {
    "SGD": (lambda: kopt.SGD(0.1), lambda: keras.optimizers.SGD(0.1)),
    "Adagrad": (lambda: kopt.Adagrad(0.1), lambda: keras.optimizers.Adagrad(0.1)),
    "Adam": (lambda: kopt.Adam(), lambda: keras.optimizers.Adam()),
    "Adam, lazy": (lambda: kopt.Adam(sparse="lazy"), lambda: keras.optimizers.Adam()),
}


@keras.saving.register_keras_serializable(package="kopt_bench")
class Lookup(keras.layers.Embedding):
    """An `Embedding` that reads only the rows of the batch."""

    def call(self, inputs):
        import tensorflow as tf

        return tf.gather(self.embeddings.value, inputs)


def stepper(layer, optimizer, rows, width):
    mean, head = keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)
    model = keras.Sequential([keras.Input((8,), dtype="int32"), layer(rows, width), mean, head])
    model.compile(optimizer, loss="mse", jit_compile=False)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, rows, (256, 8)).astype("int32"), rng.normal(size=(256, 1)).astype("float32")
    import tensorflow as tf

    model.make_train_function()
    batches = iter(tf.data.Dataset.from_tensors((x, y)).repeat())
    return lambda: model.train_function(batches)


def main(smoke=False):
    rows, width, repeats = (500, 4, 2) if smoke else (500_000, 64, 11)
    print(f"A table of {rows} x {width}, 256 x 8 rows of it in a batch: milliseconds of the step that `fit` compiles")
    results = []
    for name, (ours, theirs) in list(ARMS.items())[-1 if smoke else 0 :]:
        steps = {
            f"{who}, {layer.__name__}": stepper(layer, make(), rows, width)
            for layer in (keras.layers.Embedding, Lookup)
            for who, make in (("kopt", ours), ("Keras", theirs))
        }
        runs = {arm: [] for arm in steps}
        for i in range(repeats + 2):
            for arm, step in steps.items():
                start = time.perf_counter()
                step()
                runs[arm] += [1e3 * (time.perf_counter() - start)] if i > 1 else []
        ms = {arm: float(np.median(times)) for arm, times in runs.items()}
        gain = {layer: ms[f"Keras, {layer}"] / ms[f"kopt, {layer}"] for layer in ("Embedding", "Lookup")}
        results.append({"rule": name, "ms": ms, "times_faster": gain})
        shown = ", ".join(f"{arm} {time_:.2f}" for arm, time_ in ms.items())
        print(f"{name:12} {shown}; {gain['Embedding']:.1f} and {gain['Lookup']:.1f} times as fast", flush=True)
    return results
