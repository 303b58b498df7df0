"""The local benchmark: one row a task over folders of a data root (BEIR folders, labelled rows, sentence pairs).

A row says where the data lies, which columns a query and a document are made of, what to tell an instruction-following
model, and which number stands for the task. Nothing here opens a file or imports mteb, so listing tasks costs nothing;
`eval.mteb_tasks` turns a row into an mteb task.

A name is the folder, plus a part: `squad-en`, `xquad/de`, `dbpedia-entity/judged`. The slice that ships in the
repository and the full data share one layout; a task whose folder is missing is not offered.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmembed.errors import ConfigError, nearest

Kind = Literal["retrieval", "reranking", "sts", "classification", "clustering", "bitext"]
Category = Literal["t2t", "t2i", "i2t", "t2it", "i2i", "it2t", "it2i", "it2it", "t2c", "i2c"]

# mteb asks for ISO 639-3 codes with a script.
LANGUAGES = {
    "af": "afr-Latn", "ar": "arb-Arab", "bn": "ben-Beng", "de": "deu-Latn", "el": "ell-Grek", "en": "eng-Latn",
    "es": "spa-Latn", "fa": "fas-Arab", "fi": "fin-Latn", "fr": "fra-Latn", "he": "heb-Hebr", "hi": "hin-Deva",
    "id": "ind-Latn", "it": "ita-Latn", "ja": "jpn-Jpan", "kam": "kam-Latn", "ko": "kor-Hang", "lg": "lug-Latn",
    "mas": "mas-Latn", "nl": "nld-Latn", "nso": "nso-Latn", "pl": "pol-Latn", "pt": "por-Latn", "ro": "ron-Latn",
    "ru": "rus-Cyrl", "sv": "swe-Latn", "sw": "swa-Latn", "th": "tha-Thai", "tn": "tsn-Latn", "tr": "tur-Latn",
    "uk": "ukr-Cyrl", "vi": "vie-Latn", "xh": "xho-Latn", "yo": "yor-Latn", "zh": "zho-Hans", "zu": "zul-Latn",
}  # fmt: skip

# Of three letters: a language -> the one that it is counted to, whose code data may have in its place.
MACROLANGUAGES = {"cmn": "zho", "yue": "zho", "arb": "ara", "pes": "fas", "ekk": "est", "zsm": "msa", "swh": "swa",
                  "lvs": "lav", "nob": "nor", "nno": "nor", "als": "sqi", "khk": "mon", "npi": "nep", "ory": "ori",
                  "uzn": "uzb", "plt": "mlg", "azj": "aze", "pbt": "pus", "ydd": "yid"}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One task.

    Attributes:
        name: what a user types. folder: below the data root.
        kind: which protocol scores it.
        category: modalities of query and document as mteb writes them (`t2i` is text to image, `t2it` text to text with
            image); for classification the modality of the input.
        instruction: told to an instruction-following model with each query (symmetric tasks: with each input).
        languages: two-letter codes, keys of `LANGUAGES`.
        where: keeps only queries (or labelled rows) whose column has the value; a leading `!` keeps the others.
        query_column: column of queries.jsonl that is the query's text.
        document_text: column of images.parquet that stands in for the picture, so that a text model can take part.
        reverse: queries become documents and documents queries (image to text from a text to image set).
        query_picture: a query gets the picture of its document, which is given without it; those without are left out.
    """

    name: str
    folder: str
    kind: Kind
    instruction: str
    category: Category = "t2t"
    languages: tuple[str, ...] = ("en",)
    where: Mapping[str, str] = field(default_factory=dict)
    query_column: str = "text"
    document_text: str | None = None
    reverse: bool = False
    query_picture: bool = False

    @property
    def main_score(self) -> str:
        """The number that stands for the task, by its name in mteb."""
        return {"retrieval": "ndcg_at_10", "reranking": "map_at_1000", "sts": "cosine_spearman", "bitext": "accuracy",
                "classification": "accuracy", "clustering": "v_measure"}[self.kind]  # fmt: skip

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a model has to read."""
        known = {"t": "text", "i": "image"}
        return tuple(name for code, name in known.items() if code in self.category.replace("2c", ""))

    @property
    def has_images(self) -> bool:
        return "i" in self.category

    @property
    def overall(self) -> tuple[str, ...]:
        return ()

    @property
    def group(self) -> str:
        """The average that the task belongs to: `text retrieval`, `image retrieval`, ..."""
        if self.query_picture:
            return "retrieval by text with picture"
        if self.document_text is not None:
            return "retrieval of descriptions"
        elsewhere = "" if "en" in self.languages else ", other languages"
        if self.kind in ("retrieval", "reranking"):
            return f"{'image' if self.has_images else 'text'} {self.kind}{elsewhere}"
        named = {"sts": "sentence similarity", "bitext": "translation retrieval"}.get(self.kind, self.kind)
        return f"{'image ' if self.has_images else ''}{named}{elsewhere}"


QUESTION = "Given a question, retrieve passages that answer it"
CODE = "Given a description of a task, retrieve the code that does it"
PICTURE = "Given a text, retrieve the picture that it belongs to"
TOPIC = "Identify the topic of the sentence"
INTENT = "Identify the intent of the request"
SIMILAR = "Retrieve a text with the same meaning"

XQUAD = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
SIB200 = ("ar", "bn", "de", "en", "es", "fr", "hi", "id", "it", "ja", "ko", "pt", "ru", "sw", "th", "tr", "uk", "vi",
          "yo", "zh")  # fmt: skip
EMOJI = ("ar", "bn", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "id", "it", "ja", "ko", "nl", "pl", "pt",
         "ru", "sv", "sw", "th", "tr", "uk", "vi", "zh")  # fmt: skip
STORIES = ("af", "en", "fr", "kam", "lg", "mas", "nso", "pt", "sw", "tn", "xh", "zu")

ROWS: tuple[Row, ...] = (
    # --- text retrieval -------------------------------------------------------------------------------------------
    Row("squad-en", "squad-en", "retrieval", QUESTION),
    *(Row(f"xquad/{code}", f"xquad/{code}", "retrieval", QUESTION, languages=(code,)) for code in XQUAD),
    Row("jaquad-ja", "jaquad-ja", "retrieval", QUESTION, languages=("ja",)),
    Row("cmrc-zh", "cmrc-zh", "retrieval", QUESTION, languages=("zh",)),
    Row("medquad", "medquad", "retrieval", "Given a health question, retrieve the answer"),
    Row("mbpp", "mbpp", "retrieval", CODE),
    Row("odex", "odex", "retrieval", CODE, languages=("en", "es", "ja", "ru")),
    Row("tldr-commands/en", "tldr-commands", "retrieval", CODE, where={"lang": "en"}),
    Row("tldr-commands/other", "tldr-commands", "retrieval", CODE, where={"lang": "!en"},
        languages=("de", "es", "fr", "id", "it", "ko", "pl", "pt", "tr", "zh")),
    Row("openstax-glossary", "openstax-glossary", "retrieval", "Given a term, retrieve its definition"),
    Row("dbpedia-entity", "dbpedia-entity", "retrieval", "Given a query, retrieve the entities that answer it"),
    # --- reranking of judged pools --------------------------------------------------------------------------------
    Row("dbpedia-entity/judged", "dbpedia-entity", "reranking", "Given a query, retrieve the entities that answer it"),
    Row("argkp", "argkp", "reranking", "Given an argument, retrieve the key point that it supports"),
    Row("nlvr", "nlvr", "reranking", "Given a statement, retrieve the pictures of which it is true", category="t2i"),
    # --- text to image, image to text -----------------------------------------------------------------------------
    Row("openstax-figures", "openstax-figures", "retrieval", PICTURE, category="t2i"),
    Row("openstax-figures/image-to-text", "openstax-figures", "retrieval", "Retrieve the caption of the picture",
        category="i2t", where={"kind": "caption"}, reverse=True),
    *(Row(f"story-pages/{code}", "story-pages", "retrieval", PICTURE, category="t2i", where={"lang": code},
          languages=(code,)) for code in STORIES),
    *(Row(f"noto-emoji/{code}", "noto-emoji", "retrieval", "Given a name or keywords, retrieve the emoji",
          category="t2i", where={"lang": code}, languages=(code,)) for code in EMOJI),
    Row("tech-figures", "tech-figures", "retrieval", PICTURE, category="t2i"),
    Row("vega-charts", "vega-charts", "retrieval", "Given a description, retrieve the chart", category="t2i"),
    Row("squad-pages", "squad-pages", "retrieval", "Given a question, retrieve the page that answers it",
        category="t2i"),
    Row("recipes", "recipes", "retrieval", "Given a description of a dish, retrieve its recipe", category="t2it",
        where={"kind": "intro"}),
    Row("recipes/photo", "recipes", "retrieval", "Given a photograph of a dish, retrieve its recipe", category="i2t",
        where={"kind": "photo"}),
    Row("recipes/photo-and-intro", "recipes", "retrieval",
        "Given a photograph and a description of a dish, retrieve its recipe", category="it2t", where={"kind": "intro"},
        query_picture=True),
    Row("openstax-figures/picture-and-caption", "openstax-figures", "retrieval",
        "Given a picture and its caption, retrieve the description of the picture", category="it2t",
        where={"kind": "caption"}, document_text="alt", query_picture=True),
    # --- the same sets with a text in the picture's place: what the picture's description is worth to a text model --
    Row("openstax-figures/caption-to-alt", "openstax-figures", "retrieval", "Given a caption, retrieve the description",
        where={"kind": "caption"}, document_text="alt"),
    Row("tech-figures/title-to-alt", "tech-figures", "retrieval", "Given a title, retrieve the description",
        query_column="page_title", document_text="alt"),
    Row("noto-emoji/keywords-to-name", "noto-emoji", "retrieval", "Given keywords, retrieve the name of the emoji",
        where={"lang": "en", "kind": "keywords"}, document_text="name"),
    Row("recipes/intro-to-text", "recipes", "retrieval", "Given a description of a dish, retrieve its recipe",
        where={"kind": "intro"}),
    # --- sentence pairs ---------------------------------------------------------------------------------------------
    Row("stsb-en", "stsb-en", "sts", SIMILAR),
    Row("rosts-ro", "rosts-ro", "sts", SIMILAR, languages=("ro",)),
    Row("jsts-ja", "jsts-ja", "sts", SIMILAR, languages=("ja",)),
    Row("kluests-ko", "kluests-ko", "sts", SIMILAR, languages=("ko",)),
    *(Row(f"sib200-bitext/{code}-en", "sib200", "bitext", SIMILAR, where={"lang": code}, languages=(code, "en"))
      for code in SIB200 if code != "en"),
    # --- classification and clustering ------------------------------------------------------------------------------
    Row("banking77", "banking77", "classification", INTENT),
    Row("clinc150", "clinc150", "classification", INTENT),
    *(Row(f"sib200/{code}", "sib200", "classification", TOPIC, where={"lang": code}, languages=(code,))
      for code in SIB200),
    Row("clothing", "clothing", "classification", "Identify the kind of clothing", category="i2c"),
    Row("banking77-clustering", "banking77", "clustering", INTENT),
    Row("clinc150-clustering", "clinc150", "clustering", INTENT),
    *(Row(f"sib200-clustering/{code}", "sib200", "clustering", TOPIC, where={"lang": code}, languages=(code,))
      for code in SIB200),
)  # fmt: skip


def available(root: Path) -> list[Row]:
    """The rows whose folder lies under `root`. Raises ConfigError if there is none."""
    rows = [row for row in ROWS if (root / row.folder).is_dir()]
    if not rows:
        raise ConfigError(
            f"--data-root {root}: no folder of the local benchmark is there (for example "
            f"{root / ROWS[0].folder}); point it at the repository's data/ or at the full data"
        )
    return rows


def select(rows: Sequence[Row], patterns: Iterable[str]) -> list[Row]:
    """The rows named by `patterns` (names or globs such as `xquad/*`), each once, in the order of the patterns.

    Raises:
        ConfigError: a pattern matches nothing; the nearest name is suggested.
    """
    chosen: dict[str, Row] = {}
    for pattern in patterns:
        matches = [row for row in rows if fnmatch.fnmatchcase(row.name, pattern)]
        if not matches:
            known = {row.name for row in rows}
            elsewhere = [row.name for row in ROWS if fnmatch.fnmatchcase(row.name, pattern)]
            hint = "its folder is not under the data root" if elsewhere else nearest(pattern, known)
            raise ConfigError(f"--tasks: no task '{pattern}' here; {hint}")
        chosen |= {row.name: row for row in matches}
    return list(chosen.values())
