"""A claim as declared data: `declared/<name>.yaml` says what a paper states, which arms it compares, and on what.

An arm is a tree of keys of a training config, laid over the claim's own `base`, over `declared/base.yaml`. Arms of one
claim get the same budget: they may differ in attention, pooling, prompt, objective, in how a source is read or pairs
are made of it, in which pairs meet in a batch and which negatives are mined (not in how many), in nothing else, and
that is checked. To add a claim, add a file.

A claim may make models and records before its arms (`stages`: mined negatives, a reranker that teaches, models and what
is fused of them), an arm may be one of these models as it is (`made`), and arms may be rerankers, which rank what a
first stage found (`first_stages`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmembed.config.blocks import EmbedderConfig, RerankerConfig
from mmembed.errors import ConfigError, nearest

DECLARED = Path(__file__).with_name("declared")
OURS = ("pooled_auc", "centroid_distance")  # metrics of vectors that mteb does not have: see eval.claims.measuring
BASES = {"embedder": "base.yaml", "reranker": "base_reranker.yaml"}
WRITES_RECORDS = ("mine", "score")  # commands whose configs have sources, a root and an output
FUSES = "fuse"  # `mmembed fuse`, whose config has the models, the block of a rule, and options of the command
MADE = "made"  # the only key of an arm that a stage has made
FIRST_STAGE = "first_stage"  # as `than`: the candidates in the order that they came in
PACKAGED = ("bm25", "mmembed-nano")  # first stages that no stage has to make
SOURCE_MAY_DIFFER = {"options", "pairs", "in_batch_negatives", "instruction", "document_instruction"}
Tree = dict[str, Any]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Stage(_Block):
    """What is made before the arms, by a command of the project; `"{name of the stage}"` in a config is its folder.

    command: `mine` (data_tools.mine_negatives), `score` (data_tools.score), `embedder`, `reranker` (recipes.train_...),
        `fuse` (mmembed fuse).
    config: of that command, without output, root and seed; a training's is laid over the base of its kind. Of `fuse`:
        `models`, `rule` (a name or a block), and its options by their names.
    steps: of a training, the command's budget times this. Each seed of the arms has its own training.
    """

    command: Literal["mine", "score", "embedder", "reranker", "fuse"]
    config: Tree
    steps: float = Field(default=1.0, gt=0)


class Comparison(_Block):
    """`arm` against `than`, by one number of a task of the local benchmark, or by its mean over several tasks.

    than: another arm; of a reranker also `first_stage`, the same candidates in the order that they came in.
    candidates: of a reranker, which of the claim's first stages found what is ranked.
    direction: `higher` or `lower` is what the paper claims of `arm`; `not_lower` claims that nothing is lost.
    dim: vectors are cut to their first dimensions.
    negligible: a difference up to this size does not matter (0.005: half a point of nDCG).
    """

    arm: str
    than: str
    task: str | tuple[str, ...]
    candidates: str | None = None
    metric: str = "ndcg_at_10"
    direction: Literal["higher", "lower", "not_lower"] = "higher"
    dim: int | None = Field(default=None, gt=0)
    negligible: float = Field(default=0.005, gt=0)

    @property
    def tasks(self) -> tuple[str, ...]:
        return (self.task,) if isinstance(self.task, str) else self.task

    @property
    def scores(self) -> tuple[str, ...]:
        """The tasks' names in a result: `@64` stands behind those of cut vectors, `@bm25` behind candidates."""
        behind = self.candidates if self.dim is None else self.dim
        return tuple(task if behind is None else f"{task}@{behind}" for task in self.tasks)


class Claim(_Block):
    """What a paper says, and how it is tested here.

    trained: false measures what training would begin with, once, and its interval is over the queries.
    needs: folder -> train queries (lines of its `qrels/train.tsv` with different ones) without which it says nothing.
    steps: the command's budget times this. Small batches take more steps for as many examples.
    instructions: as in `python -m eval.run`.
    model: what the arms are.
    stages: made before the arms, in their order.
    compares_data: arms are trained on different sources, which is what is compared.
    first_stages: name -> `bm25`, `mmembed-nano` or `{stage}`: what finds the candidates that rerankers rank.
    depth: candidates a query.
    note: what a reader of the result must know.
    """

    name: str
    paper: str
    sentence: str
    arms: dict[str, Tree]
    comparisons: tuple[Comparison, ...] = Field(min_length=1)
    base: Tree = Field(default_factory=dict)
    trained: bool = True
    needs: dict[str, int] = Field(default_factory=dict)
    steps: float = Field(default=1.0, gt=0)
    instructions: Literal["never", "auto", "always"] = "never"
    model: Literal["embedder", "reranker"] = "embedder"
    stages: dict[str, Stage] = Field(default_factory=dict)
    compares_data: bool = False
    first_stages: dict[str, str] = Field(default_factory=dict)
    depth: int = Field(default=20, gt=0)
    note: str = ""

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for comparison in self.comparisons for task in comparison.tasks))

    @property
    def dims(self) -> list[int]:
        return sorted({comparison.dim for comparison in self.comparisons if comparison.dim is not None})

    @property
    def of_vectors(self) -> list[str]:
        """The tasks with a metric of `OURS`."""
        return sorted(
            {task for comparison in self.comparisons if comparison.metric in OURS for task in comparison.tasks}
        )

    @property
    def by_query(self) -> list[str]:
        """The tasks whose queries are measured one by one: those of a claim that is measured once."""
        return [] if self.trained else self.tasks

    def made(self, arm: str) -> str | None:
        """The stage that has made an arm; None where it is trained, or is what training would begin with."""
        return next(stages_in(self.arms[arm]), None) if MADE in self.arms[arm] else None

    def config(self, arm: str, steps: int, seed: int) -> Tree:
        """The training config of a run, without paths; of an arm that a stage has made, which one."""
        if self.made(arm) is not None:
            return self.arms[arm]
        budget: Tree = {"training": {"seed": seed} | ({"max_steps": steps} if self.trained else {})}
        return merged(_tree(DECLARED / BASES[self.model]), self.base, self.arms[arm], budget)

    def stage_config(self, name: str, steps: int, seed: int) -> Tree:
        """The config of a stage, without paths. `steps` is the command's budget."""
        stage = self.stages[name]
        if stage.command in (*WRITES_RECORDS, FUSES):
            return stage.config
        budget: Tree = {"training": {"seed": seed, "max_steps": max(1, round(steps * stage.steps))}}
        return merged(_tree(DECLARED / BASES[stage.command]), stage.config, budget)


def read_claims(names: Iterable[str] | None = None, folder: Path = DECLARED) -> list[Claim]:
    """All declared claims, or the named ones in their order.

    Raises:
        ConfigError: no such claim (the nearest is named), a folder without any, or a file that declares none.
    """
    bases = {DECLARED / name for name in BASES.values()}
    files = {path.stem: path for path in sorted(folder.glob("*.yaml")) if path not in bases}
    if not files:
        raise ConfigError(f"--claims {folder}: there is no .yaml file; see {DECLARED} for what one looks like")
    for name in names or ():
        if name not in files:
            raise ConfigError(f"--only: there is no claim '{name}'; {nearest(name, files)}")
    return [read_claim(files[name]) for name in names or files]


def read_claim(path: Path) -> Claim:
    """One file. Raises ConfigError naming the file and the key."""
    try:
        claim = Claim(**{"name": path.stem, **_tree(path)})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    for comparison in claim.comparisons:
        for arm in (comparison.arm, *([] if comparison.than == FIRST_STAGE else [comparison.than])):
            if arm not in claim.arms:
                raise ConfigError(f"{path}: comparisons: there is no arm '{arm}'; {nearest(arm, claim.arms)}")
    check_stages(claim, path)
    check_first_stages(claim, path)
    check_matched(claim, path)
    return claim


def check_stages(claim: Claim, path: Path) -> None:
    """Raises ConfigError where a config names a stage that is not made before it, or an arm is none of its models."""
    made: list[str] = []
    users = [(f"stages.{name}", stage.config) for name, stage in claim.stages.items()]
    users += [("base", claim.base), *((f"arms.{name}", tree) for name, tree in claim.arms.items())]
    users.append(("first_stages", claim.first_stages))
    for where, tree in users:
        for name in stages_in(tree):
            if name not in made:
                raise ConfigError(f"{path}: {where}: no stage '{name}' is made before it; {nearest(name, made)}")
        if where.startswith("stages."):
            made.append(where.removeprefix("stages."))
    models = [name for name, stage in claim.stages.items() if stage.command not in WRITES_RECORDS]
    for arm, tree in claim.arms.items():
        if MADE in tree and (claim.made(arm) not in models or len(tree) > 1):
            raise ConfigError(f"{path}: arms.{arm}: made is the one key of such an arm, and names a stage that makes a "
                              f"model, as \"{{name}}\"; found {tree}")  # fmt: skip
    for name, stage in claim.stages.items():
        if stage.command == FUSES and not {"models", "rule"} <= stage.config.keys():
            raise ConfigError(f"{path}: stages.{name}: a fusion names its models and its rule; found {stage.config}")


def check_first_stages(claim: Claim, path: Path) -> None:
    """Raises ConfigError where rerankers have nothing to rank, or embedders are told what to rank."""
    rerankers = claim.model == "reranker"
    if not rerankers and (claim.first_stages or "depth" in claim.model_fields_set):
        raise ConfigError(f"{path}: first_stages and depth have no effect on embedders; set model: reranker")
    if rerankers and not claim.trained:
        raise ConfigError(f"{path}: trained false: rerankers are measured after training; remove it")
    for name, model in claim.first_stages.items():
        if model not in PACKAGED and not re.fullmatch(STAGE, model):
            raise ConfigError(f"{path}: first_stages.{name}: '{model}'; give {', '.join(PACKAGED)} or {{stage}}")
    for comparison in claim.comparisons:
        if rerankers and comparison.candidates not in claim.first_stages:
            raise ConfigError(f"{path}: comparisons: candidates '{comparison.candidates}' of rerankers; "
                              f"{nearest(str(comparison.candidates), claim.first_stages)}")  # fmt: skip
        if not rerankers and (comparison.candidates is not None or comparison.than == FIRST_STAGE):
            raise ConfigError(f"{path}: comparisons: candidates and than: first_stage are of rerankers; remove them")
        if rerankers and (comparison.dim is not None or comparison.metric in OURS):
            raise ConfigError(f"{path}: comparisons: dim and {', '.join(OURS)} are of vectors, and rerankers have none")


STAGE = r"\{(\w+)\}"  # a value that is this alone stands for the folder of a stage


def stages_in(tree: Any) -> Iterator[str]:
    """The stages whose folders a config names."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, str):
        yield from re.findall(f"^{STAGE}$", tree)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from stages_in(value)


def with_folders(tree: Any, folders: Mapping[str, Path]) -> Any:
    """A config with the folders of the stages that it names."""
    if isinstance(tree, Mapping):
        return {key: with_folders(value, folders) for key, value in tree.items()}
    if isinstance(tree, str):
        named = re.fullmatch(STAGE, tree)
        return tree if named is None else str(folders[named[1]])
    return [with_folders(value, folders) for value in tree] if isinstance(tree, list | tuple) else tree


def check_matched(claim: Claim, path: Path) -> None:
    """Raises ConfigError where arms differ in what they are given: data, steps, tokens, trained weights."""
    given = {}
    for arm in (arm for arm in claim.arms if claim.made(arm) is None):
        try:
            kind = RerankerConfig if claim.model == "reranker" else EmbedderConfig
            given[arm] = _given(kind(**claim.config(arm, steps=1, seed=0)))
            if claim.compares_data:
                del given[arm]["data.train"]
        except ValueError as error:  # of ours or pydantic's
            raise ConfigError(f"{path}: arm '{arm}': {error}") from error
    first = next(iter(given), "")
    for arm in given:
        for key, value in given[first].items():
            if given[arm][key] != value:
                raise ConfigError(
                    f"{path}: arms '{first}' and '{arm}' differ in {key}, so their budgets do not match; "
                    "move it to the claim's base"
                )


def _given(config: EmbedderConfig) -> Tree:
    sources = [source.model_dump(exclude=SOURCE_MAY_DIFFER) for source in config.data.train]
    mining = None if config.data.mining is None else config.data.mining.negatives
    return {
        "model": config.model.model_dump(exclude={"attention"}),
        "adapter": config.adapter,
        "lengths": config.lengths,
        "training": config.training,
        "data.train": sources,
        "data": config.data.model_dump(exclude={"train", "batch_order", "mining"}),
        "data.mining": mining,
    }


def merged(*trees: Mapping[str, Any]) -> Tree:
    """Later trees win, key by key; a block with a `type` and a list are taken as a whole."""
    result: Tree = {}
    for tree in trees:
        for key, value in tree.items():
            old = result.get(key)
            if isinstance(value, Mapping) and isinstance(old, Mapping) and "type" not in {*value, *old}:
                result[key] = merged(old, value)
            else:
                result[key] = value
    return result


def folders(claim: Claim, rows: Sequence[Any]) -> list[str]:
    """Of the sources of all stages, arms and tasks, below a data root; of a file, the folder it is in."""
    blocks = [claim.config(arm, 1, 0)["data"] for arm in claim.arms if claim.made(arm) is None]
    for name, stage in claim.stages.items():
        if stage.command == FUSES:
            continue
        config = claim.stage_config(name, 1, 0)
        mining = {**config, "train": config["sources"]} if stage.command in WRITES_RECORDS else config["data"]
        blocks.append(mining)
    paths = {Path(source["path"]) for block in blocks if "root" not in block for source in block["train"]}
    sources = {(path.parent if path.suffix else path).as_posix() for path in paths}
    return sorted(sources | {row.folder for row in rows})


def _tree(path: Path) -> Tree:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found a {type(tree).__name__}; write `key: value` lines")
    return tree
