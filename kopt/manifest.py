"""The form of a stored tree: a manifest in JSON, and the bytes of its arrays.

A manifest is byte for byte what a store would write for what is read from it, and ends with a checksum of all before,
so that no changed bit goes unnoticed. All of it is verified before an array is read: what damage can do fails at the
checksum, the rest is for what was forged.
"""

import hashlib
import importlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import quote

import numpy as np

VERSION = 1
HEAD = b'{"format":"kopt.store","version":%d,'
DATA_HEAD = "kopt.data %04d %016d\n"  # 32 bytes: format and number
CHUNK = 1 << 20
LARGEST, DEEPEST, PLACES = 16 << 20, 32, 1 << 18  # a manifest's bytes, nesting, values
NATIVE = {"bool", "float16", "float32", "float64", "complex64", "complex128"}
NATIVE |= {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
EXTRA = {"bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"}
EXTRA |= {"float8_e5m2", "float8_e5m2fnuz"}
LONGEST = 1024  # letters in the place of an array


class Damaged(ValueError):  # noqa: N818
    """A file is not what was saved, or was never ours."""


# Arrays


def describe(name: str, array: np.ndarray) -> dict:
    shape = [int(size) for size in array.shape]
    return {"name": name, "shape": shape, "dtype": array.dtype.name, "bytes": int(array.nbytes), "sha256": "0" * 64}


def chunks(number: int, entries: list[dict], arrays: Iterable[np.ndarray]) -> Iterable[bytes]:
    """The bytes of a data file piece by piece; the checksums are noted on the way."""
    yield (DATA_HEAD % (VERSION, number)).encode()
    for entry, array in zip(entries, arrays, strict=True):
        little = array.dtype.newbyteorder("<") if array.dtype.name in NATIVE else array.dtype
        flat = np.ascontiguousarray(array.reshape(-1), little).view(np.uint8)
        digest = hashlib.sha256()
        for start in range(0, flat.size, CHUNK):
            piece = flat[start : start + CHUNK].tobytes()  # a copy: what is hashed is what is written
            digest.update(piece)
            yield piece
        entry["sha256"] = digest.hexdigest()


def read_bytes(file, size: int) -> np.ndarray:
    buffer = np.empty(size, np.uint8)
    view = memoryview(buffer)
    while len(view):
        got = file.readinto(view)
        if not got:
            raise Damaged("its data file ends early")
        view = view[got:]
    return buffer


def read_array(file, entry: dict) -> np.ndarray:
    buffer = read_bytes(file, entry["bytes"])
    if hashlib.sha256(buffer).hexdigest() != entry["sha256"]:
        raise Damaged(f"the array {entry['name']!r} has changed since it was saved")
    dtype = _dtype(entry["dtype"])
    little = dtype.newbyteorder("<") if entry["dtype"] in NATIVE else dtype
    return buffer.view(little).astype(dtype, copy=False).reshape(entry["shape"])


def _dtype(name: str) -> np.dtype:
    return np.dtype(name if name in NATIVE else getattr(importlib.import_module("ml_dtypes"), name))


# The tree, as JSON can hold it. An object with one key that begins with "$" is a value that JSON has no word for.


def encode(value, place: tuple[str, ...], arrays: dict[str, np.ndarray]):
    """The tree in what JSON knows. The arrays go to `arrays`, by name."""
    if len(place) > DEEPEST:
        raise ValueError(f"Nested deeper than {DEEPEST}: {'/'.join(place)[:200]}")
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        if isinstance(value, np.ma.MaskedArray) or array.dtype.name not in NATIVE | EXTRA:
            _refuse(place, f"{type(value).__name__} of {array.dtype}")
        if sum(map(len, place)) > LONGEST:
            raise ValueError(f"The place of an array is longer than {LONGEST} letters: {'/'.join(place)[:100]!r}...")
        name = _name(place, arrays)
        arrays[name] = array
        return {"$array": name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                _refuse((*place, repr(key)), f"key of type {type(key).__name__}")
        coded = {str(key): encode(item, (*place, str(key)), arrays) for key, item in value.items()}
        return {"$dict": coded} if _tagged(coded) else coded
    if isinstance(value, (list, tuple)):
        return [encode(item, (*place, str(index)), arrays) for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, str)):
        return value if not isinstance(value, str) else str(value)
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else {"$int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    return _refuse(place, type(value).__name__)


def decode(value, place: tuple[str, ...], leaf: Callable[[str, tuple[str, ...]], Any]):
    """The tree from what JSON gave; an array is `leaf(name, place)`."""
    if isinstance(value, list):
        return [decode(item, (*place, str(index)), leaf) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if not _tagged(value):
        return {key: decode(item, (*place, key), leaf) for key, item in value.items()}
    ((tag, inner),) = value.items()
    if tag == "$dict" and isinstance(inner, dict) and _tagged(inner):
        return {key: decode(item, (*place, key), leaf) for key, item in inner.items()}
    if tag == "$array" and isinstance(inner, str):
        return leaf(inner, place)
    if tag == "$float" and inner in ("nan", "inf", "-inf"):
        return float(inner)
    if tag == "$int" and isinstance(inner, str) and re.fullmatch("-?0x[0-9a-f]+", inner):
        return int(inner, 16)
    raise Damaged("its tree holds what no store writes")


def _tagged(value: dict) -> bool:
    return len(value) == 1 and next(iter(value)).startswith("$")


def _refuse(place: tuple[str, ...], what: str):
    raise TypeError(f"A store cannot hold what is at {'/'.join(place) or 'the top'!r}: {what}")


def _name(place: tuple[str, ...], taken) -> str:
    """An array's name: its place, `callbacks/0/best`, in letters that no file system could misread."""
    parts = [quote(part, " :#()=+,$", errors="surrogatepass") for part in "/".join(place).split("/")]
    name = "/".join(part if part.strip(".") else "%2E" * len(part) or "%" for part in parts)
    name = re.sub(r"^([A-Za-z]):", r"\1%3A", name)  # no drive
    count = 2
    unique = name
    while unique in taken:  # {"a/b": x, "a": {"b": y}}
        unique, count = f"{name}#{count}", count + 1
    return unique


# The manifest


def canonical(content: dict) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def compose(number: int, entries: list[dict], tree) -> bytes:
    size = len(DATA_HEAD % (0, 0)) + sum(entry["bytes"] for entry in entries)
    content = {"format": "kopt.store", "version": VERSION, "number": number, "size": size, "arrays": entries}
    body = canonical(content | {"tree": tree})[:-1]
    return body + seal(body)


def seal(body) -> bytes:
    """What follows the body of a manifest: the checksum of all before it."""
    return b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}'


def read_manifest(file) -> bytes:
    size = os.fstat(file.fileno()).st_size
    if size > LARGEST:
        raise Damaged(f"it has {size} bytes; a manifest has no more than {LARGEST}")
    return read_bytes(file, size).tobytes()


def excess(raw: bytes) -> str | None:
    """What makes a manifest cost much to read, found before reading it: too long, too deep, too many values."""
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # every quote left begins or ends a string
    values = raw.count(b",") + raw.count(b"[") + raw.count(b"{") + raw.count(b"]") + raw.count(b"}")
    if len(raw) > LARGEST or values > PLACES or plain.count(b'"') > 4 * PLACES:
        return f"more than {PLACES} values or {LARGEST} bytes beside its arrays"
    depth = deepest = 0
    for character in re.sub(rb"[^][{}]+", b"", b"".join(plain.split(b'"')[::2])):
        depth += 1 if character in b"[{" else -1
        deepest = max(deepest, depth)
    return f"nested deeper than {DEEPEST}" if deepest > DEEPEST else None


def parse(raw: bytes, number: int) -> dict:
    """The content of a manifest, verified. What damage can do fails at the seal; the rest is for what was forged."""
    head = re.match(rb'\{"format":"kopt\.store","version":([1-9][0-9]{0,8}),', raw)
    if not head:
        raise Damaged("it is no manifest of a store")
    if int(head[1]) > VERSION:
        raise Damaged(f"written by a newer kopt (format {int(head[1])}); this one reads up to {VERSION}")
    if raw[-77:] != seal(memoryview(raw)[:-77]):
        raise Damaged("it is cut short, or has changed since it was saved")
    if too_much := excess(raw):
        raise Damaged(f"it holds what no store writes: {too_much}")
    try:
        content = json.loads(
            raw.decode("ascii"), object_pairs_hook=_pairs, parse_int=_int, parse_float=_float, parse_constant=_no_number
        )
        again = canonical(content)
    except Damaged:
        raise
    except (ValueError, RecursionError) as error:
        raise Damaged(f"it is no JSON ({type(error).__name__})") from None
    if again != raw:
        raise Damaged("it is not written as a store writes")
    _verify(content, number)
    return content


def _pairs(pairs: list[tuple[str, Any]]) -> dict:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise Damaged("a key is there twice")
    return content


def _int(text: str) -> int:
    return int(text) if len(text) <= 20 else _no_number(text)


def _float(text: str) -> float:
    return float(text) if len(text) <= 32 else _no_number(text)


def _no_number(text: str):
    raise Damaged(f"{text[:20]!r} is no number that a store writes")


def _verify(content: dict, number: int) -> None:
    """Every field of a manifest, and that its arrays, its tree and its sizes agree."""
    if list(content) != ["format", "version", "number", "size", "arrays", "tree", "sha256"]:
        raise Damaged("its fields are not those of a manifest")
    if type(content["number"]) is not int or content["number"] != number:
        raise Damaged(f"it belongs to generation {str(content['number'])[:20]}")
    entries = content["arrays"]
    if not isinstance(entries, list):
        raise Damaged("its list of arrays is none")
    for entry in entries:
        _verify_entry(entry)
    names = Counter(entry["name"] for entry in entries)
    for name, count in names.items():
        if count > 1:
            raise Damaged(f"the array {name[:100]!r} is there twice")
    total = len(DATA_HEAD % (0, 0)) + sum(entry["bytes"] for entry in entries)
    if type(content["size"]) is not int or content["size"] != total:
        raise Damaged(f"its arrays need {total} bytes, its size says otherwise")
    placed: dict[str, None] = {}

    def check(name: str, place: tuple[str, ...]) -> None:
        if sum(map(len, place)) > LONGEST or name != _name(place, placed):
            raise Damaged(f"the array {name[:100]!r} has a name that no store gives")
        placed[name] = None

    decode(content["tree"], (), check)
    if list(placed) != list(names):
        raise Damaged("its tree and its list of arrays do not agree")


def _verify_entry(entry) -> None:
    if not isinstance(entry, dict) or list(entry) != ["name", "shape", "dtype", "bytes", "sha256"]:
        raise Damaged("an array is not described as a store does")
    name, shape, dtype = entry["name"], entry["shape"], entry["dtype"]
    if not isinstance(name, str) or len(name) > 16 * LONGEST:
        raise Damaged("the name of an array is none, or too long")
    if not isinstance(dtype, str) or dtype not in NATIVE | EXTRA:
        raise Damaged(f"the array {name[:100]!r} has an unknown dtype")
    if not isinstance(shape, list) or len(shape) > 64 or any(type(n) is not int or not 0 <= n < 2**62 for n in shape):
        raise Damaged(f"the array {name[:100]!r} has an impossible shape")
    if math.prod(max(size, 1) for size in shape) * 16 >= 2**63:
        raise Damaged(f"the array {name[:100]!r} has an impossible shape")
    if type(entry["bytes"]) is not int or entry["bytes"] != math.prod(shape) * _dtype(dtype).itemsize:
        raise Damaged(f"the bytes of the array {name[:100]!r} do not fit its shape")
    if not isinstance(entry["sha256"], str) or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
        raise Damaged(f"the checksum of the array {name[:100]!r} is none")
