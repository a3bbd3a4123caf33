"""What predictions are worth, beside scikit-learn and SciPy."""

import itertools
import math

import numpy as np
import pytest

from kopt import scores

stats = pytest.importorskip("scipy.stats", reason="SciPy comes with scikit-learn")
optimize = pytest.importorskip("scipy.optimize", reason="SciPy comes with scikit-learn")
metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is an extra")

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 200, 3)) * 2
P = scores.softmax(LOGITS)
LABELS = RNG.integers(0, 3, 200)
JUDGE = scores.Classes(LABELS, 3)
NUMBERS, VALUES = RNG.normal(size=(4, 50, 2)), RNG.normal(size=(50, 2))


def test_scores_of_classes():
    found = JUDGE.scores(P[0])
    assert found["accuracy"] == metrics.accuracy_score(LABELS, P[0].argmax(-1))
    assert math.isclose(found["nll"], metrics.log_loss(LABELS, P[0], labels=[0, 1, 2]))
    off = 0.0
    confidence, right = P[0].max(-1), P[0].argmax(-1) == LABELS
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15 if low < 14 / 15 else confidence >= low)
        off += abs(confidence[inside].sum() - right[inside].sum()) / 200
    assert math.isclose(found["ece"], off)


def test_scores_of_numbers():
    found = scores.Numbers(VALUES).scores(NUMBERS[0])
    assert math.isclose(found["rmse"], metrics.mean_squared_error(VALUES, NUMBERS[0]) ** 0.5)
    assert math.isclose(found["mae"], metrics.mean_absolute_error(VALUES, NUMBERS[0]))
    assert math.isclose(1 - scores.Numbers(VALUES).loss(NUMBERS[0]), metrics.r2_score(
        VALUES, NUMBERS[0], multioutput="variance_weighted"))  # fmt: skip


def test_the_interval_is_wilsons():
    right = int(JUDGE.points(P[0]).sum())
    theirs = stats.binomtest(right, 200).proportion_ci(method="wilson")
    np.testing.assert_allclose(JUDGE.interval(P[0]), theirs, rtol=1e-6)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (7, 7), (12, 3), (0, 30), (900, 1000)])
def test_the_sign_test_is_exact(wins, losses):
    theirs = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert math.isclose(scores.sign_test(wins, losses), theirs, rel_tol=1e-9)
    assert scores.sign_test(wins, losses) == scores.sign_test(losses, wins)


def test_one_beside_another():
    one, other = np.random.default_rng(1).normal(size=(2, 50))
    found = scores.compare(one, other, are_shares=False)
    low, high = stats.norm.interval(0.95, (one - other).mean(), stats.sem(one - other))
    np.testing.assert_allclose([found[k] for k in ("gain", "low", "high")], [(one - other).mean(), low, high])
    assert math.isclose(found["p"], stats.binomtest(int((one > other).sum()), int((one != other).sum())).pvalue)
    assert scores.compare(one[:1], other[:1], are_shares=False)["low"] == -math.inf


@pytest.mark.parametrize("rows", [200, 1])
@pytest.mark.parametrize("against", [0, 1])
def test_shares_beside_each_other(rows, against):
    """Bonett and Price (2012), equation 3; where no row differs, too."""
    one, other = JUDGE.points(P[0])[:rows], JUDGE.points(P[against])[:rows]
    found = scores.compare(one, other, are_shares=True)
    p12, p21 = ((1 + (better > 0).sum()) / (rows + 2) for better in (one - other, other - one))
    half = stats.norm.ppf(0.975) * np.sqrt((p12 + p21 - (p12 - p21) ** 2) / (rows + 2))
    wanted = [(one - other).mean(), p12 - p21 - half, p12 - p21 + half]
    np.testing.assert_allclose([found[k] for k in ("gain", "low", "high")], wanted)
    wins, losses = int((one > other).sum()), int((one < other).sum())
    assert math.isclose(found["p"], stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0)


def test_the_temperature_has_the_least_loss():
    logits = np.random.default_rng(1).normal(size=(300, 4))
    logits[np.arange(300), LABELS.repeat(2)[:300]] += 1
    judge = scores.Classes(LABELS.repeat(2)[:300], 4)
    for scale in (0.3, 1.0, 4.0):
        p = scores.softmax(logits * scale)
        found = judge.temperature(p)
        theirs = optimize.minimize_scalar(
            lambda t, p=p: judge.loss(scores.tempered(p, t)), bounds=(0.05, 20), method="bounded"
        )
        assert math.isclose(found, theirs.x, rel_tol=1e-3)
        assert np.array_equal(scores.tempered(p, found).argmax(-1), p.argmax(-1))


def test_diversity():
    found = JUDGE.diversity(P)
    pairs = list(itertools.combinations(range(4), 2))
    named = P.argmax(-1)
    assert math.isclose(found["disagreement"], np.mean([(named[i] != named[j]).mean() for i, j in pairs]))
    theirs = np.mean([stats.pearsonr(P[i].ravel(), P[j].ravel()).statistic for i, j in pairs])
    assert math.isclose(found["correlation"], theirs)
    assert found["gap"] > 0
    assert math.isclose(scores.Numbers(VALUES).diversity(NUMBERS)["spread"] ** 2, NUMBERS.var(0).mean())
    gap = scores.Numbers(VALUES).diversity(NUMBERS)["gap"]
    assert math.isclose(gap, NUMBERS.var(0).mean())  # the ambiguity decomposition (Krogh and Vedelsby, 1995)


def test_how_any_two_differ():
    """Rows that do not count count for nothing."""
    named, some = P.argmax(-1), np.arange(200) % 3 > 0
    judge = scores.Classes(np.where(some, LABELS, -1), 3)
    np.testing.assert_array_equal(
        judge.differences(P), [[(named[i] != named[j])[some].mean() for j in range(4)] for i in range(4)]
    )
    found = np.array(scores.Numbers(VALUES).differences(NUMBERS))
    for i, j in itertools.product(range(4), repeat=2):
        assert math.isclose(found[i, j], metrics.mean_squared_error(NUMBERS[i], NUMBERS[j]) ** 0.5)
    mean = np.mean([found[i, j] ** 2 for i, j in itertools.product(range(4), repeat=2)])
    assert math.isclose(mean, 2 * NUMBERS.var(0).mean())


def test_nearly_the_same_function():
    alike = scores.softmax(LOGITS[:1] + 0.01 * np.random.default_rng(1).normal(size=(4, 200, 3)))
    assert JUDGE.are_alike(alike)
    assert not JUDGE.are_alike(P)
    judge = scores.Numbers(VALUES)
    assert judge.are_alike(NUMBERS[:1] + 0.01 * np.random.default_rng(1).normal(size=(4, 50, 2)))
    assert not judge.are_alike(NUMBERS)
    perfect = np.eye(3)[LABELS][None].repeat(3, 0)
    assert not JUDGE.are_alike(perfect)  # who is never wrong need not differ


def test_the_entropy():
    np.testing.assert_allclose(scores.entropy(P), stats.entropy(P, axis=-1))
    assert scores.entropy(np.array([0.0, 1.0])) == 0


@pytest.mark.parametrize("seed", range(5))
def test_what_is_chosen_is_never_worse_than_the_best(seed):
    rng = np.random.default_rng(seed)
    members = scores.softmax(rng.normal(size=(5, 60, 3)) * rng.uniform(0.1, 3, size=(5, 1, 1)))
    members[4] = np.nan  # who has failed is not taken
    judge = scores.Classes(rng.integers(0, 3, 60), 3)
    counts = scores.chosen([members], [judge])
    assert counts[4] == 0
    mean = np.average(members[:4], axis=0, weights=counts[:4])
    assert judge.loss(mean) <= min(judge.loss(one) for one in members[:4]) + 1e-12


def test_what_is_chosen_of_two_that_complete_each_other():
    """One is right on the first half and the other on the second; the third is a copy of the first, and worse."""
    labels = np.zeros(10, int)
    good, bad = [0.8, 0.2], [0.4, 0.6]
    members = np.array([[good] * 5 + [bad] * 5, [bad] * 5 + [good] * 5, [bad] * 10])
    assert scores.chosen([members], [scores.Classes(labels, 2)]) == [1, 1, 0]
