"""Files out of a Qt resource file, as `rcc` writes it: a tree of names, and the data that they stand for."""

import struct
from collections.abc import Iterator
from pathlib import Path

from idlefx.errors import InputError

MAGIC = b"qres"
DATED = 2  # from this version on an entry of the tree ends with eight bytes of time
PACKED, FOLDER = (0x01 | 0x04), 0x02  # flags of an entry: compressed, in two ways; a folder


def resources(file: Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of each file that was not compressed, as pictures are not.

    Raises:
        InputError: It is no such file, or damaged.
    """
    packed = file.read_bytes()
    try:
        magic, version, tree, data, names = struct.unpack_from(">4s4I", packed)
        if magic != MAGIC:
            raise ValueError("it does not begin like one")
        length = 14 if version < DATED else 22
        folders = [(0, "")]
        while folders:
            number, path = folders.pop()
            _, _, count, first = struct.unpack_from(">IHII", packed, tree + number * length)
            for child in range(first, first + count):
                at = tree + child * length
                name_at, flags, _, start = struct.unpack_from(">IHII", packed, at)
                letters, _ = struct.unpack_from(">HI", packed, names + name_at)
                begin = names + name_at + 6
                name = f"{path}/{packed[begin : begin + 2 * letters].decode('utf-16-be')}"
                if flags & FOLDER:
                    folders.append((child, name))
                elif not flags & PACKED:
                    (size,) = struct.unpack_from(">I", packed, data + start)
                    yield name, packed[data + start + 4 : data + start + 4 + size]
    except (struct.error, ValueError) as error:
        raise InputError(f"fetch: {file.name} is no Qt resource file, or damaged: {error}") from error
