"""What a search for a learning rate tries next: coarse to fine, ranges that widen, fresh seeds for the best.

`course` is the whole search as a generator: it yields what is to be tried, is sent what came of it, and returns the
answer. Given the same outcomes it goes the same way, so that a search is resumed by telling it again what is known.
"""

import dataclasses
import math

import numpy as np

WIDEN = 100.0  # the factor by which a range of the first stage grows, or moves
FLAT = 0.01  # of the untrained score, by which somebody must have moved
TIE = 1e-6  # of a score, by which rates of the whole first range must differ if they have moved anything
NEAR = 0.2  # decades within which rates count as neighbours
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


@dataclasses.dataclass(frozen=True)
class Item:
    """One trial."""

    kind: str  # "range test", "stage 1", "confirm", "cliff"
    learning_rate: float
    epochs: int
    seed: int
    batch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of it."""

    score: float
    diverged: bool = False
    failed: bool = False
    untrained: float | None = None
    suggestion: float | None = None  # of a range test, as is the next
    diverged_at: float | None = None

    @property
    def is_good(self) -> bool:
        return not (self.diverged or self.failed) and math.isfinite(self.score)


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


class Arm:
    """The search for one batch size: what was tried, and where the next stage looks."""

    def __init__(self, batch_size, low, high):
        self.batch_size, self.low, self.high = batch_size, low, high
        self.bottom = low  # below which nothing has asked to look
        self.carried: float | None = None  # the best of the last stage, which the next one tries again
        self.tried: list[tuple[Item, Outcome]] = []
        self.exploded = False  # whether a range test has found an end of the range

    def results(self, kind) -> list[tuple[Item, Outcome]]:
        return sorted((pair for pair in self.tried if pair[0].kind == kind), key=lambda pair: pair[0].learning_rate)

    def ranked(self, kind) -> list[tuple[Item, Outcome]]:
        """The good ones, best first, each seen with its neighbours: a single one near the cliff is a matter of luck."""
        results = [pair for pair in self.results(kind) if pair[1].is_good or pair[1].diverged]
        known = [outcome.score for _, outcome in results if outcome.is_good]
        if not known:
            return []
        bad = 2 * max(known) - min(known)  # what diverged counts as worse than the worst by all that they span
        scores = np.array([outcome.score if outcome.is_good else bad for _, outcome in results])
        logs = np.log10([item.learning_rate for item, _ in results])
        weights = np.exp(-0.5 * np.square((logs[:, None] - logs) / NEAR))
        around = weights @ scores / weights.sum(1)
        order = np.argsort(around, kind="stable")
        return [results[place] for place in order if results[place][1].is_good]

    def best(self, kind) -> tuple[Item, Outcome] | None:
        return next(iter(self.ranked(kind)), None)

    def edge(self, kind) -> tuple[str, str] | None:
        """Where the range must grow, "up" or "down", and why; None if the best lies within."""
        results = self.results(kind)
        good, best = [pair for pair in results if pair[1].is_good], self.best(kind)
        if best is None:
            return ("down", "all have diverged") if any(outcome.diverged for _, outcome in results) else None
        cliff = self.stable_and_cliff()[1]
        bad_above = cliff is not None and cliff <= self.high
        scores = [outcome.score for _, outcome in good]
        if _are_flat(good) or (kind == "stage 1" and len(good) > 1 and np.ptp(scores) <= TIE * abs(scores[0])):
            return None if bad_above else ("up", "none has moved the model")
        if best is good[-1] and not bad_above:
            return "up", "the best is the highest"
        is_tied = len(good) > 1 and scores[0] == scores[1]
        return ("down", "the best is the lowest") if best is good[0] and not is_tied else None

    def stable_and_cliff(self) -> tuple[float | None, float | None]:
        """The highest rate below all that diverged, and the lowest that did."""
        cliff = min((item.learning_rate for item, outcome in self.tried if outcome.diverged), default=math.inf)
        stable = [item.learning_rate for item, outcome in self.tried if outcome.is_good and item.kind != "range test"]
        below = max((rate for rate in stable if rate < cliff), default=None)
        return below, cliff if math.isfinite(cliff) else None

    def narrow(self, kind, longer) -> None:
        """Look around the best, and at it again, between its neighbours; where it has none, within the range.

        Trainings that are so many times `longer` go as far with a rate so many times lower: that one is in it, too.
        Where none has moved the model, the highest that is stable counts as the best.
        """
        rates = [item.learning_rate for item, _ in self.results(kind)]
        good = [pair for pair in self.results(kind) if pair[1].is_good]
        is_flat = _are_flat(good)
        best = (good[-1] if is_flat else self.best(kind))[0].learning_rate
        place, step = rates.index(best), math.sqrt(10)
        self.low = rates[place - 1] if place else max(self.low, best / step)
        self.high = rates[place + 1] if place + 1 < len(rates) else min(self.high, best * step)
        if not is_flat:
            self.low, self.carried = min(self.low, max(self.bottom, best / longer)), best


def _are_flat(good) -> bool:
    """Whether no training has changed the score of the untrained model."""

    def is_flat(outcome):
        known = outcome.untrained is not None and math.isfinite(outcome.untrained)
        return known and abs(outcome.score - outcome.untrained) <= FLAT * abs(outcome.untrained)

    return all(is_flat(outcome) for _, outcome in good)


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
            return _bounds(arms[0], Answer())
        arms = sorted(alive, key=lambda arm: arm.best(kind)[1].score)[: max(1, math.ceil(len(arms) / 2))]
        if number + 1 < len(settings.stages):
            for arm in arms:
                arm.narrow(kind, settings.stages[number + 1][1] / epochs)
    arm, kind = arms[0], f"stage {len(settings.stages)}"
    yield from _cliff(settings, arm)
    return (yield from _confirm(settings, arm, kind, say))


def _say_what_is_strange(arms, kind, say) -> None:
    """Of a stage in which the rate makes no difference."""
    good = [pair for arm in arms for pair in arm.results(kind) if pair[1].is_good]
    if kind == "stage 1" and len(good) > 2 and len({outcome.score for _, outcome in good}) == 1 and not _are_flat(good):
        say(f"In {kind} all rates come to the same score: does a callback set the rate?")
    elif good and _are_flat(good):
        say(f"In {kind} no rate has changed the score of the untrained model by 1 %: longer trainings may tell more.")


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
        size = f" (batch size {arm.batch_size})" if arm.batch_size else ""
        say(f"The range test leaves {arm.low:.2g} to {arm.high:.2g}{size}.")


def _stage(settings, arms, number, trials, epochs, say):
    """The trials of one stage for all arms, and more where the best lies at an edge."""
    kind, seed = f"stage {number + 1}", settings.seed_of(number)

    def items(arm, low, high, count, again):
        key = [settings.seed, number, arms.index(arm), again]
        rates = spread(low, high, count, key)
        if arm.carried and not again:
            rates[np.argmin(np.abs(np.log(np.array(rates) / arm.carried)))] = arm.carried
        return [(arm, Item(kind, rate, epochs, seed, arm.batch_size)) for rate in rates]

    wanted = [pair for arm in arms for pair in items(arm, arm.low, arm.high, trials, 0)]
    for again in range(1, settings.max_widen + 2):
        yield from _try(wanted)
        wanted = []
        for arm in arms:
            found = arm.edge(kind)
            if found is None:
                continue
            way, why = found
            head = f"From {arm.low:.2g} to {arm.high:.2g} {why}"
            if again > settings.max_widen:
                say(f"{head}, and the range is not widened any more.")
                continue
            old = arm.low, arm.high
            factor = WIDEN if number == 0 else max(arm.high / arm.low, 2.0)
            if arm.exploded and way == "up":
                factor = min(factor, 10.0)  # the range test has seen an end
            if way == "up":
                cliff = arm.stable_and_cliff()[1] or math.inf
                arm.high = min(arm.high * factor, max(cliff, arm.high))
                low, high = old[1], arm.high
            else:
                arm.low /= factor
                arm.bottom = min(arm.bottom, arm.low)
                low, high = arm.low, old[0]
            say(f"{head}: {way} to {arm.high if way == 'up' else arm.low:.2g}.")
            wanted += items(arm, low, high, max(2, math.ceil(trials / 2)), again)
        if not wanted:
            return


def _cliff(settings, arm):
    """Halve the gap between the highest rate that is stable and the lowest that is not."""
    stable, cliff = arm.stable_and_cliff()
    while stable and cliff and cliff / stable > GAP:
        item = Item("cliff", math.sqrt(stable * cliff), settings.stages[0][1], settings.seed_of(0), arm.batch_size)
        (outcome,) = yield from _try([(arm, item)])
        if not (outcome.is_good or outcome.diverged):
            return
        stable, cliff = arm.stable_and_cliff()


def _confirm(settings, arm, kind, say):
    """Train the best rates with fresh seeds, and choose the lowest that is within a standard error of the best."""
    if not settings.confirm:
        item, outcome = arm.best(kind)
        answer = Answer(item.learning_rate, arm.batch_size, score=outcome.score)
        answer.interval = _interval(arm, kind, answer)
        return _bounds(arm, answer)
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
        return _bounds(arm, Answer(batch_size=arm.batch_size))
    rate, equal = _chosen(judged)
    scores = judged[rate]
    error = float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None
    answer = Answer(rate, arm.batch_size, score=float(np.mean(scores)), error=error)
    answer.interval = _interval(arm, kind, answer, equal, set(confirmed) - set(equal))
    return _bounds(arm, answer)


def _candidates(settings, arm, kind) -> list[float]:
    """The rates of the last stage that are best among their neighbours, and the one that is best by itself."""
    ranked = arm.ranked(kind)
    alone = min(ranked, key=lambda pair: pair[1].score)
    return list(dict.fromkeys(item.learning_rate for item, _ in [ranked[0], alone, *ranked]))[: settings.top]


def _judged(arm, rates) -> dict[float, list[float]]:
    """For each rate its scores with the fresh seeds, if none has diverged."""
    found = {}
    for rate in rates:
        outcomes = [outcome for item, outcome in arm.tried if item.kind == "confirm" and item.learning_rate == rate]
        if all(outcome.is_good for outcome in outcomes):
            found[rate] = [outcome.score for outcome in outcomes]
    return found


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
    """The rates that are as good, as far as is known: those that fresh seeds have not told from the answer, and of the
    last stage those within a standard error of its best, where no rate that fresh seeds found worse lies between."""
    allowed = min(outcome.score for _, outcome in arm.ranked(kind)) + (answer.error or 0.0)
    near = [item.learning_rate for item, outcome in arm.results(kind) if outcome.is_good and outcome.score <= allowed]
    low = max((rate for rate in worse if rate < answer.learning_rate), default=0.0)
    high = min((rate for rate in worse if rate > answer.learning_rate), default=math.inf)
    high = min(high, arm.stable_and_cliff()[1] or math.inf)
    rates = [answer.learning_rate, *equal, *(rate for rate in near if low < rate < high)]
    return min(rates), max(rates)


def _bounds(arm, answer) -> Answer:
    answer.stable_max, answer.cliff = arm.stable_and_cliff()
    return answer
