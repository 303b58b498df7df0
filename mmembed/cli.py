"""The command `mmembed`: encode, search, rerank, explore, plan, export, verify, inspect, fuse, serve.

Everything heavy is imported by the command that needs it, after the arguments were read, so that `mmembed --help` and a
misspelt flag answer at once. Results go to stdout, progress and errors to stderr; an error ends with exit code 2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmembed.arguments import Parser, add_vision_cache, media_limits_of
from mmembed.commands import encode, export, fuse, serve, verify
from mmembed.commands.common import (
    add_command,
    add_model,
    add_on_bad_record,
    load_embedder,
    portable,
    report,
)
from mmembed.errors import MmembedError
from mmembed.media_limits import MediaLimits
from mmembed.packaged import NANO, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmembed.inference.embedder import Embedder
    from mmembed.inference.reranker import Reranker
    from mmembed.inference.reranking import Question
    from mmembed.inference.sources import Entry

DEPTH = 50  # hits that a reranker orders


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser, commands = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        commands[arguments.command].refuse(unknown)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except MmembedError as error:
        print(f"mmembed {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `mmembed search ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and the parser of each command."""
    from mmembed import __version__

    parser = Parser(
        prog="mmembed",
        description="Embeds texts and images with a decoder LLM, searches and reranks them.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mmembed {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    commands = {}
    for add in (
        encode.add,
        _add_search,
        _add_rerank,
        _add_explore,
        _add_plan,
        export.add,
        verify.add,
        _add_inspect,
        fuse.add,
        serve.add,
    ):
        command = add(subparsers)
        commands[command.prog.split()[-1]] = command
    return parser, commands


# search -------------------------------------------------------------------------------------------------------------


def _add_search(subparsers: Any) -> Parser:
    command = add_command(
        subparsers,
        "search",
        _search,
        help="find what is most similar to a text or an image",
        description="""\
            Searches an encoded folder exactly, or encodes a folder of images or a JSONL file first. With --rerank in
            two stages: the embedder finds, the reranker orders what was found.

              mmembed search photos.enc "a red bus"
              mmembed search photos/ --image bus.jpg --top-k 5 --json
              mmembed search photos.enc "a red bus" --rerank runs/reranker --rerank-depth 100""",
    )
    command.add_argument(
        "target", type=Path, help="folder written by `mmembed encode`, folder of images, or .jsonl file"
    )
    command.add_argument("text", nargs="?", help="query text")
    command.add_argument("--image", help="query image, alone or together with the text")
    command.add_argument("--queries", type=Path, help=".jsonl file of many queries")
    command.add_argument("--top-k", type=int, default=10, help="how many hits a query (default 10)")
    command.add_argument("--rerank", metavar="PATH", help="order the hits with this reranker; scores are then its own")
    command.add_argument(
        "--rerank-depth",
        type=int,
        metavar="N",
        help=f"hits of the embedder that the reranker orders (default {DEPTH}, or --top-k where that is more)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_model(command, None)
    add_vision_cache(command)
    command.add_argument("--instruction", help="instruction of the query, for the embedder and the reranker")
    add_on_bad_record(command)
    return command


def _search(arguments: argparse.Namespace) -> int:
    from mmembed.inference.encoding import ENCODING, check_model, encode_entries, open_collection, read_items, usable
    from mmembed.inference.sources import read_entries
    from mmembed.search import top_k

    encoded = (arguments.target / ENCODING).is_file()
    if encoded:
        _refuse_without_entries(arguments)
    depth, queries = _depth(arguments), _queries(arguments)
    reranker = (
        None if arguments.rerank is None else _load_reranker(arguments, arguments.rerank, _document_root(arguments))
    )
    found: dict[int, dict[str, Any]] | None = None
    truncate_dim = None
    if encoded:
        encoding, vectors = open_collection(arguments.target)
        truncate_dim = encoding.truncate_dim
        embedder = load_embedder(arguments, arguments.model or encoding.model, encoding.layers)
        check_model(embedder, encoding, arguments.target, portable(arguments.model or encoding.model))
        size: int | None = encoding.size
    else:
        entries = list(usable(read_entries(arguments.target), arguments.on_bad_record, report))
        embedder = load_embedder(arguments, arguments.model or NANO)
        kept, vectors = encode_entries(embedder, entries, arguments.on_bad_record, report)
        found, size = {row: entry.item() for row, entry in enumerate(kept)}, None
    # Media of --image lie anywhere, those of files below their folder.
    root = (arguments.media_root or arguments.queries.parent) if arguments.queries else None
    embedder = _load_media(embedder, root, media_limits_of(arguments))
    queries, asked = encode_entries(
        embedder,
        queries,
        arguments.on_bad_record if arguments.queries else "raise",
        report,
        role="query",
        instruction=arguments.instruction,
        truncate_dim=truncate_dim,
        show_progress=False,
    )
    hits = top_k(asked, vectors, depth, dim=size)
    if found is None:
        found = read_items(arguments.target, set(hits.indices.ravel().tolist()))
    ranked = [
        [
            {"rank": rank, "score": round(float(score), 6), **found[int(row)]}
            for rank, (score, row) in enumerate(zip(scores, rows, strict=True), start=1)
        ]
        for scores, rows in zip(hits.scores, hits.indices, strict=True)
    ]
    if reranker is not None:
        ranked = _second_stage(arguments, reranker, embedder, queries, ranked)
    results = [{"query": query.summary(), "hits": hits} for query, hits in zip(queries, ranked, strict=True)]
    if arguments.json:
        print(json.dumps({"results": results}, ensure_ascii=False))
    else:
        _print_results(results)
    return 0


def _depth(arguments: argparse.Namespace) -> int:
    """How many hits the embedder finds."""
    wanted, top_k = arguments.rerank_depth, int(arguments.top_k)
    if arguments.rerank is None:
        if wanted is not None:
            raise MmembedError("--rerank-depth: no effect without --rerank; give a reranker, or remove it")
        return top_k
    if wanted is not None and wanted < top_k:
        raise MmembedError(f"--rerank-depth: found {wanted}, below --top-k {top_k}; give at least as many")
    return max(DEPTH, top_k) if wanted is None else int(wanted)


def _document_root(arguments: argparse.Namespace) -> Path | None:
    """The folder that images of documents start from: of an encoded folder the one that it remembers."""
    from mmembed.inference.encoding import ENCODING, has_pictures, read_encoding
    from mmembed.inference.sources import media_root

    if arguments.media_root is not None:
        return Path(arguments.media_root)
    if not (arguments.target / ENCODING).is_file():
        return media_root(arguments.target)
    remembered = read_encoding(arguments.target).media_root
    if remembered is None:
        if has_pictures(arguments.target):
            raise MmembedError(
                f"{arguments.target}: does not say where its images lie (an older mmembed encoded it), and they are "
                "opened here; give --media-root FOLDER"
            )
        return Path(arguments.target)
    return Path(remembered)


def _second_stage(
    arguments: argparse.Namespace,
    reranker: Reranker,
    embedder: Embedder,
    queries: Sequence[Entry],
    hits: list[list[dict[str, Any]]],
) -> list[list[dict[str, Any]]]:
    from mmembed.inference.reranking import rerank_hits, with_bytes

    return rerank_hits(
        reranker,
        [with_bytes(query, embedder.preprocessor.media) for query in queries],
        hits,
        top_k=arguments.top_k,
        instruction=arguments.instruction,
        on_bad=arguments.on_bad_record,
        report=report,
    )


def _refuse_without_entries(arguments: argparse.Namespace) -> None:
    """Options that concern entries, where neither a collection nor a file of queries is read, nor is reranked."""
    if arguments.queries is not None:
        return
    encoded = f"no effect on {arguments.target}, which is encoded already"
    for flag, given in (
        ("--media-root", arguments.media_root),
        ("--on-bad-record skip", arguments.on_bad_record == "skip"),
    ):
        if given and arguments.rerank is None:
            raise MmembedError(f"{flag}: {encoded}, and on a single query; remove it")
    usual = MediaLimits()
    limits = [f"--{key.replace('_', '-')}" for key, value in vars(usual).items() if vars(arguments)[key] != value]
    opened = ["--vision-cache"] if arguments.vision_cache != "off" else []
    for flag in opened if arguments.rerank is not None else opened + limits:  # a reranker opens the images of hits
        if arguments.image is None:
            raise MmembedError(f"{flag}: {encoded}, and on a query without an image; remove it")


def _queries(arguments: argparse.Namespace) -> list[Entry]:
    from mmembed.inference.encoding import usable
    from mmembed.inference.sources import read_entries

    alone = arguments.text is not None or arguments.image is not None
    if alone == (arguments.queries is not None):
        raise MmembedError("query: give a text, --image, both, or --queries FILE alone")
    if arguments.queries is not None:
        queries = list(usable(read_entries(arguments.queries, "query"), arguments.on_bad_record, report))
        if not queries:
            raise MmembedError(f"{arguments.queries}: holds no usable query; correct the lines")
        return queries
    return [_query_of(arguments)]


def _query_of(arguments: argparse.Namespace) -> Entry:
    """The query of the command line."""
    from mmembed.inference.sources import Entry

    parts = {"image": arguments.image, "text": arguments.text}
    content = {key: value for key, value in parts.items() if value is not None}
    return Entry("query", content, "query", named=False)


def _print_results(results: list[dict[str, Any]]) -> None:
    width = shutil.get_terminal_size((120, 24)).columns
    for number, result in enumerate(results):
        print(("\n" if number else "") + f"query: {_line(result['query'], width - 7)}")
        reranked = any("first_rank" in hit for hit in result["hits"])
        room = max(20, width - (50 if reranked else 45))
        print(f"{'rank':>4}  {'score':>7}  {'was  ' if reranked else ''}{'id':<28}  content")
        for hit in result["hits"]:
            name = textwrap.shorten(hit["id"], 28, placeholder="…") if " " in hit["id"] else hit["id"][:28]
            was = f"{hit['first_rank']:>3}  " if reranked else ""
            print(f"{hit['rank']:>4}  {hit['score']:>7.4f}  {was}{name:<28}  {_line(hit, room)}")


def _line(content: dict[str, Any], width: int) -> str:
    """Text and image of an item on one line."""
    pieces = [f"[{one}]" for one in [content.get("image"), *content.get("images", [])] if one]
    pieces += [" ".join(content["text"].split())] if content.get("text") else []
    line = " ".join(pieces)
    return line if len(line) <= width else line[: width - 1] + "…"


# rerank -------------------------------------------------------------------------------------------------------------


def _add_rerank(subparsers: Any) -> Parser:
    command = add_command(
        subparsers,
        "rerank",
        _rerank,
        help="order the candidates of queries with a reranker",
        description="""\
            Reads JSON lines of queries with their candidates, and writes a line each with the candidates best first:
            {"query": ..., "documents": [{"rank": 1, "score": .93, "index": 2, "content": ...}, ...]}.

            A line is {"query": ..., "documents": [...]}: texts, {"text": ..., "image": ..., "id": ...}, or a canonical
            training record. With a query on the command line the source is what `mmembed encode` reads, a folder of
            images or a JSONL file, and all of it is ordered.

              mmembed rerank candidates.jsonl --model runs/reranker --output ranked.jsonl
              mmembed rerank photos/ "a red bus" --model runs/reranker --top-k 5""",
    )
    command.add_argument("source", type=Path, help=".jsonl file of queries with candidates; of candidates with a query")
    command.add_argument("text", nargs="?", help="query text: orders all of the source")
    command.add_argument("--image", help="query image, alone or together with the text")
    command.add_argument("--output", type=Path, help=".jsonl file to write (default: stdout)")
    command.add_argument("--overwrite", action="store_true", help="replace that file")
    command.add_argument("--top-k", type=int, help="documents of each query that are written (default: all)")
    command.add_argument("--instruction", help="instruction of queries without their own (default: the prompt's)")
    command.add_argument(
        "--scale",
        choices=("probability", "logit"),
        default="probability",
        help="of the scores: the probability of being relevant (default), or the logit behind it",
    )
    add_model(command, None, required=True, help="folder of a reranker")
    command.add_argument("--token-budget", type=int, help="padded tokens in a batch (default by device)")
    add_on_bad_record(command)
    return command


def _rerank(arguments: argparse.Namespace) -> int:
    from mmembed.inference.reranking import rerank
    from mmembed.inference.sources import count_entries, media_root
    from mmembed.staging import staging

    if arguments.top_k is not None and arguments.top_k < 1:
        raise MmembedError(f"--top-k: found {arguments.top_k}; give at least 1")
    output = arguments.output
    if output is None and arguments.overwrite:
        raise MmembedError("--overwrite: no effect without --output; remove it")
    if output is not None and output.exists() and not (arguments.overwrite and output.is_file()):
        raise MmembedError(f"{output}: exists already; choose another file, or --overwrite a file")
    asked = arguments.text is not None or arguments.image is not None
    if not asked and arguments.source.is_dir():
        raise MmembedError(f"{arguments.source}: a folder holds no queries; give a query text or --image as well")
    root = arguments.media_root or media_root(arguments.source)
    questions = _one_question(arguments) if asked else _questions(arguments)
    first = next(questions, None)
    if first is None:
        raise MmembedError(f"{arguments.source}: holds no usable record; correct the lines")
    answers = rerank(
        _load_reranker(arguments, arguments.model, root),
        itertools.chain([first], questions),
        top_k=arguments.top_k,
        instruction=arguments.instruction,
        scale=arguments.scale,
        token_budget=arguments.token_budget,
        on_bad=arguments.on_bad_record,
        report=report,
    )
    lines = (json.dumps(answer.as_json(), ensure_ascii=False) + "\n" for answer in answers)
    if output is None:
        sys.stdout.writelines(lines)
        return 0
    with (
        staging(output) as staged,
        staged.open("w", encoding="utf-8") as file,
        _progress("rerank", 1 if asked else count_entries(arguments.source, "query")) as advance,
    ):
        count = 0
        for line in lines:
            file.write(line)
            count += 1
            advance(1)
        file.flush()
        os.replace(staged, output)
    print(f"{output}: {count} queries reranked")
    return 0


def _questions(arguments: argparse.Namespace) -> Iterator[Question]:
    """The usable records of the source."""
    from mmembed.errors import RecordError
    from mmembed.inference.reranking import read_questions

    for one in read_questions(arguments.source):
        if not isinstance(one, RecordError):
            yield one
        elif arguments.on_bad_record == "raise":
            raise one
        else:
            report(one)


def _one_question(arguments: argparse.Namespace) -> Iterator[Question]:
    """The query of the command line, with all of the source."""
    from mmembed.inference.encoding import usable
    from mmembed.inference.reranking import Question, with_bytes
    from mmembed.inference.sources import read_entries
    from mmembed.media import MediaStore

    documents = tuple(usable(read_entries(arguments.source), arguments.on_bad_record, report))
    if documents:
        query = _query_of(arguments)
        opened = with_bytes(query, MediaStore(None, media_limits_of(arguments)))
        yield Question(opened, documents, (None,) * len(documents), query.content)


# explore ------------------------------------------------------------------------------------------------------------


def _add_explore(subparsers: Any) -> Parser:
    command = add_command(
        subparsers,
        "explore",
        _explore,
        help="look at what a model finds, on a page in the browser",
        description="""\
            Opens a page on this machine to ask for a text or an image, see what one or two models find, what a reranker
            makes of it, and where it lies on a map of the collection. A folder of images or a JSONL file is encoded
            first; of an encoded folder the second model encodes the documents. Needs pip install 'mmembed[explore]'.

              mmembed explore photos.enc
              mmembed explore corpus.jsonl --model mmembed-nano runs/demo/embedder
              mmembed explore photos.enc --rerank runs/reranker --port 8000""",
    )
    command.add_argument(
        "target", type=Path, help="folder written by `mmembed encode`, folder of images, or .jsonl file"
    )
    command.add_argument("--rerank", metavar="PATH", help="order the hits with this reranker, and show what moved")
    command.add_argument(
        "--depth",
        type=int,
        metavar="N",
        help=f"hits of a model that the reranker orders, or that ranks are compared over (default {DEPTH})",
    )
    command.add_argument("--top-k", type=int, default=10, help="how many hits the page shows at first (default 10)")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    command.add_argument("--port", type=int, default=7860, help="default 7860; 0 takes one that is free")
    add_model(
        command,
        None,
        nargs="+",
        metavar="MODEL",
        help="one or two checkpoint folders or backbones (default the one the folder was encoded with, else the nano)",
    )
    add_vision_cache(command)
    add_on_bad_record(command)
    return command


def _explore(arguments: argparse.Namespace) -> int:
    import tempfile

    models = _explored(arguments)
    port = _free_port(arguments.host, arguments.port)
    with tempfile.TemporaryDirectory(prefix="mmembed-explore-") as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}  # read when it is imported
        for name in ("NO_PROXY", "no_proxy"):  # Gradio asks its own page whether it is there
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost", arguments.host)))
        _open_page(arguments, models, port)
    return 0


def _open_page(arguments: argparse.Namespace, models: list[str], port: int) -> None:
    """Loads everything, and shows the page until it is interrupted."""
    try:
        from mmembed.explore.page import serve
    except ModuleNotFoundError as error:
        raise MmembedError(f"a package is missing ({error.name}); pip install 'mmembed[explore]'") from None
    from mmembed.explore.comparison import Explorer
    from mmembed.explore.sides import open_folder, open_source
    from mmembed.inference.encoding import ENCODING
    from mmembed.media import MediaStore

    limits, root = media_limits_of(arguments), _document_root(arguments)

    def load(model: str, layers: int | None) -> Embedder:
        return _load_media(load_embedder(arguments, model, layers), root, limits)

    reranker = None
    if arguments.rerank is not None:
        reranker = (Path(arguments.rerank).name, _load_reranker(arguments, arguments.rerank, root))
    if (arguments.target / ENCODING).is_file():
        documents = open_folder(arguments.target, models, load, report)
    else:
        documents = open_source(arguments.target, models or [NANO], load, report, arguments.on_bad_record)
    explorer = Explorer(
        documents,
        media=MediaStore(None, limits),
        depth=arguments.depth or DEPTH,
        reranker=reranker,
        on_bad=arguments.on_bad_record,
        report=report,
    )
    serve(
        explorer,
        MediaStore(root, limits),
        str(arguments.target),
        host=arguments.host,
        port=port,
        top_k=arguments.top_k,
        ready=lambda address: print(f"{address} shows {arguments.target}; Ctrl-C ends it", flush=True),
    )


def _explored(arguments: argparse.Namespace) -> list[str]:
    """The models that were asked for, after the options were judged."""
    from mmembed.inference.encoding import ENCODING

    models = [portable(model) for model in arguments.model or []]
    if len(models) > 2 or len(set(models)) < len(models):
        raise MmembedError(f"--model: found {' '.join(arguments.model)}; give one model, or two different ones")
    if arguments.top_k < 1:
        raise MmembedError(f"--top-k: found {arguments.top_k}; give at least 1")
    if arguments.depth is not None:
        if len(models) < 2 and arguments.rerank is None:
            raise MmembedError("--depth: no effect without --rerank or a second --model; give one, or remove it")
        if arguments.depth < arguments.top_k:
            raise MmembedError(
                f"--depth: found {arguments.depth}, below --top-k {arguments.top_k}; give at least as many"
            )
    encoded = (arguments.target / ENCODING).is_file()
    if encoded and arguments.on_bad_record == "skip" and arguments.rerank is None:
        raise MmembedError(
            f"--on-bad-record skip: no effect on {arguments.target}, which is encoded already; remove it"
        )
    return models


def _free_port(host: str, port: int) -> int:
    """The port, or one that is free for 0. Raises MmembedError unless a server can listen there, before models load."""
    import socket

    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise MmembedError(f"--port {port}: cannot listen on {host} ({error}); give another --port") from error


# plan ---------------------------------------------------------------------------------------------------------------


def _add_plan(subparsers: Any) -> Parser:
    command = add_command(
        subparsers,
        "plan",
        _plan,
        help="say what a training run will need, without a GPU and without weights",
        description="""\
            Says what a training run will need, of an embedder or a reranker: parameters, negatives, tokens, memory a
            device by strategy, steps, time. Reads the config, the data, and config.json and processor of the backbone.

              mmembed plan --config run.yaml --devices 8 --memory 80GB training.token_budget=32768""",
    )
    command.add_argument("--config", required=True, type=Path, help="YAML file of the run")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    command.add_argument("--devices", type=int, default=1, help="processes that train together (default 1)")
    command.add_argument(
        "--memory", help="of a device, with its unit, for example 80GB: says what does not fit and what would"
    )
    speed = command.add_mutually_exclusive_group()
    speed.add_argument("--throughput", type=float, help="tokens a second and device, for the time")
    speed.add_argument("--measure", type=int, metavar="STEPS", help="train so many steps here for the throughput")
    command.add_argument("--sample", type=int, default=8, help="batches that are tokenized (default 8)")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    return command


def _plan(arguments: argparse.Namespace) -> int:
    for flag in ("devices", "throughput", "measure", "sample"):
        value = vars(arguments)[flag]
        if value is not None and value <= 0:
            raise MmembedError(f"--{flag}: found {value}; give a number above 0")
    from mmembed.plan import as_json, load_run, plan_run, read_size, render

    memory = None if arguments.memory is None else read_size(arguments.memory)
    plan = plan_run(
        load_run(arguments.config, arguments.overrides),
        arguments.devices,
        memory,
        arguments.throughput,
        arguments.measure,
        arguments.sample,
    )
    print(json.dumps(as_json(plan)) if arguments.json else render(plan))
    return 0


# inspect ------------------------------------------------------------------------------------------------------------


def _add_inspect(subparsers: Any) -> Parser:
    command = add_command(
        subparsers,
        "inspect",
        _inspect,
        help="show what a checkpoint says of itself",
        description="Shows mmembed.json and the sizes of the weight files, without loading the model.",
    )
    command.add_argument("checkpoint", help="folder of a saved embedder or reranker, or mmembed-nano")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    return command


def _inspect(arguments: argparse.Namespace) -> int:
    folder = Path(resolve(arguments.checkpoint))
    described = folder / "mmembed.json"
    if not described.is_file():
        bare = (folder / "config.json").is_file()
        found = (
            "a bare backbone, it has no mmembed.json; Embedder.from_pretrained loads it with mean pooling"
            if bare
            else ("there is no mmembed.json; give a folder that Embedder.save or training has written")
        )
        raise MmembedError(f"{arguments.checkpoint}: {found}")
    try:
        settings = json.loads(described.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MmembedError(f"{described}: not valid JSON ({error}); restore it from another copy") from error
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != "probes.safetensors"]
    weights = {file.name: _tensors(file) for file in files}
    if arguments.json:
        print(json.dumps({"mmembed.json": settings, "weights": weights}, ensure_ascii=False))
        return 0
    for key, value in _flat(settings):
        print(f"{key:<34}  {value}")
    for name, weight in weights.items():
        size = f"{weight['parameters']:,} parameters in {weight['tensors']} tensors, {weight['bytes']:,} bytes"
        print(f"{name:<34}  {size}, {', '.join(weight['dtypes'])}")
    return 0


def _tensors(file: Path) -> dict[str, Any]:
    """What the header of a safetensors file says: an 8-byte length, then JSON."""
    try:
        with file.open("rb") as content:
            header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    except (ValueError, OverflowError, MemoryError) as error:
        raise MmembedError(f"{file}: not a safetensors file ({error}); restore it from another copy") from error
    tensors = [value for name, value in header.items() if name != "__metadata__"]
    parameters = 0
    for tensor in tensors:
        count = 1
        for size in tensor["shape"]:
            count *= size
        parameters += count
    return {
        "tensors": len(tensors),
        "parameters": parameters,
        "dtypes": sorted({tensor["dtype"] for tensor in tensors}),
        "bytes": file.stat().st_size,
    }


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)


# Shared ---------------------------------------------------------------------------------------------------------------


def _load_reranker(arguments: argparse.Namespace, path: str, root: Path | None) -> Reranker:
    """The reranker, its media confined to the folder of the documents."""
    from transformers.utils.logging import disable_progress_bar

    from mmembed.inference.reranker import Reranker
    from mmembed.media import MediaStore

    disable_progress_bar()
    return Reranker.from_pretrained(
        path,
        device=arguments.device,
        dtype=arguments.dtype,
        media=MediaStore(root, media_limits_of(arguments)),
        trust_remote_code=arguments.trust_remote_code,
    )


def _load_media(embedder: Embedder, root: Path | None, limits: MediaLimits) -> Embedder:
    from mmembed.media import MediaStore

    embedder.preprocessor.media = MediaStore(root, limits)
    return embedder


@contextmanager
def _progress(name: str, total: int | None) -> Iterator[Callable[[int], Any]]:
    """A bar on stderr with rate and time left, in a terminal."""
    from tqdm.auto import tqdm

    with tqdm(desc=name, total=total, unit=" entries", disable=None, file=sys.stderr) as bar:
        yield bar.update
