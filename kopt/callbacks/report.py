"""What snapshots are worth on data that is held out, each and together."""

import itertools
import math

import keras
import numpy as np

from kopt import _keras, ensemble, scores
from kopt.batches import pairs

ROWS = 256  # of arrays, that are predicted at once


def predicted(model, data, names):
    """What is predicted for all of the data, and the targets: an array for each output, in order.

    Args:
        model: Who predicts.
        data: Pairs of inputs and targets, batch by batch.
        names: Of the outputs; targets may be given by name.
    """
    outputs, targets = [], []
    for x, y in data:
        outputs.append(keras.tree.flatten(_keras.predicted(model, x)))
        targets.append([y.get(name) for name in names] if isinstance(y, dict) and names else keras.tree.flatten(y))
    return [[_together(parts) for parts in zip(*found, strict=True)] for found in (outputs, targets)]


def _together(parts):
    """One array, of 32 bits or more where it has floats."""
    if parts[0] is None:
        return None
    whole = np.concatenate(parts)
    return whole.astype("float32") if whole.dtype.name in ("float16", "bfloat16") else whole


def judged(model, ways, members, targets) -> list[tuple]:
    """For each output: who judges it, and what he looks at, with the members in front; nobody where there is no target.

    A judge for whom no row counts is false.
    """
    found, ignored = [], ensemble.ignored_of(model)
    ways = ways if isinstance(ways, list) else [ways] * len(members)
    ignored = ignored if len(ignored) == len(members) else [None] * len(members)
    for name, values, target, one in zip(ways, members, targets, ignored, strict=True):
        way = ensemble.Way(name, values.shape)
        judge = None if target is None else way.judge(target, values.shape[1:], one)
        found.append((judge, way.judged(values, lead=1)))
    return found


class Report:
    """Compares snapshots and their ensemble.

    Args:
        model: The model that is trained.
        ways: How each output is combined.
        data: As for `evaluate`.
    """

    def __init__(self, model, ways, data):
        self.model, self.ways, self.names, self.data = model, ways, ensemble.names_of(model), data
        self.members: list[list] = []  # what each predicts
        self.targets = None

    def see(self) -> None:
        """Take in the next member, whose weights are in the model."""
        found, self.targets = predicted(self.model, pairs(self.data, ROWS), self.names)
        self.members.append(found)

    def results(self) -> list[dict]:
        """What there is to say of each output; `output` is its name, if there are several."""
        return self._results([np.stack(parts) for parts in zip(*self.members, strict=True)], self.targets)

    def _results(self, values, targets):
        names = self.names if len(values) > 1 and self.names else range(len(values))
        found = zip(names, judged(self.model, self.ways, values, targets), strict=True)
        return [{"output": name if len(values) > 1 else None} | result(*one) for name, one in found if one[0]]

    def check(self) -> None:
        """See that the first batch can be judged, before anything is trained."""
        first = itertools.islice(pairs(self.data, 2), 1)
        values, targets = predicted(self.model, first, self.names)
        self._results([one[None] for one in values], targets)


def result(judge, members) -> dict:
    """What there is to say of the members of an ensemble, and of all together, of one output.

    `members` are the scores of each, `ensemble` those of all together, and `so_far` those of the first one, the first
    two, and so on, for classes with the `interval` of the accuracy. `differences` are those of any two members.
    """
    of_each, together = [judge.scores(one) for one in members], members.mean(0)
    so_far = [_score_so_far(judge, members[: i + 1].mean(0)) for i in range(len(members))]
    found = {"members": of_each, "ensemble": judge.scores(together), "rows": len(judge), "so_far": so_far}
    found["differences"] = judge.differences(members)
    if isinstance(judge, scores.Classes):
        temperature = judge.temperature(together)
        found |= {
            "interval": judge.interval(together),
            "temperature": temperature,
            "calibrated": judge.scores(scores.tempered(together, temperature)),
        }
    if len(members) > 1:
        best = int(np.argmax([judge.sign * one[judge.score] for one in of_each]))
        over_best, over_last = (
            scores.compare(judge.points(together), judge.points(one), isinstance(judge, scores.Classes))
            for one in (members[best], members[-1])
        )
        found |= {
            "best": best,
            "over_best": over_best,
            "over_last": over_last,
            "diversity": judge.diversity(members),
            "alike": judge.are_alike(members),
            "worse": over_last["gain"] < 0 and judge.loss(together) > judge.loss(members[-1]),
        }
    return found


def _score_so_far(judge, together) -> dict:
    bounds = {"interval": judge.interval(together)} if isinstance(judge, scores.Classes) else {}
    return judge.scores(together) | bounds


def line(found) -> str:
    """The last member and the ensemble, in a few words."""
    of = "" if found["output"] is None else f"{found['output']} "
    count = len(found["members"])
    together = f"; ensemble of {count}: {_named(found['ensemble'])}" if count > 1 else ""
    return of + _named(found["members"][-1]) + together


def table(found, records) -> list[str]:
    """Members, ensemble, and what to make of it, as lines."""
    names = list(found["ensemble"])
    lines = [] if found["output"] is None else [f"  output {found['output']}"]
    lines += ["  cycle  epoch      rate" + "".join(f"{name:>10}" for name in names)]
    for record, one in zip(records, found["members"], strict=True):
        start = f"  {record['cycle']:5}  {record['epoch']:5}  {record['learning_rate']:8.2g}"
        lines.append(start + "".join(f"{one[name]:10.4f}" for name in names))
    lines.append(f"  {'ensemble':22}" + "".join(f"{found['ensemble'][name]:10.4f}" for name in names))
    return lines + verdict(found, records)


def verdict(found, records) -> list[str]:
    """What the ensemble gains and how much that can be trusted, how its members differ, and its calibration."""
    lines, is_classes = [], "interval" in found
    if is_classes:
        lines.append("  accuracy of the ensemble: {:.4f} to {:.4f} (95 %)".format(*found["interval"]))
    if "best" in found:
        lines += [_gain(found, records, is_classes), _diversity(found["diversity"])]
    if is_classes:
        before, after = found["ensemble"]["ece"], found["calibrated"]["ece"]
        at = f"at temperature {found['temperature']:.2f}, fitted on these {found['rows']} rows"
        lines.append(f"  calibration error {before:.4f}; {after:.4f} {at}")
    return lines


def _gain(found, records, is_classes) -> str:
    over, cycle = found["over_best"], records[found["best"]]["cycle"]
    scale, unit, test = (100, "points", "McNemar's test") if is_classes else (1, "of squared error", "sign test")
    gain, low, high = (scale * over[name] for name in ("gain", "low", "high"))
    form = "{:+.2f}" if is_classes else "{:+.4g}"
    bounds = f" (95 %: {form.format(low)} to {form.format(high)})" if math.isfinite(low) else ""
    against = f"  against the best member (cycle {cycle}): {form.format(gain)} {unit}"
    return f"{against}{bounds}, p = {over['p']:.2g} ({test})"


def _diversity(found) -> str:
    first = next(iter(found))
    share = f"{100 * found[first]:.1f} %" if first == "disagreement" else f"{found[first]:.4g}"
    return f"  diversity: {first} {share}, correlation {found['correlation']:.3f}, gap {found['gap']:.4f}"


def _named(values) -> str:
    """The first two scores."""
    return ", ".join(f"{name} {value:.4f}" for name, value in list(values.items())[:2])


def warnings_of(found) -> list[str]:
    """What should worry the user."""
    said = []
    of = "" if found["output"] is None else f"Output {found['output']}: "
    if found.get("alike"):
        said.append(
            f"{of}The members are nearly the same function ({_diversity(found['diversity']).strip()}); there is little "
            "to average. Raise `max_learning_rate`, or let cycles be longer or fewer."
        )
    if found.get("worse"):
        p = found["over_last"]["p"]
        said.append(
            f"{of}The ensemble is worse than its last member: {_named(found['ensemble'])} against "
            f"{_named(found['members'][-1])}, p = {p:.2g}{'' if p < 0.05 else ', which may be chance'}. Take fewer, by "
            "`build(last=...)` or `build(select='greedy')`, or longer cycles."
        )
    return said
