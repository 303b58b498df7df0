"""One CUDA device: training and encoding at the size of real backbones, against sentence-transformers.

    python -m benchmarks.gpu --json --output gpu.json [--only qwen3_0.6b_text ...]
    python -m benchmarks.gpu --json --output gpu.json --only qwen2_vl_2b --batch 128 --limit 90     one row in 200 s
    python -m benchmarks.gpu --json --tiny              the whole script on a CPU in small: proves nothing but itself

Weights are random, in the exact shape of the named model; texts and pictures are those of `benchmarks.train`, tokenized
by the nano tokenizer, whose ids are valid in the larger vocabularies. So speed and memory are those of the real model,
vectors mean nothing.

    qwen3_0.6b_text         batch 1,024 pairs, all weights of Qwen3-0.6B, mean pooling, AdamW, InfoNCE at 0.05
    qwen3_0.6b_instruction  and an instruction of 64 tokens before each question (ours computes it once a chunk)
    qwen2_vl_2b             batch 256: a caption and its picture (128 to 256 visual tokens), each seen once; LoRA of
                            rank 16 on the language tower of Qwen2-VL-2B, vision tower frozen
    encode_bf16             texts to vectors with Qwen3-0.6B, bfloat16
    plan_memory             what `mmembed plan` says of the first row's run (ours) against its measured peak (limit), MB

Both sides train through their own trainers, and both are searched: a setting is PRECISION,HOW=NUMBER, the fastest of
SETTINGS on one step of SEARCHED pairs runs. `autocast` is float32 weights under bfloat16 autocast, `bf16` is bfloat16
weights and no autocast: the only fast one of the peer, which embeds its second pass outside of autocast, in float32.
Ours: `-padded` sets training.attention_kernel, which decides by itself without; `-features` keeps what the frozen
vision tower gave, so that the second pass over a chunk need not compute it; `keep` is a token budget whose graphs are
kept, `chunk` one that sizes chunks which are all recomputed. The peer's number is the mini-batch of
CachedMultipleNegativesRankingLoss, `-products` gives it our layer in place of the convolution over patches, `-workers`
data workers (we open pictures in the training process), and TF32 is on for it. (transformers' own `fusion_config` for
that layer leaves it without weights where Qwen2VLModel is loaded alone, 5.23.) First losses must agree.

`mfu` is useful floating point operations a second over 989 TFLOP/s (dense bfloat16 of an H100 or H200, NVIDIA's data
sheet). Useful in a step, of real tokens without padding:

    6 N a token + 6 layers heads head_dim length^2 a sequence          forward and backward of a causal decoder
    4 N instead of 6 N under LoRA                                      frozen weights take no gradient
    2 N_vision a patch + 4 layers width patches^2 a picture            a frozen vision tower, forward

N: weights of the decoder without its token table, which multiplies nothing here. The second forward of GradCache is not
useful; nor is, for ours, a prefix that is shared and not computed again. `tokens_per_second` counts every token of
every input, shared or not. Encoding counts a third: a forward alone.

Each side of a row is a process of its own, because peak memory is (torch.cuda.max_memory_allocated). All of them import
at once and wait for their turn on the device, where a side loads its weights once. It has --limit seconds: its search
ends with a third of them, no step begins that would not end in time, and what it knows is written to `--output` after
every step, so that whatever ends it leaves a row: of the median timed step, or of the only step there was
(`step_seconds` says how many), or of the best of the search (`pairs` of a step), or of one side. A row that fails says
so in `details.error`, and the others go on. `details.environment` names the card, the commit and the versions.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from benchmarks._common import DATA, INSTRUCTION, QWEN3, Row, environment, own_peak_mb, parser, set_up, show, texts
from benchmarks._peers import mean_embedder
from benchmarks.train import (
    DOCUMENT_LENGTH,
    LEARNING_RATE,
    TEMPERATURE,
    in_order,
    pairs,
    peer_in_order,
    pictures,
    step_clock,
    write_pairs,
)

PEAK_FLOPS = 989e12
SEARCHED = {"text": 256, "instruction": 256, "images": 64}  # pairs of the steps that choose a setting
QUERY_LENGTHS = {"text": 64, "instruction": 128, "images": 256}
ENCODE_LENGTH = 512
SIDES = ("ours", "peer")
# Least cosine of the two sides' vectors, and difference of their first losses (above 5 here): bfloat16 in 28 layers.
COSINE, LOSS = 0.98, 5e-2
SETTINGS = {
    "text": {
        "ours": (
            "autocast,chunk=16384",
            "autocast-padded,chunk=16384",
            "autocast,keep=16384",
            "bf16,chunk=16384",
            "bf16,chunk=32768",
        ),
        "peer": ("autocast,size=64", "bf16,size=64", "bf16,size=128", "bf16,size=256"),
    },
    "images": {
        "ours": ("bf16,chunk=16384", "bf16-features,chunk=16384"),
        "peer": (
            "bf16,size=32",
            "bf16-products,size=32",
            "bf16-products-workers,size=32",
            "bf16-products-workers,size=64",
        ),
    },
    "encode": {"ours": ("auto", "padded"), "peer": ("size=64", "size=256", "size=1024")},
}
TINY_SETTINGS = {
    "text": {"ours": ("autocast,keep=512", "bf16-padded,chunk=512"), "peer": ("autocast,size=4", "bf16,size=8")},
    "images": {
        "ours": ("bf16,chunk=512", "bf16-features,chunk=512"),
        "peer": ("bf16,size=4", "bf16-products-workers,size=4"),
    },
    "encode": {"ours": ("auto", "padded"), "peer": ("size=4",)},
}
QWEN2_VL_TEXT = {  # of Qwen/Qwen2-VL-2B, config.json
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
}
QWEN2_VL_VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4}
TINY_TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY_SHAPE = {**TINY_TEXT, "intermediate_size": 128, "vocab_size": 7680}
VISUAL_TOKENS = 256  # a picture's at most
WORKERS = 4  # of the peer's data
ANSWER = "answer: "  # opens the lines of a process that are not some library's
BEGUN = "begun\n"
GRACE = 10  # seconds after which a process that does not end in time is ended
IMPORTS = 200  # seconds after which a process is ended that has not yet begun
Heard = Callable[[dict[str, Any]], None]  # takes what a side knows so far


@dataclass(frozen=True)
class Case:
    """A row of training."""

    kind: str
    shape: str
    batch: int


@dataclass(frozen=True)
class Scale:
    """How large everything is: of the benchmark, or of its test."""

    tiny: bool
    device: str
    steps: int  # timed, after one that warms up
    texts: int
    rounds: int
    limit: float  # seconds of one side of a row
    pairs: int | None = None  # a step's, where the case does not say

    def batch(self, case: Case) -> int:
        return self.pairs or (8 if self.tiny else case.batch)

    @property
    def settings(self) -> dict[str, dict[str, tuple[str, ...]]]:
        return TINY_SETTINGS if self.tiny else SETTINGS


CASES = {
    "qwen3_0.6b_text": Case("text", "qwen3", 1024),
    "qwen3_0.6b_instruction": Case("instruction", "qwen3", 1024),
    "qwen2_vl_2b": Case("images", "qwen2_vl", 256),
}
ROWS = (*CASES, "encode_bf16", "plan_memory")


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.set_defaults(rounds=3)
    options.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows (default all)")
    options.add_argument("--output", type=Path, metavar="FILE", help="also write the rows here, after each one")
    options.add_argument("--steps", type=int, default=3, help="timed steps (default 3)")
    options.add_argument("--batch", type=int, help="pairs a step (default: the row's)")
    options.add_argument("--texts", type=int, default=4000, help="that are encoded (default 4000)")
    options.add_argument(
        "--no-search", action="store_true", help="the second of each side's settings, without a search"
    )
    options.add_argument("--limit", type=float, default=80, metavar="SECONDS", help="of one side of a row (default 80)")
    options.add_argument("--tiny", action="store_true", help="small shapes on the CPU: tests the script")
    options.add_argument("--in-process", action="store_true", help="no processes of their own (peaks add up)")
    options.add_argument("--worker", metavar="TASK", help="used by the benchmark itself")
    arguments = options.parse_args()
    set_up(arguments.threads)
    import torch

    if not (torch.cuda.is_available() or arguments.tiny):
        raise SystemExit("benchmarks.gpu: torch sees no CUDA device here; --tiny runs the script in small on the CPU")
    scale = Scale(False, "cuda", arguments.steps, arguments.texts, arguments.rounds, arguments.limit, arguments.batch)
    if arguments.tiny:
        scale = Scale(True, "cpu", 1, 24, 1, arguments.limit, arguments.batch)
    if arguments.worker:
        _warm_up(arguments.worker)
        given = sys.stdin.readline()
        if given:  # else the benchmark ended before this one's turn
            print(BEGUN, end="", flush=True)
            _tell_answer(_task(arguments.worker, json.loads(given), scale, _tell_answer))
        return
    with _folder() as folder:
        runner = _Runner(arguments, scale, folder)
        show(runner.rows(arguments.only), arguments.json)


class _Runner:
    """Runs the tasks of the rows in turn and makes rows of what they found."""

    def __init__(self, arguments: Any, scale: Scale, folder: Path) -> None:
        self.arguments, self.scale, self.folder = arguments, scale, folder
        self.settings: dict[str, str] = {}  # "kind side" -> the fastest
        self.first: dict[str, Any] | None = None  # our side of the first row
        self.waiting: dict[str, subprocess.Popen[str]] = {}
        self.told: set[str] = set()
        self.found: list[Row] = []

    def rows(self, names: Sequence[str]) -> list[Row]:
        shapes = sorted({CASES[name].shape if name in CASES else "qwen3" for name in names})
        tasks = ["build", *(f"{side} {name}" for name in names if name != "plan_memory" for side in SIDES)]
        if "plan_memory" in names:
            tasks += ["plan"] if "qwen3_0.6b_text" in names else ["ours qwen3_0.6b_text", "plan"]
        try:
            self._start(dict.fromkeys(tasks))
            self._run("build", {"shapes": shapes})
            for name in (name for name in ROWS if name in names):
                started = time.perf_counter()
                try:
                    row = self._row(name)
                except Exception as error:
                    traceback.print_exc()
                    message = f"{type(error).__name__}: {str(error).strip()[-2000:]}"
                    row = Row(name, "", 0.0, meets=False, details={"error": message})
                row.details["seconds"] = round(time.perf_counter() - started, 1)
                self._write(row)
                self.found.append(row)
                _say(f"{name}: {json.dumps(asdict(row))}")
        finally:
            for process in self.waiting.values():
                process.kill()
        return self.found

    def _write(self, row: Row) -> None:
        """`--output`: the rows before, and this one as far as it is known."""
        row.details["environment"] = self.environment
        if self.arguments.output is not None:
            rows = json.dumps({"rows": [asdict(one) for one in (*self.found, row)]}, indent=1)
            self.arguments.output.write_text(rows + "\n", encoding="utf-8")

    @cached_property
    def environment(self) -> dict[str, str]:
        return environment()

    def _row(self, name: str) -> Row:
        if name == "plan_memory":
            return self._plan()
        if name == "encode_bf16":
            return self._encode()
        return self._train(name)

    def _train(self, name: str) -> Row:
        """A row of both sides; of one, where the other gave nothing."""
        found: dict[str, dict[str, Any]] = {}
        errors = {}
        for side in SIDES:

            def heard(answer: dict[str, Any], side: str = side) -> None:
                found[side] = answer
                self._write(_row_of(name, found))

            try:
                heard(self._side(side, name, heard))
            except RuntimeError as error:
                errors[side] = str(error)
        if not found:
            raise RuntimeError("; ".join(errors.values()))
        row = _row_of(name, found)
        return replace(row, details=row.details | {"error": errors}) if errors else row

    def _side(self, side: str, name: str, heard: Heard | None = None) -> dict[str, Any]:
        """One side of a row. The setting that the row of texts found is the instruction's too."""
        kind = CASES[name].kind.replace("instruction", "text")
        setting = self.settings.get(f"{kind} {side}")
        if self.arguments.no_search:
            tried = self.scale.settings[kind][side]
            setting = tried[min(1, len(tried) - 1)]
        found = self._run(f"{side} {name}", {"setting": setting}, heard)
        self.settings[f"{kind} {side}"] = found["setting"]
        if (side, name) == ("ours", "qwen3_0.6b_text"):
            self.first = found
            if "plan" in self.waiting:  # needs no device: beside the peer
                self._tell("plan", {"tree": found["tree"]})
        return found

    def _encode(self) -> Row:
        import numpy as np

        found = {side: self._run(f"{side} encode_bf16", {}) for side in SIDES}
        vectors = [np.load(self.folder / f"{side}.npy").astype(np.float64) for side in SIDES]
        left, right = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in vectors)
        cosine = float((left * right).sum(1).min())
        speed = {side: one["count"] / one["seconds"] for side, one in found.items()}
        for one in found.values():
            one["mfu"] = round(found["ours"]["useful_flops"] / one["seconds"] / PEAK_FLOPS, 4)
        return Row(
            "encode_bf16",
            "texts/s",
            round(speed["ours"], 2),
            round(speed["peer"], 2),
            f"sentence-transformers, batch {found['peer']['setting']}",
            ratio_to_peer=round(speed["ours"] / speed["peer"], 3),
            peak_mb_ours=found["ours"]["peak_mb"],
            peak_mb_peer=found["peer"]["peak_mb"],
            meets=cosine >= COSINE,
            details={"least_cosine": cosine, **found},
        )

    def _plan(self) -> Row:
        first = self.first or self._side("ours", "qwen3_0.6b_text")
        found = self._run("plan", {"tree": first["tree"]})
        ratio = found["estimated_mb"] / first["peak_mb"]
        return Row(
            "plan_memory",
            "MB",
            round(found["estimated_mb"], 1),
            limit=first["peak_mb"],
            ratio_to_limit=round(ratio, 3),
            goal_to_limit=1.0,
            meets=abs(ratio - 1) <= 0.25,
            details=found,
        )

    # Processes --------------------------------------------------------------------------------------------------------

    def _start(self, tasks: Sequence[str] | dict[str, None]) -> None:
        """All processes at once: they import, then wait for a line."""
        if self.arguments.in_process:
            return
        for task in tasks:
            command = [sys.executable, "-m", "benchmarks.gpu", "--worker", task]
            command += ["--steps", str(self.scale.steps), "--rounds", str(self.scale.rounds)]
            command += ["--threads", str(self.arguments.threads)] if self.arguments.threads else []
            command += ["--texts", str(self.scale.texts), "--limit", str(self.scale.limit)] + (
                ["--tiny"] if self.scale.tiny else []
            )
            command += ["--batch", str(self.scale.pairs)] if self.scale.pairs else []
            self.waiting[task] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=DATA.parent
            )

    def _run(self, task: str, given: dict[str, Any], heard: Heard | None = None) -> dict[str, Any]:
        """The answer of a task. `heard` takes those before the last: what was known by then."""
        _say(f"{task} begins")
        heard = heard or (lambda _: None)
        if self.arguments.in_process:
            answer = _task(task, {"folder": str(self.folder), **given}, self.scale, heard)
        else:
            self._tell(task, given)
            answer = self._answer(task, heard)
        if "error" in answer:
            raise RuntimeError(f"{task}: {answer['error']}")
        return answer

    def _tell(self, task: str, given: dict[str, Any]) -> None:
        """Lets a process begin; a second time does nothing."""
        if task not in self.told:
            self.told.add(task)
            stream = self.waiting[task].stdin
            assert stream is not None, "it is a pipe"
            stream.write(json.dumps({"folder": str(self.folder), **given}) + "\n")
            stream.flush()

    def _answer(self, task: str, heard: Heard) -> dict[str, Any]:
        """The last answer of a process; where it was ended or broke, the last before that."""
        process = self.waiting.pop(task)
        assert process.stdout is not None, "it is a pipe"
        limit = self.scale.limit + GRACE
        ended: list[float] = []

        def ending(seconds: float) -> threading.Timer:
            timer = threading.Timer(seconds, lambda: (ended.append(seconds), process.kill()))
            timer.start()
            return timer

        timer, answers = ending(IMPORTS), []
        for line in process.stdout:
            if line == BEGUN:
                timer.cancel()
                timer = ending(limit)
            if line.startswith(ANSWER):
                answers.append(json.loads(line.removeprefix(ANSWER)))
                if "error" not in answers[-1]:
                    heard(answers[-1])
        process.wait()
        timer.cancel()
        if process.returncode:
            how = f"was ended after {ended[0]:g} s" if ended else f"ended with {process.returncode}"
            answers.append({"error": f"{task} {how}"})
        known = [one for one in answers if "error" not in one]
        if not known:
            raise RuntimeError(f"{answers[-1]['error'] if answers else task + ' said nothing'}; more is above")
        broke = {"ended_by": answers[-1]["error"]} if "error" in answers[-1] else {}
        return known[-1] | broke


@contextmanager
def _folder() -> Iterator[Path]:
    """For weights and records: in memory where that has room for them, else on disk."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 16e9
    with tempfile.TemporaryDirectory(dir=shared if roomy else None) as folder:
        yield Path(folder)


def _row_of(name: str, found: dict[str, dict[str, Any]]) -> Row:
    """A row of what the sides know so far; either may be missing."""
    ours, peer = found.get("ours"), found.get("peer")
    sides = {side: {**one, **_speeds(side, one, ours)} for side, one in found.items()}
    speed = {side: one["pairs_per_second"] for side, one in sides.items()}
    details: dict[str, Any] = dict(sides)
    ratio, meets = None, False
    if ours is not None and peer is not None:
        ratio = round(speed["ours"] / speed["peer"], 3)
        if ours["pairs"] == peer["pairs"]:  # else they saw other batches
            details["loss_difference"] = abs(ours["first_loss"] - peer["first_loss"])
            meets = details["loss_difference"] <= LOSS
    return Row(
        name,
        "pairs/s",
        speed.get("ours"),
        speed.get("peer"),
        None if peer is None else f"CachedMultipleNegativesRankingLoss, {peer['setting']}",
        ratio_to_peer=ratio,
        peak_mb_ours=None if ours is None else ours["peak_mb"],
        peak_mb_peer=None if peer is None else peer["peak_mb"],
        meets=meets,
        details=details,
    )


def _speeds(side: str, one: dict[str, Any], ours: dict[str, Any] | None) -> dict[str, float]:
    """Pairs a second; and by what ours counted in its pairs, tokens a second and the utilisation."""
    speed = one["pairs"] / one["seconds_a_step"]
    if ours is None:
        return {"pairs_per_second": round(speed, 2)}
    useful = ours["useful_flops" if side == "ours" else "useful_flops_unshared"]
    return {
        "pairs_per_second": round(speed, 2),
        "tokens_per_second": round(speed * ours["tokens"] / ours["pairs"]),
        "mfu": round(speed * useful / ours["pairs"] / PEAK_FLOPS, 4),
    }


def _tell_answer(answer: dict[str, Any]) -> None:
    print(ANSWER + json.dumps(answer), flush=True)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# Tasks of the processes -----------------------------------------------------------------------------------------------


def _warm_up(task: str) -> None:
    """Imports what a task needs, before its turn."""
    import mmembed.backbones  # first: makes torchvision importable on a CPU machine

    if task.startswith("peer"):
        import datasets  # noqa: F401
        import sentence_transformers.losses  # noqa: F401
    else:
        import mmembed.plan
        import mmembed.training.trainer  # noqa: F401


def _task(task: str, given: dict[str, Any], scale: Scale, tell: Heard) -> dict[str, Any]:
    """What a process does in its turn; an error is an answer too. `tell` takes what is known before the end."""
    kind, _, name = task.partition(" ")
    folder = Path(given["folder"])
    try:
        if kind == "build":
            return _build(folder, given["shapes"], scale)
        if kind == "plan":
            return _plan(given["tree"])
        if name == "encode_bf16":
            return _encode(kind, folder, scale)
        return _Training(kind, name, folder, scale, tell).run(given["setting"])
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error).strip()[-1500:]}"}


def _build(folder: Path, shapes: Sequence[str], scale: Scale) -> dict[str, Any]:
    """Saves random weights of each shape in bfloat16, made on the device, with the nano tokenizer beside them."""
    import torch
    import transformers as tf

    import mmembed.backbones  # noqa: F401  makes torchvision importable on a CPU machine
    from mmembed.backbones import resolve_backbone

    nano = Path(resolve_backbone("mmembed-nano"))
    tokenizer = tf.PreTrainedTokenizerFast.from_pretrained(nano)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    for shape in shapes:
        torch.manual_seed(0)
        processor: Any = tokenizer
        if shape == "qwen3":
            config = tf.Qwen3Config(**{**QWEN3, **(TINY_SHAPE | {"head_dim": 16} if scale.tiny else {})}, **tokens)
        else:
            config, processor = _vision_language(tokenizer, tokens, scale.tiny)
        with torch.device(scale.device):
            model = tf.AutoModel.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / shape)
        processor.save_pretrained(folder / shape)
        if shape == "qwen3":
            _plain_tokenizer(folder / shape)
        del model
    return {"shapes": list(shapes)}


def _plain_tokenizer(folder: Path) -> None:
    """So that neither side replaces it by the tokenizer class of the model's type, which encodes by other rules."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.pop("processor_class", None)  # nano's own sees
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings), encoding="utf-8")


def _vision_language(tokenizer: Any, tokens: dict[str, Any], tiny: bool) -> tuple[Any, Any]:
    """Configuration and processor of Qwen2-VL-2B."""
    import transformers as tf

    text, vision = QWEN2_VL_TEXT, QWEN2_VL_VISION
    if tiny:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
        text = {**text, **TINY_SHAPE, "rope_parameters": rope}
        vision = {**vision, "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    marks = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>")
        for name, mark in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    config = tf.Qwen2VLConfig(text_config={**text, **tokens}, vision_config=vision, tie_word_embeddings=True, **marks)
    most = 8 if tiny else VISUAL_TOKENS
    size = {"shortest_edge": most // 2 * 28**2, "longest_edge": most * 28**2}
    images = tf.Qwen2VLImageProcessor(patch_size=14, merge_size=2, temporal_patch_size=2, size=size)
    video = tf.Qwen2VLVideoProcessor(patch_size=14, size=size)
    template = tokenizer.chat_template
    processor = tf.Qwen2VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=video, chat_template=template
    )
    return config, processor


def _plan(tree: dict[str, Any]) -> dict[str, Any]:
    from mmembed.config import build_config
    from mmembed.plan import plan_run

    started = time.perf_counter()
    stage = plan_run(build_config(tree), sample=1).stages[0]
    parts = {name: round(value / 2**20) for name, value in vars(stage).items() if isinstance(value, float)}
    return {"estimated_mb": stage.total / 2**20, "parts_mb": parts, "plan_seconds": time.perf_counter() - started}


def _encode(side: str, folder: Path, scale: Scale) -> dict[str, Any]:
    """Encodes the texts in rounds; the vectors of the last round lie in the folder."""
    import numpy as np

    contents = texts(scale.texts)
    run, facts = (_our_encoder if side == "ours" else _peer_encoder)(folder / "qwen3", contents, scale)
    run()
    _start_peak(scale)
    seconds = []
    for _ in range(scale.rounds):
        started = time.perf_counter()
        vectors = run()
        seconds.append(time.perf_counter() - started)
    np.save(folder / f"{side}.npy", vectors)
    return {"count": len(contents), "seconds": statistics.median(seconds), "peak_mb": _peak_mb(scale), **facts}


def _our_encoder(weights: Path, contents: Sequence[str], scale: Scale) -> tuple[Callable[[], Any], dict[str, Any]]:
    from mmembed import Embedder
    from mmembed.content import to_content
    from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
    from mmembed.preprocess import Item

    lengths = {"query_max_length": ENCODE_LENGTH, "document_max_length": ENCODE_LENGTH}
    prompt = {"type": "plain", "mask_instruction": False}
    settings = EmbedderSettings(str(weights), pooling="mean", prompt=prompt, dtype="bfloat16", lengths=lengths)
    model, preprocessor = build_from_settings(settings)
    embedder = Embedder(model.to(scale.device), preprocessor)
    rows = preprocessor.tokenize([Item(to_content(text)) for text in contents])
    forward = _useful(model, [len(row) for row in rows], [], trained=True) / 3
    facts = {"useful_flops": forward, "tokens": sum(len(row) for row in rows)}

    def encode(setting: str) -> Any:
        return embedder.encode(contents, show_progress=False, attention_kernel=cast("Any", setting))

    return _fastest(encode, "ours", scale, facts)


def _peer_encoder(weights: Path, contents: Sequence[str], scale: Scale) -> tuple[Callable[[], Any], dict[str, Any]]:
    import torch

    model = _peer_model(weights, "text", torch.bfloat16, scale.device, ENCODE_LENGTH).eval()

    def encode(setting: str) -> Any:
        return model.encode(list(contents), batch_size=int(setting.removeprefix("size=")), show_progress_bar=False)

    return _fastest(encode, "peer", scale, {})


def _fastest(
    encode: Callable[[str], Any], side: str, scale: Scale, facts: dict[str, Any]
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A run with the setting whose second run took the least time, and what was found."""
    seconds: dict[str, Any] = {}
    for setting in scale.settings["encode"][side]:
        try:
            for _ in range(2):
                started = time.perf_counter()
                encode(setting)
                seconds[setting] = round(time.perf_counter() - started, 3)
        except Exception as error:
            _say(f"{side} encode {setting}: {error}")
            seconds[setting] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    timed = [one for one, value in seconds.items() if isinstance(value, float)]
    if not timed:
        raise RuntimeError(f"no setting ran: {seconds}")
    best = min(timed, key=lambda one: seconds[one])
    return lambda: encode(best), {"setting": best, "searched_seconds": seconds, **facts}


# Training -------------------------------------------------------------------------------------------------------------


class _Training:
    """One side of a row of training: the search for its setting, then the timed steps from fresh weights."""

    def __init__(self, side: str, name: str, folder: Path, scale: Scale, tell: Heard) -> None:
        self.side, self.name, self.case, self.scale, self.tell = side, name, CASES[name], scale, tell
        self.weights, self.folder = folder / self.case.shape, folder / f"{side}-{name}"
        self.folder.mkdir()
        self.began = time.perf_counter()
        self.loaded: tuple[str, Any] = ("", None)  # precision, and what of it stays from run to run
        self.fresh: dict[str, Any] = {}  # the trained weights before the first step
        self.known: dict[str, Any] = {}  # of the search

    @property
    def spent(self) -> float:
        """The part of the limit that is over."""
        return (time.perf_counter() - self.began) / self.scale.limit

    def run(self, setting: str | None) -> dict[str, Any]:
        setting = self._search() if setting is None else setting
        batch = self.scale.batch(self.case)
        return self._train(setting, batch, self.scale.steps + 1, self.folder / "run", self.tell)

    def _search(self) -> str:
        """The fastest setting, of those that a third of the limit is enough for."""
        searched: dict[str, Any] = {}
        best: dict[str, Any] = {}
        for number, one in enumerate(self.scale.settings[self.case.kind.replace("instruction", "text")][self.side]):
            if best and self.spent > 1 / 3:
                searched[one] = "not tried: a third of --limit was over"
                continue
            found = self._short(one, number)
            searched[one] = found.get("error") or round(found["pairs"] / found["seconds_a_step"], 2)
            self.known = {"searched": searched}
            if "error" not in found and (not best or found["seconds_a_step"] < best["seconds_a_step"]):
                best = found
            if best:
                self.tell({**best, **self.known})
        if not best:
            raise RuntimeError(f"no setting ran: {searched}")
        return str(best["setting"])

    def _short(self, setting: str, number: int) -> dict[str, Any]:
        """Two short steps, of which the second counts; or the error."""
        batch = min(SEARCHED[self.case.kind], self.scale.batch(self.case))
        try:
            found = self._train(setting, batch, 2, self.folder / f"search{number}")
        except Exception as error:
            _say(f"{self.side} {self.name} {setting}: {error}")
            return {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        _say(f"{self.side} {self.name} {setting}: {batch / found['seconds_a_step']:.1f} pairs/s")
        return found

    def _train(self, setting: str, batch: int, steps: int, folder: Path, tell: Heard | None = None) -> dict[str, Any]:
        """Steps of a new trainer, from fresh weights.

        Args:
            tell: takes what is known after every step.
        """
        folder.mkdir()
        left = _start_peak(self.scale)
        trainer, facts = (self._ours if self.side == "ours" else self._peer)(setting, batch, steps, folder)
        clock = step_clock()

        def known() -> dict[str, Any]:
            done = len(clock.seconds)
            timed = slice(min(1, done - 1), done)
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            return {
                "setting": setting,
                "pairs": batch,
                "seconds_a_step": statistics.median(clock.seconds[timed]),
                "step_seconds": [round(one, 3) for one in clock.seconds],
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "peak_mb": _peak_mb(self.scale),
                "left_mb": left,
                "seconds_of_limit": round(self.spent * self.scale.limit, 1),
                "halved": [entry for entry in trainer.state.log_history if "chunk_tokens" in entry],
                **facts(timed),
                **self.known,
            }

        trainer.add_callback(clock)
        if tell is not None:
            trainer.add_callback(_progress(lambda: tell(known()), clock, lambda: (1 - self.spent) * self.scale.limit))
        trainer.train()
        return known()

    def _kept(self, precision: str, load: Callable[[], tuple[Any, Any]]) -> Any:
        """What `load` gives: (what stays, its module); loaded once a precision, its trained weights as at first."""
        if self.loaded[0] != precision:
            self.loaded = ("", None)  # before the next one takes memory
            _start_peak(self.scale)
            started = time.perf_counter()
            self.loaded = (precision, load())
            _say(f"{self.side} {self.name}: loaded {precision} in {time.perf_counter() - started:.1f} s")
            self.fresh = {name: one.detach().to("cpu", copy=True) for name, one in _trained(self.loaded[1][1])}
        kept, module = self.loaded[1]
        for name, one in _trained(module):
            one.grad = None
            one.data.copy_(self.fresh[name])
        return kept

    def _shared_arguments(self, batch: int, steps: int, folder: Path, autocast: bool) -> dict[str, Any]:
        return {
            "output_dir": str(folder / "out"),
            "per_device_train_batch_size": batch,
            "max_steps": steps,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "bf16": autocast,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            **({"use_cpu": True} if self.scale.device == "cpu" else {}),
        }

    def _pairs(self, batch: int, steps: int) -> list[tuple[str, Any]]:
        """Of all steps, in order: (question, passage) or (caption, encoded picture). Nothing comes twice."""
        if self.case.kind == "images":
            return list(pictures(batch * steps))
        return list(pairs(batch * steps))

    def _ours(
        self, setting: str, batch: int, steps: int, folder: Path
    ) -> tuple[Any, Callable[[slice], dict[str, Any]]]:
        """The trainer, and what tells of some of its steps."""
        tree = self._tree(setting, batch, steps, folder)
        from mmembed.config import build_config
        from mmembed.data.dataset import media_store
        from mmembed.models.embedding_model import build_embedding_model

        given = self._pairs(batch, steps)
        if self.case.kind == "images":
            for number, (caption, encoded) in enumerate(given):
                (folder / f"{number}.webp").write_bytes(encoded)
                given[number] = (caption, {"image": f"{number}.webp"})
        write_pairs(folder / "pairs.jsonl", given)
        config = build_config(tree)

        def load() -> tuple[Any, Any]:
            built = build_embedding_model(config, media_store(config.data))
            return built, built[0].to(self.scale.device)

        model, preprocessor = self._kept(tree["model"]["dtype"], load)
        preprocessor.media, preprocessor.features = media_store(config.data), None
        trainer = in_order(config, batch, str(folder), (model, preprocessor))
        return trainer, self._facts(trainer, tree)

    def _tree(self, setting: str, batch: int, steps: int, folder: Path) -> dict[str, Any]:
        """Our config."""
        precision, how, number = _parts(setting)
        precision, _, more = precision.partition("-")
        lora = {"type": "lora", "r": 16, "alpha": 32, "dropout": 0.0}
        images = self.case.kind == "images"
        prompt: dict[str, Any] = {"type": "plain", "mask_instruction": False}
        if self.case.kind == "instruction":
            prompt["query_prefix"] = INSTRUCTION
        if images:
            prompt = {"type": "chat", "mask_instruction": False, "add_generation_prompt": False}
        return {
            "model": {
                "name_or_path": str(self.weights),
                "dtype": "float32" if precision == "autocast" else "bfloat16",
                "freeze": ["vision", "projector"],
            },
            "adapter": lora if images else {"type": "none"},
            "pooling": "mean",
            "lengths": {"query_max_length": QUERY_LENGTHS[self.case.kind], "document_max_length": DOCUMENT_LENGTH},
            "prompt": prompt,
            "data": {"train": [{"path": str(folder / "pairs.jsonl")}], "train_group_size": 1},
            "objective": {"type": "contrastive", "temperature": TEMPERATURE, "mask_duplicates": False},
            "training": {
                **self._shared_arguments(batch, steps, folder, precision == "autocast"),
                "token_budget": number,
                "grad_cache": "auto" if how == "keep" else True,
                "vision_cache": str(folder / "features") if more == "features" else "off",
                "attention_kernel": "padded" if more == "padded" else "auto",
            },
        }

    def _facts(self, trainer: Any, tree: dict[str, Any]) -> Callable[[slice], dict[str, Any]]:
        """What some of the steps held, on average."""
        from mmembed.training.batch_report import count_visual

        model, preprocessor = trainer.model.model, trainer.preprocessor
        steps = []
        for draws in trainer.plan:
            batch = trainer.collator([trainer.train_dataset[draw] for draw in draws])
            rows = [row for chunk in batch.chunks for row in chunk.rows]
            visual = [4 * count_visual([row], preprocessor) for row in rows if row.images]  # patches: 2 x 2 a token
            trained = tree["adapter"]["type"] == "none"
            useful = _useful(model, [len(row) for row in rows], visual, trained)
            steps.append(
                {
                    "tokens": batch.tokens,
                    "padded_tokens": batch.padded_tokens,
                    "chunks": len(batch.chunks),
                    "useful_flops": useful - _of_tokens(model, batch.saved_tokens, trained),
                    "useful_flops_unshared": useful,
                }
            )

        def facts(timed: slice) -> dict[str, Any]:
            return {"tree": tree} | {name: statistics.mean(one[name] for one in steps[timed]) for name in steps[0]}

        return facts

    def _peer(
        self, setting: str, batch: int, steps: int, folder: Path
    ) -> tuple[Any, Callable[[slice], dict[str, Any]]]:
        import torch
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
        from torch import nn

        from mmembed.backbones.patch_conv import PatchConv3d

        precision, _, size = _parts(setting)
        precision, *more = precision.split("-")
        images = self.case.kind == "images"
        dtype = torch.float32 if precision == "autocast" else torch.bfloat16

        def load() -> tuple[Any, Any]:
            kind = "images" if images else "text"
            model = _peer_model(self.weights, kind, dtype, self.scale.device, DOCUMENT_LENGTH)
            if images:
                _add_lora(model)
            return model, model

        # accelerate wraps the forward of a model under autocast for good
        model = self._kept(precision if precision == "bf16" else f"{precision} {folder.name}", load)
        for module in model.modules():
            if isinstance(module, nn.Conv3d):
                module.__class__ = PatchConv3d if "products" in more else nn.Conv3d
        if "workers" in more:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not come along with a fork
        args = SentenceTransformerTrainingArguments(
            **self._shared_arguments(batch, steps, folder, precision == "autocast"),
            tf32=True if self.scale.device == "cuda" else None,
            report_to="none",
            batch_sampler=peer_in_order(),
            prompts={"anchor": INSTRUCTION} if self.case.kind == "instruction" else None,
            dataloader_num_workers=WORKERS if "workers" in more else 0,
        )
        loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=size)
        data = _peer_data(self._pairs(batch, steps), images)
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
        return trainer, lambda _: {}


def _trained(module: Any) -> Iterator[tuple[str, Any]]:
    return ((name, one) for name, one in module.named_parameters() if one.requires_grad)


def _progress(tell: Callable[[], None], clock: Any, left: Callable[[], float]) -> Any:
    """A callback that tells after every step, and begins none that takes longer than what is left."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _say(f"step of {clock.seconds[-1]:.2f} s, {left():.0f} s are left")
            if left() < clock.seconds[-1]:
                control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                tell()

    return Progress()


def _parts(setting: str) -> tuple[str, str, int]:
    """(precision, how, number) of a setting."""
    precision, _, rest = setting.partition(",")
    how, _, number = rest.partition("=")
    return precision, how, int(number)


def _peer_model(weights: Path, kind: str, dtype: Any, device: str, length: int) -> Any:
    """sentence-transformers on the same folder."""
    return mean_embedder(str(weights), pictures=kind != "text", length=length, dtype=dtype, device=device)


def _add_lora(model: Any) -> None:
    """Our adapter: every linear layer of the language tower, its weights in float32, all else frozen."""
    from peft import LoraConfig

    model.requires_grad_(False)
    linear = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    model.add_adapter(LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=linear))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _peer_data(given: Sequence[tuple[str, Any]], images: bool) -> Any:
    from datasets import Dataset, Features, Image, Value

    left, right = zip(*given, strict=True)
    if not images:
        return Dataset.from_dict({"anchor": list(left), "positive": list(right)})
    columns = {"anchor": list(left), "positive": [{"bytes": one, "path": None} for one in right]}
    return Dataset.from_dict(columns, features=Features({"anchor": Value("string"), "positive": Image(mode="RGB")}))


# Numbers --------------------------------------------------------------------------------------------------------------


def _start_peak(scale: Scale) -> int:
    """Frees what earlier runs of this process left, and counts from here. Returns what could not be freed, in MB."""
    import torch

    gc.collect()
    if scale.device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() // 2**20


def _peak_mb(scale: Scale) -> int:
    import torch

    return torch.cuda.max_memory_allocated() // 2**20 if scale.device == "cuda" else own_peak_mb()


def _useful(model: Any, lengths: Sequence[int], patches: Sequence[int], trained: bool) -> float:
    """Floating point operations of a step; see the head of this file.

    Args:
        model: an EmbeddingModel. lengths: tokens an input. patches: a picture's each.
        trained: whether the decoder's own weights take a gradient.
    """
    text = model.config
    attended = text.num_attention_heads * _head_dim(text) * text.num_hidden_layers
    found = _of_tokens(model, sum(lengths), trained) + 6.0 * attended * sum(length**2 for length in lengths)
    if patches:
        vision = model.family.config.vision_config
        weights = sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if model.parameter_towers()[name] in ("vision", "projector")
        )
        found += 2.0 * weights * sum(patches) + 4.0 * vision.depth * vision.embed_dim * sum(one**2 for one in patches)
    return found


def _of_tokens(model: Any, tokens: int, trained: bool) -> float:
    """Of the decoder's weights alone."""
    table = model.base.get_input_embeddings().weight
    towers = model.parameter_towers()
    weights = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if towers[name] == "language" and parameter is not table and "lora_" not in name
    )
    return (6.0 if trained else 4.0) * weights * tokens


def _head_dim(text: Any) -> int:
    return int(vars(text).get("head_dim") or text.hidden_size // text.num_attention_heads)


if __name__ == "__main__":
    main()
