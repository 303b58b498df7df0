"""A query and a document, and the question whether the one answers the other: the input of a reranker.

system    = Judge whether the Document meets the requirements ... the answer can only be "yes" or "no".
user      = <Instruct>: instruction, <Query>: query, <Document>: document, each in a line
assistant = (nothing yet: its header ends the input)

The strings are those of Qwen3-Reranker (arXiv 2506.05176) and GMR (arXiv 2510.14824). The query comes first, so that
all documents of a query begin with the same tokens, which are computed once.

When: rerankers; it reads pairs alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmembed.content import Content, Role, Text
from mmembed.errors import ConfigError
from mmembed.prompts import PromptStyle, Rendered

SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "{yes}" or "{no}".'
)
INSTRUCTION = "Given a search query, retrieve relevant passages that answer the query"


def two_words(where: str, words: Sequence[object]) -> tuple[str, str]:
    """Raises ConfigError unless these are two words."""
    if isinstance(words, str) or len(words) != 2 or not all(isinstance(word, str) for word in words):
        raise ConfigError(f'{where}: found {words!r}; give two words, quoted: ["yes", "no"]')
    return str(words[0]), str(words[1])


class Judge(PromptStyle):
    """The chat that asks whether a document answers a query.

    Args:
        system: the system turn; `{yes}` and `{no}` stand for the words.
        instruction: of pairs that bring none.
        words: those of the head.
        thinking: leave the template to begin a thought, where it can (Qwen3); False closes it.
    """

    name = "judge"
    reads_pairs = True

    def __init__(
        self,
        system: str = SYSTEM,
        instruction: str = INSTRUCTION,
        words: Sequence[str] = ("yes", "no"),
        thinking: bool = False,
    ) -> None:
        super().__init__(mask_instruction=False, append_eos=False)
        yes, no = two_words("prompt.words", words)
        self.words = (yes, no)
        self.system = system.replace("{yes}", yes).replace("{no}", no)
        self.instruction, self.thinking = instruction, thinking

    def render(self, content: Content, role: Role, instruction: str | None) -> Rendered:
        raise ConfigError("prompt 'judge' writes a query with a document; an embedder has one content: choose another")

    def render_pair(self, query: Content, document: Content, instruction: str | None) -> Rendered:
        content = (
            Text(f"<Instruct>: {instruction or self.instruction}\n<Query>: "),
            *query,
            Text("\n<Document>: "),
            *document,
        )
        options = {} if self.thinking else {"enable_thinking": False}
        return Rendered(content, system=self.system, chat=True, add_generation_prompt=True, template=options)
