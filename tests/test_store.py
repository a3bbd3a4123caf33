"""What is saved is what is loaded; one process at a time writes; nothing foreign is touched."""

import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.extra.numpy as arrays
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kopt.manifest import EXTRA, NATIVE
from kopt.store import Damaged, InUse, Store
from tests.conftest import BACKEND
from tests.disks import Failing, Quick, files, same, tree

pytestmark = pytest.mark.skipif(BACKEND != "tensorflow", reason="the store knows no backend")

CHILD = [sys.executable, str(Path(__file__).parent / "store_child.py")]
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

held = arrays.arrays(
    st.sampled_from(["bool", "<i2", ">i8", "<f2", ">f4", "<f8", "<c8", ">c16", "u1"]),
    arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | held
leaves |= st.integers(0, 9000).map(lambda bits: -(3**bits))
keys = st.text(max_size=4) | st.sampled_from(["$array", "$float", "$dict", "$int", "..", "a/b", "a", "b", "C:", "/"])


def inner(children):
    lists = st.lists(children, max_size=4)
    return lists | lists.map(tuple) | st.dictionaries(keys, children, max_size=4)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    with Store(tmp_path_factory.mktemp("store"), keep=1, disk=Quick()) as store:
        yield store


@given(st.recursive(leaves, inner, max_leaves=12))
def test_trees_come_back(quick, value):
    number = quick.save(value)
    found = quick.load()
    assert found.number == number
    assert same(value, found.tree)


@pytest.mark.parametrize("name", sorted(NATIVE | EXTRA))
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3)])
def test_every_dtype_comes_back(name, shape, quick):
    dtype = np.dtype(name if name in NATIVE else getattr(ml_dtypes, name))
    bits = np.random.default_rng(0).integers(0, 2 if name == "bool" else 256, (*shape, dtype.itemsize), "uint8")
    array = bits.view(dtype).reshape(shape)
    quick.save({"whole": array, "turned": array.T, "every second": array[..., ::2] if shape else array})
    found = quick.load().tree
    assert same(array, found["whole"])
    assert same(array.T, found["turned"])
    assert all(value.flags.writeable and value.dtype.isnative for value in found.values())


def test_scalars_of_numpy_and_large_arrays(quick):
    large = np.arange(3_000_000, dtype="float32")
    quick.save([np.float64(-0.0), np.int8(3), np.bool_(True), large])
    found = quick.load().tree
    assert [value.shape for value in found] == [(), (), (), large.shape]
    assert same([np.float64(-0.0), np.int8(3), np.bool_(True), large], found)


def test_names_of_arrays_say_where_they_are(quick):
    x, seen = np.zeros(2, "float32"), {}
    quick.save({"w": {"dense/kernel": x, "m:k#2": x}, "a/b": x, "a": {"b": x}, "..": x, "C:": x, "/é\\\0": x, "l": [x]})
    quick.load(seen.update)
    names = ["w/dense/kernel", "w/m:k#2", "a/b", "a/b#2", "%2E%2E", "C%3A", "%/%C3%A9%5C%00", "l/0"]
    assert seen == dict.fromkeys(names, ((2,), "float32"))


class Number(int):
    pass


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"callbacks": [{"best": object()}]}, "'callbacks/0/best': object"),
        ([{1: 2}], "'0/1': key of type int"),
        (b"x", "'the top': bytes"),
        ({"a": {1}}, "'a': set"),
        ({"a": np.array("x")}, "'a': ndarray of <U1"),
        ({"a": np.array([None])}, "'a': ndarray of object"),
        ({"a": np.longdouble(1)}, "'a': longdouble"),
        ({"a": np.ma.array([1], mask=[1])}, "'a': MaskedArray"),
        ({"a": np.datetime64(0, "s")}, "'a': datetime64"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(value, where, tmp_path):
    with Store(tmp_path, disk=Failing()) as store:
        store.disk.name = "create"  # the first one fails
        with pytest.raises(TypeError, match=f"cannot hold what is at {where}"):
            store.save(value)
        assert store.disk.at == 1
        assert not files(tmp_path)


def test_what_is_too_deep_or_too_much_is_refused(quick):
    deep = []
    deep.append(deep)
    before = files(quick.directory)
    for value, why in (
        (deep, "deeper than 32"),
        ([0.5] * 300_000, "values or"),
        ("x" * (17 << 20), "values or"),
        ({"k" * 2000: np.zeros(1)}, "longer than"),
    ):
        with pytest.raises(ValueError, match=why):
            quick.save(value)
    assert files(quick.directory) == before


def test_strings_with_brackets_and_quotes_are_not_deep(quick):
    value = {"[" * 99: ["{" * 99, '\\"[' * 99, '\\\\"' + "[" * 99, "\ud800"]}
    quick.save(value)
    assert same(value, quick.load().tree)


def test_the_moment_of_saving_is_what_is_stored(quick):
    value = {"a": np.zeros(3), "b": [1]}
    quick.save(value)
    value["a"][:] = 1
    value["b"].append(2)
    found = quick.load().tree
    assert same({"a": np.zeros(3), "b": [1]}, found)
    found["a"][:] = 5
    assert same({"a": np.zeros(3), "b": [1]}, quick.load().tree)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_only_the_owner_may_read(tmp_path):
    folder = tmp_path / "a" / "b"
    with Store(folder) as store:
        store.save(tree(1))
        modes = [stat.S_IMODE(os.stat(folder / name).st_mode) for name in os.listdir(folder)]
    assert modes == [0o600] * 3
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)] == [0o700] * 2


def test_generations_are_kept_and_numbers_grow(tmp_path):
    store = Store(tmp_path / "store", keep=3)
    assert store.load() is None
    assert store.generations() == []
    assert not (tmp_path / "store").exists()
    with pytest.raises(RuntimeError, match="call `open` before"):
        store.save(1)
    with store:
        assert [store.save(tree(count)) for count in range(1, 6)] == [1, 2, 3, 4, 5]
        assert store.generations() == [3, 4, 5]
        store.clear()
        assert not (tmp_path / "store").exists()
    with store:
        assert store.save(tree(6)) == 6
    with Store(tmp_path / "store", keep=1) as other:
        assert other.save(tree(7)) == 7
        assert other.generations() == [7]
        other.clear()
        assert os.listdir(tmp_path / "store") == ["kopt.lock"]  # another made it
    assert (tmp_path / "store").is_dir()


def test_nothing_foreign_is_removed(tmp_path):
    (tmp_path / "kopt-00000001.data").mkdir()
    (tmp_path / "kopt-00000002.data").write_bytes(b"mine")
    (tmp_path / "kopt-00000003.json").write_bytes(b"{}")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "kopt-00000004.data.tmp").write_bytes(b"")
    (tmp_path / "kopt-00000004.data.0123456789abcdef.tmp").write_bytes(b"mine")
    (tmp_path / "kopt-00000005.data").symlink_to("notes.txt")
    (tmp_path / "kopt-٠٠٠٠٠٠٠٦.data").write_bytes(b"kopt.data 0001 ")
    (tmp_path / "kopt-00000002.data.0123456789abcdef.tmp").write_bytes(b"kopt.da")  # ours
    (tmp_path / "kopt-00000004.data").write_bytes(b"kopt.data 0001 x")  # ours, without manifest
    before = set(os.listdir(tmp_path)) - {"kopt-00000002.data.0123456789abcdef.tmp", "kopt-00000004.data"}
    with Store(tmp_path, keep=1) as store:
        assert set(files(tmp_path)) == before
        assert [store.save(tree(count)) for count in (6, 7)] == [6, 7]
        assert store.load().tree["count"] == 7
        assert set(files(tmp_path)) == before | {"kopt-00000007.data", "kopt-00000007.json"}
        store.clear()
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("keep", [0, -1, True, 1.0, "2", None])
def test_keep_is_checked(keep, tmp_path):
    with pytest.raises(ValueError, match=f"`keep` must be an integer of 1 or more. Received: keep={keep!r}"):
        Store(tmp_path, keep)


def test_a_directory_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(NotADirectoryError, match="file"):
            Store(path).open()
    (tmp_path / "kopt.lock").symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match="kopt.lock"):
        Store(tmp_path).open()
    assert (tmp_path / "file").read_text() == "x"
    with pytest.raises(OSError, match="Read-only file system: .*kopt-00000000"):
        Store(tmp_path / "other", disk=Failing("create", error=30)).open()
    assert os.listdir(tmp_path / "other") == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        Store(tmp_path).open()


def test_expect_sees_the_arrays_first_and_may_refuse(tmp_path):
    with Store(tmp_path) as store:
        store.save(tree(1))
        store.save(tree(2))

    def refuse(shapes):
        raise ValueError(f"not this: {shapes['weights/dense/kernel']}")

    with pytest.raises(ValueError, match=r"not this: \(\(202,\), 'float32'\)") as caught:
        Store(tmp_path).load(refuse)
    assert not isinstance(caught.value, Damaged)


def start(*arguments):
    return subprocess.Popen([*CHILD, *map(str, arguments)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def end(*processes):
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    owner = start("hold", tmp_path)
    try:
        owner.stdout.readline()
        with pytest.raises(InUse, match=rf"is in use by process {owner.pid} on \S+ since \d{{4}}-"):
            Store(tmp_path).open()
        assert Store(tmp_path).load().number == 1  # readers may
    finally:
        end(owner)
    with Store(tmp_path) as store:
        assert store.save(tree(2)) == 2


@forks
def test_a_child_of_a_dead_owner_does_not_hold_the_lock(tmp_path):
    owner = start("hold", tmp_path, "fork")
    child = int(owner.stdout.readline().split()[1])
    try:
        owner.stdout.readline()
        owner.kill()
        owner.wait()
        os.kill(child, 0)
        with Store(tmp_path) as store:
            assert store.save(tree(2)) == 2
    finally:
        os.kill(child, signal.SIGKILL)
        end(owner)


@forks
def test_of_many_takers_one_wins(tmp_path):
    owner = start("hold", tmp_path, "fork")
    child = int(owner.stdout.readline().split()[1])
    takers = [start("race", tmp_path) for _ in range(6)]
    try:
        owner.stdout.readline()
        owner.kill()
        owner.wait()
        for taker in takers:
            taker.stdin.write("\n")
            taker.stdin.flush()
        said = [taker.stdout.readline() for taker in takers]
        assert [word.split()[0] for word in said].count("mine") == 1, said
    finally:
        os.kill(child, signal.SIGKILL)
        end(owner, *takers)


def test_a_newer_store_of_the_same_process_takes_over(tmp_path):
    older, newer = Store(tmp_path), Store(tmp_path)
    older.open()
    older.save(tree(1))
    with newer:
        assert newer.save(tree(2)) == 2
        with pytest.raises(InUse, match="taken over by a newer Store of this process"):
            older.save(tree(3))
        older.close()
        assert newer.save(tree(3)) == 3
    assert files(tmp_path) == [f"kopt-{number:08d}.{kind}" for number in (2, 3) for kind in ("data", "json")]
    assert "kopt.lock" not in os.listdir(tmp_path)


@forks
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*fork:RuntimeWarning")
def test_a_fork_can_neither_save_nor_unlock(tmp_path):
    with Store(tmp_path) as store:
        store.save(tree(1))
        child = os.fork()
        if not child:
            code = 1
            try:
                store.save(tree(2))
            except InUse as error:
                code = 2 if "which this one is a fork" in str(error) else 3
            store.close()
            try:
                Store(tmp_path).open()
            except InUse:
                os._exit(code)
            os._exit(4)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        done = subprocess.run([*CHILD, "race", tmp_path], input="\n", capture_output=True, text=True)
        assert f"is in use by process {os.getpid()}" in done.stdout
        assert store.save(tree(2)) == 2


LOCKS = [b"", b"\0" * 40, b"{", b"[]", b'{"pid": 0}', b'{"pid": "1"}', b'{"pid": 1, "host": "elsewhere"}', b"[" * 9000]


@pytest.mark.parametrize("text", LOCKS)
def test_a_lock_that_nobody_holds_is_free(text, tmp_path):
    (tmp_path / "kopt.lock").write_bytes(text)
    with Store(tmp_path) as store:
        store.save(tree(1))


def test_where_the_system_has_no_locks_the_owner_decides(tmp_path, monkeypatch):
    monkeypatch.setattr("kopt.lock.fcntl", None)
    owner = start("hold", tmp_path)
    owner.stdout.readline()
    with pytest.raises(InUse, match=f"process {owner.pid}"):
        Store(tmp_path).open()
    end(owner)
    with Store(tmp_path) as store:
        store.save(tree(2))
        with Store(tmp_path) as newer:
            newer.save(tree(3))
            with pytest.raises(InUse, match="taken over"):
                store.save(tree(4))
    (tmp_path / "kopt.lock").write_text('{"pid": 1, "host": "elsewhere", "since": "yesterday"}')
    with pytest.raises(InUse, match="process 1 on elsewhere since yesterday"):
        Store(tmp_path).open()


@forks
def test_a_number_given_to_another_process_is_not_the_owner(tmp_path, monkeypatch):
    monkeypatch.setattr("kopt.lock._flock", lambda fd: None)
    with Store(tmp_path) as store:
        record = store.lock.record
    if not record["born"]:
        pytest.skip("the system does not tell when a process began")
    other = record | {"pid": os.getppid(), "born": "1"}
    (tmp_path / "kopt.lock").write_text(repr(other).replace("'", '"'))
    with Store(tmp_path) as store:
        assert store.save(tree(1)) == 1


def test_a_lock_that_was_removed_is_taken_again(tmp_path):
    with Store(tmp_path) as store:
        store.save(tree(1))
        (tmp_path / "kopt.lock").unlink()
        assert store.save(tree(2)) == 2
        done = subprocess.run([*CHILD, "race", tmp_path], input="\n", capture_output=True, text=True)
        assert "theirs" in done.stdout


def test_a_reader_beside_a_writer_never_sees_half_a_save(tmp_path, record_property):
    writer = start("loop", tmp_path)
    try:
        writer.stdout.readline()
        seen, last = set(), 0
        for _ in range(1000):
            found = Store(tmp_path).load()  # warnings are errors
            assert same(tree(found.tree["count"]), found.tree)
            assert found.number >= last
            last = found.number
            seen.add(last)
        record_property("generations", len(seen))
        assert len(seen) > 10
        assert writer.poll() is None
    finally:
        end(writer)


def test_two_threads_save_one_after_the_other(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with Store(tmp_path, disk=Quick()) as store, ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda count: store.save(tree(count)), range(1, 41)))
        assert sorted(numbers) == list(range(1, 41))
        assert store.load().number == 40


def test_random_garbage_of_names_is_no_trouble(tmp_path):
    chance = random.Random(0)
    for _ in range(50):
        (
            tmp_path / f"kopt-{chance.randrange(10 ** chance.randrange(1, 14))}.{chance.choice(['data', 'jso', 'x'])}"
        ).touch()
    (tmp_path / "kopt-999999999999.data").touch()
    begin = time.thread_time()
    with Store(tmp_path) as store, pytest.raises(OSError, match="No numbers are left"):
        store.save(1)
    assert time.thread_time() - begin < 1
