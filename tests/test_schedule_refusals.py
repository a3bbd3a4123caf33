"""What schedules cannot do in a `fit`: refused before the first step; and epochs that do not say how long they are."""

import keras
import numpy as np
import pytest

import kopt
import kopt.callbacks as kc
import kopt.schedules as ks
from tests.catalog import STEPS
from tests.conftest import BACKEND
from tests.test_schedule_callbacks import RATE, cosine, near, weigh, weighing


def generated(steps, rounds=1):
    rows = np.eye(STEPS, dtype="float32")
    for _ in range(rounds):
        for i in range(steps):
            yield rows[[i, i]], np.zeros((2, 1), "float32")


def unsized():
    """A dataset of seven batches that does not say how many it has."""
    import tensorflow as tf

    rows = tf.data.Dataset.from_tensor_slices((np.eye(7, STEPS, dtype="float32"), np.zeros((7, 1), "float32")))
    return rows.repeat(2).batch(2).filter(lambda x, y: True)


def fit_unsized(callbacks, **arguments):
    model = weighing(keras.optimizers.SGD(1.0))
    history = model.fit(unsized(), shuffle=False, verbose=0, callbacks=callbacks, **arguments)
    return history.history


@pytest.mark.skipif(BACKEND == "torch", reason="torch's trainer reads the dataset as JAX's does")
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_epochs_of_unknown_length_are_counted_all_the_same():
    monitor = kc.RateMonitor(capacity=9)
    history = fit_unsized([kc.StepDecay(0.5, every_epochs=1), monitor], epochs=3)
    near(history["learning_rate"], [1.0, 0.5, 0.25])
    near(monitor.history["learning_rate"], np.repeat([1.0, 0.5, 0.25], 7))
    near(fit_unsized([kc.InverseTimeDecay(1.0)], epochs=4, initial_epoch=2)["learning_rate"], [1 / 3, 1 / 4])
    near(fit_unsized([kc.Staircase([2], [0.1], per="step")], epochs=1)["learning_rate"], [0.1])
    for callbacks, says in (
        ([kc.CosineDecay()], "CosineDecay.* give `fit` `steps_per_epoch`"),
        ([kc.WarmUp(epochs=1)], "WarmUp.* give `fit` `steps_per_epoch`"),
        ([kc.RateMonitor()], "`capacity` must be given"),
        ([kc.RateMonitor(capacity=3)], "`capacity` must be no less than the updates of an epoch, which were 7"),
    ):
        with pytest.raises(ValueError, match=says):
            fit_unsized(callbacks)
    with pytest.raises(ValueError, match="`initial_epoch` must be 0 for schedules that count steps"):
        fit_unsized([kc.Staircase([2], [0.1], per="step")], epochs=3, initial_epoch=1)


def test_steps_per_epoch_says_how_long_an_endless_epoch_is():
    model = weighing(keras.optimizers.SGD(RATE))
    data = generated(STEPS, 9)
    model.fit(data, steps_per_epoch=5, epochs=4, shuffle=False, verbose=0, callbacks=[kc.CosineDecay()])
    near(-model.get_weights()[0][:, 0], RATE * cosine(range(STEPS), STEPS))


REFUSED = {
    "longer than the fit": (
        kopt.SGD,
        {},
        lambda: kc.WarmUp(epochs=9),
        r"WarmUp\(epochs=9\) takes 45 batches.* only 20",
    ),
    "in steps": (kopt.SGD, {}, lambda: kc.WarmUp(steps=21), r"takes 21 batches.* only 20"),
    "nothing left": (
        kopt.SGD,
        {},
        lambda: kc.Schedule("learning_rate", ks.WarmUp(epochs=4) >> ks.CosineDecay()),
        "leaves no time for its last part",
    ),
    "no room for two": (
        kopt.SGD,
        {},
        lambda: kc.Schedule("learning_rate", ks.WarmUpStableDecay(warmup_epochs=2, decay_epochs=3)),
        "takes 25 batches",
    ),
    "unknown": (
        kopt.SGD,
        {},
        lambda: kc.Schedule("beta_1", ks.Linear()),
        r"this SGD can change during `fit` \(learning_rate, momentum\).*='beta_1'",
    ),
    "no number": (kopt.SGD, {}, lambda: kc.Schedule("weight_decay", ks.Linear()), "this SGD"),
    "no slot": (kopt.SGD, {}, kc.MomentumAnneal, "built with momentum=0"),
    "fixed by Keras": (keras.optimizers.SGD, {"momentum": 0.9}, kc.MomentumAnneal, "use kopt.SGD"),
    "fixed by Keras too": (keras.optimizers.RMSprop, {}, lambda: kc.OneCycle(1.0), "use kopt.RMSprop"),
    "unknown to Keras": (keras.optimizers.Adam, {}, lambda: kc.Schedule("rho", ks.Linear()), "this Adam"),
    "no momentum": (kopt.Adagrad, {}, lambda: kc.OneCycle(1.0), "this Adagrad"),
    "beyond": (
        kopt.SGD,
        {"momentum": 0.9},
        lambda: kc.Schedule("momentum", ks.Linear(0.5, 1.0, initial=1.1)),
        r"`momentum` must be a number in \[0, 1\)",
    ),
    "beyond by two factors": (
        keras.optimizers.Adam,
        {},
        lambda: [kc.Schedule("beta_1", ks.Constant(1.06), name=name) for name in ("one", "other")],
        r"`beta_1` must be a number in \[0, 1\)",
    ),
    "no weight decay": (keras.optimizers.Adam, {}, lambda: kc.RateMonitor("weight_decay"), "`hyperparameters` must be"),
    "too small": (kopt.SGD, {}, lambda: kc.RateMonitor(capacity=3), "no less than the 5 updates of an epoch"),
    "beyond by a factor": (
        keras.optimizers.Adam,
        {},
        lambda: kc.Schedule("beta_1", ks.Linear(1.0, 2.0)),
        r"`beta_1` must be a number in \[0, 1\)",
    ),
    "too low": (kopt.SGD, {}, lambda: kc.CyclicalRate(0.1, cycle_epochs=2), "at least the lowest value, which is 0.5"),
    "monitored": (kopt.SGD, {}, lambda: kc.RateMonitor("rho"), "`hyperparameters` must be of those of this SGD"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_a_step(case):
    cls, arguments, callback, says = REFUSED[case]
    model = weighing(cls(RATE, **arguments))
    with pytest.raises(ValueError, match=says):
        weigh(model, keras.tree.flatten(callback()))
    assert int(model.optimizer.iterations) == 0
    assert not model.get_weights()[0].any()
    assert float(model.optimizer.learning_rate) == RATE
    assert "apply" not in vars(model.optimizer)
    weigh(model, [kc.CosineDecay()])
