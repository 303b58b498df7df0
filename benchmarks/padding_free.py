"""What padding costs on a GPU: packed sequences against padded ones, in encoding and in a training step.

    python -m benchmarks.padding_free --json            # CUDA, about a minute
    python -m benchmarks.padding_free --json --tiny     # anywhere, to see that it runs; its numbers mean nothing

A decoder in the shape of Qwen3-0.6B with random weights in bfloat16 and mean pooling, on real texts of skewed lengths
(`benchmarks._common.texts`, nano tokenizer), both sides under the same token budget and with their chunks sorted by
length. Vectors and losses of both must agree (2e-2), and gradients (cosine 0.95), before anything is timed.

    ours   attention_kernel packed: torch's FlashAttention for sequences of different lengths
    peer   attention_kernel padded: under causal attention torch's FlashAttention without a mask, under bidirectional
           attention whatever takes a mask

Encoding is `Embedder.encode` from strings to an array. A step is forward, loss and backward of a contrastive batch
whose chunks are all recomputed (GradCache), without the optimizer. Memory is what torch allocated at most on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks._common import QWEN3, Row, compare, parser, set_up, show, texts, told

if TYPE_CHECKING:
    from torch import Tensor

    from mmembed.models.embedding_model import EmbeddingModel
    from mmembed.preprocess import Preprocessor

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
}
MODES = ("causal", "bidirectional")
KERNELS = {"ours": "packed", "peer": "padded"}
TOLERANCE = 2e-2
LEAST_COSINE = 0.95


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--texts", type=int, default=2000, help="texts to encode (default 2000)")
    options.add_argument("--pairs", type=int, default=256, help="pairs of a training step (default 256)")
    options.add_argument("--encode-budget", type=int, default=16384, help="padded tokens a batch (default 16384)")
    options.add_argument(
        "--chunk-tokens", type=int, default=8192, help="padded tokens a chunk of a step (default 8192)"
    )
    options.add_argument("--tiny", action="store_true", help="a tiny model on a CPU or GPU, 24 texts and 8 pairs")
    arguments = options.parse_args()
    set_up(arguments.threads)
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.tiny:
        raise SystemExit("padding_free: there is no CUDA device here; give --tiny to see that it runs")
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    count, pairs = (24, 8) if arguments.tiny else (arguments.texts, arguments.pairs)
    rows = []
    for mode in MODES:
        model, preprocessor = build({**QWEN3, **(TINY if arguments.tiny else {})}, mode, device, dtype)
        if on_gpu:
            reason = model.unpacked("auto", device, dtype)
            if reason is not None:
                raise SystemExit(f"padding_free: nothing to measure, texts stay padded ({reason})")
        rows.append(told(measure_encode(mode, model, preprocessor, count, arguments.encode_budget, arguments.rounds)))
        rows.append(told(measure_step(mode, model, preprocessor, pairs, arguments.chunk_tokens, arguments.rounds)))
        del model
    show(rows, arguments.json)


def build(shape: dict[str, Any], mode: str, device: Any, dtype: Any) -> tuple[EmbeddingModel, Preprocessor]:
    """A random Qwen3 of this shape with the nano tokenizer."""
    from mmembed.backbones import Backbone, resolve_backbone  # isort: skip - before transformers' vision parts

    import torch
    from transformers import AutoModel, Qwen3Config

    from mmembed.backbones.family import family_of
    from mmembed.backbones.loading import load_processor, set_attention
    from mmembed.models.embedding_model import EmbedderSettings, assemble

    tokenizer = load_processor(resolve_backbone("mmembed-nano"), multimodal=True).tokenizer
    torch.manual_seed(0)
    config = Qwen3Config(**shape, pad_token_id=tokenizer.pad_token_id)
    with device:
        backbone = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
    set_attention(backbone, mode)
    settings = EmbedderSettings("random", pooling="mean", prompt="plain")
    whole = Backbone(backbone, tokenizer, family_of(backbone.config, tokenizer), backbone.config)
    return assemble(whole, settings)


def measure_encode(
    mode: str, model: EmbeddingModel, preprocessor: Preprocessor, count: int, token_budget: int, rounds: int
) -> Row:
    import numpy as np

    from mmembed import Embedder
    from mmembed.content import to_content
    from mmembed.data.collate import plan_chunks
    from mmembed.preprocess import Item

    contents = texts(count)
    embedder = Embedder(model, preprocessor)

    def run(kernel: Any) -> np.ndarray:
        found: np.ndarray = embedder.encode(
            contents, attention_kernel=kernel, token_budget=token_budget, show_progress=False
        )
        return found

    difference = float(np.abs(run("packed") - run("padded")).max())
    if not difference < TOLERANCE:
        raise SystemExit(f"encode_{mode}: vectors differ by {difference:.2g}; the timing would mean nothing")
    rows = preprocessor.tokenize([Item(to_content(content)) for content in contents])
    padded = sum(chunk.padded_tokens for chunk in plan_chunks(rows, token_budget))
    runs = {name: partial(run, kernel) for name, kernel in KERNELS.items()}
    peer_name = f"padded, {padded / sum(map(len, rows)) - 1:.0%} padding"
    return compare(f"encode_{mode}", "texts/s", count, runs, rounds, peer_name=peer_name, peak_mb=peaks(runs))


def measure_step(
    mode: str, model: EmbeddingModel, preprocessor: Preprocessor, pairs: int, chunk_tokens: int, rounds: int
) -> Row:
    from mmembed.config.blocks import SourceConfig
    from mmembed.content import Document, Example, Text
    from mmembed.data.collate import Collator
    from mmembed.objectives import build_objective
    from mmembed.training.gradcache import contrastive_step

    sides = zip(texts(pairs, seed=1), texts(pairs, seed=2), strict=True)
    examples = [
        Example((Text(query),), (Document((Text(document),)),), source="texts", where=str(index))
        for index, (query, document) in enumerate(sides)
    ]
    sources = {"texts": SourceConfig(path="texts")}
    batches = {
        kernel: Collator(preprocessor, sources, chunk_tokens, packed=kernel == "packed")(examples)
        for kernel in KERNELS.values()
    }
    model.train()
    objective = build_objective("contrastive").to(model.device)

    def run(kernel: str) -> float:
        model.zero_grad(set_to_none=True)
        loss, _ = contrastive_step(
            lambda chunk: model(chunk.inputs(preprocessor).to(model.device)), objective, batches[kernel], keep_tokens=0
        )
        synchronize()
        return loss.item()

    losses, gradients = {}, {}
    for kernel in batches:
        losses[kernel] = run(kernel)
        gradients[kernel] = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    alike = cosine(gradients["packed"], gradients["padded"])
    del gradients
    if not (abs(losses["packed"] - losses["padded"]) < TOLERANCE and alike > LEAST_COSINE):
        raise SystemExit(
            f"step_{mode}: losses {losses}, cosine of the gradients {alike:.3f}; the timing would mean nothing"
        )
    runs = {name: partial(run, kernel) for name, kernel in KERNELS.items()}
    padded = batches["padded"]
    peer_name = f"padded, {padded.padded_tokens / padded.tokens - 1:.0%} padding"
    row = compare(f"step_{mode}", "pairs/s", pairs, runs, rounds, peer_name=peer_name, peak_mb=peaks(runs))
    model.zero_grad(set_to_none=True)
    return row


def cosine(one: list[Tensor], other: list[Tensor]) -> float:
    """Of two gradients, given parameter by parameter."""
    both = [(a.float(), b.float()) for a, b in zip(one, other, strict=True)]
    product, left, right = (
        sum(float((x * y).sum()) for x, y in pairs)
        for pairs in (both, [(a, a) for a, _ in both], [(b, b) for _, b in both])
    )
    return product / (left * right) ** 0.5


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peaks(runs: dict[str, Callable[[], object]]) -> dict[str, int]:
    """Contender -> MB that torch had allocated at most on the GPU in a run; nothing without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    found = {}
    for name, run in runs.items():
        torch.cuda.reset_peak_memory_stats()
        run()
        found[name] = torch.cuda.max_memory_allocated() // 2**20
    return found


if __name__ == "__main__":
    main()
