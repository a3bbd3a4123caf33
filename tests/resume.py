"""Trainings that are killed and started again: what the tests and `make soak` run, in processes of their own.

`python -m tests.resume` imports Keras once and then forks a child for each order that it reads, a line of JSON:
`{"scenario": ..., "directory": ..., "kill": ...}`. A child prints what it came to, unless it was killed on the way.
`python -m tests.resume compare` prints which trainings end the same with Keras's callback, and which with kopt's.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import field

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

import kopt
from kopt import disk
from kopt.callbacks.base import InStep

BACKEND = keras.backend.backend()
EPOCHS, BATCH = 5, 4
X = np.random.default_rng(0).normal(size=(30, 4)).astype("float32")  # 8 batches, the last one of 2
Y = X @ np.random.default_rng(1).normal(size=(4, 1)).astype("float32")
Y += np.random.default_rng(2).normal(size=Y.shape).astype("float32")


class Batches(keras.utils.PyDataset):
    def __init__(self, number, **arguments):
        super().__init__(**arguments)
        self.rows = np.random.default_rng(number).permutation(len(X))

    def __len__(self):
        return 8

    def __getitem__(self, i):
        rows = self.rows[i * BATCH : (i + 1) * BATCH]
        return X[rows], Y[rows]


def dataset(number):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(30, seed=number).batch(BATCH)


class Count(keras.callbacks.Callback):
    """A user's callback with a state: it drives the learning rate by what it has seen."""

    seen = 0

    def on_epoch_end(self, epoch, logs=None):
        self.seen += logs["loss"]
        self.model.optimizer.learning_rate = 0.01 / (1 + self.seen)

    def get_state(self):
        return {"seen": self.seen}

    def set_state(self, state):
        self.seen = state["seen"]


class Mean(InStep):
    """The mean of the weights after each update, kept in the compiled step."""

    left_behind = (*InStep.left_behind, "means", "found")

    def prepare(self, model):
        self.means, self.found = [], []

    def install(self, optimizer):
        self.count = self.add_variable(optimizer, name="count")
        self.means = [(v, self.add_slot(optimizer, v, "mean", dtype="float32")) for v in self.model.trainable_variables]

    def after_update(self, optimizer, variables, happened):
        self.count.assign(self.count + 1)
        for variable, mean in self.means:
            mean.assign(mean + (variable - mean) / self.count)

    def finish(self, optimizer):
        self.found = [keras.ops.convert_to_numpy(mean).tolist() for _, mean in self.means]


class Draws(keras.callbacks.Callback):
    """Draws from everything that draws without being asked for a seed."""

    seen = 0.0

    def on_epoch_end(self, epoch, logs=None):
        self.seen += np.random.random() + random.random() + float(keras.random.normal(()))
        if BACKEND == "torch":
            import torch

            self.seen += float(torch.rand(()))
        elif BACKEND == "tensorflow":
            import tensorflow as tf

            self.seen += float(tf.random.get_global_generator().normal(()))

    get_state, set_state = Count.get_state, Count.set_state


def plateau(**arguments):
    return keras.callbacks.ReduceLROnPlateau("loss", 0.1, **arguments)


def stopping():
    return keras.callbacks.EarlyStopping("loss", min_delta=0.3, patience=1, restore_best_weights=True)


def best():
    return keras.callbacks.ModelCheckpoint("best.weights.h5", "loss", save_best_only=True, save_weights_only=True)


def often():
    return keras.callbacks.ModelCheckpoint("at_{epoch}_{batch}.weights.h5", save_freq=3, save_weights_only=True)


def scaled(rate):
    return keras.optimizers.LossScaleOptimizer(kopt.Adam(rate), dynamic_growth_steps=3)


def scheduled(rate):
    return ADAM(keras.optimizers.schedules.ExponentialDecay(rate, 3, 0.5))


def one_cycle():
    return kopt.callbacks.OneCycle(0.1)


def following(rate):
    """A learning rate that any callback of kopt tells how long the fit is."""
    return ADAM(kopt.schedules.WarmUp(steps=5) >> kopt.schedules.CosineDecay(initial=rate))


def polyak():
    return kopt.callbacks.PolyakAveraging(momentum=0.9, update_bn=X, segment_every_epochs=1)


def swa():
    more = {"validate": "both", "validation_data": (X, Y), "on_train_end": "raw"}
    return kopt.callbacks.PolyakAveraging(kind="uniform", start_epoch=2, update_every_steps=3, **more)


def staged(engine):
    stages = [{"epoch": 0, "multipliers": {"bias": 0.0}}, {"epoch": 1, "multipliers": {"bias": 1.0}, "ramp_steps": 4}]
    return kopt.callbacks.StagedUnfreeze(stages, engine=engine)


def snapshots():
    return kopt.callbacks.SnapshotEnsemble(2, validation_data=(X, Y))


def star():
    return kopt.callbacks.SnapshotEnsemble(2, 0.05, cycle_mult=1.5, topology="star", directory="snapshots")


def searching(rate):
    return kopt.LBFGS(accumulate_steps=8)


def smaller():
    return keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9)


@dataclasses.dataclass
class Scenario:
    """One way to train: how to make what it is made of."""

    optimizer: Callable = kopt.Adam
    arguments: dict = field(default_factory=dict)  # of the optimizer
    layer: Callable | None = None
    callbacks: tuple[Callable, ...] = ()
    data: Callable = lambda: (X, Y)
    fit: dict = field(default_factory=dict)
    compiled: dict = field(default_factory=dict)
    steps: int | None = None  # between saves
    first: bool = False  # whether the backup is the first in the list of callbacks
    alone: bool = True  # whether there is a backup that is no part of another callback
    built: bool = False  # whether the model has its weights from the start, as Keras's own callback wants it


CALLBACK_STATE = (
    "best",
    "wait",
    "cooldown_counter",
    "stopped_epoch",
    "best_epoch",
    "best_weights",
    "seen",
    "found",
    "history",
    "segments_",
    "_batches_seen_since_last_saving",
)
ADAM = keras.optimizers.Adam
PLAIN = {"shuffle": False}
EIGHT = {  # in which Keras's own callback was measured
    "plain": Scenario(fit=PLAIN),
    "average": Scenario(ADAM, {"use_ema": True}, fit=PLAIN),
    "accumulation": Scenario(ADAM, {"gradient_accumulation_steps": 3}, fit=PLAIN),
    "shuffled": Scenario(ADAM),
    "dropout": Scenario(ADAM, layer=lambda: layers.Dropout(0.5), fit=PLAIN),
    "plateau": Scenario(ADAM, callbacks=(lambda: plateau(patience=0, min_delta=1e9),), fit=PLAIN, first=True),
    "swapped": Scenario(ADAM, {"use_ema": True}, callbacks=(lambda: keras.callbacks.SwapEMAWeights(True),), fit=PLAIN),
    "steps": Scenario(ADAM, fit=PLAIN, steps=3),
}
SCENARIOS = EIGHT | {
    "everything": Scenario(
        arguments={"use_ema": True, "gradient_accumulation_steps": 2, "nonfinite": "skip"},
        layer=lambda: layers.Dropout(0.5),
        callbacks=(Count, Draws, lambda: plateau(patience=1), smaller),
        fit={"validation_split": 0.1},
        steps=3,
    ),
    "mean": Scenario(ADAM, callbacks=(Mean,), steps=3),
    "norm": Scenario(layer=layers.BatchNormalization, fit={"shuffle": "batch"}, compiled={"metrics": ["mae"]}, steps=2),
    "stopped": Scenario(callbacks=(stopping,)),
    "best": Scenario(callbacks=(best, often), steps=2),
    "execution": Scenario(compiled={"steps_per_execution": 3}, steps=3),
    "scaled": Scenario(scaled, steps=3),
    "schedule": Scenario(scheduled, steps=5),
    "schedules": Scenario(
        ADAM,
        callbacks=(
            lambda: kopt.callbacks.WarmUp(epochs=1.5),
            kopt.callbacks.CosineDecay,
            lambda: kopt.callbacks.Schedule("beta_2", kopt.schedules.Linear(0.9, 0.99, initial=1.0)),
            lambda: plateau(patience=0, min_delta=1e9),
            kopt.callbacks.RateMonitor,
        ),
        steps=3,
    ),
    "one_cycle": Scenario(
        kopt.SGD,
        {"momentum": 0.9, "gradient_accumulation_steps": 3, "nonfinite": "skip"},
        callbacks=(one_cycle,),
        steps=3,
    ),
    "following": Scenario(following, steps=3),
    "polyak": Scenario(
        ADAM,
        {"gradient_accumulation_steps": 3},
        layer=lambda: layers.BatchNormalization(momentum=0.9),
        callbacks=(polyak, lambda: keras.callbacks.EarlyStopping(patience=9, restore_best_weights=True)),
        fit={"validation_split": 0.1},
        steps=3,
        first=True,
    ),
    "swa": Scenario(
        kopt.SGD,
        {"momentum": 0.9, "nonfinite": "skip"},
        callbacks=(lambda: kopt.callbacks.CyclicalRate(0.1, cycle_epochs=1), swa),
    ),
    "staged": Scenario(
        lambda rate: kopt.Multipliers(keras.optimizers.Adam(rate), {"kernel": 0.5}),
        layer=layers.BatchNormalization,
        callbacks=(lambda: staged("multiplier"),),
        steps=3,
        built=True,
    ),
    "staged_trainable": Scenario(
        arguments={"multipliers": {"kernel": 0.5}}, callbacks=(lambda: staged("trainable"),), steps=3, built=True
    ),
    "snapshots": Scenario(
        kopt.SGD, {"momentum": 0.9}, layer=layers.BatchNormalization, callbacks=(snapshots, polyak), steps=3
    ),
    "star": Scenario(ADAM, layer=lambda: layers.Dropout(0.5), callbacks=(star,), alone=False),
    "search": Scenario(searching, callbacks=(kopt.callbacks.LineSearchMonitor,), fit=PLAIN, steps=3),
    "narrow": Scenario(layer=lambda: layers.Dense(3, dtype="bfloat16"), steps=3),
    "cut": Scenario(fit={"steps_per_epoch": 3}, steps=2),
    "seek": Scenario(data=lambda: (kopt.data.seekable(Batches(1, workers=2), shuffle=True), None), steps=3),
    "seek_function": Scenario(data=lambda: (kopt.data.seekable(Batches), None), steps=3),
    "seek_dataset": Scenario(data=lambda: (kopt.data.seekable(dataset), None), steps=3),
    "ratios": Scenario(ADAM, {"gradient_accumulation_steps": 3}, callbacks=(kopt.callbacks.UpdateRatio,), steps=3),
}
if BACKEND == "torch":
    del SCENARIOS["execution"]  # Keras has one step an execution there


class Dies(disk.Disk):
    """A disk whose process is killed before its n-th operation of a kind, or within it, when a part is written."""

    def __init__(self, operation, number, part=0.0):
        def counted(*arguments):
            self.left -= 1
            if self.left == 0:
                if part:
                    method(arguments[0], bytes(arguments[1])[: int(len(arguments[1]) * part)])
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*arguments)

        self.left, method = number, getattr(self, operation)
        setattr(self, operation, counted)


class Progress(keras.callbacks.Callback):
    """Says which step is done, and dies or raises at the hook it is told to."""

    def __init__(self, kill, say):
        super().__init__()
        self.kill, self.say, self.epoch = kill or {}, say, 0

    def _reach(self, hook, number):
        if self.kill.get("hook") == hook and number >= self.kill["number"]:
            if self.kill.get("raise"):
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_begin(self, logs=None):
        self._reach("on_train_begin", 0)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self._reach("on_epoch_begin", epoch)

    def on_train_batch_begin(self, batch, logs=None):
        if self.say:
            self.say(f"begin {self.epoch * 8 + batch}")

    def on_train_batch_end(self, batch, logs=None):
        done = self.epoch * 8 + min(batch + 1, 8)
        if self.say:
            self.say(f"done {done}")
        self._reach("on_train_batch_end", done)

    def on_test_begin(self, logs=None):
        self._reach("on_test_begin", self.epoch)

    def on_epoch_end(self, epoch, logs=None):
        self._reach("on_epoch_end", epoch)

    def on_train_end(self, logs=None):
        self._reach("on_train_end", 0)


def train(name, directory, kill=None, say=None, epochs=EPOCHS, theirs=False) -> dict:
    """Train as the scenario says; the hashes of what came of it."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    if BACKEND == "tensorflow":  # no seed of another reaches its generator
        import tensorflow as tf

        tf.random.get_global_generator().reset_from_seed(7)
    use = SCENARIOS[name]
    layer = [use.layer()] if use.layer else []
    start = [keras.Input((4,))] if theirs or use.built else []
    model = keras.Sequential([*start, layers.Dense(6, activation="relu"), *layer, layers.Dense(1)])
    model.compile(use.optimizer(0.01, **use.arguments), loss="mse", **use.compiled)
    if kill and "operation" in kill:
        kopt.store.Disk = lambda: Dies(**kill)
    if theirs:
        backup = keras.callbacks.BackupAndRestore(f"{directory}/keras", save_freq=use.steps or "epoch")
    else:
        backup = kopt.callbacks.BackupAndRestore(directory, save_every_steps=use.steps, verbose=0)
    os.chdir(directory)  # where a callback writes what the backup leaves alone
    callbacks = [make() for make in use.callbacks]
    backups = [backup] if use.alone else []
    listed = [*backups, *callbacks] if use.first else [*callbacks, *backups]
    x, y = use.data()
    arguments = {"batch_size": BATCH, "shuffle": y is not None} | use.fit
    history = model.fit(x, y, epochs=epochs, verbose=0, callbacks=[*listed, Progress(kill, say)], **arguments)
    results = {
        "weights": map(keras.ops.convert_to_numpy, model.variables),
        "optimizer": map(keras.ops.convert_to_numpy, model.optimizer.variables),
        "history": [history.epoch, *(history.history[key] for key in sorted(history.history))],
        "callbacks": [getattr(callback, name, None) for callback in callbacks for name in CALLBACK_STATE],
        "averages": [array for callback in callbacks for array in averaged(callback, model)],
        "random": [np.random.random(3), random.random(), keras.ops.convert_to_numpy(keras.random.normal((3,)))],
    }
    return {part: digest(values) for part, values in results.items()}


def averaged(callback, model):
    """The count of an average of the weights, the average, and what the training goes on from."""
    if isinstance(callback, kopt.callbacks.PolyakAveraging):
        yield callback.updates_
        for which in ("averaged", "raw"):
            with callback.applied(which):
                yield from [np.array(keras.ops.convert_to_numpy(one)) for one in model.variables]
    if isinstance(callback, kopt.callbacks.SnapshotEnsemble):
        yield from callback.snapshots_
        yield callback.ensemble.members(X)


def digest(values) -> str:
    found = hashlib.sha256()
    for value in values:
        is_array = isinstance(value, np.ndarray)
        found.update(np.ascontiguousarray(value).tobytes() if is_array else repr(value).encode())
    return found.hexdigest()[:16]


def obey(order, writer) -> int:
    def say(text):
        os.write(writer, f"{text}\n".encode())

    try:
        say("result " + json.dumps(train(order["scenario"], order["directory"], order.get("kill"), say)))
    except BaseException as error:
        say(f"error {type(error).__name__}: {error}")
        return 1
    return 0


def serve():
    """Fork a child for each order."""
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            os._exit(obey(order, writer))
        os.close(writer)
        if "after" in order:
            time.sleep(order["after"])
            os.kill(child, signal.SIGKILL)
        with open(reader) as lines:
            said = lines.read().splitlines()
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": status, "said": said}), flush=True)


def compare() -> dict:
    """The eight trainings with either callback, stopped and started again."""
    found = {}
    for name, kill in zip(EIGHT, [("on_epoch_begin", 3), ("on_train_batch_end", 22)] * 4, strict=True):
        found[name] = []
        for theirs in (True, False):
            with tempfile.TemporaryDirectory() as once, tempfile.TemporaryDirectory() as twice:
                whole = train(name, once, theirs=theirs)
                with contextlib.suppress(KeyboardInterrupt):
                    train(name, twice, {"hook": kill[0], "number": kill[1], "raise": True}, theirs=theirs)
                again = train(name, twice, theirs=theirs)
                os.chdir("/")
            found[name].append(whole["weights"] == again["weights"] and whole["optimizer"] == again["optimizer"])
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["compare"]:
        rows = compare()
        print(f"{BACKEND}: whether weights and optimizer end the same, bit for bit\n{'':16}{'Keras':8}kopt")
        for name, same in rows.items():
            print(f"{name:16}" + "".join(f"{'same' if one else 'other':8}" for one in same))
        print(f"{'of 8':16}" + "".join(f"{sum(column):<8}" for column in zip(*rows.values(), strict=True)))
    else:
        serve()
