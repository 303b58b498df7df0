"""Rerankers through the real command and API, on a tiny vision-language model: training, resume, scores, refusals."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmembed import Embedder, Reranker
from mmembed.config import build_config, load_config
from mmembed.config.blocks import RerankerConfig
from mmembed.errors import ConfigError, MmembedError
from mmembed.models.embedding_model import build_embedding_model
from mmembed.objectives import build_objective
from mmembed.preprocess import Item
from recipes import train_embedder
from recipes.train_reranker import main
from tests.recipes.conftest import write_reranker_config
from tests.runs import losses

INSTRUCTION = "Given a search query, retrieve relevant passages that answer the query"


@pytest.fixture
def config_file(tmp_path, backbone, data):
    """Four steps of 4 queries with two documents each; every third positive has a picture."""
    return write_reranker_config(tmp_path / "run.yaml", backbone, data, tmp_path / "out")


def run(config_file, *overrides):
    assert main(["--config", str(config_file), *overrides]) == 0


def weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_main_job(config_file, tmp_path, data, capsys):
    run(config_file, "training.max_steps=12", "training.eval_strategy=steps", "training.eval_steps=6")
    out = tmp_path / "out"
    report = capsys.readouterr().out
    assert "each query with its own documents" in report and "1.0 hard negatives a query" in report
    assert "begin alike" in report, "a query's documents share its tokens"
    found = losses(out)
    assert len(found) == 12 and found[0] == pytest.approx(np.log(2), abs=0.4) and found[-1] < found[0]
    final = json.loads((out / "metrics.json").read_text())
    assert 0.5 <= final["final_dev_ndcg_at_10"] <= 1
    described = json.loads((out / "mmembed.json").read_text())["settings"]
    assert described["head"]["words"] == ["a", "b"] and len(described["head"]["ids"]) == 2

    reranker = Reranker.from_pretrained(out, dtype="float32", device="cpu")
    records = [json.loads(line) for line in (data / "mixed.jsonl").read_text().splitlines()[:6]]

    def there(content):
        parts = content if isinstance(content, list) else [content]
        return [{"image": str(data / part["image"])} if isinstance(part, dict) else part for part in parts]

    pairs = [(one["query"], there(document["content"])) for one in records for document in one["documents"]]
    together = reranker.score(pairs, scale="logit")
    apart = reranker.score(pairs, scale="logit", share_prefix="off")
    alone = np.array([reranker.score([pair], scale="logit")[0] for pair in pairs])
    np.testing.assert_allclose(together, apart, atol=1e-4)
    np.testing.assert_allclose(together, alone, atol=1e-4)
    probabilities = reranker.score(pairs)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-together)), atol=1e-6)
    ranked = reranker.rank(records[0]["query"], [content for _, content in pairs], top_k=3)
    own = reranker.score([(records[0]["query"], content) for _, content in pairs])
    assert [one.index for one in ranked] == np.argsort(-own, kind="stable")[:3].tolist()
    assert [one.score for one in ranked] == sorted((one.score for one in ranked), reverse=True)
    told = reranker.score([({"text": records[0]["query"], "instruction": "Other"}, "a bus")])
    assert told != reranker.score([(records[0]["query"], "a bus")])


def test_the_logits_are_those_of_the_language_model(config_file):
    """What transformers' own model says of the two words behind the prompt."""
    from transformers import AutoModelForImageTextToText

    model, preprocessor = build_embedding_model(load_config(config_file, (), RerankerConfig))
    pair = Item(_text("a red bus"), "query", None, _text("the bus is red"))
    (row,) = preprocessor.tokenize([pair])
    text = preprocessor.tokenizer.decode(row.ids)
    assert f"<Instruct>: {INSTRUCTION}\n<Query>: a red bus\n<Document>: the bus is red" in text
    assert 'can only be "a" or "b"' in text and text.endswith("<|im_start|>assistant\n")
    inputs = preprocessor.collate([row])
    with torch.no_grad():
        found = model.eval()(inputs).vectors[0]
        whole = AutoModelForImageTextToText.from_pretrained(model.settings.name_or_path, dtype=torch.float32).eval()
        logits = whole(input_ids=inputs.tensors["input_ids"]).logits[0, -1]
    ids = model.settings.head["ids"]
    torch.testing.assert_close(found, logits[ids], atol=2e-5, rtol=0)
    assert "projection.weight" in dict(model.named_buffers())


def _text(text):
    from mmembed.content import to_content

    return to_content(text)


def test_chunks_and_shared_prefixes_change_no_gradient(config_file, tmp_path):
    for name, overrides in (
        ("whole", ["training.share_prefix=off"]),
        ("shared", []),
        ("chunks", ["training.token_budget=300", "training.grad_cache=true"]),
    ):
        run(
            config_file,
            f"training.output_dir={tmp_path / name}",
            "objective={type: ranking, loss: infonce}",
            *overrides,
        )
    for name in ("shared", "chunks"):
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "whole"), atol=2e-5)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(config_file, tmp_path, stop_in_step):
    run(config_file, f"training.output_dir={tmp_path / 'whole'}")
    stop_in_step(3)
    assert main(["--config", str(config_file)]) == train_embedder.TRY_AGAIN
    run(config_file)
    ours, whole = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "objective",
    [
        "{type: ranking, loss: infonce, score: yes}",
        "{type: ranking, loss: listnet}",
        "ranknet",
        "{type: lambdarank, k: 10}",
        "listmle",
        "{type: weight_direction, weight: contrastive, direction: sft}",
        "[{type: sft}, {type: ranking, loss: infonce, weight: 0.5}]",
    ],
)
@pytest.mark.parametrize("head", ["yes_no", "linear"])
def test_every_objective_trains(config_file, tmp_path, objective, head):
    block = [] if head == "yes_no" else ["head=linear"]
    run(config_file, f"objective={objective.replace('yes', repr('yes'))}", "training.max_steps=2", *block)
    assert all(np.isfinite(losses(tmp_path / "out")))
    scores = Reranker.from_pretrained(tmp_path / "out", dtype="float32", device="cpu").score([("a", "b"), ("a", "c")])
    assert scores.shape == (2,) and np.isfinite(scores).all()


def test_distillation_follows_the_teacher(config_file, tmp_path, data):
    records = [json.loads(line) for line in (data / "text.jsonl").read_text().splitlines()]
    for number, record in enumerate(records):
        record["documents"][0]["score"], record["documents"][1]["score"] = 2.0 + number % 3, -1.0
    (tmp_path / "taught.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    train = f"data.train=[{{path: {tmp_path / 'taught.jsonl'}}}]"
    run(config_file, "objective={type: ranking, loss: margin_mse}", train, "training.max_steps=20")
    found = losses(tmp_path / "out")
    assert found[-1] < found[0] / 2


def test_full_training_and_a_second_stage(config_file, tmp_path):
    run(config_file, "adapter={type: none}")
    first = Reranker.from_pretrained(tmp_path / "out", dtype="float32", device="cpu")
    second = ["model={name_or_path: " + str(tmp_path / "out") + "}", f"training.output_dir={tmp_path / 'second'}"]
    run(config_file, "adapter={type: none}", *second, "training.learning_rate=1e-7", "training.max_steps=1")
    again = Reranker.from_pretrained(tmp_path / "second", dtype="float32", device="cpu")
    pair = [("a red bus", "the bus")]
    np.testing.assert_allclose(first.score(pair), again.score(pair), atol=1e-4)


def test_a_second_stage_keeps_the_head_or_takes_another(config_file, tmp_path, backbone):
    """A config that names no head, prompt or adapter has those of the saved reranker; another head starts afresh on the
    saved adapter."""
    run(config_file)
    tree = yaml.safe_load(config_file.read_text())
    for part in ("head", "prompt", "adapter"):
        del tree[part]
    tree["model"]["name_or_path"] = str(tmp_path / "out")
    tree["training"] |= {"output_dir": str(tmp_path / "second"), "max_steps": 1, "learning_rate": 1e-9}
    config_file.write_text(yaml.safe_dump(tree))
    run(config_file)
    described = [json.loads((tmp_path / name / "mmembed.json").read_text())["settings"] for name in ("out", "second")]
    assert described[0] == described[1] and described[0]["name_or_path"] == str(backbone)
    pair = [("a red bus", "the bus"), ("a red bus", "a tree")]
    first, again = (
        Reranker.from_pretrained(tmp_path / name, dtype="float32").score(pair) for name in ("out", "second")
    )
    np.testing.assert_allclose(first, again, atol=1e-5)

    words = "{type: yes_no, words: [c, d]}"
    lists = ["head={type: attention, layer: 2, offset: 512}", "prompt=in_context"]
    others = {
        "linear": ["head=linear"],
        "words": [f"head={words}", "prompt={type: judge, words: [c, d]}"],
        "lists": [*lists, "objective={type: ranking, loss: infonce, temperature: 0.05}"],
    }
    for name, overrides in others.items():
        run(config_file, *overrides, f"training.output_dir={tmp_path / name}")
        assert all(
            torch.allclose(tensor, weights(tmp_path / "out")[key], atol=1e-6)
            for key, tensor in weights(tmp_path / name).items()
        )
    head = json.loads((tmp_path / "words/mmembed.json").read_text())["settings"]["head"]
    assert head["words"] == ["c", "d"] and head["ids"] != described[0]["head"]["ids"]
    rows = [load_file(tmp_path / name / "pooling.safetensors")["projection.weight"] for name in ("out", "words")]
    assert rows[0].shape == rows[1].shape and not torch.equal(*rows)
    assert Reranker.from_pretrained(tmp_path / "lists").reads_lists


def test_what_is_cut_of_documents_is_said(config_file, data, tmp_path, capsys):
    """How many, and how much of them on average: counted here from the whole texts and what is left of them."""
    words = []
    for lengths in ((4, 20), (4, 60), (4, 4), (4, 40)):
        listed = [{"content": f"{at} " + "red bus " * length, "relevance": at} for at, length in enumerate(lengths)]
        words.append(json.dumps({"query": "bus", "documents": listed}))
    (tmp_path / "long.jsonl").write_text("\n".join(words) + "\n")
    train = f"data.train=[{{path: {tmp_path / 'long.jsonl'}}}]"
    whole, cut = ["lengths={query_max_length: 400, document_max_length: 100}"], []
    config = load_config(config_file, [train, *whole], RerankerConfig)
    _, preprocessor = build_embedding_model(config)
    documents = [document["content"] for line in words for document in json.loads(line)["documents"]]
    rows = preprocessor.tokenize([Item(_text("bus"), "query", None, _text(one)) for one in documents])
    limit = sorted(map(len, rows))[-4] + 3
    for row, one in zip(rows, documents, strict=True):
        own = len(preprocessor.tokenizer(one.strip()).input_ids)
        cut += [(len(row) - limit) / own] if len(row) > limit else []
    lengths = f"lengths={{query_max_length: {limit - 1}, document_max_length: 1}}"
    run(config_file, train, lengths, "training.max_steps=1", "data.dev=[]")
    said = capsys.readouterr().out
    assert f"of the pairs ({len(cut)} of " in said
    share = int(said.split("are cut to fit `lengths`: the last ")[1].split("%")[0])
    assert share == pytest.approx(100 * sum(cut) / len(cut), abs=4)  # a document begins behind a line break
    assert said.split("%")[1].endswith("of their documents on average") or "of their documents on average" in said
    run(config_file, train, lengths.replace(str(limit - 1), str(min(map(len, rows)) - 14)), "training.max_steps=1",
        f"training.output_dir={tmp_path / 'gone'}", "data.dev=[]")  # fmt: skip
    assert "nothing is left of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["head={type: yes_no, words: [yes, no]}"], "heads.yes_no.words: found .*True, False"),
        (["head={type: yes_no, words: [yes it is, b]}"], "'yes it is' is not one token of this tokenizer, but"),
        (["head={type: yes_no, words: [a, a]}"], "are the same token"),
        (["head={type: yes_no, words: [a]}"], 'give two words, quoted: ."yes", "no".'),
        (["head=null"], "a reranker needs one"),
        (["objective=contrastive"], "compares vectors, and a reranker gives logits of pairs"),
        (["prompt=plain"], "a reranker reads pairs; take judge"),
        (["pooling=mean"], "pooling"),
        (["data.mining={}"], "data.mining: compares vectors"),
        (["data.train_group_size=1"], "raise data.train_group_size above data.positives_per_query"),
        (["data.train=[{path: pictures.jsonl}]"], "mine negatives|relevance 0"),
        (["model.attention=bidirectional"], "head 'yes_no': under bidirectional attention"),
        (["data.train=[{path: text.jsonl, in_batch_negatives: true}]"], "in_batch_negatives has no effect"),
        (["prompt={type: judge, words: [c, d]}"], r"prompt.words \['c', 'd'\]: the head reads \['a', 'b'\]"),
        (["prompt={type: judge, words: [b, a]}"], "the same words in the same order"),
        (["objective={type: lambdarank, k: 0}"], "lambdarank.k: found 0"),
        (["objective={type: ranking, loss: multicsr}"], "objective 'ranking'.loss: 'multicsr' has a guide of vectors"),
        (["data.dev=[{path: pictures.jsonl}]"], "data.dev 'pictures.jsonl': no record has two documents of different"),
    ],
)
def test_what_cannot_be_is_refused(config_file, capsys, overrides, message):
    assert main(["--config", str(config_file), *overrides]) == 2
    assert re.search(message, capsys.readouterr().err), message


@pytest.mark.parametrize("path", sorted(Path("recipes/configs/reranker").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_read(path):
    config = load_config(path, (), RerankerConfig)
    assert build_objective(config.objective).judges and config.training.arguments["learning_rate"] <= 1e-3


def test_backbones_without_what_a_head_reads_are_refused(config_file, backbone, tmp_path, capsys):
    """Before data are read: no output embedding, an embedder, a chat template that leaves no place for an answer."""
    from safetensors.torch import save_file

    nowhere = "data.train=[{path: nowhere.jsonl}]"  # would be the next error
    for name in ("bare", "headless", "mute", "strict"):
        shutil.copytree(backbone, tmp_path / name)
    weights = load_file(tmp_path / "bare" / "model.safetensors")
    kept = {name: one for name, one in weights.items() if "lm_head" not in name}
    save_file(kept, tmp_path / "bare" / "model.safetensors")
    settings = json.loads((tmp_path / "bare" / "config.json").read_text())
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "bare" / "config.json").write_text(json.dumps(settings))
    template = tmp_path / "headless" / "chat_template.jinja"
    template.write_text(template.read_text().split("{%- if add_generation_prompt")[0])
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    strict = tmp_path / "strict" / "chat_template.jinja"  # as Gemma 2's
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    strict.write_text(refusal + strict.read_text())
    embed = ["pooling=mean", f"training.output_dir={tmp_path / 'embedder'}", "training.max_steps=1"]
    embedder = tmp_path / "embedder.yaml"
    lines = [
        line for line in Path(config_file).read_text().splitlines() if not line.startswith(("head", "prompt", "obj"))
    ]
    embedder.write_text("\n".join(lines))
    assert train_embedder.main(["--config", str(embedder), *embed]) == 0
    capsys.readouterr()
    for name, message in (
        ("bare", "head 'yes_no': .*does not tie its output embedding to the input's, and holds 0 tensors"),
        ("headless", "the chat template of 'qwen3_vl' leaves no place for an answer"),
        ("mute", "has no chat template"),
        ("strict", "refuses a system turn, a question and an answer .no system."),
        ("embedder", "model.name_or_path: '.*embedder' is an embedder; go on with it by recipes/train_embedder.py"),
    ):
        assert main(["--config", str(config_file), f"model.name_or_path={tmp_path / name}", nowhere]) == 2
        assert re.search(message, capsys.readouterr().err), name
    assert main(["--config", str(config_file), f"model.name_or_path={tmp_path / 'bare'}", "head=linear", nowhere]) == 2
    assert "there is no" in capsys.readouterr().err  # a fresh row needs none
    quiet = ["prompt={type: judge, words: [a, b], system: ''}", nowhere]
    assert main(["--config", str(config_file), f"model.name_or_path={tmp_path / 'strict'}", *quiet]) == 2
    assert "there is no" in capsys.readouterr().err  # without a system turn it takes them


def test_embedders_and_rerankers_are_told_apart(config_file, tmp_path, backbone):
    run(config_file, "training.max_steps=1")
    with pytest.raises(MmembedError, match="is a reranker: it scores pairs; load it with Reranker"):
        Embedder.from_pretrained(tmp_path / "out")
    with pytest.raises(MmembedError, match="is an embedder: it has no head"):
        Reranker.from_pretrained(backbone)
    reranker = Reranker.from_pretrained(tmp_path / "out", device="cpu")
    with pytest.raises(MmembedError, match=r"contents\[1\].*empty text"):
        reranker.score([("a", "b"), ("a", " ")])
    with pytest.raises(MmembedError, match="pairs: give"):
        reranker.score(["ab"])
    with pytest.raises(MmembedError, match="scale: there is no 'odds'"):
        reranker.score([("a", "b")], scale="odds")
    with pytest.raises(ConfigError, match="head: is a reranker's"):
        build_config({"head": "yes_no"})
    with pytest.raises(ConfigError, match="reads the logits of a reranker"):
        train_embedder.train(build_config({"objective": "sft", "data": {"train": [{"path": "nowhere"}]}}))
