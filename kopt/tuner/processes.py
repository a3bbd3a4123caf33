"""Child processes whose lines are passed on with their name, and which leave nothing behind."""

import collections
import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import time

LINE_END = re.compile(rb"\r?\n|\r(?=[^\n])")  # a progress bar returns to the beginning of its line with \r


class Child:
    """A process that may be started again under its name, the leader of a process group."""

    def __init__(self, name: str, environment: dict[str, str]):
        self.name, self.environment = name, environment
        self.process, self.finished, self.restarts = None, False, 0
        self.last_lines, self._begun = collections.deque(maxlen=20), b""

    def start(self, command: list[str], selector: selectors.BaseSelector):
        self.last_lines.clear()
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        selector.register(self.process.stdout, selectors.EVENT_READ, self)

    def signal(self, number: int):
        """Reach the process and what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def release(self):
        """Let a chief end that waits for its workers."""
        if self.process:
            self.process.stdin.close()

    def read(self) -> bool | None:
        """Pass on what there is to read: True if there was something, None if nothing, False at the end."""
        try:
            read = os.read(self.process.stdout.fileno(), 2**16)
        except BlockingIOError:
            return None
        *lines, self._begun = LINE_END.split(self._begun + read)
        self._pass_on(lines)
        return bool(read)

    def _pass_on(self, lines: list[bytes]):
        self.last_lines.extend(line.decode(errors="replace") for line in lines)
        try:
            sys.stdout.buffer.write(b"".join(b"[%s] %s\n" % (self.name.encode(), line) for line in lines))
            sys.stdout.flush()
        except BrokenPipeError:  # whoever has read the lines is gone, as after `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            signal.raise_signal(signal.SIGPIPE)

    def ended(self, selector: selectors.BaseSelector) -> int | None:
        """The exit code of a process that has ended, after all of its lines have been passed on."""
        code = self.process.poll()
        if code is None:
            return None
        self.signal(signal.SIGKILL)  # what it has left behind
        while self.read():
            pass
        self._pass_on([self._begun] if self._begun else [])
        self._begun = b""
        with contextlib.suppress(KeyError):
            selector.unregister(self.process.stdout)
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None
        return code


def pump(selector: selectors.BaseSelector, seconds: float):
    """Pass on lines as they come, or wait that long for some."""
    for key, _ in selector.select(seconds):
        if key.data.read() is False:
            selector.unregister(key.fileobj)  # closed by a process that lives on


def stop(children: list[Child], selector: selectors.BaseSelector, patience: float = 5):
    """Ask to end, then kill; lines are passed on meanwhile, so that no full pipe holds anybody up."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = [child for child in children if child.process]
        for child in running:
            child.signal(number)
        until = time.monotonic() + patience
        while running and time.monotonic() < until:
            pump(selector, 0.05)
            running = [child for child in running if child.ended(selector) is None]
