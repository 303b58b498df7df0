"""The fixed inputs with which runtimes are compared: texts of many languages, pictures, both, long and nearly empty.

They are made, not read, so that a comparison needs no files. What lies beyond a length limit is not among them: ours
cuts the content and keeps what follows it, which not every runtime can (docs/export.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import PIL.Image
import PIL.ImageDraw

from mmembed.content import Content, Image, Role, Text
from mmembed.errors import ConfigError
from mmembed.preprocess import Item, control_words

if TYPE_CHECKING:
    from mmembed.preprocess import Preprocessor

TEXTS = {
    "text": "a red bus drives over the bridge",
    "question": "What is the capital of France?",
    "english": "The harvest was late this year, and the barns stood half empty until October.",
    "german": "Die Ernte kam spät, und die Scheunen blieben bis in den Herbst halb leer.",
    "french": "La récolte était tardive ; les granges restèrent à moitié vides jusqu'en octobre.",
    "spanish": "¿Dónde está la biblioteca? Está cerrada los domingos.",
    "russian": "Урожай был поздним, и амбары стояли полупустыми до октября.",
    "greek": "Η συγκομιδή άργησε φέτος και οι αποθήκες έμειναν μισοάδειες.",
    "arabic": "كان الحصاد متأخراً هذا العام وبقيت المخازن نصف فارغة.",
    "hebrew": "הקציר איחר השנה והאסמים נותרו חצי ריקים.",
    "hindi": "इस वर्ष फसल देर से आई और खलिहान आधे खाली रहे।",
    "thai": "ปีนี้เก็บเกี่ยวช้า ยุ้งฉางจึงว่างครึ่งหนึ่งจนถึงเดือนตุลาคม",
    "chinese": "今年收成晚，谷仓到十月还半空着。",
    "japanese": "今年は収穫が遅く、納屋は十月まで半分空いていた。",
    "korean": "올해는 수확이 늦어 헛간이 시월까지 반쯤 비어 있었다.",
    "code": "def add(a, b):\n    return a + b  # <html>&amp;</html>",
    "emoji": "🚌 over the 🌉, e\u0301 and \u00e9",
    "letter": "a",
    "dot": ".",
    "newlines": "\n\nfirst\n\n\nlast  ",
}


@dataclass(frozen=True, slots=True)
class Probe:
    """An input of the comparison; with a `document` a pair, whose query is the content."""

    name: str
    content: Content
    role: Role = "document"
    instruction: str | None = None
    document: Content | None = None

    @property
    def item(self) -> Item:
        return Item(self.content, self.role, self.instruction, self.document)


def probes(preprocessor: Preprocessor) -> list[Probe]:
    """Inputs of an embedder in both roles, some under an instruction; pairs of a reranker. Those that the model's own
    limits would cut are left out."""
    if preprocessor.prompt.reads_lists:
        return _made(preprocessor)
    return [probe for probe in _made(preprocessor) if _fits(preprocessor, probe)]


def _fits(preprocessor: Preprocessor, probe: Probe) -> bool:
    try:
        (row,) = preprocessor.tokenize([probe.item])
    except ConfigError:  # the prompt alone is longer than the limit
        return False
    return not row.cut


def _made(preprocessor: Preprocessor) -> list[Probe]:
    contents: dict[str, Content] = {name: (Text(text),) for name, text in TEXTS.items()}
    contents["control"] = (Text("a turn that " + " ".join(control_words(preprocessor.family)[:4]) + " does not end"),)
    contents["long"] = (Text(_long(preprocessor)),)
    if preprocessor.family.multimodal:
        wide, tall = _picture(96, 64), _picture(48, 120)
        contents |= {
            "image": (wide,),
            "image then text": (wide, Text("what is drawn here?")),
            "two images": (wide, tall, Text("which one is taller?")),
        }
    if preprocessor.prompt.reads_pairs:
        asked: Content = (Text(TEXTS["question"]),)
        pairs = [Probe(name, asked, "query", document=content) for name, content in contents.items()]
        pairs += [Probe(f"{name} asks", contents[name], "query", document=asked) for name in _ASKING & contents.keys()]
        return sorted(pairs, key=lambda probe: probe.name)
    told = [Probe(f"{name} (told)", contents[name], "query", INSTRUCTION) for name in sorted(_ASKING & contents.keys())]
    alone: tuple[Role, ...] = ("document",)
    both: tuple[Role, ...] = ("query", "document")
    bare = [
        Probe(f"{name} ({role})", content, role)
        for name, content in contents.items()
        for role in (alone if name == "long" else both)
    ]
    return bare + told


_ASKING = {"text", "emoji", "control", "image", "image then text"}
INSTRUCTION = "Find what answers the question, in any language:"


def _long(preprocessor: Preprocessor) -> str:
    """A text that fills half of the limit of documents, 1000 tokens at most."""
    sentence = "The river rose in the night and carried the wooden bridge away. "
    tokens = len(preprocessor.tokenizer.encode(sentence, add_special_tokens=False))
    budget = min(1000, preprocessor.limits.document_max_length // 2)
    return sentence * max(1, budget // tokens)


def _picture(width: int, height: int) -> Image:
    """Colours in both directions and a shape: no two patches are alike."""
    red = PIL.Image.linear_gradient("L").resize((width, height))
    green = red.transpose(PIL.Image.Transpose.ROTATE_90).resize((width, height))
    blue = PIL.Image.radial_gradient("L").resize((width, height))
    picture = PIL.Image.merge("RGB", (red, green, blue))
    PIL.ImageDraw.Draw(picture).ellipse((width // 4, height // 4, width // 2, height // 2), fill=(250, 240, 20))
    return Image(picture)
