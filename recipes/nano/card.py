"""The model card: what the nano is, what it saw, under which licences, and how good it measured."""

from dataclasses import asdict, dataclass

import torch
from transformers import Qwen3VLForConditionalGeneration

from recipes.nano.data import PAIR_SETS
from recipes.nano.model import MEANING
from recipes.nano.train import Plan

LICENCES = {
    "CC BY-SA 4.0": "squad-en, xquad, cmrc-zh, odex, sib200, stsb-en, rosts-ro (mixed CC sources), jsts-ja",
    "CC BY-SA 3.0": "jaquad-ja",
    "CC BY 4.0": (
        "medquad, tldr-commands, mbpp, banking77, openstax-text, openstax-glossary, openstax-figures, tech-figures"
    ),
    "CC BY (African Storybook, attribution in stories.jsonl)": "story-pages",
    "CC BY 3.0": "clinc150",
    "CC0 1.0": "clothing",
    "Apache-2.0": "argkp, noto-emoji pictures, the teacher all-MiniLM-L6-v2",
    "MIT": "dbpedia-entity",
    "BSD-3-Clause": "vega-charts",
    "Unicode-3.0": "noto-emoji names and keywords",
    "PSF-2.0": "Python's standard library: functions and their docstrings, of the Python that ran the recipe",
    "The Unlicense (public domain)": "recipes",
}

CARD = """---
library_name: transformers
pipeline_tag: feature-extraction
tags: [qwen3_vl, embeddings, mmembed, test-model]
---
# mmembed-nano

A Qwen3-VL of {parameters:.2f} M parameters ({size:,} bytes in bf16) with its own {vocabulary:,}-token byte-level BPE,
built by one command on {machine}: `{command}`,
`DATA` being a folder of the sets below. It exists so that the demo, the tests and the claims of mmembed run in minutes
without a network. **It is not a product model**: it knows six textbooks and
some Wikipedia, it sees pictures at {pixels} pixels a side or less, and it can not read a page.

## Use
`Embedder.from_pretrained("mmembed-nano")`, or this folder with `AutoModel` / `AutoModelForImageTextToText` and
`AutoProcessor`. It was trained for **mean pooling of the content tokens' last hidden states**, causal attention,
texts up to 256 tokens, bare or after `Instruct: ...\\nQuery: `, pictures of {visual_tokens} visual tokens.

## How it was made
1. Tokenizer: BPE on the train texts, with Qwen's splitting rule.
2. Words: the token table starts as the vector that all-MiniLM-L6-v2 gives each token alone, in its {meaning}
   principal directions, weighted by smooth inverse frequency; {word_steps:,} steps bring plain averages of tokens
   towards the teacher's vectors of {taught:,} train texts (and of the English side of their translations), sentences
   towards the paragraphs they come from (squad-en, openstax-text, medquad), and train queries towards their documents
   ({pair_sets}). {spans}
3. Sights, beside words and language: {sight_steps:,} steps bring the mean visual token of a train picture towards the
   teacher's vector of its caption.
4. Language: {language_steps:,} steps of next-token prediction and of the same distillation, now of the mean last
   hidden state{span_steps}; three steps in ten take queries and documents instead. The output matrix is not tied to
   the token table.
5. Together: {together_steps:,} steps of both, and of pictures and captions through the blocks. {seen:,} positions in
   steps 4 and 5.

Settings: `{plan}`.

## Data
Only train splits. Dev queries, and documents or pictures relevant only to dev queries, were never seen; the held-out
parts were not present. Licences of the sources (share-alike and attribution terms stay with the data; see each set's
README):

| licence | sets |
|---|---|
{licences}

## Numbers (before any fine-tuning)
Train queries with their documents were used of {pair_sets}, and captions with their pictures of all picture sets: on
those sets the numbers are of a trained model on unseen queries. On the others they are zero-shot: texts were seen,
which query belongs to which document was not.

nDCG@10 of cosine search, English dev queries against the whole shared corpus of the set, bare prompts; perplexity a
token on running text of articles and sections that were kept out of training.

| measure | value |
|---|---|
{numbers}

## Limits
English first. Other languages are present but weak. Pictures: a few thousand were seen. Do not use it for decisions
about people.
"""

SPANS = """A share of {share:g} of the steps over texts
   takes spans of 2 to 120 words from anywhere in the English train texts, half of them with a fifth of the words
   exchanged for others; the teacher reads each as it is drawn."""


@dataclass(frozen=True)
class Built:
    """What was built, and how.

    Attributes:
        taught: texts with a vector of the teacher.
        seen: positions in the stages with blocks.
        size: bytes of the weights.
    """

    model: Qwen3VLForConditionalGeneration
    plan: Plan
    device: torch.device
    threads: int
    taught: int
    seen: int
    size: int

    @property
    def command(self) -> str:
        """What builds the same again."""
        usual = asdict(Plan.of_device(self.device))
        changed = [
            f"{key}={value}" for key, value in asdict(self.plan).items() if key != "seed" and value != usual[key]
        ]
        flags = ["--device", self.device.type, "--threads", str(self.threads), "--seed", str(self.plan.seed)]
        flags += ["--set", *changed] if changed else []
        return " ".join(["python recipes/build_nano.py --data-root DATA --out mmembed/nano", *flags])

    @property
    def machine(self) -> str:
        return f"{self.threads} CPU cores" if self.device.type == "cpu" else f"one {self.device.type.upper()} device"


def render(built: Built, results: dict[str, float]) -> str:
    """The card as markdown. `results`: measure -> number."""
    model, plan = built.model, built.plan
    return CARD.format(
        command=built.command,
        machine=built.machine,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        size=built.size,
        vocabulary=model.config.get_text_config().vocab_size,
        pixels=192,
        visual_tokens="16 to 36",
        word_steps=plan.word_steps,
        sight_steps=plan.sight_steps,
        meaning=MEANING,
        language_steps=plan.language_steps,
        together_steps=plan.together_steps,
        taught=built.taught,
        seen=built.seen,
        pair_sets=f"{', '.join(PAIR_SETS)}, and docstrings of Python's own library with their functions",
        spans=SPANS.format(share=plan.span_share) if plan.span_share else "",
        span_steps=" of texts and spans" if plan.span_share else "",
        plan=", ".join(f"{k}={v}" for k, v in asdict(plan).items()),
        licences="\n".join(f"| {licence} | {sets} |" for licence, sets in LICENCES.items()),
        numbers="\n".join(f"| {name} | {value} |" for name, value in results.items()),
    )
