"""A prompt style as a chat template: what makes a runtime that knows no prompt styles write a model's own inputs.

A Jinja template travels with a folder, and sentence-transformers, transformers and vLLM all render it, so the style,
the side, the instruction, the end token and the breaking up of control tokens go into one. It is not written by hand
for each style: the style itself is asked what it writes around, between and behind texts and images (marks stand for
them), and the answers become tables of strings. What a template of this form cannot write, a style may still do:
`check` compares the token ids of both, and an export with a difference does not happen.

Messages: `system` holds the instruction; `query`, `document` or `user` the content, where the variable `task` says the
side of `user` (sentence-transformers sets it in `encode_query` and `encode_document`), and without it is a document. Of
a reranker there are two, `query` and `document`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import PIL.Image

from mmembed.content import Content, Image, Part, Role, Text
from mmembed.errors import MmembedError
from mmembed.preprocess import Item, broken_token, control_words

if TYPE_CHECKING:
    from mmembed.preprocess import Preprocessor

TOLD = "\ue002told\ue003"  # stands for the instruction
_TEXT, _PICTURE = Text("\ue002text\ue003"), Image(PIL.Image.new("RGB", (32, 32)))
Table = dict[str, dict[str, str]]
Instructions = Mapping[str, str]  # side -> the instruction of inputs that bring none

_HEAD = """\
{#- Written by `mmembed export`: the prompts that this model was trained with. A system message holds the instruction;
    SIDES -#}
{%- set control = CONTROL -%}
{%- set written = WRITTEN -%}
{%- set usual = USUAL -%}
{%- set image = IMAGE -%}
{%- macro plain(text) -%}
  {%- set one = namespace(text=text) -%}
  {%- for token, broken in control -%}{%- set one.text = one.text | replace(token, broken) -%}{%- endfor -%}
  {{- one.text -}}
{%- endmacro -%}
"""

_EMBEDDER = """\
{%- set now = namespace(out="", told=none, last=none, texts=false, pictures=false, contents=0,
                        side=task if task is defined and task in written else "document") -%}
INSTRUCTION
{%- for message in messages -%}
  {%- if message.role != "system" -%}
    {%- set now.contents = now.contents + 1 -%}
    {%- if message.role in written -%}{%- set now.side = message.role -%}{%- endif -%}
    {%- if message.role not in ["user", "query", "document"] or now.contents > 1 -%}
      {{- raise_exception("give one message of the role user, query or document, and at most a system message") -}}
    {%- endif -%}
    {%- set now.told = now.told or usual[now.side] -%}
    {%- if now.told and REFUSES -%}{{- raise_exception(REFUSES) -}}{%- endif -%}
    {%- set table = written[now.side]["told" if now.told else "bare"] -%}
    {%- if message.content is string -%}
      {%- set now.out = table.opening.text ~ plain(message.content) -%}
      {%- set now.last = "text" -%}
      {%- set now.texts = true -%}
    {%- else -%}
      {%- for part in message.content -%}
        {%- set kind = "text" if part.type == "text" else "image" -%}
        {%- if part.type not in ["text", "image", "image_url"] or kind not in table.opening -%}
          {{- raise_exception("this model reads no part of the type " ~ part.type ~ HINT) -}}
        {%- endif -%}
        {%- set now.out = now.out ~ (table.joints[now.last ~ " " ~ kind] if now.last else table.opening[kind]) -%}
        {%- if kind == "image" -%}
          {%- set now.out = now.out ~ image -%}
          {%- set now.pictures = true -%}
        {%- else -%}
          {%- set now.out = now.out ~ plain(part.text) -%}
          {%- if part.text -%}{%- set now.texts = true -%}{%- endif -%}
        {%- endif -%}
        {%- set now.last = kind -%}
      {%- endfor -%}
    {%- endif -%}
    {%- set mixture = "mixed" if now.texts and now.pictures else "image" if now.pictures else "text" -%}
    {%- set now.out = now.out ~ table.closing[mixture ~ " " ~ now.last] -%}
  {%- endif -%}
{%- endfor -%}
{{- now.out | replace(TOLD, plain(now.told or "")) or EMPTY -}}
"""

_RERANKER = """\
{%- set now = namespace(out="", told=none, last=none, between="query", sides="") -%}
INSTRUCTION
{%- set now.told = now.told or instruction | default(none) or usual["query"] -%}
{%- set table = written["query"]["told" if now.told else "bare"] -%}
{%- for message in messages -%}
  {%- if message.role != "system" -%}
    {%- set now.sides = now.sides ~ " " ~ message.role -%}
    {%- set now.between = "bridge" -%}
    {%- if message.content is string -%}
      {%- set pieces = message.content.split(IMAGE_STRING) if IMAGE_STRING else [message.content] -%}
      {%- for piece in pieces -%}
        {%- if not loop.first -%}
          {%- set now.out = now.out ~ (table[now.between][now.last ~ " image"] if now.last else table.opening.image)
                            ~ image -%}
          {%- set now.last = "image" -%}
          {%- set now.between = message.role -%}
        {%- endif -%}
        {%- if piece or pieces | length == 1 -%}
          {%- set now.out = now.out ~ (table[now.between][now.last ~ " text"] if now.last else table.opening.text)
                            ~ plain(piece) -%}
          {%- set now.last = "text" -%}
          {%- set now.between = message.role -%}
        {%- endif -%}
      {%- endfor -%}
    {%- else -%}
      {%- for part in message.content -%}
        {%- set kind = "text" if part.type == "text" else "image" -%}
        {%- if part.type not in ["text", "image", "image_url"] or kind not in table.opening -%}
          {{- raise_exception("this model reads no part of the type " ~ part.type ~ HINT) -}}
        {%- endif -%}
        {%- set now.out = now.out ~ (table[now.between][now.last ~ " " ~ kind] if now.last else table.opening[kind])
                          ~ (image if kind == "image" else plain(part.text)) -%}
        {%- set now.last = kind -%}
        {%- set now.between = message.role -%}
      {%- endfor -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if now.sides != " query document" -%}
  {{- raise_exception("give a message of the role query, then one of the role document") -}}
{%- endif -%}
{{- (now.out ~ table.closing[now.last]) | replace(TOLD, plain(now.told or "")) -}}
"""

_INSTRUCTION = """\
{%- for message in messages -%}
  {%- if message.role == "system" and message.content is string -%}
    {%- set now.told = message.content -%}
  {%- elif message.role == "system" -%}
    {%- set now.told = message.content | map(attribute="text") | join("") -%}
  {%- endif -%}
{%- endfor -%}"""


def template_of(
    preprocessor: Preprocessor, instructions: Instructions, refuses: str = "", image_strings: bool = False
) -> str:
    """The template of a model that reads single contents, or pairs.

    Args:
        instructions: of a side's inputs that bring none.
        refuses: why no input may bring an instruction; empty where it may.
        image_strings: a content that is a string may hold images, as the string that vLLM's scoring puts there.

    Raises:
        MmembedError: the style writes what no such template writes.
    """
    family = preprocessor.family
    pairs = preprocessor.prompt.reads_pairs
    sides: tuple[Role, ...] = ("query",) if pairs else ("query", "document")
    table = _pair_table if pairs else _table
    image = family.image_token if family.multimodal else ""
    values = {
        "CONTROL": [[token, broken_token(token)] for token in control_words(family)],
        "WRITTEN": {
            side: {"bare": table(preprocessor, side, None), "told": table(preprocessor, side, TOLD)} for side in sides
        },
        "USUAL": {side: instructions.get(side) for side in sides},
        "IMAGE_STRING": family.frame_markup(image) if image and image_strings else "",
        "IMAGE": image,
        "TOLD": TOLD,
        "REFUSES": refuses,
        "EMPTY": family.tokenizer.pad_token,
        "HINT": "; give a video's frames as images" if image else "",
    }
    about = "then come a query and a document." if pairs else "query, document or user (see `task`) holds the content."
    text = _HEAD.replace("SIDES", about) + (_RERANKER if pairs else _EMBEDDER).replace("INSTRUCTION", _INSTRUCTION)
    return re.sub(r"\b(" + "|".join(values) + r")\b", lambda found: _literal(values[found[0]]), text)


def _literal(value: Any) -> str:
    """A value as Jinja writes it. Its strings know JSON's escapes, and other characters as they are."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _table(preprocessor: Preprocessor, side: Role, told: str | None) -> Table:
    """What stands before the first part, between two, and behind the last, by their kinds."""

    def around(*content: Part) -> list[str]:
        return _around(preprocessor, preprocessor.as_text(Item(content, side, told)), content)

    two = around(_TEXT, _TEXT)
    table: Table = {"opening": {"text": two[0]}, "joints": {"text text": two[1]}, "closing": {"text text": two[2]}}
    if preprocessor.family.multimodal:
        pictures = around(_PICTURE, _PICTURE)
        table["opening"]["image"] = pictures[0]
        table["joints"]["image image"], table["closing"]["image image"] = pictures[1:]
        _, table["joints"]["image text"], table["closing"]["mixed text"] = around(_PICTURE, _TEXT)
        _, table["joints"]["text image"], table["closing"]["mixed image"] = around(_TEXT, _PICTURE)
        behind = around(_PICTURE, Text(""))[1]  # an empty text makes no mixture
        table["closing"]["image text"] = behind.removeprefix(table["joints"]["image text"])
    return table


def _pair_table(preprocessor: Preprocessor, side: Role, told: str | None) -> Table:
    """The same of a query and a document, with what stands between the two."""

    def around(query: Content, document: Content) -> list[str]:
        written = preprocessor.as_text(Item(query, side, told, document))
        return _around(preprocessor, written, (*query, *document))

    kinds: dict[str, Part] = {"text": _TEXT, "image": _PICTURE} if preprocessor.family.multimodal else {"text": _TEXT}
    table: Table = {name: {} for name in ("opening", "query", "bridge", "document", "closing")}
    for first, part in kinds.items():
        table["opening"][first] = around((part,), (_TEXT,))[0]
        table["closing"][first] = around((_TEXT,), (part,))[-1]
        for second, other in kinds.items():
            name = f"{first} {second}"
            table["bridge"][name] = around((part,), (other,))[1]
            table["query"][name] = around((part, other), (_TEXT,))[1]
            table["document"][name] = around((_TEXT,), (part, other))[2]
    return table


def _around(preprocessor: Preprocessor, written: str, content: Content) -> list[str]:
    """What is written before the parts, between them and behind.

    Raises:
        MmembedError: a part stands there not once.
    """
    pieces = []
    for part in content:
        mark = part.text if isinstance(part, Text) else preprocessor.family.image_token
        if not mark:
            continue
        before, found, written = written.partition(mark)
        if not found:
            raise MmembedError(
                f"prompt: the style '{preprocessor.prompt.name}' does not write each part of a content once and in "
                "order, which a chat template would have to do"
            )
        pieces.append(before)
    return [*pieces, written]
