"""Opens images, frames of a video among them, and sounds, under limits of size and place.

Records name media that somebody else wrote, so nothing is trusted: a path may not leave the media folders (resolved, so
neither `..` nor a symbolic link gets out), a URL is refused unless asked for, and the number of pixels is read from the
header and judged before anything is decoded. A picture may also be a row of a parquet table (`images.parquet#id`).

Sounds are judged and read by `mmembed.sounds`.

Costs: `size` reads a header (60 us, then cached), `open` decodes (about 1 ms for 300 x 300 pixels). A parquet table is
copied once into an Arrow file in the cache folder, because parquet can only be read by whole row groups: after that any
row is a memory-mapped slice (30 us), shared by all processes, in constant memory.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import PIL.Image

from mmembed import sounds
from mmembed.content import Audio, Image
from mmembed.errors import CacheError, MediaError
from mmembed.media_limits import LEAST_SAMPLING_RATE
from mmembed.media_limits import MediaLimits as MediaLimits
from mmembed.staging import staging

_URL = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+://|data:)")
_ROW = re.compile(r"^(?P<column>.+)\[(?P<row>\d+)\]$")
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_CACHED_SIZES = 1_000_000  # about 150 MB of paths; then the cache starts anew
_URL_SECONDS = 20
_USUAL_LIMITS = MediaLimits()


def default_cache_dir() -> Path:
    """`$MMEMBED_CACHE`, else `mmembed` in the user's cache folder."""
    if "MMEMBED_CACHE" in os.environ:
        return Path(os.environ["MMEMBED_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmembed"


class MediaStore:
    """Opens media. Picklable: each process opens its own tables, at first use.

    Args:
        root: folder that relative paths start from and that no path may leave; None: the working directory.
        limits: see MediaLimits.
        also: further folders that paths may point into. Without root and `also` every readable file may be opened: for
            content that the caller wrote himself.
        cache_dir: where Arrow copies of parquet tables are kept; default `default_cache_dir()`.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        limits: MediaLimits = _USUAL_LIMITS,
        also: Sequence[str | Path] = (),
        cache_dir: str | Path | None = None,
    ) -> None:
        self.root = None if root is None else Path(root)
        self.limits = limits
        self.also = tuple(Path(folder) for folder in also)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        folders = self.also if self.root is None else (self.root, *self.also)
        self._allowed = tuple(dict.fromkeys(folder.resolve() for folder in folders))
        self._sizes: dict[str, tuple[int, int]] = {}
        self._lengths: dict[str, tuple[int, int]] = {}  # of a sound: samples, and how many a second
        self._tables: dict[Path, _PictureTable] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sizes": {}, "_lengths": {}, "_tables": {}}

    def size(self, image: Image, encoded: bytes | None = None) -> tuple[int, int]:
        """(width, height) in pixels after EXIF rotation, from the header only.

        Args:
            encoded: of `read`, where the picture was read already.

        Raises:
            MediaError: as `open`, but for damage that only decoding shows.
        """
        source = image.source
        if isinstance(source, str) and source in self._sizes:
            return self._sizes[source]
        with self._header(image, encoded) as header:
            size = _upright_size(header)
        if isinstance(source, str):
            if len(self._sizes) >= _CACHED_SIZES:
                self._sizes.clear()
            self._sizes[source] = size
        return size

    def check(self, image: Image | Audio, decode: bool = False) -> None:
        """Raises MediaError for what can be seen without decoding: place, header, limits, a file that ends early.

        `decode` opens the picture or sound as well, which also shows damage in the middle (about 1 ms).
        """
        if isinstance(image, Audio):
            self._sound(image)
            if decode:
                self.listen(image, LEAST_SAMPLING_RATE)
            return
        with self._header(image) as header:
            whole = isinstance(image.source, str | bytes) and _ends_well(header)
        if decode or not whole:
            self.open(image)

    def read(self, image: Image) -> bytes | None:
        """The encoded bytes of a picture; None of a PIL image. Raises MediaError as `open`, but not for damage."""
        if isinstance(image.source, PIL.Image.Image):
            return None
        with self._stream(image.source) as stream:
            return stream.read()

    def open(self, image: Image, encoded: bytes | None = None) -> PIL.Image.Image:
        """The picture as RGB, EXIF-rotated, transparency on white.

        Args:
            encoded: of `read`, where the picture was read already.

        Raises:
            MediaError: missing, not an image, truncated, too many pixels or bytes, outside the media folders, a URL.
        """
        with self._header(image, encoded) as header:
            orientation = _orientation(header)
            try:
                header.load()
                upright = header.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else header
                return _to_rgb(upright)
            except (OSError, SyntaxError, ValueError, EOFError) as error:
                found = f"the image is truncated or damaged ({error})"
                remedy = "replace the file or skip the record"
                raise MediaError(f"{_label(image.source)}: {found}; {remedy}", kind="truncated or damaged") from None

    def samples(self, sound: Audio, rate: int) -> int:
        """How many samples `listen` gives, from the header only. Raises MediaError as `listen`, but for damage."""
        return sounds.length_at(*self._sound(sound), rate)

    def listen(self, sound: Audio, rate: int) -> np.ndarray:
        """The waveform (T,) float32 in [-1, 1], mono, at `rate` samples a second.

        Raises:
            MediaError: missing, no sound, truncated, too long, too many bytes, outside the media folders, a URL, or of
                another rate than the record says.
        """
        label = _label_of_sound(sound)
        _, found = self._sound(sound)
        if not isinstance(sound.source, str):
            return sounds.resampled(sounds.finite(sound.source, label), found, rate)
        with self._stream(sound.source) as stream, sounds.opened(stream, self.limits, label, _SECONDS) as file:
            return sounds.resampled(sounds.decoded(file, label), found, rate)

    def _sound(self, sound: Audio) -> tuple[int, int]:
        """(samples, samples a second) of a sound, judged."""
        source, label = sound.source, _label_of_sound(sound)
        if not isinstance(source, str):
            if sound.sampling_rate is None:
                raise MediaError(f"{label}: samples without a sampling rate; give it in Hz")
            sounds.judge(len(source), sound.sampling_rate, self.limits, label, _SECONDS)
            return len(source), sound.sampling_rate
        if source not in self._lengths:
            with self._stream(source) as stream, sounds.opened(stream, self.limits, label, _SECONDS) as file:
                if len(self._lengths) >= _CACHED_SIZES:
                    self._lengths.clear()
                self._lengths[source] = (file.frames, file.samplerate)
        frames, rate = self._lengths[source]
        if sound.sampling_rate not in (None, rate):
            raise MediaError(
                f"{label}: the file has {rate} samples a second, and the record says sampling_rate "
                f"{sound.sampling_rate}; correct or remove it",
                kind="sampling rate",
            )
        return frames, rate

    def digest(self, image: Image, encoded: bytes | None = None) -> bytes:
        """16 bytes of a hash of what the picture is: of its encoded bytes, or of the pixels of a PIL image.

        The size is learned on the way: `size` need not read the file once more.

        Args:
            encoded: of `read`, where the picture was read already.

        Raises:
            MediaError: as `size`.
        """
        digest = hashlib.blake2b(digest_size=16)
        if isinstance(image.source, PIL.Image.Image):
            picture = self.open(image)
            digest.update(f"pixels {picture.size}".encode() + picture.tobytes())
        else:
            encoded = self.read(image) if encoded is None else encoded
            digest.update(b"encoded" + (encoded or b""))
            self.size(image, encoded)
        return digest.digest()

    @contextmanager
    def _header(self, image: Image, encoded: bytes | None = None) -> Iterator[PIL.Image.Image]:
        """The picture, opened but not decoded, its pixel count judged."""
        if isinstance(image.source, PIL.Image.Image):
            self._judge_pixels(image.source, image.source)
            yield image.source
            return
        with self._stream(image.source) if encoded is None else io.BytesIO(encoded) as stream:
            try:
                header = PIL.Image.open(stream)
            except PIL.Image.DecompressionBombError as error:
                message = f"{_label(image.source)}: gigantic image ({error}); scale it down"
                raise MediaError(message, kind="gigantic") from None
            except (OSError, SyntaxError, ValueError) as error:
                found = "an empty file" if not _length(stream) else f"not a readable image ({error})"
                raise MediaError(f"{_label(image.source)}: {found}; replace the file or skip the record") from None
            with header:
                self._judge_pixels(header, image.source)
                yield header

    def _judge_pixels(self, header: PIL.Image.Image, source: Any) -> None:
        width, height = header.size
        if width * height > self.limits.max_pixels_decoded:
            raise MediaError(
                f"{_label(source)}: gigantic image, {width} x {height} pixels; the limit is "
                f"{self.limits.max_pixels_decoded}. Scale it down or raise {_where_to_set('max_pixels_decoded')}",
                kind="gigantic",
            )

    def _stream(self, source: str | bytes) -> BinaryIO:
        """The encoded bytes as a stream, their number judged."""
        if isinstance(source, bytes):
            return io.BytesIO(self._judge_bytes(source, source))
        if _is_url(source):
            return io.BytesIO(self._fetch(source))
        if ".parquet#" in source:
            name, _, reference = source.rpartition("#")
            return io.BytesIO(self._judge_bytes(self._table(self._file(name)).read(reference), source))
        path = self._file(source)
        if path.stat().st_size > self.limits.max_bytes:
            self._too_many_bytes(source, path.stat().st_size)
        return path.open("rb")

    def _judge_bytes(self, encoded: bytes, source: Any) -> bytes:
        if len(encoded) > self.limits.max_bytes:
            self._too_many_bytes(source, len(encoded))
        return encoded

    def _too_many_bytes(self, source: Any, count: int) -> None:
        raise MediaError(
            f"{_label(source)}: {count} bytes; the limit is {self.limits.max_bytes}. "
            f"Compress it or raise {_where_to_set('max_bytes')}",
            kind="gigantic",
        )

    def _fetch(self, url: str) -> bytes:
        if not self.limits.allow_urls or not url.startswith(("https://", "http://")):
            what = "URLs are refused" if not self.limits.allow_urls else "only http and https URLs are fetched"
            remedy = f"download the file, or allow http(s) with {_where_to_set('allow_urls')}"
            raise MediaError(f"{_label(url)}: {what}; {remedy}", kind="URL")
        try:
            with urllib.request.urlopen(url, timeout=_URL_SECONDS) as answer:
                return self._judge_bytes(answer.read(self.limits.max_bytes + 1), url)
        except OSError as error:
            raise MediaError(f"{url}: cannot be fetched ({error}); download the file yourself") from None

    def _file(self, source: str) -> Path:
        """The existing file that a path means. Raises MediaError when it leaves the media folders or is missing."""
        if _is_url(source):
            raise MediaError(f"{_label(source)}: only images are fetched from URLs; download the file", kind="URL")
        path = Path(source) if self.root is None else self.root / source
        try:
            resolved = path.resolve()
            is_file = resolved.is_file()
        except (OSError, ValueError, RuntimeError) as error:
            raise MediaError(f"{_label(source)}: not a usable path ({error})") from None
        if self._allowed and not any(resolved.is_relative_to(folder) for folder in self._allowed):
            raise MediaError(
                f"{_label(source)}: points outside the media folders ({', '.join(map(str, self._allowed[:3]))}); "
                "move the file below them, or set data.media_root to a folder that holds all media",
                kind="outside the media folders",
            )
        if not is_file:
            there = "" if str(path) == source else f" ({path})"
            message = f"{_label(source)}: there is no such file{there}; check the path and the media root"
            raise MediaError(message, kind="missing")
        return resolved

    def _table(self, path: Path) -> _PictureTable:
        if path not in self._tables:
            self._tables[path] = _PictureTable(path, self.cache_dir or default_cache_dir())
        return self._tables[path]


def _where_to_set(limit: str) -> str:
    """Where a config, a command and Python have this limit."""
    return f"data.media_limits.{limit} (--{limit.replace('_', '-')} of a command, MediaLimits in Python)"


_SECONDS = _where_to_set("max_seconds")


def _label_of_sound(sound: Audio) -> str:
    return _label(sound.source) if isinstance(sound.source, str) else f"sound of {len(sound.source)} samples"


def _label(source: Any) -> str:
    if isinstance(source, str):
        return source if len(source) <= 200 else f"{source[:200]}..."
    return f"encoded image of {len(source)} bytes" if isinstance(source, bytes) else "PIL image"


def _is_url(source: str) -> bool:
    """Whether this has a scheme (`https://`, `file://`, `data:`); a Windows drive letter is a path."""
    return _URL.match(source) is not None


def _length(stream: BinaryIO) -> int:
    return stream.seek(0, os.SEEK_END)


def _orientation(header: PIL.Image.Image) -> int:
    """The EXIF orientation, from header data only: Image.getexif would decode some files."""
    encoded = header.info.get("exif")
    if not encoded:
        return 1
    try:
        exif = PIL.Image.Exif()
        exif.load(encoded)
        return int(exif.get(_ORIENTATION_TAG, 1))
    except (SyntaxError, ValueError, TypeError, OSError, KeyError):
        return 1


def _upright_size(header: PIL.Image.Image) -> tuple[int, int]:
    width, height = header.size
    return (height, width) if _orientation(header) in (5, 6, 7, 8) else (width, height)


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "RGB":
        return image.copy()
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I;16"):  # convert() would clip 16-bit greys to white
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _ends_well(header: PIL.Image.Image) -> bool:
    """Whether the encoded data reaches its end mark; False also where the format has none."""
    stream = cast(BinaryIO, header.fp)  # type: ignore[attr-defined]  # PIL.ImageFile.ImageFile
    place, length = stream.tell(), _length(stream)
    stream.seek(max(0, length - 4096))
    tail = stream.read()
    stream.seek(0)
    head = stream.read(8)
    stream.seek(place)
    if header.format == "JPEG":
        return b"\xff\xd9" in tail
    if header.format == "PNG":
        return b"IEND" in tail
    if header.format == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= length
    return False


class _PictureTable:
    """Random access to the encoded pictures of one parquet file, through a memory-mapped Arrow copy.

    A row is addressed by its `image_id` (the picture is then in the column `image`) or as `column[row]`. The id index
    is two sorted arrays, 16 bytes a row, memory-mapped too: a dict of ten million ids would take gigabytes a worker.
    """

    def __init__(self, path: Path, cache_dir: Path) -> None:
        import pyarrow as pa

        stat = path.stat()
        name = hashlib.sha256(f"{path}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:24]
        self.path = path
        folder = build_once(cache_dir / "pictures" / name, lambda work: _convert_table(path, work))
        self._rows = pa.ipc.open_file(pa.memory_map(str(folder / "pictures.arrow"))).read_all()
        self._ids = np.load(folder / "ids.npy", mmap_mode="r")  # (2, N): sorted hashes, their rows

    def read(self, reference: str) -> bytes:
        row, column = self._find(reference), "image"
        if row is None:
            match = _ROW.match(reference)
            if match is None or match["column"] not in self._rows.column_names:
                message = f"{self.path}#{reference}: the table has no such image_id; {self._hint()}"
                raise MediaError(message, kind="missing")
            row, column = int(match["row"]), match["column"]
            if row >= self._rows.num_rows:
                raise MediaError(f"{self.path}#{reference}: the table has {self._rows.num_rows} rows", kind="missing")
        if column not in self._rows.column_names:
            there = next(name for name in self._rows.column_names if name != "image_id")
            remedy = f"name the picture as {there}[{row}], or its column 'image'"
            raise MediaError(f"{self.path}#{reference}: the table has no column 'image'; {remedy}", kind="missing")
        encoded = self._rows[column][row].as_py()
        if encoded is None:
            raise MediaError(f"{self.path}#{reference}: the row has no image bytes", kind="missing")
        return cast(bytes, encoded)

    def _find(self, reference: str) -> int | None:
        key = _id_hash(reference)
        place = int(np.searchsorted(self._ids[0], key))
        while place < self._ids.shape[1] and self._ids[0, place] == key:
            row = int(self._ids[1, place])
            if self._rows["image_id"][row].as_py() == reference:
                return row
            place += 1
        return None

    def _hint(self) -> str:
        if self._ids.shape[1] == 0:
            return f"it has no column image_id; name an image as {self._rows.column_names[0]}[row]"
        return f"its ids look like '{self._rows['image_id'][0].as_py()}'"


def _id_hash(image_id: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "little"))


def _convert_table(path: Path, folder: Path) -> None:
    """Writes pictures.arrow (picture columns as plain bytes, image_id) and ids.npy into `folder`, 64 rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise MediaError(f"{path}: not a readable parquet file ({error})") from None
    schema = table.schema_arrow
    pictures = [field.name for field in schema if _holds_pictures(field.type)]
    names = [*pictures, *(["image_id"] if "image_id" in schema.names else [])]
    if not pictures:
        raise MediaError(f"{path}: no column holds image bytes; its columns are {', '.join(schema.names)}")
    target = pa.schema([(name, pa.large_binary() if name in pictures else pa.string()) for name in names])
    hashes: list[np.uint64] = []
    with pa.OSFile(str(folder / "pictures.arrow"), "wb") as file, pa.ipc.new_file(file, target) as writer:
        for batch in table.iter_batches(batch_size=64, columns=names):
            columns = [_plain(batch.column(name)).cast(target.field(name).type) for name in names]
            writer.write_batch(pa.record_batch(columns, schema=target))
            if "image_id" in names:
                hashes.extend(_id_hash(str(image_id)) for image_id in columns[names.index("image_id")].to_pylist())
    keys = np.array(hashes, dtype=np.uint64)
    order = np.argsort(keys, kind="stable").astype(np.uint64)
    np.save(folder / "ids.npy", np.stack([keys[order], order]) if len(keys) else np.zeros((2, 0), np.uint64))


def _holds_pictures(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _plain(column: Any) -> Any:
    import pyarrow as pa

    return column.field("bytes") if pa.types.is_struct(column.type) else column


def build_once(folder: Path, build: Callable[[Path], Any], fresh: Callable[[Path], bool] = lambda _: True) -> Path:
    """Fills `folder` by `build(work folder)` unless it is there and `fresh`. Processes that ask together build it once.

    The work folder is renamed when it is complete, so a kill leaves no half-built cache.

    Raises:
        CacheError: the disk is full, or the cache not writable. What else `build` raises passes through.
    """

    def usable() -> bool:
        return (folder / "complete.json").exists() and fresh(folder)

    if usable():
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not usable():
                with staging(folder) as work:
                    work.mkdir()
                    (work / "complete.json").write_text(json.dumps(build(work)), encoding="utf-8")
                    shutil.rmtree(folder, ignore_errors=True)
                    work.rename(folder)
    except OSError as error:
        if not _of_writing(error, folder.parent):
            raise
        raise CacheError(
            f"{folder.parent}: the cache cannot be written ({error.strerror or error}), nothing half-built was left; "
            "free disk space there, or set the environment variable MMEMBED_CACHE to a folder on another disk"
        ) from error
    return folder


def _of_writing(error: OSError, cache: Path) -> bool:
    """Whether it is about writing the cache, and not about the source that is read to build it."""
    if error.errno is None:  # numpy's tofile says no more
        return re.search(r"\d+ requested and \d+ written", str(error)) is not None
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return error.filename is not None and Path(str(error.filename)).is_relative_to(cache)
