"""Time an optimizer's step by itself, kopt's beside its rivals, on the backend in KERAS_BACKEND.

The arms take turns, run by run, and kopt's arm is there twice: what it differs from itself is the noise. Read the
ratios; the milliseconds belong to one machine on one day. `GB/s` is the least that a step must move (each weight,
gradient and slot once) over its time, and the share of it is that of what this machine copies in the same time.
"""

import argparse
import json
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import keras
import numpy as np

from tests.bench import arms, embedding, memory
from tests.bench.arms import BACKEND, RULES, SHAPES, SMOKE_SHAPES

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def measure(steps, repeats):
    """For each arm the milliseconds of its first call, of the median run, and of the quartiles."""
    first = {}
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        first[name] = 1e3 * (time.perf_counter() - start)
        step()
    runs = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            runs[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"first_ms": first[name], "ms": float(np.median(x)), "quartiles": np.percentile(x, [25, 75]).tolist()}
        for name, x in runs.items()
    }


def device() -> str:
    if BACKEND == "jax":
        import jax

        return str(jax.devices()[0].device_kind)
    if BACKEND == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return f"cpu, {CORES} cores, {platform.machine()}"


def copy_bandwidth(megabytes) -> float:
    """GB/s, reading and writing, of a copy of this size by the backend's device."""
    n = megabytes * 250_000
    if BACKEND == "torch" and "cpu" not in device():
        import torch

        a, b = torch.ones(n, device="cuda"), torch.ones(n, device="cuda")
        copy = lambda: (b.copy_(a), torch.cuda.synchronize())  # noqa: E731
    elif BACKEND == "jax" and "cpu" not in device().lower():
        import jax

        held, double = [jax.numpy.ones(n)], jax.jit(lambda x: x * 1.0001, donate_argnums=0)
        copy = lambda: held.__setitem__(0, jax.block_until_ready(double(held[0])))  # noqa: E731
    else:
        a, b = (np.ones((CORES, n // CORES), "float32") for _ in range(2))
        pool = ThreadPoolExecutor(CORES)
        copy = lambda: list(pool.map(np.copyto, b, a))  # noqa: E731
    times = []
    for _ in range(8):
        start = time.perf_counter()
        copy()
        times.append(time.perf_counter() - start)
    return 8 * n / np.median(times[2:]) / 1e9


def row(rule, shape_name, shapes, xla, repeats, bandwidth):
    steps = {name: make() for name, make in arms.arms(rule, shapes, xla).items()}
    times = measure(steps, repeats)
    moved = RULES[rule][2] * sum(int(np.prod(shape)) for shape in shapes)
    for time_ in times.values():
        time_["GB/s"] = moved / time_["ms"] / 1e6
        time_["of_copy"] = time_["GB/s"] / bandwidth
    ours, again = times["kopt"]["ms"], times["kopt again"]["ms"]
    return {
        "backend": BACKEND,
        "shapes": shape_name,
        "xla": xla,
        "rule": rule,
        "times": times,
        "ratios": {name: ours / time_["ms"] for name, time_ in times.items() if "kopt" not in name},
        "noise": abs(again / ours - 1),
        "state_bytes": arms.state_bytes(rule, shapes),
    }


def mode(result) -> str:
    return {"tensorflow": "TensorFlow, XLA" if result["xla"] else "TensorFlow", "jax": "JAX"}.get(BACKEND, "torch")


def printed(result) -> str:
    head = f"{mode(result):16} {result['shapes']:21} {result['rule']:15}"
    ours = result["times"]["kopt"]
    line = f"{head} kopt {ours['ms']:7.2f} ms (first {ours['first_ms']:.0f}), {ours['GB/s']:.1f} GB/s, "
    line += f"{ours['of_copy']:.0%} of a copy, {result['state_bytes']:.0f} B state, A/A {result['noise']:.0%}"
    for name, ratio in result["ratios"].items():
        theirs = result["times"][name]
        line += (
            f"\n{'':38} {name:>19} {theirs['ms']:7.2f} (first {theirs['first_ms']:.0f}): kopt is at {ratio:.2f} of it"
        )
    return line


def tables(results) -> str:
    """The table of which README.md has some rows."""
    lines = ["| backend | variables | rule | kopt | Keras | the fastest other |", "|---|---|---|---|---|---|"]
    for result in results:
        times = {name: time_["ms"] for name, time_ in result["times"].items() if "kopt" not in name}
        cells = {name: f"{ms:.2f} ({result['ratios'][name]:.2f})" for name, ms in times.items()}
        other = min(times.keys() - {"Keras"}, key=times.get, default=None)
        other = f"{cells[other]} {other}" if other else "there is none"
        ours = f"{result['times']['kopt']['ms']:.2f}"
        lines.append(
            "| " + " | ".join([mode(result), result["shapes"], result["rule"], ours, cells["Keras"], other]) + " |"
        )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small shapes, few runs")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--only", choices=["step", "embedding", "memory"], help="only one of the three parts")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    if args.smoke:
        args.repeats, args.rules = 2, ["SGD", "RMSprop", "AdamW"]  # a kernel, none, and one with a pass beside it
    shapes = SMOKE_SHAPES if args.smoke else {name: SHAPES[name] for name in args.shapes}
    bandwidth = copy_bandwidth(20 if args.smoke else 200)
    found = {"device": device(), "copy_GB/s": bandwidth, "keras": keras.__version__, "backend": BACKEND}
    print(f"Keras {keras.__version__} on {BACKEND}, {found['device']}; a copy runs at {bandwidth:.1f} GB/s", flush=True)
    if args.only in (None, "step"):
        found["step"] = []
        for shape_name, those in shapes.items():
            for xla in (False, True) if BACKEND == "tensorflow" else (BACKEND == "jax",):
                for rule in args.rules:
                    found["step"].append(row(rule, shape_name, those, xla, args.repeats, bandwidth))
                    print(printed(found["step"][-1]), flush=True)
    if args.only in (None, "embedding") and BACKEND == "tensorflow":
        found["embedding"] = embedding.main(args.smoke)
    if args.only in (None, "memory"):
        found["memory"] = memory.main(args.smoke)
    if found.get("step"):
        print(f"\nMilliseconds, and kopt's share of theirs:\n\n{tables(found['step'])}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
