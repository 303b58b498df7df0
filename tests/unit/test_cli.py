"""The command line through real processes, and `main` where a process would only cost time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmembed import Embedder
from mmembed.cli import main
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


def run(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mmembed", *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == expect, done.stderr
    return done


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.fixture(scope="module")
def model(family_folder) -> Path:
    return family_folder("qwen3_vl")


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name, colour in COLOURS.items():
        place = folder / "sub" if name == "blue" else folder
        Image.new("RGB", (64, 64), colour).save(place / f"{name}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def lines(tmp_path) -> Path:
    file = tmp_path / "corpus.jsonl"
    rows = [
        {"_id": "d1", "title": "Buses", "text": "red buses", "metadata": {}},
        {"id": "d2", "text": "a train"},
        {"text": "no id"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_import_and_help_stay_light():
    heavy = {"torch", "transformers", "numpy", "PIL", "datasets"}
    assert not loaded_by("import mmembed") & heavy
    assert not loaded_by("import mmembed.cli; mmembed.cli.build_parser()") & heavy
    assert "torch" in loaded_by("from mmembed import Embedder")


def test_every_lazy_name_resolves():
    import mmembed

    for name in mmembed.__all__:
        assert getattr(mmembed, name) is not None
    assert set(mmembed.__all__) <= set(dir(mmembed))
    with pytest.raises(AttributeError, match="no attribute 'Embeder'"):
        mmembed.Embeder  # noqa: B018


def test_help_names_every_command():
    text = run("--help").stdout
    assert all(command in text for command in ("encode", "search", "explore", "verify", "inspect"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serch", "x"], "there is no 'serch'; did you mean 'search'?"),
        (["search", "x", "--topk", "3"], "unknown argument '--topk'; did you mean '--top-k'?"),
        (["encode", "x", "--output", "y", "--precison=int8"], "did you mean '--precision'?"),
        (["encode", "x", "--output", "y", "--precision", "int9"], "there is no 'int9'; did you mean 'int8'?"),
        (["encode", "x", "--outptu", "y"], "unknown argument '--outptu'; did you mean '--output'?"),
        (["encode", "x"], "arguments are required: --output"),
        (["inspect", "mmembed-nano", "more"], "unknown argument 'more'"),
    ],
)
def test_a_wrong_argument_names_the_nearest(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_encode_then_search_a_folder_of_images(model, photos, tmp_path, capsys):
    output = tmp_path / "photos.enc"
    said = run("encode", photos, "--output", output, "--model", model, "--dtype", "float32").stdout
    assert "3 vectors of 64 dimensions, float32" in said
    items = [json.loads(line) for line in (output / "items.jsonl").read_text().splitlines()]
    assert [item["id"] for item in items] == ["green.png", "red.png", "sub/blue.png"]
    vectors = np.load(output / "vectors.npy")
    embedder = Embedder.from_pretrained(model, dtype="float32", device="cpu")
    expected = embedder.encode([{"image": str(photos / item["id"])} for item in items])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)

    assert main(["search", str(output), "--image", str(photos / "red.png"), "--top-k", "2", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["results"][0]["hits"]
    assert [hit["rank"] for hit in hits] == [1, 2] and hits[0]["id"] == "red.png"
    assert hits[0]["score"] == pytest.approx(1, abs=1e-2)
    assert main(["search", str(output), "a red square"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("query: a red square") and len(table.splitlines()) == 2 + 3


def test_a_second_encode_does_not_run_the_vision_tower(photos, tmp_path, capsys, monkeypatch):
    """Nor does a search of the same pictures."""
    from transformers import Qwen3VLModel

    runs, original = [], Qwen3VLModel.get_image_features

    def counted(self, *pixels, **rest):
        output = original(self, *pixels, **rest)
        runs.append(len(output.pooler_output))
        return output

    monkeypatch.setattr(Qwen3VLModel, "get_image_features", counted)

    def encode(name, *options):
        output = tmp_path / name
        assert main(["encode", str(photos), "--output", str(output), "--dtype", "float32", *options]) == 0
        return np.load(output / "vectors.npy")

    cache = ["--vision-cache", str(tmp_path / "cache"), "--vision-cache-gb", "0.1"]
    plain = encode("plain")
    runs.clear()
    first, second = encode("first", *cache), encode("second", *cache)
    assert sum(runs) == 3
    np.testing.assert_allclose(first, plain, atol=1e-5)
    np.testing.assert_array_equal(first, second)
    query = ["--image", str(photos / "red.png"), "--dtype", "float32"]
    for target in (photos, tmp_path / "plain"):
        assert main(["search", str(target), *query, *cache]) == 0
    assert sum(runs) == 3
    assert "sub/blue.png" in capsys.readouterr().out


def test_media_limits_of_a_command(model, photos, tmp_path, capsys):
    command = ["encode", str(photos), "--model", str(model), "--output", str(tmp_path / "photos.enc"), "--overwrite"]
    for flag, enough in (("--max-pixels-decoded", "4096"), ("--max-bytes", "100000")):
        assert main([*command, flag, "9"]) == 2
        assert f"({flag} of a command" in capsys.readouterr().err
        assert main([*command, flag, enough]) == 0


def test_search_a_folder_of_images_directly(model, photos, capsys):
    arguments = ["search", str(photos), "--model", str(model), "--image", str(photos / "sub" / "blue.png"), "--json"]
    assert main(arguments) == 0
    hits = json.loads(capsys.readouterr().out)["results"][0]["hits"]
    assert hits[0]["id"] == "sub/blue.png" and len(hits) == 3


def test_encode_lines_in_small_precision_and_search_with_many_queries(model, lines, tmp_path, capsys):
    output = tmp_path / "out"
    options = ["--model", str(model), "--precision", "binary", "--truncate-dim", "20"]
    assert main(["encode", str(lines), "--output", str(output), *options]) == 0
    vectors = np.load(output / "vectors.npy")
    assert vectors.shape == (3, 3) and vectors.dtype == np.uint8
    items = [json.loads(line) for line in (output / "items.jsonl").read_text().splitlines()]
    assert items[0] == {"id": "d1", "text": "Buses red buses"} and items[2]["id"] == "2"
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"_id": "q1", "text": "a train"}\n{"_id": "q2", "text": "no id"}\n')
    capsys.readouterr()
    assert main(["search", str(output), "--queries", str(queries), "--top-k", "1", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["hits"][0]["id"] for result in results] == ["d2", "2"]


def test_a_collection_of_a_lower_layer_is_searched_with_that_layer(model, lines, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["encode", str(lines), "--output", str(output), "--model", str(model), "--dtype", "float32"]
    assert main([*command, "--layers", "1"]) == 0
    short = Embedder.from_pretrained(model, dtype="float32", layers=1)
    np.testing.assert_allclose(np.load(output / "vectors.npy")[1], short.encode(["a train"])[0], atol=1e-5)
    assert json.loads((output / "encoding.json").read_text())["layers"] == 1
    capsys.readouterr()
    assert main(["search", str(output), "a train", "--top-k", "1", "--json", "--dtype", "float32"]) == 0
    hit = json.loads(capsys.readouterr().out)["results"][0]["hits"][0]
    assert hit["id"] == "d2" and hit["score"] == pytest.approx(1, abs=1e-5)
    assert main([*command, "--overwrite", "--layers", "3"]) == 2
    assert "layers: found 3; the backbone has 2, give 1 to 2" in capsys.readouterr().err


def test_training_records_give_either_side(model, tmp_path, capsys):
    file = tmp_path / "train.jsonl"
    record = {
        "query": "where is it",
        "instruction": "Find the place",
        "id": "q7",
        "documents": [{"content": "here", "id": "a"}, {"content": "there", "id": "b", "relevance": 0}],
    }
    file.write_text(json.dumps(record) + "\n" + json.dumps({**record, "id": "q8"}) + "\n")
    for role, expected in (("document", ["a", "b"]), ("query", ["q7", "q8"])):
        output = tmp_path / role
        assert main(["encode", str(file), "--output", str(output), "--model", str(model), "--role", role]) == 0
        ids = [json.loads(line)["id"] for line in (output / "items.jsonl").read_text().splitlines()]
        assert ids == expected and len(np.load(output / "vectors.npy")) == len(expected)


def test_bad_entries_are_named_or_skipped(model, photos, lines, tmp_path, capsys):
    (photos / "broken.png").write_bytes((photos / "red.png").read_bytes()[:60])
    output = tmp_path / "out"
    encode = ["encode", str(photos), "--output", str(output), "--model", str(model)]
    assert main(encode) == 2
    assert "broken.png" in capsys.readouterr().err and not output.exists() and not list(tmp_path.glob(".out*"))
    assert main([*encode, "--on-bad-record", "skip"]) == 0
    streams = capsys.readouterr()
    assert "1 skipped" in streams.out and "skipped: " in streams.err and len(np.load(output / "vectors.npy")) == 3

    lines.write_text(lines.read_text() + '{"txet": "x"}\n{"image": "../outside.png"}\nnot json\n')
    encode = ["encode", str(lines), "--output", str(tmp_path / "out2"), "--model", str(model)]
    assert main(encode) == 2
    assert "corpus.jsonl:4: unknown key 'txet'. Did you mean 'text'?" in capsys.readouterr().err
    assert main([*encode, "--on-bad-record", "skip"]) == 0
    assert "3 vectors" in (streams := capsys.readouterr()).out and "3 skipped" in streams.out
    assert "outside the media folders" in streams.err

    good = '{"text": "a", "title": "b"}\n'
    bad = [r'{"text": "bad \ud800 x"}', r'{"text": "a", "id": "\udfff"}', r'{"text": "a", "instruction": "\ud800"}',
           '{"text": "a", "title": 5}', '{"text": "a", "text": "b"}', '{"text": ' + "[" * 3000]  # fmt: skip
    lines.write_text(good + "\n".join(bad) + "\n" + good)
    encode = ["encode", str(lines), "--output", str(tmp_path / "out3"), "--model", str(model)]
    assert main(encode) == 2
    assert "corpus.jsonl:2: the line is not valid Unicode (a lone surrogate, \\ud800)" in capsys.readouterr().err
    assert main([*encode, "--on-bad-record", "skip"]) == 0
    assert "2 vectors" in (streams := capsys.readouterr()).out and "6 skipped" in streams.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "{photos}"], "give a text, --image, both, or --queries"),
        (["search", "{photos}x", "red"], "there is no such file or folder; did you mean 'photos'?"),
        (["encode", "{photos}/sub/none", "--output", "x"], "there is no such file or folder"),
        (["encode", "{photos}", "--output", "{photos}"], "exists already"),
        (["inspect", "{photos}"], "no mmembed.json"),
        (["verify", "{photos}"], "neither mmembed.json nor config.json"),
    ],
)
def test_errors_say_what_to_do(model, photos, arguments, message, capsys):
    filled = [argument.format(photos=photos) for argument in arguments]
    extra = ["--model", str(model)] if filled[0] in ("search", "encode") else []
    assert main([*filled, *extra]) == 2
    assert message in capsys.readouterr().err


def test_an_encoded_folder_is_replaced_only_when_asked(model, lines, tmp_path, capsys):
    output = tmp_path / "out"
    encode = ["encode", str(lines), "--output", str(output), "--model", str(model)]
    assert main(encode) == 0
    assert main(encode) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*encode, "--overwrite", "--precision", "int8"]) == 0
    assert np.load(output / "vectors.npy").dtype == np.int8


def test_a_model_that_changed_since_is_noticed(model, lines, tmp_path, capsys):
    checkpoint, output = tmp_path / "model", tmp_path / "out"
    embedder = Embedder.from_pretrained(model, dtype="float32", device="cpu")
    embedder.save(checkpoint)
    assert main(["encode", str(lines), "--output", str(output), "--model", str(checkpoint), "--dtype", "float32"]) == 0
    assert main(["search", str(output), "a train", "--dtype", "bfloat16"]) == 0
    with torch.no_grad():
        for parameter in embedder.model.parameters():
            parameter += 0.2 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0
    embedder.save(checkpoint)
    assert main(["search", str(output), "a train"]) == 2
    assert "encode it again" in capsys.readouterr().err


def test_multi_vector_models_are_refused(model, lines, tmp_path, capsys):
    settings = EmbedderSettings(str(model), dtype="float32", pooling="multi_vector")
    Embedder(*build_from_settings(settings)).save(tmp_path / "late")
    assert main(["encode", str(lines), "--output", str(tmp_path / "out"), "--model", str(tmp_path / "late")]) == 2
    assert "many vectors a content" in capsys.readouterr().err


def test_inspect_and_verify_a_saved_embedder(model, tmp_path, capsys):
    saved = tmp_path / "saved"
    Embedder.from_pretrained(model, dtype="float32", device="cpu").save(saved)
    assert main(["inspect", str(saved)]) == 0
    table = capsys.readouterr().out
    assert "settings.pooling" in table and "mean" in table and "parameters in" in table
    assert main(["inspect", str(saved), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["mmembed.json"] == json.loads((saved / "mmembed.json").read_text())
    weights = described["weights"]["model.safetensors"]
    assert weights["bytes"] == (saved / "model.safetensors").stat().st_size
    assert weights["parameters"] * 4 <= weights["bytes"] and weights["dtypes"] == ["F32"]


def test_verify_accepts_a_trained_embedder_and_refuses_an_untrained_one(model, tmp_path, capsys):
    lora = {"type": "lora", "r": 2, "alpha": 4, "dropout": 0.0, "target_modules": "auto"}
    settings = EmbedderSettings(str(model), dtype="float32", adapter=lora)
    embedder = Embedder(*build_from_settings(settings))
    embedder.save(tmp_path / "untrained")
    assert main(["verify", str(tmp_path / "untrained")]) == 2
    assert "never trained" in capsys.readouterr().err
    with torch.no_grad():
        for name, parameter in embedder.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    embedder.save(tmp_path / "trained")
    assert main(["verify", str(tmp_path / "trained"), "--runtimes"]) == 0
    printed = capsys.readouterr().out
    assert "ok; largest difference" in printed
    assert [line.split()[0] for line in printed.splitlines()[2:]] == ["recorded", "reloaded", "merged"]
