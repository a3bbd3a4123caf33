"""What goes along in every training of a search: it ends one whose loss explodes."""

import math

from kopt.callbacks.base import Callback

EVERY = 10  # batches between two looks at the loss, each of which waits for the device
HITS = 3  # looks in a row that must find it too high


def limit(untrained: float, explode: float) -> float:
    """From where on a value has exploded: `explode` times the untrained one, or as far above it if that is negative."""
    return untrained + (explode - 1) * abs(untrained)


class Guard(Callback):
    """Stop a training when its loss is not finite, or stays above a multiple of the untrained one.

    The untrained loss is what it is told, or the loss of the first batch if that is more. Every ten batches it looks at
    the mean since the last look, which it takes out of Keras's mean of the whole epoch so far. It has the last place in
    the list, where the logs are complete: `check_logs(logs)` may refuse them.
    """

    def __init__(self, untrained: float | None, explode: float, check_logs=lambda logs: None, horizon=None):
        super().__init__("kopt.tuner.wrap")
        self.untrained, self.explode, self.check_logs, self.horizon = untrained, explode, check_logs, horizon
        self.diverged, self.is_fresh, self.hits, self.last = False, True, 0, 0.0

    def set_params(self, params):
        """Tell all callbacks and schedules how long the whole training is, of which this `fit` may be a part."""
        super().set_params(params)
        if self.horizon and params:
            params["epochs"] = max(self.horizon, params.get("epochs") or 0)

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self.seen, self.total = 0, 0.0

    def on_train_batch_end(self, batch, logs=None):
        if "loss" in (logs or {}) and (self.is_fresh or batch + 1 - self.seen >= EVERY):
            total = float(logs["loss"]) * (batch + 1)
            loss = (total - self.total) / (batch + 1 - self.seen)
            if self.is_fresh and math.isfinite(loss):
                self.untrained = loss if self.untrained is None else max(loss, self.untrained)
            self.seen, self.total, self.is_fresh = batch + 1, total, False
            self._judge(loss)

    def _judge(self, loss) -> None:
        self.hits = self.hits + 1 if self.is_high(loss) else 0
        if self.hits == HITS or not math.isfinite(loss):
            self.diverged = self.model.stop_training = True

    def is_high(self, loss) -> bool:
        return not math.isfinite(loss) or (self.untrained is not None and loss > limit(self.untrained, self.explode))

    def on_epoch_end(self, epoch, logs=None):
        self.check_logs(logs or {})
        self.last = float((logs or {}).get("loss", 0.0))
        if self.seen == 0 or not math.isfinite(self.last):
            self._judge(self.last)

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        self.diverged |= self.is_high(self.last)
