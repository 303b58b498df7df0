"""The nano's training: four stages, each a short list of parameters and a loss, run by one resumable loop.

words     the token table alone, blocks skipped: plain averages of tokens against the teacher's vectors of the texts
          (their direction, and their similarities to the rest of the batch); train queries against their documents,
          and sentences against their paragraphs, among the other documents of the batch.
sights    the vision tower alone, blocks skipped: the mean visual token against the teacher's vector of the caption,
          among all captions of the set (as LiT, Zhai et al. 2022: the text side is locked).
language  the blocks, the token table and the output matrix: the next token of every position, and the mean of the last
          states against the teacher or, in some steps, queries against documents, or spans of any words against the
          teacher, which then reads along (spans.py). It needs no picture, so sights run beside it, a process each.
together  everything: texts as in `language`, pictures through the blocks against their captions' vectors, and captions
          word by word after their picture.

The final norm's gain stays as it is: 1 for meaning, small for language. In training the output matrix reads the last
state before that gain, so that a dimension can be quiet for the mean and loud for the next token; `export` folds the
gain into the matrix.

Skipping the blocks costs a tenth, and most of what a small model knows about single words and pictures comes cheap.
Matrices learn with Muon (Jordan 2024), the rest with AdamW. Everything random comes from (seed, step): a batch is drawn
from it alone, on a GPU by workers ahead of time, so a step never asks the device how large something is.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, embedding_bag, kl_div, log_softmax, normalize
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import Qwen3VLForConditionalGeneration

from mmembed.errors import nearest
from recipes.nano.batches import PairBatch, PairData, PictureBatch, PictureData, TextBatch, TextData
from recipes.nano.model import MERGE, choose_picture_kernel
from recipes.nano.spans import SpanBatch, SpanData
from recipes.nano.teacher import Judge

logger = logging.getLogger(__name__)

Parts = dict[str, torch.Tensor]
Draw = Callable[[int], Any]  # step -> its batch, on the CPU
LossOf = Callable[[Any], tuple[torch.Tensor, Parts, int]]  # batch -> loss, what to log, positions seen
OnSave = Callable[[int], None]
Reading = TextBatch | PairBatch | SpanBatch


@dataclass(frozen=True)
class Plan:
    seed: int = 0
    vocabulary: int = 7680
    word_steps: int = 1800
    sight_steps: int = 2400
    language_steps: int = 2000
    together_steps: int = 160
    word_texts: int = 512  # a step
    word_pairs: int = 256  # a step, and as many sentences with their paragraphs
    sight_pictures: int = 64
    language_tokens: int = 4096
    together_tokens: int = 4096
    together_pictures: int = 48
    together_sight_share: float = 0.35  # of steps
    pair_share: float = 0.3  # of the steps with text in the stages after words
    span_share: float = 0.0  # of the other steps with text, in every stage: the teacher costs more than a CPU's student
    word_rate: float = 5e-2  # of the token table (RMS 1)
    sight_rate: float = 4e-3  # of matrices, Muon
    language_rate: float = 1e-3  # the same: 4e-3 lost what the words stage had learned
    together_rate: float = 7e-4  # the same
    table_rate: float = 1e-3  # after the words stage
    head_rate: float = 3e-3
    vector_rate: float = 1e-3  # norms, biases, positions
    warmup: int = 60
    decay_share: float = 0.4
    lm_share: float = 0.5  # positions that get a next-token loss: the vocabulary's product is half of the cost
    speech_weight: float = 0.3
    direction_weight: float = 8.0
    similarity_weight: float = 2.0
    pair_weight: float = 1.0
    temperature: float = 0.05

    @classmethod
    def of_device(cls, device: torch.device) -> "Plan":
        """An hour of two CPU cores, or some minutes of a GPU: larger batches, and spans."""
        return GPU_PLAN if device.type == "cuda" else cls()

    def of_stage(self, name: str) -> dict[str, float]:
        """What the stage `name` depends on: its own settings and those of no stage."""
        others = tuple(f"{stage.rstrip('s')}_" for stage in STAGES if stage != name)
        return {key: value for key, value in asdict(self).items() if not key.startswith(others)}


GPU_PLAN = Plan(
    span_share=0.6,
    word_texts=4096,
    word_pairs=1024,
    word_steps=1200,
    sight_pictures=160,
    sight_steps=1200,
    language_tokens=65_536,
    language_steps=1250,
    together_steps=240,
    language_rate=2e-3,
    together_rate=5e-4,
    warmup=200,
)


def chosen_plan(device: torch.device, seed: int, given: Sequence[str]) -> Plan:
    """The plan of a device with settings as `KEY=NUMBER`, whole numbers where the plan has them. Exits on what it does
    not have."""
    plan = asdict(Plan())
    chosen = dict(item.partition("=")[::2] for item in given)
    for key in chosen.keys() - plan.keys():
        raise SystemExit(f"build_nano: the plan has no '{key}' to --set; {nearest(key, plan)}")
    try:
        numbers = {key: type(plan[key])(value) for key, value in chosen.items()}
    except ValueError as error:
        raise SystemExit(f"build_nano: --set takes KEY=NUMBER, whole where the plan's is: {error}") from None
    return replace(Plan.of_device(device), **{"seed": seed, **numbers})


WORKERS = {"cpu": 0, "cuda": 8}  # that draw batches ahead
STAGES = ("words", "sights", "language", "together")
CHECKPOINT_SECONDS = 150.0
LOGGED_STEPS = 50
TOKENS_A_TEXT = 24  # of the spans in the words stage


@dataclass
class Data:
    text: TextData
    pairs: PairData
    pictures: PictureData
    spans: SpanData | None = None  # where the plan has a share of them
    judge: Judge | None = None  # of spans

    def drawn_spans(self, seed: int, step: int, tokens: int, plan: Plan) -> SpanBatch | None:
        """The step's spans, where it is one of the plan's share."""
        if self.spans is None or np.random.default_rng([seed, step, 9]).random() >= plan.span_share:
            return None
        return self.spans.batch(seed, step, tokens)

    def judged(self, batch: TextBatch | SpanBatch) -> TextBatch:
        """The texts, with the teacher's vectors of spans as it reads them now."""
        if isinstance(batch, TextBatch):
            return batch
        assert self.judge is not None, "spans come with their judge"
        known = torch.arange(len(batch.lengths), device=batch.lengths.device)
        return replace(batch.texts, known=known, teacher=self.judge.vectors(batch.asked, batch.lengths))


# --------------------------------------------------------------------------------------------------- stages
def learn_words(model: Qwen3VLForConditionalGeneration, data: Data, plan: Plan, folder: Path) -> int:
    """Returns the positions seen, as every stage does."""
    language = model.model.language_model
    optimizer = torch.optim.Adam([language.embed_tokens.weight], lr=plan.word_rate)

    def draw(step: int) -> tuple[TextBatch | SpanBatch, PairBatch, PairBatch]:
        seed = plan.seed + 1
        spans = data.drawn_spans(seed, step, TOKENS_A_TEXT * plan.word_texts, plan)
        return (
            spans or data.text.mixed(seed, step, plan.word_texts),
            data.pairs.batch(seed, step, size=plan.word_pairs),
            data.pairs.cloze(seed, step, size=plan.word_pairs),
        )

    def loss_of(batch: tuple[TextBatch | SpanBatch, PairBatch, PairBatch]) -> tuple[torch.Tensor, Parts, int]:
        table = language.norm(language.embed_tokens.weight)  # (V, H), what a token's last state is without blocks
        texts, pairs, cloze = data.judged(batch[0]), batch[1], batch[2]
        loss, parts = distillation(pool_tokens(table, texts), texts, plan)
        found, placed = (
            pair_match(pool_tokens(table, b.queries), pool_tokens(table, b.documents), b, plan) for b in (pairs, cloze)
        )
        parts |= {"pair": found, "cloze": placed}
        sides = (texts, pairs.queries, pairs.documents, cloze.queries, cloze.documents)
        return loss + plan.pair_weight * (found + placed), parts, sum(len(side.predicting) for side in sides)

    return run_stage("words", model, [optimizer], draw, loss_of, plan.word_steps, plan, folder)


def learn_sights(model: Qwen3VLForConditionalGeneration, data: Data, plan: Plan, folder: Path) -> int:
    language, visual = model.model.language_model, model.model.visual
    choose_picture_kernel(model)

    def draw(step: int) -> PictureBatch:
        return data.pictures.batch(plan.seed + 2, step, plan.sight_pictures)

    def loss_of(batch: PictureBatch) -> tuple[torch.Tensor, Parts, int]:
        grid = batch.inputs["image_grid_thw"]
        seen = visual(batch.inputs["pixel_values"], grid_thw=grid).pooler_output  # (S, H)
        counts = grid.prod(-1) // MERGE**2
        pictures = torch.stack([part.mean(0) for part in language.norm(seen).float().split(counts.tolist())])
        return *picture_match(normalize(pictures, dim=-1), batch, plan), len(seen)

    optimizers = build_optimizers(visual, plan, plan.sight_rate)
    return run_stage("sights", model, optimizers, draw, loss_of, plan.sight_steps, plan, folder)


def learn_language(
    model: Qwen3VLForConditionalGeneration, data: Data, plan: Plan, folder: Path, on_save: OnSave
) -> int:
    model.model.visual.requires_grad_(False)

    def draw(step: int) -> Reading:
        return draw_text(data, plan.seed, step, plan.language_tokens, plan)

    def loss_of(batch: Reading) -> tuple[torch.Tensor, Parts, int]:
        return language_loss(model, data, batch, plan)

    optimizers = build_optimizers(model, plan, plan.language_rate)
    seen = run_stage("language", model, optimizers, draw, loss_of, plan.language_steps, plan, folder, on_save)
    model.model.visual.requires_grad_(True)
    return seen


def learn_together(
    model: Qwen3VLForConditionalGeneration, data: Data, plan: Plan, folder: Path, on_save: OnSave
) -> int:
    choose_picture_kernel(model)

    def draw(step: int) -> Reading | PictureBatch:
        if np.random.default_rng([plan.seed, step, 7]).random() < plan.together_sight_share:
            return data.pictures.batch(plan.seed, step, plan.together_pictures)
        return draw_text(data, plan.seed + 4, step, plan.together_tokens, plan)

    def loss_of(batch: Reading | PictureBatch) -> tuple[torch.Tensor, Parts, int]:
        if isinstance(batch, PictureBatch):
            return picture_loss(model, batch, plan)
        return language_loss(model, data, batch, plan)

    optimizers = build_optimizers(model, plan, plan.together_rate)
    return run_stage("together", model, optimizers, draw, loss_of, plan.together_steps, plan, folder, on_save)


def run_stage(
    name: str,
    model: Qwen3VLForConditionalGeneration,
    optimizers: list[torch.optim.Optimizer],
    draw: Draw,
    loss_of: LossOf,
    steps: int,
    plan: Plan,
    folder: Path,
    on_save: OnSave = lambda step: None,
) -> int:
    """Steps from the stage's last checkpoint to its end (none, when it was finished); returns positions seen."""
    path = folder / f"{name}.pt"
    start, seen = load_checkpoint(path, model, optimizers, plan)
    model.train()
    device = model.device
    sums: dict[str, list[torch.Tensor]] = {}
    saved, began, before = time.monotonic(), time.monotonic(), seen
    batches = drawn_ahead(draw, start, steps, WORKERS[device.type])
    for step, batch in enumerate(tqdm(batches, initial=start, total=steps, desc=name, mininterval=30), start):
        torch.manual_seed(plan.seed * 1_000_003 + step)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group.setdefault("peak", group["lr"]) * rate_at(step, steps, plan)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss, parts, count = loss_of(move(batch, device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for o in optimizers for g in o.param_groups for p in g["params"]], 5.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        seen += count
        for key, value in parts.items():
            sums.setdefault(key, []).append(value.detach())
        if step % LOGGED_STEPS == LOGGED_STEPS - 1:
            means = " ".join(f"{k} {torch.stack(v).mean():.3f}" for k, v in sorted(sums.items()))
            logger.info("%s %d: %s | %.0f/s", name, step + 1, means, (seen - before) / (time.monotonic() - began))
            sums = {}
        if time.monotonic() - saved > CHECKPOINT_SECONDS or step + 1 == steps:
            save_checkpoint(path, model, optimizers, step + 1, seen, plan)
            on_save(step + 1)
            saved = time.monotonic()
    return seen


def drawn_ahead(draw: Draw, start: int, end: int, workers: int) -> DataLoader[Any]:
    """The batches of the steps from `start` to `end`, drawn by so many processes; by this one where it is none."""
    return DataLoader(Steps(draw, start, end), batch_size=None, num_workers=workers, worker_init_fn=_start_worker)


def _start_worker(worker: int) -> None:
    """A fork has the tokenizer without its threads, and with TOKENIZERS_PARALLELISM=true would wait for them for ever:
    sights, whose batches tokenize captions, made no step."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class Steps(Dataset[Any]):
    """The batches of a stage's steps, for a loader to draw ahead of time."""

    def __init__(self, draw: Draw, start: int, end: int):
        self.draw, self.start, self.end = draw, start, end

    def __len__(self) -> int:
        return max(0, self.end - self.start)

    def __getitem__(self, row: int) -> Any:
        return self.draw(self.start + row)


def move(batch: Any, device: torch.device) -> Any:
    """The same batch (tensors, and dataclasses, dictionaries and tuples of them) on a device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):  # a loader makes lists of tuples
        return tuple(move(value, device) for value in batch)
    if isinstance(batch, (TextBatch, PairBatch, SpanBatch, PictureBatch)):
        return type(batch)(*(move(getattr(batch, field.name), device) for field in fields(batch)))
    return batch


def rate_at(step: int, steps: int, plan: Plan) -> float:
    """Warm up, hold, then fall linearly to zero over the last `decay_share` of the steps; a short stage warms up for a
    quarter of its steps."""
    warmup = min(plan.warmup, max(1, steps // 4))
    return min(1.0, (step + 1) / warmup, (steps - step) / (steps * plan.decay_share))


# --------------------------------------------------------------------------------------------------- losses
def last_hidden(model: Qwen3VLForConditionalGeneration, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, H) of right-padded texts. On a CPU the fused attention's backward pass only pays beyond 64 tokens."""
    eager = ids.device.type == "cpu" and ids.shape[1] <= 64
    model.model.language_model.config._attn_implementation = "eager" if eager else "sdpa"
    return model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state


def text_loss(model: Qwen3VLForConditionalGeneration, batch: TextBatch, plan: Plan) -> tuple[torch.Tensor, Parts, int]:
    hidden = last_hidden(model, batch.ids)  # (B, T, H)
    loss, parts = distillation(pool(hidden, batch.content()), batch, plan)
    speech = next_token_loss(model, hidden, batch.ids, batch.predicting, plan.lm_share)
    return loss + plan.speech_weight * speech, {"text": speech, **parts}, batch.ids.numel()


def draw_text(data: Data, seed: int, step: int, tokens: int, plan: Plan) -> Reading:
    if np.random.default_rng([seed, step, 6]).random() < plan.pair_share:
        return data.pairs.batch(seed, step, tokens=tokens)
    return data.drawn_spans(seed, step, tokens, plan) or data.text.batch(seed, step, tokens)


def language_loss(
    model: Qwen3VLForConditionalGeneration, data: Data, batch: Reading, plan: Plan
) -> tuple[torch.Tensor, Parts, int]:
    if isinstance(batch, PairBatch):
        return pair_loss(model, batch, plan)
    if isinstance(batch, SpanBatch):
        return span_loss(model, data.judged(batch), plan)
    return text_loss(model, batch, plan)


def span_loss(model: Qwen3VLForConditionalGeneration, batch: TextBatch, plan: Plan) -> tuple[torch.Tensor, Parts, int]:
    """Distillation alone: spans stop and exchange words as no writer would."""
    loss, parts = distillation(pool(last_hidden(model, batch.ids), batch.content()), batch, plan)
    return loss, {f"span_{key}": value for key, value in parts.items()}, batch.ids.numel()


def pair_loss(model: Qwen3VLForConditionalGeneration, batch: PairBatch, plan: Plan) -> tuple[torch.Tensor, Parts, int]:
    """Queries against documents, and the next token of the documents."""
    queries, documents = last_hidden(model, batch.queries.ids), last_hidden(model, batch.documents.ids)  # (B, T, H)
    found = pair_match(pool(queries, batch.queries.content()), pool(documents, batch.documents.content()), batch, plan)
    speech = next_token_loss(model, documents, batch.documents.ids, batch.documents.predicting, plan.lm_share)
    seen = batch.queries.ids.numel() + batch.documents.ids.numel()
    return plan.pair_weight * found + plan.speech_weight * speech, {"text": speech, "pair": found}, seen


def pair_match(queries: torch.Tensor, documents: torch.Tensor, batch: PairBatch, plan: Plan) -> torch.Tensor:
    """InfoNCE in both directions over unit vectors (B, H); the same document or query elsewhere is no negative."""
    logits = (queries @ documents.T).float().div(plan.temperature).masked_fill(batch.same, -1e4)  # (B, B)
    own = torch.arange(len(queries), device=logits.device)
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def picture_loss(
    model: Qwen3VLForConditionalGeneration, batch: PictureBatch, plan: Plan
) -> tuple[torch.Tensor, Parts, int]:
    """Causal attention lets one pass serve both: the picture's states have not seen the caption after it."""
    model.model.language_model.config._attn_implementation = "sdpa"
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state  # (B, T, H)
    ids = batch.inputs["input_ids"]
    match, parts = picture_match(pool(hidden, batch.picture), batch, plan)
    caption = next_token_loss(model, hidden, ids, batch.caption, 1.0)
    return match + plan.speech_weight * caption, {"caption": caption, **parts}, ids.numel()


def picture_match(pictures: torch.Tensor, batch: PictureBatch, plan: Plan) -> tuple[torch.Tensor, Parts]:
    """Choose the caption among the set's captions, and point where it points; pictures (B, H) unit vectors."""
    bank = batch.bank  # (N, H)
    logits = (pictures @ bank.T).float() / plan.temperature  # (B, N)
    match = cross_entropy(logits.masked_fill(batch.ignored, -1e4), batch.targets)
    direction = (1 - (pictures * bank[batch.targets]).sum(-1)).mean()
    parts = {"match": match, "picture_direction": direction}
    return match + plan.direction_weight / 4 * direction, parts


def next_token_loss(
    model: Qwen3VLForConditionalGeneration, hidden: torch.Tensor, ids: torch.Tensor, where: torch.Tensor, share: float
) -> torch.Tensor:
    """Mean cross-entropy of a random `share` of the places `where` (M,) in (B, T - 1) laid flat."""
    if share < 1:
        where = where[torch.randperm(len(where), device=where.device)[: max(1, round(share * len(where)))]]
    states, targets = hidden[:, :-1].flatten(0, 1)[where], ids[:, 1:].flatten()[where]
    return cross_entropy(next_token_logits(model, states).float(), targets)


def next_token_logits(model: Qwen3VLForConditionalGeneration, hidden: torch.Tensor) -> torch.Tensor:
    """(..., V) of last hidden states (..., H), by the output matrix as it is in training: before the norm's gain."""
    return model.lm_head(hidden / model.model.language_model.norm.weight)


def distillation(pooled: torch.Tensor, batch: TextBatch, plan: Plan) -> tuple[torch.Tensor, Parts]:
    """Direction to the teacher's vector, and KL between the rows of both similarity matrices."""
    if not len(batch.known):
        return pooled.sum() * 0.0, {}
    teacher, student = batch.teacher, pooled[batch.known]
    direction = (1 - (student * teacher).sum(-1)).mean()
    own = torch.eye(len(student), dtype=torch.bool, device=student.device)
    target = log_softmax((teacher @ teacher.T / plan.temperature).masked_fill(own, -1e4), dim=-1)
    actual = log_softmax((student @ student.T).float().div(plan.temperature).masked_fill(own, -1e4), dim=-1)
    similarity = kl_div(actual, target, reduction="batchmean", log_target=True)
    loss = plan.direction_weight * direction + plan.similarity_weight * similarity
    return loss, {"direction": direction, "similarity": similarity}


def pool(hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Unit mean of the hidden states `where` (B, T): (B, H)."""
    weight = where.unsqueeze(-1).float()
    return normalize((hidden.float() * weight).sum(1) / weight.sum(1), dim=-1)


def pool_tokens(table: torch.Tensor, batch: TextBatch) -> torch.Tensor:
    """`pool` where a token's state depends on the token alone, `table` (V, H): (B, H) without ever being (B, T, H)."""
    content = batch.content()  # (B, T)
    starts = torch.nn.functional.pad(content.sum(-1).cumsum(0)[:-1], (1, 0))
    return normalize(embedding_bag(batch.ids[content], table, starts, mode="mean"), dim=-1)


# ------------------------------------------------------------------------------------ optimizers, checkpoints
def build_optimizers(model: torch.nn.Module, plan: Plan, matrix_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for the rest."""
    matrices: list[torch.nn.Parameter] = []
    heads: list[torch.nn.Parameter] = []
    tables: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if "embed_tokens" in name:
                tables.append(parameter)
            elif "lm_head" in name:
                heads.append(parameter)
            else:
                (vectors if parameter.ndim != 2 or "pos_embed" in name else matrices).append(parameter)
    rated = [(vectors, plan.vector_rate), (tables, plan.table_rate), (heads, plan.head_rate)]
    return [
        torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": p, "lr": r} for p, r in rated if p], betas=(0.9, 0.98), weight_decay=0.0),
    ]


def save_checkpoint(
    path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], step: int, seen: int, plan: Plan
) -> None:
    state = {"step": step, "seen": seen, "model": model.state_dict(), "plan": plan.of_stage(path.stem)}
    state["optimizers"] = [o.state_dict() for o in optimizers]
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], plan: Plan
) -> tuple[int, int]:
    """(steps done, tokens seen); raises ValueError when the checkpoint was made with another plan."""
    if not path.exists():
        return 0, 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    asked, saved = plan.of_stage(path.stem), state["plan"]
    if differing := sorted(key for key in asked.keys() | saved.keys() if asked.get(key) != saved.get(key)):
        raise ValueError(f"{path} was made with another {', '.join(differing)}: use a fresh --work folder")
    model.load_state_dict(state["model"])
    for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved_state)
    logger.info("%s: resumed at step %d", path.stem, state["step"])
    return state["step"], state["seen"]
