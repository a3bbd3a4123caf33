"""Means of the weights over stretches of a training, of which any average over it can be made afterwards.

The mean over the last s steps is a mean of these means, exactly if it begins where a stretch does. An exponentially
weighted average takes each stretch as a whole, so its window should be four stretches or more.
"""

import numpy as np


class Segments:
    """The stretches of one optimizer, in order.

    Args:
        stretches: Dicts of "updates", how many updates one is long, and "means", the mean of each variable over them.
    """

    def __init__(self, stretches):
        found = [one for one in stretches if one["updates"]]
        self.updates = np.array([one["updates"] for one in found], "int64")
        self.ages = self.updates.sum() - np.cumsum(self.updates)  # the updates that came after each
        self.means = [one["means"] for one in found]

    def __len__(self):
        return len(self.means)

    @property
    def total(self) -> int:
        return int(self.updates.sum())

    def shares(self, window_steps=None, tail=None) -> np.ndarray:
        """What each stretch weighs in the average that these arguments of `posthoc` ask for."""
        return self._of_tail(tail) if window_steps is None else self._of_window(window_steps)

    def _of_window(self, window: float) -> np.ndarray:
        """What each stretch weighs in an exponentially weighted average with a window of so many updates."""
        if window <= 1:  # the last one alone
            return np.eye(len(self))[-1]
        log = np.log1p(-1 / window)
        shares = np.exp(self.ages * log) * -np.expm1(self.updates * log)
        return shares / shares.sum()

    def _of_tail(self, tail: float) -> np.ndarray:
        """What each weighs in the mean over this share of the updates, counted from the end."""
        within = np.clip(tail * self.total - self.ages, 0, self.updates)
        return within / within.sum()

    def mean(self, shares) -> list[np.ndarray]:
        """The mean with these weights, each variable's in the dtype that it was kept in."""
        found = [np.zeros(array.shape, "float64") for array in self.means[0]]
        for share, arrays in zip(shares, self.means, strict=True):
            if share:
                for sum_, array in zip(found, arrays, strict=True):
                    sum_ += share * array
        return [sum_.astype(array.dtype) for sum_, array in zip(found, self.means[0], strict=True)]

    def candidates(self) -> list[dict]:
        """Windows and tails that these stretches can tell apart, each as arguments of `posthoc`."""
        typical, total = float(np.median(self.updates)), self.total
        windows = [typical * 2.0**k for k in range(2, 64) if typical * 2.0**k <= total]
        counts = sorted({len(self), *(2**k for k in range(len(self).bit_length()))})
        tails = [float(self.updates[-count:].sum() / total) for count in counts]
        return [{"window_steps": window} for window in windows] + [{"tail": tail} for tail in tails]
