"""Models as evaluation meets them: baselines, embedders and rerankers by the names users type, and their options."""

import argparse
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.files import digest_of_code
from eval.tasks.rows import RANKINGS, TaskRow
from mmembed.arguments import add_media_limits, add_vision_cache, media_limits_of, vision_cache_of
from mmembed.errors import ConfigError, nearest
from mmembed.media_limits import MediaLimits
from mmembed.packaged import FOLDERS, resolve

BASELINES = ("bm25", "minilm")
TEXT, PICTURES = ("text",), ("text", "image", "frames")
UNREAD = {"image": "pictures", "frames": "videos", "video": "video files", "audio": "sound"}


@dataclass(frozen=True)
class Loaded:
    """A model ready to be evaluated: what mteb runs, and what the results file says of it.

    Attributes:
        lacks: why it leaves a task out, in words; None: it does it.
        probe: encodes contents, or scores pairs, as in the run, to see how long that takes; None: what it costs does
            not count.
        sees: it reads pictures.
        reranks: it scores pairs, so it needs candidates: those of a reranking task, or of a first stage.
        first: the name of the model whose finds it orders; None: it has no such model.
    """

    name: str
    runner: Any
    provenance: dict[str, Any]
    lacks: Callable[[TaskRow], str | None]
    probe: Callable[[Sequence[Any]], Any] | None = None
    sees: bool = False
    reranks: bool = False
    first: str | None = None

    def supports(self, row: TaskRow) -> bool:
        return self.lacks(row) is None


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How models are loaded and what they are told; `load` reads them."""
    parser.add_argument(
        "--instructions",
        default="auto",
        choices=["auto", "always", "never"],
        help="whether the model is told each task's instruction (default: if its prompt style is not 'plain')",
    )
    parser.add_argument(
        "--instruction-file",
        type=Path,
        metavar="FILE",
        help="YAML or JSON: task or glob -> instruction (or {query:, document:}, or null for none)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights (default: bfloat16 where the device computes in it)",
    )
    parser.add_argument("--device", help="default: the first CUDA device, else the CPU")
    parser.add_argument("--token-budget", type=int, default=8192, help="padded tokens a batch (default: 8192)")
    parser.add_argument("--truncate-dim", type=int, help="of embedders: keep the first dimensions (Matryoshka)")
    parser.add_argument(
        "--layers", type=int, help="of embedders: compute the first decoder layers only (2-D Matryoshka)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="keep vectors and finished tasks there: tasks share vectors, a killed run goes on, a second run computes "
        "nothing anew",
    )
    parser.set_defaults(share=(0, 1), alone=lambda: False)  # `eval.workers`
    parser.add_argument("--cache-gb", type=float, metavar="GB", help="bound of that folder (default 20)")
    add_vision_cache(parser)
    add_media_limits(parser, "max_pixels_decoded")  # the pictures of the benchmark lie decoded in tables


def check_names(names: Sequence[str], flag: str = "--model") -> None:
    """Raises ConfigError for a name that is no baseline, no packaged model, no folder and no hub name."""
    for name in names:
        if is_hub_name(name) and name.count("/") != 1:
            raise ConfigError(
                f"{flag} {name}: neither a folder nor a known name; {nearest(name, (*BASELINES, *FOLDERS))}"
            )


def check_options(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises MmembedError where an option has no effect on any of the models."""
    vision_cache_of(options)
    if options.cache_gb is not None and (options.cache is None or not 0 < options.cache_gb < math.inf):
        raise ConfigError("--cache-gb: needs --cache FOLDER and a number above 0")
    if options.cache is not None and all(name == "bm25" or is_reranker(name) for name in names):
        raise ConfigError("--cache: keeps vectors, and no model here makes any; remove it")
    given = {
        "--vision-cache": options.vision_cache != "off",
        "--max-pixels-decoded": media_limits_of(options) != MediaLimits(),
    }
    for flag in (flag for flag, is_given in given.items() if is_given):
        if all(name in BASELINES for name in names):
            raise ConfigError(f"{flag}: no effect on baselines, which see no pictures; remove it")
    embedders = {
        "--vision-cache": options.vision_cache != "off",
        "--truncate-dim": options.truncate_dim is not None,
        "--layers": options.layers is not None,
    }
    for flag in (flag for flag, is_given in embedders.items() if is_given):
        if all(name in BASELINES or is_reranker(name) for name in names):
            raise ConfigError(f"{flag}: acts on embedders, and none is named; remove it")


def is_hub_name(name: str) -> bool:
    """Whether a model can only come from a hub: it is no folder, and neither packaged nor a baseline."""
    return name not in (*BASELINES, *FOLDERS) and not Path(name).is_dir()


def is_reranker(name: str) -> bool:
    """Whether a name is the folder of a trained reranker, of one that answers in words too."""
    from mmembed.models.folder import SETTINGS, read_settings, settle
    from mmembed.models.generator import is_generative

    folder = Path(resolve(name))
    if name in BASELINES or not folder.is_dir():
        return False
    settle(folder)
    return is_generative(folder) or ((folder / SETTINGS).is_file() and read_settings(folder)[0].head is not None)


def load(name: str, options: argparse.Namespace, task_names: Sequence[str]) -> Loaded:
    """Loads a model or a baseline.

    Args:
        options: those of `add_model_options`.
        task_names: the tasks of the run, which the lines of an instruction file have to match.
    """
    if name in BASELINES:
        return _load_baseline(name, options)
    return _load_reranker(name, options, task_names) if is_reranker(name) else _load_embedder(name, options, task_names)


def open_embedder(name: str, options: argparse.Namespace) -> Any:
    """An `mmembed.Embedder` as `add_model_options` ask for it. Raises ConfigError naming the model."""
    from mmembed import Embedder
    from mmembed.media import MediaStore

    _quiet()
    try:
        return Embedder.from_pretrained(
            name,
            device=options.device,
            dtype=options.dtype,
            media=MediaStore(limits=media_limits_of(options)),
            layers=options.layers,
            **vision_cache_of(options),
        )
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _load_baseline(name: str, options: argparse.Namespace) -> Loaded:
    from eval.baselines import BM25, MiniLM
    from eval.mteb_adapter import MtebEncoder

    if name == "bm25":
        bm25 = BM25()
        return Loaded(name, bm25, {"kind": "baseline", **bm25.settings}, READS[name])
    minilm = MiniLM(options.dtype, options.device)
    runner = MtebEncoder(cached(minilm, options, minilm.settings), name, modalities=["text"])
    probe = functools.partial(minilm.encode, role="document", instruction=None)
    return Loaded(name, runner, {"kind": "baseline", **minilm.settings}, READS[name], probe)


def _load_embedder(name: str, options: argparse.Namespace, task_names: Sequence[str]) -> Loaded:
    from eval.mteb_adapter import MtebEncoder

    embedder = open_embedder(name, options)
    instructions, told = _instructions(options, _prompt(embedder.preprocessor), task_names)
    sees, multi_vector = embedder.preprocessor.family.multimodal, embedder.model.pooling.multi_vector
    settings = {"token_budget": options.token_budget, "truncate_dim": options.truncate_dim}
    origin, inputs = _origin(name, embedder.model), _inputs(options, embedder)
    made_by = {key: origin[key] for key in ("fingerprint", "dtype", "device")} | inputs
    made_by |= {"layers": options.layers, "truncate_dim": options.truncate_dim, "prompt": told["prompt"]}
    bound = Bound(functools.partial(embedder.encode, **settings), embedder.similarity)
    runner = MtebEncoder(
        cached(bound, options, made_by), file_name(name), modalities=_modalities(sees), instructions=instructions
    )
    provenance = {
        "kind": "mmembed", **origin, **inputs,
        "embedding_size": embedder.embedding_size, "multi_vector": multi_vector, "layers": options.layers, **settings,
        **told,
    }  # fmt: skip

    def lacks(row: TaskRow) -> str | None:
        return unread(row, sees) or (ranks_alone(row) if multi_vector else None)

    probe = functools.partial(bound.encode, role="document", instruction=None)
    return Loaded(name, runner, provenance, lacks, probe, sees)


def _load_reranker(name: str, options: argparse.Namespace, task_names: Sequence[str]) -> Loaded:
    from eval.mteb_adapter import MtebReranker
    from mmembed import Reranker
    from mmembed.media import MediaStore
    from mmembed.models.generator import is_generative

    _quiet()
    if is_generative(name):
        return _load_listwise(name, options, task_names)
    reranker = Reranker.from_pretrained(
        name, device=options.device, dtype=options.dtype, media=MediaStore(limits=media_limits_of(options))
    )
    instructions, told = _instructions(options, _prompt(reranker.preprocessor), task_names)
    sees = reranker.preprocessor.family.multimodal
    score = functools.partial(reranker.score, scale="logit", token_budget=options.token_budget)
    runner = MtebReranker(score, file_name(name), modalities=_modalities(sees), instructions=instructions)
    provenance = {
        "kind": "reranker", **_origin(name, reranker.model), **_inputs(options, reranker),
        "head": (reranker.model.settings.head or {}).get("type"), "reads_lists": reranker.reads_lists,
        "calibrated": not reranker.reads_lists, "scores": True, "token_budget": options.token_budget, **told,
    }  # fmt: skip

    def lacks(row: TaskRow) -> str | None:
        if reranker.reads_lists and set("iv") & set(row.category.split("2")[0]):
            return "it reads no pictures in queries"
        return unread(row, sees) or ranks_alone(row)

    return Loaded(name, runner, provenance, lacks, functools.partial(score, instruction=None), sees, reranks=True)


def _load_listwise(name: str, options: argparse.Namespace, task_names: Sequence[str]) -> Loaded:
    """A reranker that writes orders: scores are places, which compare within a query alone."""
    from eval.mteb_adapter import MtebReranker, Orders
    from mmembed import ListwiseReranker
    from mmembed.media import MediaStore

    reranker = ListwiseReranker.from_pretrained(
        name, device=options.device, dtype=None if options.dtype == "auto" else options.dtype,
        media=MediaStore(limits=media_limits_of(options)),
    )  # fmt: skip
    instructions, told = _instructions(options, "listwise", task_names)
    sees = reranker.generator.family.multimodal
    orders = Orders(reranker.rank_all)
    runner = MtebReranker(orders, file_name(name), modalities=_modalities(sees), instructions=instructions)
    provenance = {
        "kind": "reranker", **_origin(name, reranker.generator.model), "answer": reranker.generator.settings.answer,
        "reads_lists": True, "calibrated": False, "scores": False, **told,
    }  # fmt: skip

    def lacks(row: TaskRow) -> str | None:
        return unread(row, sees) or ranks_alone(row)

    return Loaded(name, runner, provenance, lacks, functools.partial(orders, instruction=None), sees, reranks=True)


@dataclass(frozen=True)
class Bound:
    """An embedder with its encoding options filled in."""

    encode: Callable[..., Any]
    similarity: Callable[[Any, Any], Any]


def cached(embedder: Any, options: argparse.Namespace, made_by: Mapping[str, Any]) -> Any:
    """The embedder, with `--cache` one that keeps its vectors."""
    if options.cache is None:
        return embedder
    from eval.embedding_cache import Caching
    from mmembed.version import __version__

    limit, about = int((options.cache_gb or 20) * 1e9), {**made_by, "mmembed": __version__, "code": code_digest()}
    return Caching(embedder, options.cache, limit, about, options.share, options.alone)


@functools.cache
def code_digest() -> str:
    """Of the code that encodes."""
    return digest_of_code(("mmembed", "eval/baselines.py"))


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _instructions(options: argparse.Namespace, prompt: str, task_names: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """What a model is told, and the results file's account of it."""
    from eval.mteb_adapter import Instructions

    told = options.instructions == "always" or (options.instructions == "auto" and prompt != "plain")
    instructions = Instructions(use_tasks=told)
    if options.instruction_file:
        instructions = Instructions.read(options.instruction_file, task_names, told)
    overrides = dict(instructions.overrides)
    return instructions, {"prompt": prompt, "task_instructions": told, "instruction_overrides": overrides}


def _prompt(preprocessor: Any) -> str:
    return str(vars(type(preprocessor.prompt))["name"])


def _inputs(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What a model's inputs are made with: its prompt, the lengths in tokens, the sizes of pictures in pixels."""
    preprocessor = model.preprocessor
    sees = preprocessor.family.multimodal
    sides = dict(preprocessor.processor.image_processor.size) if sees else {}
    size = {key: value for key, value in sides.items() if value is not None} or None
    return {"prompt_settings": model.model.settings.prompt, **asdict(preprocessor.limits), "image_size": size,
            "max_pixels_decoded": media_limits_of(options).max_pixels_decoded}  # fmt: skip


def _origin(name: str, model: Any) -> dict[str, Any]:
    weights, folder = next(model.parameters()), Path(resolve(name))
    return {
        "path": name, "dtype": str(weights.dtype).removeprefix("torch."), "device": str(weights.device),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fingerprint": model_fingerprint(folder) if folder.is_dir() else weights_fingerprint(model),
    }  # fmt: skip


def _modalities(sees: bool) -> list[str]:
    return ["text", "image", "video"] if sees else ["text"]


def model_fingerprint(folder: Path) -> str:
    """A digest of a checkpoint folder's files, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def weights_fingerprint(model: Any) -> str:
    """A digest of the tensors of a model that came from a hub, 16 hexadecimal digits."""
    from mmembed.quantize import to_array

    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode() + to_array(tensor.contiguous()).tobytes())
    return digest.hexdigest()[:16]


def file_name(model: str) -> str:
    """A model's name as a file name: `runs/demo/embedder` -> `runs-demo-embedder`."""
    return model.strip("/.").replace("/", "-")


def unread(row: TaskRow, sees: bool) -> str | None:
    """What a task holds that a model does not read."""
    missing = [name for name in row.modalities if name not in (PICTURES if sees else TEXT)]
    return f"it reads no {UNREAD[missing[0]]}" if missing else None


def ranks_alone(row: TaskRow) -> str | None:
    return None if row.kind in RANKINGS else "it does rankings alone"


def searches_text(row: TaskRow) -> str | None:
    return unread(row, False) or ranks_alone(row)


def reads_text(row: TaskRow) -> str | None:
    return unread(row, False)


READS = {"bm25": searches_text, "minilm": reads_text}
