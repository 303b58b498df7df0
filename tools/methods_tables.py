"""Writes the tables of docs/methods.md and the pages of docs/methods/ from the code and from what was measured.

python -m tools.methods_tables            # rewrite them
python -m tools.methods_tables --check    # exit 1 and say so when they are out of date

A component's entry is its module's docstring: a first line, paragraphs (those that are equations stand as they are, and
there is one at least), a paper (or a reason in NO_PAPER), and a paragraph that begins with "When: ", which says when to
take it. Options are the constructor's, explained by the docstring of the class. Costs are those of
benchmarks/results/objectives.json; quality is that of the claims whose compared arms differ in the component
(docs/claims/results.jsonl), and what tools/measured_in_log.yaml quotes from docs/log.md.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from eval.claims import page
from eval.claims.declaration import read_claims
from mmembed.data.format_base import FORMATS
from mmembed.data.pair_base import PAIR_MAKERS
from mmembed.heads import HEADS
from mmembed.losses import LOSSES, Loss
from mmembed.mining import MINERS, Miner
from mmembed.objectives import OBJECTIVES, Objective, build_objective
from mmembed.pooling import POOLINGS
from mmembed.prompts import PROMPTS
from mmembed.registry import Registry

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
COSTS = ROOT / "benchmarks" / "results" / "objectives.json"
CLAIMS = ROOT / "docs" / "claims.md"
LOG = ROOT / "docs" / "log.md"
IN_LOG = ROOT / "tools" / "measured_in_log.yaml"
FROM_THE_RUN = {
    "hidden_size",
    "embedding_size",
    "args",
    "kwargs",
    "media",
}  # constructor arguments that a user does not write
EXAMPLES = {  # options without which there is nothing to build, and papers' settings that cost more than the defaults
    "hydra": {"classes": ["card_arrival", "age_limit"]},
    "negative_queue": {"momentum": 0.995},
    "soft_labels": {"vectors": "labels.enc"},
    "threshold": {"most": 0.8},
    "tcl": {"momentum": 0.995, "alpha": 0.4, "size": 65536},
}

NO_PAPER = {
    "contrastive": "a frame for losses, each of which has its own",
    "top_k": "as old as retrieval",
    "random_fill": "a plain draw",
    "cluster_diverse": "a plain rule",
    "chat": "the turns are those of the backbone's own template",
}


@dataclass(frozen=True)
class Family:
    """Components of one registry. key: of the config block that names one; None: a table and no entries."""

    registry: Registry[Any]
    key: str | None = None
    title: str = ""


FAMILIES = {
    "poolings": Family(POOLINGS, "pooling", "Poolings"),
    "prompts": Family(PROMPTS, "prompt", "Prompts"),
    "heads": Family(HEADS, "head", "Heads of rerankers"),
    "losses": Family(LOSSES, "objective", "Losses"),
    "objectives": Family(OBJECTIVES, "objective", "Objectives"),
    "pair_makers": Family(PAIR_MAKERS, "pairs", "Makers of pairs"),
    "miners": Family(MINERS, "rules", "Rules of mining"),
    "formats": Family(FORMATS),
}


def main() -> None:
    stale = [path for path, text in pages() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" not in sys.argv[1:]:
        for path, text in pages():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    elif stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"{names}: out of date; run python -m tools.methods_tables")


def pages() -> Iterator[tuple[Path, str]]:
    """Every generated page and what it should say."""
    fresh = PAGE.read_text(encoding="utf-8")
    for name, family in FAMILIES.items():
        block = f"<!-- table: {name} -->\n{table(name, family)}\n<!-- end -->"
        fresh, count = re.subn(rf"<!-- table: {name} -->.*?<!-- end -->", lambda _, b=block: b, fresh, flags=re.S)
        if count != 1:
            sys.exit(f"{PAGE.name}: needs exactly one '<!-- table: {name} -->' ... '<!-- end -->', found {count}")
        if family.key is not None:
            yield PAGE.with_suffix("") / f"{name}.md", entries(name, family)
    yield PAGE, fresh


def table(name: str, family: Family) -> str:
    lines = ["| `type` | what it is | options |", "|---|---|---|"]
    for component, cls in family.registry.classes().items():
        link = f"`{component}`" if family.key is None else f"[`{component}`](methods/{name}.md#{component})"
        lines.append(f"| {link} | {_cell(_about(cls))} | {options(cls)} |")
    return "\n".join(lines)


def options(cls: type) -> str:
    """`name=default` of every constructor argument that a user writes."""
    shown = [
        f"`{parameter.name}`" if parameter.default is parameter.empty else f"`{parameter.name}={parameter.default!r}`"
        for parameter in written_by_users(cls)
    ]
    return ", ".join(shown) or "none"


def written_by_users(cls: type) -> list[inspect.Parameter]:
    return [one for one in inspect.signature(cls).parameters.values() if one.name not in FROM_THE_RUN]


def entries(name: str, family: Family) -> str:
    """The page of a family: an entry a component."""
    head = (
        f"# {family.title}\n\nWritten by `python -m tools.methods_tables` from the code; do not edit. "
        "[Methods](../methods.md) says how they fit together.\n"
    )
    return "\n".join(
        [head, *(_entry(component, cls, name, family) for component, cls in family.registry.classes().items())]
    )


def _entry(component: str, cls: type, name: str, family: Family) -> str:
    paragraphs = inspect.cleandoc(inspect.getmodule(cls).__doc__ or "").split("\n\n")
    when = [text.removeprefix("When: ") for text in paragraphs if text.startswith("When: ")]
    if len(when) != 1:
        sys.exit(f"{inspect.getfile(cls)}: its docstring needs one paragraph 'When: ...', which says when to take it")
    body = [_paragraph(text) for text in paragraphs if not text.startswith("When: ")]
    if not any(text.startswith("```") for text in body):
        sys.exit(f"{inspect.getfile(cls)}: its docstring needs an equation, a paragraph that begins like 'L = '")
    text = "\n\n".join(body).replace("\n```\n\n```text\n", "\n\n")  # neighbouring equations are one block
    papers = dict.fromkeys(re.findall(r"\b\d{4}\.\d{4,5}\b", "\n".join(paragraphs)))
    links = ", ".join(f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in papers)
    parts = [f"## {component}", text, f"**When**: {_plain(when[0])}"]
    elsewhere = re.findall(r'[A-Z]\w+ et al\., "[^"]+" \([^)]+\)', " ".join(paragraphs).replace("\n", " "))
    cited = links or "; ".join(dict.fromkeys(elsewhere))
    if bool(cited) is (component in NO_PAPER):
        sys.exit(f"{inspect.getfile(cls)}: its docstring names a paper, or NO_PAPER why there is none; not both")
    parts.append(f"**Paper**: {cited or f'none: {NO_PAPER[component]}'}")
    parts += [f"```yaml\n{block_of(component, cls, family)}\n```"]
    parts += [explained] if (explained := _options_explained(cls)) else []
    if name == "losses":
        objective = cls.objective  # type: ignore[attr-defined]
        own = " and ".join(f"`{key}`" for key in cls.defaults)  # type: ignore[attr-defined]
        whose = f", with the loss's own default of {own}" if own else ""
        parts.append(f"Beside them the options of [`{objective}`](objectives.md#{objective}){whose}.")
    if family.key == "objective":
        parts.append(f"**Cost here**: {_cost(component)}")
    quality = [*_of_claims(component, cls, family), *_of_log(component)]
    parts.append("\n".join(["**Quality here**:", "", *quality]) if quality else "**Quality here**: not measured")
    return "\n\n".join(parts) + "\n"


def block_of(component: str, cls: type, family: Family) -> str:
    """The line of YAML that names the component, with the defaults of its options, and examples of what has none."""
    examples = EXAMPLES.get(component, {})
    defaults = examples | {
        one.name: list(one.default) if isinstance(one.default, tuple) else one.default
        for one in written_by_users(cls)
        if one.default is not one.empty and one.default not in (None, "", ()) and one.name not in examples
    }
    if issubclass(cls, Loss):
        defaults |= cls.defaults
    options = "".join(f", {name}: {_flow(value)}" for name, value in defaults.items())
    written = f"{{type: {component}{options}}}"
    beside = issubclass(cls, Objective) and not cls.compares  # it stands in a list only
    if issubclass(cls, Miner) and cls.role == "cluster":
        return f"data: {{batch_order: {written}}}"
    if issubclass(cls, Loss) and build_objective(defaults | {"type": component}).wants_lengths:
        return f"normalize: false\n{family.key}: {written}"
    return f"{family.key}: [{{type: infonce}}, {written}]" if beside else f"{family.key}: {written}"


def _flow(value: Any) -> str:
    """A value as YAML on one line, which JSON is; words stand without quotes."""
    return value if isinstance(value, str) and re.fullmatch(r"[a-z]\w*", value) else json.dumps(value)


def _options_explained(cls: type) -> str:
    """A list of the options, as the class's docstring explains them."""
    text = inspect.cleandoc(cls.__doc__ or "")
    found = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, flags=re.S | re.M)
    if found is None:
        return ""
    lines: list[str] = []
    for line in found[1].strip("\n").splitlines():
        new = re.match(r"    (\w[\w, ]*): (.*)", line)
        if new and not all(one.strip() in FROM_THE_RUN for one in new[1].split(",")):
            lines.append("- " + ", ".join(f"`{one.strip()}`" for one in new[1].split(",")) + f": {_plain(new[2])}")
        elif new is None and lines and line.strip():
            lines.append(f"  {_plain(line.strip())}")
    return "\n".join(lines)


def _cost(component: str) -> str:
    """Time and memory beside a matrix product."""
    for row in costs():
        name, size, device = row["name"].rsplit("_", 2)
        if name == component:
            width, said = f"{int(size.split('x')[-1]):,}", row["details"]
            if "error" in said:
                return f"not known: {_plain(said['error'])}"
            times = 1 / row["ratio_to_limit"]
            return (
                f"{said['shape']}, vectors of {width} numbers ({device}): forward and backward "
                f"{times:.{1 if times >= 1 else 2}f} times those of {said['limit']}, {row['peak_mb_ours']:,} MB"
            )
    return "not measured"


def _of_claims(component: str, cls: type, family: Family) -> Iterator[str]:
    """Bullets: the comparisons whose two arms differ in the component, or in its own options."""
    own = {one.name for one in written_by_users(cls)}
    for finding in findings():
        claim = finding.claim
        used = {arm: _uses(component, _blocks(claim.config(arm, 1, 0), family), own) for arm in claim.arms}
        for outcome in finding.outcomes:
            arms = (outcome.comparison.arm, outcome.comparison.than)
            if outcome.arm and arms[1] in used and used[arms[0]] != used[arms[1]]:  # a first stage is no arm
                means = (sum(one.values()) / len(one) for one in (outcome.arm, outcome.than))
                numbers = ", ".join(f"{arm} {mean:.3f}" for arm, mean in zip(arms, means, strict=True))
                link = f"[{claim.name}](../claims.md#{claim.name})"
                yield f"- {link}, {page.title(outcome)}: {numbers} ({outcome.verdict})"


def _of_log(component: str) -> Iterator[str]:
    """Bullets: what the log has, with a link to the section."""
    sections = _log_sections()
    for title, lines in in_log().items():
        said = lines.get(component)
        if said is None:
            continue
        if title not in sections:
            sys.exit(f"{IN_LOG.name}: {LOG.name} has no section '{title}'")
        quoted, there = (set(re.findall(r"\d*\.\d+", text)) for text in (said, sections[title]))
        if quoted - there:
            sys.exit(f"{IN_LOG.name}: {component}: {', '.join(quoted - there)} is not in the log's section '{title}'")
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        yield f"- [log](../log.md#{anchor}): {said}"


def _log_sections() -> dict[str, str]:
    """title -> text."""
    parts = re.split(r"^## (.+)\n", LOG.read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@cache
def in_log() -> dict[str, dict[str, str]]:
    """Section of the log -> component -> what it says of its quality."""
    quoted = yaml.safe_load(IN_LOG.read_text(encoding="utf-8"))
    known = {component for family in FAMILIES.values() for component in family.registry.classes()}
    if unknown := {component for lines in quoted.values() for component in lines} - known:
        sys.exit(f"{IN_LOG.name}: there is no {', '.join(sorted(unknown))}")
    return quoted


@cache
def costs() -> list[dict[str, Any]]:
    return json.loads(COSTS.read_text(encoding="utf-8"))["rows"] if COSTS.is_file() else []


@cache
def findings() -> list[page.Finding]:
    """Of the results that docs/claims.md was written from."""
    results: dict[str, dict[str, dict[int, Any]]] = {}
    path = page.results_beside(CLAIMS)
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        result = json.loads(line)
        results.setdefault(result["claim"], {}).setdefault(result["arm"], {})[result["seed"]] = result
    return [page.found(claim, results[claim.name]) for claim in read_claims() if claim.name in results]


def _blocks(config: Mapping[str, Any], family: Family) -> Any:
    """What a config says of a family: a block, or those of its sources."""
    if family.key == "pairs":
        return [source.get("pairs") for source in config["data"]["train"]]
    return config.get(family.key)


def _uses(component: str, block: Any, own: set[str]) -> list[dict[str, Any]]:
    """The component's own options at each place where a block names it: in lists, as a `loss`, by task, too."""
    if block == component:
        return [{}]
    if isinstance(block, list):
        return [use for one in block for use in _uses(component, one, own)]
    if not isinstance(block, Mapping):
        return []
    found = [{key: block[key] for key in own & block.keys()}] if block.get("type") == component else []
    nested = (
        value
        for key, value in block.items()
        if key == "loss" or "type" not in block or isinstance(value, Mapping | list)
    )
    return found + [use for one in nested for use in _uses(component, one, own)]


def _about(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or inspect.getmodule(cls).__doc__ or "").split("\n\n")[0].replace("\n", " ")


def _paragraph(text: str) -> str:
    """An equation, or several lines of them, as it is; anything else, also one within sentences, as text."""
    lines = text.splitlines()
    equation = re.match(r"[\w`|()<>+*^, -]{1,40}? *(=|<-) ", lines[0]) and not re.search(r"\.\)?\s+[A-Z]|arXiv", text)
    return f"```text\n{text}\n```" if equation else "\n".join(_plain(line) for line in lines)


def _plain(text: str) -> str:
    """Signs that Markdown would take for its own, outside of code, escaped."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*<])", r"\\\1", piece) for piece in pieces)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
