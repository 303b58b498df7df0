"""A folder that `SentenceTransformer` loads, or `CrossEncoder` where the model scores pairs.

    config.json, model.safetensors      the backbone
    tokenizer.json, ..., chat_template  the inputs, written by the prompt style (mmembed.export.template)
    modules.json                        backbone, pooling, projection, normalisation
    1_Pooling/ 2_Dense/ ...             a folder each

Its own modules hold last_token, mean and weighted_mean, and a reranker's head as a linear layer behind the last token.
Where the pooling is latent attention, or leaves tokens of the prompt out, modules of `mmembed.runtimes` stand there,
which `mmembed.runtimes.sentence_transformers.load` resolves without remote code.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from mmembed.export import MANIFEST, Target
from mmembed.export.folder import (
    adds_none,
    change_json,
    check_template,
    settings_of,
    write_json,
    write_processor,
    write_weights,
)
from mmembed.export.subject import Refused, Subject
from mmembed.export.template import template_of
from mmembed.heads import Head
from mmembed.pooling.last_token import LastToken
from mmembed.pooling.latent_attention import LatentAttention

STOCK_POOLINGS = {"last_token": "lasttoken", "mean": "mean", "weighted_mean": "weightedmean"}
TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
DENSE = "sentence_transformers.base.modules.dense.Dense"
NORMALIZE = "sentence_transformers.sentence_transformer.modules.normalize.Normalize"
OURS = "mmembed.runtimes.sentence_transformers"


class ToSentenceTransformers(Target):
    """Writes the folder."""

    name: ClassVar[str] = "sentence-transformers"

    def check(self, subject: Subject) -> None:
        refuse_lists(subject, "CrossEncoder scores a pair at a time")
        if subject.model.pooling.multi_vector:
            raise Refused(
                "pooling 'multi_vector': a SentenceTransformer gives one vector a content, and its MultiVectorEncoder "
                "has neither our prompts nor our masks; keep the checkpoint and load it with mmembed.Embedder"
            )

    def write(self, subject: Subject, folder: Path) -> None:
        write_folder(subject, folder, special_tokens=False)
        write_json(folder / MANIFEST, settings_of(subject, self.name, needs_mmembed=needs_ours(subject)))


def refuse_lists(subject: Subject, what: str) -> None:
    """Refuses rerankers that read all documents of a query together."""
    if subject.preprocessor.prompt.reads_lists:
        raise Refused(
            f"prompt '{subject.preprocessor.prompt.name}': this reranker reads all documents of a query in one input "
            f"and scores them by its attention, and {what}; load it with mmembed.Reranker"
        )


def needs_ours(subject: Subject) -> bool:
    """Whether the folder needs modules that only mmembed has."""
    return subject.masked or isinstance(subject.model.pooling, LatentAttention)


def write_folder(subject: Subject, folder: Path, special_tokens: bool) -> None:
    """Writes all but the manifest. `special_tokens`: as of `write_processor`."""
    write_weights(folder, subject)
    if subject.masked:  # its own module writes the inputs, with the backbone's template
        subject.preprocessor.processor.save_pretrained(folder)
    else:
        template = template_of(subject.preprocessor, subject.instructions, no_instruction(subject))
        write_processor(folder, subject, template, special_tokens)
        check_template(folder, subject)
    _write_modules(folder, subject)
    room = _visual_tokens(subject)
    lengths = subject.preprocessor.limits
    query, document = lengths.query_max_length + room, lengths.document_max_length + room
    if subject.reranks:
        query = document = lengths.query_max_length + lengths.document_max_length + room
    modality = {"method": "forward", "method_output_name": "last_hidden_state"}
    kinds = ("text", "image") if subject.multimodal else ("text",)
    config: dict[str, Any] = {
        "transformer_task": "feature-extraction",
        "modality_config": dict.fromkeys(kinds, modality) | {"message": {**modality, "format": "structured"}},
        "module_output_name": "token_embeddings",
        "unpad_inputs": False,
    }
    begun = subject.preprocessor.as_text(subject.probes[0].item)
    if subject.multimodal and not adds_none(subject.preprocessor.tokenizer, begun):  # a bare tokenizer never does
        config["processing_kwargs"] = {"text": {"add_special_tokens": False}}
    if not subject.reranks:
        config |= {"query_length": query, "document_length": document}
    if subject.masked:
        config["prompted"] = {
            "prompt": subject.model.settings.prompt,
            "lengths": asdict(lengths),
            "append_eos": subject.preprocessor.append_eos,
            "pool_suffix": isinstance(subject.model.pooling, LastToken),
        }
    write_json(folder / "sentence_bert_config.json", config)
    change_json(folder / "tokenizer_config.json", model_max_length=max(query, document))
    write_json(folder / "config_sentence_transformers.json", _model_config(subject))


def no_instruction(subject: Subject) -> str:
    """Why inputs may bring no instruction where pooling takes all tokens; empty where they may."""
    return _NO_INSTRUCTION if subject.unpooled["told"] else ""


_NO_INSTRUCTION = (
    "this model leaves the tokens of an instruction out of its mean, which this runtime cannot: give no "
    "instruction, or export the checkpoint again with the instruction"
)


def _model_config(subject: Subject) -> dict[str, Any]:
    if subject.reranks:
        return {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.activation.Sigmoid"}
    return {
        "model_type": "SentenceTransformer",
        "prompts": {side: subject.instructions.get(side, "") for side in ("query", "document")},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine" if subject.model.normalize else "dot",
    }


def _write_modules(folder: Path, subject: Subject) -> None:
    model = subject.model
    size = model.config.hidden_size
    modules: list[tuple[str, str]] = [(f"{OURS}.PromptedTransformer" if subject.masked else TRANSFORMER, "")]

    def add(kind: str, **config: Any) -> Path:
        path = f"{len(modules)}_{kind.rsplit('.', 1)[1]}"
        modules.append((kind, path))
        write_json(folder / path / "config.json", config)
        return folder / path

    if isinstance(model.pooling, LatentAttention):
        block = {"type": subject.pooling} if isinstance(model.settings.pooling, str) else dict(model.settings.pooling)
        place = add(f"{OURS}.LatentAttentionPooling", hidden_size=size, pooling=block)
        _save(model.pooling, place)
    else:
        add(POOLING, embedding_dimension=size, pooling_mode=STOCK_POOLINGS[subject.pooling], include_prompt=True)
    linear = {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    if isinstance(model.projection, Head):
        weight = score_row(subject)
        place = add(DENSE, in_features=weight.shape[1], out_features=1, module_output_name="scores", **linear)
        _save_tensors({"linear.weight": weight}, place)
    elif model.projection is not None:
        weight = model.projection.weight.detach()
        place = add(DENSE, in_features=weight.shape[1], out_features=weight.shape[0], **linear)
        _save_tensors({"linear.weight": weight}, place)
    if model.normalize and not subject.reranks:
        modules.append((NORMALIZE, f"{len(modules)}_Normalize"))
        (folder / modules[-1][1]).mkdir()
    listed = [{"idx": at, "name": str(at), "path": path, "type": kind} for at, (kind, path) in enumerate(modules)]
    write_json(folder / "modules.json", listed)


def score_row(subject: Subject) -> torch.Tensor:
    """(1, H): the log-odds of being relevant as one linear map, the difference of the rows of two words."""
    assert isinstance(subject.model.projection, Head), "of a reranker"
    weight = subject.model.projection.weight.detach().float()  # (L, H)
    return weight if len(weight) == 1 else weight[:1] - weight[1:]


def _save(module: nn.Module, place: Path) -> None:
    _save_tensors({f"pooling.{name}": tensor for name, tensor in module.state_dict().items()}, place)


def _save_tensors(tensors: dict[str, torch.Tensor], place: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}, place / "model.safetensors"
    )


def _visual_tokens(subject: Subject) -> int:
    """Tokens that one picture takes at most: limits count text alone, and those of other runtimes everything."""
    family = subject.model.family
    if not family.multimodal:
        return 0
    counts = [family.image_markup(*size, 1).count(family.image_token) for size in ((4096, 4096), (4096, 1024))]
    return max(counts) + 8  # and the marks around it
