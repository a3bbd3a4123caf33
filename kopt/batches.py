"""Data that is read from beginning to end: what it may be, and its batches."""

import keras
import numpy as np

from kopt import backends, checks


def check_batches(name, data, with_targets=False):
    """Refuse what cannot be read again and again, or has no targets if these are wanted; the data, if it is fit."""
    allowed = "(x, y)" if with_targets else "arrays, (x, y)"
    allowed += ", or batches that can be read again: a Dataset, a PyDataset, a DataLoader"
    given = data
    if with_targets and isinstance(data, list):
        data = tuple(data)  # as for `fit`
    if _has_rows(data) and with_targets and not (isinstance(data, tuple) and len(data) in (2, 3)):
        is_fit = False
    elif _has_rows(data):
        counted = data if with_targets else _inputs(data)
        counts = {part.shape[0] for part in keras.tree.flatten(counted) if part is not None}
        allowed += ", with as many rows of each array, and at least one"
        is_fit = len(counts) == 1 and counts != {0}
    elif isinstance(data, keras.utils.PyDataset):
        is_fit = data.num_batches is not None
    elif backends.is_dataset(data):
        is_fit = int(data.cardinality()) != -1  # which says that it never ends
    else:
        known = (str, bytes, dict, list, tuple, set, frozenset, type, keras.layers.Layer)
        is_fit = not isinstance(data, known) and not hasattr(data, "shape") and hasattr(data, "__iter__")
        is_fit = is_fit and iter(data) is not data  # a generator can be read once
    return data if is_fit else checks.refuse(name, allowed, given)


def batches(data, batch_size):
    """The inputs of each batch, without targets and sample weights."""
    return map(_tensors, _each(data, batch_size, _inputs))


def pairs(data, batch_size):
    """The inputs and the targets of each batch, without sample weights; the targets as NumPy arrays."""
    for inputs, targets in _each(data, batch_size, lambda batch: tuple(batch[:2])):
        yield _tensors(inputs), keras.tree.map_structure(_host, targets)


def _each(data, batch_size, wanted):
    """What is wanted of each batch."""
    if _has_rows(data):
        data = wanted(data)
        count = keras.tree.flatten(data)[0].shape[0]
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            yield keras.tree.map_structure(lambda part, rows=rows: part[rows], data)
    elif isinstance(data, keras.utils.PyDataset):
        yield from (wanted(data[place]) for place in range(data.num_batches))
    else:
        yield from (wanted(tuple(batch) if isinstance(batch, list) else batch) for batch in data)


def _host(part):
    return np.asarray(keras.ops.convert_to_numpy(part)) if keras.ops.is_tensor(part) else np.asarray(part)


def _tensors(inputs):
    """Tensors of the backend as they are, all else as NumPy arrays."""
    return keras.tree.map_structure(lambda part: part if keras.ops.is_tensor(part) else np.asarray(part), inputs)


def _inputs(batch):
    """x of (x, y, sample_weight); a list of arrays is x of several inputs, as for Keras."""
    return batch[0] if isinstance(batch, tuple) and batch else batch


def _has_rows(data) -> bool:
    """Whether it is arrays, or a structure of arrays."""
    if not isinstance(data, (tuple, list, dict)) and not hasattr(data, "shape"):
        return False
    inputs = keras.tree.flatten(_inputs(data))
    return bool(inputs) and all(len(getattr(part, "shape", ())) > 0 for part in inputs)
