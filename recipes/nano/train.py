"""The nano's training: four stages, each a short list of parameters and a loss, run by one resumable loop.

words     the token table alone, blocks skipped: plain averages of tokens against the teacher's vectors of the texts
          (their direction, and their similarities to the rest of the batch).
sights    the vision tower alone, blocks skipped: the mean visual token against the teacher's vector of the caption,
          among all captions of the set (as LiT, Zhai et al. 2022: the text side is locked).
speech    the blocks and the language dimensions of the token table: the next token of texts, and of captions after
          their picture. The meaning dimensions pass through untouched.

context   everything, gently: the pooled vector through the blocks against the teacher, texts and pictures, while the
          next-token loss keeps the language model.

Why speech has dimensions of its own: with tied embeddings the last hidden state must point at the next token to speak
and at the present one to mean, and trained together on this budget each ruined the other (docs/log.md). So the
residual stream carries two parts. LANGUAGE dimensions are loud in the stream and quiet after the final norm's gain;
the MEANING dimensions are the opposite. Blocks read both and, until the last stage, write only the first.

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
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers import Qwen3VLForConditionalGeneration

from recipes.nano.batches import PictureBatch, PictureData, TextBatch, TextData
from recipes.nano.model import MEANING
from recipes.nano.tokenizer import SPECIAL_TOKENS

logger = logging.getLogger(__name__)

SIGHT_RMS = 1.8  # of a visual token after the sights stage
Parts = dict[str, float]
LossOfStep = Callable[[int], tuple[torch.Tensor, Parts, int]]  # step -> loss, what to log, positions seen


@dataclass(frozen=True)
class Plan:
    seed: int = 0
    word_steps: int = 3500
    sight_steps: int = 900
    speech_steps: int = 1500
    context_steps: int = 0  # the shipped weights have none: not measured yet
    word_tokens: int = 12288  # a step
    sight_pictures: int = 64
    tokens: int = 4096  # of a speech step
    context_tokens: int = 8192
    pictures: int = 32
    picture_share: float = 0.1  # of speech steps
    sight_share: float = 0.2  # of context steps
    speech_weight: float = 0.5  # in context steps
    word_rate: float = 3e-3
    sight_rate: float = 4e-3  # of matrices, Muon
    speech_rate: float = 4e-3  # the same
    context_rate: float = 1e-3  # the same
    table_rate: float = 2e-2
    vector_rate: float = 1e-3  # norms, biases, positions
    warmup: int = 60
    decay_share: float = 0.4
    lm_share: float = 0.5  # positions that get a next-token loss: the vocabulary's product is half of the cost
    direction_weight: float = 8.0
    similarity_weight: float = 2.0
    temperature: float = 0.05
    checkpoint_seconds: float = 150.0


@dataclass
class Data:
    text: TextData
    pictures: PictureData


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

    run_stage(
        "sights",
        model,
        build_optimizers(visual, plan, plan.sight_rate, plan.sight_rate),
        loss_of,
        plan.sight_steps,
        plan,
        folder,
    )


def learn_speech(
    model: Qwen3VLForConditionalGeneration, data: Data, plan: Plan, folder: Path, on_save: Callable[[int], None]
) -> int:
    """Returns the positions seen."""
    model.model.visual.requires_grad_(False)
    part_ways(model, plan.seed)
    hooks = keep_meaning(model)

    def loss_of(step: int) -> tuple[torch.Tensor, Parts, int]:
        if step >= plan.speech_steps // 2 and step % 200 == 0:
            balance(model, data.text, plan, BALANCE)
        if torch.rand(()).item() < plan.picture_share:
            pictures = data.pictures.batch(plan.seed, step, plan.pictures)
            return caption_loss(model, pictures)
        return text_loss(model, data.text.batch(plan.seed, step, plan.tokens), plan)

    optimizers = build_optimizers(model, plan, plan.speech_rate, LOUD * plan.speech_rate)
    seen = run_stage("speech", model, optimizers, loss_of, plan.speech_steps, plan, folder, on_save)
    balance(model, data.text, plan, FINAL_BALANCE)
    model.model.language_model.norm.weight.data *= FINAL_GAIN
    amplify(model, AMPLIFICATION)
    for hook in hooks:
        hook.remove()
    model.requires_grad_(True)
    return seen


def learn_context(
    model: Qwen3VLForConditionalGeneration, data: Data, plan: Plan, folder: Path, on_save: Callable[[int], None]
) -> int:
    """Returns the positions seen."""
    model.model.visual.config._attn_implementation = "eager"

    def loss_of(step: int) -> tuple[torch.Tensor, Parts, int]:
        if torch.rand(()).item() < plan.sight_share:
            batch = data.pictures.batch(plan.seed, step, plan.pictures)
            hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state  # (B, T, H)
            return *picture_match(pool(hidden, batch.picture), batch, plan), batch.picture.numel()
        batch = data.text.batch(plan.seed + 4, step, plan.context_tokens)
        hidden = last_hidden(model, batch.ids)  # (B, T, H)
        loss, parts = distillation(pool(hidden, batch.content()), batch, plan)
        speech = next_token_loss(model, hidden, batch.ids, batch.predicting(), plan.lm_share / 4)
        return loss + plan.speech_weight * speech, {"text": speech.item(), **parts}, batch.ids.numel()

    optimizers = build_optimizers(model, plan, plan.context_rate, plan.context_rate)
    return run_stage("context", model, optimizers, loss_of, plan.context_steps, plan, folder, on_save)


LOUD = 4.0  # RMS of the language dimensions in the residual stream
MEANING_LENGTH = 0.3 * LOUD  # of the loudest token's meaning dimensions
READING_GAIN = 20.0  # of the blocks' norms on meaning, so that blocks see both parts about equally
LANGUAGE_GAIN = 0.05  # of the final norm: with tied weights, the temperature of the language model
AMPLIFICATION = 30.0  # of the finished residual stream
BALANCE = 6.0  # length of meaning over length of language in pooled vectors, while learning to speak
FINAL_BALANCE = 3.6  # the same, in the finished model
FINAL_GAIN = 0.8  # of the final norm: a softer next-token distribution, the same cosines
MEANING_GAIN = 9.0  # of the final norm: pooled vectors are mostly meaning


@torch.no_grad()
def part_ways(model: Qwen3VLForConditionalGeneration, seed: int) -> None:
    """Rescale the residual stream's two parts; pooled meaning keeps its direction."""
    language, merger = model.model.language_model, model.model.visual.merger.linear_fc2
    generator = torch.Generator().manual_seed(seed)
    table, gain = language.embed_tokens.weight, language.norm.weight
    width = table.shape[1] - MEANING
    table[:, :MEANING] = normalize(table, dim=-1)[:, :MEANING] * MEANING_LENGTH
    table[: len(SPECIAL_TOKENS), :MEANING] = 0
    table[:, MEANING:] = torch.randn(len(table), width, generator=generator) * LOUD
    gain[:MEANING] *= MEANING_GAIN
    gain[MEANING:] = LANGUAGE_GAIN
    for layer in language.layers:
        layer.input_layernorm.weight[:MEANING] = READING_GAIN
        layer.post_attention_layernorm.weight[:MEANING] = READING_GAIN
    scale = MEANING_LENGTH / (2 * SIGHT_RMS * MEANING**0.5)
    merger.weight[:MEANING] *= scale
    merger.bias[:MEANING] *= scale
    merger.weight[MEANING:] = 0
    merger.bias[MEANING:] = torch.randn(width, generator=generator) * LOUD


@torch.no_grad()
def balance(model: Qwen3VLForConditionalGeneration, text: TextData, plan: Plan, ratio: float, batches: int = 8) -> None:
    """Set the final norm's gain so that meaning is `ratio` times as long as language in pooled vectors of train texts.

    Learning to speak makes the residual stream much louder (from 4 to 100), which would drown meaning. Done several
    times, so that the language model gets used to it; at the end with a lower ratio: 6 multiplied the perplexity
    by ten there, and 3.6 costs .01 of nDCG@10 (docs/log.md).
    """
    lengths = []
    for step in range(batches):
        batch = text.batch(plan.seed + 3, step, plan.tokens)
        pooled = pool(last_hidden(model, batch.ids), batch.content())  # (B, H)
        lengths.append(pooled[:, :MEANING].norm(dim=-1).mean() / pooled[:, MEANING:].norm(dim=-1).mean())
    found = float(torch.stack(lengths).mean())
    model.model.language_model.norm.weight[:MEANING] *= ratio / found
    logger.info("meaning was %.3f times as long as language, now %.1f", found, ratio)


@torch.no_grad()
def amplify(model: Qwen3VLForConditionalGeneration, factor: float) -> None:
    """Make the residual stream `factor` times as loud, changing no output: every reader of it normalises first.

    What it changes is how far an adapter's step reaches. Meaning dimensions of 0.05 were overrun by the first steps of
    a LoRA at learning rate 1e-3 (all vectors equal, loss ln(batch)); at 1 to 2 they learn.
    """
    language, visual = model.model.language_model, model.model.visual
    language.embed_tokens.weight *= factor
    language.norm.weight /= factor
    for layer in language.layers:
        layer.self_attn.o_proj.weight *= factor
        layer.mlp.down_proj.weight *= factor
    for merger in (visual.merger, *visual.deepstack_merger_list):
        merger.linear_fc2.weight *= factor
        merger.linear_fc2.bias *= factor


def keep_meaning(model: Qwen3VLForConditionalGeneration) -> list[RemovableHandle]:
    """No gradient for what holds or writes meaning: columns of the table, final gain, rows of the output matrices."""
    language = model.model.language_model
    columns = (torch.arange(language.embed_tokens.weight.shape[1]) >= MEANING).float()  # (H,)
    by_column = [language.embed_tokens.weight, language.norm.weight]
    by_row = [m.weight for layer in language.layers for m in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    return [p.register_hook(lambda gradient: gradient * columns) for p in by_column] + [
        p.register_hook(lambda gradient: gradient * columns.unsqueeze(1)) for p in by_row
    ]


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
    loss = next_token_loss(model, hidden, batch.ids, batch.predicting(), plan.lm_share)
    return loss, {"text": loss.item()}, batch.ids.numel()


def caption_loss(model, batch: PictureBatch) -> tuple[torch.Tensor, Parts, int]:
    model.model.language_model.config._attn_implementation = "sdpa"
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state  # (B, T, H)
    ids = batch.inputs["input_ids"]
    loss = next_token_loss(model, hidden, ids, batch.caption, 1.0)
    return loss, {"caption": loss.item()}, ids.numel()


def picture_match(pictures: torch.Tensor, batch: PictureBatch, plan: Plan) -> tuple[torch.Tensor, Parts]:
    """Choose the caption among the set's captions, and point where it points; pictures (B, H) unit vectors."""
    bank = batch.bank  # (N, D)
    pictures = normalize(pictures[:, : bank.shape[1]], dim=-1)
    logits = (pictures @ bank.T).float() / plan.temperature  # (B, N)
    match = cross_entropy(logits.masked_fill(batch.ignored, -1e4), batch.targets)
    direction = (1 - (pictures * bank[batch.targets]).sum(-1)).mean()
    parts = {"match": match.item(), "picture_direction": direction.item()}
    return match + plan.direction_weight / 4 * direction, parts


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
def build_optimizers(
    model: torch.nn.Module, plan: Plan, matrix_rate: float, writer_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for matrices (those that write into the loud residual stream in proportion), AdamW for the rest."""
    matrices, writers, tables, vectors = [], [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if "embed_tokens" in name:
                tables.append(parameter)
            elif parameter.ndim != 2 or "pos_embed" in name:
                vectors.append(parameter)
            else:
                (writers if "o_proj" in name or "down_proj" in name else matrices).append(parameter)
    slow = [{"params": matrices, "lr": matrix_rate}, {"params": writers, "lr": writer_rate}]
    fast = [{"params": vectors, "lr": plan.vector_rate}, {"params": tables, "lr": plan.table_rate}]
    return [
        torch.optim.Muon([g for g in slow if g["params"]], weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([g for g in fast if g["params"]], betas=(0.9, 0.98), weight_decay=0.0),
    ]


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
