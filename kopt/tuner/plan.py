"""What a search for a learning rate tries next: coarse to fine, ranges that widen, fresh seeds for the best.

`course` is the whole search as a generator: it yields what is to be tried, is sent what came of it, and returns the
answer. Given the same outcomes it goes the same way, so that a search is resumed by telling it again what is known.
"""

import dataclasses
import itertools
import math

import numpy as np

from kopt.tuner.arm import Arm, Item

WIDEN = 100.0  # the factor by which a range of the first stage grows, or moves
GAP = 1.2  # between a rate that is stable and one that is not, when the cliff is found
FRESH = 1000  # the number of the first seed that confirms
RETREATS = 3  # how often the confirmed rate is halved, where seeds diverge


def seed_of(seed, number) -> int:
    """A seed that has nothing in common with those of other numbers and other seeds."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a search is asked for; scores are losses, to be low."""

    low: float
    high: float
    stages: tuple[tuple[int, int], ...]  # of trials and epochs
    confirm: int
    batch_sizes: tuple = (None,)
    top: int = 2
    max_widen: int = 2
    range_test: bool = True
    seed: int = 0

    def seed_of(self, number) -> int:
        """The seed that the trials of a stage have in common: of the first 0, of the second 1."""
        return seed_of(self.seed, number)

    def fresh_seeds(self) -> list[int]:
        """Those that confirm."""
        return [seed_of(self.seed, FRESH + number) for number in range(self.confirm)]


@dataclasses.dataclass
class Answer:
    """What the search has found; None where there is nothing to say."""

    learning_rate: float | None = None
    batch_size: int | None = None
    interval: tuple[float, float] | None = None
    stable_max: float | None = None
    cliff: float | None = None
    score: float | None = None
    error: float | None = None


def spread(low, high, count, key) -> list[float]:
    """So many rates between two, each somewhere in the middle half of its share of the (logarithmic) range."""
    places = (np.arange(count) + np.random.default_rng(key).uniform(0.25, 0.75, count)) / count
    return [float(rate) for rate in np.exp(math.log(low) + places * math.log(high / low))]


def course(settings: Settings, say=lambda line: None):
    """The search: yields lists of `Item`, is sent lists of `Outcome`, returns an `Answer`."""
    arms = [Arm(size, settings.low, settings.high) for size in settings.batch_sizes]
    if settings.range_test:
        yield from _range_test(settings, arms, say)
    for number, (trials, epochs) in enumerate(settings.stages):
        yield from _stage(settings, arms, number, trials, epochs, say)
        kind = f"stage {number + 1}"
        _say_what_is_strange(arms, kind, say)
        alive = [arm for arm in arms if arm.best(kind)]
        if not alive:
            say(f"Every learning rate of {kind} has diverged or failed: look at the model, the loss and the data.")
            if not number:
                return _bounds(arms[0], Answer(), say)
            kind = f"stage {number}"
            say(f"What {kind} has found is gone on with.")
            break
        arms = sorted(alive, key=lambda arm: arm.best(kind)[1].score)[: max(1, math.ceil(len(arms) / 2))]
        if number + 1 < len(settings.stages):
            for arm in arms:
                arm.narrow(kind, settings.stages[number + 1][1] / epochs)
    yield from _cliff(settings, arms[0], kind)
    return (yield from _confirm(settings, arms[0], kind, say))


def _say_what_is_strange(arms, kind, say) -> None:
    """Of a stage in which the rate makes no difference."""
    good = [outcome for arm in arms for _, outcome in arm.good(kind)]
    if all(arm.is_flat for arm in arms) and good:
        say(f"In {kind} no rate has changed the score of the untrained model by 1 %: longer trainings may tell more.")
    elif kind == "stage 1" and len(good) > 2 and len({outcome.score for outcome in good}) == 1:
        say(f"In {kind} all rates come to the same score: does a callback set the rate?")


def _try(arms_and_items):
    """Have items tried, and note for each arm what came of its own."""
    outcomes = yield [item for _, item in arms_and_items]
    for (arm, item), outcome in zip(arms_and_items, outcomes, strict=True):
        arm.tried.append((item, outcome))
    return outcomes


def _range_test(settings, arms, say):
    items = [Item("range test", arm.low, 0, settings.seed_of(0), arm.batch_size) for arm in arms]
    outcomes = yield from _try(list(zip(arms, items, strict=True)))
    for arm, found in zip(arms, outcomes, strict=True):
        if found.diverged_at is not None and arm.low < found.diverged_at < arm.high:
            arm.high, arm.exploded = found.diverged_at, True
        if found.suggestion is not None:
            arm.low = max(arm.low, min(found.suggestion / WIDEN, arm.high / WIDEN))
        say(f"The range test leaves {arm.low:.2g} to {arm.high:.2g}{_size(arm)}.")


def _size(arm) -> str:
    return f" (batch size {arm.batch_size})" if arm.batch_size else ""


def _stage(settings, arms, number, trials, epochs, say):
    """The trials of one stage for all arms, and more where the best lies at an edge."""
    kind, seed = f"stage {number + 1}", settings.seed_of(number)

    def items(arm, low, high, count, again):
        key = [settings.seed, number, arms.index(arm), again]
        rates = spread(low, high, count, key)
        if arm.carried and not again:
            rates[np.argmin(np.abs(np.log(np.array(rates) / arm.carried)))] = arm.carried
        return [(arm, Item(kind, rate, epochs, seed, arm.batch_size)) for rate in rates]

    factors = {arm: WIDEN if number == 0 else max(arm.high / arm.low, 2.0) for arm in arms}
    wanted = [pair for arm in arms for pair in items(arm, arm.low, arm.high, trials, 0)]
    for again in range(1, settings.max_widen + 2):
        yield from _try(wanted)
        wanted = []
        for arm in arms:
            found = arm.edge(kind)
            if found is None:
                continue
            way, why = found
            head = f"From {arm.low:.2g} to {arm.high:.2g}{_size(arm)} {why}"
            if again > settings.max_widen:
                say(f"{head}, and the range is not widened any more.")
                continue
            low, high = arm.low, arm.high
            if way == "up":
                factor = min(factors[arm], 10.0) if arm.exploded else factors[arm]  # the range test has seen an end
                cliff = arm.bounds(arm.good(kind)[-1][0].learning_rate)[1] or math.inf
                arm.high = min(high * factor, max(cliff, high))
                low, high = high, arm.high
            else:
                arm.low = low / factors[arm]
                arm.bottom = min(arm.bottom, arm.low)
                low, high = arm.low, low
            say(f"{head}: {way} to {arm.high if way == 'up' else arm.low:.2g}.")
            wanted += items(arm, low, high, max(2, math.ceil(trials / 2)), again)
        if not wanted:
            return


def _cliff(settings, arm, kind):
    """Halve the gap between the lowest rate above the best that is not stable, and the highest below that is."""
    best = arm.best(kind)[0].learning_rate
    stable, cliff = arm.bounds(best)
    while cliff and cliff / stable > GAP:
        item = Item("cliff", math.sqrt(stable * cliff), settings.stages[0][1], settings.seed_of(0), arm.batch_size)
        (outcome,) = yield from _try([(arm, item)])
        if not (outcome.is_good or outcome.diverged):
            return
        stable, cliff = arm.bounds(best)


def _confirm(settings, arm, kind, say):
    """Train the best rates with fresh seeds, and choose the lowest that is within a standard error of the best."""
    if not settings.confirm:
        item, outcome = min(arm.good(kind), key=_score)
        answer = Answer(item.learning_rate, arm.batch_size, score=outcome.score)
        answer.interval = _interval(arm, kind, answer)
        return _bounds(arm, answer, say)
    epochs, rates, confirmed = settings.stages[-1][1], _candidates(settings, arm, kind), []
    for left in reversed(range(RETREATS + 1)):
        seeds = settings.fresh_seeds()
        items = [Item("confirm", rate, epochs, seed, arm.batch_size) for rate in rates for seed in seeds]
        outcomes = yield from _try([(arm, item) for item in items])
        confirmed += rates
        judged = _judged(arm, rates)
        if judged or not left or not any(outcome.diverged for outcome in outcomes):
            break
        say(f"With fresh seeds {' and '.join(f'{rate:.2g}' for rate in rates)} diverged: half of the lowest is next.")
        rates = [min(rates) / 2]
    if not judged:
        say("No rate could be confirmed: all diverge or fail with some seed.")
        return _bounds(arm, Answer(batch_size=arm.batch_size), say)
    rate, equal = _chosen(judged)
    scores = judged[rate]
    error = float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None
    answer = Answer(rate, arm.batch_size, score=float(np.mean(scores)), error=error)
    answer.interval = _interval(arm, kind, answer, equal, set(confirmed) - set(equal))
    return _bounds(arm, answer, say)


def _candidates(settings, arm, kind) -> list[float]:
    """The rates of the last stage that are best among their neighbours, and the one that is best by itself."""
    ranked = arm.ranked(kind)
    found = [ranked[0], min(arm.good(kind), key=_score), *ranked]
    return list(dict.fromkeys(item.learning_rate for item, _ in found))[: settings.top]


def _score(pair) -> float:
    return pair[1].score


def _judged(arm, rates) -> dict[float, list[float]]:
    """The scores of each rate below the first that diverged, with the fresh seeds that have not failed."""
    tried = [(item, outcome) for item, outcome in arm.tried if item.kind == "confirm"]
    end = min((item.learning_rate for item, outcome in tried if outcome.diverged), default=math.inf)
    found = {rate: {} for rate in rates if rate < end}
    for item, outcome in tried:
        if item.learning_rate in found and outcome.is_good:
            found[item.learning_rate][item.seed] = outcome.score
    found = {rate: scores for rate, scores in found.items() if scores}
    seeds = set.intersection(*map(set, found.values())) if found else set()
    if found and not seeds:
        rate = max(found, key=lambda rate: len(found[rate]))
        found, seeds = {rate: found[rate]}, set(found[rate])
    return {rate: [scores[seed] for seed in sorted(seeds)] for rate, scores in found.items()}


def _chosen(judged) -> tuple[float, list[float]]:
    """The lowest rate that is not worse than the best by more than a standard error, and all of these.

    The seeds are the same for all rates, so that what counts is the difference with each seed.
    """
    best = min(judged, key=lambda rate: np.mean(judged[rate]))

    def is_as_good(rate):
        worse = np.subtract(judged[rate], judged[best])
        error = np.std(worse, ddof=1) / math.sqrt(len(worse)) if len(worse) > 1 else 0.0
        return np.mean(worse) <= error

    equal = sorted(filter(is_as_good, judged))
    return equal[0], equal


def _interval(arm, kind, answer, equal=(), worse=()) -> tuple[float, float]:
    """The rates that are as good, as far as is known, from the answer outwards up to the first that is not.

    As good are those that fresh seeds have not told from the answer, and of the last stage those within a standard
    error of its best.
    """
    allowed = min(map(_score, arm.good(kind))) + (answer.error or 0.0)
    known = {item.learning_rate: outcome.score <= allowed for item, outcome in arm.good(kind)}
    known |= {item.learning_rate: False for item, outcome in arm.tried if outcome.diverged}
    known |= dict.fromkeys(worse, False) | dict.fromkeys([answer.learning_rate, *equal], True)
    rates = sorted(known)
    place = rates.index(answer.learning_rate)
    below = itertools.takewhile(known.get, reversed(rates[: place + 1]))
    return min(below), max(itertools.takewhile(known.get, rates[place:]))


def _bounds(arm, answer, say) -> Answer:
    answer.stable_max, answer.cliff = arm.bounds(answer.learning_rate or 0.0)
    lowest = arm.bounds()[1]
    if lowest != answer.cliff:
        say(f"At {lowest:.2g} a training has diverged, too, though not at the rates above it that were chosen.")
    return answer
