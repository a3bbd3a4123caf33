"""What the constructors refuse, and in which words."""

import re

import keras
import numpy as np
import pytest

import kopt
from tests.catalog import CLASSES

MESSAGES = [
    (lambda: kopt.Adam(beta_1=1.2), "`beta_1` must be a number in [0, 1). Received: beta_1=1.2"),
    (
        lambda: kopt.Adam(beta_1=0.9999999999),
        "`beta_1` must be a number in [0, 1), also when rounded to float32. Received: beta_1=0.9999999999",
    ),
    (lambda: kopt.Adam(lr=0.1), "`Adam` has no argument `lr`. Did you mean `learning_rate`? Received: lr=0.1"),
    (lambda: kopt.RMSprop(alpha=1), "`RMSprop` has no argument `alpha`. Did you mean `rho`? Received: alpha=1"),
    (lambda: kopt.SGD(momentun=1), "`SGD` has no argument `momentun`. Did you mean `momentum`? Received: momentun=1"),
    (
        lambda: kopt.SGD(0.1, 0.9, form="torch"),
        "`form` must be one of 'velocity', 'gradient', 'average'. Received: form='torch'",
    ),
    (lambda: kopt.SGD(nesterov=True), "`nesterov` must be False without `momentum`. Received: nesterov=True"),
    (
        lambda: kopt.SGD(lambda step: 0.1),
        "`learning_rate` must be a finite number of 0 or more, a LearningRateSchedule, or a callable that takes no "
        "argument. Received: learning_rate=<function <lambda>",
    ),
]


@pytest.mark.parametrize(("make", "message"), MESSAGES, ids=range(len(MESSAGES)))
def test_the_message_says_what_is_allowed_and_what_came(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()


def test_an_unknown_name_that_is_like_none_gets_the_list():
    with pytest.raises(ValueError, match="`SGD` has no argument `eps`. It takes `learning_rate`, `momentum`, "):
        kopt.SGD(eps=1)


def test_arguments_are_judged_together_when_assigned():
    with pytest.raises(ValueError, match=r"^`nesterov` must be False without `momentum`. Received: nesterov=True$"):
        kopt.SGD().nesterov = True
    optimizer = kopt.SGD(momentum=0.9, nesterov=True)
    with pytest.raises(ValueError, match=r"^`nesterov` must be False without `momentum`."):
        optimizer.momentum = 0.0
    with pytest.raises(ValueError, match=r"^`exclude_from_decay` must be None without `weight_decay` or `l2`."):
        kopt.SGD().exclude_from_weight_decay(var_names=["bias"])
    optimizer = kopt.Adam(clipnorm=1.0)
    with pytest.raises(ValueError, match=r"^`clipvalue` must be None beside `clipnorm`. Received: clipvalue=1.0$"):
        optimizer.clipvalue = 1.0
    optimizer.build([keras.Variable(np.ones(2))])
    optimizer.clipnorm = 2.0
    with pytest.raises(ValueError, match=r"^`nonfinite` must be as it was at build, 'apply': .* nonfinite='skip'$"):
        optimizer.nonfinite = "skip"


def test_the_base_is_not_an_optimizer():
    with pytest.raises(TypeError, match="no rule of its own"):
        kopt.Optimizer(0.1)


@pytest.mark.parametrize("row", CLASSES, ids=str)
def test_numbers_of_any_library_are_taken(row):
    for one in (1, 1.0, np.float64(1), np.float32(1), np.int32(1), np.array(1), keras.ops.convert_to_tensor(1.0)):
        config = row.make(learning_rate=one, l2=one, clipnorm=one).get_config()
        assert [type(config[name]) for name in ("learning_rate", "l2", "clipnorm")] == [float] * 3
        assert config["learning_rate"] == 1.0


def test_sixteen_bits_do_not_round_hyperparameters():
    keras.config.set_floatx("bfloat16")
    try:
        optimizer = kopt.Adam(1e-3)
    finally:
        keras.config.set_floatx("float32")
    assert optimizer.beta_2 == 0.999
    assert optimizer.get_config()["learning_rate"] == 1e-3
    assert len(optimizer.variables) == 5
