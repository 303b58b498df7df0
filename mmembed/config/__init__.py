"""One YAML file (+ `key=value` overrides) becomes typed objects; the only source of truth of a run.

`load_config` reads the file, translates the names that users of other toolkits know (`lora_r`, `query_max_len`, ...),
applies the overrides, and validates everything before anything heavy is loaded: neither torch nor transformers is
imported here. A key that is unknown, given twice, or of no effect with the others is a ConfigError that names the
nearest key. The typed objects are in `blocks`, the names of transformers in `arguments`. Costs a few milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from mmembed.config.arguments import training_argument_names
from mmembed.config.blocks import EmbedderConfig, RerankerConfig
from mmembed.errors import ConfigError, nearest

Block = TypeVar("Block", bound=BaseModel)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), kind: type[EmbedderConfig] = EmbedderConfig
) -> EmbedderConfig:
    """Reads and validates a run.

    Args:
        path: a YAML file.
        kind: of an embedder, or of a reranker.
        overrides: `a.b=value` strings; the value is YAML (`training.learning_rate=1e-4`). They win over the file.

    Raises:
        ConfigError: with the file, the key, what was found, and the nearest key or the remedy.
    """
    examples = "recipes/configs/reranker" if issubclass(kind, RerankerConfig) else "recipes/configs/embedder"
    return build_config(read_tree(Path(path), examples), overrides, where=str(path), kind=kind)


def describes_reranker(path: str | Path, overrides: Sequence[str] = ()) -> bool:
    """Whether a run's file is a reranker's: it has a `head`, or the prompt of pairs, `judge`. Errors as of
    `load_config`; what the blocks hold is not looked at."""
    tree = read_tree(Path(path), "recipes/configs")
    given = {**tree, **{key.split(".")[0]: value for key, value in map(_read_override, overrides)}}
    prompt = given.get("prompt")
    return given.get("head") is not None or "judge" in (prompt, prompt.get("type") if isinstance(prompt, dict) else "")


def load_blocks(kind: type[Block], path: str | Path, overrides: Sequence[str] = (), examples: str = "docs") -> Block:
    """As load_config, for the config of another command; it has no short names.

    Args:
        kind: the typed object; its validators raise ConfigError.
        examples: where such files are, for the message.
    """
    tree = read_tree(Path(path), examples)
    try:
        for override in overrides:
            key, given = _read_override(override)
            _assign(tree, tuple(key.split(".")), given, replace=True)
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_explain(item, kind)}" for item in error.errors())) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def build_config(
    tree: Mapping[str, Any],
    overrides: Sequence[str] = (),
    where: str = "config",
    kind: type[EmbedderConfig] = EmbedderConfig,
) -> EmbedderConfig:
    """As load_config, from a mapping. `where` opens the error messages."""
    try:
        canonical = _translate(tree)
        for override in overrides:
            key, given = _read_override(override)
            _check_alias(key, canonical.get("objective"))
            _assign(canonical, _ALIASES.get(key, _top_level(key)), given, replace=True)
        if canonical.pop("same_dataset_within_batch", True) is not True:
            raise ConfigError(
                "same_dataset_within_batch: false is not offered: a batch holds one source (negatives of "
                "another task teach a shortcut)"
            )
        return kind.model_validate(canonical)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_explain(item, kind)}" for item in error.errors())) from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


_ALIASES: dict[str, tuple[str, ...]] = {  # names that users' hands know -> ours
    "model_name_or_path": ("model", "name_or_path"),
    "lora_r": ("adapter", "r"),
    "lora_alpha": ("adapter", "alpha"),
    "lora_dropout": ("adapter", "dropout"),
    "lora_target_modules": ("adapter", "target_modules"),
    "temperature": ("objective", "temperature"),
    "negatives_cross_device": ("objective", "cross_device_negatives"),
    "mrl_dims": ("objective", "matryoshka", "dims"),
    "train_group_size": ("data", "train_group_size"),
    "query_max_len": ("lengths", "query_max_length"),
    "passage_max_len": ("lengths", "document_max_length"),
    "min_pixels": ("lengths", "min_pixels"),
    "max_pixels": ("lengths", "max_pixels"),
    "query_prefix": ("prompt", "query_prefix"),
    "passage_prefix": ("prompt", "document_prefix"),
    "grad_cache": ("training", "grad_cache"),
    "gc_chunk_size": ("training", "chunk_rows"),
    "training.gradient_checkpointing": ("model", "gradient_checkpointing"),
    "training.activation_checkpointing": ("model", "gradient_checkpointing"),
    "gradient_checkpointing": ("model", "gradient_checkpointing"),
    "activation_checkpointing": ("model", "gradient_checkpointing"),
}
_DEFAULT_TYPES = {"objective": "contrastive", "prompt": "plain", "pooling": "mean"}


def _top_level(key: str) -> tuple[str, ...]:
    """A flat TrainingArguments name (`learning_rate`) belongs to `training`."""
    if "." not in key and key not in EmbedderConfig.model_fields and key in training_argument_names():
        return ("training", key)
    return tuple(key.split("."))


def _translate(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A new tree with our names only. Raises ConfigError when one thing is said twice."""
    canonical: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ConfigError(f"the key {key!r} is no name; {nearest(str(key), EmbedderConfig.model_fields)}")
        _check_alias(key, tree.get("objective"))
        if key in EmbedderConfig.model_fields:
            block = dict(value) if isinstance(value, Mapping) else value
            for inner in list(block) if isinstance(block, dict) else []:
                if f"{key}.{inner}" in _ALIASES:
                    _assign(canonical, _ALIASES[f"{key}.{inner}"], block.pop(inner))
            _merge(canonical, key, block)
        else:
            _assign(canonical, _ALIASES.get(key) or _top_level(key), value)
    return canonical


def _check_alias(key: str, objective: Any) -> None:
    """Raises ConfigError where a short name belongs to one of several objectives: it does not say to which."""
    path = _ALIASES.get(key, ())
    if path[:1] != ("objective",):
        return
    chosen = next(
        (name for name in ("by_task", "by_source") if isinstance(objective, Mapping) and name in objective), ""
    )
    if isinstance(objective, list):
        place = "objective.0"
    elif chosen:
        entries = objective[chosen]
        place = f"objective.{chosen}.{next(iter(entries), 'NAME') if isinstance(entries, Mapping) else 'NAME'}"
    else:
        return
    raise ConfigError(
        f"'{key}' belongs to one objective, and {'a list' if isinstance(objective, list) else chosen} has several; "
        f"write {'.'.join((place, *path[1:]))} for each that it is meant for"
    )


def _merge(canonical: dict[str, Any], key: str, block: Any) -> None:
    if key not in canonical:
        canonical[key] = block
    elif isinstance(block, dict):
        for inner, value in block.items():
            _assign(canonical, (key, inner), value)
    else:
        canonical[key] = {**canonical[key], "type": block}


def _assign(tree: dict[str, Any], path: tuple[str, ...], value: Any, replace: bool = False) -> None:
    for depth, name in enumerate(path[:-1]):
        inner = tree.get(name)
        if isinstance(inner, str) or (inner is None and depth == 0 and name in _DEFAULT_TYPES):
            inner = {"type": inner or _DEFAULT_TYPES[name]}
        elif isinstance(inner, list):
            inner = {str(index): item for index, item in enumerate(inner)}
        elif not isinstance(inner, dict | None):
            raise ConfigError(f"'{'.'.join(path)}': '{name}' is not a block")
        was_list = isinstance(tree.get(name), list)
        if was_list:
            _check_place(path, depth, len(tree[name]))
        tree[name] = dict(inner or {})
        if was_list:
            _assign(tree[name], path[depth + 1 :], value, replace)
            tree[name] = [tree[name][str(index)] for index in range(len(tree[name]))]
            return
        tree = tree[name]
    if path[-1] in tree and not replace and tree[path[-1]] != value:
        raise ConfigError(f"'{'.'.join(path)}' is given twice ({tree[path[-1]]} and {value}); keep one")
    tree[path[-1]] = value


def _check_place(path: tuple[str, ...], depth: int, length: int) -> None:
    """Raises ConfigError unless a place in the list follows, or the one behind its end."""
    block, place = ".".join(path[: depth + 1]), path[depth + 1]
    if place in map(str, range(length + 1)):
        return
    named = ".".join((block, "0", *path[depth + (2 if re.fullmatch(r"-?\d+", place) else 1) :]))
    raise ConfigError(f"'{'.'.join(path)}': '{block}' is a list of {length}; name a place from 0 on, as in {named}")


def _explain(item: Any, root: type[BaseModel]) -> str:
    """One pydantic error as: key: found; remedy."""
    branch = re.compile(r"(function-|literal|bool|str|dict|tuple|union).*")  # which branch of a union pydantic tried
    *outer, last = map(str, item["loc"] or ("",))
    location = [part for part in outer if not branch.fullmatch(part)]
    if item["type"] == "extra_forbidden" or not branch.fullmatch(last):  # a user's key may begin as a branch does
        location += [last] if last else []
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        model: Any = root
        for part in location[:-1]:
            if not part.isdigit():
                model = _field_model(model, part)
        owner = ".".join(location[:-1])
        return f"unknown key '{key}'; {nearest(location[-1], model.model_fields)}" + (
            f" (in '{owner}')" if owner else ""
        )
    if item["type"] == "value_error":
        return f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    return f"{key}: found {item['input']!r}; {item['msg'][0].lower()}{item['msg'][1:]}"


def _field_model(model: type[BaseModel], name: str) -> type[BaseModel]:
    annotation = model.model_fields[name].annotation
    while not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        annotation = annotation.__args__[0]  # type: ignore[union-attr]  # tuple[SourceConfig, ...] -> SourceConfig
    return annotation


def read_tree(path: Path, examples: str = "docs") -> dict[str, Any]:
    """The mapping of a YAML file. Raises ConfigError, which names `examples` as where such files are."""
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; give a YAML file, as in {examples}")
    try:
        tree = _read_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); convert the file") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}; a config is a mapping of blocks")
    return tree or {}


def _read_override(override: str) -> tuple[str, Any]:
    """The key and the value of `a.b=value`."""
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"override '{override}' has no '='; write key=value")
    try:
        return key, _read_yaml(value)
    except ConfigError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"override '{override:.80}': {reason}; correct the value, or quote it") from None


def _read_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-13-45 is read as a date
        raise ConfigError(f"not valid YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (`1e-4` is a number) and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
