"""Chunk plans and batches: every input once, under the budget, drawn the same every time."""

import dataclasses
import math
import pickle
import random

import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.config.blocks import SourceConfig
from mmembed.content import Document, Example, Image, Task, Text
from mmembed.data.collate import Collator, content_key, document_keys, plan_chunks
from mmembed.errors import RecordError
from mmembed.media import MediaStore
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.objectives.relations import Relations
from mmembed.preprocess import Row

PICTURE = Image("picture.png")


@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.booleans()), min_size=1, max_size=60),
    chunk_tokens=st.integers(1, 400),
    chunk_rows=st.one_of(st.none(), st.integers(1, 10)),
)
def test_plan(lengths, chunk_tokens, chunk_rows):
    rows = [Row([0] * length, images=(PICTURE,) if has_picture else ()) for length, has_picture in lengths]
    chunks = plan_chunks(rows, chunk_tokens, chunk_rows)
    assert sorted(index for chunk in chunks for index in chunk.index.tolist()) == list(range(len(rows)))
    for chunk in chunks:
        assert [rows[index] for index in chunk.index.tolist()] == list(chunk.rows)
        assert chunk.padded_tokens <= chunk_tokens or len(chunk.rows) == 1
        assert chunk_rows is None or len(chunk.rows) <= chunk_rows
        assert len({bool(row.images) for row in chunk.rows}) == 1


@pytest.fixture(scope="module")
def preprocessor(family_folder):
    return build_from_settings(EmbedderSettings(str(family_folder("qwen3"))))[1]


def collator(preprocessor, **options):
    return Collator(preprocessor, {"s": SourceConfig(path="s")}, chunk_tokens=64, **options)


def example(index, positives=1, negatives=3, **options):
    documents = [Document((Text(f"positive {index} {p}"),), 1.0) for p in range(positives)]
    documents += [Document((Text(f"negative {index} {n}"),), 0.0) for n in range(negatives)]
    return Example((Text(f"query {index}"),), tuple(documents), source="s", where=f"f:{index}", **options)


def test_labels_of_records_become_keys_of_their_paths(preprocessor):
    labelled = [
        example(0, labels=(("hotel", "book"), ("hotel",))),
        example(1),
        example(2, labels=(("taxi", "book"),)),
    ]
    keys = collator(preprocessor)(labelled).labels.label_keys
    assert keys.shape == (3, 2, 2)
    assert keys[0, 0, 0] == keys[0, 1, 0] != 0 and keys[0, 0, 1] == keys[2, 0, 1] != 0
    assert keys[0, 1, 1] == 0 and not keys[1].any() and not keys[2, 1].any()
    assert keys[2, 0, 0] not in (0, keys[0, 0, 0])
    assert collator(preprocessor)([example(1)]).labels.label_keys is None
    values = collator(preprocessor)([example(0, labels=(("age", "40.5"),)), example(1)]).labels.label_values
    assert values[0] == 40.5 and values[1].isnan()
    assert collator(preprocessor)([example(1)]).labels.label_values is None


@settings(max_examples=25, deadline=None)
@given(group=st.integers(1, 6), per_query=st.integers(1, 3), seed=st.integers(0, 9), count=st.integers(1, 6))
def test_groups(preprocessor, group, per_query, seed, count):
    per_query = min(per_query, group)
    make = collator(preprocessor, train_group_size=group, positives_per_query=per_query, seed=seed)
    examples = [example(index, positives=2) for index in range(count)]
    random.seed(seed)
    batch, again = make(examples), make(examples)
    assert batch.labels.document_keys.equal(again.labels.document_keys)
    assert batch.n_queries == count
    for query in range(count):
        own = batch.labels.relevance[batch.labels.owner == query].tolist()
        assert sum(own) == min(per_query, 2)
        assert len(own) - sum(own) == min(group - per_query, 3)
    assert batch.labels.positive_keys.shape == (count, 2, 2)
    assert batch.place.max() + 1 == sum(len(chunk.rows) for chunk in batch.chunks)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_drawn_keeps_its_order(preprocessor, seed):
    """An objective that compares several views takes them in the order of the record."""
    whole = example(0, positives=6)
    order = [document_keys(document) for document in whole.documents]
    batch = collator(preprocessor, train_group_size=5, positives_per_query=3, seed=seed)([whole])
    drawn = [order.index(tuple(keys)) for keys in batch.labels.document_keys.tolist()]
    assert drawn[:3] == sorted(drawn[:3]) and drawn[3:] == sorted(drawn[3:]) and len(drawn) == 5


def test_of_an_objective_of_positives_no_negative_is_drawn(preprocessor):
    batch = collator(preprocessor, positives_per_query=2, positives_only=["s"])([example(0, positives=3), example(1)])
    assert batch.labels.relevance.tolist() == [1.0, 1.0, 1.0]
    assert collator(preprocessor, positives_only=["other"])([example(0)]).labels.relevance.tolist() == [1.0, 0, 0, 0]


def test_labels_carry_what_a_teacher_said_and_the_task(preprocessor):
    scored = Example(
        (Text("query"),),
        (Document((Text("a"),), 1.0, score=-3.5), Document((Text("b"),), 0.0), Document((Text("c"),), 0.0, score=2.0)),
        task=Task.RERANKING,
        source="s",
        where="f:1",
    )
    labels = collator(preprocessor)([scored]).labels
    torch.testing.assert_close(labels.scores, torch.tensor([-3.5, math.nan, 2.0]), equal_nan=True)
    assert labels.task is Task.RERANKING
    assert labels.to("cpu").scores.shape == labels.owner.shape


def test_any_of_a_querys_positives_is_no_negative_of_it(preprocessor):
    """However many it has: here the last of 100 is another query's positive, in the batch."""
    many, other = example(0, positives=100, negatives=0), example(1, negatives=0)
    last = dataclasses.replace(other, documents=(many.documents[-1],))
    seed = next(seed for seed in range(9) if collator(preprocessor, seed=seed)._group(many) != [many.documents[-1]])
    labels = collator(preprocessor, seed=seed)([many, last, example(2, negatives=0)]).labels
    valid = Relations.gather(labels, across=False).matrix(slice(None), slice(None), mask_duplicates=True)[1]
    assert valid.tolist() == [[True, False, True], [True] * 3, [True] * 3]


def graded(*relevances, where="f:1", task=Task.STS):
    documents = tuple(Document((Text(f"{where} {one}"),), one) for one in relevances)
    return Example((Text(f"query {where}"),), documents, task=task, source="s", where=where)


def test_graded_pairs_come_whole_and_with_their_similarities(preprocessor):
    """Whatever a group may hold: also middling pairs and records without a positive."""
    make = collator(preprocessor, train_group_size=1, graded={"s"})
    labels = make([graded(0.5, 0.0, 1.0), graded(0.0, where="f:2")]).labels
    assert labels.owner.tolist() == [0, 0, 0, 1]
    assert labels.relevance.tolist() == [0.5, 0.0, 1.0, 0.0]
    assert not labels.in_batch and labels.task is Task.STS
    assert labels.positive_keys.shape == (2, 2, 2)
    with pytest.raises(RecordError, match="neither positive nor negative"):
        collator(preprocessor)([graded(0.5)])


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (graded(2.0, 0.5, where="f:3"), r"f:3: a relevance of 2 in a record of task 'sts'"),
        (graded(1.0, 0.0, where="f:4", task=Task.RETRIEVAL), r"f:4: .*task 'retrieval'"),
    ],
)
def test_what_is_no_graded_pair_is_named(preprocessor, record, named):
    with pytest.raises(RecordError, match=named):
        collator(preprocessor, graded={"s"})([record])


def test_negatives_do_not_depend_on_how_processes_share_a_batch(preprocessor):
    """More negatives than the group takes: the record, the seed and the visit choose, not the neighbours."""

    def drawn(examples, seed=0):
        labels = collator(preprocessor, train_group_size=4, seed=seed)(examples).labels
        return [labels.document_keys[labels.owner == query].tolist() for query in range(len(examples))]

    examples = [example(index, negatives=20) for index in range(8)]
    whole = drawn(examples)
    assert drawn(examples[:4]) + drawn(examples[4:]) == whole
    assert drawn(examples[::-1]) == whole[::-1]
    assert drawn(examples, seed=1) != whole
    again = [dataclasses.replace(item, visit=1) for item in examples]
    assert all(first != second for first, second in zip(whole, drawn(again), strict=True))


def test_a_picture_that_cannot_be_opened_names_its_record(family_folder, tmp_path):
    """Damaged in the middle: its header is read while planning, decoding fails when the chunk becomes tensors."""
    preprocessor = build_from_settings(EmbedderSettings(str(family_folder("qwen3_vl"))), MediaStore(tmp_path))[1]
    records = []
    for index in range(4):
        file = tmp_path / f"{index}.png"
        PIL.Image.effect_noise((64, 64), 90).save(file)
        records.append(
            Example(
                (Text(f"query {index}"),), (Document((Image(str(file)),)),), source="s", where=f"data.jsonl:{index}"
            )
        )
    damaged = bytearray((tmp_path / "2.png").read_bytes())
    damaged[200:900] = bytes(700)
    (tmp_path / "2.png").write_bytes(damaged)
    batch = collator(preprocessor)(records)
    with pytest.raises(RecordError, match=r"data\.jsonl:2: .*2\.png.*on_bad_record") as caught:
        for chunk in batch.chunks:
            chunk.inputs(preprocessor)
    assert pickle.loads(pickle.dumps(caught.value)).where == "data.jsonl:2"
    (tmp_path / "1.png").write_bytes(b"gone")
    preprocessor.media._sizes.clear()
    with pytest.raises(RecordError, match=r"data\.jsonl:1: .*1\.png"):
        collator(preprocessor)(records)


def test_an_input_that_occurs_twice_is_encoded_once(preprocessor):
    shared = Document((Text("the same answer"),), 1.0)
    examples = [Example((Text(f"query {index}"),), (shared,), source="s", where=str(index)) for index in range(4)]
    batch = collator(preprocessor)(examples)
    assert batch.n_documents == 4
    assert sum(len(chunk.rows) for chunk in batch.chunks) == 5
    assert len(set(batch.place[4:].tolist())) == 1


def test_a_picture_under_two_names_is_encoded_once(family_folder, tmp_path):
    """Copies are one input, whether files or bytes; the same name with other pixels is another."""
    preprocessor = build_from_settings(EmbedderSettings(str(family_folder("qwen3_vl"))), MediaStore(tmp_path))[1]
    pictures = [PIL.Image.effect_noise((64, 64), 90 + index) for index in range(2)]
    for name, picture in (("a", pictures[0]), ("copy of a", pictures[0]), ("b", pictures[1])):
        picture.save(tmp_path / f"{name}.png")
    sources = [str(tmp_path / "a.png"), str(tmp_path / "copy of a.png"), (tmp_path / "a.png").read_bytes()]
    sources += [str(tmp_path / "b.png"), pictures[1], pictures[1].copy()]
    records = [
        Example((Text(f"query {index}"),), (Document((Image(source),)),), source="s", where=f"f:{index}")
        for index, source in enumerate(sources)
    ]
    batch = collator(preprocessor)(records)
    places = batch.place[len(sources) :].tolist()
    assert places[0] == places[1] == places[2] and places[4] == places[5]
    assert len({places[0], places[3], places[4]}) == 3  # encoded bytes and pixels of a picture are not compared
    assert sum(len(chunk.rows) for chunk in batch.chunks) == len(sources) + 3


@pytest.mark.parametrize("in_batch", [True, False])
def test_what_a_source_says_reaches_labels_and_prompts(family_folder, in_batch):
    """`in_batch_negatives` the labels; `document_instruction` each document, and queries have their own."""
    preprocessor = build_from_settings(EmbedderSettings(str(family_folder("qwen3")), prompt="instruct"))[1]
    source = SourceConfig(path="s", in_batch_negatives=in_batch, document_instruction="Answer of:")
    make = Collator(preprocessor, {"s": source, "other": SourceConfig(path="o")}, chunk_tokens=64)
    batch = make([example(index, instruction="Find it") for index in range(2)])
    assert batch.labels.in_batch is in_batch
    written = {}
    for chunk in batch.chunks:
        for place, row in zip(chunk.index.tolist(), chunk.rows, strict=True):
            written[place] = preprocessor.tokenizer.decode(row.ids)
    rows = [written[place] for place in batch.place.tolist()]
    assert rows[:2] == ["Instruct: Find it\nQuery: query 0", "Instruct: Find it\nQuery: query 1"]
    documents = {f"Instruct: Answer of:\nQuery: {kind}" for kind in ("positive 0 0", "negative 0 2", "positive 1 0")}
    assert documents < set(rows[2:]) and len(rows) == 2 + 2 * 4
    assert all(row.startswith("Instruct: Answer of:\nQuery: ") for row in rows[2:])


def test_query_and_document_of_one_text_stay_two_inputs(preprocessor):
    """Their prompts differ, and with dropout their vectors must (SimCSE)."""
    text = (Text("the same text"),)
    batch = collator(preprocessor)([Example(text, (Document(text),), source="s")])
    assert batch.place.tolist() == [0, 1]


def test_a_record_without_a_positive(preprocessor):
    with pytest.raises(RecordError, match="f:7"):
        collator(preprocessor)([example(7, positives=0)])


def test_a_middling_sts_pair_is_no_positive(preprocessor):
    pair = Example((Text("a"),), (Document((Text("b"),), 0.5),), task=Task.STS, source="s", where="f:1")
    with pytest.raises(RecordError, match="at_least"):
        collator(preprocessor)([pair])


def test_keys_tell_contents_apart():
    contents = [
        (Text("a"),),
        (Text("b"),),
        (Text("a"), Text("b")),
        (Text("ab"),),
        (Image("a"),),
        (Image(b"a"),),
        (Image("a"), Text("a")),
    ]
    assert len({content_key(content) for content in contents}) == len(contents)
    assert content_key((Text("a"),)) == content_key((Text("a"),))
