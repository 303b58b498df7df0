"""A model's own judgements, and its own words for the gold ones: what `s3ft_select` chooses from.

Of each document of a record the model that is to be tuned is asked what training will ask it, a reason and then yes or
no (docs/reranking.md, answers in words); where the document has a `rationale`, the gold one, it also rewrites that. An
answer counts where its verdict is that of the document's relevance; it goes into `meta.own`, the rewritten one into
`meta.paraphrase`. For orders (`[2] > [1]`) there is nothing to select: an order that is equivalent to the gold one is
the same text. Cost: two answers a document with a rationale, one of others. All gold reasons are rewritten, because
whether an own answer is right may be for another model to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from data_tools.synthesis.stages import Ask, AskingStage, Context, Item, Kind, Unusable, Work
from data_tools.synthesis.templates import Template, pictures_of, text_of
from data_tools.synthesis.wording import filler, language_name
from mmembed.errors import ConfigError
from mmembed.generation.judgements import read_judgement
from mmembed.prompts.judge import INSTRUCTION, two_words
from mmembed.registry import Positive


class S3FTAnswers(AskingStage):
    """What a reranker that answers in words says before it is tuned.

    Args:
        words: what the last line of an answer is, as `answer.words` of the training config.
        language: ISO 639-1 code of reasons; None takes any.
        template: a YAML file in the place of the packaged one; its text is the prompt that training writes.
        paraphrase_template: of the rewriting.
    """

    name: ClassVar[str] = "s3ft_answers"
    takes: ClassVar[frozenset[Kind]] = frozenset({"records"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        words: Sequence[str] = ("yes", "no"),
        language: str | None = None,
        max_tokens: Positive | None = None,
        temperature: float | None = None,
        template: str | None = None,
        paraphrase_template: str | None = None,
    ) -> None:
        language_name(language)
        self.words, self.language = two_words(f"{self.name}.words", words), language
        if len({word.strip().lower() for word in self.words}) < 2:
            raise ConfigError(f"{self.name}.words: found {list(words)}; give two different words")
        self.max_tokens, self.temperature = max_tokens, temperature
        self.template = Template(self.name, template, below_root, ("instruction", "query", "document", "yes", "no"))
        self.rewriting = Template(
            "s3ft_paraphrase", paraphrase_template, below_root, ("query", "document", "rationale")
        )

    def fingerprint(self) -> Any:
        return [self.template.source, self.rewriting.source]

    def work(self, item: Item, context: Context) -> Work:
        documents = item["documents"]
        reworded = [place for place, one in enumerate(documents) if one.get("rationale")]
        asks = [self._judgement(item, place) for place in range(len(documents))]
        values = yield [*asks, *(self._paraphrase(item, place) for place in reworded)]
        own, paraphrases = values[: len(documents)], dict(zip(reworded, values[len(documents) :], strict=True))
        told = []
        for place, document in enumerate(documents):
            meta, right = dict(document.get("meta", {})), document.get("relevance", 1.0) > 0
            if own[place] is None:
                context.notes["lost judgements"] += 1
            elif own[place][1] != right:
                context.notes["wrong verdict"] += 1
            else:
                context.notes["right verdict"] += 1
                meta["own"] = own[place][0]
            if place in paraphrases:
                context.notes["lost paraphrases"] += paraphrases[place] is None
            if paraphrases.get(place) is not None:
                meta["paraphrase"] = paraphrases[place]
            told.append({**document, "meta": meta})
        return [{**item, "documents": told}]

    def _judgement(self, item: Item, place: int) -> Ask:
        content = item["documents"][place]["content"]
        values = {
            "instruction": item.get("instruction") or INSTRUCTION, "query": text_of(item["query"]),
            "document": text_of(content), "yes": self.words[0], "no": self.words[1],
        }  # fmt: skip
        pictures = [*pictures_of(item["query"]), *pictures_of(content)]
        verdict = self.words[0] if item["documents"][place].get("relevance", 1.0) > 0 else self.words[1]
        sample = f"{filler(f'own-{place}', 30)}\n{verdict}"
        return self._optional(f"own-{place}", self.template.messages(values, pictures), sample, self._read)

    def _paraphrase(self, item: Item, place: int) -> Ask:
        document = item["documents"][place]
        values = {
            "query": text_of(item["query"]), "document": text_of(document["content"]),
            "rationale": document["rationale"],
        }  # fmt: skip
        messages = self.rewriting.messages(values)
        return self._optional(f"paraphrase-{place}", messages, filler(f"paraphrase-{place}", 30), str.strip)

    def _optional(self, name: str, messages: Any, sample: str, read: Callable[[Any], Any]) -> Ask:
        return Ask(name, messages, sample, read, None, self.max_tokens, self.temperature, self.language, optional=True)

    def _read(self, answer: str) -> tuple[str, bool]:
        reason, relevant = read_judgement(answer, self.words)
        if relevant is None:
            raise Unusable("no verdict", answer[-100:])
        if not reason:
            raise Unusable("no reason", answer[:100])
        return reason, relevant
