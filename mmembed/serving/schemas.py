"""JSON of requests to what is asked, strictly.

The schema is OpenAI's with vLLM's additions: conversations with pictures in `messages` or `input`, `instruction` of a
reranking. `prompt_name` is the name that sentence-transformers and text-embeddings-inference have for the role, and
`instruction` the same for embeddings. A field that is not known here is refused: an option that is accepted and ignored
gives vectors that somebody takes for others. `user` alone has no effect, by OpenAI's definition.

Everything is parsed in one pass by pydantic's own JSON reader, which bounds nesting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from mmembed.errors import nearest
from mmembed.serving.refusal import Refusal

OF_VLLM = {  # fields of vLLM's server that this one has no such thing for -> why
    "add_generation_prompt": "the checkpoint says how its prompt ends",
    "continue_final_message": "the checkpoint says how its prompt ends",
    "add_special_tokens": "the checkpoint says which tokens its inputs have",
    "chat_template": "the checkpoint has its prompt",
    "chat_template_kwargs": "the checkpoint has its prompt; an instruction is the field 'instruction'",
    "truncate_prompt_tokens": "the checkpoint says how long its inputs may be, and longer ones are cut",
    "embed_dtype": "vectors are float32",
    "use_activation": "the checkpoint says whether its vectors are normalised",
    "priority": "requests are taken in turn",
}
_TAGS = ("text", "chat", "image_url")
_LONGEST = 300  # characters of a name in a message
_SHOWN = 60  # of a value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: StrictStr


class ImageUrl(_Strict):
    url: StrictStr


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _parts(value: Any) -> Any:
    """A text as the one part that it is."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Parts = Annotated[list[Part], Field(min_length=1), BeforeValidator(_parts)]


class Message(_Strict):
    """`query` and `document` are roles of the templates that `mmembed export` writes; `user` leaves the side open."""

    role: Literal["system", "user", "query", "document"]
    content: Parts


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "chat"


Input = Annotated[
    Annotated[StrictStr, Tag("text")] | Annotated[list[Message], Tag("chat")],
    Discriminator(_kind),
]


def _inputs(value: Any) -> Any:
    """One input or many, as a list."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(f"give a text, a list of texts, or chat messages; found {_named(value)}")
    if not value:
        raise ValueError("an empty list has nothing to embed; give at least one text")
    if all(isinstance(one, dict) for one in value):
        return [value]
    for index, one in enumerate(value):
        if isinstance(one, int) or (isinstance(one, list) and any(isinstance(token, int) for token in one)):
            raise ValueError("token ids are not taken, because the model's own prompt stands around them; give texts")
        if not isinstance(one, str | list):
            raise ValueError(f"entry {index} is {_named(one)}; give a text, or a list of chat messages")
    return value


Inputs = Annotated[list[Input], BeforeValidator(_inputs)]


class EmbeddingsRequest(_Strict):
    """Body of `/v1/embeddings`: `input`, or `messages` in its place."""

    model: StrictStr | None = None
    input: Inputs | None = None
    messages: Inputs | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = None
    prompt_name: Literal["query", "document"] | None = None
    instruction: StrictStr | None = None
    user: StrictStr | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> EmbeddingsRequest:
        if (self.input is None) == (self.messages is None):
            found = "neither" if self.input is None else "both"
            raise ValueError(f"give 'input' or 'messages'; found {found}")
        return self

    @property
    def inputs(self) -> Sequence[str | list[Message]]:
        return self.input or self.messages or []


class Multimodal(_Strict):
    """A query or document of parts, as vLLM writes it."""

    content: Parts


Judged = Annotated[
    Annotated[StrictStr, Tag("text")] | Annotated[Multimodal, Tag("chat")],
    Discriminator(_kind),
]


class RerankRequest(_Strict):
    """Body of `/rerank`: that of Jina and Cohere, with vLLM's pictures and instruction."""

    model: StrictStr | None = None
    query: Judged
    documents: Annotated[list[Judged], Field(min_length=1)]
    top_n: Annotated[StrictInt, Field(ge=0)] | None = None
    return_documents: StrictBool = True
    instruction: StrictStr | None = None
    user: StrictStr | None = None


def parse(body: bytes, schema: type[BaseModel]) -> Any:
    """The request in a body. Raises Refusal (400) with the first field that is wrong."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _refusal(first, schema) from None


def _refusal(error: ErrorDetails, schema: type[BaseModel]) -> Refusal:
    where = ".".join(str(place) for place in error["loc"] if place not in _TAGS)
    if error["type"] == "json_invalid":
        return Refusal(400, f"the body is no JSON that can be read ({error['ctx']['error']}); correct it")
    if error["type"] == "extra_forbidden":
        name = str(error["loc"][-1])
        why = OF_VLLM.get(name) or nearest(name, schema.model_fields) if len(error["loc"]) == 1 else "remove it"
        return Refusal(400, f"{where[:_LONGEST]}: no such field; {why}"[: 2 * _LONGEST], where[:_LONGEST])
    if error["type"] == "missing":
        return Refusal(400, f"{where}: is missing; give it", where)
    message = str(error["msg"]).removeprefix("Value error, ")
    found = "" if error["type"] == "value_error" else f"; found {_named(error['input'])}"
    return Refusal(400, f"{where}: {message}{found}" if where else f"{message}{found}", where or None)


def _named(value: Any) -> str:
    """What a value is, for a message: its kind, and a short one itself."""
    names = {"NoneType": "null", "dict": "an object", "list": "a list", "str": "a text", "bool": "a truth value"}
    name = names.get(type(value).__name__, "a number")
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    shown = repr(value[:_SHOWN] if isinstance(value, str) else value)[:_SHOWN] if plain else ""
    return f"{name} ({shown})" if shown else name
