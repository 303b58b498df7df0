"""A claim as declared data: `declared/<name>.yaml` says what a paper states, which arms it compares, and on what.

An arm is a tree of keys of a training config, laid over the claim's own `base`, over `declared/base.yaml`. Arms of one
claim get the same budget: they may differ in attention, pooling, prompt, objective, in how a source is read or pairs
are made of it, in which pairs meet in a batch and which negatives are mined (not in how many), in nothing else, and
that is checked. To add a claim, add a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmembed.config.blocks import EmbedderConfig
from mmembed.errors import ConfigError, nearest

DECLARED = Path(__file__).with_name("declared")
OURS = ("pooled_auc", "centroid_distance")  # metrics of vectors that mteb does not have: see eval.claims.measuring
SOURCE_MAY_DIFFER = {"options", "pairs", "in_batch_negatives", "instruction", "document_instruction"}
Tree = dict[str, Any]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Comparison(_Block):
    """`arm` against `than`, by one number of a task of the local benchmark, or by its mean over several tasks.

    direction: `higher` or `lower` is what the paper claims of `arm`; `not_lower` claims that nothing is lost.
    dim: vectors are cut to their first dimensions.
    negligible: a difference up to this size does not matter (0.005: half a point of nDCG).
    """

    arm: str
    than: str
    task: str | tuple[str, ...]
    metric: str = "ndcg_at_10"
    direction: Literal["higher", "lower", "not_lower"] = "higher"
    dim: int | None = Field(default=None, gt=0)
    negligible: float = Field(default=0.005, gt=0)

    @property
    def tasks(self) -> tuple[str, ...]:
        return (self.task,) if isinstance(self.task, str) else self.task

    @property
    def scores(self) -> tuple[str, ...]:
        """The tasks' names in a result, where `@64` stands behind those of cut vectors."""
        return tuple(task if self.dim is None else f"{task}@{self.dim}" for task in self.tasks)


class Claim(_Block):
    """What a paper says, and how it is tested here.

    trained: false measures what training would begin with, once, and its interval is over the queries.
    needs: folder -> train queries (lines of its `qrels/train.tsv` with different ones) without which it says nothing.
    steps: the command's budget times this. Small batches take more steps for as many examples.
    instructions: as in `python -m eval.run`.
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

    def config(self, arm: str, steps: int, seed: int) -> Tree:
        """The training config of a run, without paths."""
        budget: Tree = {"training": {"seed": seed} | ({"max_steps": steps} if self.trained else {})}
        return merged(_tree(DECLARED / "base.yaml"), self.base, self.arms[arm], budget)


def read_claims(names: Iterable[str] | None = None, folder: Path = DECLARED) -> list[Claim]:
    """All declared claims, or the named ones in their order.

    Raises:
        ConfigError: no such claim (the nearest is named), a folder without any, or a file that declares none.
    """
    files = {path.stem: path for path in sorted(folder.glob("*.yaml")) if path != DECLARED / "base.yaml"}
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
        for arm in (comparison.arm, comparison.than):
            if arm not in claim.arms:
                raise ConfigError(f"{path}: comparisons: there is no arm '{arm}'; {nearest(arm, claim.arms)}")
    check_matched(claim, path)
    return claim


def check_matched(claim: Claim, path: Path) -> None:
    """Raises ConfigError where arms differ in what they are given: data, steps, tokens, trained weights."""
    given = {}
    for arm in claim.arms:
        try:
            given[arm] = _given(EmbedderConfig(**claim.config(arm, steps=1, seed=0)))
        except ValueError as error:  # of ours or pydantic's
            raise ConfigError(f"{path}: arm '{arm}': {error}") from error
    first, *others = given
    for arm in others:
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
    """Of the sources of all arms and of the tasks, below a data root; of a file, the folder it is in."""
    paths = {Path(source["path"]) for arm in claim.arms for source in claim.config(arm, 1, 0)["data"]["train"]}
    sources = {(path.parent if path.suffix else path).as_posix() for path in paths}
    return sorted(sources | {row.folder for row in rows})


def _tree(path: Path) -> Tree:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found a {type(tree).__name__}; write `key: value` lines")
    return tree
