"""`mmembed serve`: a model behind OpenAI's API of embeddings, and a reranker behind `/rerank`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from mmembed.arguments import Parser, add_media_limits, media_limits_of
from mmembed.commands.common import add_command, add_trust
from mmembed.errors import ConfigError, MmembedError
from mmembed.media_limits import MediaLimits
from mmembed.packaged import NANO

KEY_VARIABLE = "MMEMBED_API_KEY"
DTYPES = ("auto", "float32", "bfloat16", "float16")
PICTURES = MediaLimits(20_000_000, 20_000_000)  # of strangers: smaller than what a file of one's own may be
LIMITS = {  # flag of an option -> what it bounds; the default and its meaning are ServeLimits'
    "max-body-bytes": ("body_bytes", int, "bytes of a request (default 32,000,000)"),
    "max-inputs": ("inputs", int, "inputs of a request, or documents of a reranking (default 256)"),
    "max-characters": ("characters", int, "characters of an input (default 100,000)"),
    "max-images": ("images", int, "pictures of a request (default 64)"),
    "max-image-pixels": ("image_pixels", int, "pixels of all pictures of a request (default 100,000,000)"),
    "max-waiting": ("waiting_inputs", int, "inputs that may wait for the model; more get 429 (default 1024)"),
    "max-open-bytes": ("open_bytes", int, "bytes of all open requests; more get 429 (default 256,000,000)"),
    "max-connections": ("connections", int, "open connections; more get 503 (default 512)"),
    "timeout": ("seconds", float, "seconds for an answer, then 504; also for open ones at the end (default 60)"),
    "upload-timeout": ("upload_seconds", float, "seconds for a body to arrive, then 408 (default 30)"),
}


def add(subparsers: Any) -> Parser:
    command = add_command(
        subparsers,
        "serve",
        run,
        help="answer OpenAI's /v1/embeddings, and /rerank, over HTTP",
        description=f"""\
            Serves an embedder at /v1/embeddings, in OpenAI's schema with vLLM's pictures, and a reranker at /rerank, in
            that of Jina and Cohere; also /v1/models, /health and /metrics. Listens to this machine alone unless --host
            says otherwise. A key, where there is one, is in {KEY_VARIABLE} or --api-key-file.

            --engine vllm starts vLLM's own server with the arguments that the model needs, --engine mmembed the one of
            this package (pip install 'mmembed[serve]'); auto, the default, takes vLLM's for a folder that `mmembed
            export --to vllm` wrote.

              mmembed serve runs/demo/embedder
              mmembed serve runs/embedder runs/reranker --engine mmembed --port 8080
              mmembed serve exported/ --engine vllm --vllm max_model_len=4096""",
    )
    command.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"folder of an embedder, of a reranker, or one of each (default {NANO})",
    )
    command.add_argument("--engine", choices=("auto", "vllm", "mmembed"), default="auto", help="default auto")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    command.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes one that is free")
    command.add_argument("--served-model-name", nargs="+", metavar="NAME", help="of each model (default: its folder's)")
    command.add_argument("--api-key-file", type=Path, metavar="FILE", help="its first line is the key of every request")
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default auto)")
    add_trust(command)
    command.add_argument(
        "--allowed-media-domains",
        nargs="+",
        default=[],
        metavar="HOST",
        help="hosts that pictures may be fetched from by http(s) (default none: pictures come in the request)",
    )
    own = command.add_argument_group("of the engine mmembed")
    own.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    own.add_argument("--batch-tokens", type=int, metavar="N", help="tokens of a batch (default by device)")
    own.add_argument("--batch-wait", type=float, metavar="SECONDS", help="a lone request waits so long (default 0.003)")
    for flag, (_, kind, text) in LIMITS.items():
        own.add_argument(f"--{flag}", type=kind, metavar="SECONDS" if kind is float else "N", help=text)
    add_media_limits(own, "max_pixels_decoded", "max_bytes", usual=PICTURES)
    of_vllm = command.add_argument_group("of the engine vllm")
    of_vllm.add_argument("--vllm-python", metavar="PYTHON", help="interpreter that has vLLM (default: make vllm-env's)")
    of_vllm.add_argument(
        "--vllm", nargs="+", default=[], metavar="KEY=VALUE", help="further options of its server: max_model_len=4096"
    )
    return command


def run(arguments: argparse.Namespace) -> int:
    from mmembed.serving.vllm import is_exported

    models = arguments.models or [NANO]
    names = _names(models, arguments.served_model_name)
    own, of_vllm = _own_options(arguments), _given(arguments, "vllm_python", "vllm")
    key = _key(arguments.api_key_file)
    engine = arguments.engine
    if engine == "auto":
        engine = "vllm" if any(map(is_exported, models)) else "mmembed"
    if engine == "vllm" and own:
        raise MmembedError(f"{own[0]}: has no effect on vLLM's server, which has its own limits; remove it")
    if engine == "mmembed" and of_vllm:
        raise MmembedError(f"{of_vllm[0]}: has no effect on --engine mmembed; remove it, or give --engine vllm")
    if not _is_this_machine(arguments.host) and key is None:
        print(f"warning: {arguments.host} is open to other machines, and no key is asked for", file=sys.stderr)
    if engine == "vllm":
        return _vllm(arguments, models, names, key)
    return _mmembed(arguments, models, names, key)


def _mmembed(arguments: argparse.Namespace, models: list[str], names: list[str], key: str | None) -> int:
    try:
        from mmembed.serving.app import Service
        from mmembed.serving.server import listen, serve
    except ModuleNotFoundError as error:
        raise MmembedError(f"a package is missing ({error.name}); pip install 'mmembed[serve]'") from None
    from mmembed.serving.batcher import WAIT
    from mmembed.serving.limits import ServeLimits
    from mmembed.serving.models import describe, load

    given = {flag: vars(arguments)[flag.replace("-", "_")] for flag in LIMITS}
    limits = ServeLimits(
        media=media_limits_of(arguments),
        **{LIMITS[flag][0]: value for flag, value in given.items() if value is not None},
    )
    for flag, value in (("--batch-tokens", arguments.batch_tokens), ("--batch-wait", arguments.batch_wait)):
        if value is not None and not 0 <= value < float("inf"):
            raise MmembedError(f"{flag}: found {value}; give 0 or more")
    bound = listen(arguments.host, arguments.port)
    with bound:
        served = [
            load(
                model,
                name,
                device=arguments.device,
                dtype=arguments.dtype,
                trust_remote_code=arguments.trust_remote_code,
            )
            for model, name in zip(models, names, strict=True)
        ]
        if len({type(one) for one in served}) < len(served):
            raise MmembedError(f"found {' and '.join(models)}; give one embedder, one reranker, or one of each")
        service = Service(
            served,
            limits,
            hosts=arguments.allowed_media_domains,
            wait=WAIT if arguments.batch_wait is None else arguments.batch_wait,
            budget=arguments.batch_tokens or None,
        )
        told = ", ".join(map(describe, served))
        serve(
            service,
            bound,
            key=key,
            ready=lambda address: print(f"{address} serves {told}; Ctrl-C ends it", flush=True),
        )
    return 0


def _vllm(arguments: argparse.Namespace, models: list[str], names: list[str], key: str | None) -> int:
    """Becomes vLLM's server: signals reach it, and its exit code is ours."""
    from mmembed.serving.vllm import command_of, environment_of, find, unservable

    if len(models) > 1:
        raise MmembedError(f"found {' and '.join(models)}; vLLM's server has one model, start one for each")
    python = find(arguments.vllm_python)
    if python is None:
        raise MmembedError(
            f"{models[0]}: no environment with vLLM was found; run `make vllm-env`, or give --vllm-python; without it "
            "serve the checkpoint itself with --engine mmembed"
        )
    reason = unservable(models[0])
    if reason is not None:
        raise MmembedError(f"--engine vllm: {models[0]} is {reason}")
    command = command_of(
        python,
        models[0],
        names[0],
        host=arguments.host,
        port=arguments.port,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        hosts=arguments.allowed_media_domains,
        further=arguments.vllm,
    )
    os.execve(python, command, environment_of(python, key))


def _names(models: list[str], given: list[str] | None) -> list[str]:
    names = given or [Path(model).name or model for model in models]
    if len(names) != len(models):
        raise MmembedError(f"--served-model-name: {len(names)} names for {len(models)} models; give one each")
    if len(set(names)) < len(names):
        raise MmembedError(f"--served-model-name: both would be '{names[0]}'; give a name each")
    return names


def _own_options(arguments: argparse.Namespace) -> list[str]:
    """Flags that were given and that only our engine has."""
    flags = _given(arguments, "device", "batch_tokens", "batch_wait", *(flag.replace("-", "_") for flag in LIMITS))
    limits = media_limits_of(arguments)
    return flags + [f"--{key.replace('_', '-')}" for key, value in vars(PICTURES).items() if vars(limits)[key] != value]


def _given(arguments: argparse.Namespace, *names: str) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in names if vars(arguments)[name] not in (None, [])]


def _key(file: Path | None) -> str | None:
    """The key that requests must bring. Raises ConfigError where one was asked for and there is none."""
    if file is None:
        where, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
        if key is None:
            return None
    else:
        where = f"--api-key-file {file}"
        try:
            key = file.read_text(encoding="utf-8").partition("\n")[0]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: cannot be read ({error}); correct the path") from error
    if not key.strip() or not key.isascii():
        raise ConfigError(f"{where}: holds no key of plain characters; write one into it, or take it away")
    return key.strip()


def _is_this_machine(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
