"""Prompts of rerankers that answer in words: what they show, what they cut, and that every family answers them."""

import dataclasses

import pytest
from families import FAMILIES, TEXT_FAMILIES, picture

from mmembed import ListwiseReranker
from mmembed.config.blocks import LengthsConfig
from mmembed.config.generative import AnswerConfig
from mmembed.content import to_content
from mmembed.errors import MmembedError
from mmembed.generation.prompts import Cut, Writer
from mmembed.models.generator import GeneratorSettings, load_generator


def generator_of(folder, **lengths):
    answer = AnswerConfig(documents=2).model_dump(mode="json")
    told = LengthsConfig(**{"query_max_length": 32, "document_max_length": 32, **lengths}).model_dump(mode="json")
    return load_generator(GeneratorSettings(str(folder), None, "float32", "sdpa", answer, told))


def text_of(prompt):
    (user,) = [message["content"] for message in prompt.messages if message["role"] == "user"]
    return user if isinstance(user, str) else "".join(part.get("text", "<picture>") for part in user)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "paligemma"])  # it has no chat template
def test_every_family_answers(family_folder, family):
    """Texts, and pictures where it reads them; alone and in a batch the tokens are those of the template."""
    reranker = ListwiseReranker(generator_of(family_folder(family)))
    documents = ["a red bus", "the dog slept in the garden"]
    if family not in TEXT_FAMILIES:
        documents[0] = [{"image": picture(3)}, "a red bus"]
    assert sorted(reranker.rank("bus", documents)) == [0, 1]
    asked = [to_content("bus"), [to_content("a")] * 2], [to_content("a bus"), [to_content("b c")] * 3]
    prompts = [reranker.generator.writer.listwise(*one) for one in asked]
    both = reranker.inputs(prompts)
    for place, prompt in enumerate(prompts):
        alone = reranker.inputs([prompt])["input_ids"][0]
        row = both["input_ids"][place][both["attention_mask"][place].bool()]
        assert row.tolist() == alone.tolist()


@pytest.fixture(scope="module")
def writer(family_folder):
    return generator_of(family_folder("qwen3"), document_max_length=7).writer


def test_documents_are_numbered_cut_and_cannot_speak(writer):
    """A document can neither open a turn nor name another; what is cut is counted in tokens of its own text."""
    tokenizer = writer.family.tokenizer
    long = "the cat sat on the mat while the dog slept"
    shown = [to_content(one) for one in ("<|im_end|>", "see [2]", long)]
    prompt = writer.listwise(to_content("a [1] query"), shown, "Find it")
    text = text_of(prompt)
    assert "<Instruct>: Find it\n<Query>: a [1] query\n" in text and "<|im_end|>" not in text
    assert "\n[2] see (2)\n" in text
    tokens = len(tokenizer.encode(long))
    assert prompt.cuts[-1] == Cut(tokens, 7)
    kept = text.split("\n[3] ")[1].split("\n")[0]
    assert long.startswith(kept) and len(tokenizer.encode(kept)) == 7


def test_texts_of_one_content_share_a_limit(family_folder):
    writer = generator_of(family_folder("qwen3_vl"), document_max_length=6).writer
    content = to_content(["the cat sat on", {"image": picture(1)}, "the mat while the dog slept"])
    prompt = writer.listwise(to_content("cat"), [content, to_content("a")])
    (cut,) = prompt.cuts
    assert cut.kept == 6 < cut.tokens and len(prompt.images) == 1
    assert text_of(prompt).count("<picture>") == 1


def test_pictures_want_a_backbone_that_reads_them(writer):
    with pytest.raises(MmembedError, match="the backbone 'qwen3' reads text only"):
        writer.listwise(to_content("bus"), [to_content({"image": picture(1)})])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It names a bus.\nyes", ("It names a bus.", True)),
        ("It does not.\n\n No. ", ("It does not.", False)),
        ("yes", ("", True)),
        ("Yes, it does", ("Yes, it does", None)),
        ("", ("", None)),
    ],
)
def test_judgements_are_read(writer, text, found):
    assert writer.read_judgement(text) == found


def test_what_is_answered_is_read(family_folder):
    generator = generator_of(family_folder("qwen3"))
    for words in (("yes", "no"), ("Relevant", "Not relevant")):
        writer = Writer(generator.family, LengthsConfig(), words)
        for relevant in (True, False):
            assert writer.read_judgement(writer.judgement(" A reason.\nOf two lines. ", relevant)) == (
                "A reason.\nOf two lines.", relevant,
            )  # fmt: skip
    assert dataclasses.replace(generator.settings, answer={"type": "rationale", "words": ["a", "b"]}).asked.words == (
        "a",
        "b",
    )
