"""Read which wnid each number of ILSVRC's devkit is, from its meta.mat.

A file of MATLAB's level 5 is a header and elements of (type, bytes, data); `synsets` in it is an
array of structs with the fields ILSVRC2012_ID and WNID. Only what such a file needs is read.

Source: "MAT-File Format" (MathWorks), chapter 1.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

HEADER_BYTES = 128
MATRIX, COMPRESSED = 14, 15
STRUCT, CHAR = 2, 4  # classes of a matrix
MAX_BYTES = 64 << 20
# Type of an element's numbers -> format of one; 16 and 17 are text in UTF-8 and UTF-16.
NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 16: "B", 17: "H"}


def read_wnids(path: Path) -> dict[int, str]:
    """Return number -> wnid.

    Raises:
        ValueError: The file is not such a meta.mat.
    """
    try:
        elements = list(_elements(path.read_bytes()[HEADER_BYTES:]))
        synsets = next(_fields(data) for kind, data in elements if kind == MATRIX)
        numbers, wnids = synsets["ILSVRC2012_ID"], synsets["WNID"]
        pairs = zip(numbers, wnids, strict=True)
        return {int(_values(number)[0]): _text(wnid) for number, wnid in pairs}
    except (struct.error, zlib.error, KeyError, IndexError, StopIteration, ValueError) as err:
        raise ValueError(f"{path}: is not the meta.mat of ILSVRC's devkit ({err})") from err


def _elements(raw: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + 8 <= len(raw):
        kind, size = struct.unpack_from("<II", raw, position)
        if kind >> 16:  # a short one: type and size in one word, the data in the other
            yield kind & 0xFFFF, raw[position + 4 : position + 4 + (kind >> 16)]
            position += 8
            continue
        data = raw[position + 8 : position + 8 + size]
        position += 8 + size + (-size % 8 if kind != COMPRESSED else 0)
        if kind == COMPRESSED:
            yield from _elements(zlib.decompressobj().decompress(data, MAX_BYTES))
        else:
            yield kind, data


def _parts(matrix: bytes) -> list[tuple[int, bytes]]:
    """Return what a matrix is made of: flags, sizes, name, then its contents."""
    return list(_elements(matrix))


def _fields(matrix: bytes) -> dict[str, list[bytes]]:
    """Return field name -> one matrix per struct of an array of structs."""
    flags, _, _, width, names, *contents = _parts(matrix)
    if flags[1][0] != STRUCT:
        raise ValueError("its first variable is no array of structs")
    (length,) = struct.unpack("<i", width[1])
    cuts = range(0, len(names[1]), length)
    fields = [names[1][cut : cut + length].split(b"\0")[0].decode("ascii") for cut in cuts]
    values = [data for _, data in contents]
    return {name: values[place :: len(fields)] for place, name in enumerate(fields)}


def _values(matrix: bytes) -> list[float]:
    kind, data = _parts(matrix)[3]
    form = NUMBERS[kind]
    return list(struct.unpack(f"<{len(data) // struct.calcsize(form)}{form}", data))


def _text(matrix: bytes) -> str:
    return "".join(chr(int(value)) for value in _values(matrix))
