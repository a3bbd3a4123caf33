"""Snapshots of a training, in memory or in files, in the order in which they were taken."""

import os
import shutil
import tempfile
import warnings
import weakref

import ml_dtypes
import numpy as np

from kopt import checks, weights
from kopt.store import Damaged, Store

DTYPES = {"float32": None, "float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SHARE = 0.25  # of the free memory that snapshots may take before they go to the disk


class Shelf:
    """Keeps arrays with what is said of them; with a directory in the crash-safe form of `store.Store`.

    Args:
        storage: "ram", "disk", or "auto": in memory, unless all of them would take a quarter of what is free.
        directory: Where files lie; None: in a temporary directory, if anywhere.
        count: How many there will be.
        dtype: One of `DTYPES`, in which matrices are kept.
        on_save_error: "raise", or "warn", and keep in memory what cannot be written.
    """

    def __init__(self, storage, directory, count, dtype, on_save_error):
        self.storage, self.directory, self.count = storage, directory, count
        self.dtype, self.on_save_error = dtype, on_save_error
        self.records: list[dict] = []
        self.arrays: list[list | None] = []  # of each, or None if it lies in a file alone
        self.numbers: list[int | None] = []  # of each in the store
        self.store = None
        if directory is not None:
            self.open()

    def __len__(self):
        return len(self.records)

    def open(self) -> None:
        """Prove, before anything is trained, that the directory can be written."""
        if self.store is None:
            place = self.directory
            if place is None:
                place = tempfile.mkdtemp(prefix="kopt-snapshots-")
                weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
            self.store = Store(place, keep=self.count)
        self.store.open()

    def close(self) -> None:
        if self.store is not None:
            self.store.close()

    def put(self, record, arrays, as_they_are: bool = False) -> None:
        arrays, number = arrays if as_they_are else [narrowed(array, self.dtype) for array in arrays], None
        if self.directory is not None or self._is_large(arrays):
            number = self._saved(record, arrays)
        is_held = number is None or self.storage == "ram" or not self._is_large(arrays)
        self.records.append(record | {"weights": weights.digest(arrays)})
        self.arrays.append(arrays if is_held else None)
        self.numbers.append(number)

    def _is_large(self, arrays) -> bool:
        if self.storage != "auto":
            return self.storage == "disk"
        return self.count * sum(array.nbytes for array in arrays) > SHARE * free_memory()

    def _saved(self, record, arrays) -> int | None:
        try:
            self.open()
            if self.directory is not None and (stale := self.strangers()):
                self.store.remove(*stale)  # of a training that was killed before anything else knew of them
            return self.store.save({"record": record, "arrays": arrays})
        except OSError as error:
            if self.on_save_error == "raise":
                raise
            warnings.warn(f"The snapshot of cycle {record['cycle']} is kept in memory alone: {error}", stacklevel=2)
            return None

    def strangers(self) -> list[int]:
        """The numbers of what lies in the directory and is none of these snapshots."""
        if self.directory is None:
            return []
        return [number for number in self.store.generations() if number not in self.numbers]

    def get(self, i) -> list:
        """The arrays of one."""
        if self.arrays[i] is not None:
            return self.arrays[i]
        found = self.store.read(self.numbers[i])["arrays"]
        if weights.digest(found) != self.records[i]["weights"]:
            raise Damaged(f"{self.store.directory}: generation {self.numbers[i]} is another snapshot than it was")
        return found

    def state(self) -> list[dict]:
        """What a backup must hold: the arrays only of those that no directory of the user's has."""
        return [
            {"record": record, "number": number if self.directory else None}
            | ({} if self.directory and number is not None else {"arrays": self.get(i)})
            for i, (record, number) in enumerate(zip(self.records, self.numbers, strict=True))
        ]

    def restore(self, state) -> None:
        self.records, self.arrays, self.numbers = [], [], []
        for one in state:
            number, record = one["number"], one["record"]
            self.records.append(record)
            self.numbers.append(number)
            self.arrays.append(one.get("arrays"))
            if number is not None:
                self._find(len(self) - 1, one)

    def _find(self, i, one) -> None:
        """See that a snapshot is in the directory as it was when the backup was made."""
        try:
            found = self.get(i)
        except (OSError, Damaged) as error:
            allowed = f"where the snapshot of cycle {one['record']['cycle']} lies that the backup speaks of ({error})"
            checks.refuse("directory", allowed, self.directory)
        self.arrays[i] = None if self._is_large(found) else found


def narrowed(array, dtype):
    """A matrix of floats in a narrower type, if it can be in it; anything else as it is."""
    narrow = DTYPES[dtype]
    if narrow is None or array.ndim < 2 or "float" not in array.dtype.name or array.itemsize <= narrow.itemsize:
        return array
    with np.errstate(over="ignore"):
        found = array.astype(narrow)
    return found if np.array_equal(np.isfinite(found.astype(array.dtype)), np.isfinite(array)) else array


def free_memory() -> float:
    """The free memory in bytes, where the system says it."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return np.inf
