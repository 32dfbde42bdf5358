"""Show what an image weighs, by layer and by part, from `docker save` on stdin.

    docker save IMAGE | python docker/size.py

Compressed is what zlib makes of each file alone, at the level that Docker pushes with: what a registry then
stores is about one percent less.
"""

import io
import json
import re
import sys
import tarfile
import zlib
from collections import Counter
from typing import IO, Any

_PACKAGE = re.compile(r"opt/venv/lib/python[\d.]+/site-packages/(?P<below>.+)")
_REMOVED = "share/sagemaker-kohya/removed.tsv"  # what the build left out
_LEVEL = 6
_LARGEST = 20

Sizes = Counter[str]  # bytes by layer or part


def main() -> None:
    """Read an image, and print its tables."""
    documents: dict[str, Any] = {}
    unpacked, packed = Sizes(), Sizes()  # by layer
    parts, parts_packed = Sizes(), Sizes()
    removed = b""
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as saved:
        for entry in saved:
            opened = saved.extractfile(entry)
            if opened is None:
                continue
            content: IO[bytes] = opened
            if entry.size < 100_000:
                content = io.BytesIO(opened.read())
                try:
                    documents[entry.name] = json.loads(content.getvalue())
                    continue
                except ValueError:  # a small layer
                    pass
            print(f"reading a layer of {entry.size / 1e6:,.1f} MB", file=sys.stderr)
            with tarfile.open(fileobj=content, mode="r|") as layer:
                for member in layer:
                    file = layer.extractfile(member) if member.isreg() else None
                    if file is None:
                        continue
                    if member.name.endswith(_REMOVED):
                        lines = file.read()
                        removed += lines
                        file = io.BytesIO(lines)
                    size = _compressed(file)
                    for sizes, name in ((packed, entry.name), (parts_packed, part(member.name))):
                        sizes[name] += size
                    for sizes, name in ((unpacked, entry.name), (parts, part(member.name))):
                        sizes[name] += member.size
    image = documents["manifest.json"][0]
    history = [step for step in documents[image["Config"]]["history"] if not step.get("empty_layer")]
    steps = zip([step.get("created_by", "the base image") for step in history], image["Layers"], strict=True)
    _table("layer", [(step, unpacked[name], packed[name]) for step, name in steps])
    largest = [(name, size, parts_packed[name]) for name, size in parts.most_common()]
    largest.sort(key=lambda row: -row[2])
    _table("part", [*largest[:_LARGEST], _sum(f"{len(largest) - _LARGEST} more", largest[_LARGEST:])])
    taken = [line.split("\t") for line in removed.decode().splitlines()]
    _table(
        "left out", [(f"{why} ({files} files)", int(size), None) for size, files, why in taken if int(size)]
    )


def part(path: str) -> str:
    """What a file belongs to: a package, one of NVIDIA's libraries, or a folder of the system."""
    if found := _PACKAGE.match(path):
        top, *rest = found["below"].split("/")
        if top == "nvidia" and rest:
            return rest[-1].split(".so")[0] if ".so" in rest[-1] else f"nvidia {rest[0]}"
        return re.sub(r"(-[\d.]+)?[.](dist-info|libs)$", "", top).replace("opencv_python_headless", "cv2")
    return "/".join(path.split("/")[:2])


def _compressed(file: IO[bytes]) -> int:
    packer, size = zlib.compressobj(_LEVEL), 0
    while chunk := file.read(1 << 20):
        size += len(packer.compress(chunk))
    return size + len(packer.flush())


def _sum(name: str, rows: list[tuple[str, int, int]]) -> tuple[str, int, int]:
    return name, sum(row[1] for row in rows), sum(row[2] for row in rows)


def _table(title: str, rows: list[tuple[str, int, int | None]]) -> None:
    print(f"{'unpacked MB':>12} {'compressed MB':>14}  {title}")
    total = ("in all", sum(row[1] for row in rows), sum(row[2] or 0 for row in rows) or None)
    for name, size, packed in [*rows, total]:
        print(f"{size / 1e6:12,.1f} {'' if packed is None else f'{packed / 1e6:,.1f}':>14}  {_short(name)}")
    print()


def _short(name: str) -> str:
    return re.sub(r"^.*/bin/sh -c ", "RUN ", name.replace(" # buildkit", ""))[:80]


if __name__ == "__main__":
    main()
