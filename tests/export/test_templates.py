"""The exported chat template gives the token ids that the model was trained with, of every style and family."""

import json

import pytest

from mmembed.backbones.family import family_of
from mmembed.backbones.loading import load_processor
from mmembed.errors import MmembedError
from mmembed.export.folder import messages_of, template_ids
from mmembed.export.probing import probes
from mmembed.export.template import template_of
from mmembed.preprocess import Item, Lengths, Preprocessor
from mmembed.prompts import PROMPTS
from tests.families import FAMILIES

STYLES = {
    "plain": {"type": "plain"},
    "prefixes": {"type": "plain", "query_prefix": "query: ", "document_prefix": 'passage "1": '},
    "ended": {"type": "plain", "append_eos": True},
    "instruct": {"type": "instruct", "append_eos": True},
    "told": {"type": "instruct", "default_instruction": "Find null, or none}."},
    "chat": {"type": "chat", "system": "You embed."},
    "one_word": {"type": "one_word"},
    "hierarchical": {"type": "hierarchical"},
    "judge": {"type": "judge"},
}


def preprocessor_of(folder, style):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder))
    processor = load_processor(str(folder), multimodal="vision_config" in config.to_dict())
    append_eos = bool(style.get("append_eos"))
    lengths = Lengths(1024, 1024)
    return Preprocessor(processor, family_of(config, processor), PROMPTS.build(style), lengths, append_eos=append_eos)


def ids_of(preprocessor, template, messages, **variables):
    processor = preprocessor.processor
    return template_ids(processor, messages, preprocessor.family.multimodal, chat_template=template, **variables)


def messages(probe, instruction):
    found = messages_of(probe.content, probe.role, instruction)
    return found + (messages_of(probe.document, "document") if probe.document is not None else [])


@pytest.mark.parametrize("style", STYLES)
def test_every_style_on_a_model_that_sees(family_folder, style):
    preprocessor = preprocessor_of(family_folder("qwen3_vl"), STYLES[style])
    template = template_of(preprocessor, {})
    for probe in probes(preprocessor):
        for instruction in (None, "Find <|im_end|> it"):
            item = Item(probe.content, probe.role, instruction, probe.document)
            wanted = list(preprocessor.tokenize([item])[0].ids)
            assert ids_of(preprocessor, template, messages(probe, instruction)) == wanted, (probe.name, instruction)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"paligemma"}))
def test_every_family(family_folder, family):
    """With a style that writes no chat, and one that does."""
    for style in ("prefixes", "one_word"):
        preprocessor = preprocessor_of(family_folder(family), STYLES[style])
        template = template_of(preprocessor, {})
        for probe in probes(preprocessor):
            wanted = list(preprocessor.tokenize([Item(probe.content, probe.role)])[0].ids)
            assert ids_of(preprocessor, template, messages(probe, None)) == wanted, (style, probe.name)


def test_sides_and_instructions_of_a_folder(family_folder):
    preprocessor = preprocessor_of(family_folder("qwen3"), STYLES["prefixes"])
    template = template_of(preprocessor, {"query": "Find."})

    def written(role, **variables):
        given = [{"role": role, "content": "bus"}]
        return preprocessor.tokenizer.decode(ids_of(preprocessor, template, given, **variables))

    assert written("query") == "Find. bus" == written("user", task="query")
    assert written("user") == 'passage "1": bus' == written("document") == written("user", task="classification")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}], "reads no part of the type video"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "give one message of the role"),
        ([{"role": "assistant", "content": "a"}], "give one message of the role"),
        ([{"role": "system", "content": "Find."}, {"role": "query", "content": "a"}], "no instruction here"),
    ],
)
def test_what_a_template_refuses(family_folder, given, reason):
    from jinja2 import TemplateError

    preprocessor = preprocessor_of(family_folder("qwen3"), STYLES["plain"])
    template = template_of(preprocessor, {}, refuses="no instruction here")
    with pytest.raises(TemplateError, match=reason):
        ids_of(preprocessor, template, given)


def test_a_pair_wants_both_sides(family_folder):
    from jinja2 import TemplateError

    preprocessor = preprocessor_of(family_folder("qwen3"), STYLES["judge"])
    template = template_of(preprocessor, {})
    with pytest.raises(TemplateError, match="a message of the role query, then one of the role document"):
        ids_of(preprocessor, template, [{"role": "query", "content": "a"}])


def test_images_within_strings_are_those_of_vllm(family_folder):
    """vLLM's scoring hands a template strings, in which its own placeholder stands for an image."""
    preprocessor = preprocessor_of(family_folder("qwen3_vl"), STYLES["judge"])
    template = template_of(preprocessor, {}, image_strings=True)
    held = "<|vision_start|><|image_pad|><|vision_end|>"
    given = [{"role": "query", "content": "what?"}, {"role": "document", "content": f"{held}{held}red <|im_end|>"}]
    written = preprocessor.processor.apply_chat_template([given], tokenize=False, chat_template=template)[0]
    assert written.count("<|image_pad|>") == 2 and "red < |im_end|>" in written
    assert json.dumps(written).count("<|im_end|>") == 2, "of the system's turn and the user's"


def test_a_family_that_puts_images_first_is_refused(family_folder):
    """PaliGemma moves them there, which no template of one part after another does."""
    preprocessor = preprocessor_of(family_folder("paligemma"), STYLES["prefixes"])
    with pytest.raises(MmembedError, match="does not write each part of a content once and in order"):
        template_of(preprocessor, {})
