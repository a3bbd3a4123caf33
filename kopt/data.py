"""Data that can be put at a position, so that training goes on in the middle of an epoch."""

import itertools

import keras
import numpy as np

from kopt import backends, checks
from kopt._keras import passes

LOOK = 4  # batches that are compared, to see whether a dataset is the same when it is read again


def seekable(source, *, num_batches=None, shuffle=False, seed=0):
    """Data for `fit` that can be put at a position: which pass through it, and which batch of the pass.

    `kopt.callbacks.BackupAndRestore` goes on in the middle of an epoch with such data. Arrays given to `fit` need not
    be wrapped. Every pass must be repeatable, so what is random in it has to follow from the number of the pass:

    - A `tf.data.Dataset` that does not shuffle, or a `PyDataset` whose items depend on their index alone, as it is.
    - Anything that shuffles or augments at random as a function of the number of the pass, which makes it anew:
      `lambda n: dataset.shuffle(10_000, seed=n).batch(32)`.

    A dataset goes to a position by reading on to it, a `PyDataset` goes there at once.

    Args:
        source: A `tf.data.Dataset` of batches, a `keras.utils.PyDataset`, or a function that takes the number of a pass
            (0, 1, 2, ...) and returns one of the two.
        num_batches: The batches in a pass, where a dataset does not know them itself. Not needed if `fit` gets
            `steps_per_epoch`.
        shuffle: Whether to hand out the batches of a `PyDataset` in another order in each pass.
        seed: What the order follows from, together with the number of the pass.

    Example:

    >>> import keras, kopt, numpy as np
    >>> class Squares(keras.utils.PyDataset):
    ...     def __len__(self):
    ...         return 4
    ...     def __getitem__(self, i):
    ...         x = np.full((2, 1), i, "float32")
    ...         return x, x**2
    >>> data = kopt.data.seekable(Squares(), shuffle=True)
    >>> [int(x[0, 0]) for x, y in data.get_numpy_iterator()]
    [2, 0, 1, 3]
    >>> [int(x[0, 0]) for x, y in data.get_numpy_iterator()]
    [3, 0, 2, 1]
    """
    num_batches = checks.optional(checks.count(1))("num_batches", num_batches)
    shuffle, seed = checks.boolean("shuffle", shuffle), checks.count(0)("seed", seed)
    is_made = callable(source) and not _is_data(source)
    make = source if is_made else lambda n: source
    allowed = "a tf.data.Dataset, a keras.utils.PyDataset, or a function of the number of a pass that returns one"
    try:
        first = make(0)
    except Exception as error:
        raise ValueError(f"`source` must be {allowed}. Received: source={source!r}, which raised {error!r}") from error
    if not _is_data(first):
        checks.refuse("source", allowed, source)
    if isinstance(first, keras.utils.PyDataset):
        _check_hooks(first, is_made)
    elif shuffle:
        checks.refuse(
            "shuffle", "False with a tf.data.Dataset; give `lambda n: dataset.shuffle(size, seed=n)`", shuffle
        )
    _check_repeats(source, make)

    def rest(n, start):
        data = make(n)
        if not isinstance(data, keras.utils.PyDataset):
            return passes.adapted(data.skip(start) if start else data)
        count = data.num_batches
        order = range(count) if count else None
        if shuffle and count:
            order = np.random.default_rng([seed, n]).permutation(count)
        return passes.adapted(_Part(data, order, start))

    return passes.Passes(rest, num_batches or passes.adapted(first).num_batches)


class _Part(keras.utils.PyDataset):
    """The items of a PyDataset in this order, from the place `start` on."""

    def __init__(self, source, order, start):
        super().__init__(source.workers, source.use_multiprocessing, source.max_queue_size)
        self.source, self.order, self.start = source, order, start
        self.on_epoch_begin, self.on_epoch_end = source.on_epoch_begin, source.on_epoch_end

    @property
    def num_batches(self):
        return None if self.order is None else len(self.order) - self.start

    def __getitem__(self, index):
        place = index + self.start
        return self.source[place if self.order is None else int(self.order[place])]


def _is_data(source) -> bool:
    return isinstance(source, keras.utils.PyDataset) or backends.is_dataset(source)


def _check_hooks(source, is_made) -> None:
    """Refuse a PyDataset that changes between epochs, which usually is how it shuffles."""
    hooks = ("on_epoch_begin", "on_epoch_end")
    if not is_made and any(getattr(type(source), hook) is not getattr(keras.utils.PyDataset, hook) for hook in hooks):
        allowed = (
            "a PyDataset without `on_epoch_begin` and `on_epoch_end`, in which it may shuffle itself: use "
            "`shuffle=True`, or give a function that makes the data of a pass from its number"
        )
        checks.refuse("source", allowed, source)


def _check_repeats(source, make) -> None:
    """Refuse what differs when it is asked for twice, as far as its first batches show it."""
    one, other = (_first_batches(make(0)) for _ in range(2))
    if len(one) != len(other) or not all(map(_is_same, one, other)):
        allowed = (
            "the same whenever it is read; its first batches were others the second time. Make what is random follow "
            "from the number of the pass: `lambda n: dataset.shuffle(size, seed=n)`"
        )
        checks.refuse("source", allowed, source)


def _first_batches(data) -> list:
    if isinstance(data, keras.utils.PyDataset):
        batches = [data[0]]
    else:
        batches = list(itertools.islice(passes.adapted(data).get_numpy_iterator(), LOOK))
    return [np.asarray(part) for part in keras.tree.flatten(batches) if part is not None]


def _is_same(one, other) -> bool:
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
