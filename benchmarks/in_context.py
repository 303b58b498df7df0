"""How the time of an in-context reranker grows with the documents, against full attention over the same tokens.

    python -m benchmarks.in_context --json [--only 10 100] [--tokens 160]

One list: a query and N documents of 160 tokens, packaged nano, the attention of its third layer of four is read.

    ours   Reranker's reading: blocks, up to that layer
    peer   the same tokens in one causal sequence through the same layers (transformers' own attention, SDPA), up to the
           same layer, whose attention is read in the same way: an in-context reranker without blocks

`ours` and `peer` are documents a second. Goals: 4 times the peer at 100 documents; and linear time: of 200 documents at
most 4.4 times that of 50 (row `linear`: documents a second at 200 over those at 50, at least 4 / 4.4; another row says
it of 500). Full attention is left out above 200 documents: over 80,000 tokens it did not end in four minutes.

Ours gives the shares of transformers' eager attention under a written-out mask
(tests/equivalence/test_block_attention.py); here, before anything is timed, hidden states of one document, of which
blocks leave nothing out, equal the plain model's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks._common import Row, alternate, environment, own_peak_mb, parser, peak_mb_of, set_up, show

COUNTS = (10, 25, 50, 100, 200, 500)
FULL = 200  # documents that full attention reads, at most
HEAD = {"type": "attention", "layer": 3, "offset": 1024}
GOAL, AT = 4.0, 100
FEW, LINEAR = 50, {200: 4.4, 500: None}  # documents -> how often the time of FEW they may take


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--only", nargs="+", type=int, default=list(COUNTS), metavar="N", help="documents")
    options.add_argument("--tokens", type=int, default=160, help="tokens a document (default 160)")
    options.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    options.add_argument("--peak-of", nargs=2, metavar=("CONTENDER", "N"), help="used by the benchmark itself")
    arguments = options.parse_args()
    threads = set_up(arguments.threads)
    if arguments.peak_of:
        name, count = arguments.peak_of
        contenders(int(count), arguments.tokens, arguments.dtype)[name]()
        print(own_peak_mb())
        return
    check(arguments.tokens)
    rows, seconds = [], {}
    for count in sorted(arguments.only):
        runs = contenders(count, arguments.tokens, arguments.dtype)
        times = {name: statistics.median(of) for name, of in alternate(runs, arguments.rounds).items()}
        seconds[count] = times["ours"]
        left_out = {} if "peer" in runs else {"peer": f"left out above {FULL} documents: it does not end in minutes"}
        shared = ["--threads", str(threads), "--tokens", str(arguments.tokens), "--dtype", arguments.dtype]
        peaks = {name: peak_mb_of("benchmarks.in_context", [*shared, "--peak-of", name, str(count)]) for name in runs}
        ratio = round(times["peer"] / times["ours"], 3) if "peer" in runs else None
        goal = GOAL if count == AT else None
        rows.append(
            Row(
                f"in_context_{count}x{arguments.tokens}",
                "documents/s",
                round(count / times["ours"], 1),
                peer=round(count / times["peer"], 1) if "peer" in runs else None,
                peer_name="full attention" if "peer" in runs else None,
                ratio_to_peer=ratio,
                goal_to_peer=goal,
                peak_mb_ours=peaks["ours"],
                peak_mb_peer=peaks.get("peer"),
                meets=goal is None or (ratio is not None and ratio >= goal),
                details={"milliseconds": {name: round(1000 * one, 1) for name, one in times.items()}, **left_out},
            )
        )
    rows += [linear(seconds, many, bound) for many, bound in LINEAR.items() if {FEW, many} <= set(seconds)]
    for one in rows:
        one.details |= {"threads": threads, **environment()}
    show(rows, arguments.json)


def linear(seconds: dict[int, float], many: int, bound: float | None) -> Row:
    """Documents a second in a long list, over those in one of FEW."""
    ratio = seconds[FEW] * many / (seconds[many] * FEW)
    goal = None if bound is None else many / FEW / bound
    return Row(
        f"linear_{many}_over_{FEW}",
        "documents/s",
        round(many / seconds[many], 1),
        limit=round(FEW / seconds[FEW], 1),
        ratio_to_limit=round(ratio, 3),
        goal_to_limit=None if goal is None else round(goal, 3),
        meets=goal is None or ratio >= goal,
        details={"time_ratio": round(seconds[many] / seconds[FEW], 2)},
    )


def contenders(count: int, tokens: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """Each gives the documents' shares (N,); full attention of up to FULL of them."""
    import torch

    from mmembed.inference.cpu import accelerate
    from mmembed.inference.embedder import resolve_dtype
    from mmembed.inference.lists import read_list

    model, inputs = made(count, tokens, resolve_dtype(dtype, torch.device("cpu")))
    accelerate(model.backbone)
    runs = {"ours": lambda: read_list(model, inputs)}
    return {**runs, "peer": full_attention(model, inputs)} if count <= FULL else runs


def made(count: int, tokens: int, dtype: Any) -> tuple[Any, Any]:
    """The nano with this head, and a list of so many documents of so many tokens each."""
    import torch

    from mmembed.content import Text
    from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
    from mmembed.preprocess import Item, Place

    settings = EmbedderSettings(
        "mmembed-nano", dtype="float32", pooling="last_token", normalize=False, prompt="in_context", head=dict(HEAD),
        lengths={"query_max_length": 160, "document_max_length": tokens, "min_pixels": None, "max_pixels": None},
    )  # fmt: skip
    model, preprocessor = build_from_settings(settings, dtype=dtype)
    random = torch.Generator().manual_seed(0)
    words = torch.randint(100, 7000, (count, 2 * tokens), generator=random)
    texts = [preprocessor.tokenizer.decode(row.tolist()) for row in words]  # cut to the block
    query = (Text("which of these passages answers the question about the old town?"),)
    items = [Item(query, "query", None, (Text(text),), Place(0, number)) for number, text in enumerate(texts, 1)]
    inputs = preprocessor(items)
    lengths = inputs.pool_mask.sum(1) - inputs.shared
    if int(lengths.min()) != tokens:
        raise SystemExit(f"documents of {lengths.min()} to {lengths.max()} tokens and not {tokens}: nothing to compare")
    return model.eval(), inputs


def full_attention(model: Any, inputs: Any) -> Callable[[], Any]:
    """All tokens of the list in one causal sequence through the layers below that which is read; its attention."""
    import torch

    from mmembed.backbones.block_attention import document_shares, read_logits
    from mmembed.backbones.layers import decoder_of

    decoder = decoder_of(model.base)
    prefix, tail = inputs.shared, inputs.tail
    ids = inputs.tensors["input_ids"]
    real = inputs.pool_mask[:, prefix:]
    sequence = torch.cat([ids[0, :prefix], ids[:, prefix:].flatten(), torch.tensor(tail.ids)])[None]  # (1, S)
    signals = [sequence.shape[1] - len(tail.ids) + place for place in tail.signals]

    class Found(Exception):
        pass

    def read(module: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden = given[0] if given else options["hidden_states"]
        shape = (1, hidden.shape[1], -1, module.head_dim)
        query = module.q_norm(module.q_proj(hidden[:, signals]).view(1, len(signals), -1, module.head_dim))
        key = module.k_norm(module.k_proj(hidden).view(shape))
        cos, sin = options["position_embeddings"]
        query = rotated(query.transpose(1, 2), cos[:, signals], sin[:, signals])
        key = rotated(key.transpose(1, 2), cos, sin)
        documents = key[0, :, prefix : -len(tail.ids)]
        raise Found(document_shares(read_logits(query[0], documents, module.scaling), real))

    layer = decoder.layers[HEAD["layer"] - 1].self_attn

    @torch.inference_mode()
    def run() -> Any:
        hook = layer.register_forward_pre_hook(read, with_kwargs=True)
        try:
            decoder(input_ids=sequence, use_cache=False)
        except Found as found:
            return found.args[0]
        finally:
            hook.remove()
        raise AssertionError("the layer was not reached")

    return run


def rotated(states: Any, cos: Any, sin: Any) -> Any:
    """Rotary positions: (1, H, S, D) by (1, S, D)."""
    import torch

    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def check(tokens: int) -> None:
    """Raises SystemExit unless one document gives both the same hidden states in front of the last block."""
    import torch

    model, inputs = made(1, tokens, torch.float32)
    with torch.inference_mode():
        _, hidden = model.run_list(dict(inputs.tensors), inputs.pool_mask, inputs)
        sequence = inputs.tensors["input_ids"]
        plain = model.base(input_ids=sequence).last_hidden_state
    difference = float((hidden[0, : sequence.shape[1]] - plain[0]).abs().max())
    if difference > 1e-4:
        raise SystemExit(f"one document: hidden states differ by {difference:.2g}; the timing would mean nothing")


if __name__ == "__main__":
    main()
