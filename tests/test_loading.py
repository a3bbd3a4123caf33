"""`kopt.load_optimizer`: what Keras drops whole because there is more of it in the file."""

import h5py
import keras
import numpy as np
import pytest

import kopt
from kopt.optimizers.loading import load_optimizer
from tests.conftest import BACKEND
from tests.training import AtEpoch, X, Y, equal, network, numpy

Multi, Map, Scaled = keras.optimizers.MultiOptimizer, keras.optimizers.OptimizerMap, keras.optimizers.LossScaleOptimizer


def sgd():
    return keras.optimizers.SGD(0.1, momentum=0.9)


MADE = {
    "stock": lambda: keras.optimizers.Adam(0.1),
    "kopt": lambda: kopt.Adam(0.1),
    "kopt accumulates": lambda: kopt.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2, nonfinite="skip"),
    "scaled": lambda: Scaled(keras.optimizers.Adam(0.1)),
    "scaled kopt": lambda: Scaled(kopt.Adam(0.1)),
    "multi": lambda: Multi(Map(sgd(), {".*head/kernel": keras.optimizers.Adam(0.1), ".*head/bias": sgd()})),
    "mixed": lambda: Multi(Map(kopt.Adam(0.1), {".*head.*": sgd()})),
    "scaled multi": lambda: Scaled(Multi(Map(kopt.Adam(0.1), {".*head.*": sgd()}))),
}
every_made = pytest.mark.parametrize("make", MADE.values(), ids=MADE)


def innermost(optimizer):
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(optimizer, "optimizers", [optimizer])


class Adds(keras.callbacks.Callback):
    """Two more variables in each optimizer for the length of a fit, and a file in the middle of it."""

    def __init__(self, path):
        super().__init__()
        self.path, self.state = path, None

    def set_model(self, model):
        super().set_model(model)
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        for optimizer in innermost(model.optimizer):
            for one in ("one", "two"):
                optimizer.add_variable((2, 3), name=one)

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0:
            self.model.save(self.path) if str(self.path).endswith(".keras") else self.model.save_weights(self.path)
            kept = [v for v in self.model.optimizer.variables if not v.path.endswith(("one", "two"))]
            self.state = numpy(kept)


def written(make, path):
    callback = Adds(path)
    network(make()).fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[callback])
    return callback.state


@every_made
@pytest.mark.parametrize("name", ["model.keras", "all.weights.h5"])
def test_what_keras_drops_is_loaded_bit_for_bit(make, name, tmp_path):
    state = written(make, tmp_path / name)
    model = network(make())
    left = load_optimizer(model, tmp_path / name)
    assert equal(model.optimizer.variables, state)
    assert len(left) == 2 * len(innermost(model.optimizer))
    assert all(entry.startswith("optimizer/") for entry in left)
    model.fit(X, Y, batch_size=8, verbose=0)


def test_keras_itself_drops_it(tmp_path):
    state = written(MADE["stock"], tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer 'adam'"):
        model = keras.models.load_model(tmp_path / "model.keras")
    assert int(numpy([model.optimizer.iterations])[0]) == 0
    assert not any(v.any() for v in numpy(model.optimizer.variables[2:]))
    assert load_optimizer(model, tmp_path / "model.keras") == ["optimizer/vars/10", "optimizer/vars/11"]
    assert equal(model.optimizer.variables, state)
    assert int(state[0]) == 3


@every_made
def test_a_file_without_more_is_loaded_too(make, tmp_path):
    model = network(make())
    model.fit(X, Y, batch_size=8, verbose=0)
    model.save(tmp_path / "model.keras")
    again = network(make())
    assert load_optimizer(again, str(tmp_path / "model.keras")) == []
    assert equal(again.optimizer.variables, model.optimizer.variables)


def test_layers_may_have_other_numbers(tmp_path):
    def numbered():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
        model.compile(kopt.Adam(0.1), loss="mse")
        return model

    model = numbered()
    model.fit(X, Y, batch_size=8, verbose=0)
    model.optimizer.add_variable((), name="one")
    model.save_weights(tmp_path / "all.weights.h5")
    again = numbered()
    assert [entry.split(":")[1] for entry in load_optimizer(again, tmp_path / "all.weights.h5")] == ["one"]
    assert equal(again.optimizer.variables, model.optimizer.variables[:-1])


def test_weights_of_two_bytes(tmp_path):
    if BACKEND == "torch":
        pytest.skip("Keras cannot write bfloat16 on torch")
    keras.config.set_floatx("bfloat16")
    try:
        model = network(keras.optimizers.Adam(0.1))
        model.fit(X, Y, batch_size=8, verbose=0)
        model.optimizer.add_variable((2,))
        model.save_weights(tmp_path / "all.weights.h5")
        again = network(keras.optimizers.Adam(0.1))
        assert len(load_optimizer(again, tmp_path / "all.weights.h5")) == 1
        assert equal(again.optimizer.variables, model.optimizer.variables[:-1])
    finally:
        keras.config.set_floatx("float32")


def refused(model, path, match):
    model.optimizer.build(model.trainable_variables)
    before = numpy(model.optimizer.variables)
    with pytest.raises(ValueError, match=match):
        load_optimizer(model, path)
    assert equal(model.optimizer.variables, before)


def wider(optimizer):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5, name="body"), keras.layers.Dense(2, name="head")]
    )
    model.compile(optimizer, loss="mse")
    return model


@every_made
def test_another_model_is_refused_and_nothing_is_assigned(make, tmp_path):
    written(make, tmp_path / "model.keras")
    refused(wider(make()), tmp_path / "model.keras",
            r"does not fit '.*head.kernel.* has shape \(5, 2\) here and \(3, 2\) in the file")  # fmt: skip


def test_another_optimizer_is_refused(tmp_path):
    for name, make in MADE.items():
        written(make, tmp_path / f"{name}.keras")
    plain = "momentum.* has shape .* here and .*in the file"
    refused(network(MADE["stock"]()), tmp_path / "scaled.keras", plain)
    refused(network(MADE["stock"]()), tmp_path / "kopt.keras", "iteration .*is not in the file")
    refused(network(MADE["kopt"]()), tmp_path / "stock.keras", "another kind of optimizer")
    refused(network(kopt.SGD(momentum=0.9)), tmp_path / "kopt.keras", "momentum is not in the file")
    refused(network(MADE["scaled"]()), tmp_path / "stock.keras", "step_counter .* has shape")
    refused(
        network(MADE["multi"]()), tmp_path / "stock.keras", "no state of the optimizer '.*' at 'optimizer/optimizers/"
    )


def test_files_that_are_none(tmp_path):
    model, path = network("adam"), tmp_path / "all.weights.h5"
    with pytest.raises(FileNotFoundError):
        load_optimizer(model, path)
    network("sgd").save_weights(path)
    whole = path.read_bytes()
    with h5py.File(path, "a") as file:
        del file["optimizer"]
    refused(model, path, "There is no state of the optimizer 'adam' at 'optimizer' in")
    for content in (b"", b"text", whole[: len(whole) // 2], b"PK\x03\x04" + whole):
        path.write_bytes(content)
        refused(model, path, "is no `.keras` or `.weights.h5` file that can be read")
    written(MADE["stock"], tmp_path / "model.keras")
    content = bytearray((tmp_path / "model.keras").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "model.keras").write_bytes(content)
    refused(model, tmp_path / "model.keras", "can(not)? be read")


def linked(file):
    return {
        "external link": lambda: h5py.ExternalLink("/etc/passwd", "/"),
        "soft link": lambda: h5py.SoftLink("/optimizer/vars/1"),
        "text": lambda: "text",
        "pickle": lambda: np.array([b"cos\nsystem"], "S"),
    }


@pytest.mark.parametrize("what", linked(None))
@pytest.mark.parametrize("place", ["optimizer/vars/4", "optimizer/vars", "optimizer"])
def test_nothing_outside_the_file_is_read(what, place, tmp_path):
    path = tmp_path / "all.weights.h5"
    written(MADE["stock"], path)
    with h5py.File(path, "a") as file:
        del file[place]
        file[place] = linked(file)[what]()
    refused(network("adam"), path, "cannot be read: .*is no|is not an array of numbers")


@pytest.mark.parametrize("kind", ["external", "virtual", "huge", "complex", "name"])
def test_arrays_that_are_none(kind, tmp_path):
    path = tmp_path / "all.weights.h5"
    written(MADE["stock"], path)
    with h5py.File(path, "a") as file:
        entries = file["optimizer/vars"]
        del entries["2"]
        if kind == "external":
            entries.create_dataset("2", (4, 3), "f4", external=[("/etc/hostname", 0, 48)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((4, 3), "f4")
            layout[:] = h5py.VirtualSource("/etc/hostname", "x", (4, 3))
            entries.create_virtual_dataset("2", layout)
        elif kind == "huge":
            entries.create_dataset("2", (10**9, 10**9), "f4", chunks=(1, 1))
        elif kind == "complex":
            entries["2"] = np.full((4, 3), 1j)
        else:
            entries["two"] = np.ones((4, 3))
    refused(network("adam"), path, "not an array of numbers|has shape|is not in the file|cannot be read")


def test_models_that_are_not_ready(tmp_path):
    written(MADE["stock"], tmp_path / "model.keras")
    lazy = keras.Sequential([keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="^`model` must be compiled with an optimizer"):
        load_optimizer(lazy, tmp_path / "model.keras")
    lazy.compile("adam")
    with pytest.raises(ValueError, match="^`model` must be built"):
        load_optimizer(lazy, tmp_path / "model.keras")


def test_in_a_fit(tmp_path):
    """Through `self.model`, as AtEpoch does it."""
    state = written(MADE["stock"], tmp_path / "model.keras")
    model = network(MADE["stock"]())

    def load(model):
        load_optimizer(model, tmp_path / "model.keras")
        assert equal(model.optimizer.variables, state)

    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[AtEpoch(1, load)])
    assert int(numpy([model.optimizer.iterations])[0]) == 6
