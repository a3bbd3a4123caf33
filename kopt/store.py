"""Generations of weights and state in a directory: whatever happens while one is written, an earlier one is there.

A generation is two files. `kopt-00000012.data` holds the arrays, one after the other; `kopt-00000012.json` says what
they are, with a checksum of each and of itself. The second is written once the first is durable, so that a generation
is there whole or not at all. Nothing in a file is ever run, imported or used as a file's name. A checksum finds damage;
it does not stop someone who wants to deceive.
"""

import contextlib
import errno
import os
import re
import secrets
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from kopt.disk import Disk, opened
from kopt.lock import InUse, Lock
from kopt.manifest import (
    DATA_HEAD,
    HEAD,
    VERSION,
    Damaged,
    chunks,
    compose,
    decode,
    describe,
    encode,
    excess,
    parse,
    read_array,
    read_bytes,
    read_manifest,
)

__all__ = ["Damaged", "Disk", "InUse", "Loaded", "Store"]

NAME = re.compile(r"kopt-([0-9]{8}|[1-9][0-9]{8,11})\.(data|json)")
TEMPORARY = re.compile(NAME.pattern + r"\.[0-9a-f]{16}\.tmp")


class Loaded(NamedTuple):
    number: int
    tree: Any


class Store:
    """Generations of a tree of values and arrays, in a directory; the newest whole one is what `load` finds.

    A tree is made of dicts (with strings as keys), lists and tuples (which come back as lists), and its leaves are
    None, True, False, numbers, strings and NumPy arrays. One process at a time writes; any may read meanwhile.

    Args:
        directory: where. Nothing is touched before `open`.
        keep: how many generations to keep.
        disk: what changes the disk; for tests.
    """

    def __init__(self, directory, keep: int = 2, disk: Disk | None = None):
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"`keep` must be an integer of 1 or more. Received: keep={keep!r}")
        self.directory, self.keep, self.disk = os.path.abspath(os.fspath(directory)), keep, disk or Disk()
        self.lock: Lock | None = None
        self.made = False  # whether this store made the directory
        self.last = 0  # the newest number given
        self.damaged: set[int] = set()  # what `load` could not read
        self.busy = threading.Lock()

    def open(self) -> None:
        """Make the directory, own it, prove that it can be written, and clear away what a crash left behind.

        Raises:
            InUse: it belongs to another process.
            OSError: it cannot be made or written.
        """
        self._make(self.directory)
        if self.lock is not None:
            self.lock.check()
            return
        lock = Lock(os.path.join(self.directory, "kopt.lock"))
        lock.take()
        try:
            proof = self._file(0, "data") + _ending()
            try:
                self._write(proof, [b""])
            finally:
                self._discard(proof)
            self._sweep()
        except BaseException:
            lock.release()
            raise
        self.lock = lock

    def close(self) -> None:
        """Let others have the directory."""
        if self.lock is not None:
            self.lock.release()
        self.lock = None

    def __enter__(self):
        self.open()
        return self

    def __exit__(self, *_):
        self.close()

    def save(self, tree) -> int:
        """Write a new generation and return its number. It is durable; whatever fails, the earlier ones are as before.

        Raises:
            TypeError: something in the tree cannot be stored. No file has been touched.
            InUse: another process, or a newer store of this one, has taken the directory.
            OSError: the disk refused. Its `filename` says where.
        """
        self._owned()
        arrays: dict[str, np.ndarray] = {}
        encoded = encode(tree, (), arrays)
        entries = [describe(name, array) for name, array in arrays.items()]
        with self.busy:
            self.last = number = 1 + max([self.last, *self._numbers("data"), *self._numbers("json")])
            if too_much := excess(compose(number, entries, encoded)):
                raise ValueError(f"A store cannot hold the tree: {too_much}")
            ending, data, manifest = _ending(), self._file(number, "data"), self._file(number, "json")
            named: list[str] = []
            try:
                self._publish(data, ending, chunks(number, entries, arrays.values()), named)
                self._publish(manifest, ending, [compose(number, entries, encoded)], named)
            except BaseException:
                self._discard(manifest + ending, data + ending)
                if self.lock is not None and self.lock.is_held():  # else the names may be another's by now
                    self._discard(*reversed(named))
                raise
            self._prune(number)
        return number

    def load(self, expect: Callable[[dict], None] | None = None) -> Loaded | None:
        """The newest generation that is whole, or None where there is none. Nothing is written, and nothing locked.

        Args:
            expect: called with `{array's name: (shape, dtype's name)}` before an array is read; what it raises goes
                through, for the file is whole but not the one that is wanted.

        Raises:
            Damaged: there are generations, but none is whole.
        """
        reasons: dict[int, str] = {}
        waiting = True
        while waiting:
            waiting = False
            for number in reversed(self.generations()):
                try:
                    found = self._read(number, expect)
                except FileNotFoundError:
                    if not os.path.lexists(self._file(number, "json")):  # removed beside us: look again
                        waiting = True
                        break
                    reasons[number] = "its data file is missing"
                except Damaged as error:
                    reasons[number] = str(error)
                except OSError as error:
                    if error.errno != errno.EIO:  # that is a bad disk; anything else says nothing of the file
                        raise
                    reasons[number] = f"it cannot be read ({error.strerror})"
                else:
                    self._report(reasons, number)
                    return found
        self.damaged |= reasons.keys()
        if reasons:
            raise Damaged(f"No generation can be read. {self._faults(reasons)}")
        return None

    def read(self, number: int):
        """The tree of one generation.

        Raises:
            Damaged: it is there, but not whole.
            OSError: it is not there, or the disk refuses.
        """
        return self._read(number, None).tree

    def remove(self, *numbers: int) -> None:
        """Remove these generations."""
        self._owned()
        for number in numbers:
            self._remove(number)
        self.disk.sync_folder(self.directory)

    def generations(self) -> list[int]:
        """The numbers of the generations there are, whole or not, in order."""
        return self._numbers("json")

    def clear(self) -> None:
        """Remove every generation, and the directory if this store made it and nothing else is in it."""
        self._owned()
        for number in sorted({*self._numbers("json"), *self._numbers("data")}):  # the newest last
            self._remove(number)
        self.disk.sync_folder(self.directory)
        if self.made and os.listdir(self.directory) == ["kopt.lock"]:
            self.close()
            with contextlib.suppress(OSError):
                self.disk.remove(self.directory)
                self.made = False

    def _owned(self) -> Lock:
        if self.lock is None:
            raise RuntimeError(f"{self.directory}: call `open` before `save` and `clear`")
        self.lock.check()
        return self.lock

    def _file(self, number: int, kind: str) -> str:
        if number >= 10**12:
            raise OSError(errno.EOVERFLOW, "No numbers are left", self.directory)
        return os.path.join(self.directory, f"kopt-{number:08d}.{kind}")

    def _numbers(self, kind: str) -> list[int]:
        found = map(NAME.fullmatch, self._listed())
        return sorted(int(match[1]) for match in found if match and match[2] == kind)

    def _listed(self) -> list[str]:
        try:
            return os.listdir(self.directory)
        except FileNotFoundError:
            return []

    def _make(self, path: str) -> None:
        if os.path.isdir(path):
            return
        parent = os.path.dirname(path)
        if not os.path.lexists(path) and parent != path:
            self._make(parent)
        try:
            self.disk.make(path)
        except FileExistsError:
            if not os.path.isdir(path):
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory", path) from None
            return
        self.disk.sync_folder(parent)
        self.made = path == self.directory

    def _publish(self, path: str, ending: str, chunks: Iterable[bytes], named: list[str]) -> None:
        """Write under another name, and give the name once the bytes are durable."""
        with _named(path):
            self._write(path + ending, chunks)
            self._owned()  # while we wrote, another may have become the owner
            self.disk.rename(path + ending, path)
            named.append(path)
            self.disk.sync_folder(self.directory)

    def _write(self, path: str, chunks: Iterable[bytes]) -> None:
        with _named(path):
            fd = self.disk.create(path)
            try:
                for chunk in chunks:
                    self.disk.write(fd, chunk)
                self.disk.sync(fd)
            finally:
                self.disk.close(fd)

    def _discard(self, *paths: str) -> None:
        for path in paths:
            with contextlib.suppress(OSError):
                self.disk.unlink(path)

    def _prune(self, newest: int) -> None:
        """Remove all but `keep` generations. What cannot be removed now is tried again after the next save."""
        manifests, data = self._numbers("json"), self._numbers("data")
        whole = sorted({*manifests}.intersection(data).difference(self.damaged))
        kept = {newest, *[number for number in whole if self._is_ours(self._file(number, "json"))][-self.keep :]}
        old = sorted({*manifests, *data} - kept)
        try:
            for number in old:
                self._remove(number)
            if old:
                self.disk.sync_folder(self.directory)
        except OSError as error:
            warnings.warn(f"An old generation could not be removed: {error}", stacklevel=3)

    def _remove(self, number: int) -> None:
        for path in (self._file(number, "json"), self._file(number, "data")):
            if self._is_ours(path):
                with _named(path):
                    self.disk.unlink(path)

    def _sweep(self) -> None:
        """Remove what a crash left: temporary files, and data that no manifest speaks of."""
        manifests = self._numbers("json")
        for name in sorted(self._listed()):
            match, path = TEMPORARY.fullmatch(name) or NAME.fullmatch(name), os.path.join(self.directory, name)
            alone = match and match[2] == "data" and int(match[1]) not in manifests
            if match and (alone or name.endswith(".tmp")) and self._is_ours(path):
                with _named(path):
                    self.disk.unlink(path)

    def _is_ours(self, path: str) -> bool:
        """Whether it begins as our files do. A temporary one may end early, or be zeros after a loss of power."""
        begin = HEAD % VERSION if ".json" in os.path.basename(path) else (DATA_HEAD % (VERSION, 0)).encode()[:15]
        try:
            with opened(path) as file:
                start = file.read(len(begin))
        except (OSError, Damaged):
            return False
        return start == begin or (path.endswith(".tmp") and (begin.startswith(start) or not any(start)))

    def _read(self, number: int, expect: Callable[[dict], None] | None) -> Loaded:
        """One generation, every byte of it verified."""
        with opened(self._file(number, "json")) as file:
            manifest = parse(read_manifest(file), number)
        entries = manifest["arrays"]
        with opened(self._file(number, "data")) as file:
            size = os.fstat(file.fileno()).st_size
            if size != manifest["size"]:
                raise Damaged(f"its data file has {size} bytes, not {manifest['size']}")
            head = read_bytes(file, len(DATA_HEAD % (0, 0))).tobytes()
            if head != (DATA_HEAD % (VERSION, number)).encode():
                raise Damaged("its data file belongs to another generation, or was never ours")
            if expect is not None:
                expect({entry["name"]: (tuple(entry["shape"]), entry["dtype"]) for entry in entries})
            arrays = {entry["name"]: read_array(file, entry) for entry in entries}
        return Loaded(number, decode(manifest["tree"], (), lambda name, _: arrays[name]))

    def _report(self, reasons: dict[int, str], used: int) -> None:
        self.damaged |= reasons.keys()
        self.damaged -= {used}
        if reasons:
            warnings.warn(f"{self._faults(reasons)} Generation {used} is used instead.", stacklevel=3)

    def _faults(self, reasons: dict[int, str]) -> str:
        return " ".join(f"{self._file(number, 'json')} is skipped: {reason}." for number, reason in reasons.items())


@contextlib.contextmanager
def _named(path: str):
    """Have an error of the system say which file it was."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = path
        raise


def _ending() -> str:
    return f".{secrets.token_hex(8)}.tmp"
