"""MRB, the multimodal reranking benchmark of GMR (arXiv 2510.14824), as declared data: 40 sets in nine columns.

The paper's own list could not be read here. Known are its counts: 40 sets, English, one picture a side, 14 of text
to text, 5 of text to visual documents, 3 of text with picture to text with picture, and that sets whose retriever is
near its ceiling are left out. These are the counts of UMRB, GME's retrieval benchmark of 47 sets (arXiv 2412.16855),
less two of text and five of visual documents: so the sets are UMRB's, and **which seven were left out is our
reading** (WebQA and Quora of text; the two French sets of ViDoRe and three of its four generated ones). The paper's
candidates are the first 100 of GME-2B; numbers over other candidates do not compare with its table.

No number of a single set was found either, only averages of columns, in notes on the paper, and one of them speaks
against the reading: GME-2B has 66.4 over the five sets of T→VD, but 86.1 (nDCG@5) over ViDoRe's ten (Table 2 of arXiv
2507.04590), so the five that were left out would have more than 100. The five are others, or measured otherwise.

Sets are loaded by mteb (`eval.sets`), which pins the revision of each. Columns of which no set can be read are filled
by sets of the local benchmark, which stand in and are named; a column without any stays empty.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from eval.tasks.local import Category, Row

COLUMNS: Mapping[str, tuple[str, Category]] = {
    "T→T": ("single-modal", "t2t"),
    "I→I": ("single-modal", "i2i"),
    "T→I": ("cross-modal", "t2i"),
    "T→VD": ("cross-modal", "t2i"),
    "I→T": ("cross-modal", "i2t"),
    "T→IT": ("fused", "t2it"),
    "IT→T": ("fused", "it2t"),
    "IT→I": ("fused", "it2i"),
    "IT→IT": ("fused", "it2it"),
}  # VD: a visual document, the picture of a page


@dataclass(frozen=True)
class Set:
    """One set of the benchmark.

    Attributes:
        tasks: of mteb, whose mean is the set's number.
    """

    name: str
    column: str
    tasks: tuple[str, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """One a task, by its name in mteb; the instruction is mteb's."""
        category = COLUMNS[self.column][1]
        return tuple(Row(task, task, "retrieval", "", category=category) for task in self.tasks)


_FORUMS = ("Android", "English", "Gaming", "Gis", "Mathematica", "Physics", "Programmers", "Stats", "Tex", "Unix",
           "Webmasters", "Wordpress")  # fmt: skip


def _sets(column: str, *tasks: str) -> tuple[Set, ...]:
    return tuple(Set(task, column, (task,)) for task in tasks)


SETS: tuple[Set, ...] = (
    *_sets("T→T", "ArguAna", "ClimateFEVER"),
    Set("CQADupstack", "T→T", tuple(f"CQADupstack{forum}Retrieval" for forum in _FORUMS)),
    *_sets("T→T", "DBPedia", "FEVER", "FiQA2018", "HotpotQA", "MSMARCO", "NFCorpus", "NQ", "SCIDOCS", "SciFact",
           "Touche2020", "TRECCOVID"),
    *_sets("I→I", "NIGHTSI2IRetrieval"),
    *_sets("T→I", "VisualNewsT2IRetrieval", "Fashion200kT2IRetrieval", "MSCOCOT2IRetrieval", "Flickr30kT2IRetrieval"),
    *_sets("T→VD", "VidoreArxivQARetrieval", "VidoreDocVQARetrieval", "VidoreInfoVQARetrieval",
           "VidoreTatdqaRetrieval", "VidoreSyntheticDocQAEnergyRetrieval"),
    *_sets("I→T", "VisualNewsI2TRetrieval", "Fashion200kI2TRetrieval", "MSCOCOI2TRetrieval", "Flickr30kI2TRetrieval"),
    *_sets("T→IT", "WebQAT2ITRetrieval", "EDIST2ITRetrieval"),
    *_sets("IT→T", "OVENIT2TRetrieval", "InfoSeekIT2TRetrieval", "ReMuQIT2TRetrieval", "OKVQAIT2TRetrieval",
           "LLaVAIT2TRetrieval"),
    *_sets("IT→I", "FashionIQIT2IRetrieval", "CIRRIT2IRetrieval"),
    *_sets("IT→IT", "OVENIT2ITRetrieval", "EncyclopediaVQAIT2ITRetrieval", "InfoSeekIT2ITRetrieval"),
)  # fmt: skip

# Rows of the local benchmark. None has pictures as queries and documents without the query's own among them.
STAND_INS: Mapping[str, tuple[str, ...]] = {
    "T→T": ("squad-en", "xquad/en", "medquad", "mbpp", "tldr-commands/en", "openstax-glossary", "dbpedia-entity"),
    "T→I": ("openstax-figures", "story-pages/en", "noto-emoji/en"),
    "T→VD": ("squad-pages", "tech-figures", "vega-charts"),
    "I→T": ("openstax-figures/image-to-text", "recipes/photo"),
    "T→IT": ("recipes",),
    "IT→T": ("openstax-figures/picture-and-caption", "recipes/photo-and-intro"),
}
