"""A process that may be killed: it imports the store without Keras, and so starts at once.

Each command is a function below; its arguments are those of the command line.
"""

import os
import random
import signal
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    package = types.ModuleType("kopt")
    package.__path__ = [str(ROOT / "kopt")]
    sys.modules["kopt"] = package
    sys.path.insert(0, str(ROOT))

from kopt.store import Store  # noqa: E402
from tests.disks import Killer, Quick, same, tree  # noqa: E402


def say(*words):
    print(*words, flush=True)


def hold(directory, fork=""):
    """Own the directory until killed, perhaps with a child that holds on to what its parent had open."""
    store = Store(directory)
    store.open()
    store.save(tree(1))
    if fork:
        child = os.fork()
        if child:
            say("child", child)
        else:
            os.close(1)
            time.sleep(60)
            os._exit(0)
    say("owner", os.getpid())
    time.sleep(60)


def loop(directory):
    """Save until killed, as fast as it goes."""
    with Store(directory, keep=1, disk=Quick()) as store:
        count = 0
        while True:
            count += 1
            store.save(tree(count))
            if count == 1:
                say("saved")


def limited(directory, size):
    """Save on a disk where no file may be larger."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Store(directory) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
        try:
            store.save(tree(2))
        except OSError as error:
            say(error.errno, error.filename)


def race(directory):
    """Try to own the directory once the parent says so."""
    sys.stdin.readline()
    try:
        store = Store(directory)
        store.open()
        say("mine")
        sys.stdin.readline()
        store.close()
    except OSError as error:
        say("theirs", error)


def kills(directory, soak, seed):
    """Fork children that save, kill each, and look at what is left: at every operation, and at random times."""
    done, at = 0, 0
    for half in (False, True):
        at, killed = 0, True
        while killed:
            at += 1
            killed = one(directory, saves=3, disk=Killer(at, half))
            done += killed
    chance, operations = random.Random(int(seed)), at
    for _ in range(int(soak)):
        done += one(directory, saves=10**9, wait=chance.uniform(0.001, 0.04))
    say(done, operations)


def one(directory, saves, disk=None, wait=None):
    """One child; whether it was killed. What it said was saved must be there, or what it was saving just then."""
    start = Store(directory).load()
    before = start.tree["count"] if start else 0
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with Store(directory, disk=disk) as store:
            for count in range(before + 1, before + 1 + saves):
                store.save(tree(count))
                os.write(writer, b".")
        os._exit(0)
    os.close(writer)
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    said = 0
    while block := os.read(reader, 65536):
        said += len(block)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    found = Store(directory).load()
    count = found.tree["count"] if found else 0
    assert before + said <= count <= before + said + 1, (before, said, count)
    assert found is None or same(tree(count), found.tree)
    return status != 0


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("error")
    globals()[sys.argv[1]](*sys.argv[2:])
