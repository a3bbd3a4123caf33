import keras
import numpy as np
import pytest
from keras import ops

import kopt
from kopt import numerics
from tests.conftest import FLOATX


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.995, 0.999, 0.99999])
def test_bias_correction_keeps_its_digits(beta):
    for t in (1, 2, 3, 10, 1000, 10**6):
        exact = float(1 - np.longdouble(beta) ** t)
        assert numerics.bias_correction(beta, t) == pytest.approx(exact, rel=1e-12)
        held = float(np.asarray(beta, FLOATX))
        exact = float(1 - np.longdouble(held) ** t)
        ours = numerics.bias_correction(ops.convert_to_tensor(beta, FLOATX), ops.convert_to_tensor(t, FLOATX))
        assert float(ours) == pytest.approx(exact, rel=1e-6)


def test_average_is_its_definition():
    values = np.random.default_rng(0).normal(size=(50, 2))
    for beta in (0.0, 0.5, 0.9, 0.98):
        weights = np.array([[(1 - beta) * beta ** (t - i) if i <= t else 0.0 for i in range(50)] for t in range(50)])
        plain = kopt.exponentially_weighted_average(values, beta, bias_correction=False)
        np.testing.assert_allclose(plain, weights @ values, rtol=1e-12, atol=1e-15)
        corrected = kopt.exponentially_weighted_average(values, beta)
        np.testing.assert_allclose(corrected, weights @ values / weights.sum(1, keepdims=True), rtol=1e-10)


def test_average_of_a_constant_is_the_constant():
    np.testing.assert_allclose(kopt.exponentially_weighted_average([3.0] * 5), 3.0)
    assert kopt.exponentially_weighted_average([3.0] * 5, bias_correction=False)[0] == pytest.approx(0.3)


def test_average_by_window():
    values = np.arange(10.0)
    by_window, by_beta = (kopt.exponentially_weighted_average(values, **how) for how in ({"window": 10}, {"beta": 0.9}))
    np.testing.assert_allclose(by_window, by_beta)
    assert kopt.exponentially_weighted_average([]).shape == (0,)
    assert kopt.exponentially_weighted_average(keras.ops.ones(3)).tolist() == pytest.approx([1, 1, 1])
    assert np.isnan(kopt.exponentially_weighted_average([1.0, np.nan, 1.0])).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"beta": 1.0}, "beta"),
        ({"beta": "x"}, "beta"),
        ({"window": 0.5}, "window"),
        ({"beta": 0.5, "window": 2}, "window"),
        ({"bias_correction": 1}, "bias_correction"),
    ],
)
def test_average_refuses(arguments, name):
    with pytest.raises(ValueError, match=rf"`{name}`.*Received: .*{name}="):
        kopt.exponentially_weighted_average([1.0], **arguments)
    with pytest.raises(ValueError, match=r"`values` must be a series"):
        kopt.exponentially_weighted_average(1.0)


@pytest.mark.parametrize("values", ["abc", [1j], [None, 1.0], {1.0, 2.0}, ["1"], 3.0])
def test_average_refuses_what_is_no_series(values):
    with pytest.raises(ValueError, match="^`values` must be a series of real numbers.* Received: values="):
        kopt.exponentially_weighted_average(values)


def test_bias_correction_takes_counts_of_any_kind():
    for t in (2, 2.0, ops.convert_to_tensor(2), ops.convert_to_tensor(2.0)):
        assert float(numerics.bias_correction(ops.convert_to_tensor(0.5), t)) == pytest.approx(0.75)
        assert float(numerics.bias_correction(0.5, t)) == pytest.approx(0.75)
