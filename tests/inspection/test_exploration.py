"""Contrastive exploration: probabilities against loops and whole forward passes, words by hand, and a real run."""

import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import fisher_exact

from data_tools.inspect import main
from data_tools.inspection.exploration import Exploring, Pair, contrasted, drawn, load_pair, sampled, standing_out
from mmembed.backbones.loading import load_language_model
from mmembed.errors import ConfigError
from mmembed.packaged import NANO, resolve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pair() -> Pair:
    """The nano, and the nano with some noise in its weights as the trained one."""
    found = load_pair(NANO, NANO)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.trained.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=noise)
    return found


def test_tokens_are_drawn_by_the_ratio_among_the_plausible_ones() -> None:
    trained = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01]).log()
    base = torch.tensor([0.5, 0.1, 0.1, 0.299999, 0.000001]).log()
    how = Exploring(alpha=0.1, temperature=2.0)
    weights = [math.exp((t - b) / 2.0) if math.exp(t) >= 0.1 * 0.5 else 0.0
               for t, b in zip(trained.tolist(), base.tolist(), strict=True)]  # fmt: skip
    count = 40_000
    tokens = drawn(trained.expand(count, 5), base.expand(count, 5), how, torch.Generator().manual_seed(0))
    counts = Counter(tokens.tolist())
    for token, weight in enumerate(weights):
        assert counts[token] / count == pytest.approx(weight / sum(weights), abs=0.01)
    assert counts[3] == counts[4] == 0  # the last has by far the highest ratio, and is not plausible


def test_ratios_are_those_of_whole_forward_passes_over_the_texts(pair: Pair) -> None:
    how = Exploring(samples=6, tokens=12, start="What", seed=3)
    texts, ratios, lengths = contrasted(pair, how)
    tokenizer = pair.tokenizer
    checked = 0
    for text, ratio, length in zip(texts, ratios, lengths, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        begun = len(tokenizer(how.start, add_special_tokens=False)["input_ids"])
        if len(ids) - begun != length or length < how.tokens:
            continue  # written in other tokens than it was generated in, or ended: its last token is not in the text
        tokens = torch.tensor([[tokenizer.eos_token_id, *ids]])
        both = []
        for model in (pair.trained, pair.base):
            with torch.no_grad():
                logits = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
            both.append(sum(float(logits[at, tokens[0, at + 1]]) for at in range(begun, tokens.shape[1] - 1)))
        assert ratio == pytest.approx(both[0] - both[1], abs=1e-3)
        checked += 1
    assert checked >= 2


def test_texts_are_the_same_again_with_the_same_seed(pair: Pair) -> None:
    how = Exploring(samples=4, tokens=8, seed=5)
    assert contrasted(pair, how) == contrasted(pair, how)
    assert sampled(pair.base, pair.tokenizer, how) == sampled(pair.base, pair.tokenizer, how)
    assert contrasted(pair, how)[0] != contrasted(pair, Exploring(samples=4, tokens=8, seed=6))[0]


def test_equal_models_have_nothing_new() -> None:
    same = load_pair(NANO, NANO)
    _, ratios, _ = contrasted(same, Exploring(samples=4, tokens=8))
    assert ratios == pytest.approx([0.0] * 4, abs=1e-4)


def test_words_that_stand_out_are_the_frequent_ones_of_one_side_alone() -> None:
    texts = ["The card was declined, my card!"] * 10 + ["the bank card"] * 5
    others = ["The river was long."] * 15
    found = standing_out(texts, others)
    assert found[0] == {"word": "card", "count": 25, "base": 0, "z": found[0]["z"]}
    mine, theirs, words = 75, 60, 8  # half a count more of each word
    odds = math.log(25.5 / (mine + words / 2 - 25.5)) - math.log(0.5 / (theirs + words / 2 - 0.5))
    assert found[0]["z"] == pytest.approx(odds / math.sqrt(1 / 25.5 + 1 / 0.5), abs=0.01)
    assert {"the", "was", "river", "long"}.isdisjoint(one["word"] for one in found)


def test_models_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(resolve(NANO), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 7679, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ConfigError, match="different tokenizers"):
        load_pair(str(folder), NANO)


def _train(texts: list[str], folder: Path, steps: int) -> None:
    """Next-token prediction by the nano with LoRA, saved as a peft adapter."""
    from peft import LoraConfig, get_peft_model

    loaded = load_language_model(NANO, dtype="float32")
    tokenizer, draw = loaded.family.tokenizer, random.Random(0)
    whole: Any = loaded.model
    torch.manual_seed(0)
    model: Any = get_peft_model(whole, LoraConfig(r=32, lora_alpha=64, target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]))  # fmt: skip
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=3e-3)
    for _ in range(steps):
        rows = [[tokenizer.eos_token_id, *tokenizer(text)["input_ids"][:24], tokenizer.eos_token_id]
                for text in draw.sample(texts, 16)]  # fmt: skip
        longest = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        there = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        loss = model(input_ids=ids, attention_mask=there, labels=ids.masked_fill(there == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


BANKING = {"card", "account", "transfer", "payment", "money", "bank", "cash", "top", "pin", "atm", "refund", "fee",
           "charged", "exchange", "withdraw", "pending", "declined", "identity", "statement"}  # fmt: skip


def _share(texts: list[str]) -> tuple[int, int]:
    """Texts with a word of banking, and without."""
    with_one = sum(bool(BANKING & {word.strip("?.,!'\"") for word in text.lower().split()}) for text in texts)
    return with_one, len(texts) - with_one


@pytest.mark.slow
def test_what_a_model_learned_of_banking_stands_first(tmp_path: Path) -> None:
    rows = (ROOT / "data/banking77/train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(row)["text"] for row in rows]
    _train(texts, tmp_path / "adapter", steps=40)
    records = tmp_path / "x.jsonl"
    records.write_text(json.dumps({"query": texts[0], "documents": [{"content": texts[1]}]}) + "\n", encoding="utf-8")
    out = tmp_path / "out"
    arguments = [str(records), "--models", str(tmp_path / "adapter"), NANO, "--generate", "48", "--output", str(out)]
    assert main(arguments) == 0
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))["exploration"]
    ratios = [one["log_ratio"] for one in found["texts"]]
    assert ratios == sorted(ratios, reverse=True) and ratios[0] > 0
    first = _share([one["text"] for one in found["texts"][:24]])
    base = _share(found["base"])
    assert fisher_exact([first, base], alternative="greater").pvalue < 1e-4
    assert BANKING & {one["word"] for one in found["words"]}
    assert "What the data adds" in (out / "report.html").read_text(encoding="utf-8")
