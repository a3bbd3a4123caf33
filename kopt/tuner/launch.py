"""A search on one machine: KerasTuner's chief and workers as processes that run one script.

`python -m kopt.tuner.launch --workers 2 search.py` needs nothing in the script that a search in one process has not.
"""

import argparse
import contextlib
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kopt import checks
from kopt.tuner.processes import Child, pump, stop

HOST, SIGNALS = "127.0.0.1", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DESCRIPTION = """Start KerasTuner's chief and workers on this machine. Each runs the script; its search() hands out
trials in the chief and runs them in the workers, and what follows search() happens in all of them, in the chief at
the end. Workers and a chief that die are started again and go on where the search was. With overwrite=True the
project is wiped once, by the chief when it begins."""
EPILOG = """Options come before the script, its own arguments after it. Exit code: 0 if all have ended by themselves, 1
if one died too often or did not end, 2 if an argument is refused, 128 and the number of a signal after that signal."""

GRACE = "seconds that the chief may go on after the last worker; give more if it trains a final model (60)"


class Over(Exception):  # noqa: N818 - no error
    """The launch ends: with an exit code, and what to say last."""


class Launch:
    def __init__(self, options: argparse.Namespace):
        self.options, self.signal, self.until = options, None, None
        self.selector = selectors.DefaultSelector()
        self.identity = f"{os.getpid()}-{time.time_ns()}"
        gpus = options.gpus or [None]
        self.chief = Child("chief", environment("chief", options.port, "" if options.gpus else None))
        self.workers = [
            Child(f"worker{i}", environment(f"worker{i}", options.port, gpus[i % len(gpus)]))
            for i in range(options.workers)
        ]
        self.children = [self.chief, *self.workers]

    def run(self) -> int:
        ours = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
        before = {number: signal.signal(number, self.heard) for number in (*ours, signal.SIGPIPE)}
        try:
            for child in self.children:
                self.start(child)
            while True:
                pump(self.selector, 0.05)
                self.look()
        except Over as over:
            code, last = over.args
        finally:
            stop(self.workers, self.selector)
            stop([self.chief], self.selector)  # after the workers, whose requests make it write files
            for number, handler in before.items():
                signal.signal(number, handler)
        say(last)
        return code

    def heard(self, number: int, frame):
        self.signal = number  # no exception: it could lose a child that is just being started

    def start(self, child: Child):
        program = str(Path(__file__).with_name("child.py"))
        arguments = [str(os.getpid()), self.identity, self.options.script, *self.options.arguments]
        child.start([sys.executable, "-u", program, *arguments], self.selector)

    def look(self):
        """Start again who has died, and find out whether all is over."""
        if self.signal:
            raise Over(128 + self.signal, f"Stopped by {signal.Signals(self.signal).name}.")
        for child in self.children:
            code = child.ended(self.selector) if child.process else None
            if code == 0:
                child.finished = True
                say(f"{child.name} has finished.")
            elif code is not None:
                self.died(child, code)
        if all(child.finished for child in self.children):
            raise Over(0, "All have finished.")
        alone = all(worker.finished for worker in self.workers)
        if self.until is None and (alone or self.chief.finished):
            self.until = time.monotonic() + self.options.grace
            self.chief.release()
        if self.until is not None and time.monotonic() > self.until:
            late = ", ".join(child.name for child in self.children if not child.finished)
            others = "last worker" if alone else "chief"
            raise Over(1, f"Stopped: {late} had not ended {self.options.grace:g} s (--grace) after the {others}.")

    def died(self, child: Child, code: int):
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if self.until is None and child.restarts < self.options.restarts:
            child.restarts += 1
            say(f"{child.name} {how}; it is started again ({child.restarts} of {self.options.restarts}).")
            self.start(child)
            return
        when = "when the search was over" if self.until is not None else f"after {child.restarts} restarts"
        lines = "".join(f"  {line}\n" for line in child.last_lines)
        raise Over(1, f"The last lines of {child.name}:\n{lines}Stopped: {child.name} {how} {when}.")


def environment(name: str, port: int, gpu: str | None) -> dict[str, str]:
    direct = [os.environ[key] for key in ("no_grpc_proxy", "no_proxy") if os.environ.get(key)][:1]
    return {
        "KERASTUNER_ORACLE_IP": HOST,
        "KERASTUNER_ORACLE_PORT": str(port),
        "KERASTUNER_TUNER_ID": name,
        "no_grpc_proxy": ",".join([*direct, HOST]),  # gRPC would take a proxy even to the loopback
    } | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})


def say(text: str):
    with contextlib.suppress(BrokenPipeError):
        print("".join(f"[launch] {line}\n" for line in text.splitlines()), end="", file=sys.stderr, flush=True)


def all_gpus() -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, or all that nvidia-smi knows."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]  # its numbers are not CUDA's
        named = subprocess.run(query, capture_output=True, text=True).stdout.replace("\n", ",")
    return [gpu.strip() for gpu in (named or "").split(",") if gpu.strip()]


def free_port(number: int) -> int:
    """This port of the loopback if nobody listens there; any such port for 0."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a launch that has just ended is no hindrance
        try:
            listener.bind((HOST, number))
            listener.listen()
        except (OSError, OverflowError) as error:
            checks.refuse("port", f"a free port of this machine ({error})", number)
        return listener.getsockname()[1]


def judged(name: str, check: checks.Check, kind: Callable = int) -> Callable:
    """A check as a type of argparse."""

    def convert(text: str):
        value = text
        with contextlib.suppress(ValueError):
            value = kind(text)
        try:
            return check(name, value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(error) from None

    return convert


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m kopt.tuner.launch", description=DESCRIPTION, epilog=EPILOG)
    workers, restarts = judged("workers", checks.count(1)), judged("restarts", checks.count(0))
    port, grace = judged("port", checks.count(1)), judged("grace", checks.nonnegative, float)
    add = parser.add_argument
    add("--workers", metavar="N", type=workers, required=True, help="how many run trials")
    add("--port", metavar="P", type=port, default=0, help="where the chief listens, on 127.0.0.1 (a free port)")
    add("--restarts", metavar="R", type=restarts, default=3, help="how often each may be started again (3)")
    add("--gpus", action="store_true", help="give each worker one GPU, in turn, and the chief none")
    add("--grace", metavar="S", type=grace, default=60.0, help=GRACE)
    add("script", help="a Python file")
    add("arguments", nargs=argparse.REMAINDER, metavar="...", help="what the script is given")
    options = parser.parse_args(given)
    try:
        if os.name != "posix":
            checks.refuse("os", "Linux or macOS, for their process groups", sys.platform)
        if not os.path.isfile(options.script):
            checks.refuse("script", "a file", options.script)
        options.port = free_port(options.port)
        options.gpus = all_gpus() if options.gpus else None
        if options.gpus == []:
            checks.refuse("gpus", "left out where neither CUDA_VISIBLE_DEVICES nor nvidia-smi names one", True)
    except ValueError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(Launch(parsed()).run())
