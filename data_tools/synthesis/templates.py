"""What a language model is asked: a YAML file that users copy and edit.

    system: You write search queries ...           optional
    user: |
      Document: {{ document }}                     Jinja; pictures of the item stand in front of it
    examples:                                      optional, shown as turns of the chat before the question
      - {document: "...", answer: {query: "..."}}  the variables of `user`, and the answer: a text, or JSON

An unknown variable, or one that an example lacks, is an error when the config is read, not at record 70,000. Rendering
costs 30 us.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from data_tools.generators import Message
from mmembed.content import Image, Text, Video, to_content
from mmembed.data.records import content_to_json
from mmembed.errors import ConfigError, MmembedError, nearest

PACKAGED = Path(__file__).with_name("templates")
_KEYS = ("system", "user", "examples")


class Template:
    """A chat with variables.

    Args:
        name: of a packaged template.
        path: of a user's own, which takes its place.
        below_root: finds it.
        variables: what `user` may name; a template need not name all of them.
    """

    def __init__(
        self, name: str, path: str | None, below_root: Callable[[str], Path], variables: Sequence[str]
    ) -> None:
        self.path = PACKAGED / f"{name}.yaml" if path is None else below_root(path)
        self.variables = tuple(variables)
        from jinja2 import TemplateError

        tree = _read(self.path)
        self.source = tree
        environment = _environment()
        try:
            self._system = environment.from_string(tree.get("system", ""))
            self._user = environment.from_string(tree["user"])
            self._check_names(environment, tree)
        except TemplateError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        self.examples = tuple(self._example(one, place) for place, one in enumerate(tree.get("examples", [])))

    def messages(
        self, values: Mapping[str, Any], pictures: Sequence[str] = (), demonstrations: Sequence[tuple[str, str]] = ()
    ) -> tuple[Message, ...]:
        """The chat for these values.

        Args:
            pictures: sources of images, in front of the question.
            demonstrations: questions and answers, shown behind the template's own examples.
        """
        chat: list[Message] = []
        system = self._render(self._system, values)
        if system:
            chat.append({"role": "system", "content": system})
        for question, answer in (*self.examples, *demonstrations):
            chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        question = self._render(self._user, values)
        parts: list[dict[str, str]] = [{"type": "image", "image": source} for source in pictures]
        content: Any = [*parts, {"type": "text", "text": question}] if parts else question
        return (*chat, {"role": "user", "content": content})

    def question(self, values: Mapping[str, Any]) -> str:
        """The question alone, of a demonstration."""
        return self._render(self._user, values)

    def _example(self, one: Any, place: int) -> tuple[str, str]:
        where = f"{self.path}: examples[{place}]"
        if not isinstance(one, Mapping) or "answer" not in one:
            raise ConfigError(f"{where} has no 'answer'; give the variables of `user`, and an answer")
        values = {key: value for key, value in one.items() if key != "answer"}
        for key in values:
            if key not in self.variables:
                raise ConfigError(f"{where}: unknown variable '{key}'; {nearest(key, self.variables)}")
        return self._render(self._user, values), as_answer(one["answer"])

    def _check_names(self, environment: Any, tree: Mapping[str, Any]) -> None:
        """Raises ConfigError for a variable that does not exist, wherever it stands."""
        from jinja2 import meta

        for key in ("system", "user"):
            for name in sorted(meta.find_undeclared_variables(environment.parse(tree.get(key, "")))):
                if name not in self.variables:
                    raise ConfigError(
                        f"{self.path}: {key}: there is no variable '{name}'; {nearest(name, self.variables)}"
                    )

    def _render(self, template: Any, values: Mapping[str, Any]) -> str:
        import jinja2

        try:
            return str(template.render(values)).strip()
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.path}: {error}; variables are {', '.join(self.variables)}") from None


def as_answer(value: Any) -> str:
    """An answer as a model is to give it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def text_of(content: Any) -> str:
    """The texts of JSON content, one a line."""
    return "\n".join(part.text for part in to_content(content) if isinstance(part, Text))


def reworded(content: Any, text: str) -> Any:
    """JSON content with a text in the place of its own, behind its media."""
    return content_to_json((*(part for part in to_content(content) if not isinstance(part, Text)), Text(text)))


def pictures_of(content: Any) -> list[str]:
    """The sources of its pictures, frames of videos among them.

    Raises:
        MmembedError: it holds a sound, which no generator reads.
    """
    found: list[str] = []
    for part in to_content(content):
        if isinstance(part, Image):
            found.append(str(part.source))
        elif isinstance(part, Video):
            found += [str(frame.source) for frame in part.frames]
        elif not isinstance(part, Text):
            raise MmembedError("no generator reads audio; leave it out of the sources")
    return found


def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    return SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(file.name for file in PACKAGED.glob("*.yaml")))
        raise ConfigError(f"{path}: {error.strerror}; copy one of {PACKAGED.name}/ ({known})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({error})") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("user"), str):
        raise ConfigError(f"{path}: has no 'user', the text of the question")
    for key in tree:
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key '{key}'; {nearest(key, _KEYS)}")
    if not isinstance(tree.get("system", ""), str) or not isinstance(tree.get("examples", []), list):
        raise ConfigError(f"{path}: 'system' is a text and 'examples' a list")
    return tree
