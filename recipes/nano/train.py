"""The nano's training: four stages, each a short list of parameters and a loss, run by one resumable loop.

words     the token table alone, blocks skipped: plain averages of tokens against the teacher's vectors of the texts
          (their direction, and their similarities to the rest of the batch); train queries against their documents,
          and sentences against their paragraphs, among the other documents of the batch.
sights    the vision tower alone, blocks skipped: the mean visual token against the teacher's vector of the caption,
          among all captions of the set (as LiT, Zhai et al. 2022: the text side is locked).
language  the blocks, the token table and the output matrix: the next token of every position, and the mean of the last
          states against the teacher or, in some steps, queries against documents. It needs no picture, so sights run
          beside it, a process each.
together  everything: texts as in `language`, pictures through the blocks against their captions' vectors, and captions
          word by word after their picture.

The final norm's gain stays as it is: 1 for meaning, small for language. In training the output matrix reads the last
state before that gain, so that a dimension can be quiet for the mean and loud for the next token; `export` folds the
gain into the matrix.

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
from torch.nn.functional import cross_entropy, embedding_bag, kl_div, log_softmax, normalize
from tqdm import tqdm
from transformers import Qwen3VLForConditionalGeneration

from recipes.nano.batches import PairBatch, PairData, PictureBatch, PictureData, TextBatch, TextData

logger = logging.getLogger(__name__)

Parts = dict[str, float]
LossOfStep = Callable[[int], tuple[torch.Tensor, Parts, int]]  # step -> loss, what to log, positions seen
OnSave = Callable[[int], None]


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

    def of_stage(self, name: str) -> dict[str, float]:
        """What the stage `name` depends on: its own settings and those of no stage."""
        others = tuple(f"{stage.rstrip('s')}_" for stage in STAGES if stage != name)
        return {key: value for key, value in asdict(self).items() if not key.startswith(others)}


STAGES = ("words", "sights", "language", "together")
CHECKPOINT_SECONDS = 150.0


@dataclass
class Data:
    text: TextData
    pairs: PairData
    pictures: PictureData


# --------------------------------------------------------------------------------------------------- stages
def learn_words(model: Qwen3VLForConditionalGeneration, data: Data, plan: Plan, folder: Path) -> int:
    """Returns the positions seen, as every stage does."""
    language = model.model.language_model
    optimizer = torch.optim.Adam([language.embed_tokens.weight], lr=plan.word_rate)

    def loss_of(step: int) -> tuple[torch.Tensor, Parts, int]:
        table = language.norm(language.embed_tokens.weight)  # (V, H), what a token's last state is without blocks
        texts = data.text.mixed(plan.seed + 1, step, plan.word_texts)
        loss, parts = distillation(pool_tokens(table, texts), texts, plan)
        pairs = data.pairs.batch(plan.seed + 1, step, size=plan.word_pairs)
        cloze = data.pairs.cloze(plan.seed + 1, step, size=plan.word_pairs)
        found, placed = (
            pair_match(pool_tokens(table, batch.queries), pool_tokens(table, batch.documents), batch, plan)
            for batch in (pairs, cloze)
        )
        parts |= {"pair": found.item(), "cloze": placed.item()}
        sides = (texts, pairs.queries, pairs.documents, cloze.queries, cloze.documents)
        return loss + plan.pair_weight * (found + placed), parts, sum(int(side.content().sum()) for side in sides)

    return run_stage("words", model, [optimizer], loss_of, plan.word_steps, plan, folder)


def learn_sights(model: Qwen3VLForConditionalGeneration, data: Data, plan: Plan, folder: Path) -> int:
    language, visual = model.model.language_model, model.model.visual
    visual.config._attn_implementation = "eager"

    def loss_of(step: int) -> tuple[torch.Tensor, Parts, int]:
        batch = data.pictures.batch(plan.seed + 2, step, plan.sight_pictures)
        seen = visual(batch.inputs["pixel_values"], grid_thw=batch.inputs["image_grid_thw"]).pooler_output  # (S, H)
        counts = batch.picture.sum(-1) - 2  # without the two border tokens
        pictures = torch.stack([part.mean(0) for part in language.norm(seen).float().split(counts.tolist())])
        return *picture_match(normalize(pictures, dim=-1), batch, plan), len(seen)

    optimizers = build_optimizers(visual, plan, plan.sight_rate)
    return run_stage("sights", model, optimizers, loss_of, plan.sight_steps, plan, folder)


def learn_language(
    model: Qwen3VLForConditionalGeneration, data: Data, plan: Plan, folder: Path, on_save: OnSave
) -> int:
    model.model.visual.requires_grad_(False)

    def loss_of(step: int) -> tuple[torch.Tensor, Parts, int]:
        return language_loss(model, data, plan.seed, step, plan.language_tokens, plan)

    optimizers = build_optimizers(model, plan, plan.language_rate)
    seen = run_stage("language", model, optimizers, loss_of, plan.language_steps, plan, folder, on_save)
    model.model.visual.requires_grad_(True)
    return seen


def learn_together(
    model: Qwen3VLForConditionalGeneration, data: Data, plan: Plan, folder: Path, on_save: OnSave
) -> int:
    model.model.visual.config._attn_implementation = "eager"

    def loss_of(step: int) -> tuple[torch.Tensor, Parts, int]:
        if torch.rand(()).item() < plan.together_sight_share:
            return picture_loss(model, data.pictures.batch(plan.seed, step, plan.together_pictures), plan)
        return language_loss(model, data, plan.seed + 4, step, plan.together_tokens, plan)

    optimizers = build_optimizers(model, plan, plan.together_rate)
    return run_stage("together", model, optimizers, loss_of, plan.together_steps, plan, folder, on_save)


def run_stage(
    name: str,
    model: Qwen3VLForConditionalGeneration,
    optimizers: list[torch.optim.Optimizer],
    loss_of: LossOfStep,
    steps: int,
    plan: Plan,
    folder: Path,
    on_save: OnSave = lambda step: None,
) -> int:
    """Steps from the stage's last checkpoint to its end (none, when it was finished); returns positions seen."""
    path = folder / f"{name}.pt"
    start, seen = load_checkpoint(path, model, optimizers, plan)
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
        if time.monotonic() - saved > CHECKPOINT_SECONDS or step + 1 == steps:
            save_checkpoint(path, model, optimizers, step + 1, seen, plan)
            on_save(step + 1)
            saved = time.monotonic()
    return seen


def rate_at(step: int, steps: int, plan: Plan) -> float:
    """Warm up, hold, then fall linearly to zero over the last `decay_share` of the steps."""
    return min(1.0, (step + 1) / plan.warmup, (steps - step) / (steps * plan.decay_share))


# --------------------------------------------------------------------------------------------------- losses
def last_hidden(model: Qwen3VLForConditionalGeneration, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, H) of right-padded texts. On a CPU the fused attention's backward pass only pays beyond 64 tokens."""
    model.model.language_model.config._attn_implementation = "eager" if ids.shape[1] <= 64 else "sdpa"
    return model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state


def text_loss(model: Qwen3VLForConditionalGeneration, batch: TextBatch, plan: Plan) -> tuple[torch.Tensor, Parts, int]:
    hidden = last_hidden(model, batch.ids)  # (B, T, H)
    loss, parts = distillation(pool(hidden, batch.content()), batch, plan)
    speech = next_token_loss(model, hidden, batch.ids, batch.predicting(), plan.lm_share)
    return loss + plan.speech_weight * speech, {"text": speech.item(), **parts}, batch.ids.numel()


def language_loss(
    model: Qwen3VLForConditionalGeneration, data: Data, seed: int, step: int, tokens: int, plan: Plan
) -> tuple[torch.Tensor, Parts, int]:
    if torch.rand(()).item() < plan.pair_share:
        return pair_loss(model, data.pairs.batch(seed, step, tokens=tokens), plan)
    return text_loss(model, data.text.batch(seed, step, tokens), plan)


def pair_loss(model: Qwen3VLForConditionalGeneration, batch: PairBatch, plan: Plan) -> tuple[torch.Tensor, Parts, int]:
    """Queries against documents, and the next token of the documents."""
    queries, documents = last_hidden(model, batch.queries.ids), last_hidden(model, batch.documents.ids)  # (B, T, H)
    found = pair_match(pool(queries, batch.queries.content()), pool(documents, batch.documents.content()), batch, plan)
    speech = next_token_loss(model, documents, batch.documents.ids, batch.documents.predicting(), plan.lm_share)
    seen = batch.queries.ids.numel() + batch.documents.ids.numel()
    return plan.pair_weight * found + plan.speech_weight * speech, {"text": speech.item(), "pair": found.item()}, seen


def pair_match(queries: torch.Tensor, documents: torch.Tensor, batch: PairBatch, plan: Plan) -> torch.Tensor:
    """InfoNCE in both directions over unit vectors (B, H); the same document or query elsewhere is no negative."""
    logits = (queries @ documents.T).float().div(plan.temperature).masked_fill(batch.same, -1e4)  # (B, B)
    own = torch.arange(len(queries))
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
    return match + plan.speech_weight * caption, {"caption": caption.item(), **parts}, ids.numel()


def picture_match(pictures: torch.Tensor, batch: PictureBatch, plan: Plan) -> tuple[torch.Tensor, Parts]:
    """Choose the caption among the set's captions, and point where it points; pictures (B, H) unit vectors."""
    bank = batch.bank  # (N, H)
    logits = (pictures @ bank.T).float() / plan.temperature  # (B, N)
    match = cross_entropy(logits.masked_fill(batch.ignored, -1e4), batch.targets)
    direction = (1 - (pictures * bank[batch.targets]).sum(-1)).mean()
    parts = {"match": match.item(), "picture_direction": direction.item()}
    return match + plan.direction_weight / 4 * direction, parts


def next_token_loss(
    model: Qwen3VLForConditionalGeneration, hidden: torch.Tensor, ids: torch.Tensor, where: torch.Tensor, share: float
) -> torch.Tensor:
    """Mean cross-entropy of a random `share` of the positions `where` (B, T - 1)."""
    chosen = where & (torch.rand(where.shape) < share) if share < 1 else where
    return cross_entropy(next_token_logits(model, hidden[:, :-1][chosen]).float(), ids[:, 1:][chosen])


def next_token_logits(model: Qwen3VLForConditionalGeneration, hidden: torch.Tensor) -> torch.Tensor:
    """(..., V) of last hidden states (..., H), by the output matrix as it is in training: before the norm's gain."""
    return model.lm_head(hidden / model.model.language_model.norm.weight)


def distillation(pooled: torch.Tensor, batch: TextBatch, plan: Plan) -> tuple[torch.Tensor, Parts]:
    """Direction to the teacher's vector, and KL between the rows of both similarity matrices."""
    if not bool(batch.known.any()):
        return pooled.sum() * 0.0, {}
    teacher = batch.teacher[batch.known]
    student = pooled[batch.known]
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


def pool_tokens(table: torch.Tensor, batch: TextBatch) -> torch.Tensor:
    """`pool` where a token's state depends on the token alone, `table` (V, H): (B, H) without ever being (B, T, H)."""
    content = batch.content()  # (B, T)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), content.sum(-1).cumsum(0)[:-1]])
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
    state = torch.load(path, weights_only=True)
    asked, saved = plan.of_stage(path.stem), state["plan"]
    if differing := sorted(key for key in asked.keys() | saved.keys() if asked.get(key) != saved.get(key)):
        raise ValueError(f"{path} was made with another {', '.join(differing)}: use a fresh --work folder")
    model.load_state_dict(state["model"])
    for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved_state)
    logger.info("%s: resumed at step %d", path.stem, state["step"])
    return state["step"], state["seen"]
