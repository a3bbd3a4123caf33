"""What predictions are worth: scores, calibration, how members differ, and whether one is better than another.

NumPy alone. There are two kinds of predictions: probabilities of classes, `(rows, classes)`, and numbers, of any shape
with the rows first. Several members have an axis of their own in front.
"""

import math

import numpy as np

LEAST = 1e-7  # the least probability that counts; Keras's
BINS = 15  # of the calibration error
HOTTEST = 20.0  # temperatures are sought between this and its inverse
NORMAL = 1.959964  # of both sides, 95 % lie within


class Classes:
    """Judges probabilities of classes by the true ones.

    Args:
        labels: The number of the true class of each row. Rows with another number than those of the classes do not
            count.
        count: How many classes there are.
        ignored: The number of one that does not count either.
    """

    score = "accuracy"
    sign = 1  # a higher score is better

    def __init__(self, labels, count, ignored=None):
        labels = np.asarray(labels).astype("int64")
        counts = (labels >= 0) & (labels < count) & (labels != ignored)
        self.rows = slice(None) if counts.all() else np.flatnonzero(counts)
        self.labels = labels[self.rows]

    def __len__(self):
        """How many rows count."""
        return len(self.labels)

    def counted(self, p):
        """The rows that count."""
        return p[..., self.rows, :]

    def points(self, p):
        """What each row is worth: 1 if the most probable class is the true one, 0 if not."""
        p = self.counted(p)
        return ((p.argmax(-1) == self.labels) & np.isfinite(p).all(-1)).astype("float64")

    def loss(self, p) -> float:
        """The mean negative log-likelihood."""
        true = np.take_along_axis(self.counted(p), self.labels[:, None], -1)[:, 0]
        return float(-np.log(np.maximum(true.astype("float64"), LEAST)).mean())

    def scores(self, p) -> dict[str, float]:
        return {"accuracy": float(self.points(p).mean()), "nll": self.loss(p), "ece": self.calibration_error(p)}

    def calibration_error(self, p) -> float:
        """How far the confidence is from the accuracy: the mean over bins of equal width."""
        confidence, points = self.counted(p).max(-1), self.points(p)
        if not np.isfinite(confidence).all():
            return math.nan
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        off = np.bincount(bins, points - confidence, BINS)
        return float(np.abs(off).sum() / len(points))

    def interval(self, p) -> tuple[float, float]:
        """Where the accuracy lies with 95 % confidence (Wilson's interval)."""
        points, z2 = self.points(p), NORMAL**2
        n, share = len(points), points.mean()
        middle = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = NORMAL * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2)) / (1 + z2 / n)
        return float(middle - half), float(middle + half)

    def diversity(self, members) -> dict[str, float]:
        """How the members differ.

        `disagreement`: the share of rows on which two of them name different classes, in the mean of all pairs.
        `correlation`: of the probabilities of two of them. `gap`: how much less the loss of their mean is than the mean
        of their losses.
        """
        members = self.counted(members)
        named, count = members.argmax(-1), members.shape[-1]
        votes = np.stack([(named == label).sum(0) for label in range(count)])
        m = len(members)
        agreeing = (votes * (votes - 1)).sum(0) / (m * (m - 1))
        judge = Classes(self.labels, count)
        gap = np.mean([judge.loss(p) for p in members]) - judge.loss(members.mean(0))
        return {
            "disagreement": float(1 - agreeing.mean()),
            "correlation": mean_correlation(members),
            "gap": float(gap),
        }

    def differences(self, members) -> list[list[float]]:
        """How far any two members differ: the share of rows on which they name different classes."""
        named = self.counted(members).argmax(-1)
        return [[float((one != other).mean()) for other in named] for one in named]

    def are_alike(self, members) -> bool:
        """Whether the members are nearly the same function: they differ on far fewer rows than they are wrong about."""
        wrong = 1 - np.mean([self.points(p).mean() for p in members])
        return bool(self.diversity(members)["disagreement"] < 0.3 * wrong)

    def temperature(self, p) -> float:
        """The temperature with the least loss; the loss is convex in its inverse. Where there is none, 1."""
        logs = np.log(np.maximum(self.counted(p).astype("float64"), LEAST))
        if not np.isfinite(logs).all():
            return 1.0
        low, high = 1 / HOTTEST, HOTTEST
        for _ in range(60):
            middle = math.sqrt(low * high)
            mean = (softmax(logs * middle) * logs).sum(-1)
            slope = (mean - logs[np.arange(len(logs)), self.labels]).mean()
            low, high = (middle, high) if slope < 0 else (low, middle)
        return 1 / math.sqrt(low * high)


class Numbers:
    """Judges numbers by the true ones.

    Args:
        values: The true numbers, of the shape of a prediction.
    """

    score = "rmse"
    sign = -1

    def __init__(self, values):
        self.values = np.asarray(values, "float64")
        self.rows = self.values.reshape(len(self.values), -1)

    def __len__(self):
        return len(self.rows)

    def _off(self, predicted):
        return predicted.reshape(self.rows.shape).astype("float64") - self.rows

    def points(self, predicted):
        """What each row is worth: the negative mean square of its error."""
        return -np.square(self._off(predicted)).mean(-1)

    def loss(self, predicted) -> float:
        """The mean square of the error, as a share of the variance of the true numbers."""
        variance = self.rows.var(0).mean()
        return float(-self.points(predicted).mean() / (variance or 1.0))

    def scores(self, predicted) -> dict[str, float]:
        off = self._off(predicted)
        return {"rmse": float(np.sqrt(np.square(off).mean())), "mae": float(np.abs(off).mean())}

    def diversity(self, members) -> dict[str, float]:
        """How the members differ.

        `spread`: the root mean square of their standard deviation. `correlation`: of the errors of two of them. `gap`:
        how much less the mean square error of their mean is than the mean of theirs.
        """
        errors = np.stack([self._off(one) for one in members])
        variance = members.astype("float64").var(0).mean()
        return {
            "spread": float(np.sqrt(variance)),
            "correlation": mean_correlation(errors),
            "gap": float(np.square(errors).mean() - np.square(errors.mean(0)).mean()),
        }

    def differences(self, members) -> list[list[float]]:
        """How far any two members differ: the root mean square of the difference."""
        members = members.astype("float64")
        return [[float(np.sqrt(np.square(one - other).mean())) for other in members] for one in members]

    def are_alike(self, members) -> bool:
        """Whether the members are nearly the same function: they differ far less than they are wrong."""
        wrong = np.mean([self.scores(one)["rmse"] for one in members])
        return bool(self.diversity(members)["spread"] < 0.1 * wrong)


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def tempered(p, temperature: float):
    """Probabilities of classes at a temperature: above 1 less sure of themselves, below 1 surer."""
    return softmax(np.log(np.maximum(p.astype("float64"), LEAST)) / temperature)


def entropy(p):
    """The entropy of each row of probabilities, in nats."""
    p = p.astype("float64")
    return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)


def mean_correlation(members) -> float:
    """The correlation of two members, in the mean of all pairs."""
    flat = members.reshape(len(members), -1).astype("float64")
    flat = flat - flat.mean(-1, keepdims=True)
    norms = np.sqrt(np.square(flat).sum(-1))
    flat = flat / np.where(norms > 0, norms, 1.0)[:, None]
    m = len(flat)
    return float((np.square(flat.sum(0)).sum() - np.square(flat).sum()) / (m * (m - 1)))


def compare(points, other, are_shares: bool) -> dict[str, float]:
    """By how much the one is better than the other, row by row.

    `gain` with its 95 % interval from `low` to `high`, and `p`, of the exact sign test. Where points are right or
    wrong, that is McNemar's test, and the interval is that of Bonett and Price (2012), for which there is one row more
    of either kind: it says something even where no row differs.
    """
    better = points - other
    p = sign_test(int((better > 0).sum()), int((better < 0).sum()))
    found = {"gain": float(better.mean()), "low": -math.inf, "high": math.inf, "p": p}
    if are_shares:
        better = np.append(better, [1, -1])
    n, middle = len(better), float(better.mean())
    if n > 1:
        half = NORMAL * float(better.std(ddof=0 if are_shares else 1)) / math.sqrt(n)
        found |= {"low": middle - half, "high": middle + half}
    return found


def sign_test(wins: int, losses: int) -> float:
    """How probable so uneven a result is if either side wins with probability 1/2."""
    n, k = wins + losses, min(wins, losses)
    log = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, log)))


def chosen(members, judges) -> list[int]:
    """How often to take each member: greedily, with replacement, by the loss of their mean (Caruana et al., 2004).

    The first is the best one, and what is taken is the best of all stages, so that it is never worse than that one.
    Nothing is chosen where no loss is finite.

    Args:
        members: The predictions for each output, with the members in front.
        judges: Who judges each output, or None.
    """
    m = len(members[0])
    members = [one for one, judge in zip(members, judges, strict=True) if judge]
    judges = [judge for judge in judges if judge]
    counts, best = [0] * m, (math.inf, [])
    totals = [0.0] * len(members)
    for taken in range(1, 5 * m + 1) if judges else ():
        losses = [
            sum(judge.loss((total + one[i]) / taken) for judge, total, one in zip(judges, totals, members, strict=True))
            for i in range(m)
        ]
        i = int(np.argmin(np.nan_to_num(losses, nan=np.inf)))
        counts = [count + (i == k) for k, count in enumerate(counts)]
        totals = [total + one[i].astype("float64") for total, one in zip(totals, members, strict=True)]
        if losses[i] < best[0] - 1e-12:  # more than rounding
            best = losses[i], counts
    return best[1]
