"""The nano's training: three stages, each a short list of parameters and a loss, run by one resumable loop.

words     the token table alone, blocks skipped: plain averages of tokens against the teacher's vectors of the texts.
sights    the vision tower alone, blocks skipped: the mean visual token against the teacher's vector of the caption,
          among all captions of the set (as LiT, Zhai et al. 2022: the text side is locked).
together  everything. A text step has two losses from one causal forward: the next token, and the mean of the content
          tokens' last hidden states against the teacher (its direction, and its similarities to the rest of the
          batch). A picture step reads picture then caption: next token of the caption, and the `sights` loss through
          the blocks. A pair step, in the second half, is in-batch contrastive on query and relevant document.

Skipping the blocks costs a tenth, and most of what a small model knows about single words and pictures comes cheap.
Matrices learn with Muon (Jordan 2024), the rest with AdamW. Everything random comes from (seed, step).
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize
from tqdm import tqdm
from transformers import Qwen3VLForConditionalGeneration

from recipes.nano.batches import PairData, PictureBatch, PictureData, TextBatch, TextData
from recipes.nano.model import MEANING

logger = logging.getLogger(__name__)

TABLE_RMS = 0.5  # of the token table when language modelling begins
RESERVED_SHARE = 0.3  # gain of the reserved dimensions over that of the others, then
FIRST_LOGIT = 16.0  # of a token for itself, then
Parts = dict[str, float]
LossOfStep = Callable[[int], tuple[torch.Tensor, Parts, int]]  # step -> loss, what to log, positions seen


@dataclass(frozen=True)
class Plan:
    seed: int = 0
    word_steps: int = 3500
    sight_steps: int = 900
    steps: int = 2000  # together
    word_tokens: int = 12288  # a step
    sight_pictures: int = 64
    tokens: int = 4096
    pictures: int = 32
    pairs: int = 48
    picture_share: float = 0.25
    pair_share: float = 0.15  # in the second half
    sight_rate: float = 4e-3  # of matrices, Muon
    matrix_rate: float = 1.5e-3  # the same, together
    table_rate: float = 2e-3
    vector_rate: float = 2e-3  # norms, biases, positions
    word_rate: float = 3e-3
    warmup: int = 100
    decay_share: float = 0.4
    lm_weight: float = 2.5
    lm_share: float = 0.4  # positions that get a next-token loss: the vocabulary's product is half of the cost
    direction_weight: float = 8.0
    similarity_weight: float = 2.0
    temperature: float = 0.05
    checkpoint_seconds: float = 150.0


@dataclass
class Data:
    text: TextData
    pictures: PictureData
    pairs: PairData


# --------------------------------------------------------------------------------------------------- stages
def learn_words(model: Qwen3VLForConditionalGeneration, data: Data, plan: Plan, folder: Path) -> None:
    language = model.model.language_model
    optimizer = torch.optim.Adam([language.embed_tokens.weight, language.norm.weight], lr=plan.word_rate)

    def loss_of(step: int) -> tuple[torch.Tensor, Parts, int]:
        batch = data.text.batch(plan.seed + 1, step, plan.word_tokens)
        hidden = language.norm(language.embed_tokens(batch.ids))  # (B, T, H)
        return *distillation(pool(hidden, batch.content()), batch, plan), batch.ids.numel()

    run_stage("words", model, [optimizer], loss_of, plan.word_steps, plan, folder)


def learn_sights(model: Qwen3VLForConditionalGeneration, data: Data, plan: Plan, folder: Path) -> None:
    language, visual = model.model.language_model, model.model.visual
    visual.config._attn_implementation = "eager"

    def loss_of(step: int) -> tuple[torch.Tensor, Parts, int]:
        batch = data.pictures.batch(plan.seed + 2, step, plan.sight_pictures)
        seen = visual(batch.inputs["pixel_values"], grid_thw=batch.inputs["image_grid_thw"]).pooler_output  # (S, H)
        counts = batch.picture.sum(-1) - 2  # without the two border tokens
        pictures = torch.stack([part.mean(0) for part in language.norm(seen).float().split(counts.tolist())])
        return *picture_match(normalize(pictures, dim=-1), batch, plan), len(seen)

    run_stage("sights", model, build_optimizers(visual, plan, plan.sight_rate), loss_of, plan.sight_steps, plan, folder)


def learn_together(
    model: Qwen3VLForConditionalGeneration, data: Data, plan: Plan, folder: Path, on_save: Callable[[int], None]
) -> int:
    """Returns the positions seen in all."""
    settle(model.model.language_model)
    model.model.visual.config._attn_implementation = "eager"

    def loss_of(step: int) -> tuple[torch.Tensor, Parts, int]:
        draw = torch.rand(()).item()
        pair_share = plan.pair_share if step >= plan.steps // 2 else 0.0
        if draw < plan.picture_share:
            return picture_loss(model, data.pictures.batch(plan.seed, step, plan.pictures), plan)
        if draw < plan.picture_share + pair_share:
            return pair_loss(model, data.pairs.batch(data.text, plan.seed, step, plan.pairs), plan)
        return text_loss(model, data.text.batch(plan.seed, step, plan.tokens), plan)

    return run_stage(
        "together", model, build_optimizers(model, plan, plan.matrix_rate), loss_of, plan.steps, plan, folder, on_save
    )


@torch.no_grad()
def settle(language: torch.nn.Module) -> None:
    """Choose two lengths that the first stages leave open, because the final norm and the cosine ignore them.

    Loud token vectors: Muon's steps have one size, and blocks writing into a quiet residual stream wiped out within 50
    steps what the first stages had learned. A small gain of the final norm: with tied weights it is the language
    model's temperature, and the first next-token loss was 18 nats.
    """
    table, gain = language.embed_tokens.weight, language.norm.weight
    width = table.shape[1]
    table.copy_(normalize(table, dim=-1) * TABLE_RMS * width**0.5)
    quiet = table[:, MEANING:]
    quiet.mul_(0.6)[:, 0].add_(0.8 * quiet.norm(dim=-1) / 0.6)
    gain[MEANING:] = RESERVED_SHARE * gain[:MEANING].mean()
    gain.mul_(FIRST_LOGIT / (TABLE_RMS * width))


def run_stage(
    name: str,
    model: Qwen3VLForConditionalGeneration,
    optimizers: list[torch.optim.Optimizer],
    loss_of: LossOfStep,
    steps: int,
    plan: Plan,
    folder: Path,
    on_save: Callable[[int], None] = lambda step: None,
) -> int:
    """Steps from the stage's last checkpoint to its end (none, when it was finished); returns positions seen."""
    path = folder / f"{name}.pt"
    start, seen = load_checkpoint(path, model, optimizers)
    model.train()
    sums: dict[str, list[float]] = {}
    saved, began, before = time.monotonic(), time.monotonic(), seen
    for step in tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=30):
        torch.manual_seed(plan.seed * 1_000_003 + step)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group.setdefault("peak", group["lr"]) * rate_at(step, steps, plan)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, parts, count = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for o in optimizers for g in o.param_groups for p in g["params"]], 5.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        seen += count
        for key, value in parts.items():
            sums.setdefault(key, []).append(value)
        if step % 50 == 49:
            means = " ".join(f"{k} {sum(v) / len(v):.3f}" for k, v in sorted(sums.items()))
            logger.info("%s %d: %s | %.0f/s", name, step + 1, means, (seen - before) / (time.monotonic() - began))
            sums = {}
        if time.monotonic() - saved > plan.checkpoint_seconds or step + 1 == steps:
            save_checkpoint(path, model, optimizers, step + 1, seen, plan)
            on_save(step + 1)
            saved = time.monotonic()
    return seen


def rate_at(step: int, steps: int, plan: Plan) -> float:
    """Warm up, hold, then fall linearly to zero over the last `decay_share` of the steps."""
    return min(1.0, (step + 1) / plan.warmup, (steps - step) / (steps * plan.decay_share))


# --------------------------------------------------------------------------------------------------- losses
def last_hidden(model, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, H) of right-padded texts. On a CPU the fused attention's backward pass only pays beyond 64 tokens."""
    model.model.language_model.config._attn_implementation = "eager" if ids.shape[1] <= 64 else "sdpa"
    return model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state


def text_loss(model, batch: TextBatch, plan: Plan) -> tuple[torch.Tensor, Parts, int]:
    hidden = last_hidden(model, batch.ids)  # (B, T, H)
    lm = next_token_loss(model, hidden, batch.ids, batch.predicting(), plan.lm_share)
    distilled, parts = distillation(pool(hidden, batch.content()), batch, plan)
    return plan.lm_weight * lm + distilled, {"lm": lm.item(), **parts}, batch.ids.numel()


def picture_loss(model, batch: PictureBatch, plan: Plan) -> tuple[torch.Tensor, Parts, int]:
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state  # (B, T, H)
    ids = batch.inputs["input_ids"]
    lm = next_token_loss(model, hidden, ids, batch.caption, 1.0)
    match, parts = picture_match(pool(hidden, batch.picture), batch, plan)
    return plan.lm_weight / 5 * lm + match, {"caption": lm.item(), **parts}, ids.numel()


def picture_match(pictures: torch.Tensor, batch: PictureBatch, plan: Plan) -> tuple[torch.Tensor, Parts]:
    """Choose the caption among the set's captions, and point where it points; pictures (B, H) unit vectors."""
    bank = batch.bank  # (N, D)
    pictures = normalize(pictures[:, : bank.shape[1]], dim=-1)
    logits = (pictures @ bank.T).float() / plan.temperature  # (B, N)
    match = cross_entropy(logits.masked_fill(batch.ignored, -1e4), batch.targets)
    direction = (1 - (pictures * bank[batch.targets]).sum(-1)).mean()
    parts = {"match": match.item(), "picture_direction": direction.item()}
    return match + plan.direction_weight / 4 * direction, parts


def pair_loss(model, batch, plan: Plan) -> tuple[torch.Tensor, Parts, int]:
    queries, documents, relevant = batch
    vectors = [pool(last_hidden(model, side.ids), side.content()) for side in (queries, documents)]
    logits = (vectors[0] @ vectors[1].T).float() / plan.temperature  # (B, B)
    log_probability = log_softmax(logits, dim=-1)
    loss = -(log_probability * relevant / relevant.sum(-1, keepdim=True)).sum(-1).mean()
    return loss, {"pair": loss.item()}, queries.ids.numel() + documents.ids.numel()


def next_token_loss(model, hidden: torch.Tensor, ids: torch.Tensor, where: torch.Tensor, share: float) -> torch.Tensor:
    """Mean cross-entropy of a random `share` of the positions `where` (B, T - 1)."""
    chosen = where & (torch.rand(where.shape) < share) if share < 1 else where
    logits = model.lm_head(hidden[:, :-1][chosen])  # (N, V)
    return cross_entropy(logits.float(), ids[:, 1:][chosen])


def distillation(pooled: torch.Tensor, batch: TextBatch, plan: Plan) -> tuple[torch.Tensor, Parts]:
    """Direction to the teacher's vector, and KL between the rows of both similarity matrices."""
    if not bool(batch.known.any()):
        return pooled.sum() * 0.0, {}
    teacher = batch.teacher[batch.known]
    student = normalize(pooled[batch.known, : teacher.shape[1]], dim=-1)
    direction = (1 - (student * teacher).sum(-1)).mean()
    own = torch.eye(len(student), dtype=torch.bool)
    target = log_softmax((teacher @ teacher.T / plan.temperature).masked_fill(own, -1e4), dim=-1)
    actual = log_softmax((student @ student.T).float().div(plan.temperature).masked_fill(own, -1e4), dim=-1)
    similarity = kl_div(actual, target, reduction="batchmean", log_target=True)
    loss = plan.direction_weight * direction + plan.similarity_weight * similarity
    return loss, {"direction": direction.item(), "similarity": similarity.item()}


def pool(hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Unit mean of the hidden states `where` (B, T): (B, H)."""
    weight = where.unsqueeze(-1).float()
    return normalize((hidden.float() * weight).sum(1) / weight.sum(1), dim=-1)


# ------------------------------------------------------------------------------------ optimizers, checkpoints
def build_optimizers(model: torch.nn.Module, plan: Plan, matrix_rate: float) -> list[torch.optim.Optimizer]:
    matrices, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            tables.append(parameter)
        else:
            (matrices if parameter.ndim == 2 and "pos_embed" not in name else vectors).append(parameter)
    muon = torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": vectors, "lr": plan.vector_rate}]
    groups += [{"params": tables, "lr": plan.table_rate}] if tables else []
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)]


def save_checkpoint(path: Path, model, optimizers: list, step: int, seen: int, plan: Plan) -> None:
    state = {"step": step, "seen": seen, "model": model.state_dict(), "plan": asdict(plan)}
    state["optimizers"] = [o.state_dict() for o in optimizers]
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: Path, model, optimizers: list) -> tuple[int, int]:
    """(steps done, tokens seen)"""
    if not path.exists():
        return 0, 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    logger.info("resumed at step %d", state["step"])
    return state["step"], state["seen"]
