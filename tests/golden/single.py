"""Cases of what is no loss: a pooling, an optimizer's step, makers of pairs, measures, a step in chunks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from eval.diagnostics import discriminant
from mmembed import diagnostics
from mmembed.data.collate import Batch, plan_chunks
from mmembed.data.pair_makers.random_crops import crop
from mmembed.data.pair_makers.word_repetition import repeat
from mmembed.data.words import split_words
from mmembed.embeddings import Embeddings
from mmembed.objectives import build_objective
from mmembed.pooling import POOLINGS
from mmembed.preprocess import Row
from mmembed.training.gradcache import contrastive_step
from mmembed.training.optimizers import Lion
from tests.golden.case import GRADIENT, LOSS, Compared, Entry, equal, golden, inputs, labels_of, tensor


@golden("nv-embed", "pooling `latent_attention`", "latent attention")
def latent_attention(entry: Entry) -> Iterator[Compared]:
    """The released block."""
    of = {key: tensor(value, grad=False) for key, value in entry["inputs"].items()}
    block = {"type": "latent_attention", "num_latents": 3, "num_heads": 2, "dim_head": 4, "feed_forward_multiplier": 2}
    pooling = POOLINGS.build(block, hidden_size=4).double()
    with torch.no_grad():
        pooling.latents.copy_(of["latents"])
        pooling.to_query.weight.copy_(of["Wq"])
        pooling.to_key_value.weight.copy_(torch.cat([of["Wk"], of["Wv"]]))
        pooling.to_output.weight.copy_(of["Wo"])
        pooling.feed_forward_in.weight.copy_(of["W1"])
        pooling.feed_forward_in.bias.copy_(of["b1"])
        pooling.feed_forward_out.weight.copy_(of["W2"])
        pooling.feed_forward_out.bias.copy_(of["b2"])
        pooled = pooling(of["hidden"], of["pool_mask"].bool())
    embedding = functional.normalize(pooled, dim=-1)
    yield equal(LOSS, embedding.sum(), entry["loss"])
    yield equal("pooled", pooled, entry["expected"]["pooled"])
    yield equal("embedding", embedding, entry["expected"]["embedding"])


@golden("lion", "`mmembed.training.optimizers.Lion`")
def lion(entry: Entry) -> Iterator[Compared]:
    """A step."""
    parameters = entry["params"]
    parameter = torch.nn.Parameter(tensor(entry["inputs"]["p"], grad=False))
    optimizer = Lion(
        [parameter],
        lr=parameters["lr"],
        betas=(parameters["beta1"], parameters["beta2"]),
        weight_decay=parameters["weight_decay"],
    )
    optimizer.state[parameter]["momentum"] = tensor(entry["inputs"]["exp_avg"], grad=False)
    parameter.grad = tensor(entry["inputs"]["grad"], grad=False)
    optimizer.step()
    yield equal(LOSS, parameter.sum(), entry["loss"], 1e-12)
    yield equal("p", parameter, entry["expected"]["p"], 1e-12)
    yield equal("exp_avg", optimizer.state[parameter]["momentum"], entry["expected"]["exp_avg"], 1e-12)


@golden("gradcache", "`contrastive_step` in chunks")
def gradcache(entry: Entry) -> Iterator[Compared]:
    rows = torch.cat(inputs(entry, "x", "y"))  # (6, 3)
    weight = torch.nn.Parameter(tensor(entry["inputs"]["W"], grad=False))

    def encode(chunk: object) -> Embeddings:
        return Embeddings(functional.normalize(torch.tanh(rows[[row.ids[0] for row in chunk.rows]] @ weight), dim=1))

    chunks = plan_chunks([Row([index]) for index in range(6)], chunk_tokens=10, chunk_rows=entry["params"]["chunk"])
    objective = build_objective({"type": "contrastive", "temperature": entry["params"]["temperature"]})
    batch = Batch(3, 3, chunks, torch.arange(6), labels_of(3, 3))
    loss, _ = contrastive_step(encode, objective, batch, keep_tokens=2)
    yield equal(LOSS, loss, entry["loss"])
    assert weight.grad is not None
    yield equal(GRADIENT + "W", weight.grad.norm(), entry["grad_norms"]["W"])
    yield equal("grad_W", weight.grad, entry["expected"]["grad_W"])


@golden("contriever", "pairs `random_crops`: `crop`", "independent random cropping", trains=False)
def random_crops(entry: Entry) -> Iterator[Compared]:
    """Ratios and starts were drawn there."""
    of = entry["inputs"]
    tokens, crops = of["tokens"], {}
    for side in ("q", "k"):
        ratio = of[f"ratio_{side}"]
        places = len(tokens) - int(len(tokens) * ratio) + 1
        crops[side] = crop(tokens, ratio, place=(of[f"start_{side}"] + 0.5) / places)
        yield equal(side, crops[side], entry["expected"][side], 0.0)
    yield equal(LOSS, sum(map(len, crops.values())), entry["loss"], 0.0)


@golden("esimcse", "pairs `word_repetition`: `repeat`", "repetition augmentation", trains=False)
def word_repetition(entry: Entry) -> Iterator[Compared]:
    """Words are compared by their places in the text."""
    tokens = entry["inputs"]["tokens"]
    repeated = [word.text for word in repeat(split_words(" ".join(tokens)), entry["inputs"]["dup_positions"])]
    yield equal("tokens", [*map(tokens.index, repeated)], [*map(tokens.index, entry["expected"]["tokens"])], 0.0)
    yield equal(LOSS, len(repeated), entry["loss"], 0.0)


@golden("alignment-uniformity", "measure `alignment` of logs", "alignment", trains=False)
def alignment(entry: Entry) -> Iterator[Compared]:
    yield equal(LOSS, diagnostics.alignment(*inputs(entry, "x", "y")), entry["loss"])


@golden("alignment-uniformity", "measure `uniformity` of logs", "uniformity", trains=False)
def uniformity(entry: Entry) -> Iterator[Compared]:
    yield equal(LOSS, diagnostics.uniformity(*inputs(entry, "x")), entry["loss"])


@golden("gda", "measure `eval.diagnostics.discriminant`", trains=False)
def gaussian_discriminant(entry: Entry) -> Iterator[Compared]:
    of, expected = entry["inputs"], entry["expected"]
    classifier = discriminant.fit(of["features"], of["labels"])
    logits = discriminant.with_descriptions(classifier, of["test"], of["text_classifier"], entry["params"]["alpha"])
    yield equal(LOSS, logits.sum(), entry["loss"])
    yield equal("W", classifier.weights, expected["W"])
    yield equal("b", classifier.bias, expected["b"])
    yield equal("logits", logits, expected["logits"])
