"""A folder that vLLM serves: an embedder as a pooling model, a reranker as a sequence classifier with one label.

An embedder's folder is also the one of sentence-transformers, whose modules.json tells vLLM pooling, projection and
normalisation; `is_causal: false` in config.json, in the decoder's part and on top, makes its attention bidirectional.
Inputs go to it as messages, which the folder's chat template writes. A bare text gets what stands at the ends of an
input from the tokenizer, so that `input: [...]` is right where the prompt style writes nothing else.

A reranker's folder holds `score.weight`, the difference of the rows of its two words: the sigmoid that vLLM puts on it
is the probability of the first word among the two. Its template is given to the server by name
(`score_template.jinja`), because vLLM takes none from a folder for scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from mmembed.export import MANIFEST, Target
from mmembed.export.folder import (
    TEMPLATE,
    change_json,
    check_template,
    generating_class,
    settings_of,
    write_json,
    write_processor,
    write_weights,
)
from mmembed.export.subject import Refused, Subject
from mmembed.export.template import template_of
from mmembed.export.to_sentence_transformers import refuse_lists, score_row, write_folder

SCORE_TEMPLATE = "score_template.jinja"
POOLINGS = ("last_token", "mean")
# Text decoders of vLLM 0.32 that read `is_causal` from the config; of others it would be ignored without a word.
BIDIRECTIONAL = ("qwen2", "qwen3", "llama", "mistral", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")


class ToVllm(Target):
    """Writes the folder."""

    name: ClassVar[str] = "vllm"

    def check(self, subject: Subject) -> None:
        refuse_lists(subject, "vLLM scores a pair at a time")
        if subject.model.pooling.multi_vector:
            raise Refused(
                "pooling 'multi_vector': vLLM's /v1/embeddings gives one vector a content, the mean or the last of its "
                "tokens; keep the checkpoint and load it with mmembed.Embedder"
            )
        if subject.pooling not in POOLINGS:
            raise Refused(
                f"pooling '{subject.pooling}': vLLM pools the last token or the mean; export --to "
                "sentence-transformers, or train with pooling last_token or mean"
            )
        if subject.masked:
            raise Refused(
                "prompt.mask_instruction: this model leaves tokens of its prompt out of the mean, and vLLM takes the "
                "mean of all tokens; leave the instruction out, export --to sentence-transformers, or train with "
                "mask_instruction: false or pooling last_token"
            )
        text = subject.model.config
        if not subject.model.family.causal and text.model_type not in BIDIRECTIONAL:
            raise Refused(
                f"attention 'bidirectional': vLLM's decoder of '{text.model_type}' is causal whatever the config says; "
                f"export --to sentence-transformers, or train one of {', '.join(BIDIRECTIONAL)}"
            )

    def write(self, subject: Subject, folder: Path) -> None:
        if subject.reranks:
            self._write_reranker(subject, folder)
        else:
            write_folder(subject, folder, special_tokens=True)
            if subject.dims:
                change_json(folder / "config.json", matryoshka_dimensions=sorted(subject.dims))
        if not subject.model.family.causal:
            change_json(folder / "config.json", is_causal=False)
        write_json(folder / MANIFEST, settings_of(subject, self.name, serve=serve_arguments(subject)))

    def _write_reranker(self, subject: Subject, folder: Path) -> None:
        write_weights(folder, subject, score_row(subject))
        template = template_of(subject.preprocessor, subject.instructions, image_strings=True)
        write_processor(folder, subject, template, special_tokens=False)
        check_template(folder, subject)
        (folder / TEMPLATE).rename(folder / SCORE_TEMPLATE)
        name = generating_class(subject.model.base.config).__name__
        for suffix in ("ForConditionalGeneration", "ForCausalLM"):
            name = name.removesuffix(suffix)
        labels = {"num_labels": 1, "id2label": {"0": "relevant"}, "label2id": {"relevant": 0}, "use_sep_token": False}
        change_json(folder / "config.json", architectures=[f"{name}ForSequenceClassification"], **labels)


def serve_arguments(subject: Subject) -> list[str]:
    """What vLLM's server is started with beside the folder."""
    if subject.reranks:
        return ["--runner", "pooling", "--chat-template", SCORE_TEMPLATE]
    return ["--runner", "pooling", "--convert", "embed"]
