"""Files that were damaged, exchanged or forged: each is refused with a sentence, at once, and nothing is written."""

import contextlib
import errno
import gc
import io
import json
import os
import pickle
import random
import re
import shutil
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from kopt import manifest as module
from kopt.store import Damaged, Store
from tests.conftest import BACKEND
from tests.disks import Quick, files, same, tree

pytestmark = pytest.mark.skipif(BACKEND != "tensorflow", reason="the store knows no backend")

NAMES = ["kopt-00000001.data", "kopt-00000001.json"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The bytes of two generations, by name."""
    folder = tmp_path_factory.mktemp("pair")
    with Store(folder, disk=Quick()) as store:
        store.save(tree(1))
        store.save(tree(2))
    return {name: (folder / name).read_bytes() for name in files(folder)}


def put(folder, content):
    folder.mkdir(exist_ok=True)
    for name, value in content.items():
        (folder / name).write_bytes(value)


def falls_back(folder, content, name):
    """A damaged generation 2 is refused alone, and beside generation 1 skipped with one warning."""
    put(folder, content)
    with pytest.warns(UserWarning, match=r"kopt-00000002.json is skipped: .+\. Generation 1 is used") as caught:
        found = Store(folder).load()
    assert len(caught) == 1
    assert found.number == 1
    assert same(tree(1), found.tree)
    for old in NAMES:
        (folder / old).unlink()
    with pytest.raises(Damaged, match=r"No generation can be read. .*kopt-00000002.json is skipped: "):
        Store(folder).load()


def test_every_flipped_bit_is_noticed(pair, tmp_path, record_property):
    chance, flips = random.Random(0), 0
    newer = [name for name in pair if "0002" in name]
    for turn in range(1000):
        name = newer[turn % 2]
        place = chance.randrange(8 * len(pair[name]))
        changed = bytearray(pair[name])
        changed[place // 8] ^= 1 << place % 8
        falls_back(tmp_path, pair | {name: bytes(changed)}, name)
        flips += 1
    record_property("flips", flips)


def test_every_bit_of_a_manifest_counts(pair, tmp_path):
    raw = pair["kopt-00000002.json"]
    for place in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(Damaged):
            module.parse(bytes(changed), 2)
    assert module.parse(raw, 2)["number"] == 2


def test_what_is_cut_or_grown_is_noticed(pair, tmp_path):
    chance = random.Random(1)
    for turn in range(100):
        name = ("kopt-00000002.data", "kopt-00000002.json")[turn % 2]
        falls_back(tmp_path, pair | {name: pair[name][: chance.randrange(len(pair[name]))]}, name)
        falls_back(tmp_path, pair | {name: pair[name] + bytes(chance.randrange(1, 9))}, name)


def test_a_file_of_another_generation_is_noticed(pair, tmp_path):
    one, two = pair["kopt-00000001.data"], pair["kopt-00000001.json"]
    falls_back(tmp_path, pair | {"kopt-00000002.data": one}, "data")
    falls_back(tmp_path, pair | {"kopt-00000002.json": two}, "json")
    falls_back(tmp_path, pair | {"kopt-00000002.data": one, "kopt-00000002.json": two}, "both")


def test_data_that_is_missing_is_noticed(pair, tmp_path):
    put(tmp_path, {name: value for name, value in pair.items() if name != "kopt-00000002.data"})
    with pytest.warns(UserWarning, match="its data file is missing"):
        assert Store(tmp_path).load().number == 1


@pytest.mark.parametrize("error", [errno.EIO, errno.EMFILE])
def test_a_bad_disk_is_damage_and_other_errors_are_not(error, pair, tmp_path, monkeypatch):
    put(tmp_path, pair)
    errors, read = [OSError(error, os.strerror(error))], module.read_array
    monkeypatch.setattr("kopt.store.read_array", lambda *arguments: fail(errors.pop()) if errors else read(*arguments))
    if error == errno.EIO:
        with pytest.warns(UserWarning, match=r"it cannot be read \(Input/output error\). Generation 1 is used"):
            assert Store(tmp_path).load().number == 1
    else:
        with pytest.raises(OSError, match="Too many open files"):
            Store(tmp_path).load()


def fail(error):
    raise error


def test_a_damaged_generation_does_not_push_out_a_good_one(pair, tmp_path):
    put(tmp_path, pair | {"kopt-00000002.data": pair["kopt-00000002.data"][:-1]})
    with Store(tmp_path, keep=2) as store:
        with pytest.warns(UserWarning, match="Generation 1 is used"):
            store.load()
        assert store.save(tree(3)) == 3
        assert store.generations() == [1, 3]
    assert files(tmp_path) == [*NAMES, "kopt-00000003.data", "kopt-00000003.json"]


def test_a_generation_of_a_newer_kopt_stays(pair, tmp_path):
    newer = pair["kopt-00000002.json"].replace(b'"version":1', b'"version":2')
    put(tmp_path, pair | {"kopt-00000002.json": newer})
    with Store(tmp_path, keep=1) as store:
        with pytest.warns(UserWarning, match=r"written by a newer kopt \(format 2\); this one reads up to 1"):
            store.load()
        store.save(tree(3))
        assert store.generations() == [2, 3]


# Forged files: sealed as a store seals them, so that the seal does not help.


def sealed(text) -> bytes:
    body = text if isinstance(text, bytes) else text.encode("ascii", "surrogateescape")
    return body[:-1] + module.seal(body[:-1])


def content():
    one = {"name": "a", "shape": [2], "dtype": "float32", "bytes": 8, "sha256": "0" * 64}
    two = {"name": "b", "shape": [], "dtype": "int64", "bytes": 8, "sha256": "0" * 64}
    head = {"format": "kopt.store", "version": 1, "number": 1, "size": 48, "arrays": [one, two]}
    return head | {"tree": {"a": {"$array": "a"}, "b": {"$array": "b"}}}


def forged(**fields):
    return sealed(module.canonical(content() | fields))


def entry(**fields):
    """The first array described otherwise; its name in the tree too, and the size that follows."""
    new = content()
    new["arrays"][0] |= fields
    if isinstance(fields.get("bytes"), int):
        new["size"] = 40 + fields["bytes"]
    if "name" in fields:
        new["tree"]["a"] = {"$array": fields["name"]}
    return sealed(module.canonical(new))


def plain(old, new):
    """The manifest with some of its text exchanged."""
    text = module.canonical(content())
    assert old in text
    return sealed(text.replace(old, new))


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("kopt.json", "{}")
    return file.getvalue()


def of_tree(text):
    return plain(b'{"a":{"$array":"a"},"b":{"$array":"b"}}', text)


FORGED = {
    "empty": (b"", "no manifest"),
    "zeros": (bytes(1000), "no manifest"),
    "text": (b"hello", "no manifest"),
    "pickle": (pickle.dumps({"a": 1}), "no manifest"),
    "pickle that runs": (b"cos\nsystem\n(S'touch here'\ntR.", "no manifest"),
    "zip": (zipped(), "no manifest"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(500), "no manifest"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(120), "no manifest"),
    "not utf-8": (b"\xff\xfe{\x00", "no manifest"),
    "list": (b"[1]", "no manifest"),
    "another format": (plain(b"kopt.store", b"kopt.other"), "no manifest"),
    "version 0": (plain(b'"version":1,', b'"version":0,'), "no manifest"),
    "version 01": (plain(b'"version":1,', b'"version":01,'), "no manifest"),
    "newer version": (plain(b'"version":1,', b'"version":2,'), r"newer kopt \(format 2\); this one reads up to 1"),
    "version of text": (plain(b'"version":1,', b'"version":"1",'), "no manifest"),
    "seal of another": (forged()[:-4] + b'00"}', "has changed"),
    "no seal": (module.canonical(content()), "cut short"),
    "another number": (forged(number=2), "belongs to generation 2"),
    "number of text": (forged(number="1"), "belongs to generation"),
    "number true": (forged(number=True), "belongs to generation"),
    "number 1.0": (forged(number=1.0), "belongs to generation"),
    "size of text": (forged(size="48"), "its size says otherwise"),
    "size negative": (forged(size=-1), "its size says otherwise"),
    "size wrong": (forged(size=49), "its size says otherwise"),
    "arrays a dict": (forged(arrays={}), "list of arrays is none"),
    "arrays null": (forged(arrays=None), "list of arrays is none"),
    "arrays of text": (forged(arrays=["a"]), "not described as"),
    "arrays missing": (plain(b',"size":48', b""), "fields are not those"),
    "field too many": (plain(b'"size":48', b'"size":48,"run":"rm"'), "fields are not those"),
    "fewer arrays than places": (forged(arrays=content()["arrays"][:1], size=40), "do not agree"),
    "more arrays than places": (of_tree(b'{"a":{"$array":"a"}}'), "do not agree"),
    "arrays in another order": (forged(arrays=content()["arrays"][::-1]), "do not agree"),
    "the same array twice": (forged(arrays=content()["arrays"][:1] * 2), "is there twice"),
    "the same place twice": (of_tree(b'{"a":{"$array":"a"},"b":{"$array":"a"}}'), "name that no store gives"),
    "entry without dtype": (plain(b'"dtype":"float32",', b""), "not described as"),
    "name ..": (entry(name="../a"), "name that no store gives"),
    "name absolute": (entry(name="/etc/passwd"), "name that no store gives"),
    "name with NUL": (entry(name="a\0"), "name that no store gives"),
    "name with backslash": (entry(name="..\\a"), "name that no store gives"),
    "name with a drive": (entry(name="C:a"), "name that no store gives"),
    "name with a slash": (entry(name="a/b"), "name that no store gives"),
    "name empty": (entry(name=""), "name that no store gives"),
    "name long": (entry(name="a" * 100_000), "too long"),
    "name a number": (plain(b'"name":"a"', b'"name":1'), "is none, or too long"),
    "name a list": (plain(b'"name":"a"', b'"name":["a"]'), "is none, or too long"),
    "place with a long key": (of_tree(b'{"%s":{"$array":"a"}}' % (b"k" * 5000)), "name that no store gives"),
    "place with a very long key": (
        of_tree(b'{"%s":{"$array":"a"}}' % (rb"\u00e9" * 2_000_000)),
        "name that no store gives",
    ),
    "dtype object": (entry(dtype="object"), "unknown dtype"),
    "dtype of text": (entry(dtype="U9"), "unknown dtype"),
    "dtype of fields": (entry(dtype="f4,f4"), "unknown dtype"),
    "dtype a list": (entry(dtype=["float32"]), "unknown dtype"),
    "dtype of ml_dtypes' own": (entry(dtype="finfo"), "unknown dtype"),
    "dtype long": (entry(dtype="float128"), "unknown dtype"),
    "shape negative": (entry(shape=[-2]), "impossible shape"),
    "shapes negative": (entry(shape=[-1, -2]), "impossible shape"),
    "shape true": (entry(shape=[True, 2]), "impossible shape"),
    "shape a float": (entry(shape=[2.0]), "impossible shape"),
    "shape text": (entry(shape="2"), "impossible shape"),
    "shape null": (entry(shape=None), "impossible shape"),
    "shape of lists": (entry(shape=[[2]]), "impossible shape"),
    "shape huge": (entry(shape=[10**18], bytes=4 * 10**18), "impossible shape"),
    "shape huge, with a zero": (entry(shape=[0, 2**40, 2**40], bytes=0), "impossible shape"),
    "shape of many": (entry(shape=[1] * 65), "impossible shape"),
    "shape that wraps": (entry(shape=[2**32, 2**32]), "impossible shape"),
    "bytes do not fit": (entry(shape=[3]), "do not fit its shape"),
    "bytes of text": (plain(b'"bytes":8', b'"bytes":"8"'), "do not fit its shape"),
    "bytes a float": (plain(b'"bytes":8', b'"bytes":8.0'), "do not fit its shape"),
    "checksum short": (entry(sha256="0"), "checksum of the array 'a' is none"),
    "checksum upper": (entry(sha256="A" * 64), "checksum of the array 'a' is none"),
    "checksum null": (entry(sha256=None), "checksum of the array 'a' is none"),
    "larger than its file": (entry(shape=[10**12], bytes=4 * 10**12), "its data file has 48 bytes"),
    "data of others": (forged(), "'a' has changed since"),
    "key twice": (of_tree(b'{"a":1,"a":2}'), "a key is there twice"),
    "NaN": (of_tree(b"NaN"), "'NaN' is no number"),
    "Infinity": (of_tree(b"-Infinity"), "'-Infinity' is no number"),
    "1e999": (of_tree(b"1e999"), "no JSON"),
    "long integer": (of_tree(b"9" * 1_000_000), "is no number"),
    "long float": (of_tree(b"0." + b"9" * 1_000_000), "is no number"),
    "minus zero": (of_tree(b"-0"), "not written as"),
    "spaces": (of_tree(b"[1, 2]"), "not written as"),
    "line at the end": (forged() + b"\n", "has changed"),
    "letters that need no escape": (of_tree(rb'"\u0061"'), "not written as"),
    "not ascii": (of_tree("é".encode()), "no JSON"),
    "broken utf-8": (of_tree(b'"\xff"'), "no JSON"),
    "quote missing": (of_tree(b'"a'), "no JSON"),
    "quotes": (of_tree(b'"' * 3_000_000), "more than"),
    "deep lists": (of_tree(b"[" * 100_000 + b"]" * 100_000), "nested deeper"),
    "deep, and never closed": (of_tree(b"[" * 5000), "nested deeper"),
    "deep dicts": (of_tree(b'{"a":' * 50 + b"1" + b"}" * 50), "nested deeper"),
    "just too deep": (of_tree(b"[" * 32 + b"]" * 32), "nested deeper"),
    "many lists": (of_tree(b"[" + b"[]," * 5_000_000 + b"[]]"), "more than"),
    "many numbers": (of_tree(b"[" + b"1," * 8_000_000 + b"1]"), "more than"),
    "many dicts": (of_tree(b"[" + b'{"a":{}},' * 50_000 + b"1]"), "not agree"),
    "long string": (of_tree(b'"' + b"a" * (15 << 20) + b'"'), "not agree"),
    "long string of escapes": (of_tree(b'"' + rb"\ud83d\ude00" * (1 << 20) + b'"'), "not agree"),
    "many backslashes": (of_tree(b'"' + b"\\" * (8 << 20) + b'"'), "not agree"),
    "over 16 MiB": (b'{"format":"kopt.store","version":1,' + bytes(16 << 20), "no more than 16777216"),
    "unknown tag": (of_tree(b'{"$run":"rm"}'), "what no store writes"),
    "tag of no array": (of_tree(b'{"$array":1}'), "what no store writes"),
    "tag of no float": (of_tree(b'{"$float":"0x1"}'), "what no store writes"),
    "tag of no float but a list": (of_tree(b'{"$float":["nan"]}'), "what no store writes"),
    "tag of no integer": (of_tree(b'{"$int":"9"}'), "what no store writes"),
    "tag of no dict": (of_tree(b'{"$dict":{"a":1}}'), "what no store writes"),
}


@contextlib.contextmanager
def alone():
    """The processor time of this thread, without looks for garbage: the process may hold gigabytes of other tests."""
    gc.disable()
    begin = time.thread_time()
    try:
        yield lambda: time.thread_time() - begin
    finally:
        gc.enable()


def measured(folder, match):
    """Refused with one sentence, in less than a second and 100 MB, and nothing is written there."""
    before = {path: path.lstat() for path in [*folder.parent.iterdir(), *folder.iterdir()]}
    with alone() as seconds, pytest.raises(Damaged, match=r"kopt-00000001.json is skipped: .*" + match) as caught:
        Store(folder).load()
    assert seconds() < 1
    assert len(str(caught.value)) < 600
    tracemalloc.start()
    try:
        with pytest.raises(Damaged):
            Store(folder).load()
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    after = {path: path.lstat() for path in [*folder.parent.iterdir(), *folder.iterdir()]}
    assert after.keys() == before.keys()
    assert all(after[path].st_mtime_ns == before[path].st_mtime_ns for path in before)


def folder_with(tmp_path, manifest, data=None):
    head = (module.DATA_HEAD % (1, 1)).encode()
    put(tmp_path / "store", {NAMES[1]: manifest, NAMES[0]: head + bytes(16) if data is None else data})
    return tmp_path / "store"


@pytest.mark.parametrize("name", FORGED)
def test_forged_manifests_are_refused(name, tmp_path):
    manifest, match = FORGED[name]
    measured(folder_with(tmp_path, manifest), match)


def test_the_forger_can_do_it_right(tmp_path):
    """A forged manifest with nothing wrong is read: the cases above are refused for what they say."""
    digest = {8: "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc"}
    arrays = [entry | {"sha256": digest[8]} for entry in content()["arrays"]]
    found = Store(folder_with(tmp_path, forged(arrays=arrays))).load()
    assert same({"a": np.zeros(2, "float32"), "b": np.array(0)}, found.tree)


HEAD = (module.DATA_HEAD % (1, 1)).encode()
DATA = {
    "empty": (b"", "has 0 bytes"),
    "foreign": (b"x" * 48, "another generation, or was never ours"),
    "of another number": ((module.DATA_HEAD % (1, 2)).encode() + bytes(16), "another generation"),
    "of another format": ((module.DATA_HEAD % (2, 1)).encode() + bytes(16), "another generation"),
    "short": (HEAD + bytes(15), "has 47 bytes"),
    "long": (HEAD + bytes(17), "has 49 bytes"),
    "pickle": (pickle.dumps([1]), "bytes, not 48"),
}


@pytest.mark.parametrize("name", DATA)
def test_forged_data_is_refused(name, tmp_path):
    data, match = DATA[name]
    measured(folder_with(tmp_path, forged(), data), match)


def pipe(path):
    os.mkfifo(path)


KINDS = {
    "folder": os.mkdir,
    "pipe": pipe,
    "link": lambda path: os.symlink(f"{path}.real", path),
    "link to nowhere": lambda path: os.symlink("nowhere", path),
    "link to a device": lambda path: os.symlink("/dev/zero", path),
    "link to itself": lambda path: os.symlink(path, path),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_plain_file_is_refused(kind, name, pair, tmp_path):
    put(tmp_path / "store", {name: pair[name] for name in NAMES})
    path = tmp_path / "store" / name
    path.rename(f"{path}.real")
    KINDS[kind](path)
    measured(tmp_path / "store", "it is not a plain file")
    with Store(tmp_path / "store") as store:
        assert store.save(tree(3)) == 2
    assert os.path.lexists(path)


def test_arrays_exchanged_are_noticed(tmp_path):
    with Store(tmp_path, disk=Quick()) as store:
        store.save({"a": np.arange(4), "b": -np.arange(4)})
    path = tmp_path / NAMES[0]
    raw = path.read_bytes()
    path.write_bytes(raw[:32] + raw[64:] + raw[32:64])
    with pytest.raises(Damaged, match="the array 'a' has changed since it was saved"):
        Store(tmp_path).load()


def test_a_copy_of_a_store_is_a_store(pair, tmp_path):
    put(tmp_path / "one", pair)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert same(tree(2), Store(tmp_path / "two").load().tree)


def test_the_manifest_can_be_read_by_people(pair):
    manifest = json.loads(pair["kopt-00000002.json"])
    assert manifest["tree"]["weights"] == {
        "dense/kernel": {"$array": "weights/dense/kernel"},
        "step": {"$array": "weights/step"},
    }
    assert [array["dtype"] for array in manifest["arrays"]] == ["float32", "int64", "int64"]
    assert re.fullmatch("[0-9a-f]{64}", manifest["sha256"])


def test_there_are_enough_forged_files():
    assert len(FORGED) + len(DATA) + 2 * len(KINDS) >= 120
