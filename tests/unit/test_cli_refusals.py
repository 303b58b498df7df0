"""What the commands refuse instead of ignoring it, or of ending in a traceback."""

import json

import pytest

from mmembed.cli import main
from mmembed.media_limits import MediaLimits


@pytest.fixture
def encoded(tmp_path):
    """As far as the command looks before it loads a model."""
    folder = tmp_path / "photos.enc"
    folder.mkdir()
    (folder / "encoding.json").write_text("{}")
    return folder


def refused(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    "flags",
    [
        *(["--media-root", "/nonexistent"], ["--on-bad-record", "skip"], ["--vision-cache", "auto"]),
        *(["--allow-urls"], ["--max-bytes", "9"], ["--max-pixels-decoded", "9"]),
    ],
    ids=lambda flags: flags[0],
)
def test_options_of_entries_with_an_encoded_folder(encoded, capsys, flags):
    error = refused(capsys, "search", encoded, "a red bus", *flags)
    assert flags[0] in error and "no effect" in error


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vision-cache-gb", "3"], "--vision-cache-gb: no effect without --vision-cache"),
        (["--vision-cache", "auto", "--vision-cache-gb", "0"], "--vision-cache-gb: found 0.0; give a number above 0"),
    ],
)
def test_a_bound_of_a_vision_cache(tmp_path, capsys, flags, message):
    from eval import run

    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a"}\n')
    assert message in refused(capsys, "encode", file, "--output", tmp_path / "out", *flags)
    assert run.main(["--model", "mmembed-nano", "--tasks", "stsb-en", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--vision-cache", "auto"], ["--max-pixels-decoded", "9"]])
def test_options_of_pictures_with_baselines(capsys, flags):
    from eval import run

    assert run.main(["--model", "bm25", "--tasks", "stsb-en", *flags]) == 2
    assert f"{flags[0]}: no effect on baselines" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "2"], "--workers: no effect without --ray"),
        (["--worker-gpus", "1"], "--worker-gpus: no effect without --ray"),
        (["--shard-rows", "0"], "--shard-rows: found 0; give at least 1"),
    ],
)
def test_options_of_workers_and_shards(tmp_path, capsys, flags, message):
    assert message in refused(capsys, "encode", tmp_path, "--output", tmp_path / "out", *flags)


@pytest.mark.parametrize("flags", [["--max-bytes", "0"], ["--max-pixels-decoded", "200000000"]])
def test_media_limits_out_of_range(tmp_path, capsys, flags):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a"}\n')
    error = refused(capsys, "encode", file, "--output", tmp_path / "out", *flags)
    assert f"{flags[0][2:].replace('-', '_')}: found {flags[1]}" in error


def test_media_root_limits_and_bad_records_of_a_file_of_queries(tmp_path, monkeypatch):
    """All reach the queries, also where the collection is encoded already."""
    from mmembed import cli
    from mmembed.inference import encoding

    class Stop(Exception):
        pass

    seen = {}

    def stop(embedder, entries, on_bad, report, **options):
        seen["queries"], seen["on_bad"] = [entry.content for entry in entries], on_bad
        raise Stop

    def media(embedder, root, limits):
        seen["root"], seen["limits"] = root, limits
        return embedder

    target, queries = tmp_path / "photos.enc", tmp_path / "queries.jsonl"
    target.mkdir()
    (target / "encoding.json").write_text("{}")
    queries.write_text(json.dumps({"text": "a red bus"}) + "\n{broken\n")
    settled = encoding.Encoding("model", 8, "document", None, "float32", None)
    monkeypatch.setattr(encoding, "open_collection", lambda folder: (settled, None))
    monkeypatch.setattr(encoding, "check_model", lambda *arguments: None)
    monkeypatch.setattr(encoding, "encode_entries", stop)
    monkeypatch.setattr(cli, "load_embedder", lambda *arguments: None)
    monkeypatch.setattr(cli, "_load_media", media)
    for flags, root in (([], tmp_path), (["--media-root", str(tmp_path / "other")], tmp_path / "other")):
        with pytest.raises(Stop):
            skip = ["--on-bad-record", "skip", "--max-bytes", "77", "--allow-urls"]
            main(["search", str(target), "--queries", str(queries), *skip, *flags])
        assert seen["root"] == root
        assert seen["limits"] == MediaLimits(max_bytes=77, allow_urls=True)
        assert seen["on_bad"] == "skip"
        assert seen["queries"] == ["a red bus"]


def test_a_file_without_a_usable_query(encoded, tmp_path, capsys):
    (tmp_path / "queries.jsonl").write_text("{broken\n")
    error = refused(capsys, "search", encoded, "--queries", tmp_path / "queries.jsonl", "--on-bad-record", "skip")
    assert "queries.jsonl: holds no usable query" in error


@pytest.mark.parametrize("device", ["cuda:99", "cudda", "meta"])
def test_a_device_that_is_not_there(tmp_path, capsys, device):
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n')
    error = refused(capsys, "encode", tmp_path / "corpus.jsonl", "--output", tmp_path / "c.enc", "--device", device)
    assert f"device: '{device}' is not there; known: cpu" in error


def test_evaluation_names_the_devices_there_are(capsys):
    from eval.run import main as evaluate

    assert evaluate(["--model", "mmembed-nano", "--tasks", "squad-en", "--device", "cuda:99"]) == 2
    assert "device: 'cuda:99' is not there" in capsys.readouterr().err


def test_a_bare_backbone_has_nothing_to_verify(capsys):
    error = refused(capsys, "verify", "mmembed-nano")
    assert "mmembed-nano: a bare backbone has nothing to verify" in error
