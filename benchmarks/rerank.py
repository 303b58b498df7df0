"""Reranking against sentence-transformers' CrossEncoder and the bare forward pass, and training against its trainer.

    python -m benchmarks.rerank --json [--only texts_fp32 sft ...]

All contenders hold the same nano weights, the same chat around a pair (`prompt: judge`) and the same two words, "ok"
and "no", whose difference of logits is the score. Each query comes with 100 documents: of texts the 100 best by BM25 of
SQuAD paragraphs or MedQuAD answers, none of them cut; of pictures 100 of their pool. Scores (logits) must agree before
anything is timed: to 1e-4 in float32, probabilities to 2e-2 in bfloat16.

    ours   Reranker.score with its defaults, from strings or decoded pictures to scores
    peer   CrossEncoder.predict on a causal model with LogitScore, the fastest of the batch sizes 16, 32, 64, 128 and,
           of texts, of two ways to write a pair: its chat template, or strings that were written before the clock
           starts; it sorts by length itself
    limit  the backbone's forward alone over whole pairs, with our kernels: tokenized and resized beforehand, sorted by
           length, right-padded batches of 8192 tokens, no attention mask, no head. It computes the query again for each
           document, as every reranker without shared prefixes does

The peer's setting is chosen on two queries of texts, or one of pictures. Rows `sft` and `contrastive` train
(`benchmarks.rerank_training`).

FlagEmbedding's reranker of language models has no row: its 1.4.2 calls `prepare_for_model`, which the tokenizers of
transformers 5 no longer have, and loads no vision-language model. What it computes is what the peer here computes and
more: the same forward over pairs sorted by length, then the logits of all words behind every token where the peer reads
the last token alone, 80 % more products on the nano. So the peer is the faster of the two.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks._common import (
    DATA,
    Row,
    bare_forward,
    best_setting,
    compare,
    environment,
    images,
    own_peak_mb,
    parser,
    peak_mb_of,
    set_up,
    show,
    told,
)

WORDS = ("ok", "no")  # one token each of the nano's
PROMPT = {"type": "judge", "words": list(WORDS)}
LENGTHS = {"query_max_length": 512, "document_max_length": 1536}  # no pair of the data is longer
DOCUMENTS = 100  # a query
PEER_BATCHES = (16, 32, 64, 128)
SEARCHED = {"text": 2, "image": 1}  # queries on which the peer's setting is chosen
CASES = {  # name -> (modality, dtype of all, goal to the peer)
    "texts_fp32": ("text", "float32", 2.5),
    "texts_bf16": ("text", "bfloat16", 2.5),
    "images_fp32": ("image", "float32", 2.5),
    "images_bf16": ("image", "bfloat16", 2.5),
}
Pair = tuple[str, Any]


@dataclass(frozen=True)
class Setting:
    """How the peer runs: its batch size, and whether it gets pairs or strings in which the chat stands already."""

    batch: int
    written: bool

    def __str__(self) -> str:
        return f"batch {self.batch}, {'strings written beforehand' if self.written else 'chat template'}"


def main() -> None:
    from benchmarks import rerank_training

    options = parser(__doc__.splitlines()[0])
    every = [*CASES, *rerank_training.CASES]
    options.add_argument("--queries", type=int, default=6, help="of texts, with 100 documents each (default 6)")
    options.add_argument("--picture-queries", type=int, default=3, help="of pictures (default 3)")
    options.add_argument("--steps", type=int, default=3, help="counted steps of a training run (default 3)")
    options.add_argument("--only", nargs="+", choices=every, default=every, help="rows (default all)")
    options.add_argument("--no-memory", action="store_true", help="skip the peak memory of reranking")
    options.add_argument("--peak-of", nargs=4, metavar=("CONTENDER", "CASE", "BATCH", "WRITTEN"), help="used by itself")
    options.add_argument("--worker", nargs=3, metavar=("SIDE", "CASE", "SETTING"), help="used by itself")
    arguments = options.parse_args()
    threads = set_up(arguments.threads)
    counts = {"text": arguments.queries, "image": arguments.picture_queries}
    if arguments.worker:
        print(json.dumps(rerank_training.work(*arguments.worker, arguments.steps)))
    elif arguments.peak_of:
        contender, case, batch, written = arguments.peak_of
        _contenders(case, counts, only=contender)[contender](Setting(int(batch), written == "True"))
        print(own_peak_mb())
    else:
        rows = [
            told(
                _measure(case, counts, arguments.rounds, threads, memory=not arguments.no_memory)
                if case in CASES
                else rerank_training.measure(case, arguments.steps, arguments.rounds, threads)
            )
            for case in arguments.only
        ]
        show(rows, arguments.json)


def _measure(case: str, counts: dict[str, int], rounds: int, threads: int, memory: bool) -> Row:
    modality, _, goal = CASES[case]
    contenders = _contenders(case, counts)
    ways = (False, True) if modality == "text" else (False,)
    settings = [Setting(batch, written) for batch in PEER_BATCHES for written in ways]
    best = best_setting(_contenders(case, SEARCHED, only="peer")["peer"], settings)
    difference = _difference(case, contenders, best)
    peaks = {}
    if memory:
        shared = ["--threads", str(threads), "--queries", str(counts["text"])]
        shared += ["--picture-queries", str(counts["image"])]
        peaks = {
            name: peak_mb_of(
                "benchmarks.rerank", [*shared, "--peak-of", name, case, str(best.batch), str(best.written)]
            )
            for name in ("ours", "peer")
        }
    runs: dict[str, Callable[[], object]] = {name: (lambda run=run: run(best)) for name, run in contenders.items()}
    row = compare(
        case,
        "pairs/s",
        DOCUMENTS * counts[modality],
        runs,
        rounds,
        peer_name=f"sentence-transformers CrossEncoder, {best}",
        goal_to_peer=goal,
        peak_mb=peaks,
    )
    row.details = {"largest_difference": difference, **_tokens(_pairs(modality, counts)), "environment": environment()}
    return row


def _contenders(case: str, counts: dict[str, int], only: str | None = None) -> dict[str, Callable[[Setting], Any]]:
    """Contender -> a function of the peer's setting that does one full run and returns logits (N,)."""
    modality, dtype, _ = CASES[case]
    pairs = _pairs(modality, counts)
    found: dict[str, Callable[[Setting], Any]] = {}
    if only in (None, "ours", "limit"):
        reranker = ours(dtype)
        found["ours"] = lambda setting: reranker.score(pairs, scale="logit", show_progress=False)
        if only != "ours":
            rows = reranker.preprocessor.tokenize(_items(pairs))
            found["limit"] = bare_forward(reranker.model.backbone, reranker.preprocessor, rows)
    if only in (None, "peer"):
        import torch

        models = {way: peer(dtype, written=way) for way in ((False, True) if modality == "text" else (False,))}
        given = {False: pairs, True: [written(*pair) for pair in pairs] if modality == "text" else []}
        found["peer"] = lambda setting: models[setting.written].predict(
            given[setting.written],
            batch_size=setting.batch,
            activation_fn=torch.nn.Identity(),
            show_progress_bar=False,
        )
    return found


def _difference(case: str, contenders: dict[str, Callable[[Setting], Any]], setting: Setting) -> float:
    """The largest between our scores and the peer's. Raises SystemExit where it is too large."""
    import numpy as np

    ours, peers = (contenders[name](setting).astype(np.float64) for name in ("ours", "peer"))
    tolerance = 1e-4
    if case.endswith("bf16"):
        tolerance, ours, peers = 2e-2, *(1 / (1 + np.exp(-scores)) for scores in (ours, peers))
    difference = float(np.abs(ours - peers).max())
    if not difference <= tolerance:
        raise SystemExit(
            f"{case}: scores differ by {difference:.2g}, more than {tolerance}; a timing would mean nothing"
        )
    return difference


# Contenders -----------------------------------------------------------------------------------------------------------


def ours(dtype: str) -> Any:
    """The nano weights as a reranker."""
    from mmembed import Reranker
    from mmembed.models.embedding_model import EmbedderSettings, build_from_settings

    settings = EmbedderSettings(
        "mmembed-nano",
        pooling="last_token",
        normalize=False,
        prompt=PROMPT,
        lengths=LENGTHS,
        head={"type": "yes_no", "words": list(WORDS)},
        dtype=dtype,
    )
    return Reranker(*build_from_settings(settings))


def peer(dtype: str, written: bool) -> Any:
    """sentence-transformers on the same folder, with the chat of `prompt: judge`.

    Args:
        written: pairs are strings in which the chat stands (`written`), for its tokenizer alone.
    """
    from mmembed.backbones import resolve_backbone  # isort: skip - makes torchvision importable on a CPU machine

    import torch
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    options: dict[str, Any] = {}
    if written:
        options = {
            "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
            "module_output_name": "causal_logits",
        }
    transformer = Transformer(
        resolve_backbone("mmembed-nano"),
        transformer_task="any-to-any",
        max_seq_length=sum(LENGTHS.values()),
        model_kwargs={"dtype": vars(torch)[dtype]},
        processor_kwargs={"chat_template": _template()},
        **options,
    )
    if written:
        transformer.processor = transformer.tokenizer  # the nano's own processor takes no pairs of strings
    yes, no = (transformer.tokenizer.encode(word, add_special_tokens=False)[0] for word in WORDS)
    return CrossEncoder(modules=[transformer, LogitScore(yes, no)], device="cpu").eval()


def _around() -> tuple[str, str, str]:
    """The nano's chat of `prompt: judge`: what stands before the query, before the document, and behind it."""
    from mmembed.prompts.judge import INSTRUCTION, Judge

    system = Judge(words=WORDS).system
    head = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<Instruct>: {INSTRUCTION}\n<Query>: "
    return head, "\n<Document>: ", "<|im_end|>\n<|im_start|>assistant\n"


def written(query: str, document: str) -> tuple[str, str]:
    """A pair in the chat, cut where no token reaches across."""
    head, between, tail = _around()
    return head + query + between[:-1], between[-1] + document + tail


def _template() -> str:
    """The chat as the peer's template: a pair is a message of the role `query` and one of the role `document`."""
    parts = (
        "{%- for part in message.content -%}"
        "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
        "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}"
        "{%- endfor -%}"
    )
    head, between, tail = _around()
    roles = {"query": (head, ""), "document": (between, tail)}
    return (
        "{%- for message in messages -%}"
        + "".join(
            f"{{%- if message.role == '{role}' -%}}{{{{ {before!r} }}}}{parts}{{{{ {behind!r} }}}}{{%- endif -%}}"
            for role, (before, behind) in roles.items()
        )
        + "{%- endfor -%}"
    )


def _items(pairs: Sequence[Pair]) -> list[Any]:
    from mmembed.content import to_content
    from mmembed.preprocess import Item

    return [Item(to_content(query), "query", None, to_content(document)) for query, document in pairs]


# Data -----------------------------------------------------------------------------------------------------------------


@cache
def _pairs_of(modality: str, queries: int) -> tuple[Pair, ...]:
    return tuple(_texts(queries) if modality == "text" else _pictures(queries))


def _pairs(modality: str, counts: dict[str, int]) -> list[Pair]:
    return list(_pairs_of(modality, counts[modality]))


def _texts(queries: int) -> Iterator[Pair]:
    """Questions with the 100 best documents of their own collection, SQuAD and MedQuAD in turn."""
    for name, count in (("squad-en", (queries + 1) // 2), ("medquad", queries // 2)):
        collection = Collection(name)
        for query in collection.spread(count):
            yield from ((query.text, text) for text in collection.nearest(query.text, DOCUMENTS))


def _pictures(queries: int) -> Iterator[Pair]:
    """Captions, 100 pictures each: a picture stands with one query alone."""
    from PIL import Image

    captions = [json.loads(line)["text"] for line in _lines("openstax-figures/queries.jsonl")]
    decoded = [Image.open(io.BytesIO(one)).convert("RGB") for one in images(queries * DOCUMENTS)]
    for number in range(queries):
        for picture in decoded[number * DOCUMENTS : (number + 1) * DOCUMENTS]:
            yield captions[number * 97 % len(captions)], picture


@dataclass(frozen=True)
class Query:
    """A question and the text that answers it."""

    text: str
    answer: str


class Collection:
    """Queries and documents of a shipped data set, and BM25 over the documents (k1 1.2, b 0.75)."""

    def __init__(self, name: str) -> None:
        texts = {
            record["_id"]: record["text"]
            for file in ("queries", "corpus")
            for record in map(json.loads, _lines(f"{name}/{file}.jsonl"))
        }
        judged = [line.split("\t")[:2] for line in _lines(f"{name}/qrels/train.tsv")[1:]]
        self.queries = [Query(texts[query], texts[document]) for query, document in judged]
        self.documents = list(dict.fromkeys(json.loads(line)["text"] for line in _lines(f"{name}/corpus.jsonl")))
        counts = [Counter(_words(text)) for text in self.documents]
        mean = sum(sum(one.values()) for one in counts) / len(counts)
        self.postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for row, words in enumerate(counts):
            spread = 1.2 * (0.25 + 0.75 * sum(words.values()) / mean)
            for word, count in words.items():
                self.postings[word].append((row, count / (count + spread)))

    def spread(self, count: int) -> list[Query]:
        """So many queries, evenly spaced."""
        return [self.queries[number * len(self.queries) // count] for number in range(count)]

    def nearest(self, text: str, count: int) -> list[str]:
        """The documents with the highest scores, best first."""
        scores: dict[int, float] = defaultdict(float)
        for word, times in Counter(_words(text)).items():
            found = self.postings.get(word, [])
            rarity = times * math.log(1 + (len(self.documents) - len(found) + 0.5) / (len(found) + 0.5))
            for row, weight in found:
                scores[row] += rarity * weight
        best = sorted(range(len(self.documents)), key=lambda row: (-scores.get(row, 0.0), row))[:count]
        return [self.documents[row] for row in best]


def _words(text: str) -> list[str]:
    from mmembed.data.words import search_words

    return search_words(text)


def _lines(path: str) -> list[str]:
    return (DATA / path).read_text(encoding="utf-8").splitlines()


def _tokens(pairs: Sequence[Pair]) -> dict[str, int]:
    """Of the pairs: all of their tokens, median, 95th percentile and most; and those of the shared beginnings."""
    reranker = ours("float32")
    items = _items(pairs)
    lengths = sorted(reranker.preprocessor.lengths(items))
    starts = [items[at] for at in range(0, len(items), DOCUMENTS)]
    head, between, _ = _around()
    shared = [len(reranker.preprocessor.tokenizer.encode(head + one.content[0].text + between)) for one in starts]
    return {
        "tokens": sum(lengths),
        "median": lengths[len(lengths) // 2],
        "p95": lengths[len(lengths) * 95 // 100],
        "most": lengths[-1],
        "median_of_query": sorted(shared)[len(shared) // 2],
    }


if __name__ == "__main__":
    main()
