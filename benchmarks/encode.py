"""How fast `Embedder.encode` is, against sentence-transformers and against the bare forward pass.

    python -m benchmarks.encode --json

All contenders hold the same nano weights with mean pooling and must give the same vectors (1e-4 in float32, 2e-2 in
bfloat16) before anything is timed.

    ours   Embedder.encode with its defaults, from strings or decoded pictures to a numpy array
    peer   SentenceTransformer.encode with the fastest of the batch sizes 16, 32, 64, 128. Texts go to it without the
           chat template, as to us; pictures need its template, so for pictures both use the template
    limit  the backbone's forward alone, with the kernels that we use: inputs tokenized and resized beforehand, sorted
           by length, right-padded batches of 8192 tokens, no attention mask (exact under causal attention), no pooling

The `default` rows compare our bfloat16 with the peer at its defaults: its own choice of dtype, batch size 32. In the
`instruction` rows all texts are queries behind an instruction of 64 tokens, the peer's `prompt`; we compute it once a
batch, the bare forward in every row, so there the limit is none.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks._common import (
    INSTRUCTION,
    Row,
    bare_forward,
    best_setting,
    compare,
    images,
    own_peak_mb,
    parser,
    peak_mb_of,
    set_up,
    show,
    texts,
    told,
)
from benchmarks._peers import mean_embedder

MAX_LENGTH = 512
PEER_BATCHES, PEER_DEFAULT_BATCH = (16, 32, 64, 128), 32
CASES = {  # name -> (modality, our dtype, the peer's dtype, goal to the peer, goal to the limit)
    "texts_fp32": ("text", "float32", "float32", 1.35, 0.95),
    "texts_bf16": ("text", "bfloat16", "bfloat16", None, 0.95),
    "texts_bf16_default": ("text", "bfloat16", None, 2.0, None),
    "texts_instruction_fp32": ("text", "float32", "float32", 2.5, None),
    "texts_instruction_bf16": ("text", "bfloat16", "bfloat16", 2.5, None),
    "images_fp32": ("image", "float32", "float32", 1.35, 0.95),
    "images_bf16": ("image", "bfloat16", "bfloat16", None, 0.95),
    "images_bf16_default": ("image", "bfloat16", None, 2.0, None),
}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--texts", type=int, default=1000)
    options.add_argument("--images", type=int, default=400)
    options.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="rows (default all)")
    options.add_argument("--no-memory", action="store_true", help="skip the peak memory of each contender")
    options.add_argument(
        "--peak-of", nargs=3, metavar=("CONTENDER", "CASE", "BATCH"), help="used by the benchmark itself"
    )
    arguments = options.parse_args()
    threads = set_up(arguments.threads)
    counts = {"text": arguments.texts, "image": arguments.images}
    if arguments.peak_of:
        contender, case, batch = arguments.peak_of
        runner = _contenders(case, counts, only=contender)[contender]
        runner(int(batch))
        print(own_peak_mb())
        return
    rows = []
    for case in arguments.only:
        rows.append(told(_measure(case, counts, arguments.rounds, threads, memory=not arguments.no_memory)))
    show(rows, arguments.json)


def _measure(case: str, counts: dict[str, int], rounds: int, threads: int, memory: bool) -> Row:
    modality, _, _, goal_to_peer, goal_to_limit = CASES[case]
    contenders = _contenders(case, counts)
    _check_equal(case, contenders)
    batch = PEER_DEFAULT_BATCH if case.endswith("default") else best_setting(contenders["peer"], PEER_BATCHES)
    peaks = {}
    if memory:
        shared = ["--threads", str(threads), "--texts", str(counts["text"]), "--images", str(counts["image"])]
        peaks = {
            name: peak_mb_of("benchmarks.encode", [*shared, "--peak-of", name, case, str(batch)])
            for name in ("ours", "peer")
        }
    runs: dict[str, Callable[[], object]] = {name: (lambda run=run: run(batch)) for name, run in contenders.items()}
    return compare(
        case,
        f"{modality}s/s",
        counts[modality],
        runs,
        rounds,
        peer_name=f"sentence-transformers, batch {batch}",
        goal_to_peer=goal_to_peer,
        goal_to_limit=goal_to_limit,
        peak_mb=peaks,
    )


def _contenders(case: str, counts: dict[str, int], only: str | None = None) -> dict[str, Callable[[int], Any]]:
    """Contender -> a function of the peer's batch size that does one full run."""
    modality, _, peer_dtype, _, _ = CASES[case]
    contents: Sequence[Any] = texts(counts["text"]) if modality == "text" else _pictures(counts["image"])
    found: dict[str, Callable[[int], Any]] = {}
    if only in (None, "ours", "limit"):
        embedder = _ours(case)
        how = {"role": "query"} if "instruction" in case else {}
        found["ours"] = lambda batch: embedder.encode(contents, show_progress=False, **how)
        if only != "ours":
            found["limit"] = _bare(embedder, contents, **how)
    if only in (None, "peer"):
        peer = _peer(modality, peer_dtype)
        prompt = INSTRUCTION if "instruction" in case else None
        found["peer"] = lambda batch: peer.encode(contents, prompt=prompt, batch_size=batch, show_progress_bar=False)
    return found


def _ours(case: str) -> Any:
    from mmembed import Embedder
    from mmembed.models.embedding_model import EmbedderSettings, build_from_settings

    modality, dtype, *_ = CASES[case]
    prompt: dict[str, Any] = {"type": "plain", "mask_instruction": False}
    if modality == "image":
        prompt = {"type": "chat", "mask_instruction": False, "add_generation_prompt": False}
    elif "instruction" in case:
        prompt["query_prefix"] = INSTRUCTION
    return Embedder(*build_from_settings(EmbedderSettings("mmembed-nano", pooling="mean", prompt=prompt, dtype=dtype)))


def _peer(modality: str, dtype: str | None) -> Any:
    """sentence-transformers on the same folder. Without a dtype it takes its own default."""
    import torch

    from mmembed.backbones import resolve_backbone

    folder = resolve_backbone("mmembed-nano")
    own = vars(torch)[dtype] if dtype else None
    return mean_embedder(folder, pictures=modality != "text", length=MAX_LENGTH, dtype=own).eval()


def _bare(embedder: Any, contents: Sequence[Any], role: Any = "document") -> Callable[[int], Any]:
    from mmembed.content import to_content
    from mmembed.preprocess import Item

    rows = embedder.preprocessor.tokenize([Item(to_content(content), role) for content in contents])
    return bare_forward(embedder.model.backbone, embedder.preprocessor, rows)


def _check_equal(case: str, contenders: dict[str, Callable[[int], Any]]) -> None:
    """Raises SystemExit unless both give the same vectors."""
    import numpy as np

    tolerance = 1e-4 if case.endswith("fp32") else 2e-2
    difference = float(np.abs(contenders["ours"](32).astype(np.float64) - contenders["peer"](32)).max())
    if difference > tolerance:
        raise SystemExit(
            f"{case}: vectors differ by {difference:.2g}, more than {tolerance}; the timing would mean nothing"
        )


def _pictures(count: int) -> list[Any]:
    from PIL import Image

    return [Image.open(io.BytesIO(one)).convert("RGB") for one in images(count)]


if __name__ == "__main__":
    main()
