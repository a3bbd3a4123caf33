"""The plan of a search for a learning rate, on functions that stand for trainings."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kopt.tuner import plan
from kopt.tuner.arm import Arm, Item, Outcome

STAGES = (9, 1), (5, 3), (3, 10)
EXPLODED = Outcome(3.0, diverged=True, untrained=1.0)
FAILED = Outcome(math.inf, failed=True)
DEFAULTS = {"low": 1e-6, "high": 10.0, "stages": STAGES, "confirm": 3, "range_test": False}
KINDS = "stage 1", "stage 2", "stage 3"


def search(world, **given):
    """The answer of a search, what was tried as pairs of an item and its outcome, and what was said."""
    notes, tried, found = [], [], None
    course = plan.course(plan.Settings(**DEFAULTS | given), notes.append)
    while True:
        try:
            batch = course.send(found)
        except StopIteration as end:
            return end.value, tried, notes
        found = [world(item) for item in batch]
        tried += zip(batch, found, strict=True)
        assert len(tried) < 1000


def rates(tried, kind) -> list[float]:
    return [item.learning_rate for item, _ in tried if item.kind == kind]


def noise(item, size) -> float:
    return math.exp(size * np.random.default_rng([item.seed, int(item.learning_rate * 1e9)]).normal())


LIMIT, FASTEST = 2 / 20, 2 / 21
TOO_LOW, TOO_HIGH = (1e-5, 1e-3), (10.0, 1000.0)  # 100 times


def quadratic(item, spread=0.0):
    """Gradient descent, 50 steps an epoch, with curvatures of 20 and 1: stable below 2 / 20, and fastest at 2 / 21."""
    factors = [max(abs(1 - item.learning_rate * curvature), 1e-9) for curvature in (20, 1)]
    loss = sum(math.exp(min(100 * item.epochs * math.log(factor), 9)) for factor in factors) / 2
    return Outcome(loss * noise(item, spread), untrained=1.0) if loss <= 3 else EXPLODED


def bowl(item, best=1e-3, cliff=math.inf, spread=0.0, width=1.0):
    """A score of 0.2 at the best rate, and of 1, untrained, far away from it."""
    if item.learning_rate >= cliff:
        return EXPLODED
    score = 1 - 0.8 * math.exp(-((math.log10(item.learning_rate / best) / width) ** 2))
    return Outcome(score * noise(item, spread), untrained=1.0)


def at(**arguments):
    return functools.partial(bowl, **arguments)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("low", "high"), [(1e-6, 10.0), (1e-3, 1.0), TOO_LOW, TOO_HIGH])
def test_finds_the_limit_of_stability(low, high, seed):
    answer, _, _ = search(quadratic, low=low, high=high, seed=seed)
    assert answer.stable_max < 1.02 * LIMIT < 1.04 * answer.cliff  # 100 steps do not tell 1.01 from the limit
    assert answer.cliff / answer.stable_max <= plan.GAP
    assert math.sqrt(answer.cliff * answer.stable_max) == pytest.approx(LIMIT, rel=0.1)


@pytest.mark.parametrize("spread", [0.0, 0.05])
@pytest.mark.parametrize(("low", "high"), [(1e-3, 1.0), TOO_LOW, TOO_HIGH])
def test_a_range_that_is_far_off_recovers(low, high, spread):
    for seed in range(10):
        answer, _, notes = search(functools.partial(quadratic, spread=spread), low=low, high=high, seed=seed)
        assert FASTEST / 2 < answer.learning_rate < LIMIT
        assert notes or low == 1e-3


def test_each_stage_is_finer():
    errors, widths = [], []
    for seed in range(20):
        answer, tried, _ = search(at(best=0.02, cliff=0.1), seed=seed)
        widths.append([np.ptp(np.log10(rates(tried, kind))) for kind in KINDS])
        errors.append(abs(math.log10(answer.learning_rate / 0.02)))
    first, second, third = np.median(widths, 0)  # now and then a stage widens
    assert first > 3 * second > 3 * third
    assert np.mean(errors) < 0.1
    assert max(errors) < 0.2


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_a_best_that_falls_with_the_length(power):
    def world(item):
        return bowl(item, best=0.1 / max(item.epochs, 1) ** power, cliff=0.4, spread=0.01, width=0.7)

    errors = [abs(math.log10(search(world, seed=seed)[0].learning_rate / 0.1) + power) for seed in range(20)]
    assert np.mean(errors) < 0.15


def test_all_diverge():
    answer, tried, notes = search(lambda item: EXPLODED)
    assert answer == plan.Answer(cliff=min(rates(tried, "stage 1")))
    assert [len(notes), len(tried)] == [4, 9 + 5 + 5]
    assert notes[0] == "From 1e-06 to 10 all have diverged: down to 1e-08."
    assert notes[2] == "From 1e-10 to 10 all have diverged, and the range is not widened any more."
    assert notes[3].startswith("Every learning rate of stage 1 has diverged or failed")
    assert min(rates(tried, "stage 1")) < 1e-9


def test_scores_of_trainings_that_diverged_say_nothing():
    """A penalty that hangs on chance must not tell the way to go."""

    def world(item):
        return dataclasses.replace(EXPLODED, score=noise(item, 3.0))

    _, tried, notes = search(world)
    assert max(rates(tried, "stage 1")) < 10
    assert not any("highest" in note for note in notes)


def test_none_moves():
    answer, tried, notes = search(lambda item: Outcome(1.0 + 1e-3 * noise(item, 1), untrained=1.0), low=1e-8, high=1e-6)
    assert notes[:2] == [
        "From 1e-08 to 1e-06 none has moved the model: up to 0.0001.",
        "From 1e-08 to 0.0001 none has moved the model: up to 0.01.",
    ]
    assert max(rates(tried, "stage 1")) > 1e-3
    assert answer.cliff is None
    assert answer.learning_rate is not None


def test_a_model_that_nobody_knows_untrained_is_not_flat():
    _, _, notes = search(lambda item: dataclasses.replace(bowl(item), untrained=None))
    assert not any("moved" in note for note in notes)


@pytest.mark.parametrize("best", [1e-9, 1e-8, 30.0, 1000.0])
def test_the_best_at_an_edge(best):
    for seed in range(5):
        answer, _, notes = search(at(best=best, width=3.0), seed=seed)
        assert best / 2 < answer.learning_rate < best * 2
        assert ("lowest" if best < 1 else "highest") in notes[0]


def test_the_best_between_what_rests_and_what_explodes():
    """The first stage has nothing in a window of a third of a decade: noise decides nothing there."""

    def world(item):
        moves = item.learning_rate > 0.05
        return (
            Outcome((0.1 if moves else 1.0) * noise(item, 1e-3), untrained=1.0)
            if item.learning_rate < 0.1
            else EXPLODED
        )

    found = [search(world, seed=seed)[0].learning_rate for seed in range(40)]
    assert all(0.05 < rate < 0.1 for rate in found)


@pytest.mark.parametrize("seed", range(5))
def test_longer_trainings_look_further_down_and_at_the_best_again(seed):
    """The best rate falls as trainings get longer: the way that weights go is the same."""
    answer, tried, _ = search(lambda item: bowl(item, best=0.01 / item.epochs), seed=seed)
    assert 0.0005 < answer.learning_rate < 0.002
    for before, kind in itertools.pairwise(KINDS):
        (again,) = set(rates(tried, before)) & set(rates(tried, kind))
        assert min(rates(tried, kind)) < again / 2


def test_a_cliff_above_is_no_reason_to_widen():
    for seed in range(10):
        _, tried, _ = search(at(best=1.0, cliff=0.5), seed=seed)
        end = min(item.learning_rate for item, outcome in tried if item.kind == "stage 1" and outcome.diverged)
        assert max(item.learning_rate for item, _ in tried if item.kind != "stage 1") <= end


@pytest.mark.parametrize("best", [-1, 1])
def test_scores_that_are_equal_tell_no_direction_down(best):
    """As an accuracy that no rate of the first range changes, where nobody knows the untrained one."""
    _, tried, notes = search(lambda item: Outcome(best * 0.5), low=1e-9, high=1e-7)
    assert "none has moved the model: up" in notes[0]
    assert min(rates(tried, "stage 1")) > 1e-9
    _, _, notes = search(lambda item: Outcome(0.5 if item.epochs > 1 else bowl(item, best=1e-2).score, untrained=1.0))
    assert not any("down" in note for note in notes)  # a later stage has found where nothing can be told apart


def test_failing_trials():
    def world(item):
        return FAILED if 1e-4 < item.learning_rate < 4e-4 else bowl(item)

    answer, tried, _ = search(world)
    assert 4e-4 < answer.learning_rate < 2e-3
    assert any(outcome.failed for _, outcome in tried)

    answer, tried, notes = search(lambda item: FAILED)
    assert answer == plan.Answer()
    assert [len(tried), len(notes)] == [9, 1]  # failures tell no direction


def test_failures_do_not_hide_the_cliff():
    answer, tried, _ = search(lambda item: FAILED if item.kind == "cliff" else bowl(item, cliff=0.01))
    assert len(rates(tried, "cliff")) == 1
    assert answer.cliff >= 0.01


def test_a_score_that_is_no_number_ends_the_search_for_the_cliff():
    answer, tried, _ = search(lambda item: Outcome(math.nan) if item.kind == "cliff" else bowl(item, cliff=0.01))
    assert len(rates(tried, "cliff")) == 1
    assert answer.learning_rate < 0.01


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_half_of_the_batch_sizes_survive_each_stage(count):
    sizes = tuple(2**i for i in range(count))
    left = [count, math.ceil(count / 2), math.ceil(math.ceil(count / 2) / 2)]

    def world(item):  # the larger the batch the better, and the best rate in proportion
        return dataclasses.replace(bowl(item, best=1e-4 * item.batch_size), score=1 - 0.01 * item.batch_size)

    answer, tried, _ = search(world, batch_sizes=sizes)
    seen = [{item.batch_size for item, _ in tried if item.kind == kind} for kind in KINDS]
    assert [len(some) for some in seen] == left
    assert seen[1] == set(sizes[-left[1] :])
    assert answer.batch_size == sizes[-1]
    confirmed = {item.batch_size for item, _ in tried if item.kind in ("confirm", "cliff")}
    assert confirmed == {sizes[-1]}


def test_a_batch_size_that_always_diverges_is_out():
    def world(item):
        return EXPLODED if item.batch_size == 8 else bowl(item, cliff=0.1)

    answer, tried, _ = search(world, batch_sizes=(8, 16))
    assert answer.batch_size == 16
    assert not [item for item, _ in tried if item.batch_size == 8 and item.kind != "stage 1"]
    assert answer.cliff < 0.2  # of 16 alone


def test_arms_have_rates_of_their_own():
    _, tried, _ = search(bowl, batch_sizes=(8, 16))
    first = [{item.learning_rate for item, _ in tried if item.batch_size == size} for size in (8, 16)]
    assert not first[0] & first[1]


def test_max_widen():
    for times in (0, 1, 3):
        _, tried, notes = search(lambda item: EXPLODED, max_widen=times)
        assert len(tried) == 9 + 5 * times
        assert len(notes) == times + 2
        assert min(rates(tried, "stage 1")) > 1e-6 / 100**times


@pytest.mark.parametrize("best", [1e-9, 1e4])
def test_a_range_that_must_not_widen_is_kept(best):
    _, tried, _ = search(at(best=best, width=4.0), max_widen=0)
    assert all(1e-6 <= item.learning_rate <= 10 for item, _ in tried)


def test_without_confirmation():
    answer, tried, _ = search(at(cliff=0.1), confirm=0)
    assert rates(tried, "confirm") == []
    best = min((outcome.score, item.learning_rate) for item, outcome in tried if item.kind == "stage 3")
    assert (answer.score, answer.learning_rate) == best
    assert answer.error is None
    assert answer.interval[0] <= answer.learning_rate <= answer.interval[1]


def test_confirmation_has_fresh_seeds_that_rates_share():
    _, tried, _ = search(at(cliff=0.1), confirm=4, top=2)
    confirmed = [item for item, _ in tried if item.kind == "confirm"]
    by_rate = {
        rate: [item.seed for item in confirmed if item.learning_rate == rate] for rate in rates(tried, "confirm")
    }
    assert len(by_rate) == 2
    seeds = next(iter(by_rate.values()))
    assert all(some == seeds for some in by_rate.values())
    assert len(set(seeds)) == 4
    others = {item.seed for item, _ in tried if item.kind != "confirm"}
    assert len(others) == 3  # one for each stage
    assert not others & set(seeds)
    assert {item.epochs for item in confirmed} == {10}


def test_a_rate_that_diverges_with_a_fresh_seed_is_out():
    """Half of the best is next where all do."""

    def world(item, limit=5e-4):
        return EXPLODED if item.kind == "confirm" and item.learning_rate > limit else bowl(item)

    answer, tried, notes = search(world)
    lowest = min(rate for rate in rates(tried, "confirm") if rate > 5e-4)
    assert answer.learning_rate == pytest.approx(lowest / 2)
    assert any("half of the lowest is next" in note for note in notes)
    assert answer.cliff <= lowest  # what diverged with a fresh seed counts
    assert answer.stable_max < answer.cliff

    answer, tried, notes = search(functools.partial(world, limit=0.0))
    assert answer.learning_rate is None
    assert answer.score is None
    assert notes[-1] == "No rate could be confirmed: all diverge or fail with some seed."
    assert len(rates(tried, "confirm")) == 3 * (2 + plan.RETREATS)


def test_one_seed_of_three_that_diverges_is_enough():
    def world(item):
        seeds = plan.Settings(**DEFAULTS).fresh_seeds()
        return EXPLODED if item.seed == seeds[2] and item.learning_rate > 9e-4 else bowl(item)

    answer, _, _ = search(world)
    assert answer.learning_rate <= 9e-4


def test_the_best_at_the_edge_of_stability_is_not_trusted():
    """A rate that is best among its neighbours, which diverge above it, is confirmed as well."""

    def world(item):
        if item.learning_rate >= 0.1 or (item.kind == "confirm" and item.learning_rate > 0.06):
            return EXPLODED
        return Outcome(1 - item.learning_rate, untrained=1.0)

    for seed in range(10):
        answer, tried, _ = search(world, low=1e-3, high=1.0, stages=((6, 1), (6, 1)), seed=seed)
        assert 0.02 < answer.learning_rate <= 0.06
        assert answer.interval[1] < answer.cliff
        assert answer.learning_rate == min(rates(tried, "confirm"))


def test_a_lucky_training_near_the_cliff_is_seen_with_its_neighbours():
    def world(item):
        is_near = 0.05 < item.learning_rate < 0.1
        is_lucky = is_near and item.kind != "confirm" and item.epochs == 10
        return bowl(item, best=0.02, cliff=0.1, spread=0.0 if is_lucky else 0.9 if is_near else 0.05)

    found = [search(world, seed=seed)[0].learning_rate for seed in range(20)]
    assert max(found) < 0.05


def test_the_lowest_within_a_standard_error():
    """Of two rates that are as good the lower, of others the better; what seeds have in common is no error."""

    def answers(lower, spread, common=0.0):
        def world(item):
            if item.kind != "confirm":
                return bowl(item)
            place = plan.Settings(**DEFAULTS).fresh_seeds().index(item.seed)
            score = lower + spread * (place - 1) if item.learning_rate == low else 0.2
            return Outcome(score + common * (place - 1), untrained=1.0)

        _, tried, _ = search(bowl)
        low, high = sorted(set(rates(tried, "confirm")))
        return search(world)[0], low, high

    answer, low, high = answers(0.25, 0.1)  # the standard error is 0.1 / sqrt(3)
    assert answer.learning_rate == low
    assert answer.error == pytest.approx(0.1 / math.sqrt(3))
    assert answer.score == pytest.approx(0.25)
    assert answer.interval[0] <= low < high <= answer.interval[1]
    answer, low, high = answers(0.27, 0.1)
    assert answer.learning_rate == high
    assert answer.interval[0] > low
    answer, low, high = answers(0.21, 0.0, common=0.1)
    assert answer.learning_rate == high
    assert answers(0.19, 0.0)[0].learning_rate == low


def test_confirmation_with_one_seed():
    answer, tried, _ = search(at(spread=0.1), confirm=1)
    assert len(rates(tried, "confirm")) == 2
    assert answer.error is None


@pytest.mark.parametrize("found", [
    ({"suggestion": 0.01, "diverged_at": 1.0}, (1e-4, 1.0)),
    ({"suggestion": 0.01, "diverged_at": 0.002}, (2e-5, 0.002)),
    ({"suggestion": None, "diverged_at": 1.0}, (1e-6, 1.0)),
    ({"suggestion": 1e-7, "diverged_at": None}, (1e-6, 10.0)),
    ({"suggestion": 5.0, "diverged_at": None}, (0.05, 10.0)),
    ({"suggestion": None, "diverged_at": None}, (1e-6, 10.0)),
    ({"suggestion": 1e-3, "diverged_at": 100.0}, (1e-5, 10.0)),
    ({"failed": True}, (1e-6, 10.0)),
])  # fmt: skip
def test_what_the_range_test_leaves(found):
    told, (low, high) = found

    def world(item):
        return (
            Outcome(3.0, untrained=1.0, **told) if item.kind == "range test" else bowl(item, best=math.sqrt(low * high))
        )

    _, tried, notes = search(world, range_test=True)
    assert tried[0][0].kind == "range test"
    assert tried[0][0].epochs == 0
    assert notes[0] == f"The range test leaves {low:.2g} to {high:.2g}."
    assert low < min(rates(tried, "stage 1"))
    assert max(rates(tried, "stage 1")) < high
    _, tried, notes = search(world, range_test=True, batch_sizes=(4, 8))
    assert [item.batch_size for item, _ in tried if item.kind == "range test"] == [4, 8]
    assert notes[0].endswith("(batch size 4).")


def test_a_range_test_that_explodes_at_once():
    """It leaves next to nothing, which widens."""

    def world(item):
        found = {"suggestion": None, "diverged_at": 10.2}
        return Outcome(3.0, untrained=1.0, **found) if item.kind == "range test" else quadratic(item)

    answer, _, _ = search(world, low=10.0, high=1000.0, range_test=True, max_widen=3)
    assert FASTEST / 2 < answer.learning_rate < LIMIT


def test_same_outcomes_same_way():
    world = at(cliff=0.02, spread=0.1)
    first, second = search(world, seed=3), search(world, seed=3)
    assert first == second
    assert search(world, seed=4)[1] != first[1]


def test_a_replay_goes_on_where_it_was():
    """What is known is told again, and from anywhere the same follows."""
    world = at(cliff=0.02, spread=0.1)
    answer, tried, _ = search(world, batch_sizes=(8, 16), range_test=True)
    for known in range(0, len(tried), 3):
        told = iter([outcome for _, outcome in tried[:known]])
        resumed = functools.partial(lambda told, item: next(told, None) or world(item), told)
        again, retried, _ = search(resumed, batch_sizes=(8, 16), range_test=True)
        assert again == answer
        assert [item for item, _ in retried] == [item for item, _ in tried]


def test_seeds():
    one, two = ({plan.Settings(**DEFAULTS, seed=seed).seed_of(number) for number in range(50)} for seed in (1, 2))
    assert len(one) == len(two) == 50
    assert not one & two
    assert all(0 <= seed < 2**31 for seed in one)
    first, second, third = (set(rates(search(bowl, seed=seed)[1], "stage 1")) for seed in (0, 1, 2))
    assert not first & second
    assert not second & third


def test_rates_of_a_stage_fill_the_range():
    """No gap of more than one and a half shares, and none twice."""
    for seed in range(20):
        found = plan.spread(1e-6, 10.0, 7, [seed])
        assert found == sorted(found)
        assert np.diff(np.log10([1e-6, *found, 10.0])).max() <= 1.5


WORLDS = st.fixed_dictionaries(
    {
        "best": st.floats(-9, 3).map(lambda power: 10**power),
        "cliff": st.one_of(st.just(math.inf), st.floats(-9, 2).map(lambda power: 10**power)),
        "spread": st.sampled_from([0.0, 0.05, 1.0]),
        "width": st.sampled_from([0.1, 1.0, 4.0]),
    }
)
SETTINGS = st.fixed_dictionaries(
    {
        "low": st.floats(-8, -1).map(lambda power: 10**power),
        "high": st.floats(-0.9, 2).map(lambda power: 10**power),
        "stages": st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=3).map(tuple),
        "confirm": st.integers(0, 3),
        "top": st.integers(1, 3),
        "max_widen": st.integers(0, 2),
        "range_test": st.booleans(),
        "seed": st.integers(0, 5),
        "batch_sizes": st.sampled_from([(None,), (8,), (8, 16, 32)]),
    }
)


@given(WORLDS, SETTINGS, st.integers(0, 2**32))
def test_rates_and_budget_stay_within_bounds(world, given, chance):
    """Whatever comes of the trials, now and then a failure."""

    def tell(item):
        rng = np.random.default_rng([chance, item.seed, int(item.learning_rate * 1e9)])
        if item.kind == "range test":
            return Outcome(
                3.0, untrained=1.0, suggestion=10 ** rng.uniform(-9, 2), diverged_at=10 ** rng.uniform(-9, 2)
            )
        return FAILED if rng.uniform() < 0.1 else bowl(item, **world)

    answer, tried, _ = search(tell, **given)
    low, high, stages, widened = given["low"], given["high"], given["stages"], plan.WIDEN ** given["max_widen"]
    sizes = len(given["batch_sizes"])
    low, high = low / widened, high * widened
    for number, (trials, epochs) in enumerate(stages):
        stage = [item for item, _ in tried if item.kind == f"stage {number + 1}"]
        assert {item.epochs for item in stage} <= {epochs}
        assert len(stage) <= sizes * (trials + given["max_widen"] * max(2, math.ceil(trials / 2)))
        sizes = math.ceil(sizes / 2)
    assert len(rates(tried, "confirm")) <= given["confirm"] * (given["top"] + 1 + plan.RETREATS)
    assert len(rates(tried, "range test")) == (len(given["batch_sizes"]) if given["range_test"] else 0)
    assert len(rates(tried, "cliff")) <= 10
    first = [item.learning_rate for item, _ in tried if item.kind == "stage 1"]
    assert all(low <= rate <= high for rate in first)
    if not given["max_widen"]:
        assert all(low * 0.999 <= item.learning_rate <= high * 1.001 for item, _ in tried if item.kind != "confirm")
    good = [item.learning_rate for item, outcome in tried if outcome.is_good]
    assert answer.learning_rate is None or answer.learning_rate in good
    if answer.learning_rate is not None:
        assert answer.interval[0] <= answer.learning_rate <= answer.interval[1]
        assert answer.cliff is None or answer.interval[1] < answer.cliff
        assert math.isfinite(answer.score)
    if answer.cliff is not None and answer.stable_max is not None:
        assert answer.stable_max < answer.cliff


@given(SETTINGS)
def test_all_diverge_or_fail_whatever_is_asked(given):
    for outcome in (EXPLODED, FAILED):
        answer, _, notes = search(lambda item, outcome=outcome: outcome, **given)
        assert answer.learning_rate is None
        assert notes[-1].startswith("Every learning rate")


def test_one_trial_a_stage():
    answer, _, _ = search(bowl, stages=((1, 1), (1, 2)), low=1e-4, high=1e-2)
    assert answer.learning_rate is not None


@pytest.mark.parametrize("sign", [1, -1])
def test_ranges_of_later_stages_grow_by_what_they_began_with(sign):
    """Short trainings have a best rate; of longer ones the best is ever further out."""

    def world(item):
        log = math.log10(item.learning_rate)
        short = 0.2 + 0.01 * (log + 3) ** 2
        return Outcome(short if item.epochs == 1 else 0.5 + sign * 1e-3 * log, untrained=1.0)

    for seed in range(20):
        _, tried, _ = search(world, seed=seed, max_widen=3)
        two = rates(tried, "stage 2")
        assert max(two) / min(two) < (max(two[:5]) / min(two[:5])) ** 8
        _, tried, _ = search(world, seed=seed, max_widen=20)
        assert all(0 < item.learning_rate < math.inf for item, _ in tried)


def test_a_training_that_diverges_far_below_ends_no_range():
    def world(item):
        return EXPLODED if item.learning_rate < 5e-6 else bowl(item, best=300, width=3)

    for seed in range(10):
        answer, _, notes = search(world, seed=seed)
        assert 150 < answer.learning_rate < 600
        assert answer.cliff is None
        assert "has diverged, too" in notes[-1]


def test_the_answer_is_below_all_that_diverged_with_fresh_seeds():
    """The chance to diverge rises slowly with the rate."""

    def world(item):
        luck = np.random.default_rng([item.seed, int(item.learning_rate * 1e9)]).normal()
        return EXPLODED if math.log10(item.learning_rate / 0.1) + 0.15 * luck > 0 else bowl(item, best=0.09)

    for seed in range(300):
        answer, tried, _ = search(world, seed=seed)
        bad = [item.learning_rate for item, one in tried if item.kind == "confirm" and one.diverged]
        if answer.learning_rate:
            assert answer.learning_rate < min(bad, default=math.inf)
            assert answer.cliff is None or answer.learning_rate <= answer.interval[1] < answer.cliff


def test_failures_cost_no_search():
    """One of ten trainings runs out of memory; or all long ones do."""
    found = []
    for seed in range(100):
        luck = np.random.default_rng(seed)
        answer, _, _ = search(lambda item, luck=luck: FAILED if luck.uniform() < 0.1 else bowl(item), seed=seed)
        found.append(answer.learning_rate)
    assert sum(0.0003 < rate < 0.003 for rate in found) >= 95
    answer, tried, notes = search(lambda item: FAILED if item.kind == "stage 3" else bowl(item))
    assert 0.0005 < answer.learning_rate < 0.002
    assert notes[-1] == "What stage 2 has found is gone on with."
    assert answer.learning_rate in rates(tried, "stage 2")


def test_a_model_that_is_nearly_as_good_as_it_can_be():
    """Fine-tuning: half a percent to gain at 1e-4, much to lose above 0.01."""

    def world(item):
        log = math.log10(item.learning_rate)
        gain = 0.006 * math.exp(-((log + 4) ** 2)) - 0.1 * max(0, log + 2)
        return Outcome(-(0.92 + gain) * noise(item, 2e-4), untrained=-0.92)

    for seed in range(20):
        answer, _, notes = search(world, seed=seed)
        assert 1e-5 < answer.learning_rate < 1e-3
        assert not any("moved" in note or "untrained" in note for note in notes)


@pytest.mark.parametrize("world", [at(spread=0.15), at(cliff=2e-3, spread=0.05)])
def test_no_worse_rate_lies_in_the_interval(world):
    for seed in range(100):
        answer, tried, _ = search(world, seed=seed, top=3)
        (low, high), confirmed = answer.interval, set(rates(tried, "confirm"))
        assert low <= answer.learning_rate <= high
        last = {item.learning_rate: outcome.score for item, outcome in tried if item.kind == "stage 3"}
        within = [score for rate, score in last.items() if low <= rate <= high and rate not in confirmed]
        assert all(score <= min(last.values()) + answer.error for score in within)


def test_a_stage_of_one_trial_tries_the_best_again():
    for seed in range(20):
        answer, tried, _ = search(at(), stages=((9, 1), (5, 3), (1, 10)), seed=seed)
        assert len(rates(tried, "stage 3")) == 1
        assert 0.0003 < answer.learning_rate < 0.003


def test_without_confirmation_the_best_of_the_last_stage_counts():
    for seed in range(20):
        answer, tried, _ = search(quadratic, confirm=0, seed=seed)
        score, rate = min((outcome.score, item.learning_rate) for item, outcome in tried if item.kind == "stage 3")
        assert (answer.score, answer.learning_rate) == (score, rate)


def test_of_rates_that_tie_the_lowest_is_best():
    arm = Arm(None, 1e-6, 1.0)
    arm.tried = [(Item("stage 1", 10.0**-i, 1, 0), Outcome(-0.9733, untrained=-0.1)) for i in (3, 1, 2, 4, 0)]
    assert [item.learning_rate for item, _ in arm.ranked("stage 1")] == [1e-4, 1e-3, 1e-2, 0.1, 1.0]


def test_notes_name_the_batch_size():
    _, _, notes = search(at(best=1e-7), batch_sizes=(16, 64), max_widen=0)
    assert [size for size in (16, 64) if any(f"(batch size {size}) the best" in note for note in notes)] == [16, 64]
