import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from entrypoint import dataset, mending, pictures, png
from entrypoint.dataset import DataSet
from entrypoint.failures import Unfit
from entrypoint.pictures import Seen
from kohya import tokenizers

BUCKETS = {"resolution": "512,512", "enable_bucket": True, "bucket_no_upscale": True, "cache_latents": True}


def listed(folder: Path) -> tuple[DataSet, dict[str, Path]]:
    files = {f"1_cat/{path.name}": path for path in sorted(folder.iterdir())}
    found, problems = dataset.inspect({name: path.stat().st_size for name, path in files.items()}, "s3://b")
    assert problems == []
    return found, files


def look(folder: Path, **values: Any) -> Seen:
    """What is seen of the files in `folder`, which the user knows as s3://b/1_cat/<name>."""
    found, files = listed(folder)
    return pictures.check(found, files, {name: f"s3://b/{name}" for name in files}, {**BUCKETS, **values})


def told(folder: Path, **values: Any) -> list[str]:
    """Every problem with the files in `folder`."""
    try:
        look(folder, **values)
    except Unfit as error:
        return [str(problem) for problem in error.problems]
    return []


def notes(folder: Path, **values: Any) -> str:
    return "\n".join(look(folder, **values).notes)


def mended(folder: Path, tree: Path, **values: Any) -> dict[str, Path]:
    """The files of the trainer's tree; those that are links lead to the data set's own."""
    found, files = listed(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    dataset.link(found, files, tree)
    mending.mend(found, look(folder, **values), tree, bool(values.get("alpha_mask")))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before, "the data set was written to"
    return {path.name: path for path in sorted((tree / "1_cat").iterdir())}


def write(path: Path, size: tuple[int, int] = (128, 96), caption: bytes = b"a cat") -> Path:
    Image.linear_gradient("L").resize(size).convert("RGB").save(path)
    path.with_suffix(".txt").write_bytes(caption)
    return path


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp"])
def test_a_picture_that_is_cut_off_or_no_picture_is_refused(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.{ending}")
    assert told(tmp_path) == []
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    said = told(tmp_path)
    assert len(said) == 1
    assert said[0].startswith(f"s3://b/1_cat/a.{ending}: the picture cannot be read")
    path.write_bytes(b"no picture at all")
    assert "the picture cannot be read (cannot identify image file)" in told(tmp_path)[0]


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        (b"a caf\xe9", "the caption is not UTF-8 (byte 5). Save it as UTF-8."),
        ("a cat".encode("utf-16"), "the caption is UTF-16, or no text. Save it as UTF-8."),
        ("猫".encode("utf-16"), "the caption is UTF-16, or no text. Save it as UTF-8."),
        ("a cat".encode("utf-16-le"), "the caption is UTF-16, or no text. Save it as UTF-8."),
        (b" \n\t\n", "the caption is blank. Write a caption, or delete the file."),
        (b"\na cat", "the caption's first line is blank, and sd-scripts reads that alone"),
    ],
)
def test_a_caption_that_cannot_be_read_is_refused(tmp_path: Path, caption: bytes, said: str) -> None:
    write(tmp_path / "a.png", caption=caption)
    assert told(tmp_path)[0].startswith(f"s3://b/1_cat/a.txt: {said}")


def test_another_line_is_no_problem_and_said(tmp_path: Path) -> None:
    write(tmp_path / "a.png", caption=b"a cat\r\nin a box\r\n")
    assert "reads the first line only of s3://b/1_cat/a.txt" in notes(tmp_path)
    assert notes(tmp_path, enable_wildcard=True) == ""


def test_lines_end_where_sd_scripts_says(tmp_path: Path) -> None:
    write(tmp_path / "a.png", caption="a cat\u2028in a box\x0band\x85a hat".encode())  # not for readlines()
    assert notes(tmp_path) == ""


def test_a_byte_order_mark_is_taken_out_of_the_trainers_copy(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.png", caption=b"\xef\xbb\xbfa cat\r\n")
    assert "1 caption (a.txt): a byte order mark is taken out" in notes(tmp_path / "in")
    made = mended(tmp_path / "in", tmp_path / "tree")
    assert made["a.txt"].read_bytes() == b"a cat\r\n"
    assert made["a.png"].is_symlink()
    assert not made["a.txt"].is_symlink()


@pytest.mark.parametrize(
    ("size", "values", "said"),
    [
        ((63, 96), {}, "it is 63×96 pixels, and a side becomes shorter than 64"),
        ((64, 64), {}, ""),
        ((20, 96), {"bucket_no_upscale": False}, ""),
        ((9000, 100), {}, "a side becomes shorter than 64"),
        ((128, 96), {"enable_bucket": False}, ""),
        ((128, 96), {"enable_bucket": False, "cache_latents": False}, "none is resized"),
        ((512, 512), {"enable_bucket": False, "cache_latents": False}, ""),
        ((600, 512), {"enable_bucket": False, "cache_latents": False, "random_crop": True}, ""),
    ],
)
def test_a_picture_of_a_size_that_cannot_be_trained_is_refused(
    tmp_path: Path, size: tuple[int, int], values: dict[str, Any], said: str
) -> None:
    write(tmp_path / "a.png", size)
    found = told(tmp_path, **values)
    assert bool(found) == bool(said)
    assert said in " ".join(found)


def test_all_are_told_at_once_up_to_a_limit(tmp_path: Path) -> None:
    for number in range(25):
        write(tmp_path / f"{number:02}.png", caption=b" ").write_bytes(b"x")
    said = told(tmp_path)
    assert len(said) == 21
    assert said[-1] == "the data set: 30 more files cannot be used. Mend these first."


def damaged(content: bytes) -> bytes:
    """One byte in the middle of a file turned over."""
    middle = len(content) * 3 // 5
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def test_a_picture_that_is_damaged_inside_is_refused(tmp_path: Path) -> None:
    """A PNG tells by its checksums. A WebP is unpacked: what its decoder lets pass nobody can tell."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    png = write(tmp_path / "a.png")
    Image.fromarray(noise).save(png)
    png.write_bytes(damaged(png.read_bytes()))
    webp = write(tmp_path / "b.webp")
    Image.fromarray(noise).save(webp, quality=90)  # its header stays as it is
    content = webp.read_bytes()
    webp.write_bytes(content[: len(content) // 2] + b"\xff" * (len(content) - len(content) // 2))
    assert [one.split(" (")[0] for one in told(tmp_path)] == [
        "s3://b/1_cat/a.png: the picture cannot be read",
        "s3://b/1_cat/b.webp: the picture cannot be read",
    ]


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def write_png(path: Path, size: tuple[int, int], *idat: bytes, mode: str = "8 2 0") -> None:
    """A PNG of these IDAT chunks, with right checksums. `mode`: depth, colour type, interlaced."""
    depth, colour, interlaced = map(int, mode.split())
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced))
    chunks = b"".join(chunk(b"IDAT", content) for content in idat)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunks + chunk(b"IEND", b"") + b"more")
    path.with_suffix(".txt").write_text("a cat")


def test_a_picture_that_would_fill_the_memory_is_refused_by_its_header(tmp_path: Path) -> None:
    """The pixels of a PNG bomb are never unpacked: there are none in this one."""
    write_png(tmp_path / "a.png", (50_000, 40_000), zlib.compress(b""))
    assert told(tmp_path) == [
        "s3://b/1_cat/a.png: it has 50000×40000 pixels, and more than 100 million are not read. "
        "Make it smaller, or take it out."
    ]


def test_a_png_with_too_few_rows_is_refused(tmp_path: Path) -> None:
    """Of which Pillow, and so sd-scripts, would make a picture with a black part."""
    rows = [b"\0" + bytes([number]) * 3 * 128 for number in range(96)]
    whole = zlib.compress(b"".join(rows))
    write_png(tmp_path / "whole.png", (128, 96), whole[:50], b"", whole[50:])
    assert told(tmp_path) == []
    for name, content in (
        ("ended", zlib.compress(b"".join(rows[:-1]))),
        ("cut", whole[:-50]),
        ("none", b""),
        ("part", zlib.compress(b"".join(rows)[:-1])),
    ):
        write_png(tmp_path / f"{name}.png", (128, 96), content)
        assert told(tmp_path) == [
            f"s3://b/1_cat/{name}.png: the picture cannot be read (it ends before its last row of pixels). "
            "Save it again, or take it out."
        ]
        (tmp_path / f"{name}.png").unlink()
        (tmp_path / f"{name}.txt").unlink()
    write_png(tmp_path / "a.png", (128, 96), whole[:100] + b"\xff" * 100 + whole[200:])
    assert "a.png: the picture cannot be read (Error -3 while decompressing" in told(tmp_path)[0]


@pytest.mark.parametrize("mode", ["1 0 0", "2 3 0", "4 0 0", "8 0 0", "16 0 0", "8 4 0", "8 2 0", "8 6 0",
                                  "16 2 0", "16 6 0", "8 2 1", "1 0 1", "16 6 1"])  # fmt: skip
@pytest.mark.parametrize("size", [(67, 65), (64, 128), (71, 66), (3, 2)])
def test_every_kind_of_png_has_its_bytes_counted(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    """By the reference, https://www.w3.org/TR/png-3/#8Interlace; a byte less is too few."""
    depth, colour, interlaced = map(int, mode.split())
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    pattern = ["16462646", "77777777", "56565656", "77777777", "36463646", "77777777", "56565656", "77777777"]
    passes: dict[tuple[str, int], int] = {}  # pixels of each row of each pass
    for row in range(size[1]):
        for column in range(size[0]):
            one = pattern[row % 8][column % 8] if interlaced else "0"
            passes[one, row] = passes.get((one, row), 0) + 1
    bytes_ = sum(1 + -(-pixels * bits // 8) for pixels in passes.values())
    path = tmp_path / "a.png"
    write_png(path, size, zlib.compress(bytes(bytes_)), mode=mode)
    png.unpack(path)
    write_png(path, size, zlib.compress(bytes(bytes_ - 1)), mode=mode)
    with pytest.raises(OSError, match="before its last row"):
        png.unpack(path)


def test_a_picture_lying_on_its_side_is_turned(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, options in (("a.jpg", {"quality": 95}), ("b.png", {}), ("c.webp", {"lossless": True})):
        picture = Image.new("RGB", (128, 96), "white")
        picture.paste("red", (0, 0, 64, 48))  # top left, as the camera held it
        exif = Image.Exif()
        exif[pictures.ORIENTATION] = 6  # which is top right, once it is turned
        picture.save(tmp_path / "in" / name, exif=exif, **options)
        (tmp_path / "in" / name).with_suffix(".txt").write_text("a cat")
    assert "3 pictures (a.jpg, b.png, c.webp): turned as its EXIF tag says" in notes(tmp_path / "in")
    assert look(tmp_path / "in").sizes == [(96, 128)] * 3
    made = mended(tmp_path / "in", tmp_path / "tree")
    assert [name for name in made if not name.endswith(".txt")] == ["a.png", "b.png", "c.png"]
    for name in ("a.png", "b.png", "c.png"):
        with Image.open(made[name]) as turned:
            assert (turned.size, turned.mode, turned.getexif().get(pictures.ORIENTATION)) == (
                (96, 128),
                "RGB",
                None,
            )
            red, white = turned.getpixel((80, 10)), turned.getpixel((10, 10))
            assert np.abs(np.subtract(red, (255, 0, 0))).max() < 8
            assert np.abs(np.subtract(white, (255, 255, 255))).max() < 8


@pytest.mark.parametrize("value", range(10))
def test_a_picture_is_turned_as_pillow_would_turn_it(value: int, tmp_path: Path) -> None:
    """Eight ways; what is no way turns nothing."""
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = value
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(noise).save(tmp_path / "in" / "a.png", exif=exif)
    (tmp_path / "in" / "a.txt").write_text("a cat")
    with Image.open(tmp_path / "in" / "a.png") as picture:
        upright = ImageOps.exif_transpose(picture)
    assert look(tmp_path / "in").sizes == [upright.size]
    made = mended(tmp_path / "in", tmp_path / "tree")["a.png"]
    assert made.is_symlink() == (value not in range(2, 9))
    with Image.open(made) as turned:
        assert np.array_equal(np.asarray(turned), np.asarray(upright))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_picture_is_read_whatever_its_ending_says(kind: str, tmp_path: Path) -> None:
    Image.new("RGB", (96, 96), "red").save(write(tmp_path / "a.png"), kind)
    assert told(tmp_path) == []


def test_a_picture_of_another_format_is_refused(tmp_path: Path) -> None:
    """Pillow reads dozens, some of them by running Ghostscript."""
    Image.new("RGB", (96, 96), "red").save(write(tmp_path / "a.png"), "EPS")
    assert "s3://b/1_cat/a.png: the picture cannot be read (cannot identify image file)" in told(tmp_path)[0]


def test_transparency_of_a_palette_in_a_tiff(tmp_path: Path) -> None:
    Image.new("PA", (96, 96)).save(write(tmp_path / "a.png"), "TIFF")
    assert notes(tmp_path) == "1 picture (a.png): transparent, put onto white"


def test_transparency_that_pillow_cannot_convert(tmp_path: Path) -> None:
    """Grey that is multiplied with its alpha, of which sd-scripts' convert("RGB") raises."""
    path = write(tmp_path / "a.png")
    Image.new("LA", (96, 96)).save(path, "TIFF")
    tag, kind = struct.pack("<H", 338), struct.pack("<HI", 3, 1)  # ExtraSamples: 2 is plain alpha
    content = path.read_bytes()
    assert content.count(tag + kind + struct.pack("<H", 2)) == 1
    path.write_bytes(content.replace(tag + kind + struct.pack("<H", 2), tag + kind + struct.pack("<H", 1)))
    assert told(tmp_path)[0].startswith("s3://b/1_cat/a.png: the picture cannot be read (")


def test_a_picture_that_cannot_be_opened_is_told_by_its_users_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(Unfit) as raised, pictures.opened(tmp_path / "a.png", "s3://b/a.png"):
        pass
    assert str(raised.value) == (
        "s3://b/a.png: the picture cannot be read (cannot identify image file). "
        "Save it again, or take it out."
    )


def test_a_picture_is_turned_although_its_exif_is_damaged(tmp_path: Path) -> None:
    """A tag of another type than EXIF gives it: Pillow reads it, and fails when it is to write it."""
    width = struct.pack(">HHI4s", 0x0100, 2, 4, b"abc\0")  # ImageWidth, as text
    turn = struct.pack(">HHIHH", pictures.ORIENTATION, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + width + turn + bytes(4)
    (tmp_path / "in").mkdir()
    Image.new("RGB", (128, 96)).save(tmp_path / "in" / "a.jpg", exif=exif)
    (tmp_path / "in" / "a.txt").write_text("a cat")
    with pytest.raises(struct.error), Image.open(tmp_path / "in" / "a.jpg") as read:
        ImageOps.exif_transpose(read)
    assert look(tmp_path / "in").sizes == [(96, 128)]
    with Image.open(mended(tmp_path / "in", tmp_path / "tree")["a.png"]) as turned:
        assert turned.size == (96, 128)


def test_what_lies_beneath_transparent_parts_is_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    clear = Image.new("RGBA", (96, 96), (255, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 48, 96))
    clear.save(tmp_path / "in" / "a.png")
    clear.save(tmp_path / "in" / "b.webp", lossless=True, exact=True)
    clear.quantize(16).save(tmp_path / "in" / "c.png")  # a palette with transparent colours
    clear.convert("LA").save(tmp_path / "in" / "d.png")
    Image.new("RGBA", (96, 96), "red").save(tmp_path / "in" / "opaque.png")
    Image.new("RGB", (96, 96), "red").quantize(4).save(tmp_path / "in" / "palette.png")
    for path in list((tmp_path / "in").iterdir()):
        path.with_suffix(".txt").write_text(path.name)
    assert notes(tmp_path / "in") == "4 pictures (a.png, b.webp, c.png, …): transparent, put onto white"
    made = mended(tmp_path / "in", tmp_path / "tree")
    for name in ("a.png", "b.png", "c.png", "d.png"):
        with Image.open(made[name]) as picture:
            assert picture.mode == "RGB"
            assert picture.getpixel((10, 10)) == (255, 255, 255)
            assert picture.getpixel((80, 10)) != (255, 255, 255)
    assert made["opaque.png"].is_symlink()
    assert made["palette.png"].is_symlink()


def test_transparency_is_left_to_a_trainer_that_reads_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    clear = Image.new("RGBA", (96, 64), (255, 0, 0, 100))
    clear.save(tmp_path / "in" / "a.png")
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 8
    clear.save(tmp_path / "in" / "b.png", exif=exif)
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.txt").write_text("a cat")
    made = mended(tmp_path / "in", tmp_path / "tree", alpha_mask=True)
    assert made["a.png"].is_symlink()
    with Image.open(made["b.png"]) as picture:
        assert (picture.mode, picture.size) == ("RGBA", (64, 96))
        assert picture.getpixel((0, 0)) == (255, 0, 0, 100)


def test_sixteen_bits_a_colour_do_not_become_white(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    ramp = np.linspace(0, 65535, 96 * 64).reshape(64, 96).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.txt").write_text("a cat")
    assert "1 picture (a.png): 16 bits a colour, made 8" in notes(tmp_path / "in")
    with Image.open(mended(tmp_path / "in", tmp_path / "tree")["a.png"]) as picture:
        assert picture.mode == "RGB"
        assert np.abs(np.asarray(picture)[:, :, 0].astype(int) - ramp // 256).max() <= 1


def test_animated_and_cmyk_pictures_are_said(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (96, 96), colour) for colour in ("red", "blue")]
    for name in ("a.png", "b.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "c.jpg", format="MPO", save_all=True, append_images=frames[1:])  # of phones
    Image.new("CMYK", (96, 96)).save(tmp_path / "d.jpg")
    for path in list(tmp_path.iterdir()):
        path.with_suffix(".txt").write_text(path.name)
    assert notes(tmp_path).splitlines() == [
        "2 pictures (a.png, b.webp): animated, of which the first frame is trained on",
        "1 picture (d.jpg): in CMYK, whose colours are converted without its profile",
    ]


def test_pictures_that_are_enlarged_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.png", (128, 96))
    write(tmp_path / "b.png", (1024, 1024))
    assert "1 of 2 pictures: smaller than the size that it is trained at, and enlarged" in notes(
        tmp_path, bucket_no_upscale=False
    )
    assert notes(tmp_path) == ""


def test_the_same_picture_twice_is_said(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.bmp", (96, 96))
    path = write(tmp_path / "other.bmp", (96, 96))  # as long, and another one
    Image.new("RGB", (96, 96), "red").save(path)
    assert notes(tmp_path) == (
        "2 pictures there more than once, and trained on as often: 1_cat/a.bmp = 1_cat/b.bmp = 1_cat/c.bmp"
    )


def test_captions_that_are_cut_are_said(tmp_path: Path) -> None:
    if not (tokenizers.folder() / tokenizers.CLIP_L / tokenizers.FILES[0]).is_file():
        pytest.skip("there are no tokenizers")
    write(tmp_path / "a.png", caption=b"cat, " * 60)  # 120 tokens
    write(tmp_path / "b.png", (90, 90), caption=b"cat, " * 30)
    assert "1 caption has more than 75 tokens, and is cut (a.txt: 120)" in notes(tmp_path)
    assert notes(tmp_path, max_token_length=150) == ""
    assert "2 captions have more than 75" in notes(tmp_path, caption_prefix="cat " * 20)
    assert "2 captions have more than 75" in notes(tmp_path, caption_suffix="cat " * 20)
    (tmp_path / "b.txt").write_text("cat " * 76)
    assert "2 captions have more than 75" in notes(tmp_path)


def test_tokens_are_counted_as_clip_does(tmp_path: Path) -> None:
    target = tokenizers.folder()
    texts = ["a photo of a cat", "It's 2 CATS,  1girl:1.2 (masterpiece)", "café — naïve ☃ 猫", "x" * 300, ""]
    counted = tokenizers.count(texts, target)
    assert counted is not None
    (clip,) = tokenizers.load(target, [tokenizers.CLIP_L])
    assert counted == [len(clip(text).input_ids) - 2 for text in texts]
    assert tokenizers.count(texts, tmp_path) is None


def test_what_a_dataset_config_says_counts_for_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.png", (40, 96))
    found, files = listed(tmp_path)
    own = {"bucket_no_upscale": False}
    (subset,) = found.subsets
    changed = DataSet((replace(subset, values=own),), ())
    assert pictures.check(changed, files, {name: name for name in files}, BUCKETS).sizes == [(40, 96)]
    with pytest.raises(Unfit, match="shorter than 64"):
        pictures.check(found, files, {name: name for name in files}, BUCKETS)


def test_a_folder_that_is_trained_twice_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.png", caption=b"\xef\xbb\xbfa cat\nin a box")
    Image.new("CMYK", (96, 96)).save(tmp_path / "b.jpg")
    (tmp_path / "b.txt").write_text("a cat")
    found, files = listed(tmp_path)
    twice = DataSet(found.subsets * 2, ())
    values, names = {**BUCKETS, "bucket_no_upscale": False}, {name: name for name in files}
    assert pictures.check(twice, files, names, values).notes == (
        "1 picture (b.jpg): in CMYK, whose colours are converted without its profile",
        "2 of 2 pictures: smaller than the size that it is trained at, and enlarged",
        "sd-scripts reads the first line only of 1_cat/a.txt",
        "1 caption (a.txt): a byte order mark is taken out, of which the first tag would begin",
    )
    assert "fetch: 2 pictures and 2 captions opened in " in capsys.readouterr().out
    (tmp_path / "a.txt").write_bytes(b" ")
    (tmp_path / "b.jpg").write_bytes(b" ")
    with pytest.raises(Unfit) as raised:
        pictures.check(twice, files, names, values)
    assert len(raised.value.problems) == 2
