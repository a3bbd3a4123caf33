"""Arrays out of Keras's files, `.keras` and `.weights.h5`: only numbers, and only those that lie in the file."""

import contextlib
import re
import shutil
import tempfile
import zipfile

import h5py
import ml_dtypes
import numpy as np

WEIGHTS = "model.weights.h5"  # the member of a `.keras` file
DAMAGED = (OSError, RuntimeError, KeyError, TypeError, ValueError, zipfile.BadZipFile)  # what h5py raises


@contextlib.contextmanager
def opened(path):
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open(path, "rb"))
        try:
            if zipfile.is_zipfile(stream):
                archive = stack.enter_context(zipfile.ZipFile(stream))
                member = stack.enter_context(archive.open(WEIGHTS))
                stream = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(member, stream)
            file = stack.enter_context(h5py.File(stream, "r"))
        except DAMAGED as error:
            raise ValueError(f"{str(path)!r} is no `.keras` or `.weights.h5` file that can be read: {error}") from error
        yield file


def entries(file, place, path) -> dict:
    """The datasets at a place, which are in this file and hold numbers; none if there is no such place."""
    try:
        group = file
        for name in place.split("/"):
            group = _member(group, name, h5py.Group)
            if group is None:
                return {}
        found = {name: _member(group, name, h5py.Dataset) for name in group}
        for name, entry in found.items():
            if not re.match(r"\d+(:|$)", name) or entry.external or entry.is_virtual or not _is_number(entry):
                raise ValueError(f"{place}/{name} is not an array of numbers")
    except DAMAGED as error:
        raise ValueError(f"The optimizer's state in {str(path)!r} cannot be read: {error}") from error
    return found


def _member(group, name, kind):
    """A member of a group that lies in the same file: no link is followed."""
    link = group.get(name, getlink=True)
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink) or not isinstance(group[name], kind):
        raise ValueError(f"{group.name}/{name} is no {kind.__name__.lower()} of this file")
    return group[name]


def _is_number(entry) -> bool:
    return entry.dtype.kind in "fiub" or _is_bfloat16(entry)


def _is_bfloat16(entry) -> bool:
    return entry.dtype == np.dtype("V2") and entry.attrs.get("dtype") == "bfloat16"


def array(entry) -> np.ndarray:
    if not _is_bfloat16(entry):
        return np.asarray(entry[()])
    return np.asarray(entry[()]).view(ml_dtypes.bfloat16)
