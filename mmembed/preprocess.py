"""Content, role and instruction -> tensors. The same object trains and serves, and is saved with the model.

Two steps, so that lengths cost nothing extra: `tokenize` writes the prompts and encodes texts in a few calls of the
fast tokenizer (media enter by their size, read from the file header); `collate` pads some of those rows and opens
their media now. Grouping rows into batches between the two steps is the caller's business.

Exactness. The instruction's tokens are found by character offsets: a token that holds any character of the content
stays in the pool mask. Every pooling but the last token's also leaves out what follows the content (closing request,
assistant's header). Truncation removes content text from its end; all else stays whole, the marks around images
included. A length limit counts text tokens (with instruction and suffix); visual tokens are bounded by `max_pixels`.
Control tokens that stand literally in a user's text are broken up with a space: text cannot open a turn or an image.
Cost: about 25 us a short text on one core; offsets are only computed where a prompt has an instruction or a suffix.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, repeat
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
import torch

from mmembed.backbones import Family, Layout, Medium
from mmembed.backbones.shared_prefix import Prefix
from mmembed.content import Audio, Content, Document, Example, Image, Role, Text, Video
from mmembed.errors import ConfigError, MediaError, MmembedError
from mmembed.prompts import PromptStyle, Rendered

if TYPE_CHECKING:
    from tokenizers import Encoding

    from mmembed.feature_store import FeatureStore
    from mmembed.media import MediaStore

PIECE = 256  # inputs tokenized at a time: until it is a row, a token takes a hundred bytes, later some thirty
Range = tuple[int, int]
Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the document of a pair stands among those that an in-context reranker reads together.

    Attributes:
        list: which list it is of; its items have the same query and instruction, and stand one behind another.
        number: its name in the prompt, from 1.
        answer: the numbers of the relevant documents, best first, where the answer is to be predicted.
    """

    list: int
    number: int
    answer: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """What is embedded: content in its role, under an instruction. With a `document` it is a pair, whose query is the
    content: what a reranker judges; with a `place`, one of a list. `domain` conditions the routers of a mixture."""

    content: Content
    role: Role = "document"
    instruction: str | None = None
    document: Content | None = None
    place: Place | None = None
    domain: str | None = None

    @classmethod
    def of_query(cls, example: Example) -> Item:
        """A record's query, as training and what is decided by its vectors read it."""
        return cls(example.query, "query", example.instruction, domain=example.domain)

    @classmethod
    def of_document(cls, document: Document, instruction: str | None, domain: str | None = None) -> Item:
        """A record's document, under its source's `document_instruction` and `domain`."""
        return cls(document.content, "document", instruction, domain=domain)

    @classmethod
    def of_pair(cls, example: Example, document: Document, place: Place | None = None) -> Item:
        """A record's query with one of its documents."""
        return cls(example.query, "query", example.instruction, document.content, place, example.domain)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Limits of one input: text tokens by role, and the area of an image in pixels."""

    query_max_length: int = 512
    document_max_length: int = 512
    min_pixels: int | None = None
    max_pixels: int | None = None

    def of(self, item: Item) -> int:
        """Text tokens of an input; a pair has those of both."""
        if item.document is not None:
            return self.query_max_length + self.document_max_length
        return self.query_max_length if item.role == "query" else self.document_max_length


@dataclass(frozen=True, slots=True)
class Tail:
    """What stands behind the documents of a list (`mmembed.backbones.block_attention`).

    Attributes:
        list: which list it is of.
        prefix: tokens of block 0, with which each row of the list begins.
        ids: of the last block.
        signals: places there, of the tokens whose attention scores the documents.
        predicted: tokens at its end that a language-model loss predicts.
    """

    list: int
    prefix: int
    ids: tuple[int, ...]
    signals: tuple[int, ...]
    predicted: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenized input.

    Attributes:
        hidden: token ranges kept out of pooling.
        sizes: (width, height) of `images`.
        sounds: in order; `samples` of each, at the backbone's rate.
        digests: of `images` (`MediaStore.digest`), where they are known: a feature store need not read the files.
        predicted: ranges of tokens that a language-model loss predicts: those with any character of the content's
            texts. None where such a loss looks at no input of the batch.
        cut: the share of the content's text tokens that a length limit took off, of a pair of those of its document;
            1: nothing is left of them.
        tail: of a document of a list, whose rows go through the model together.
        domain: as of its item; rows of a batch have the same.
    """

    ids: Sequence[int]
    hidden: tuple[Range, ...] = ()
    images: tuple[Image, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    sounds: tuple[Audio, ...] = ()
    samples: tuple[int, ...] = ()
    digests: tuple[bytes, ...] = ()
    predicted: tuple[Range, ...] | None = None
    cut: float = 0.0
    tail: Tail | None = None
    domain: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def media(self) -> tuple[bool, bool]:
        """Whether it has images, and sounds: towers that it goes through."""
        return bool(self.images), bool(self.sounds)

    @property
    def kind(self) -> tuple[bool, bool, str]:
        """Rows of one kind go through the model together."""
        return *self.media, self.domain or ""


@dataclass(frozen=True, slots=True)
class Written:
    """One item's prompt, written out.

    Attributes:
        sizes: (width, height) of `images`.
        samples: of `sounds`, at the backbone's rate.
        chat: whether a chat template wrote it.
    """

    layout: Layout
    images: tuple[Image, ...]
    sizes: tuple[tuple[int, int], ...]
    sounds: tuple[Audio, ...]
    samples: tuple[int, ...]
    chat: bool


@dataclass(frozen=True, slots=True)
class StoredImages:
    """Images of a batch as a feature store knows them.

    Attributes:
        keys: of each image, in batch order.
        found: key -> its features.
        missing: keys of the images whose pixels are in the batch, in that order.
    """

    store: FeatureStore
    keys: tuple[bytes, ...]
    found: dict[bytes, dict[str, torch.Tensor]]
    missing: tuple[bytes, ...]


@dataclass
class ModelInputs:
    """A padded batch.

    Attributes:
        tensors: `input_ids` (B, T), `attention_mask` (B, T) and the family's media tensors.
        pool_mask: (B, T) bool, true on tokens that are neither padding nor instruction.
        padding: the side of the padding, or None where no row is padded.
        num_tokens: tokens of the inputs, padding not counted.
        filler: rows at the end that are no inputs: a dummy image (and sound) that keeps the towers in the graph. The
            model drops their vectors and adds them times 0.
        shared: how many first tokens all rows have in common, fillers included.
        images: features that a store has of the images, and those to compute, whose pixels are in `tensors`; None where
            there is no store, or no image.
        lengths: tokens of each row, where the model is to compute no padding (`mmembed.backbones.packed`); else empty.
        predicted: (B, T) bool, true on tokens that a language-model loss predicts; None where there is no such loss.
        prefix: the `shared` tokens, where they went through the model before (`EmbeddingModel.read_prefix`).
        tail: what stands behind rows that are the documents of one list.
        domain: of all rows.
    """

    tensors: dict[str, torch.Tensor]
    pool_mask: torch.Tensor
    padding: Side | None = None
    num_tokens: int = 0
    filler: int = 0
    shared: int = 0
    images: StoredImages | None = None
    lengths: tuple[int, ...] = ()
    predicted: torch.Tensor | None = None
    prefix: Prefix | None = None
    tail: Tail | None = None
    domain: str | None = None

    def __len__(self) -> int:
        return len(self.pool_mask) - self.filler

    def to(self, device: torch.device | str) -> ModelInputs:
        """A copy on `device`."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        pool_mask = self.pool_mask.to(device, non_blocking=True)
        predicted = None if self.predicted is None else self.predicted.to(device, non_blocking=True)
        return replace(self, tensors=moved, pool_mask=pool_mask, predicted=predicted)


class Preprocessor:
    """Turns items into `ModelInputs`.

    Args:
        processor: the backbone's processor, or its tokenizer for a text backbone.
        family: the backbone's family.
        append_eos: end each input that is not a chat with the tokenizer's end token.
        media: opens images; a default store (no root, default limits) where none is given.
        pool_suffix: whether what follows the content is pooled; the last token's pooling needs it.
        features: a store of the features of images, from `mmembed.models.vision_cache`; only images that it does not
            have are opened.
        touch_vision: append a dummy image (and sound) to batches without any. Needed where the vision tower is trained
            on several processes: DDP and ZeRO crash when one rank has images and another none.

    Raises:
        ConfigError: the prompt alone exceeds a length limit, or a chat prompt meets a backbone without a template.
        MmembedError: content that the backbone cannot read.
    """

    def __init__(
        self,
        processor: Any,
        family: Family,
        prompt: PromptStyle,
        lengths: Lengths,
        media: MediaStore | None = None,
        append_eos: bool = False,
        pool_suffix: bool = True,
        touch_vision: bool = False,
        features: FeatureStore | None = None,
    ) -> None:
        if media is None:
            from mmembed.media import MediaStore

            media = MediaStore()
        check_template(prompt, processor, family.config.model_type)
        self.processor, self.family, self.prompt, self.limits = processor, family, prompt, lengths
        self.media, self.features = media, features
        self.tokenizer = family.tokenizer
        self.append_eos, self.touch_vision = append_eos, touch_vision
        self.pool_suffix = pool_suffix or not prompt.mask_instruction
        self._control = control_tokens(family)
        self._media_ids = {self.tokenizer.convert_tokens_to_ids(token) for token in family.reserved}
        self._start, self._end = self._special_ids()
        self._chats = _ChatLayouts(processor, family)

    def lengths(self, items: Sequence[Item]) -> list[int]:
        """Tokens an item, visual tokens included; images are not decoded. For batches, keep the rows of `tokenize`."""
        return [len(row) for row in self.tokenize(items)]

    def __call__(self, items: Sequence[Item], padding_side: Side | None = None) -> ModelInputs:
        return self.collate(self.tokenize(items), padding_side)

    def tokenize(self, items: Sequence[Item], predict: Collection[Role] = ()) -> list[Row]:
        """Writes and encodes items, `PIECE` with one tokenizer call. Order is kept.

        Args:
            predict: roles whose texts a language-model loss predicts: rows say which tokens those are.
        """
        if self.prompt.reads_lists:
            return [row for _, some in groupby(items, _list_of) for row in self._list_rows(list(some), bool(predict))]
        rows = []
        for start in range(0, len(items), PIECE):
            piece = items[start : start + PIECE]
            written = [self._write(item) for item in piece]
            layouts = [one.layout for one in written]
            encodings = self._encode(piece, layouts, bool(predict) or any(self._hides(layout) for layout in layouts))
            for item, encoding, one in zip(piece, encodings, written, strict=True):
                texts = None if not predict else one.layout.texts if item.role in predict else ()
                counted = _texts_of_document(item, one.layout)
                row = self._row(encoding, one, self.limits.of(item), texts, counted)
                rows.append(row if item.domain is None else replace(row, domain=item.domain))
        return rows

    def shareable(self, row: Row) -> int:
        """How many first tokens of a row other rows may share: what stands before its media, but not all of it.

        Media tokens look alike and stand for different pictures. At least one token stays the row's own.
        """
        if self.family.unshared(bool(row.images)) is not None:
            return 0
        if not any(row.media):
            return len(row) - 1
        return next((at for at, token in enumerate(row.ids[:-1]) if token in self._media_ids), len(row) - 1)

    def collate(
        self, rows: Sequence[Row], padding_side: Side | None = None, shared: int = 0, packed: bool = False
    ) -> ModelInputs:
        """Pads rows (right by default) and opens their images. `shared` first tokens of all rows are the same.

        `packed` tells the model to compute nothing of the padding; the tensors are the same.
        """
        side: Side = padding_side or "right"
        tail = rows[0].tail
        if tail is not None:
            shared = tail.prefix
        missing = self._untouched(rows) if self.touch_vision else ()
        filler = int(bool(missing))
        if filler:
            dummy = self._dummy_row(missing)
            rows = [*rows, replace(dummy, ids=[*rows[0].ids[:shared], *dummy.ids], hidden=())]
        longest = max(len(row) for row in rows)
        ids = np.full((len(rows), longest), self.tokenizer.pad_token_id, dtype=np.int64)  # (B, T)
        attended = np.zeros((len(rows), longest), dtype=bool)  # (B, T)
        for index, row in enumerate(rows):
            start = 0 if side == "right" else longest - len(row)
            ids[index, start : start + len(row)] = row.ids
            attended[index, start : start + len(row)] = True
        pooled = attended.copy()  # (B, T)
        for index, row in enumerate(rows):
            start = 0 if side == "right" else longest - len(row)
            for first, stop in row.hidden:
                pooled[index, start + first : start + stop] = False
            if row.hidden and not pooled[index].any():  # nothing but instruction: its last token stands for it
                pooled[index, start + len(row) - 1] = True
        predicted = None
        if any(row.predicted is not None for row in rows):
            predicted = np.zeros((len(rows), longest), dtype=bool)  # (B, T)
            for index, row in enumerate(rows):
                start = 0 if side == "right" else longest - len(row)
                for first, stop in row.predicted or ():
                    predicted[index, start + max(first, 1) : start + stop] = True  # nothing is in front of the first
        tokens = sum(len(row) for row in rows)
        input_ids = torch.from_numpy(ids)
        tensors = {"input_ids": input_ids, "attention_mask": torch.from_numpy(attended).long()}
        pictured = [row for row in rows if row.images]
        tensors |= self.family.token_tensors(input_ids, bool(pictured))
        stored = None
        if pictured and self.features is not None:
            stored, pictures = self._look_up(pictured, self.features)
        else:
            pictures = [list(map(self._open, row.images, row.sizes)) for row in pictured]
        if pictures:
            tensors |= self.family.image_tensors(pictures)
        sounds = [self._hear(*one) for row in rows for one in zip(row.sounds, row.samples, strict=True)]
        if sounds:
            tensors |= self.family.audio_tensors(sounds)
        padding = None if tokens == len(rows) * longest else side
        real_tokens = tokens - (len(rows[-1]) if filler else 0)
        lengths = tuple(map(len, rows)) if packed and padding else ()
        told = None if predicted is None else torch.from_numpy(predicted)
        pool_mask = torch.from_numpy(pooled)
        return ModelInputs(
            tensors,
            pool_mask,
            padding,
            real_tokens,
            filler,
            shared,
            stored,
            lengths,
            told,
            tail=tail,
            domain=rows[0].domain,
        )

    def _untouched(self, rows: Sequence[Row]) -> Content:
        """A picture and a sound, each where the backbone has a tower for it and no row reaches that."""
        content: list[Image | Audio] = []
        if self.family.multimodal and not any(row.images for row in rows):
            content.append(Image(PIL.Image.new("RGB", (64, 64), (200, 100, 50))))
        if "audio" in self.family.media and not any(row.sounds for row in rows):
            rate = self.family.sampling_rate
            content.append(Audio(np.zeros(rate // 2, np.float32), rate))
        return tuple(content)

    def _dummy_row(self, content: Content) -> Row:
        """Any input with these media."""
        if self.prompt.reads_lists:
            (row,) = self.tokenize([Item((Text("query"),), document=content, place=Place(0, 1))])
            assert row.tail is not None, "it is of a list"
            return replace(row, ids=row.ids[row.tail.prefix :])
        (row,) = self.tokenize([Item(content, document=content if self.prompt.reads_pairs else None)])
        return row

    def _list_rows(self, items: Sequence[Item], predict: bool) -> list[Row]:
        """The documents of one list: rows that begin with block 0, and know the last block.

        Blocks are encoded apart, so that no token belongs to two of them.
        """
        prompt, first = self.prompt, items[0]
        if any(not isinstance(part, Text) for part in first.content):
            raise MmembedError(
                "query: an in-context reranker repeats it behind the documents and reads texts there; give a query of "
                "text, or take a reranker of pairs"
            )
        instruction = None if first.instruction is None else self._escape(first.instruction)
        before, behind = self._chats.frame(prompt.system) if prompt.chat else ("", "")
        opened, closed = prompt.render_list(first.content, instruction)
        opened, closed = replace(opened, prefix=before + opened.prefix), replace(closed, suffix=closed.suffix + behind)
        documents = []
        for item in items:
            assert item.document is not None and item.place is not None, "a prompt of lists reads documents of lists"
            documents.append(prompt.render_listed(item.document, item.place.number))
        written = [self._lay_out(replace(one, chat=False)) for one in (opened, closed, *documents)]
        answer = "" if first.place is None or first.place.answer is None else prompt.answer(first.place.answer)
        layouts = [one.layout for one in written]
        texts = [layout.text for layout in layouts]
        encodings = self._encode_texts([*texts, prompt.opening, answer], needs_offsets=True)
        limits = [self.limits.query_max_length] * 2 + [self.limits.document_max_length] * len(documents)
        rows = [
            self._row(encoding, replace(one, chat=True), limit)
            for encoding, one, limit in zip(encodings, written, limits, strict=False)
        ]
        start = [] if prompt.chat else self._start
        block, last = [*start, *rows[0].ids], [*rows[1].ids, *encodings[-2].ids]
        told = encodings[-1].ids if predict else []
        signals = tuple(range(len(last) - prompt.signals, len(last)))
        tail = Tail(_list_of(first), len(block), (*last, *told), signals, len(told))
        return [replace(row, ids=[*block, *row.ids], tail=tail) for row in rows[2:]]

    # Writing ----------------------------------------------------------------------------------------------------------

    @property
    def special_ids(self) -> tuple[list[int], list[int]]:
        """The tokens in front of an input that is no chat, and behind it."""
        return self._start, self._end

    def as_text(self, item: Item) -> str:
        """The prompt of an item with its special tokens, each image as the one token that processors expand: what a
        chat template has to write for a runtime that knows nothing of prompt styles. Nothing is cut."""
        rendered = self._render(item)
        parts, images, sounds = self._parts(rendered.content)
        if sounds:
            raise MmembedError(
                "audio: chat templates of other runtimes hold texts and images alone; leave the sounds out"
            )
        layout = self._layout(rendered, parts, [self.family.image_token for _ in images], [])
        if rendered.chat or layout.complete:
            return layout.text
        start, end = ("".join(self.tokenizer.convert_ids_to_tokens(ids)) for ids in (self._start, self._end))
        return start + layout.text + end

    def _write(self, item: Item) -> Written:
        """The prompt of one item."""
        return self._lay_out(self._render(item))

    def _render(self, item: Item) -> Rendered:
        instruction = None if item.instruction is None else self._escape(item.instruction)
        if item.document is None:
            return self.prompt.render(item.content, item.role, instruction)
        return self.prompt.render_pair(item.content, item.document, instruction)

    def _lay_out(self, rendered: Rendered) -> Written:
        parts, images, sounds = self._parts(rendered.content)
        sizes = tuple(self.media.size(image) for image in images)
        samples = tuple(self.media.samples(sound, self.family.sampling_rate) for sound in sounds)
        if images and not self.family.multimodal:
            raise MmembedError(
                f"image: the backbone '{self.family.config.model_type}' reads text only; "
                "use a vision-language backbone or drop the images"
            )
        seen = [self.family.image_markup(width, height, len(images)) for width, height in sizes]
        heard = [self.family.audio_markup(count) for count in samples]
        return Written(self._layout(rendered, parts, seen, heard), images, sizes, sounds, samples, rendered.chat)

    def _layout(
        self, rendered: Rendered, parts: Sequence[str | Medium], seen: Sequence[str], heard: Sequence[str]
    ) -> Layout:
        """Puts markups in the places of images and of sounds."""
        if not rendered.chat:
            seen = [self.family.frame_markup(markup) for markup in seen]
            heard = [self.family.frame_audio(markup) for markup in heard]
        of_kind = {Medium.IMAGE: iter(seen), Medium.AUDIO: iter(heard)}
        markups = [next(of_kind[part]) for part in parts if isinstance(part, Medium)]
        if rendered.chat:
            return self._chats.lay_out(rendered, parts, markups)
        return self.family.lay_out(rendered.prefix, parts, markups, rendered.suffix)

    def _parts(self, content: Content) -> tuple[list[str | Medium], tuple[Image, ...], tuple[Audio, ...]]:
        """Texts and places of media in order, the images, and the sounds. A video is its frames, in order."""
        parts: list[str | Medium] = []
        images: list[Image] = []
        sounds: list[Audio] = []
        for part in content:
            if isinstance(part, Text):
                text = self._escape(part.text)
                if parts and isinstance(parts[-1], str) and self._control.search(parts[-1] + text):
                    text = " " + text  # two halves of a control token
                parts.append(text)
            elif isinstance(part, Audio):
                parts.append(Medium.AUDIO)
                sounds.append(part)
            else:
                frames = part.frames if isinstance(part, Video) else (part,)
                parts += [Medium.IMAGE] * len(frames)
                images += frames
        return parts, tuple(images), tuple(sounds)

    def _escape(self, text: str) -> str:
        return broken_up(text, self._control)

    # Encoding ---------------------------------------------------------------------------------------------------------

    def _hides(self, layout: Layout) -> bool:
        """Whether tokens of it stay out of pooling."""
        instructed = self.prompt.mask_instruction and bool(layout.hidden)
        return instructed or (not self.pool_suffix and layout.suffix_start < len(layout.text))

    def _encode(self, items: Sequence[Item], layouts: Sequence[Layout], needs_offsets: bool) -> list[Encoding]:
        """Offsets, which take as long again, are of all items, or of those alone of which tokens will be cut."""
        encodings = self._encode_texts([layout.text for layout in layouts], needs_offsets)
        around = len(self._start) + len(self._end)
        long = [
            place
            for place, (item, layout, encoding) in enumerate(zip(items, layouts, encodings, strict=True))
            if len(encoding.ids) + around > self.limits.of(item)
            and (layout.hidden or layout.media or layout.suffix_start < len(layout.text))
        ]
        if long and not needs_offsets:
            again = self._encode_texts([layouts[place].text for place in long], needs_offsets=True)
            for place, encoding in zip(long, again, strict=True):
                encodings[place] = encoding
        return encodings

    def _encode_texts(self, texts: list[str], needs_offsets: bool) -> list[Encoding]:
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        encode = backend.encode_batch if needs_offsets else backend.encode_batch_fast
        return encode(texts, add_special_tokens=False)

    def _row(
        self,
        encoding: Encoding,
        written: Written,
        limit: int,
        texts: Sequence[Range] | None = None,
        counted: Sequence[Range] | None = None,
    ) -> Row:
        layout = written.layout
        start, end = ([], []) if written.chat or layout.complete else (self._start, self._end)
        ids = encoding.ids
        spans = list(layout.hidden) if self.prompt.mask_instruction else []
        if not self.pool_suffix and layout.suffix_start < len(layout.text):
            spans.append((layout.suffix_start, len(layout.text)))
        hidden = tuple(_token_range(encoding, span, len(ids)) for span in spans)
        predicted = tuple(_tokens_with(encoding, span, len(ids)) for span in texts or ())
        excess = len(ids) + len(start) + len(end) - limit
        cut = 0.0
        if excess > 0:
            dropped = self._dropped(encoding, layout, excess, limit)
            shown = layout.texts if counted is None else counted
            whole = [at for span in shown for at in range(*_token_range(encoding, span, len(ids)))]
            cut = len(dropped) / max(1, len(whole)) if len(dropped) < len(whole) else float(bool(dropped))
            gone = set(dropped)
            ids = [token for index, token in enumerate(ids) if index not in gone]
            hidden, predicted = _without(dropped, hidden), _without(dropped, predicted)
        if start:
            hidden = tuple((first + len(start) if first else 0, stop + len(start)) for first, stop in hidden)
            predicted = tuple((first + len(start), stop + len(start)) for first, stop in predicted)
        told = None if texts is None else predicted
        return Row(
            (start + ids + end) or [self.tokenizer.pad_token_id],
            hidden,
            written.images,
            written.sizes,
            written.sounds,
            written.samples,
            predicted=told,
            cut=cut,
        )

    def _dropped(self, encoding: Encoding, layout: Layout, excess: int, limit: int) -> list[int]:
        """Positions of the tokens to drop until the text tokens fit, ascending: the last of the content's texts."""
        total = len(encoding.ids)
        excess -= sum(stop - first for first, stop in (_token_range(encoding, span, total) for span in layout.media))
        if excess <= 0:
            return []
        content = [index for span in layout.texts for index in range(*_token_range(encoding, span, total))]
        if len(content) < excess:
            raise ConfigError(
                f"lengths: the prompt alone takes {limit + excess - len(content)} tokens, more than the limit of "
                f"{limit}; raise query_max_length / document_max_length or shorten the instruction"
            )
        return content[len(content) - excess :]

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text, and the end token where it is asked for."""
        backend = self.tokenizer.backend_tokenizer
        bare = backend.encode("a", add_special_tokens=False).ids
        full = backend.encode("a", add_special_tokens=True).ids
        at = next(index for index in range(len(full)) if full[index : index + len(bare)] == bare)
        start, end = full[:at], full[at + len(bare) :]
        if self.append_eos and not end:
            if self.tokenizer.eos_token_id is None:
                raise ConfigError("prompt.append_eos: the tokenizer has no end token; set append_eos: false")
            end = [self.tokenizer.eos_token_id]
        return start, end

    def _look_up(self, rows: Sequence[Row], store: FeatureStore) -> tuple[StoredImages, list[list[PIL.Image.Image]]]:
        """What the store has of the images of rows, and the pictures that it does not have, each once."""
        keys: list[bytes] = []
        found: dict[bytes, dict[str, torch.Tensor]] = {}
        missing: dict[bytes, PIL.Image.Image] = {}
        for row in rows:
            for image, size, digest in zip(row.images, row.sizes, row.digests or repeat(None), strict=False):
                encoded = self.media.read(image) if digest is None else None
                digest = self.media.digest(image, encoded) if digest is None else digest
                key = hashlib.blake2b(digest + repr(size).encode(), digest_size=16).digest()
                keys.append(key)
                if key in found or key in missing:
                    continue
                features = store.get(key)
                if features is not None:
                    found[key] = features
                    continue
                encoded = self.media.read(image) if encoded is None else encoded
                if row.digests and self.media.digest(image, encoded) != digest:  # or it would be kept under that name
                    raise _changed(image, "its bytes are others than when they were read for the batch")
                missing[key] = self._open(image, size, encoded)
        return StoredImages(store, tuple(keys), found, tuple(missing)), [[picture] for picture in missing.values()]

    def _hear(self, sound: Audio, samples: int) -> np.ndarray:
        found = self.media.listen(sound, self.family.sampling_rate)
        if len(found) != samples:
            raise MediaError(
                f"audio: {sound.source!r:.80}: it has {len(found)} samples but had {samples} when its tokens were "
                "counted; the file changed meanwhile, start again"
            )
        return found

    def _open(self, image: Image, size: tuple[int, int], encoded: bytes | None = None) -> Any:
        picture = self.media.open(image, encoded)
        if picture.size != size:
            raise _changed(image, f"it is {picture.size} pixels but was {size} when its tokens were counted")
        return picture


def _list_of(item: Item) -> int:
    """The list that an item is of."""
    if item.place is None:
        raise MmembedError("an in-context reranker reads lists of documents; score them with Reranker")
    return item.place.list


def _changed(image: Image, how: str) -> MediaError:
    return MediaError(f"image: {image.source!r:.80}: {how}; the file changed meanwhile, start again")


def check_template(prompt: PromptStyle, processor: Any, model_type: str) -> None:
    """Raises ConfigError where a style writes a chat and the backbone has no template for it."""
    probe = (Text("content"),)
    roles: tuple[Role, ...] = ("query", "document")
    if prompt.reads_lists:
        chats = prompt.chat
    elif prompt.reads_pairs:
        chats = prompt.render_pair(probe, probe, "instruction").chat
    else:
        chats = any(prompt.render(probe, role, "instruction").chat for role in roles)
    if chats and processor.chat_template is None:
        raise ConfigError(
            f"prompt: the style '{prompt.name}' writes a chat, and the backbone '{model_type}' has no chat template; "
            "choose the style plain or instruct"
        )
    if chats and prompt.reads_pairs:
        check_generation(processor, model_type, system=bool(prompt.system))


def check_generation(processor: Any, model_type: str, system: bool = True) -> None:
    """Raises ConfigError where the backbone has no chat template, or one that leaves no place for the answer (what
    came next would be the assistant's header, not what the assistant says), or refuses the turns.

    Args:
        system: whether a system turn comes first.
    """
    if processor.chat_template is None:
        raise ConfigError(
            f"model.name_or_path: the backbone '{model_type}' has no chat template; start from an instruction-tuned "
            "model, whose tokenizer brings one"
        )
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerBase

    multimodal = not isinstance(processor, PreTrainedTokenizerBase)
    turns: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": text}] if multimodal else text}
        for role, text in (("system", "task"), ("user", "question"), ("assistant", "ANSWER"))
    ][not system :]
    try:
        closed, asked = (
            processor.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=one)
            for one in (False, True)
        )
        whole = processor.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        refused = "a system turn, a question and an answer" if system else "a question and an answer"
        raise ConfigError(
            f"model.name_or_path: the chat template of '{model_type}' refuses {refused} ({error}); start from another "
            "model, or give its folder a template that takes them"
        ) from None
    header = whole.removeprefix(asked).partition("ANSWER")[0]
    if closed == asked and header.strip():  # templates without a header (Mistral's) write the answer next
        raise ConfigError(
            f"model.name_or_path: the chat template of '{model_type}' leaves no place for an answer: with "
            f"add_generation_prompt it does not write the assistant's header ({header.strip()!r}); correct the template"
        )


def template_options(processor: Any) -> dict[str, Any]:
    """Variables of the chat template for an answer without a thought before it, where it knows of thoughts (Qwen3)."""
    return {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}


class _ChatLayouts:
    """Writes prompts through the backbone's chat template, rendering each shape of conversation once.

    The template is rendered with sentinels in place of the texts; afterwards a prompt is string concatenation (5 us, a
    run of a short template takes 30), and the place of every piece is known.
    """

    PREFIX, SUFFIX, TEXT = "\ue000p\ue001", "\ue000s\ue001", "\ue000{}\ue001"

    def __init__(self, processor: Any, family: Family) -> None:
        self.processor, self.family = processor, family
        self._tokens = [family.image_token] if family.multimodal else []
        self._tokens += [family.audio_token] if "audio" in family.media else []
        self._shapes: dict[tuple[Any, ...], list[str]] = {}

    def lay_out(self, rendered: Rendered, parts: Sequence[str | Medium], markups: Sequence[str]) -> Layout:
        texts = [part for part in parts if isinstance(part, str)]
        pieces = self._shape(rendered, tuple(part if isinstance(part, Medium) else None for part in parts))
        position, out, hidden, media, words = 0, [], [], [], []
        inserted = iter(markups)
        for piece in pieces:
            if piece == self.PREFIX:
                text = rendered.prefix
                hidden.append((position, position + len(text)))
            elif piece == self.SUFFIX:
                text = rendered.suffix
            elif piece.startswith("\ue000"):
                text = texts[int(piece[1:-1])]
                words.append((position, position + len(text)))
            elif piece in self._tokens:
                text = next(inserted)
                media.append((position, position + len(text)))
            else:
                text = piece
            out.append(text)
            position += len(text)
        content = [*words, *media]
        head = min(start for start, _ in [*content, *hidden])
        return Layout(
            "".join(out),
            ((0, head), *hidden) if head else tuple(hidden),
            max(stop for _, stop in content),
            tuple(words),
            tuple(media),
        )

    def frame(self, system: str | None) -> tuple[str, str]:
        """What the template writes in front of the user's text, and behind it."""
        rendered = Rendered((), system=system, chat=True, add_generation_prompt=True)
        before, behind = self._render(rendered, (None,)).split(self.TEXT.format(0))
        return before, behind

    def _shape(self, rendered: Rendered, kinds: tuple[Medium | None, ...]) -> list[str]:
        """The template's output for this kind of conversation, split at sentinels and tokens of media."""
        flags = (bool(rendered.prefix), bool(rendered.suffix), rendered.add_generation_prompt)
        key = (rendered.system, *flags, *sorted(rendered.template.items()), kinds)
        if key not in self._shapes:
            self._shapes[key] = list(self._split(self._render(rendered, kinds)))
        return self._shapes[key]

    def _render(self, rendered: Rendered, kinds: tuple[Medium | None, ...]) -> str:
        slots: list[str | Medium] = [self.PREFIX] if rendered.prefix else []
        count = 0
        for kind in kinds:
            slots.append(self.TEXT.format(count) if kind is None else kind)
            count += kind is None
        slots += [self.SUFFIX] if rendered.suffix else []
        if self.family.multimodal:
            user: Any = [
                {"type": slot.value} if isinstance(slot, Medium) else {"type": "text", "text": slot} for slot in slots
            ]
            system: Any = [{"type": "text", "text": rendered.system}]
        else:
            user, system = "".join(slot for slot in slots if isinstance(slot, str)), rendered.system
        messages = [{"role": "system", "content": system}] if rendered.system else []
        messages.append({"role": "user", "content": user})
        known = str(self.processor.chat_template)
        options = {name: value for name, value in rendered.template.items() if name in known}
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=rendered.add_generation_prompt, **options
        )

    def _split(self, text: str) -> Iterator[str]:
        media = "".join(f"|{re.escape(token)}" for token in self._tokens)
        yield from (piece for piece in re.split(f"(\ue000.+?\ue001{media})", text) if piece)


def _texts_of_document(item: Item, layout: Layout) -> tuple[Range, ...]:
    """The texts of a pair's document, the last ones of it; of another input all. Of a document without text, all."""
    own = sum(isinstance(part, Text) for part in item.document or ())
    return layout.texts[len(layout.texts) - own :] if own else layout.texts


def _without(dropped: Sequence[int], ranges: tuple[Range, ...]) -> tuple[Range, ...]:
    """Ranges of tokens when those at the ascending positions `dropped` are gone."""
    return tuple((first - bisect_left(dropped, first), stop - bisect_left(dropped, stop)) for first, stop in ranges)


def broken_up(text: str, control: re.Pattern[str]) -> str:
    """Breaks up control tokens that stand literally in a user's text."""
    return control.sub(lambda found: broken_token(found[0]), text)


def broken_token(token: str) -> str:
    """What stands for a control token in a user's text."""
    return f"{token[0]} {token[1:]}" if len(token) > 1 else " "


def control_words(family: Family) -> list[str]:
    """The tokenizer's special tokens and the family's media tokens, the longest first."""
    special = {str(token) for token in family.tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(special | set(family.reserved), key=len, reverse=True)


def control_tokens(family: Family) -> re.Pattern[str]:
    """Matches control words."""
    tokens = control_words(family)
    return re.compile("|".join(re.escape(token) for token in tokens) or r"(?!)")  # the latter matches nowhere


def _token_range(encoding: Encoding, span: Range, total: int) -> Range:
    """The tokens whose characters all lie inside a character span."""
    first = _first_token_at(encoding, span[0], total) if span[0] else 0
    if first and first < total and encoding.offsets[first][0] < span[0]:
        first += 1
    return first, max(first, _first_token_at(encoding, span[1], total))


def _tokens_with(encoding: Encoding, span: Range, total: int) -> Range:
    """The tokens that hold any character of a span."""
    stop = _first_token_at(encoding, span[1], total)
    if stop < total and encoding.offsets[stop][0] < span[1]:
        stop += 1
    return min(_first_token_at(encoding, span[0], total), stop), stop


def _first_token_at(encoding: Encoding, character: int, total: int) -> int:
    """The first token that holds this character or a later one."""
    token = encoding.char_to_token(character)
    if token is not None:
        return token
    return next((index for index, (_, end) in enumerate(encoding.offsets) if end > character), total)
