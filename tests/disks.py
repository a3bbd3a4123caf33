"""Disks that write down what a store does, or fail, or kill; and trees to put there. Nothing here imports Keras."""

import errno
import os
import signal

import numpy as np

from kopt.disk import Disk

OPERATIONS = ("create", "put", "sync", "close", "rename", "unlink", "make", "remove", "sync_folder")


class Watched(Disk):
    """Every operation goes through `around(name, operation, *arguments)`."""

    def around(self, name, operation, *arguments):
        return operation(self, *arguments)


def _watched(name):
    operation = getattr(Disk, name)
    return lambda self, *arguments: self.around(name, operation, *arguments)


for _name in OPERATIONS:
    setattr(Watched, _name, _watched(_name))


class Quick(Watched):
    """Syncs nothing: a test that does not cut the power does not need it."""

    def around(self, name, operation, *arguments):
        return None if name.startswith("sync") else operation(self, *arguments)


class Recorder(Watched):
    """Notes each operation; files are numbered as they are created."""

    def __init__(self):
        self.log, self.files, self.count = [], {}, 0

    def around(self, name, operation, *arguments):
        if name == "create":
            fd = operation(self, *arguments)
            self.files[fd], self.count = self.count, self.count + 1
            self.log.append(("create", arguments[0], self.files[fd]))
            return fd
        if name in ("put", "sync", "close"):
            fd, *rest = arguments
            self.log.append((name, self.files[fd], *map(bytes, rest)))
        else:
            self.log.append((name, *arguments))
        return None if name.startswith("sync") else operation(self, *arguments)


class Failing(Watched):
    """The n-th operation of a name raises, once; `full` is a disk without room for more than so many bytes."""

    def __init__(self, name=None, at=1, error=errno.EIO, full=None, kind=OSError):
        self.name, self.at, self.error, self.full, self.kind = name, at, error, full, kind

    def around(self, name, operation, *arguments):
        if name == self.name:
            self.at -= 1
            if self.at == 0:
                if name == "close":
                    operation(self, *arguments)
                raise OSError(self.error, os.strerror(self.error)) if self.kind is OSError else self.kind
        if name == "put" and self.full is not None:
            if not self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            arguments = arguments[0], arguments[1][: self.full]
            self.full -= len(arguments[1])
        return operation(self, *arguments)


class Killer(Watched):
    """Kills its process before the n-th operation, or half-way through it where it writes."""

    def __init__(self, at, half):
        self.at, self.half = at, half

    def around(self, name, operation, *arguments):
        self.at -= 1
        if self.at == 0:
            if name == "put" and self.half:
                operation(self, arguments[0], arguments[1][: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(self, *arguments)


def tree(count):
    """A tree in which every part says which one it is."""
    arrays = [np.full(200 + count % 5, count, "float32"), np.array(count), np.full((3, 0), count)]
    return {
        "count": count,
        "weights": {"dense/kernel": arrays[0], "step": arrays[1]},
        "list": [arrays[2], float(count)],
    }


def same(one, other):
    """Whether two trees are equal, down to the type of each value and the bits of each float."""
    if isinstance(one, (np.ndarray, np.generic)):
        one = np.asarray(one)
        alike = isinstance(other, np.ndarray) and one.shape == other.shape and one.dtype.name == other.dtype.name
        return alike and one.astype(other.dtype).tobytes() == other.tobytes()
    if isinstance(one, dict):
        return type(other) is dict and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(other) is list and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


def files(directory):
    return sorted(name for name in os.listdir(directory) if name != "kopt.lock")
