from array import array

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from entrypoint.packed import Packed, Rows, encoded, numbers
from entrypoint.storage import RemoteObject, S3Uri
from entrypoint.storage.objects import RemoteObjects

PATHS = st.text(st.sampled_from("ab./ é\udc80\U0001f431") | st.characters(), max_size=12)
HEX = st.text("0123456789abcdef", min_size=32, max_size=32)
ETAGS = st.one_of(HEX, HEX.map(str.upper), HEX.map(lambda etag: f"{etag}-3"), st.text(max_size=40))


@given(st.dictionaries(PATHS, st.tuples(st.integers(0, 2**64 - 1), ETAGS)))
@example({"b": (1, ""), "a": (0, "0123456789abcde")})  # 15 letters: as long as an MD5 with its mark
@example({"a": (0, "ab " * 10 + "ab")})  # spaces, which fromhex reads over
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_packed_listing_is_the_dict_that_it_was_made_of(given: dict[str, tuple[int, str]]) -> None:
    folder, found = S3Uri("b", "cats"), RemoteObjects(S3Uri("b", "cats"))
    objects = {path: RemoteObject(folder / path, size, etag) for path, (size, etag) in given.items()}
    for path, item in objects.items():
        found.append(path, item)
    packed = Packed(found.paths, found)
    assert dict(packed.items()) == dict(packed) == objects
    assert list(packed) == sorted(objects)
    assert list(packed.values()) == [objects[path] for path in packed]
    assert (len(packed), "no/such" in packed, packed.find("no/such")) == (len(objects), False, None)
    sizes = packed.of(found.sizes)
    assert sizes == {path: item.size for path, item in objects.items()}
    part = packed.only(packed.places[1:])
    assert dict(part) == {path: objects[path] for path in sorted(objects)[1:]}
    assert all(path not in part for path in sorted(objects)[:1])


def test_of_a_path_that_is_listed_twice_the_last_counts() -> None:
    packed = Packed(Rows(map(encoded, ["b", "a", "b"])), array("Q", [1, 2, 3]))
    assert dict(packed) == {"a": 2, "b": 3}
    with pytest.raises(KeyError, match="c"):
        packed["c"]


def test_what_is_packed_is_not_packed_again() -> None:
    packed = numbers({"b": 2, "a": 1})
    assert (dict(packed), numbers(packed) is packed) == ({"a": 1, "b": 2}, True)
