"""The state of Keras's own callbacks: what a fit changes in each, by class.

Keras never saves it. A callback that is not here takes part if it has `get_state()` and `set_state(state)`.
"""

import keras
import numpy as np

from kopt.callbacks.base import Callback

_MONITOR = ("best",)
_COUNTS = ("_batches_seen_since_last_saving", "_last_batch_seen")
ATTRIBUTES = {
    "EarlyStopping": (*_MONITOR, "wait", "stopped_epoch", "best_epoch", "best_weights"),
    "ReduceLROnPlateau": (*_MONITOR, "wait", "cooldown_counter"),
    "ModelCheckpoint": (*_MONITOR, *_COUNTS, "_current_epoch"),
    "OrbaxCheckpoint": (*_MONITOR, *_COUNTS, "_total_batches_seen"),
    "SwapEMAWeights": ("_ema_weights_in_model",),
    "TensorBoard": ("_global_train_batch", "_global_test_batch", "_previous_epoch_iterations"),
    "History": ("history", "epoch"),
}
STATELESS = ("LearningRateScheduler", "LambdaCallback", "TerminateOnNaN", "CSVLogger", "RemoteMonitor", "ProgbarLogger")
CLASSES = {getattr(keras.callbacks, name): ATTRIBUTES.get(name, ()) for name in (*ATTRIBUTES, *STATELESS)
           if hasattr(keras.callbacks, name)}  # fmt: skip


def attributes(callback) -> tuple[str, ...] | None:
    """What to save of a callback of Keras or derived from one; None for any other."""
    return next((CLASSES[base] for base in type(callback).__mro__ if base in CLASSES), None)


def has_state(callback) -> bool:
    return has_protocol(callback) or bool(attributes(callback))


def has_protocol(callback) -> bool:
    """Whether it gives and takes a state; the base of kopt's callbacks has the two methods, but no state."""
    getter = getattr(type(callback), "get_state", None)
    return getter not in (None, Callback.get_state) and hasattr(callback, "set_state")


def limits(callbacks) -> list[str]:
    """What of these callbacks nobody can save, as sentences without their subject."""
    known = (*CLASSES, keras.callbacks.Callback)
    unknown = [c for c in callbacks if not has_protocol(c) and type(c) not in known and not isinstance(c, Callback)]
    found = []
    if unknown:
        names = ", ".join(sorted({type(callback).__name__ for callback in unknown}))
        found.append(f"does not save what {names} may hold: no `get_state()` and `set_state(state)`")
    if any(isinstance(callback, keras.callbacks.CSVLogger) and not callback.append for callback in callbacks):
        found.append("cannot keep the rows of a CSVLogger without `append=True`, which begins its file anew")
    return found


def get_state(callback) -> dict:
    """What Keras's class keeps, if it is one or derived from one, and what the callback says of itself."""
    held = {name: _plain(getattr(callback, name)) for name in attributes(callback) or () if hasattr(callback, name)}
    return {"held": held, "own": callback.get_state() if has_protocol(callback) else None}


def set_state(callback, state) -> None:
    for name, value in state["held"].items():
        setattr(callback, name, _listed(value) if isinstance(callback, keras.callbacks.History) else value)
    if has_protocol(callback):
        callback.set_state(state["own"])


def _plain(value):
    """Containers as they are, scalars as Python numbers, long lists of numbers as arrays."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        if value and all(type(item) is type(value[0]) and isinstance(item, (int, float)) for item in value):
            return np.array(value)
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return np.array(value)
    array = np.array(keras.ops.convert_to_numpy(value))
    return array if array.ndim else array.item()


def _listed(value):
    """The lists of a History, from the arrays that they are saved as."""
    if isinstance(value, dict):
        return {name: _listed(item) for name, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else list(value)
