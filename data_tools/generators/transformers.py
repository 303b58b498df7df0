"""transformers in this process, for tiny runs: no environment of its own, no server, one batch at a time.

A thread takes what was asked, up to `batch_size` requests of like length (padded on the left), and generates.
Each request draws with a generator of its own, by its seed, from probabilities in float64, and is blind to the padding:
its answer is the same in any batch, up to the rounding of `dtype` (which is why float32 is the default). A schema is
kept by llguidance (the extra `data`): it masks the tokens that no valid JSON can go on with.
"""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from data_tools.generators import Answer, Generator, GeneratorDown, Message, Request, RequestFailed, parts_of
from data_tools.generators.identity import model_identity
from data_tools.generators.wire import picture_failed
from mmembed.content import Image
from mmembed.errors import MediaError, MmembedError
from mmembed.media import MediaStore
from mmembed.registry import Positive

if TYPE_CHECKING:
    import PIL.Image

    from data_tools.decoding import Row

_WHERE = "generators.transformers"
_PATIENCE = 0.01  # seconds that a batch waits for more


class TransformersGenerator(Generator):
    """A language model that transformers loads, in this process.

    Args:
        model: a folder, a name that transformers loads, or 'mmembed-nano'.
        device: None takes an accelerator where there is one.
        dtype: of the weights; `auto` is what they were saved in.
        batch_size: requests that are answered together.
        trust_remote_code: run the python code that the folder brings.
    """

    name: ClassVar[str] = "transformers"
    reads: ClassVar[frozenset[str]] = frozenset({"text", "image"})

    def __init__(
        self,
        model: str,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: Positive = 32,
        trust_remote_code: bool = False,
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.batch_size, self.trust_remote_code = batch_size, trust_remote_code
        self._asked: queue.SimpleQueue[tuple[Request, Future[Answer]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    @property
    def capacity(self) -> int:
        return 4 * self.batch_size

    def fingerprint(self) -> Any:
        return [self.name, model_identity(self.model, _WHERE), self.dtype]

    def start(self, media: MediaStore) -> None:
        if self._thread is not None or self._closing.is_set():
            raise GeneratorDown(f"{_WHERE}: it is started already, or closed")
        self._writer = Writer(self.model, self.device, self.dtype, self.trust_remote_code, media)
        self._thread = threading.Thread(target=self._work, args=(self._writer,), daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Answer]:
        if self._thread is None or self._closing.is_set():
            raise GeneratorDown(f"{_WHERE}: it is {'closed' if self._closing.is_set() else 'not started'}")
        future: Future[Answer] = Future()
        self._asked.put((request, future))
        return future

    def close(self) -> None:
        self._closing.set()
        self._asked.put(None)
        if self._thread is not None:
            self._thread.join()

    def _work(self, writer: Writer) -> None:
        """Answers until it is closed; whatever happens, no future is left open."""
        waiting: list[tuple[Prepared, Future[Answer]]] = []
        over = GeneratorDown(f"{_WHERE}: it was closed before the answer came")
        try:
            self._serve(writer, waiting)
        except Exception as error:  # of any kind: the callers wait for the futures
            over = GeneratorDown(f"{_WHERE}: it broke ({type(error).__name__}: {error}); the same command goes on")
        for _, future in waiting:
            if not future.done():
                future.set_exception(over)
        while not (self._closing.is_set() and self._asked.empty()):
            if (item := self._asked.get()) is not None:
                item[1].set_exception(over)

    def _serve(self, writer: Writer, waiting: list[tuple[Prepared, Future[Answer]]]) -> None:
        """Takes batches of like length out of what waits; the oldest request is in the next one."""
        while not self._closing.is_set():
            self._gather(writer, waiting)
            if not waiting:
                continue
            oldest = waiting[0][0]
            like = [one for one in waiting if bool(one[0].pictures) == bool(oldest.pictures)]
            like.sort(key=lambda one: abs(one[0].length - oldest.length))
            batch = like[: self.batch_size]
            self._answer(writer, batch)
            taken = {id(future) for _, future in batch}
            waiting[:] = [one for one in waiting if id(one[1]) not in taken]

    def _gather(self, writer: Writer, waiting: list[tuple[Prepared, Future[Answer]]]) -> None:
        """Prepares what was asked; waits for the first, and `_PATIENCE` seconds for a batch to be full."""
        while not (self._asked.empty() and len(waiting) >= self.batch_size):
            try:
                item = self._asked.get(timeout=_PATIENCE if waiting else None)
            except queue.Empty:
                return
            if item is None:
                return
            request, future = item
            try:
                waiting.append((writer.prepare(request), future))
            except MmembedError as error:
                future.set_exception(error)
            except Exception as error:  # of any kind: a chat template raises what it likes
                found = f"{request.key}: {type(error).__name__}: {error}"
                future.set_exception(RequestFailed(found, "rejected by the engine"))

    def _answer(self, writer: Writer, batch: list[tuple[Prepared, Future[Answer]]]) -> None:
        """Answers together; where that fails, one by one, so that a request fails alone."""
        try:
            answers = writer.write([prepared for prepared, _ in batch], self._closing.is_set)
        except Exception as error:  # of any kind: the callers wait for the futures
            if len(batch) > 1:
                for one in batch:
                    self._answer(writer, [one])
                return
            [(prepared, future)] = batch
            future.set_exception(RequestFailed(f"{prepared.request.key}: {type(error).__name__}: {error}", "failed"))
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if answer is None:
                future.set_exception(GeneratorDown(f"{_WHERE}: it was closed before the answer came"))
            else:
                future.set_result(answer)


@dataclass(frozen=True)
class Prepared:
    """A request with its prompt written out. length: tokens of the text; matcher: llguidance's, of a schema."""

    request: Request
    prompt: str
    pictures: tuple[PIL.Image.Image, ...]
    length: int
    matcher: Any


class Writer:
    """The model. Raises GeneratorDown: it cannot be loaded, or has no chat template."""

    def __init__(self, model: str, device: str | None, dtype: str, trust_remote_code: bool, media: MediaStore) -> None:
        import torch
        from transformers import GenerationConfig

        from mmembed.backbones.loading import load_language_model
        from mmembed.inference.devices import check_device

        check_device(device)
        backbone = load_language_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
        self._media, self._family = media, backbone.family
        self._processor, self._tokenizer = backbone.processor, backbone.family.tokenizer
        if self._processor.chat_template is None:
            raise GeneratorDown(f"{_WHERE}.model: {model} has no chat template; give a model that was tuned to answer")
        self._tokenizer.padding_side = "left"
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded: Any = backbone.model
        self._model = loaded.to(self._device).eval()
        named = self._model.generation_config.eos_token_id
        ends = [named] if isinstance(named, int) else list(named or ())
        self._ends = list(dict.fromkeys([*ends, self._tokenizer.eos_token_id]))
        self._model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self._ends, pad_token_id=self._tokenizer.pad_token_id
        )
        text = backbone.config.get_text_config()
        self._longest, self._vocabulary = int(text.max_position_embeddings), int(text.vocab_size)
        self._grammars: Any = None  # llguidance's tokenizer, at the first schema

    def prepare(self, request: Request) -> Prepared:
        """Raises RequestFailed: a picture that cannot be opened, a prompt that is too long, a wrong schema."""
        pictures = []
        for part in parts_of(request.messages):
            if part["type"] == "image":
                if not self._family.multimodal:
                    raise RequestFailed(f"{request.key}: the model reads no pictures", kind="picture: not read")
                try:
                    pictures.append(self._media.open(Image(part["image"])))
                except MediaError as error:
                    raise picture_failed(error) from None
        prompt = self._processor.apply_chat_template(
            [_for_template(message) for message in request.messages], tokenize=False, add_generation_prompt=True
        )
        length = len(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if length >= self._longest:
            found = f"{request.key}: {length} tokens, the model takes {self._longest} with the answer"
            raise RequestFailed(found, kind="rejected by the engine")
        return Prepared(request, prompt, tuple(pictures), length, self._matcher(request))

    def write(self, batch: Sequence[Prepared], stopped: Callable[[], bool]) -> list[Answer | None]:
        """The answers; None of a row that was not at its end when all was to stop."""
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        from data_tools.decoding import Drawing, Ended

        rows = [_row(one) for one in batch]
        inputs = self._inputs(batch)
        lengths = inputs["attention_mask"].sum(1).tolist()
        for row, length in zip(rows, lengths, strict=True):
            row.limit = max(1, min(row.limit, self._longest - length))

        def decode(tokens: list[int]) -> str:
            return self._tokenizer.decode(tokens, skip_special_tokens=True)

        drawing: Any = Drawing(rows, self._ends, decode)
        ended: Any = Ended(rows, stopped)
        with torch.inference_mode():
            self._model.generate(
                **inputs,
                max_new_tokens=max(row.limit for row in rows),
                logits_processor=LogitsProcessorList([drawing]),
                stopping_criteria=StoppingCriteriaList([ended]),
            )
        return [
            row.finish and Answer(row.text, row.finish, length, len(row.tokens))
            for row, length in zip(rows, lengths, strict=True)
        ]

    def _inputs(self, batch: Sequence[Prepared]) -> Any:
        prompts: dict[str, Any] = {"text": [one.prompt for one in batch]}
        if batch[0].pictures:
            prompts["images"] = [list(one.pictures) for one in batch]
        written = self._processor(**prompts, padding=True, add_special_tokens=False, return_tensors="pt")
        return written.to(self._device)

    def _matcher(self, request: Request) -> Any:
        if request.schema is None:
            return None
        if find_spec("llguidance") is None:
            raise GeneratorDown(f"{_WHERE}: it keeps a JSON schema by llguidance; pip install 'mmembed[data]'")
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        if self._grammars is None:
            self._grammars = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._ends)
        grammar = LLMatcher.grammar_from_json_schema(dict(request.schema), overrides={"whitespace_flexible": False})
        matcher = LLMatcher(self._grammars, grammar, log_level=0)
        if matcher.is_error():
            raise RequestFailed(f"{request.key}: the schema cannot be kept ({matcher.get_error()})", kind="schema")
        return matcher


def _row(prepared: Prepared) -> Row:
    import torch

    from data_tools.decoding import Row

    sampling = prepared.request.sampling
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    if prepared.matcher is not None:
        prepared.matcher.reset()
    return Row(sampling, sampling.max_tokens, torch.Generator().manual_seed(seed), prepared.matcher)


def _for_template(message: Message) -> dict[str, Any]:
    """Pictures as the marks that templates look for; they themselves go to the processor."""
    content = message["content"]
    if not isinstance(content, str):
        content = [{"type": "image"} if part["type"] == "image" else part for part in content]
    return {"role": message["role"], "content": content}
