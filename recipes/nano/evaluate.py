"""Zero-shot quality of a nano on the dev splits: nDCG@10 of cosine search, and perplexity of unseen text."""

import math
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from mmembed.metrics import ndcg_at_k
from recipes.nano import data
from recipes.nano.batches import MAX_TEXT_TOKENS, PictureData
from recipes.nano.train import last_hidden, move, next_token_logits, pool

TEXT_SETS = ("squad-en", "xquad/en", "medquad", "mbpp", "odex", "tldr-commands", "openstax-glossary")
PICTURE_SETS = ("noto-emoji", "story-pages", "openstax-figures", "tech-figures", "vega-charts")
TOKENS_PER_BATCH = 8192


@torch.no_grad()
def encode(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> torch.Tensor:
    """Unit mean-pooled vectors (N, 256) float32."""
    encoded = tokenizer(texts, truncation=True, max_length=MAX_TEXT_TOKENS)["input_ids"]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    vectors = torch.zeros(len(texts), model.config.get_text_config().hidden_size)
    while order:
        longest = len(encoded[order[-1]]) + 1
        rows = order[-max(1, TOKENS_PER_BATCH // longest) :]
        order = order[: -len(rows)]
        ids = torch.full((len(rows), max(len(encoded[r]) for r in rows) + 1), tokenizer.pad_token_id)
        for i, r in enumerate(rows):
            ids[i, : len(encoded[r])] = torch.tensor(encoded[r])
        lengths = torch.tensor([max(1, len(encoded[r])) for r in rows])
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            hidden = last_hidden(model, ids.to(model.device)).cpu()
        vectors[rows] = pool(hidden, torch.arange(ids.shape[1]) < lengths.unsqueeze(1))
    return vectors


@torch.no_grad()
def encode_pictures(
    model: Qwen3VLForConditionalGeneration, pictures: PictureData, source: str, image_ids: list[str]
) -> torch.Tensor:
    vectors = []
    for start in range(0, len(image_ids), 64):
        images = [pictures.image(source, i) for i in image_ids[start : start + 64]]
        inputs, where, _ = pictures.pack(images, [""] * len(images))
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            hidden = model.model(**move(inputs, model.device), use_cache=False).last_hidden_state
        vectors.append(pool(hidden.cpu(), where))
    return torch.cat(vectors)


def ndcg_at_10(scores: torch.Tensor, relevant: list[dict[int, int]]) -> float:
    """Mean nDCG@10 with gain 2^score - 1; scores (Q, C), relevant: column -> grade of each query."""
    top = scores.topk(min(10, scores.shape[1])).indices.tolist()
    ranked = [[grades.get(column, 0) for column in columns] for columns, grades in zip(top, relevant, strict=True)]
    widest = max(len(grades) for grades in relevant)
    judged = [[*grades.values(), *[0] * (widest - len(grades))] for grades in relevant]
    return float(ndcg_at_k(ranked, judged, 10, gain="exponential").mean())


def retrieval(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pictures: PictureData,
    root: Path,
    name: str,
    limit: int = 10**9,
) -> float:
    """nDCG@10 of the English dev queries of a set against its whole corpus."""
    folder = root / name
    corpus = data.read_jsonl(folder / "corpus.jsonl")
    column = {d["_id"]: i for i, d in enumerate(corpus)}
    qrels = data.read_qrels(folder / "qrels/dev.tsv")
    asked = [q for q in data.read_jsonl(folder / "queries.jsonl") if q["_id"] in qrels and q["text"]]
    queries = [q for q in asked if q.get("lang", "en") == "en"][:limit]
    if name in PICTURE_SETS:
        documents = encode_pictures(model, pictures, name, [d["image"] for d in corpus])
    else:
        documents = encode(model, tokenizer, [data.document_text(d) for d in corpus])
    scores = encode(model, tokenizer, [q["text"] for q in queries]) @ documents.T
    relevant = [{column[d]: s for d, s in qrels[q["_id"]].items() if s > 0} for q in queries]
    return ndcg_at_10(scores, relevant)


@torch.no_grad()
def perplexity(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, texts: list[str], limit: int = 200
) -> dict[str, float]:
    """Per token and per byte (the one that compares across tokenizers), each text on its own, at most 256 tokens."""
    nats, tokens, size = 0.0, 0, 0
    chosen = texts[:: max(1, len(texts) // limit)]
    encoded = sorted(tokenizer(chosen, truncation=True, max_length=MAX_TEXT_TOKENS)["input_ids"], key=len)
    for start in range(0, len(encoded), 16):
        rows = [torch.tensor(ids) for ids in encoded[start : start + 16]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        targets = torch.nn.utils.rnn.pad_sequence([r[1:] for r in rows], batch_first=True, padding_value=-100)
        logits = (
            next_token_logits(model, last_hidden(model, ids.to(model.device))[:, :-1]).float().cpu()
        )  # (B, T - 1, V)
        nats += cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        tokens += int((targets >= 0).sum())
        size += sum(len(str(tokenizer.decode(r[1:])).encode()) for r in rows)
    return {"token": math.exp(nats / tokens), "byte": math.exp(nats / size)}


def report(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pictures: PictureData,
    root: Path,
    limit: int = 10**9,
) -> dict[str, float]:
    """All dev numbers, rounded."""
    model.eval()
    results = {n: round(retrieval(model, tokenizer, pictures, root, n, limit), 4) for n in TEXT_SETS + PICTURE_SETS}
    results["text average"] = round(float(np.mean([results[n] for n in TEXT_SETS])), 4)
    results["picture average"] = round(float(np.mean([results[n] for n in PICTURE_SETS])), 4)
    for name, texts in data.heldout_texts(root).items():
        measured = perplexity(model, tokenizer, texts)
        results |= {f"perplexity a {unit}, {name}": round(value, 2) for unit, value in measured.items()}
    model.train()
    return results
