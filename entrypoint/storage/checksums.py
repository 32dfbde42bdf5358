"""Whether a file holds what an object does, by the checksum that S3 keeps of it."""

import base64
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from entrypoint.storage.objects import RemoteObject

_CHUNK = 4 << 20  # bytes that are read at once
_PartSizes = Callable[[RemoteObject], Sequence[int] | None]
_CHECKSUMS = ("CRC64NVME", "CRC32C", "CRC32", "SHA256", "SHA1")  # cheapest first


class Damaged(Exception):
    """The file is not what S3 says it has. Its text says how the two differ."""


def verify(
    file: int, source: RemoteObject, facts: Mapping[str, Any], part_sizes: _PartSizes
) -> tuple[str, str]:
    """Compare an open file with what S3 says of its object: how it was verified, and by which checksum.

    Raises Damaged. https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html:
    a checksum is of the whole object (FULL_OBJECT), or of its parts' checksums (COMPOSITE, "…-3" for three).
    """
    if (size := os.fstat(file).st_size) != source.size:
        raise Damaged(f"{size:,} bytes, of {source.size:,}")
    for name in _CHECKSUMS:
        if stated := facts.get(f"Checksum{name}"):
            layouts = _layouts(stated, source, facts, part_sizes)
            if any(_checksum(file, name, sizes) == stated.partition("-")[0] for sizes in layouts):
                return name.lower(), stated
            if layouts:
                raise Damaged(f"its {name} is not {stated}")
    if _etag_is_md5(source, facts):
        if digest(file, "MD5", 0, source.size).hex() != source.etag:
            raise Damaged(f"its MD5 is not {source.etag}")
        return "md5", source.etag
    return "size", ""


def _layouts(
    stated: str, source: RemoteObject, facts: Mapping[str, Any], part_sizes: _PartSizes
) -> Sequence[Sequence[int] | None]:
    """The part sizes that a stated checksum may be of; None stands for the whole object."""
    kind = facts.get("ChecksumType")
    if kind == "FULL_OBJECT" or "-" not in source.etag:
        return [None]
    sizes = part_sizes(source)
    parts = [sizes] if sizes else []
    # S3 always says the kind. Where another server does not, a checksum of either kind will do.
    return parts if kind == "COMPOSITE" or "-" in stated else [None, *parts]


def _checksum(file: int, name: str, part_sizes: Sequence[int] | None) -> str:
    """The checksum as S3 writes it, in base64, without the number of parts."""
    if part_sizes is None:
        return base64.b64encode(digest(file, name, 0, os.fstat(file).st_size)).decode()
    edges = pairwise(itertools.accumulate(part_sizes, initial=0))
    digests = b"".join(digest(file, name, start, end - start) for start, end in edges)
    return base64.b64encode(_update(name)(digests)).decode()


def digest(file: int, name: str, start: int, length: int) -> bytes:
    """The checksum of `length` bytes of a file from `start` on."""
    update = _update(name)
    found = update(b"")
    end = start + length
    while chunk := os.pread(file, min(_CHUNK, end - start), start):
        found = update(chunk)
        start += len(chunk)
    return found


def _update(name: str) -> Callable[[bytes], bytes]:
    """A function that takes the next bytes and gives the checksum so far."""
    if name.startswith("CRC"):
        from awscrt import checksums  # noqa: PLC0415

        function = getattr(checksums, name.lower())
        width = 8 if name == "CRC64NVME" else 4
        value = 0

        def crc(data: bytes) -> bytes:
            nonlocal value
            value = int(function(data, value))
            return value.to_bytes(width, "big")

        return crc
    running = hashlib.new(name.lower(), usedforsecurity=False)

    def hashed(data: bytes) -> bytes:
        running.update(data)
        return running.digest()

    return hashed


def _etag_is_md5(source: RemoteObject, facts: Mapping[str, Any]) -> bool:
    """An ETag is the MD5 of an object that came in one part and is not encrypted by KMS or by the customer.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html; nor is it one in a directory bucket.
    """
    kms = facts.get("ServerSideEncryption", "").startswith("aws:kms")
    other = "SSECustomerAlgorithm" in facts or source.uri.bucket.endswith("--x-s3")
    return not kms and not other and re.fullmatch("[0-9a-f]{32}", source.etag) is not None
