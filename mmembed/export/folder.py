"""The part of an exported folder that every runtime reads: weights and config of a whole model, processor, template.

The backbone is written under the names of its generating class (`Qwen3VLForConditionalGeneration`), without an output
embedding: transformers and sentence-transformers read the base model out of it, and vLLM, whose architectures are
generating ones, makes it a pooling model. A reranker's head is one row, `score.weight`, there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmembed.errors import MmembedError
from mmembed.export.subject import Refused, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEMPLATE = "chat_template.jinja"


def generating_class(config: Any) -> Any:
    """The class that generates with this backbone. Raises Refused where transformers has none."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if "vision_config" in config.to_dict() else AutoModelForCausalLM
    known = kind._model_mapping
    if type(config) not in known:
        raise Refused(
            f"backbone '{config.model_type}': transformers has no generating class of it, whose names other runtimes "
            "know its weights by; export --to merged, which mmembed loads"
        )
    return known[type(config)]


def write_weights(folder: Path, subject: Subject, score: torch.Tensor | None = None) -> None:
    """Writes config.json and safetensors.

    Args:
        score: (1, H), the head of a reranker; stays in float32, which vLLM computes it in.
    """
    base = subject.model.base
    holder_class = generating_class(base.config)
    with torch.device("meta"):
        holder: PreTrainedModel = holder_class(base.config)
    prefix = holder.base_model_prefix
    if type(holder.get_submodule(prefix)) is not type(base):
        raise MmembedError(
            f"backbone '{base.config.model_type}': is no '{prefix}' of {holder_class.__name__}; export --to merged"
        )
    state = {}
    for name, tensor in base.state_dict().items():
        dtype = subject.dtype if tensor.is_floating_point() else tensor.dtype
        state[f"{prefix}.{name}"] = tensor.detach().to(dtype).contiguous()
    if score is not None:
        state["score.weight"] = score.detach().float().contiguous()
    holder.save_pretrained(folder, state_dict=state)
    change_json(folder / "config.json", dtype=str(subject.dtype).removeprefix("torch."))
    (folder / "generation_config.json").unlink(missing_ok=True)


def write_processor(folder: Path, subject: Subject, template: str, special_tokens: bool) -> None:
    """Writes tokenizer, processor and template.

    Args:
        special_tokens: the tokenizer puts around a bare text what this model's inputs begin and end with. Without, it
            puts nothing, as the template already does.
    """
    processor = subject.preprocessor.processor
    processor.save_pretrained(folder)
    for name in ("chat_template.json", "additional_chat_templates"):
        (folder / name).unlink(missing_ok=True)
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    for name in ("tokenizer_config.json", "processor_config.json"):
        if (folder / name).exists():
            change_json(folder / name, chat_template=None)
    _write_post_processor(folder, subject, special_tokens)


def _write_post_processor(folder: Path, subject: Subject, special_tokens: bool) -> None:
    from tokenizers import Tokenizer, processors

    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    start, end = subject.preprocessor.special_ids if special_tokens else ((), ())
    around = [*start, *end]
    names = {one: subject.preprocessor.tokenizer.convert_ids_to_tokens(one) for one in around}
    written = [*(names[one] for one in start), "$A", *(names[one] for one in end)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(written), special_tokens=[(name, one) for one, name in names.items()]
    )
    tokenizer.save(str(file))
    change_json(folder / "tokenizer_config.json", add_bos_token=None, add_eos_token=None)


def change_json(file: Path, **values: Any) -> None:
    """Sets keys of a JSON object; None removes one."""
    content = json.loads(file.read_text(encoding="utf-8"))
    for key, value in values.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    write_json(file, content)


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def messages_of(content: Sequence[Any], role: str, instruction: str | None = None) -> list[dict[str, Any]]:
    """Messages as a processor takes them."""
    from mmembed.content import Text

    parts = [
        {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image", "image": part.source}
        for part in content
    ]
    system = [{"role": "system", "content": [{"type": "text", "text": instruction}]}] if instruction else []
    return [*system, {"role": role, "content": parts}]


def check_template(folder: Path, subject: Subject) -> None:
    """Raises MmembedError unless the folder's processor and template give the tokens that the model was trained with,
    of the fixed inputs of `mmembed.export.probing`."""
    from transformers import AutoProcessor, AutoTokenizer

    kind = AutoProcessor if subject.multimodal else AutoTokenizer
    processor = kind.from_pretrained(str(folder))  # as runtimes load it
    for probe in subject.spoken:
        given = list(subject.preprocessor.tokenize([probe.item])[0].ids)
        own = (
            probe.instruction if probe.instruction != subject.instructions.get(probe.role) else None
        )  # else the template's
        messages = messages_of(probe.content, probe.role, own)
        if probe.document is not None:
            messages += messages_of(probe.document, "document")
        found = template_ids(processor, messages, subject.multimodal)
        if found != given:
            at = next((at for at, pair in enumerate(zip(found, given, strict=False)) if pair[0] != pair[1]), None)
            where = f"token {at} differs" if at is not None else f"there are {len(found)} tokens for {len(given)}"
            raise MmembedError(
                f"prompt: a chat template cannot write the style '{subject.preprocessor.prompt.name}' on "
                f"'{subject.model.family.config.model_type}': of the input '{probe.name}' {where}. The template "
                f"writes something else, or transformers reads tokenizer.json by rules of {type(processor).__name__}; "
                "export --to merged, which mmembed loads"
            )


def template_ids(processor: Any, messages: list[dict[str, Any]], multimodal: bool, **variables: Any) -> list[int]:
    """The token ids that a processor makes of messages."""
    told: dict[str, Any] = {"tokenize": True, "return_dict": True}
    if not multimodal:
        return list(processor.apply_chat_template(messages, **told, **variables)["input_ids"])
    [text] = processor.apply_chat_template([messages], tokenize=False, **variables)
    if not adds_none(processor.tokenizer, text):
        told["processor_kwargs"] = {"text_kwargs": {"add_special_tokens": False}}
    return [int(token) for token in processor.apply_chat_template([messages], **told, **variables)["input_ids"][0]]


def adds_none(tokenizer: Any, text: str) -> bool:
    """Whether a processor of transformers by itself adds no special tokens to what a template wrote (and then takes no
    word about it): where it begins with the first of them."""
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


def settings_of(subject: Subject, target: str, **more: Any) -> Mapping[str, Any]:
    """What `mmembed_export.json` says of a folder."""
    from mmembed.version import __version__

    lengths = subject.preprocessor.limits
    return {
        "target": target,
        "mmembed_version": __version__,
        "kind": "reranker" if subject.reranks else "embedder",
        "base_model": subject.base,
        "merged_adapter": subject.adapter,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "embedding_size": None if subject.reranks else subject.model.embedding_size,
        "normalize": subject.model.normalize,
        "instructions": dict(subject.instructions),
        "query_max_length": lengths.query_max_length,
        "document_max_length": lengths.document_max_length,
        "matryoshka_dimensions": list(subject.dims),
        "precision": subject.precision,
        **more,
    }
