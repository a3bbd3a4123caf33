"""What a store does to the disk, so that a test can write each operation down, or let any one fail."""

import contextlib
import errno
import os
import stat

from kopt.manifest import Damaged

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PLAIN = os.O_CLOEXEC if hasattr(os, "O_CLOEXEC") else 0
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_BINARY", "O_NOINHERIT"):  # each where the system has it
    PLAIN |= getattr(os, _flag, 0)
NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EBADF}


class Disk:
    """All that changes the disk. Each call is one operation, done when it returns, but durable only once synced."""

    def create(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN, 0o600)

    def write(self, fd: int, data) -> None:
        view = memoryview(data)
        while len(view):
            try:
                written = self.put(fd, view)
            except InterruptedError:
                continue
            if not written:
                raise OSError(errno.EIO, "Nothing can be written")
            view = view[written:]

    def put(self, fd: int, view) -> int:
        """One call to the system, which may take less than it is given."""
        return os.write(fd, view)

    def sync(self, fd: int) -> None:
        if hasattr(fcntl, "F_FULLFSYNC"):  # on a Mac, fsync leaves it in the drive's own memory
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
                return
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, old: str, new: str) -> None:
        os.replace(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def make(self, path: str) -> None:
        os.mkdir(path, 0o700)

    def remove(self, path: str) -> None:
        """A folder, which must be empty."""
        os.rmdir(path)

    def sync_folder(self, path: str) -> None:
        """Make names durable; nothing where folders cannot be opened (Windows) or synced (some network disks)."""
        try:
            fd = os.open(path, os.O_RDONLY)
        except PermissionError:
            return
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        finally:
            os.close(fd)


def opened(path: str):
    """A plain file to read. Links are not followed, and what is no file is not even opened: a pipe would hang."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise Damaged("it is not a plain file")
    try:
        fd = os.open(path, os.O_RDONLY | PLAIN)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Damaged("it is not a plain file") from None
        raise
    file = os.fdopen(fd, "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        file.close()
        raise Damaged("it is not a plain file")
    return file
