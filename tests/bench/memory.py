"""The most memory that a step takes, over weights, gradients and slots together, each run in a process of its own."""

import json
import os
import resource
import subprocess
import sys

import keras
import numpy as np

BACKEND = keras.backend.backend()


def main(smoke=False):
    """The peak of a step by rule; on JAX by XLA's own account, elsewhere by what the process held."""
    results = {}
    for rule in ("Adam",) if smoke else ("SGD", "momentum", "Adagrad", "RMSprop", "Adam", "AdamW"):
        command = [sys.executable, "-m", "tests.bench.memory", rule, "2" if smoke else "12"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        results[rule] = json.loads(done.stdout.splitlines()[-1])
        print(f"{rule:10} peak of a step: {results[rule]:.2f} of weights, gradients and slots", flush=True)
    return results


def peak(rule, count) -> float:
    import kopt
    from tests.bench.arms import RULES

    name, arguments, _ = RULES[rule]
    shapes = [(1448, 1448)] * count
    optimizer = getattr(kopt, name)(**arguments)
    warm = [keras.Variable(np.ones((200, 200), "float32")) for _ in range(2)]  # what the backend takes for itself
    _stepper(getattr(kopt, name)(**arguments), warm, [keras.ops.ones((200, 200))] * 2)()
    variables = [keras.Variable(np.ones(shape, "float32")) for shape in shapes]
    gradients = [keras.ops.convert_to_tensor(np.full(shape, 0.01, "float32")) for shape in shapes]
    optimizer.build(variables)
    bytes_ = sum(4 * int(np.prod(v.shape)) for v in [*variables, *gradients, *optimizer.variables])
    if BACKEND == "jax":
        import jax

        step = jax.jit(lambda w, state, g: optimizer.stateless_apply(state, g, w), donate_argnums=(0, 1))
        values = [v.value for v in variables], [v.value for v in optimizer.variables], gradients
        memory = step.lower(*values).compile().memory_analysis()
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        return (total - memory.alias_size_in_bytes) / bytes_
    step = _stepper(optimizer, variables, gradients)
    if "cuda" in str(getattr(gradients[0], "device", "")):  # torch's
        import torch

        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated() / bytes_
    _held(reset=True)
    before = _held()
    for _ in range(3):
        step()
    return 1 + (_held(peak=True) - before) / bytes_  # not what NumPy left behind when the arrays were made


def _stepper(optimizer, variables, gradients):
    optimizer.build(variables)
    if BACKEND != "tensorflow":
        return lambda: optimizer.apply(gradients, variables)
    import tensorflow as tf

    return tf.function(lambda: optimizer.apply(gradients, variables), autograph=False)


def _held(peak=False, reset=False) -> int:
    """Bytes of memory that this process holds, or held at most since the last reset."""
    try:
        if reset:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["VmHWM" if peak else "VmRSS"].split()[0])
    except OSError:  # no Linux: the peak of the whole run
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    print(json.dumps(peak(sys.argv[1], int(sys.argv[2]))))
