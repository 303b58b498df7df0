"""What each prompt style writes, letter by letter, and which part of it is pooled."""

from __future__ import annotations

import pytest
from families import picture

from mmembed.content import to_content
from mmembed.errors import ConfigError
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.preprocess import Item
from mmembed.prompts import PROMPTS

HEAD = "<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
SAHA = "If an image is given, summarize it in one word. If only text is given, describe it in one word."
EXPECTED = {  # style -> (query with instruction, hidden text), document without
    "plain": (("Find it a bus", "Find it"), "The cat"),
    "instruct": (("Instruct: Find it\nQuery: a bus", "Instruct: Find it\nQuery:"), "The cat"),
    "chat": (
        (SYSTEM.format("Find it") + HEAD + "a bus" + TAIL, SYSTEM.format("Find it") + HEAD),
        HEAD + "The cat" + TAIL,
    ),
    "one_word": (
        (HEAD + "Find it\na bus\nSummarize the above text in one word:" + TAIL, HEAD + "Find it\n"),
        HEAD + "The cat\nSummarize the above text in one word:" + TAIL,
    ),
    "hierarchical": (
        (
            SYSTEM.format(SAHA) + HEAD + "Find it\na bus\nRepresent the given text in one word." + TAIL,
            SYSTEM.format(SAHA) + HEAD + "Find it\n",
        ),
        SYSTEM.format(SAHA) + HEAD + "The cat" + TAIL,
    ),
}


def preprocessor_of(folder, prompt: object, **settings: object):
    return build_from_settings(EmbedderSettings(str(folder), prompt=prompt, **settings))[1]


def test_pieces_of_a_batch_are_tokenized_as_the_whole(family_folder, monkeypatch) -> None:
    """Offsets are computed for a piece that needs them, here the first and the last."""
    preprocessor = preprocessor_of(family_folder("qwen3_vl"), "plain")
    items = [
        Item(to_content(f"{index} red buses"), "query", None if 1 < index < 6 else "Find it") for index in range(7)
    ]
    items.append(Item(to_content({"text": "a bus", "image": picture()})))
    whole = preprocessor.tokenize(items, {"query"})
    monkeypatch.setattr("mmembed.preprocess.PIECE", 3)
    assert preprocessor.tokenize(items, {"query"}) == whole
    assert [row.hidden for row in preprocessor.tokenize(items)] == [row.hidden for row in whole]


def test_every_style_is_listed() -> None:
    of_pairs = {name for name, style in PROMPTS.classes().items() if style.reads_pairs}
    assert set(EXPECTED) == set(PROMPTS.classes()) - of_pairs and of_pairs == {"judge", "in_context"}


def test_a_pair_is_written_letter_by_letter(family_folder) -> None:
    system = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that "
    )
    system += 'the answer can only be "a" or "b".'
    for family in ("qwen3", "qwen3_vl"):
        preprocessor = preprocessor_of(
            family_folder(family), {"type": "judge", "words": ["a", "b"]}, pooling="last_token"
        )
        (row,) = preprocessor.tokenize([Item(to_content("a bus"), "query", "Find it", to_content("The cat"))])
        user = "<Instruct>: Find it\n<Query>: a bus\n<Document>: The cat"
        assert preprocessor.tokenizer.decode(row.ids) == SYSTEM.format(system) + HEAD + user + TAIL
        assert row.hidden == ()


@pytest.mark.parametrize("style", sorted(EXPECTED))
def test_text_is_written_letter_by_letter(style: str, family_folder) -> None:
    """And pooled: the last token where that is the pooling, else the content and nothing else."""
    (query, head), document = EXPECTED[style]
    tail = query[query.index("a bus") + len("a bus") :]
    for family, pooling in (("qwen3", "last_token"), ("qwen3_vl", "mean"), ("qwen3", "multi_vector")):
        block = {"type": style, "append_eos": False} if style in ("plain", "instruct") else style
        preprocessor = preprocessor_of(family_folder(family), block, pooling=pooling)
        decode = preprocessor.tokenizer.decode
        batch = [Item(to_content("a bus"), "query", "Find it"), Item(to_content("The cat"))]
        rows = preprocessor.tokenize(batch)
        assert [decode(row.ids) for row in rows] == [query, document]
        masked = [token for first, stop in rows[0].hidden for token in rows[0].ids[first:stop]]
        assert decode(masked) == (head if pooling == "last_token" else head + tail)
        assert preprocessor(batch).pool_mask[0, -1] == (pooling == "last_token" or not tail)


def test_closing_request_is_pooled_where_the_style_masks_nothing(family_folder) -> None:
    block = {"type": "one_word", "mask_instruction": False}
    inputs = preprocessor_of(family_folder("qwen3"), block)([Item(to_content("a bus"), "query", "Find it")])
    assert inputs.pool_mask.all()


def test_mask_instruction_false_pools_everything(family_folder) -> None:
    preprocessor = preprocessor_of(family_folder("qwen3"), {"type": "instruct", "mask_instruction": False})
    inputs = preprocessor([Item(to_content("a bus"), "query", "Find it")])
    assert inputs.pool_mask.all()


def test_strings_of_a_style_are_configuration(family_folder) -> None:
    block = {"type": "hierarchical", "system": "S", "mixed_request": "\nM", "document_request": "\nD"}
    preprocessor = preprocessor_of(family_folder("qwen2_vl"), block)
    content = to_content({"image": picture(), "text": "t"})
    rows = preprocessor.tokenize([Item(content, "query", "I"), Item(content)])
    image = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    assert preprocessor.tokenizer.decode(rows[0].ids) == SYSTEM.format("S") + HEAD + "I\n" + image + "t\nM" + TAIL
    assert preprocessor.tokenizer.decode(rows[1].ids) == SYSTEM.format("S") + HEAD + image + "t\nD" + TAIL


def test_prefixes_of_plain_and_default_instruction(family_folder) -> None:
    blocks = {"query: a bus": {"type": "plain", "query_prefix": "query: "},
              "Instruct: Retrieve\nQuery: a bus": {"type": "instruct", "default_instruction": "Retrieve"}}  # fmt: skip
    for written, block in blocks.items():
        preprocessor = preprocessor_of(family_folder("qwen3"), block)
        rows = preprocessor.tokenize([Item(to_content("a bus"), "query"), Item(to_content("a bus"))])
        assert [preprocessor.tokenizer.decode(row.ids) for row in rows] == [written, "a bus"]


def test_end_token_by_pooling_and_never_twice(family_folder) -> None:
    item = Item(to_content("a bus"))
    ends = {
        pooling: preprocessor_of(family_folder("qwen3"), "plain", pooling=pooling).tokenize([item])[0].ids[-1] == 2
        for pooling in ("last_token", "mean")
    }
    assert ends == {"last_token": True, "mean": False}
    chat = preprocessor_of(family_folder("qwen3"), "chat", pooling="last_token").tokenize([item])[0]
    assert chat.ids[-1] != 2
    begun = preprocessor_of(family_folder("llama"), "plain", pooling="last_token").tokenize([item])[0]
    assert (begun.ids[0], begun.ids[-1]) == (1, 2)


def test_end_token_survives_truncation(family_folder) -> None:
    lengths = {"query_max_length": 8, "document_max_length": 6}
    preprocessor = preprocessor_of(family_folder("llama"), "plain", pooling="last_token", lengths=lengths)
    for role, limit in (("query", 8), ("document", 6)):
        (row,) = preprocessor.tokenize([Item(to_content("cats and dogs " * 9), role)])
        assert (len(row), row.ids[0], row.ids[-1]) == (limit, 1, 2)


def test_truncation_never_cuts_an_image(family_folder) -> None:
    lengths = {"query_max_length": 8, "document_max_length": 8}
    for family in ("qwen3_vl", "smolvlm", "gemma3", "paligemma", "llava_onevision"):
        preprocessor = preprocessor_of(family_folder(family), "plain", lengths=lengths)
        whole = preprocessor_of(family_folder(family), "plain")
        both = Item(to_content({"image": picture(), "text": "cats and dogs " * 9}))
        alone = Item(to_content({"image": picture()}))
        (cut,), (image,) = preprocessor.tokenize([both]), whole.tokenize([alone])
        mark = whole.tokenizer.convert_tokens_to_ids(_mark(whole))
        assert list(cut.ids).count(mark) == list(image.ids).count(mark) > 0
        assert len(image) < len(cut) < len(whole.tokenize([both])[0])


def _mark(preprocessor) -> str:
    return preprocessor.family.reserved[-1] if preprocessor.family.name == "gemma3" else preprocessor.family.image_token


def test_prompt_longer_than_the_limit_is_refused(family_folder) -> None:
    preprocessor = preprocessor_of(
        family_folder("qwen3"), "instruct", lengths={"query_max_length": 5, "document_max_length": 5}
    )
    with pytest.raises(ConfigError, match="the prompt alone takes"):
        preprocessor.tokenize([Item(to_content("a bus"), "query", "an instruction that is long")])


def test_chat_style_without_a_template_is_refused(family_folder) -> None:
    for style in ("chat", "one_word", "hierarchical"):
        with pytest.raises(ConfigError, match=f"'{style}' writes a chat.*no chat template"):
            preprocessor_of(family_folder("paligemma"), style)


def test_misspelt_style_and_option_name_the_nearest(family_folder) -> None:
    with pytest.raises(ConfigError, match="did you mean 'instruct'"):
        PROMPTS.build("instruc")
    with pytest.raises(ConfigError, match="did you mean 'mask_instruction'"):
        PROMPTS.build({"type": "instruct", "mask_instructions": True})


def test_instruct_template_without_the_instruction_is_refused() -> None:
    with pytest.raises(ConfigError, match="instruct.template: .*{instruction}"):
        PROMPTS.build({"type": "instruct", "template": "Instruct: "})
