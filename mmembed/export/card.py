"""The model card of an exported folder: README.md with the metadata that the Hub reads, and how to load the model.

It says what the folder is made of and what was measured, in numbers of results files of `eval.run`; what nobody stated
(licence, data) it does not invent. Its code blocks are the documentation that `mmembed verify` follows; a test runs
those for Python.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmembed.benchmark_run import main_scores
from mmembed.errors import MmembedError
from mmembed.export import Target
from mmembed.export.subject import Subject
from mmembed.version import __version__

PLACE = "PATH"  # stands for the folder in code blocks
LIBRARIES = {"sentence-transformers": "sentence-transformers", "adapter": "peft", "onnx": "onnx"}


def read_metrics(files: Sequence[Path]) -> tuple[Mapping[str, Any], ...]:
    """task, metric and value of every task in results files of `eval.run`.

    Raises:
        MmembedError: a file is none, or holds the results of several models.
    """
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
            ours = [name for name, about in results["models"].items() if about["kind"] != "baseline"]
            if len(ours) != 1:
                raise MmembedError(f"{file}: holds results of {', '.join(ours) or 'baselines alone'}; give one model's")
            own = {
                task: {**entry, "scores": {ours[0]: entry["scores"][ours[0]]}}
                for task, entry in results["tasks"].items()
            }
            scores = main_scores({"tasks": own})
            rows += [{"task": task, "metric": results["tasks"][task]["main_score"], "value": value}
                     for task, value in scores.items()]  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, MmembedError):
                raise
            raise MmembedError(
                f"{file}: is no results file of eval.run ({error!r}); give what --output wrote"
            ) from error
    return tuple(rows)


def write_card(folder: Path, subject: Subject, target: Target) -> None:
    """Writes README.md."""
    name = str(vars(type(target))["name"])
    head = yaml.safe_dump(_metadata(subject, name), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{head}---\n", *_about(subject, name), "## How to load it\n", *_loading(folder, subject, name)]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _metadata(subject: Subject, target: str) -> dict[str, Any]:
    pipeline = "text-ranking" if subject.reranks else "feature-extraction"
    data: dict[str, Any] = {"library_name": LIBRARIES.get(target, "mmembed"), "pipeline_tag": pipeline}
    if subject.licence:
        data["license"] = subject.licence
    if "/" in subject.base:
        data["base_model"] = subject.base
    if subject.data:
        data["datasets"] = [one for one in subject.data if "/" in one] or None
    data["tags"] = ["mmembed", target, "reranker" if subject.reranks else "embedding"]
    if subject.metrics:
        data["model-index"] = [{"name": Path(subject.path).name, "results": [
            {"task": {"type": pipeline}, "dataset": {"name": row["task"], "type": row["task"]},
             "metrics": [{"type": row["metric"], "value": row["value"]}]} for row in subject.metrics]}]  # fmt: skip
    return {key: value for key, value in data.items() if value is not None}


def _about(subject: Subject, target: str) -> list[str]:
    model, lengths = subject.model, subject.preprocessor.limits
    kind = "A reranker: it scores a query with a document." if subject.reranks else "An embedder."
    reads = "texts, images and both together" if subject.multimodal else "texts"
    rows = [
        ("reads", reads),
        ("base model", subject.base),
        ("weights", f"{str(subject.dtype).removeprefix('torch.')}" + _merged(subject, target)),
        ("attention", "causal" if model.family.causal else "bidirectional"),
        ("pooling", subject.pooling),
        ("prompt style", subject.preprocessor.prompt.name),
        ("longest query, document", f"{lengths.query_max_length}, {lengths.document_max_length} text tokens"),
    ]
    if not subject.reranks:
        rows.append(("vector", f"{model.embedding_size} numbers" + (", of unit length" if model.normalize else "")))
    if subject.dims:
        rows.append(
            ("may be cut to", ", ".join(map(str, subject.dims)) + " numbers (Matryoshka), then normalised again")
        )
    if subject.precision != "float32":
        rows.append(("meant to be stored as", subject.precision))
    rows += [(f"instruction of a {side}", f"`{told}`") for side, told in subject.instructions.items()]
    rows.append(("licence", subject.licence or "not stated"))
    rows.append(("training data", ", ".join(subject.data) or "not stated"))
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    parts = [f"# {Path(subject.path).name}\n", f"{kind} Exported by mmembed {__version__} for {target}.\n", *table, ""]
    if subject.metrics:
        parts += ["## Metrics\n", "| task | metric | value |", "|---|---|---|"]
        parts += [f"| {row['task']} | {row['metric']} | {row['value']:.4f} |" for row in subject.metrics] + [""]
    return parts


def _merged(subject: Subject, target: str) -> str:
    if subject.adapter == "none":
        return ""
    return (
        f", the {subject.adapter} adapter beside them"
        if target == "adapter"
        else f", a {subject.adapter} adapter merged"
    )


def _loading(folder: Path, subject: Subject, target: str) -> list[str]:
    if target == "sentence-transformers":
        return _cross_encoder() if subject.reranks else _sentence_transformer(folder, subject)
    if target == "vllm":
        return _vllm_scores() if subject.reranks else [*_vllm_vectors(subject), *_sentence_transformer(folder, subject)]
    return {"merged": _merged_checkpoint, "adapter": _adapter, "onnx": _onnx}[target](subject)


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```\n"])


def _sentence_transformer(folder: Path, subject: Subject) -> list[str]:
    ours = "mmembed.runtimes" in (folder / "modules.json").read_text(encoding="utf-8")
    if ours:
        load = ["from mmembed.runtimes.sentence_transformers import load", "", f'model = load("{PLACE}")']
    else:
        load = ["from sentence_transformers import SentenceTransformer", "", f'model = SentenceTransformer("{PLACE}")']
    more = [
        'queries = model.encode_query(["What is the capital of France?"])',
        'documents = model.encode_document(["Paris is the capital of France.", "A bus is red."])',
        "print(model.similarity(queries, documents))",
    ]
    if subject.multimodal:
        more += [
            "",
            "from PIL import Image",
            "",
            'picture = Image.new("RGB", (64, 64), "red")',
            'print(model.encode_document([picture, {"image": picture, "text": "what colour is it?"}]).shape)',
        ]
    parts = ["### sentence-transformers\n", _python(*load, *more)]
    if ours:
        parts.append(
            "This model needs `pip install mmembed`: sentence-transformers has no module for its pooling. The folder "
            "holds no code, and `load` runs none; `SentenceTransformer(..., trust_remote_code=True)` gives the same.\n"
        )
    if subject.unpooled["told"] and not subject.masked:
        parts.append("It takes no instructions here: their tokens would be part of the mean, which they were not.\n")
    elif not ours:
        parts.append(
            "An instruction is `prompt=`; `encode_query` and `encode_document` say which side an input is of.\n"
        )
    if subject.dims:
        parts.append(
            f"Shorter vectors: `truncate_dim={subject.dims[-1]}, normalize_embeddings=True` of `encode_query` and "
            "`encode_document`.\n"
        )
    if subject.precision in ("int8", "binary"):
        parts.append(f'Stored smaller: `precision="{subject.precision}"` of the same.\n')
    return parts


def _cross_encoder() -> list[str]:
    return [
        "### sentence-transformers\n",
        _python(
            "from sentence_transformers import CrossEncoder",
            "",
            f'model = CrossEncoder("{PLACE}")',
            'documents = ["Paris is the capital of France.", "A bus is red."]',
            'print(model.rank("What is the capital of France?", documents))',
        ),
        "Scores are probabilities. An instruction is `prompt=`.\n",
    ]


def _vllm_vectors(subject: Subject) -> list[str]:
    images = " \\\n  --limit-mm-per-prompt '{\"image\": 4}'" if subject.multimodal else ""
    parts = [
        "### vLLM\n",
        f"```bash\nvllm serve {PLACE} --runner pooling --convert embed{images}\n```\n",
        "```bash\n"
        "curl localhost:8000/v1/embeddings -H 'Content-Type: application/json' -d '{\n"
        f'  "model": "{PLACE}",\n'
        '  "messages": [{"role": "query", "content": [{"type": "text", "text": "What is the capital of France?"}]}]\n'
        "}'\n```\n",
        "The role says the side, `query` or `document`; "
        + ("a message of the role `system` in front holds an instruction. " if not subject.unpooled["told"] else "")
        + "Offline, write the prompt with the tokenizer's chat template and pass "
        '`tokenization_kwargs={"add_special_tokens": False}` to `LLM.embed`.\n',
    ]
    if plain_inputs(subject):
        parts.append('A text of a document may also be sent as OpenAI\'s clients do, `"input": ["..."]`.\n')
    else:
        parts.append("Do not send texts as `input`: vLLM would leave this model's prompt out.\n")
    if subject.dims:
        parts.append(f'`"dimensions": {subject.dims[-1]}` gives shorter vectors.\n')
    return parts


def plain_inputs(subject: Subject) -> bool:
    """Whether a bare text, with what the tokenizer puts around it, is an input of a document."""
    from mmembed.content import Text
    from mmembed.preprocess import Item

    text = "What is the capital of France?"
    start, end = (
        "".join(subject.preprocessor.tokenizer.convert_ids_to_tokens(ids)) for ids in subject.preprocessor.special_ids
    )
    instruction = subject.instructions.get("document")
    return subject.preprocessor.as_text(Item((Text(text),), "document", instruction)) == start + text + end


def _vllm_scores() -> list[str]:
    return [
        "### vLLM\n",
        f"```bash\nvllm serve {PLACE} --runner pooling --chat-template {PLACE}/score_template.jinja\n```\n",
        "```bash\n"
        "curl localhost:8000/score -H 'Content-Type: application/json' -d '{\n"
        f'  "model": "{PLACE}",\n'
        '  "text_1": "What is the capital of France?",\n'
        '  "text_2": ["Paris is the capital of France.", "A bus is red."]\n'
        "}'\n```\n",
        "Without the template the scores are wrong: vLLM takes none from a folder for scores. `/rerank` works as well; "
        "scores are probabilities.\n",
    ]


def _merged_checkpoint(subject: Subject) -> list[str]:
    kind, call = ("Reranker", "rank") if subject.reranks else ("Embedder", "encode")
    use = 'model.rank("What is the capital of France?", ["Paris.", "A bus is red."])'
    if call == "encode":
        use = 'model.encode(["What is the capital of France?"], role="query")'
    return [
        "### mmembed\n",
        _python(f"from mmembed import {kind}", "", f'model = {kind}.from_pretrained("{PLACE}")', f"print({use})"),
    ]


def _adapter(subject: Subject) -> list[str]:
    return [
        "### peft\n",
        _python(
            "from peft import PeftModel",
            "from transformers import AutoModel",
            "",
            f'backbone = AutoModel.from_pretrained("{subject.model.settings.name_or_path}")',
            f'model = PeftModel.from_pretrained(backbone, "{PLACE}")',
        ),
        f"This is the adapter of the backbone alone. Prompt style and pooling ({subject.pooling}) are the caller's "
        "business; `mmembed.Embedder` brings them.\n",
    ]


def _onnx(subject: Subject) -> list[str]:
    return [
        "### ONNX Runtime\n",
        _python(
            "import numpy as np",
            "import onnxruntime",
            "from transformers import AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}")',
            f'session = onnxruntime.InferenceSession("{PLACE}/model.onnx")',
            'messages = [{"role": "query", "content": "What is the capital of France?"}]',
            "ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)",
            'inputs = {name: np.array([ids[name]], np.int64) for name in ("input_ids", "attention_mask")}',
            "print(session.run(None, inputs)[0])",
        ),
    ]
