"""Whatever is cut, killed or full: a generation that was saved is found again, or the one that was being saved."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kopt.store import Store
from tests.conftest import BACKEND
from tests.disks import Failing, Quick, Recorder, Watched, files, same, tree

pytestmark = pytest.mark.skipif(BACKEND != "tensorflow", reason="the store knows no backend")

CHILD = [sys.executable, str(Path(__file__).parent / "store_child.py")]


def recorded(directory, saves, keep):
    disk = Recorder()
    with Store(directory, keep, disk) as store:
        for count in range(1, saves + 1):
            assert store.save(tree(count)) == count
            disk.log.append(("saved", count))
    return [entry for entry in disk.log if entry[0] != "make"]


def replayed(log):
    """The files' pieces and how many of them are durable; the names that are durable; the renames that are not yet."""
    pieces, durable, names, pending = {}, {}, {}, []
    sources = {}
    for name, *rest in log:
        if name == "create":
            pieces[rest[1]], durable[rest[1]], sources[rest[0]] = [], 0, rest[1]
            pending.append((None, rest[0], rest[1]))
        elif name == "put":
            pieces[rest[0]].append(rest[1])
        elif name == "sync":
            durable[rest[0]] = len(pieces[rest[0]])
        elif name == "rename":
            sources[rest[1]] = sources.pop(rest[0])
            pending.append((*rest, sources[rest[1]]))
        elif name == "unlink":
            pending.append((rest[0], None, None))
        elif name == "sync_folder":
            names, pending = applied(names, pending), []
    return pieces, durable, names, pending


def applied(names, changes):
    names = dict(names)
    for old, new, file in changes:
        names.pop(old, None)
        if new is not None:
            names[new] = file
    return names


def contents(pieces, durable):
    """What the files may hold: everything, only what is durable, or all but (a part of) one write."""
    whole = {file: b"".join(written) for file, written in pieces.items()}
    yield whole
    yield {file: b"".join(written[: durable[file]]) for file, written in pieces.items()}
    for file, written in pieces.items():
        for place in range(durable[file], len(written)):
            before, piece, after = b"".join(written[:place]), written[place], b"".join(written[place + 1 :])
            if after:
                yield whole | {file: before + bytes(len(piece)) + after}
            for size in {0, min(1, len(piece)), len(piece) // 2, max(len(piece) - 1, 0)}:
                yield whole | {file: before + piece[:size]}


def states(log):
    """Every directory that a loss of power after this log may leave behind, as `{name: bytes}`."""
    pieces, durable, names, pending = replayed(log)
    namings = [applied(names, pending), names]
    namings += [applied(names, pending[:gone] + pending[gone + 1 :]) for gone in range(len(pending))]
    for place, held in enumerate(contents(pieces, durable)):
        for naming in namings if place < 2 else namings[:2]:
            yield {os.path.basename(name): held[file] for name, file in naming.items()}


def recovery(directory, state):
    """What is loaded from a directory, and whether saving works there afterwards."""
    directory.mkdir()
    for name, content in state.items():
        (directory / name).write_bytes(content)
    try:
        found = Store(directory).load()
        with Store(directory, disk=Quick()) as store:
            number = store.save(tree(99))
            again = Store(directory).load()
            left = [name for name in files(directory) if name.endswith(".tmp")]
        fine = again.number == number and same(tree(99), again.tree) and not left
        count = found.tree["count"] if found else 0
        return count if fine and (not found or same(tree(count), found.tree)) else "wrong"
    except Exception as error:  # warnings are errors here
        return repr(error)


def judged(log, folder):
    """How many states there are, and those that lose what had been saved."""
    known, faults, count = {}, [], 0
    for length in range(len(log) + 1):
        saved = max([0, *(entry[1] for entry in log[:length] if entry[0] == "saved")])
        seen = set()
        for state in states(log[:length]):
            key = frozenset(state.items())
            if key in seen:
                continue
            seen.add(key)
            if key not in known:
                known[key] = recovery(folder / str(len(known)), state)
            if known[key] not in (saved, saved + 1):
                faults.append((length, saved, known[key]))
        count += len(seen)
    return count, faults


@pytest.mark.parametrize("keep", [1, 2])
def test_every_crash_leaves_the_newest_generation_or_the_one_before(keep, tmp_path, record_property):
    log = recorded(tmp_path / "store", saves=18, keep=keep)
    count, faults = judged(log, tmp_path)
    record_property("states", count)
    print(f"{count} states after {len(log)} operations")
    assert not faults, faults[:5]
    assert count >= 1000


def without(name):
    return lambda log: [entry for entry in log if entry[0] != name]


def manifest_first(log):
    """Exchange the files of each save: a store that does so has data without their manifest's promise kept."""
    swapped, parts = [], []
    for entry in log:
        parts.append(entry)
        if entry[0] == "saved":
            ends = [place + 1 for place, (name, *_) in enumerate(parts) if name == "sync_folder"]
            start = max((place for place, part in enumerate(parts) if part[0] == "create" and ".data" in part[1]))
            swapped += parts[:start] + parts[ends[0] : ends[1]] + parts[start : ends[0]] + parts[ends[1] :]
            parts = []
    return swapped


def prune_first(log):
    """Remove the old before the new is there."""
    moved, start = [], 0
    for entry in log:
        if entry[0] == "unlink" and moved[start:]:
            moved.insert(start, entry)
        else:
            moved.append(entry)
        if entry[0] == "saved":
            start = len(moved)
    return moved


BROKEN = [without("sync"), without("sync_folder"), manifest_first, prune_first]


@pytest.mark.parametrize("broken", BROKEN, ids=["no sync", "no sync of the folder", "manifest first", "prune first"])
def test_the_check_finds_stores_that_are_not_safe(broken, tmp_path):
    log = recorded(tmp_path / "store", saves=3, keep=1)
    assert judged(broken(log), tmp_path)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_loses_no_more_than_the_save_in_progress(tmp_path, record_property):
    soak = os.environ.get("KOPT_SOAK", "30")
    done = subprocess.run([*CHILD, "kills", tmp_path / "store", soak, "7"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed, operations = map(int, done.stdout.split())
    record_property("kills", killed)
    print(f"{killed} kills, at each of {operations - 1} operations twice, and at {soak} random times")
    assert operations > 50
    assert killed >= 2 * (operations - 1) + int(soak)


def unharmed(directory, number, count):
    """Nothing is left of a save that failed, and the generation before is whole."""
    assert not [name for name in files(directory) if name.endswith(".tmp") or int(name[5:13]) > number]
    found = Store(directory).load()
    assert found.number == number
    assert same(tree(count), found.tree)


def written(directory):
    """How many bytes a save of `tree(2)` writes."""
    with Store(directory) as store:
        store.save(tree(2))
    return [(directory / name).stat().st_size for name in files(directory)]


@pytest.mark.parametrize("part", range(10))
def test_a_full_disk_leaves_the_generation_before(part, tmp_path):
    room = int(sum(written(tmp_path / "measured")) * part / 10)
    with Store(tmp_path / "store") as store:
        store.save(tree(1))
        store.disk = Failing(full=room)
        with pytest.raises(OSError, match="No space left on device: .*kopt-00000002") as caught:
            store.save(tree(2))
        assert caught.value.errno == errno.ENOSPC
        unharmed(tmp_path / "store", 1, 1)
        store.disk = Quick()
        assert store.save(tree(3)) == 3
    unharmed(tmp_path / "store", 3, 3)


@pytest.mark.skipif(os.name == "nt", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("part", range(10))
def test_a_file_that_may_not_grow_is_reported(part, tmp_path):
    size = int(max(written(tmp_path / "measured")) * part / 10)
    with Store(tmp_path / "store") as store:
        store.save(tree(1))
    done = subprocess.run([*CHILD, "limited", tmp_path / "store", str(size)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(rf"{errno.EFBIG} \S+kopt-00000002\.\S+\n", done.stdout)
    unharmed(tmp_path / "store", 1, 1)


FAULTS = [("create", 1), ("create", 2), ("put", 1), ("put", 4), ("sync", 1), ("sync", 2), ("close", 1), ("close", 2)]
FAULTS += [("rename", 1), ("rename", 2), ("sync_folder", 1), ("sync_folder", 2)]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize(("name", "at"), FAULTS)
def test_an_operation_that_fails_fails_the_save(name, at, kind, tmp_path):
    with Store(tmp_path / "store") as store:
        store.save(tree(1))
        store.disk = Failing(name, at, kind=kind)
        with pytest.raises(kind) as caught:
            store.save(tree(2))
        if kind is OSError:
            assert caught.value.errno == errno.EIO
            assert "kopt-00000002" in caught.value.filename
        unharmed(tmp_path / "store", 1, 1)
        assert store.save(tree(3)) == 3
    unharmed(tmp_path / "store", 3, 3)


def test_what_cannot_be_removed_is_removed_later(tmp_path):
    with Store(tmp_path, keep=1) as store:
        store.save(tree(1))
        store.disk = Failing("unlink")
        with pytest.warns(UserWarning, match="could not be removed: .*kopt-00000001.json"):
            assert store.save(tree(2)) == 2
        assert store.load().number == 2
        store.save(tree(3))
    assert files(tmp_path) == ["kopt-00000003.data", "kopt-00000003.json"]


class Hesitant(Watched):
    """Writes a few bytes at a time, and is interrupted between."""

    turn = 0

    def around(self, name, operation, *arguments):
        if name == "put":
            self.turn += 1
            if self.turn % 3 == 0:
                raise InterruptedError
            return operation(self, arguments[0], arguments[1][:7])
        return operation(self, *arguments)


def test_short_and_interrupted_writes_are_continued(tmp_path):
    with Store(tmp_path, disk=Hesitant()) as store:
        store.save(tree(1))
        assert same(tree(1), store.load().tree)
