"""The lock by which one process at a time writes to a directory: a file that names its owner.

It is written past the `Disk`: it holds nothing that a crash could lose.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import stat
import time

from kopt.disk import NO_LOCKS, PLAIN, fcntl, opened

PATIENCE = 10.0  # seconds to wait for others who look at the lock just now; they need less than a thousandth


class InUse(OSError):  # noqa: N818
    """The directory belongs to another process, or to a newer `Store` of this one."""


class Lock:
    """A file that names its owner, locked by the system where the system can (`flock`).

    The system's lock ends with its process, but a forked child holds it on: then the owner's death decides. Where the
    system has no locks, it always does. A newer `Lock` of the same process takes over, since a notebook runs a cell
    again without closing what the cell had opened.
    """

    def __init__(self, path: str):
        self.path, self.fd, self.record = path, None, None

    def take(self) -> None:
        folder = os.path.dirname(self.path)
        with _alone(folder):
            while not self._taken():
                pass

    def _taken(self) -> bool:
        """One try; false where the file was another one in the meantime."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | PLAIN, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "Not a plain file", self.path)
            free, owner = _flock(fd), owner_of(self.path)
            if not free and (owner or free is False) and not _gone(owner):
                raise InUse(_refusal(self.path, owner))
            if free is False:  # held by a child of the dead, or by an older one of this process: leave them that file
                os.unlink(self.path)
                return False
            if not _is_at(fd, self.path):
                return False
            record = _this_process()
            os.ftruncate(fd, 0)
            os.write(fd, json.dumps(record).encode())
            self._let_go()
            self.record = record
            if free:
                self.fd, fd = fd, None
            return True
        finally:
            if fd is not None:
                os.close(fd)

    def check(self) -> None:
        """Refuse unless this process still owns the directory."""
        if os.getpid() != self.record["pid"]:
            raise InUse(
                f"{self.path}: opened by process {self.record['pid']}, of which this one is a fork; open a new one"
            )
        owner = owner_of(self.path)
        if not owner:  # somebody removed the file: take it again, unless another has
            self.take()
        elif owner != self.record:
            who = "a newer Store of this process" if owner["pid"] == os.getpid() else f"process {owner['pid']}"
            raise InUse(f"{os.path.dirname(self.path)}: taken over by {who} since {owner.get('since')}")

    def is_held(self) -> bool:
        return self.record is not None and os.getpid() == self.record["pid"] and owner_of(self.path) == self.record

    def release(self) -> None:
        if self.is_held():
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self._let_go()
        self.record = None

    def _let_go(self) -> None:
        """Close, which does not unlock while a parent or a child has the file open too."""
        if self.fd is not None:
            os.close(self.fd)
        self.fd = None


@contextlib.contextmanager
def _alone(folder: str):
    """One at a time looks at the lock and takes it. Else two would find a dead owner, and the second would remove the
    lock of the first."""
    if fcntl is None:
        yield
        return
    fd, end = os.open(folder, os.O_RDONLY), time.monotonic() + PATIENCE
    try:
        while _flock(fd) is False:
            if time.monotonic() > end:
                raise InUse(f"{folder}: another process is about to take it")
            time.sleep(0.005)
        yield
    finally:
        os.close(fd)


def _flock(fd: int) -> bool | None:
    """Whether the file is now locked by us; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def owner_of(path: str) -> dict:
    """Who the file names; nobody where it says nothing that can be read."""
    try:
        with opened(path) as file:
            owner = json.loads(file.read(4096))
        return owner if type(owner["pid"]) is int and 0 < owner["pid"] < 2**31 else {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _this_process() -> dict:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    pid, host = os.getpid(), socket.gethostname()
    return {
        "pid": pid,
        "host": host,
        "since": since,
        "space": _space(),
        "born": _born(pid),
        "token": secrets.token_hex(8),
    }


def _refusal(path: str, owner: dict) -> str:
    who = f"process {owner['pid']} on {owner.get('host')} since {owner.get('since')}" if owner else "an unknown process"
    return f"{os.path.dirname(path)} is in use by {who}. If that process has ended for sure, remove {path}"


def _gone(owner: dict) -> bool:
    """Whether the owner is surely no other living process: one of this machine that has ended, or this very one."""
    if not owner or owner.get("host") != socket.gethostname() or owner.get("space") != _space():
        return False
    born = _born(owner["pid"])
    other = born and owner.get("born") and born != owner["born"]  # the number was given to a new process
    return born is None or bool(other) or owner["pid"] == os.getpid()


def _space() -> str:
    """Where a number of a process means the same process: since this start of the machine, in this container."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _born(pid: int) -> str | None:
    """When a process began, in the system's own count; None if it has ended, "" if the system does not tell."""
    if os.name == "nt":
        return _born_on_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return ""


def _born_on_windows(pid: int) -> str | None:
    import ctypes

    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    handle = kernel.OpenProcess(0x1000, False, pid)  # no more than to ask whether it is there
    if not handle:
        return None if ctypes.get_last_error() == 87 else ""
    kernel.CloseHandle(handle)
    return ""
