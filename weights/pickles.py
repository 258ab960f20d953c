"""What torch.save wrote, read as tensors and plain values: nothing in a file can run or grow.

    file -> rehearsal: names allowed, keys plain, no more than it has -> torch.load -> values

torch.load(weights_only=True) refuses code, but a few hundred bytes can still keep it busy for ever
(a key of tuples nested 60 deep is hashed 2^60 times) or take all memory. So the pickle is first run
with stand-ins that do nothing. Training checkpoints of timm and DeiT hold their arguments and NumPy
numbers beside the weights; these come back as plain Python values.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch

# What a damaged or hostile file can raise in readers of pickles, zip archives and tensors.
BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,  # and RecursionError, NotImplementedError
    TypeError,
    ValueError,  # and UnicodeError
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)
_PROTOCOL = 3  # the highest that torch.load(weights_only=True) reads
# A zip archive of torch.save is not compressed; one that unpacks to more than this is a trap.
_MOST_UNPACKED = 2


class Refused(pickle.UnpicklingError):
    """What a pickle may not have; the message goes on after the file's name."""


def check_regular(path: Path) -> None:
    """Refuse a pipe or a device, which would be read for ever.

    Raises:
        OSError: There is nothing at `path`.
        ValueError: It is no regular file.
    """
    path.stat()
    if not path.is_file():
        raise ValueError(f"file {path}: is not a regular file")


def is_plain_key(key: object) -> bool:
    """Whether `key` is one value, and not a tuple of others."""
    return key is None or type(key) in (str, bytes, int, float, bool)


# In Python, because only there single instructions can be narrowed.
class PlainUnpickler(pickle._Unpickler):
    """An unpickler of a few named things, whose cost is that of the bytes it reads.

    BUILD sets attributes: on an allowed class or function they would outlive the load, so it is for
    instances of `buildable` alone. Keys of dicts must be plain, because a tuple of tuples that
    share their items has as many to hash as 2 to the power of its depth.
    """

    allowed: ClassVar[Mapping[str, object]] = {}
    buildable: ClassVar[tuple[type, ...]] = ()
    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> object:
        """Return what is allowed under a name."""
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        full_name = f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
        if full_name not in self.allowed:
            raise Refused(self.refusal(full_name))
        return self.allowed[full_name]

    def refusal(self, full_name: str) -> str:
        """Say that a file asks for something that it may not have."""
        return f"names the global {full_name}, which is not allowed"

    def is_key(self, key: object) -> bool:
        """Whether `key` can be hashed in no time."""
        return is_plain_key(key)

    def _check_keys(self, keys: list) -> None:
        for key in keys:
            if not self.is_key(key):
                raise Refused(f"has a key that is a {type(key).__name__}")

    def load_build(self) -> None:
        """BUILD: set attributes of a record."""
        target = self.stack[-2]  # type: ignore[attr-defined]
        if not isinstance(target, self.buildable):
            raise Refused(f"sets attributes of a {type(target).__name__}")
        super().load_build()  # type: ignore[misc]

    def load_setitem(self) -> None:
        """SETITEM: one key and its value."""
        self._check_keys(self.stack[-2:-1])  # type: ignore[attr-defined]
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        """SETITEMS: keys and values since the last mark."""
        self._check_keys(self.stack[::2])  # type: ignore[attr-defined]
        super().load_setitems()  # type: ignore[misc]

    def load_refused(self) -> None:
        """Refuse what no file of ours has: sets, other ways to a key, memory before it is read."""
        raise Refused("has an instruction that no file of weights has")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    for _code in (pickle.DICT, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8):
        dispatch[_code[0]] = load_refused


class _Namespace:
    """Stands in for argparse.Namespace: attributes, and no behaviour."""


class _DType:
    """Stands in for numpy.dtype: the kind and size of a number, such as f8, and its byte order."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biuf][1248]", code):
            raise Refused("has a NumPy value that is no number")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise Refused("has a NumPy value of no known byte order")
        self.order = state[1]


def _scalar(dtype: _DType, data: bytes) -> float | int | bool:
    """Return a NumPy number as Python's; the bytes must be a number and nothing else."""
    kind = np.dtype(dtype.order + dtype.code)
    if type(data) is not bytes or len(data) != kind.itemsize:
        raise Refused("has a NumPy value that is no number")
    return np.frombuffer(data, kind)[0].item()


def _path(*parts: str) -> str:
    return "/".join(parts)


# Beyond what torch reads by itself. The names that a file asks for -> what it gets.
_PLAIN: Mapping[str, object] = {
    "argparse.Namespace": _Namespace,
    "numpy.dtype": _DType,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "pathlib.PosixPath": _path,
    "pathlib._local.PosixPath": _path,  # Python 3.13
    "pathlib._local.WindowsPath": _path,
    "pathlib.WindowsPath": _path,
}


class _Inert:
    """What tensors, their storages and dtypes are in the rehearsal."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _OrderedDict(dict):
    def __init__(self, pairs: object = ()) -> None:
        if pairs:  # Python 2 wrote them here, and nobody since
            raise Refused("has an OrderedDict of Python 2; save it again")

    def __setstate__(self, _: object) -> None:
        pass


def _set(items: object = ()) -> _Inert:
    if not isinstance(items, list) or not all(map(is_plain_key, items)):
        raise Refused("has a set of other things than plain values")
    return _Inert()


def _of_plain(value: object = (), *_: object) -> _Inert:
    """Allow a call whose first argument, if any, is no number to make so many items of."""
    if not isinstance(value, str | bytes | dict | float):
        raise Refused(f"makes a container of a {type(value).__name__}")
    return _Inert()


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise Refused("has bytes in no known encoding")
    return text.encode("latin1")


_REBUILT = "tensor tensor_v2 tensor_v3 parameter parameter_with_state qtensor sparse_tensor".split()
_REHEARSED: dict[str, object] = {
    **_PLAIN,
    **{f"torch._utils._rebuild_{name}": _Inert for name in _REBUILT},
    **{f"torch.{name}": _Inert for name, t in vars(torch).items() if isinstance(t, torch.dtype)},
    **{f"{kind.__module__}.{kind.__name__}": _Inert for kind in torch._storage_classes},
    "torch._utils._rebuild_meta_tensor_no_storage": _Inert,
    "torch._tensor._rebuild_from_type_v2": _Inert,
    "torch.nn.parameter.Parameter": _Inert,
    "torch.serialization._get_layout": _Inert,
    **{f"torch.{name}": _Inert for name in ("Size", "Tensor", "device")},
    **{f"torch.per_{name}_affine": _Inert for name in ("tensor", "channel")},
    "collections.OrderedDict": _OrderedDict,
    "collections.Counter": _of_plain,
    "builtins.set": _set,
    "builtins.bytearray": _of_plain,
    "builtins.complex": _of_plain,
    "_codecs.encode": _encoded,
}


class _Rehearsal(PlainUnpickler):
    allowed = _REHEARSED
    buildable = (_Namespace, _DType, _Inert, _OrderedDict)
    dispatch: ClassVar[dict[int, Callable]] = dict(PlainUnpickler.dispatch)

    def refusal(self, full_name: str) -> str:
        return (
            f"wants {full_name}: refused, and nothing was run; where it was made, save the "
            "weights alone: torch.save(model.state_dict(), path)"
        )

    def persistent_load(self, pid: object) -> _Inert:
        del pid
        return _Inert()

    def load_proto(self) -> None:
        (protocol,) = self.read(1)  # type: ignore[attr-defined]
        if protocol > _PROTOCOL:
            raise Refused(
                f"has pickle protocol {protocol}, which torch.load(weights_only=True) does not "
                "read; save it again with torch.save's own, 2"
            )

    dispatch[pickle.PROTO[0]] = load_proto


def _rehearse_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > _MOST_UNPACKED * path.stat().st_size:
        raise Refused(f"unpacks to {unpacked} bytes of {path.stat().st_size}")
    reader: Any = torch._C.PyTorchFileReader(str(path))
    if reader.has_record("constants.pkl"):
        raise Refused("is a TorchScript program, which is not run: save its state_dict()")
    _Rehearsal(io.BytesIO(reader.get_record("data.pkl")), encoding="latin1").load()


def _rehearse_old(file: BinaryIO) -> None:
    """Rehearse the format before zip: magic number, protocol, system, content, storage keys."""
    for _ in range(5):
        _Rehearsal(file, encoding="latin1").load()


def _load(path: Path) -> object:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        if is_zip:
            _rehearse_zip(path)
        else:
            _rehearse_old(file)
    plain: list = [(stand_in, name) for name, stand_in in _PLAIN.items()]
    with warnings.catch_warnings(), torch.serialization.safe_globals(plain):
        warnings.simplefilter("ignore")  # of old protocols and of kinds that are refused after it
        return torch.load(path, map_location="cpu", weights_only=True)


def read_pickle(path: Path) -> object:
    """Return what `torch.save` wrote to `path`, on the CPU: tensors and plain values only.

    Raises:
        OSError: It is not there or cannot be read.
        ValueError: It is damaged, or holds anything else, which is named; nothing in it was run.
    """
    check_regular(path)
    try:
        return _load(path)
    except BROKEN as error:
        kind = type(error).__name__
        problem = f"damaged, or not of tensors and plain values ({kind})"
        raise ValueError(
            f"file {path}: {error if isinstance(error, Refused) else problem}"
        ) from error
