"""How far the nano's vectors and scores are from those of the checkpoint, in every runtime that it is exported for.

    python -m benchmarks.parity --results runs/parity.json --write docs/export.md

Each case is a checkpoint with a LoRA adapter that is drawn, not trained: what is measured is whether runtimes compute
the same, whatever the weights are. The numbers are those of `mmembed verify`: the largest difference of a number of a
vector, or of a probability, over its fixed inputs, in float32. A start of vLLM takes 20 to 40 s on two quiet cores, and
there are two a case; with --results, cases that were measured before are kept, and the table has them all.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

LORA = {"type": "lora", "r": 8, "alpha": 16, "dropout": 0.0, "target_modules": "auto"}
HEAD = {"type": "yes_no", "words": ["a", "b"]}  # single tokens of the nano's tokenizer
CASES: dict[str, dict[str, Any]] = {
    "embedder, last token": {"pooling": "last_token", "prompt": "instruct"},
    "embedder, mean": {"pooling": "mean"},
    "embedder, latent attention": {"pooling": {"type": "latent_attention", "num_latents": 32}},
    "embedder, bidirectional, mean": {"pooling": "mean", "attention": "bidirectional"},
    "embedder, bidirectional, latent attention": {
        "pooling": {"type": "latent_attention", "num_latents": 32}, "attention": "bidirectional"
    },
    "reranker, two words": {
        "pooling": "last_token", "normalize": False, "head": HEAD, "prompt": {"type": "judge", "words": HEAD["words"]}
    },
}  # fmt: skip
COLUMNS = {
    "merged": "mmembed, merged",
    "sentence-transformers": "sentence-transformers",
    "vllm": "vLLM offline",
    "vllm-server": "vLLM server",
}
START, END = "<!-- written by benchmarks.parity -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runtimes", nargs="*", choices=list(COLUMNS)[1:], default=list(COLUMNS)[1:])
    parser.add_argument("--vllm-python", help="interpreter that has vLLM (default: of `make vllm-env`)")
    parser.add_argument("--results", type=Path, help="JSON file that is added to, case by case")
    parser.add_argument("--write", type=Path, help="a document whose table is replaced")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    kept = options.results is not None and options.results.is_file()
    found: dict[str, dict[str, Any]] = json.loads(options.results.read_text()) if kept else {}
    with tempfile.TemporaryDirectory() as folder:
        for case in options.cases:
            found[case] = measure(CASES[case], Path(folder) / "saved", options.runtimes, options.vllm_python)
            if options.results is not None:
                options.results.parent.mkdir(parents=True, exist_ok=True)
                options.results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            if not options.json:
                print(json.dumps({case: found[case]}), flush=True)
    if options.json:
        print(json.dumps({"cases": found}))
    if options.write is not None:
        text = options.write.read_text(encoding="utf-8")
        whole = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
        options.write.write_text(whole.sub(lambda _: f"{START}\n{table(found)}\n{END}", text), encoding="utf-8")


def measure(settings: dict[str, Any], folder: Path, runtimes: list[str], python: str | None) -> dict[str, Any]:
    """runtime -> inputs, difference and note."""
    import torch

    from mmembed.export.comparison import compare_all
    from mmembed.export.subject import load_subject
    from mmembed.models.checkpoint import save_checkpoint
    from mmembed.models.embedding_model import EmbedderSettings, build_from_settings

    torch.manual_seed(0)
    built = EmbedderSettings("mmembed-nano", dtype="float32", adapter=LORA, **settings)
    model, preprocessor = build_from_settings(built)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    save_checkpoint(folder, model, preprocessor)
    rows = compare_all(load_subject(str(folder), merge=False, dtype="float32"), runtimes, python)
    return {row.runtime: {"inputs": row.inputs, "difference": row.difference, "note": row.note} for row in rows}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| nano | inputs | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for case in (case for case in CASES if case in found):
        row = found[case]
        cells = [_cell(row.get(column)) for column in COLUMNS]
        lines.append(f"| {case} | {row['merged']['inputs']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return row["note"].partition(":")[0] if row["difference"] is None else f"{row['difference']:.1e}"


if __name__ == "__main__":
    main()
