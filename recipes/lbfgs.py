"""A physics-informed network to many digits: Adam, then L-BFGS, then self-scaled Broyden.

What: u'' = f on [-1, 1] with u = 0 at both ends, f so that u = sin(πx), at 101 points; a network of two hidden layers
of 16 (321 weights), in float64. The loss is the mean square of u'' - f plus the squares at the ends. Two tables: all
methods from the same fresh weights, and the hand-over that people use: 500 steps of Adam, then the second order.

Claim (Urbán, Stefanou and Pons, Journal of Computational Physics 523, 2025): with the same evaluations, self-scaled
Broyden ends orders of magnitude below L-BFGS, which ends orders of magnitude below Adam.
When it says little: a problem this small has no noise and no need for mini-batches. With thousands of points and
millions of weights no matrix fits, and `kopt.LBFGS` is what is left.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_ENABLE_X64", "1")

import keras
import numpy as np
from keras import layers, ops

import kopt

METHODS = {  # name -> the method, a color that the color-blind can tell
    "L-BFGS, 10 pairs": (lambda: kopt.LBFGS(gtol=0, ftol=0), "#0072B2"),
    "L-BFGS, 50 pairs": (lambda: kopt.LBFGS(memory=50, gtol=0, ftol=0), "#56B4E9"),
    "BFGS": (lambda: kopt.BFGS(gtol=0, ftol=0), "#009E73"),
    "SSBFGS": (lambda: kopt.SSBFGS(gtol=0, ftol=0), "#E69F00"),
    "SSBroyden": (lambda: kopt.SSBroyden(gtol=0, ftol=0), "#D55E00"),
}
ADAM = "#999999"
NEXT = """
Next: put your own equation into `Network.compute_loss`. In float64 if you want more than six digits; `kopt.minimize`
refuses what makes the loss noisy (Dropout, batches)."""


def tanh(x):
    """Keras 3.15 computes `ops.tanh` on JAX, and `ops.matmul` on torch, in float32 whatever it is given; not these."""
    return 1 - 2 / (ops.exp(2 * x) + 1)


class Network(keras.Model):
    """u(x), with its second derivative carried along through the layers."""

    def __init__(self, width=16):
        super().__init__()
        self.hidden = [layers.Dense(width), layers.Dense(width)]
        self.last = layers.Dense(1)
        for layer, inputs in zip([*self.hidden, self.last], (1, width, width), strict=True):
            layer.build((None, inputs))

    def call(self, x):
        return self.with_second_derivative(ops.convert_to_tensor(x, "float64"))[0]

    def with_second_derivative(self, x):
        u, d, dd = x, ops.ones_like(x), ops.zeros_like(x)  # u, u', u''
        for layer in self.hidden:
            u, d, dd = tanh(u @ layer.kernel + layer.bias), d @ layer.kernel, dd @ layer.kernel
            slope = 1 - u * u
            d, dd = slope * d, slope * dd - 2 * u * slope * d * d
        return u @ self.last.kernel + self.last.bias, dd @ self.last.kernel

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        u, dd = self.with_second_derivative(x)
        return ops.mean(ops.square(dd - y)) + ops.square(u[0, 0]) + ops.square(u[-1, 0])


def problem(points=101):
    x = np.linspace(-1, 1, points)[:, None]
    return x, -(np.pi**2) * np.sin(np.pi * x)


def network(seed):
    keras.utils.set_random_seed(seed)
    model = Network()
    model(np.zeros((1, 1)))
    return model


def by_adam(model, x, f, steps):
    """The loss of every step; one long epoch, since each one costs Keras milliseconds."""
    rate = kopt.schedules.CosineDecay(initial=1e-2, steps=steps)
    model.compile(kopt.Adam(rate))
    losses = []
    for _ in range(steps // 50):
        many = [np.repeat(part[None], 50, 0).reshape(-1, 1) for part in (x, f)]
        history = model.fit(*many, batch_size=len(x), shuffle=False, verbose=0)
        losses.append(history.history["loss"][-1])
    return np.arange(50, steps + 1, 50), np.array(losses)


def by(method, model, x, f, evaluations, chunk=50):
    begun = time.perf_counter()
    history = kopt.minimize(model, x, f, method(), max_evals=evaluations, chunk=chunk, verbose=0).history
    return np.array(history["evaluations"]), np.array(history["loss"]), time.perf_counter() - begun


def at(evaluations, losses, moment):
    """The loss after so many evaluations; where a method ended before, its last."""
    return losses[max(np.searchsorted(evaluations, moment, side="right") - 1, 0)]


def compare(methods, seeds, moments, quiet):
    """The methods from the same fresh weights: the medians of the losses over the seeds."""
    x, f = problem()
    rows, curves = [], {}
    for name in methods:
        method, _ = METHODS[name]
        found = [by(method, network(seed), x, f, moments[-1]) for seed in seeds]
        losses = [[float(at(*curve[:2], moment)) for moment in moments] for curve in found]
        rows.append({"method": name, "losses": np.median(losses, axis=0).tolist(), "all": losses,
                     "seconds": float(np.median([curve[2] for curve in found]))})  # fmt: skip
        curves[name] = found[0][:2]
        if not quiet:
            print(f"{name}: {rows[-1]['losses'][-1]:.1e} after {moments[-1]} evaluations")
    return rows, curves


def hand_over(seed, steps, evaluations):
    """Adam; from its end L-BFGS and then SSBroyden, or SSBroyden at once."""
    x, f = problem()
    model = network(seed)
    curves = {"Adam": by_adam(model, x, f, steps)}
    kept = model.get_weights()
    then = {"then SSBroyden": ["SSBroyden"], "then L-BFGS, then SSBroyden": ["L-BFGS, 10 pairs", "SSBroyden"]}
    for name, stages in {"then L-BFGS": ["L-BFGS, 10 pairs"], **then}.items():
        model.set_weights(kept)
        at_step, losses = [steps], [curves["Adam"][1][-1]]
        for stage in stages:
            found = by(METHODS[stage][0], model, x, f, evaluations // len(stages))
            at_step += (at_step[-1] + found[0]).tolist()
            losses += found[1].tolist()
        curves[f"Adam, {name}"] = np.array(at_step), np.array(losses)
    points = np.linspace(-1, 1, 1001)[:, None]
    error = np.abs(ops.convert_to_numpy(model(points)) - np.sin(np.pi * points)).max()
    return curves, float(error)


def draw(curves, handed, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for name, curve in curves.items():
        left.plot(*curve, color=METHODS[name][1], label=name)
    colors = [ADAM, "#0072B2", "#D55E00", "#CC79A7"]
    for (name, curve), color in zip(handed.items(), colors, strict=True):
        right.plot(*curve, color=color, label=name)
    left.set_title("from fresh weights")
    right.set_title("after Adam")
    left.set_ylabel("loss")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xlabel("evaluations of loss and gradient")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def table(rows, moments):
    lines = [f"{'loss after':<18}" + "".join(f"{moment:>10}" for moment in moments) + "   seconds"]
    for row in rows:
        lines.append(
            f"{row['method']:<18}" + "".join(f"{loss:>10.1e}" for loss in row["losses"]) + f"{row['seconds']:>10.1f}"
        )
    return "\n".join(lines)


def parsed(args):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many fresh starts; the table has medians")
    parser.add_argument("--evaluations", type=int, default=1500, help="of each method")
    parser.add_argument("--out", type=Path, help="a directory for the picture and the figures")
    parser.add_argument("--check", action="store_true", help="fail if SSBroyden does not end far below L-BFGS")
    parser.add_argument("--smoke", action="store_true", help="a quick look")
    parser.add_argument("--quiet", action="store_true", help="print the tables only")
    given = parser.parse_args(args)
    if given.seeds < 1:
        parser.error("--seeds must be 1 or more")
    if given.evaluations < 100:
        parser.error("--evaluations must be 100 or more")
    if given.out and given.out.exists() and not given.out.is_dir():
        parser.error(f"--out must be a directory: {given.out}")
    if given.smoke:
        given.seeds, given.evaluations = 1, 100
    return given


def main(args=None):
    given, before = parsed(args), keras.config.floatx()
    keras.config.set_floatx("float64")
    try:
        moments = [moment for moment in (100, 300, 700, 1500) if moment < given.evaluations] + [given.evaluations]
        methods = ["L-BFGS, 10 pairs", "SSBroyden"] if given.smoke else list(METHODS)
        rows, curves = compare(methods, range(given.seeds), moments, given.quiet)
        handed, error = hand_over(0, 100 if given.smoke else 500, given.evaluations)
    finally:
        keras.config.set_floatx(before)
    print(f"\nFrom fresh weights, medians of {given.seeds} seeds ({keras.backend.backend()}):\n{table(rows, moments)}")
    print("\nAfter Adam, seed 0:")
    for name, (_, losses) in handed.items():
        print(f"{name:<34}{losses[-1]:>10.1e}")
    print(f"largest error of u, with the last of them: {error:.1e}")
    result = {"rows": rows, "handed": {name: float(losses[-1]) for name, (_, losses) in handed.items()}, "error": error}
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        draw(curves, handed, given.out / "lbfgs.png")
        (given.out / "result.json").write_text(json.dumps(result, indent=1))
        print(f"\nWrote {given.out / 'lbfgs.png'} and result.json")
    if not given.quiet:
        print(NEXT)
    last = {row["method"]: row["losses"][-1] for row in rows}
    if given.check and not last["SSBroyden"] < 1e-2 * last["L-BFGS, 10 pairs"]:
        raise SystemExit("the claim does not hold: SSBroyden is not far below L-BFGS")
    return result


if __name__ == "__main__":
    main()
