"""Every format that is written comes back: its files by way of records, and records by way of its files.

A new format is drawn from by what it says of itself (`holds`, its row's TypedDict): see tests/formats.py.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from pathlib import Path

import pytest
from formats import JSON, PICTURES, WRITABLE, files, place, records, said_by
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mmembed.content import Image
from mmembed.data.holding import check, fitted, losses, normal
from mmembed.errors import MmembedError, RecordError
from mmembed.media import MediaStore

FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in PICTURES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(f"picture {name}".encode())
    return MediaStore(folder, cache_dir=folder / "cache")


def read(name, path):
    found = list(WRITABLE[name]().read_whole(path))
    for record in found:
        if isinstance(record, RecordError):
            raise record
        check(record)
    return found


def carried(found):
    """Through JSON, as a file of records carries them."""
    return [json.loads(json.dumps(record)) for record in found]


@pytest.mark.parametrize("name", WRITABLE)
@given(data=st.data())
@FEW
def test_a_file_comes_back_by_way_of_records(name, data, pictures):
    given = data.draw(files(name))
    with tempfile.TemporaryDirectory() as folder:
        path = place(given, Path(folder, "in"))
        try:
            found = read(name, path)
        except RecordError as error:
            assume(error.kind not in ("positive and negative", "empty text"))
            raise
        for record in found:
            assert losses(record, WRITABLE[name].holds) == {}
        output = Path(folder, "out") / (path.name if not WRITABLE[name].folder else "")
        media = MediaStore(pictures.root, also=[folder], cache_dir=pictures.cache_dir)
        WRITABLE[name]().write(output, iter(carried(found)), media)
        written = {one.relative_to(Path(folder, "out")): one for one in Path(folder, "out").rglob("*") if one.is_file()}
        assert {str(one) for one in written} == set(given)
        for one, file in written.items():
            assert said_by(file) == said_by(Path(folder, "in") / one)
            if file.suffix == ".parquet" and name == "beir":
                assert file.read_bytes() == (Path(folder, "in") / one).read_bytes()


@pytest.mark.parametrize("name", WRITABLE)
@given(data=st.data())
@FEW
def test_records_come_back_by_way_of_a_file(name, data, pictures):
    holds = WRITABLE[name].holds
    given = data.draw(records(name))
    for record in given:
        try:
            check(record)
        except RecordError as error:
            assume(error.kind != "positive and negative")
            raise
        assert fitted(record, holds, frozenset(), name) == (record, frozenset())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "records")
        try:
            WRITABLE[name]().write(path, iter(carried(given)), pictures)
        except RecordError as error:
            assume(error.kind != "field taken")  # a text that holds a format's own token
            raise
        found = read(name, path)
        assert said(found, holds, name, pictures) == said(given, holds, name, pictures)


@st.composite
def broken(draw, name):
    """Files of a format with something else in the place of one of their values, or of a key."""
    found = copy.deepcopy(draw(files(name)))  # what is drawn is shared
    rows = [row for one in found if one.endswith((".json", ".jsonl")) for row in _objects(found[one])]
    places = [(row, key) for row in rows for key in row] or [(found, next(iter(found)))]
    row, key = places[draw(st.integers(0, len(places) - 1))]
    value = draw(JSON | st.just([{}]) | st.just({"write": 3, "without": ["query"], "columns": [1], "path": 1}))
    if isinstance(key, str) and row is not found and draw(st.booleans()):
        row[draw(st.sampled_from(["meta", "documents", "query", key]))] = row.pop(key)
    elif row is not found:
        row[key] = value
    return found


def _objects(value):
    if isinstance(value, dict):
        yield value
        value = value.values()
    for one in value if not isinstance(value, str | bytes | int | float | None) else ():
        yield from _objects(one)


@pytest.mark.parametrize("name", WRITABLE)
@given(data=st.data())
@FEW
def test_broken_files_give_errors_with_a_place_and_nothing_else(name, data, pictures):
    given = data.draw(broken(name))
    with tempfile.TemporaryDirectory() as folder:
        path = place(given, Path(folder, "in"))
        kept = []
        try:
            for record in WRITABLE[name]().read_whole(path):
                try:
                    if isinstance(record, RecordError):
                        raise record
                    check(record)
                    assert fitted(record, WRITABLE[name].holds, frozenset(), name)[0] is record
                    kept.append(record)
                except RecordError as error:
                    assert error.where.startswith(folder) and error.remedy
            WRITABLE[name]().write(Path(folder, "out"), iter(kept), MediaStore(pictures.root, also=[folder]))
        except MmembedError as error:
            assert not isinstance(error, RecordError) or error.where.startswith(folder)


@pytest.mark.parametrize(
    "spelling", [3, "x", {"write": 3}, {"without": ["query", "_id", "docid"]}, {"columns": [1, 2]}]
)
@pytest.mark.parametrize("name", WRITABLE)
def test_a_spelling_that_somebody_wrote_by_hand_harms_nothing(name, spelling, tmp_path, pictures):
    holds = WRITABLE[name].holds
    content = {"content": "a"} if holds.contents else {}
    score = {"score": 1} if "score" in holds.needs else {}
    documents = [content | score | {"id": "d1"}, content | score | {"id": "d2", "relevance": 0}]
    if holds.contents:
        documents[1]["content"] = "b"
    record = {"query": "q", "id": "q1", "documents": documents, "where": "f:1"}
    record = fitted(record, holds, frozenset(holds.losable()), name)[0]
    wanted = carried([record])
    for item in (record, *record["documents"]):
        item["meta"] = {**item.get("meta", {}), "spelling": {name: spelling}}
    WRITABLE[name]().write(tmp_path / "out", iter([record]), pictures)
    WRITABLE[name]().write(tmp_path / "plain", iter(wanted), pictures)
    files_of = [[one for one in sorted((tmp_path / way).rglob("*")) if one.is_file()] for way in ("out", "plain")]
    assert [one.read_bytes() for one in files_of[0]] == [one.read_bytes() for one in files_of[1]]


def said(found, holds, name, media):
    """What records say; a picture that was copied into a table is its bytes."""
    plain = [normal(record, holds.ordered) for record in found]
    return [_by_bytes(record, media) for record in plain] if WRITABLE[name].copies_pictures else plain


def _by_bytes(value, media):
    if isinstance(value, dict):
        return {key: _digest(one, media) if key == "image" else _by_bytes(one, media) for key, one in value.items()}
    return [_by_bytes(one, media) for one in value] if isinstance(value, list) else value


def _digest(reference, media):
    store = MediaStore(cache_dir=media.cache_dir) if Path(reference).is_absolute() else media
    return hashlib.sha256(store.read(Image(reference))).hexdigest()
