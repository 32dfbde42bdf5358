"""Whether a PNG has all the pixels that its header promises (https://www.w3.org/TR/png-3/).

Pillow leaves rows that are missing at the end black, and says nothing where the data ends as it should
(src/libImaging/ZipDecode.c): so would sd-scripts.
"""

import io
import struct
import zlib
from pathlib import Path

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_WHOLE = ((0, 0, 1, 1),)  # left, top, and the steps to the right and down
_INTERLACED = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_PIECE = 1 << 24  # bytes that are unpacked at a time


def unpack(path: Path) -> None:
    """Unpack a PNG whose chunks were verified, and count its bytes: faster than to make pixels of them.

    Raises OSError where some are missing, and zlib.error where they are damaged.
    """
    unpacker, missing = zlib.decompressobj(), 1  # until the header says how many
    with path.open("rb") as file:
        file.seek(8)
        while missing > 0:
            length, kind = struct.unpack(">I4s", file.read(8))
            content = file.read(length)
            file.seek(4, io.SEEK_CUR)  # the checksum
            if kind == b"IHDR":
                missing = _bytes(*struct.unpack(">IIBBxxB", content))
            elif kind == b"IDAT":
                while part := unpacker.decompress(content, _PIECE):
                    missing -= len(part)
                    content = unpacker.unconsumed_tail
            elif kind == b"IEND":
                raise OSError("it ends before its last row of pixels")


def _bytes(width: int, height: int, depth: int, colour: int, interlaced: int) -> int:
    """What the pixels take when they are unpacked: every row begins with a byte for its filter."""
    bits, total = depth * _CHANNELS[colour], 0
    for left, top, right, down in _INTERLACED if interlaced else _WHOLE:
        columns, rows = len(range(left, width, right)), len(range(top, height, down))
        total += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    return total
