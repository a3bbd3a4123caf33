"""The README's gallery: optimizers on surfaces, a fit's rates, and the loss between the networks of a training.

What: optimizers of kopt on Beale's function, each at the best of 19 rates; on a saddle, all at small steps; on a long
valley. Then a network with batch normalization on 1,200 images of handwritten digits (8 x 8, scikit-learn's): a
training of 30 epochs that comes to rest three times, and two trainings from other first weights. The loss is looked at
along the line between two trainings, with statistics of batch normalization estimated anew and without, along the lines
between the three rests, and in the planes through three trainings and through the rests.

Claims: plain gradient descent waits longer at a saddle than rules with momentum or scaled steps (CS231n, lecture 7);
between two trainings there is a barrier (Garipov et al., 2018), and most of what one sees without new statistics of
batch normalization is not there with them; between the rests of one training there is next to none.
Expected, with seeds 0 to 2 (TensorFlow 2.21, Keras 3.15.1, 2026-11): see the README, which `make gallery` reprints.
When it says little: two weights are not millions, and a line or a plane through millions is very little of what there
is. Low in a plane is not low around it.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import kopt

SIX = ["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam"]
AT_THE_SADDLE = ["sgd=0.02", "momentum=0.02", "nesterov=0.02", "adagrad=0.1", "rmsprop=0.02", "adam=0.02"]
NEXT = """
Next: `kopt.plot.slice_1d(model, x, y)` shows the loss around the weights that your own model has. Before you believe a
picture, draw it with another seed, and with other data."""


def digits():
    images, labels = load_digits(return_X_y=True)
    x, _, y, _ = train_test_split((images / 16).astype("float32"), labels, train_size=1200, random_state=0)
    return x, y


def network(seed):
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    hidden = [layer for _ in range(2) for layer in (layers.Dense(48, "relu"), layers.BatchNormalization())]
    model = keras.Sequential([keras.Input((64,)), *hidden, layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(kopt.SGD(0.1, momentum=0.9), loss=loss, metrics=["accuracy"])
    return model


def surfaces(files, steps):
    """Optimizers on surfaces; after how many steps each has left the saddle, if it has."""
    kopt.plot.trajectories(SIX, "beale", steps=steps, save=files("beale.gif", "beale.html"))
    kopt.plot.trajectories([*SIX, "lbfgs"], "long_valley", steps=steps, save=files("long_valley.png"))
    saddle = kopt.plot.trajectories(AT_THE_SADDLE, "saddle", steps=steps, save=files("saddle.gif")).record
    left = {}
    for run in saddle.runs:
        below = np.flatnonzero(run.losses < -1)
        left[run.label] = int(below[0]) if len(below) else None
    return left


def rates(files):
    """What four callbacks make of one fit."""
    base = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)], name="body")
    staged = kopt.callbacks.StagedUnfreeze([{"epoch": 0, "multipliers": {base: 0.0}},
                                            {"epoch": 4, "multipliers": {base: 0.1}, "ramp_epochs": 2}])  # fmt: skip
    fit = [kopt.callbacks.WarmUp(epochs=1), kopt.callbacks.CosineRestarts(cycle_epochs=4, growth=2), staged]
    fit.append(kopt.callbacks.MomentumAnneal(0.5, 0.95))
    kopt.plot.schedule(fit, steps=1200, steps_per_epoch=100, base=0.1, save=files("schedule.png"))


def trained(seed, epochs, callback):
    model = network(seed)
    model.fit(*digits(), batch_size=32, epochs=epochs, verbose=0, callbacks=[callback])
    return model


def losses(files, seed, epochs, n, verbose):
    """The barriers between two trainings, and between the rests of one."""
    snap = kopt.callbacks.SnapshotEnsemble(cycles=3, max_learning_rate=0.2, verbose=0)
    model = trained(seed, epochs, snap)
    apart = [model, *(trained(seed + more, epochs, kopt.callbacks.CosineDecay()) for more in (1000, 2000))]
    data, look = [part[:600] for part in digits()], {"verbose": verbose}
    between = {
        name: kopt.landscape.slice_1d(model, *data, points=points, positions=np.linspace(0, end, n), **how, **look)
        for name, points, end, how in (
            ("two trainings", apart[:2], 1, {}),
            ("two trainings, statistics interpolated", apart[:2], 1, {"update_bn": False}),
            ("three rests of one training", snap.ensemble, 2, {}),
        )
    }
    if files is not None:
        planes = {
            name: kopt.landscape.plane(model, *data, points=points, n=n, **look)
            for name, points in (("three trainings", apart), ("three rests of one training", snap.ensemble))
        }
        draw(kopt.plot.slice_1d, between, (9.6, 3.4), {"sharey": True}, files("slices.png"))
        draw(kopt.plot.plane, planes, (9.6, 4.2), {}, files("planes.png"))
    return {name: [float(height) for height in found.barriers] for name, found in between.items()}


def draw(plot, records, size, how, files):
    """Records side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    for ax, (name, record) in zip(figure.subplots(1, len(records), **how), records.items(), strict=True):
        picture = plot(record, metrics="loss", ax=ax)
        ax.set_title(name.replace(", ", ",\n"), fontsize=10, loc="left")
    picture.save(*files)


def parsed(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="trainings, of which the first is drawn (default 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="of the first training (default 0)")
    parser.add_argument("--out", type=Path, help="a directory for the pictures and the figures")
    parser.add_argument("--check", action="store_true", help="fail if a claim does not hold")
    parser.add_argument("--smoke", action="store_true", help="a quick look")
    parser.add_argument("--quiet", action="store_true", help="print the figures only")
    given = parser.parse_args(argv)
    given.seeds = given.seeds if given.seeds is not None else 1 if given.smoke else 3
    if given.seeds < 1 or given.first_seed < 0:
        parser.error("--seeds must be 1 or more, --first-seed 0 or more")
    if given.check and given.smoke:
        parser.error("--check looks at whole trainings; leave --smoke out")
    if given.out and given.out.exists() and not given.out.is_dir():
        parser.error(f"--out must be a directory: {given.out}")
    return given


def main(argv=None):
    given = parsed(argv)

    def files(*names):
        return [given.out / name for name in names] if given.out else []

    left = surfaces(files, 30 if given.smoke else None)
    rates(files)
    found = []
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        epochs, n = (3, 5) if given.smoke else (30, 33)
        is_drawn = given.out and seed == given.first_seed
        found.append(losses(files if is_drawn else None, seed, epochs, n, 0 if given.quiet else 1))
    print("\nsteps until the loss at the saddle is below -1: ", end="")
    print(", ".join(f"{name} {'never' if steps is None else steps}" for name, steps in left.items()))
    print(f"the highest barrier, by seed ({keras.backend.backend()}):")
    for name in found[0]:
        print(f"  {name:40}" + "".join(f"{max(one[name]):9.2g}" for one in found))
    result = {"left": left, "barriers": found}
    if given.out:
        (given.out / "result.json").write_text(json.dumps(result, indent=1))
    if not given.quiet:
        print(NEXT)
    if given.check:
        check(left, found)
    return result


def check(left, found):
    slowest = left["SGD"] or np.inf
    if any(steps is None or steps >= slowest for name, steps in left.items() if name != "SGD"):
        raise SystemExit("the claim does not hold: plain gradient descent left the saddle as soon as another")
    for one in found:
        anew, as_they_are, rests = (max(heights) for heights in one.values())
        if not rests < 0.1 < anew < as_they_are:
            raise SystemExit(f"the claim does not hold: barriers {one}")


if __name__ == "__main__":
    main()
