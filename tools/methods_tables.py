"""Writes the component tables of docs/methods.md from the registries, so that the page cannot drift from the code.

python tools/methods_tables.py            # rewrite the tables
python tools/methods_tables.py --check    # exit 1 and say so when the page is out of date
"""

import inspect
import re
import sys
from pathlib import Path

from mmembed.data.format_base import FORMATS
from mmembed.losses import LOSSES
from mmembed.objectives import OBJECTIVES
from mmembed.pooling import POOLINGS
from mmembed.prompts import PROMPTS
from mmembed.registry import Registry

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
FAMILIES = {"poolings": POOLINGS, "prompts": PROMPTS, "losses": LOSSES, "objectives": OBJECTIVES, "formats": FORMATS}
FROM_THE_RUN = {
    "hidden_size",
    "embedding_size",
    "args",
    "kwargs",
    "media",
}  # constructor arguments that a user does not write


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    fresh = page
    for family, registry in FAMILIES.items():
        block = f"<!-- table: {family} -->\n{table(registry)}\n<!-- end -->"
        fresh, count = re.subn(rf"<!-- table: {family} -->.*?<!-- end -->", lambda _, b=block: b, fresh, flags=re.S)
        if count != 1:
            sys.exit(f"{PAGE.name}: needs exactly one '<!-- table: {family} -->' ... '<!-- end -->', found {count}")
    if "--check" in sys.argv[1:]:
        if fresh != page:
            sys.exit(f"{PAGE.name}: the tables are out of date; run python tools/methods_tables.py")
    else:
        PAGE.write_text(fresh, encoding="utf-8")


def table(registry: Registry) -> str:  # type: ignore[type-arg]
    lines = ["| `type` | what it is | options |", "|---|---|---|"]
    for name, cls in registry.classes().items():
        about = (
            inspect.cleandoc(cls.__doc__ or inspect.getmodule(cls).__doc__ or "").split("\n\n")[0].replace("\n", " ")
        )
        lines.append(f"| `{name}` | {about.replace('|', chr(92) + '|')} | {options(cls)} |")
    return "\n".join(lines)


def options(cls: type) -> str:
    """`name=default` of every constructor argument that a user writes."""
    shown = []
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.name in FROM_THE_RUN:
            continue
        required = parameter.default is inspect.Parameter.empty
        shown.append(f"`{parameter.name}`" if required else f"`{parameter.name}={parameter.default!r}`")
    return ", ".join(shown) or "none"


if __name__ == "__main__":
    main()
