"""Time an optimizer's step by itself, kopt's beside Keras's, on the backend in KERAS_BACKEND.

The arms take turns, run by run, and kopt's arm is there twice: what it differs from itself is the noise. Read the
ratios; the milliseconds belong to one machine on one day.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import kopt

BACKEND = keras.backend.backend()
RULES = {  # rule -> kopt's, Keras's
    "SGD": (lambda: kopt.SGD(0.01), lambda: keras.optimizers.SGD(0.01)),
    "momentum": (lambda: kopt.SGD(0.01, momentum=0.9), lambda: keras.optimizers.SGD(0.01, momentum=0.9)),
    "Adagrad": (lambda: kopt.Adagrad(0.01), lambda: keras.optimizers.Adagrad(0.01)),
    "RMSprop": (lambda: kopt.RMSprop(0.01), lambda: keras.optimizers.RMSprop(0.01)),
    "Adam": (lambda: kopt.Adam(0.01), lambda: keras.optimizers.Adam(0.01)),
    "AdamW": (lambda: kopt.AdamW(0.01), lambda: keras.optimizers.AdamW(0.01)),
    "clipnorm": (lambda: kopt.Adam(clipnorm=1.0), lambda: keras.optimizers.Adam(clipnorm=1.0)),
    "global_clipnorm": (lambda: kopt.Adam(global_clipnorm=1.0), lambda: keras.optimizers.Adam(global_clipnorm=1.0)),
}
SHAPES = {"12 variables, 25 M": [(1448, 1448)] * 12, "80 variables, 0.3 M": [(64, 64)] * 80}
SMOKE_SHAPES = {"12 variables, 0.8 M": [(256, 256)] * 12}


def stepper(optimizer, shapes, jit):
    """A function that does one step and waits for it."""
    variables = [keras.Variable(np.ones(shape, "float32")) for shape in shapes]
    gradients = [keras.ops.convert_to_tensor(np.full(shape, 0.01, "float32")) for shape in shapes]
    optimizer.build(variables)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        step = tf.function(lambda *g: optimizer.apply(list(g), variables), jit_compile=jit)
        return lambda: (step(*gradients), variables[-1].numpy()[0, 0])
    if BACKEND == "jax":
        import jax

        step = jax.jit(lambda w, state: optimizer.stateless_apply(state, gradients, w), donate_argnums=(0, 1))
        held = [[v.value for v in variables], [v.value for v in optimizer.variables]]

        def run():
            held[:] = jax.block_until_ready(step(*held))

        return run
    return lambda: (optimizer.apply(gradients, variables), variables[-1].value.detach()[0, 0].item())


def measure(arms, repeats):
    """Milliseconds of a step for each arm: first call, and median over interleaved runs."""
    first = {}
    for name, step in arms.items():
        start = time.perf_counter()
        step()
        first[name] = 1e3 * (time.perf_counter() - start)
    runs = {name: [] for name in arms}
    for _ in range(repeats):
        for name, step in arms.items():
            start = time.perf_counter()
            step()
            runs[name].append(1e3 * (time.perf_counter() - start))
    return {name: {"first_ms": first[name], "ms": float(np.median(times))} for name, times in runs.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small shapes, few runs")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    results = []
    print(f"Keras {keras.__version__} on {BACKEND}; milliseconds a step, and kopt's share of Keras's")
    for shape_name, shapes in (SMOKE_SHAPES if args.smoke else SHAPES).items():
        for jit in (False, True) if BACKEND == "tensorflow" else (BACKEND == "jax",):
            for rule in args.rules:
                ours, theirs = RULES[rule]
                arms = {"kopt": ours, "Keras": theirs, "kopt again": ours}
                arms = {name: stepper(make(), shapes, jit) for name, make in arms.items()}
                times = measure(arms, repeats=5 if args.smoke else 15)
                row = {"shapes": shape_name, "xla": jit, "rule": rule, "times": times}
                row["ratio"] = times["kopt"]["ms"] / times["Keras"]["ms"]
                row["noise"] = abs(times["kopt again"]["ms"] / times["kopt"]["ms"] - 1)
                results.append(row)
                arm = {name: f"{time['ms']:8.2f} (first {time['first_ms']:.0f})" for name, time in times.items()}
                line = f"{shape_name:22} {'XLA' if jit else 'no XLA':6} {rule:15} "
                line += f"kopt {arm['kopt']:22} Keras {arm['Keras']:22} "
                print(line + f"ratio {row['ratio']:5.2f}, noise {row['noise']:.0%}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
