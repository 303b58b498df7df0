"""Media: pictures of any form become the same upright RGB, and nothing hostile or broken gets through."""

import errno
import io
import os
import pickle
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmembed.content import Image
from mmembed.errors import CacheError, MediaError
from mmembed.media import MediaLimits, MediaStore, build_once


def gradient(width=40, height=20):
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return PIL.Image.fromarray(np.stack([columns, rows, rows[::-1]], axis=-1).astype(np.uint8))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width=60_000, height=60_000):
    """A valid PNG header of 3.6 gigapixels with hardly any data behind it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "media"
    (folder / "deep").mkdir(parents=True)
    gradient().save(folder / "deep" / "a.png")
    gradient().save(tmp_path / "secret.png")
    return folder


@pytest.fixture
def store(root, tmp_path):
    return MediaStore(root, cache_dir=tmp_path / "cache")


def test_all_forms_of_one_picture_are_equal(root, store):
    data = encoded(gradient())
    pq.write_table(pa.table({"image_id": ["x", "y"], "image": [data, data]}), root / "t.parquet")
    sources = ["deep/a.png", str(root / "deep" / "a.png"), data, gradient(), "t.parquet#y", "t.parquet#image[0]"]
    for source in sources:
        opened = store.open(Image(source))
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), np.asarray(gradient())), source
        assert store.size(Image(source)) == (40, 20)
        store.check(Image(source))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_from_the_header_is_the_size_after_rotation(store, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image = Image(encoded(gradient(), "JPEG", exif=exif))
    assert store.size(image) == store.open(image).size
    reference = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(image.source))).convert("RGB")
    assert np.array_equal(np.asarray(store.open(image)), np.asarray(reference))


def test_transparency_is_put_on_white_and_sixteen_bits_are_kept(store):
    clear = PIL.Image.new("RGBA", (2, 2), (200, 0, 0, 0))
    assert store.open(Image(encoded(clear))).getpixel((0, 0)) == (255, 255, 255)
    palette = PIL.Image.new("P", (2, 2), 0)
    palette.putpalette([200, 0, 0])
    assert store.open(Image(encoded(palette, transparency=0))).getpixel((0, 0)) == (255, 255, 255)
    deep = PIL.Image.fromarray(np.full((2, 2), 0x4000, np.uint16))
    assert store.open(Image(encoded(deep))).getpixel((0, 0)) == (64, 64, 64)


@pytest.mark.parametrize(
    "source", ["../secret.png", "deep/../../secret.png", "{tmp}/secret.png", "link.png", "in/secret.png"]
)
def test_no_path_leaves_the_media_root(root, store, tmp_path, source):
    os.symlink(tmp_path / "secret.png", root / "link.png")
    os.symlink(tmp_path, root / "in")
    image = Image(source.replace("{tmp}", str(tmp_path)))
    for action in (store.open, store.size, store.check):
        with pytest.raises(MediaError, match="outside the media folders"):
            action(image)


def test_further_folders_are_allowed_by_name_only(root, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    gradient().save(other / "b.png")
    assert MediaStore(root, also=[other]).size(Image(str(other / "b.png"))) == (40, 20)
    with pytest.raises(MediaError, match="outside"):
        MediaStore(root, also=[other]).size(Image(str(tmp_path / "secret.png")))


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/a.png", "https://x.org/a.png", "file:///etc/passwd", "data:image/png;base64,AA"]
)
def test_urls_are_refused(store, url):
    with pytest.raises(MediaError, match="URLs are refused"):
        store.open(Image(url))


def test_allowed_urls_still_mean_http_only():
    with pytest.raises(MediaError, match="only http"):
        MediaStore(limits=MediaLimits(allow_urls=True)).open(Image("file:///etc/passwd"))


def test_a_gigantic_picture_is_refused_from_its_header(store):
    for action in (store.open, store.size, store.check):
        with pytest.raises(MediaError, match="gigantic"):
            action(Image(bomb()))
    with pytest.raises(MediaError, match="10000 x 9000 pixels; the limit is 64000000"):
        store.size(Image(bomb(10_000, 9_000)))


def test_the_number_of_bytes_is_limited(root):
    small = MediaStore(root, MediaLimits(max_bytes=50))
    with pytest.raises(MediaError, match="the limit is 50"):
        small.open(Image("deep/a.png"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_truncated_picture_is_found_without_and_with_decoding(store, kind):
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    whole = encoded(PIL.Image.fromarray(noise), kind)
    store.check(Image(whole))
    for action in (store.check, store.open):
        with pytest.raises(MediaError, match=r"truncated|not a readable image"):
            action(Image(whole[: len(whole) // 2]))


def test_what_is_no_picture_is_named(root, store):
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("hello")
    for source, named in [("empty.png", "an empty file"), ("text.png", "not a readable"), ("no.png", "no such file")]:
        with pytest.raises(MediaError, match=named):
            store.open(Image(source))
    with pytest.raises(MediaError, match="not a usable path"):
        store.open(Image("a\0b.png"))


def test_a_row_that_is_not_there_is_named(root, store):
    rows = [encoded(gradient()), None]
    pq.write_table(pa.table({"image_id": ["x", "y"], "image": rows}), root / "t.parquet")
    for reference, named in [("z", "its ids look like 'x'"), ("image[2]", "has 2 rows"), ("y", "no image bytes")]:
        with pytest.raises(MediaError, match=named):
            store.open(Image(f"t.parquet#{reference}"))
    pq.write_table(pa.table({"caption": ["x"]}), root / "u.parquet")
    with pytest.raises(MediaError, match="no column holds image bytes"):
        store.open(Image("u.parquet#x"))


@pytest.mark.parametrize("row_group_size", [1, 3, 1000])
def test_every_row_of_a_table_is_found_whatever_its_row_groups(root, store, row_group_size):
    values = [encoded(PIL.Image.new("RGB", (2, 2), (i, 0, 0))) for i in range(20)]
    images = pa.array([{"bytes": value, "path": None} for value in values])
    table = pa.table({"image_id": [f"id-{i}" for i in range(20)], "image": images})
    pq.write_table(table, root / "t.parquet", row_group_size=row_group_size)
    order = np.random.default_rng(0).permutation(20)
    assert [store.open(Image(f"t.parquet#id-{i}")).getpixel((0, 0))[0] for i in order] == order.tolist()


def test_a_store_travels_to_workers(root, store):
    pq.write_table(pa.table({"image_id": ["x"], "image": [encoded(gradient())]}), root / "t.parquet")
    store.open(Image("t.parquet#x"))
    assert pickle.loads(pickle.dumps(store)).size(Image("t.parquet#x")) == (40, 20)


@pytest.mark.parametrize(
    ("error", "of_the_cache"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError("64 requested and 12 written"), True),  # what numpy says
        (PermissionError(errno.EACCES, "Permission denied", "{cache}/key/ids.npy"), True),
        (PermissionError(errno.EACCES, "Permission denied", "/data/rows.jsonl"), False),
        (OSError("Unexpected end of stream"), False),  # a broken parquet file
    ],
)
def test_only_errors_of_writing_are_the_caches(error, of_the_cache, tmp_path):
    if error.filename:
        error.filename = error.filename.format(cache=tmp_path)

    def build(work):
        raise error

    with pytest.raises(CacheError if of_the_cache else type(error)) as caught:
        build_once(tmp_path / "key", build)
    assert isinstance(caught.value, CacheError) == of_the_cache
    assert not (tmp_path / "key").exists()


def test_a_table_whose_pictures_stand_in_another_column_says_how_to_name_them(root, store):
    table = pa.table({"image_id": ["a"], "page": [encoded(gradient())]})
    pq.write_table(table, root / "pages.parquet")
    with pytest.raises(MediaError, match=r"no column 'image'; name the picture as page\[0\]"):
        store.read(Image("pages.parquet#a"))
    assert store.open(Image("pages.parquet#page[0]")).size == (40, 20)
