"""Time the forms that a condition in a compiled step can take, on the backend in KERAS_BACKEND (TensorFlow or JAX).

The condition of `nonfinite="skip"` holds nearly always, that of accumulation over four steps once in four. The forms
take turns, step by step; read the ratios.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import ops

import kopt
from kopt import backends

BACKEND = keras.backend.backend()
WINDOW = 4
if BACKEND == "tensorflow":
    import tensorflow as tf
else:
    import jax


def select(condition, update, variables):
    """Update always, and choose between the new values and the old."""
    old = [backends.read(variable, variable.dtype) for variable in variables]
    update()
    for variable, value in zip(variables, old, strict=True):
        variable.assign(ops.where(condition, backends.read(variable, variable.dtype), value))


def branch(condition, update, variables):
    """A conditional with two ways out."""
    if BACKEND == "tensorflow":
        tf.cond(condition, lambda: (update(), tf.constant(True))[1], lambda: tf.constant(False))
        return

    def updated(values):
        with keras.StatelessScope(list(zip(variables, values, strict=True))) as scope:
            update()
        return [scope.get_current_value(variable) for variable in variables]

    values = jax.lax.cond(condition, updated, lambda values: values, [variable.value for variable in variables])
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


FORMS = {"select": select, "branch": branch, "loop (kopt)": backends.when}


def stepper(optimizer, shapes, jit):
    variables = [keras.Variable(np.ones(shape, "float32")) for shape in shapes]
    gradients = [ops.convert_to_tensor(np.full(shape, 0.01, "float32")) for shape in shapes]
    optimizer.build(variables)
    if BACKEND == "tensorflow":
        step = tf.function(lambda *g: optimizer.apply(g, variables), jit_compile=jit)
        return lambda: (step(*gradients), variables[-1].numpy()[0, 0])
    step = jax.jit(lambda w, state, g: optimizer.stateless_apply(state, g, w), donate_argnums=(0, 1))
    held = [[ops.copy(v.value) for v in of] for of in (variables, optimizer.variables)]

    def run():
        held[:] = jax.block_until_ready(step(*held, gradients))

    return run


def measure(arms, repeats):
    """Milliseconds for each arm: the median of the first steps of windows, and of the last."""
    times = {name: [[] for _ in range(WINDOW)] for name in arms}
    for i in range(repeats * WINDOW):
        for name, run in arms.items():
            start = time.perf_counter()
            run()
            times[name][i % WINDOW].append(1e3 * (time.perf_counter() - start))
    return {name: (np.median(np.concatenate(steps[:-1])), np.median(steps[-1])) for name, steps in times.items()}


def compiled(make, form, shapes, jit):
    """A step compiled with one form of the condition; Keras's own where there is none."""
    if form:
        backends.when = form
    run = stepper(make(), shapes, jit)
    for _ in range(WINDOW):
        run()
    backends.when = FORMS["loop (kopt)"]
    return run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small shapes, few runs")
    smoke = parser.parse_args(argv).smoke
    shapes, repeats = ([(8, 8)] * 2, 1) if smoke else ([(1448, 1448)] * 11, 8)
    print("| backend | form | skip | accumulation: adding step | updating step |\n|---|---|---|---|---|")
    for jit in (False, True) if BACKEND == "tensorflow" else (True,):
        cases = {
            "skip": (lambda: kopt.Adam(nonfinite="skip"), kopt.Adam),
            "accumulate": (
                lambda: kopt.Adam(gradient_accumulation_steps=WINDOW),
                lambda: keras.optimizers.Adam(gradient_accumulation_steps=WINDOW),
            ),
        }
        times = {}
        for case, (ours, other) in cases.items():
            arms = {name: compiled(ours, form, shapes, jit) for name, form in FORMS.items()}
            arms["no condition" if case == "skip" else "Keras"] = compiled(other, None, shapes, jit)
            times[case] = measure(arms, repeats)
        backend = BACKEND + ("" if BACKEND == "jax" else " with XLA" if jit else " without XLA")
        for name in FORMS:
            skip, (adding, updating) = np.mean(times["skip"][name]), times["accumulate"][name]
            print(f"| {backend} | {name} | {skip:.1f} | {adding:.1f} | {updating:.1f} |", flush=True)
        plain, (adding, updating) = np.mean(times["skip"]["no condition"]), times["accumulate"]["Keras"]
        print(f"| {backend} | no condition; Keras's | {plain:.1f} | {adding:.1f} | {updating:.1f} |", flush=True)


if __name__ == "__main__":
    main()
