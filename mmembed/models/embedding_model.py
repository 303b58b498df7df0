"""The embedding model: backbone -> pooling -> projection -> normalisation, from `ModelInputs` to float32 vectors.

What makes it exact and fast: left-padded batches are turned into right-padded ones first, so padding side cannot
matter; and under causal attention a right-padded batch needs no attention mask at all (no real token sees the
padding behind it), which lets the attention kernel skip the masked half of the work. Settings are plain data, saved
as `mmembed.json`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from mmembed.backbones import Backbone, Family, load_backbone
from mmembed.backbones.adapters import adapted, apply_adapter, quantization_of, run
from mmembed.backbones.attention import prepare
from mmembed.backbones.block_attention import Blocks, Read, position_ids
from mmembed.backbones.experts import Mixture, biased, condition_routers, mixture_of, recording, watch_routers
from mmembed.backbones.last_tokens import LastTokens, prepare_last
from mmembed.backbones.layers import check_layers, decoder_of, keep_layers, last_and_lower, watch
from mmembed.backbones.output_embedding import OutputEmbedding, load_output_embedding
from mmembed.backbones.packed import AttentionKernel, Packed, no_kernel, unknown
from mmembed.backbones.patches import in_dtype
from mmembed.backbones.shared_prefix import Prefix, SharedPrefix, flatten, unflatten
from mmembed.config.blocks import PROMPT_TYPES
from mmembed.embeddings import Embeddings, Layer
from mmembed.errors import ConfigError, MmembedError
from mmembed.heads import HEADS, Head
from mmembed.heads.attention import Attention
from mmembed.packaged import FOLDERS
from mmembed.pooling import POOLINGS, Pooling
from mmembed.pooling.last_token import LastToken, last_places
from mmembed.preprocess import Lengths, ModelInputs, Preprocessor, StoredImages
from mmembed.prompts import PROMPTS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from mmembed.config.blocks import EmbedderConfig
    from mmembed.media import MediaStore


WORDS = "head 'yes_no'"


@dataclass
class EmbedderSettings:
    """Everything that defines an embedder beside its weights, as plain JSON data.

    `attention: None` keeps the backbone's own. Blocks are as in the config; `adapter` None is no adapter.
    `layers` are the lower ones whose vectors were trained, too; `domains` those that condition routers. With a `head`
    it is a reranker: vectors are the head's logits of pairs, and neither normalised nor projected; `head["ids"]` are
    the tokens of its words.
    `trust_remote_code` is the user's word in this process: it is neither written to a checkpoint nor read from one.
    """

    name_or_path: str
    revision: str | None = None
    attention: str | None = None
    dtype: str = "auto"
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    adapter: dict[str, Any] | None = None
    freeze: tuple[str, ...] = ("vision", "audio")
    pooling: str | dict[str, Any] = "mean"
    normalize: bool = True
    projection: int | None = None
    prompt: str | dict[str, Any] = "plain"
    lengths: dict[str, Any] = field(default_factory=lambda: asdict(Lengths()))
    layers: tuple[int, ...] = ()
    domains: tuple[str, ...] = ()
    head: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.freeze, self.layers = tuple(self.freeze), tuple(self.layers)  # JSON has lists
        self.domains = tuple(self.domains)

    @property
    def adapter_type(self) -> str:
        return "none" if self.adapter is None else self.adapter["type"]


class EmbeddingModel(nn.Module):
    """ModelInputs -> Embeddings.

    Args:
        backbone: maps token ids to hidden states; may be wrapped by peft.
        projection: a last linear map to the embedding size, or None.
        settings: what `mmembed.json` will say.
    """

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel,
        family: Family,
        pooling: Pooling,
        projection: nn.Linear | Head | None,
        normalize: bool,
        settings: EmbedderSettings,
    ) -> None:
        super().__init__()
        self.backbone, self.pooling, self.projection, self.normalize = backbone, pooling, projection, normalize
        self.family, self.settings = family, settings
        self.output_embedding: OutputEmbedding | None = None  # given where an objective predicts tokens
        self._virtual_tokens = settings.adapter_type in PROMPT_TYPES
        self.fresh_head = head_sums(self)
        self._unshared = self._prepare_sharing()
        self.reads_last = self._prepare_last()  # the last layer can be computed of the last tokens alone
        self.lower_layers: tuple[int, ...] = ()
        self.domain_bias: nn.Parameter | None = None  # (domains, layers, experts)
        if settings.domains:
            shape = (len(settings.domains), *condition_routers(self.base))
            self.domain_bias = nn.Parameter(torch.zeros(shape))
        self._routed: Mixture | None = None  # given where an objective looks at routers
        self._hooks: list[Any] = []
        self._whole_depth = self.depth

    @property
    def config(self) -> Any:
        """The text configuration of the backbone: DeepSpeed's "auto" reads `hidden_size` here."""
        return self.family.config.get_text_config()

    @property
    def embedding_size(self) -> int:
        """E, the size of a vector."""
        if isinstance(self.projection, Head):
            return self.projection.logits
        return self.projection.out_features if isinstance(self.projection, nn.Linear) else self.pooling.embedding_size

    @property
    def depth(self) -> int:
        """How many layers the decoder has."""
        return int(self.config.num_hidden_layers)

    @property
    def is_cut(self) -> bool:
        """Whether `cut` took layers away."""
        return self.depth < self._whole_depth

    def give_layers(self, layers: Collection[Layer]) -> None:
        """From now on `forward` also gives the vectors of these layers (`Embeddings.layers`), through final norm,
        pooling, projection and normalisation of the last. Saved settings will name them.

        Args:
            layers: of 1 to depth - 1.

        Raises:
            ConfigError: there is no such layer below the last, or the decoder is not known.
        """
        wanted = sorted(layer if isinstance(layer, int) else 0 for layer in layers)
        if wanted and not 1 <= wanted[0] <= wanted[-1] < self.depth:
            raise ConfigError(f"layers: found {wanted}; the backbone has {self.depth}, give 1 to {self.depth - 1}")
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if wanted:
            check_layers(self.config)
            self._hooks = watch(decoder_of(self.base), wanted)
        self.lower_layers = tuple(wanted)
        self.settings = replace(self.settings, layers=self.lower_layers)

    def give_routing(self, what: str) -> None:
        """From now on `forward` also tells where the routers sent tokens (`Embeddings.routing`).

        Args:
            what: needs it, for the message.

        Raises:
            ConfigError: the backbone is no mixture of experts, or its routers are not known.
        """
        watch_routers(self.base, what)
        self._routed = mixture_of(self.family.config)

    def cut(self, layers: int) -> None:
        """Drops the decoder layers above the first `layers`, in place: vectors are then those of that layer.

        Raises:
            ConfigError: there are not so many, or the decoder is not known.
        """
        keep_layers(self.base, layers)
        self.reads_last = self._prepare_last()
        trained = tuple(one for one in self.settings.layers if one < layers)
        self.give_layers([one for one in self.lower_layers if one < layers])
        self.settings = replace(self.settings, layers=trained)

    @property
    def one_at_a_time(self) -> bool:
        """Whether threads must not run it beside each other: peft exchanges weights of experts during a pass."""
        return bool((self.settings.adapter or {}).get("experts"))

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the backbone's activations."""
        return self.backbone.dtype

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes activations in the backward pass: about 30 % slower, memory of one layer."""
        self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False})

    def merge_adapter(self) -> None:
        """Adds LoRA's product to the weights, in place: inference at the speed of the bare backbone.

        The adapter stays as it is for saving. Equal to 1e-6 in float32; a bfloat16 base rounds the sum. A 4-bit base is
        left alone (the sum would be rounded to 4 bits), and so are adapters that are not LoRA.
        """
        if self.settings.adapter_type in ("lora", "dora", "rslora"):
            adapted(self.backbone).merge_adapter()

    def gradient_checkpointing_disable(self) -> None:
        self.backbone.gradient_checkpointing_disable()

    def parameter_towers(self) -> dict[str, str]:
        """Parameter name -> tower: vision, projector, language or pooling (the projection belongs to pooling)."""
        patterns = self.family.towers()
        return {
            name: next((tower for tower, pattern in patterns.items() if re.search(pattern, name)), "language")
            if name.startswith("backbone.")
            else "router"
            if name == "domain_bias"
            else "pooling"
            for name, _ in self.named_parameters()
        }

    def unshared(self, has_images: bool = False) -> str | None:
        """Why inputs that begin with the same tokens are computed one by one; None where that is computed once."""
        return self._unshared or self.family.unshared(has_images)

    def unpacked(self, kernel: AttentionKernel, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why texts of a batch are computed with their padding; None where they are packed.

        Args:
            kernel: "auto" packs where that is known to be exact and torch has a kernel for it.
            dtype: that attention computes in.

        Raises:
            ConfigError: "packed" was asked for, and is not known to be exact for this model.
        """
        if kernel == "padded":
            return "attention_kernel is padded"
        reason = self._unpackable()
        if kernel == "packed" and reason is not None:
            raise ConfigError(f"attention_kernel: 'packed' cannot be ({reason}); set it to auto or padded")
        return reason or (no_kernel(self.config, device, dtype) if kernel == "auto" else None)

    def _unpackable(self) -> str | None:
        return self._unshared or unknown(self.config, self.family.causal)

    def _prepare_sharing(self) -> str | None:
        if self._virtual_tokens:
            return f"adapter.type '{self.settings.adapter_type}' puts tokens of its own in front"
        return prepare(self.base)

    @property
    def reads_last_alone(self) -> bool:
        """Whether the last layer is computed of the last tokens alone, unless tokens are to be predicted."""
        return self.reads_last and not self.lower_layers and self._routed is None

    def _prepare_last(self) -> bool:
        causal = self.family.causal and not self._virtual_tokens
        vision = self.family.config.to_dict().get("vision_config") or {}
        whole = len(vision.get("deepstack_visual_indexes") or ())  # layers to whose tokens pictures add features
        last = isinstance(self.pooling, LastToken) and causal and self.depth > whole
        return last and prepare_last(decoder_of(self.base))

    @property
    def base(self) -> PreTrainedModel:
        """The backbone without what an adapter put around it."""
        if self.settings.adapter_type == "none":
            return cast("PreTrainedModel", self.backbone)
        return cast("PreTrainedModel", adapted(self.backbone).get_base_model())

    def forward(self, inputs: ModelInputs) -> Embeddings:
        """Embeds a batch: -> vectors (B, E), or (B, T, E) and mask (B, T); as many of each of `lower_layers`; and what
        `inputs.predicted` costs."""
        with self.in_domain(inputs.domain):
            return self._embed(inputs)

    def in_domain(self, domain: str | None) -> AbstractContextManager[None]:
        """Inside of it routers know the domain. One that was not trained, or None, changes nothing."""
        if self.domain_bias is None or domain not in self.settings.domains:
            return nullcontext()
        return biased(self.domain_bias[self.settings.domains.index(domain)])

    def _embed(self, inputs: ModelInputs) -> Embeddings:
        tensors, pool_mask, predicted = self.given(inputs)
        ids = tensors["input_ids"]  # (B, T)
        has_images = "pixel_values" in tensors or inputs.images is not None
        has_media = has_images or "input_features" in tensors
        if inputs.tail is not None:
            return self._judge_list(tensors, pool_mask, inputs)
        last_alone = self.reads_last_alone and predicted is None
        if inputs.shared and self.unshared(has_images) is None:
            whole = predicted is not None or self._routed is not None
            hidden, pool_mask = self._run_shared(tensors, pool_mask, inputs.shared, inputs.prefix, whole, last_alone)
        elif inputs.lengths and not has_media and self._unpackable() is None:
            hidden = self._run_packed(tensors["input_ids"], inputs.lengths)  # (B, T, H) each
        else:
            last = LastTokens(last_places(pool_mask)) if last_alone else None
            given: dict[str, Any] = tensors if last is None else {**tensors, "last_tokens": last}
            hidden = self._with_lower(lambda: run(self.family, self.backbone, given, self.settings.adapter_type))
            pool_mask = _of_last(pool_mask, last)
        routing = None if self._routed is None else _summed(hidden.pop(), inputs)
        vectors = [self.head(one, pool_mask) for one in hidden]  # (B, E) or (B, T, E) each
        if inputs.filler:  # rows without content; times 0, so that every parameter takes part on every rank
            vectors = [one[: -inputs.filler] + 0.0 * one[-inputs.filler :].sum() for one in vectors]
            pool_mask = pool_mask[: -inputs.filler]
        lower = dict(zip(self.lower_layers, vectors[1:], strict=True)) or None
        nll = count = None
        if predicted is not None:
            nll, count = self._predict(hidden[0], ids, predicted)
            nll, count = nll[: len(vectors[0])], count[: len(vectors[0])]
        mask = pool_mask if self.pooling.multi_vector else None
        return Embeddings(vectors[0], mask, lower, nll, count, routing)

    def given(self, inputs: ModelInputs) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor | None]:
        """What the backbone gets of a batch, right-padded: tensors, pool mask (B, T), and predicted (B, T), if any."""
        tensors, pool_mask, predicted = right_padded(inputs)
        if inputs.padding is None or (self.family.causal and not self._virtual_tokens):
            tensors.pop("attention_mask")
        tensors = {
            name: in_dtype(tensor, self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        if inputs.images is not None:
            tensors = self._with_features(tensors, inputs.images)
        return tensors, pool_mask, predicted

    def _judge_list(self, tensors: dict[str, Any], pool_mask: torch.Tensor, inputs: ModelInputs) -> Embeddings:
        """Of a list of N documents: their shares of the query's attention (N, 1), and what its answer costs."""
        blocks, hidden = self.run_list(tensors, pool_mask, inputs)
        assert blocks.shares is not None and hidden is not None and inputs.tail is not None, "every layer follows"
        shares = blocks.shares[: len(inputs)].unsqueeze(1)  # (N, 1)
        if torch.is_grad_enabled():  # layers above the one that is read take part, on every rank
            shares = shares + 0.0 * hidden.sum()
        if not inputs.tail.predicted:
            return Embeddings(shares)
        last = torch.tensor([inputs.tail.ids], device=hidden.device)  # (1, L)
        predicted = torch.zeros_like(last, dtype=torch.bool)
        predicted[:, -inputs.tail.predicted :] = True
        nll, count = self._predict(hidden[:, -last.shape[1] :], last, predicted)  # (1,) each
        others = (0, len(shares) - 1)  # the list's cost stands at its first document
        return Embeddings(shares, nll=F.pad(nll, others), predicted=F.pad(count, others))

    @property
    def list_head(self) -> Attention:
        """The head of a model that reads lists."""
        assert isinstance(self.projection, Attention), "only such a model reads lists"
        return self.projection

    def one_position(self, position: int, device: torch.device) -> torch.Tensor:
        """Of one token of text, as the backbone takes it."""
        probe = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=device)}
        axes = self.family.position_ids(self.base, probe)
        return torch.full((1, 1) if axes is None else (*axes.shape[:-2], 1, 1), position, device=device)

    def list_layout(
        self, tensors: dict[str, Any], pool_mask: torch.Tensor, inputs: ModelInputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (..., N, P + T) of a list's rows, and which of the documents' own tokens are real, (N, T) bool.

        Raises:
            MmembedError: a document does not end before the last block begins.
        """
        ids, offset = tensors["input_ids"], self.list_head.offset  # (N, P + T)
        if ids.shape[1] > offset:
            raise MmembedError(
                f"head 'attention': block 0 and a document take {ids.shape[1]} tokens, and the last block stands at "
                f"position {offset}; raise head.offset, or lower lengths"
            )
        real = pool_mask[:, inputs.shared :].clone()  # (N, T)
        if inputs.filler:
            real[-inputs.filler :] = False
        positions = self.family.position_ids(self.base, tensors)  # (3, N, P + T) or None
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids) if positions is None else positions, real

    def run_list(
        self, tensors: dict[str, Any], pool_mask: torch.Tensor, inputs: ModelInputs, stop: bool = False
    ) -> tuple[Blocks, torch.Tensor | None]:
        """The backbone on a list in one sequence: what its blocks gave, and hidden states (1, P + N * T + L, H).

        Args:
            stop: at the layer whose attention is read; there are no hidden states then.

        Raises:
            MmembedError: as `list_layout`.
        """
        prefix, tail, head = inputs.shared, inputs.tail, self.list_head
        assert tail is not None, "of a list"
        positions, real = self.list_layout(tensors, pool_mask, inputs)
        places = position_ids(flatten(positions, prefix), len(tail.ids), head.offset)  # (..., 1, P + N * T + L)
        last = torch.tensor([tail.ids], device=real.device)  # (1, L)
        sequence = torch.cat([flatten(tensors["input_ids"], prefix), last], dim=1)
        layer = head.of(self.depth)
        blocks = Blocks(self.config, prefix, real, len(tail.ids), layer, tail.signals, head.kernel, stop)
        try:
            return blocks, self.run_behind(blocks, sequence, places, media_of(tensors))[0]
        except Read:
            return blocks, None

    def head(self, hidden: torch.Tensor, pool_mask: torch.Tensor) -> torch.Tensor:
        """Pooling, projection, normalisation: hidden states (B, T, H), mask (B, T) -> (B, E) or (B, T, E) float32."""
        vectors = self.pooling(hidden, pool_mask)  # (B, H) or (B, T, H)
        if self.projection is not None:
            vectors = self.projection(vectors.to(self.projection.weight.dtype))  # pooling adds in 32 bits
        return F.normalize(vectors.float(), dim=-1) if self.normalize else vectors.float()

    def _with_lower(self, run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        """Last hidden states (B, T, H), those of `lower_layers`; and what routers said (B, T, 2 * experts), where that
        is given."""
        if self._routed is None:
            return last_and_lower(decoder_of(self.base), self.lower_layers, run) if self.lower_layers else [run()]
        with recording(self._routed.chosen) as routes:
            hidden = last_and_lower(decoder_of(self.base), self.lower_layers, run)
        assert routes.found is not None, "the backbone has routers"
        rows, tokens, _ = hidden[0].shape
        return [*hidden, routes.found.unflatten(0, (rows, -1))[:, -tokens:]]  # virtual tokens stand in front

    def _predict(
        self, hidden: torch.Tensor, ids: torch.Tensor, predicted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-log p of the predicted tokens, summed over each input, and their number, (B,) each."""
        if self.output_embedding is None:
            raise MmembedError("tokens are to be predicted, and the model was given no output_embedding")
        return self.output_embedding(hidden, ids, predicted, self.base.get_input_embeddings())

    def _with_features(self, tensors: dict[str, Any], images: StoredImages) -> dict[str, Any]:
        """The tensors with features of images in place of pixels; features that the store lacks are computed for it."""
        features = dict(images.found)
        if images.missing:
            pixels = {name: tensors[name] for name in ("pixel_values", *self.family.image_rows)}
            with torch.no_grad():
                output = cast("Any", self.base).get_image_features(**pixels, return_dict=True)
            for key, computed in zip(images.missing, self.family.split_features(output, pixels), strict=True):
                images.store.put(key, computed)
                features[key] = computed
        in_order = [{name: one.to(self.device) for name, one in features[key].items()} for key in images.keys]
        others = {name: tensor for name, tensor in tensors.items() if name in (*_SEQUENCE, *_SOUNDS)}
        rows = {name: torch.stack([one[name] for one in in_order]) for name in self.family.image_rows}
        return {**others, **rows, "mm_encoder_outputs": {"image": self.family.join_features(in_order)}}

    @torch.no_grad()
    def read_prefix(self, ids: torch.Tensor, domain: str | None = None) -> Prefix:
        """What batches of a domain whose rows begin with these tokens (P,) need of them (`ModelInputs.prefix`). Text
        only."""
        shared = SharedPrefix(self.config, len(ids), 0)
        positions = torch.arange(len(ids), device=ids.device)
        with self.in_domain(domain):
            output = self.run_behind(shared, ids.unsqueeze(0), positions.unsqueeze(0), {})  # (1, P, H) each
        return Prefix(tuple(shared.attended), tuple(one[0] for one in output))

    def _run_shared(
        self,
        tensors: dict[str, Any],
        pool_mask: torch.Tensor,
        prefix: int,
        known: Prefix | None,
        whole: bool,
        last_alone: bool,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Hidden states of rows that begin with the same `prefix` tokens, of each layer, and their pool mask.

        The prefix's own columns come back only where the rows are wanted `whole`, or some of them are pooled; of a last
        layer that computes the last tokens alone (B, 1, H) come back.
        """
        ids = tensors["input_ids"]  # (B, P + T)
        rows, length = ids.shape
        positions = self.family.position_ids(self.base, tensors)  # (3, B, P + T) or None
        if positions is None:
            positions = torch.arange(length, device=ids.device).expand(rows, length)  # (B, P + T)
        shared = SharedPrefix(self.config, prefix, rows, known)
        start = 0 if known is None else prefix
        sequence, places = (flatten(tensor, prefix)[..., start:] for tensor in (ids, positions))
        last = LastTokens(last_places(pool_mask[:, prefix:])) if last_alone else None
        media = media_of(tensors)
        output = self.run_behind(shared, sequence, places, media, last)  # (1, P + B * T, H) each, or without P
        if last is not None and last.calls:
            return output, _of_last(pool_mask, last)
        if known is None:
            parts = [unflatten(one, prefix, rows) for one in output]  # (P, H) and (B, T, H) each
        else:
            parts = [(head, unflatten(one, 0, rows)[1]) for head, one in zip(known.hidden, output, strict=True)]
        if not whole and not pool_mask[:, :prefix].any():
            return [own for _, own in parts], pool_mask[:, prefix:]
        return [torch.cat([head.expand(rows, -1, -1), own], dim=1) for head, own in parts], pool_mask

    def run_behind(
        self,
        shared: SharedPrefix,
        ids: torch.Tensor,
        positions: torch.Tensor,
        media: dict[str, Any],
        last: LastTokens | None = None,
    ) -> list[torch.Tensor]:
        """The backbone on one sequence (1, N), with its media: hidden states (1, N, H), of each layer."""
        followed = {} if last is None else {"last_tokens": last}
        made = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # given in 4 dimensions: none is made
        output = self._with_lower(
            lambda: (
                self.backbone(
                    input_ids=ids,
                    position_ids=positions,
                    attention_mask=made,
                    shared_prefix=shared,
                    **followed,
                    **media,
                    return_dict=True,
                ).last_hidden_state
            )
        )
        self._check_followed(shared, "share_prefix", "off")
        return output

    def _run_packed(self, ids: torch.Tensor, lengths: tuple[int, ...]) -> list[torch.Tensor]:
        """Hidden states (B, T, H) of right-padded texts (B, T), of each layer; nothing is computed of the padding."""
        packed = Packed(self.config, lengths, self.family.causal, ids.device)
        output = self._with_lower(
            lambda: (
                self.backbone(
                    input_ids=packed.pack(ids),
                    position_ids=packed.positions.unsqueeze(0),
                    attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),  # as in `_run_shared`
                    packed_sequences=packed,
                    return_dict=True,
                ).last_hidden_state
            )
        )  # (1, N, H) each
        self._check_followed(packed, "attention_kernel", "padded")
        return [packed.unpack(one) for one in output]

    def _check_followed(self, layout: SharedPrefix | Packed, option: str, remedy: str) -> None:
        """Raises MmembedError where layers have another attention than ours: code that a model brings may."""
        if layout.calls < self.config.num_hidden_layers:
            raise MmembedError(
                f"{option}: {layout.calls} of {self.config.num_hidden_layers} layers of "
                f"'{self.family.config.model_type}' use the attention that it needs; set {option}: {remedy}"
            )


def head_sums(model: EmbeddingModel) -> dict[str, float]:
    """The sum of absolute values of each tensor of pooling and projection: tells whether training changed them."""
    parts = {"pooling": model.pooling, "projection": model.projection}
    return {
        f"{part}.{name}": tensor.detach().cpu().double().abs().sum().item()
        for part, module in parts.items()
        if module is not None
        for name, tensor in module.state_dict().items()
        if not tensor.is_meta  # of an outline, which is never trained
    }


def build_embedding_model(cfg: EmbedderConfig, media: MediaStore | None = None) -> tuple[EmbeddingModel, Preprocessor]:
    """Model and preprocessor for training: loads the backbone, adds a fresh adapter and pooling."""
    return build_from_settings(settings_of(cfg), media)


def settings_of(cfg: EmbedderConfig) -> EmbedderSettings:
    """The part of a training config that defines the embedder."""
    return EmbedderSettings(
        name_or_path=cfg.model.name_or_path,
        revision=cfg.model.revision,
        attention=cfg.model.attention,
        dtype="float32" if cfg.model.dtype == "auto" and cfg.adapter.type == "none" else cfg.model.dtype,
        attn_implementation=cfg.model.attn_implementation,
        trust_remote_code=cfg.model.trust_remote_code,
        adapter=cfg.adapter.model_dump(mode="json"),
        freeze=tuple(cfg.model.freeze),
        pooling=cfg.pooling,
        normalize=cfg.normalize,
        projection=cfg.projection,
        domains=tuple(sorted({source.domain for source in cfg.data.train if source.domain is not None})),
        head=None if cfg.head is None else {"type": cfg.head} if isinstance(cfg.head, str) else dict(cfg.head),
        prompt=cfg.prompt,
        lengths=cfg.lengths.model_dump(mode="json"),
    )


def build_from_settings(
    settings: EmbedderSettings,
    media: MediaStore | None = None,
    dtype: str | torch.dtype | None = None,
    fresh: bool = True,
) -> tuple[EmbeddingModel, Preprocessor]:
    """Builds an embedder from plain settings; pooling, projection and adapter are freshly initialised.

    Args:
        dtype: overrides the settings' dtype.
        fresh: a head of words takes their output embeddings from the backbone; False where saved ones are read later.

    Raises:
        ConfigError: an unknown name or option, or a combination that cannot work.
    """
    prompt = PROMPTS.build(settings.prompt)  # names are checked before weights are loaded
    POOLINGS.build(settings.pooling, hidden_size=8)
    if settings.head is not None:
        HEADS.build(block_of(settings.head), hidden_size=8)
    backbone = load_backbone(
        settings.name_or_path,
        revision=settings.revision,
        attention=settings.attention,
        dtype=settings.dtype if dtype is None else dtype,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
        quantization=quantization_of(settings.adapter),
    )
    model, preprocessor = assemble(backbone, settings, prompt=prompt, media=media)
    if fresh and isinstance(model.projection, Head) and model.projection.words:
        ids = word_ids(model.projection, preprocessor.tokenizer)
        model.settings = replace(model.settings, head={**(settings.head or {}), "ids": list(ids)})
        output = load_output_embedding(model.family, settings.name_or_path, settings.revision, model.dtype, WORDS)
        tied = cast("torch.Tensor", model.base.get_input_embeddings().weight)
        weight = tied if output.weight is None else output.weight
        with torch.no_grad():
            model.projection.weight.copy_(weight[list(ids)])
    return model, preprocessor


def check_lists(head: Attention, backbone: Backbone) -> None:
    """Raises ConfigError where the backbone cannot read lists of documents with this head."""
    text = backbone.config.get_text_config()
    head.of(text.num_hidden_layers)
    known = getattr(text, "max_position_embeddings", None)
    if known is not None and head.offset >= known:
        raise ConfigError(
            f"head 'attention': offset {head.offset}, and the backbone '{backbone.config.model_type}' knows positions "
            f"below {known}; set head.offset lower, above the longest document"
        )
    kinds, width = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    windows = width is not None and width <= head.offset and (not kinds or "sliding_attention" in kinds)
    reason = backbone.family.unshared(False) if backbone.family.causal else "its attention is bidirectional"
    if windows:
        reason = f"layers with a sliding window of {width} do not see from offset {head.offset} to the documents"
    if reason is not None:
        raise ConfigError(
            f"head 'attention': the backbone '{backbone.config.model_type}' cannot read lists ({reason}); take head "
            "yes_no, or another backbone"
        )


def block_of(head: dict[str, Any]) -> dict[str, Any]:
    """What builds a head, of settings that also say which tokens its words are."""
    return {key: value for key, value in head.items() if key != "ids"}


def word_ids(head: Head, tokenizer: Any) -> tuple[int, ...]:
    """The token of each word of a head. Raises ConfigError where one is several tokens, or none."""
    found = []
    for word in head.words:
        ids = tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1 or tokenizer.decode(ids) != word:
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise ConfigError(
                f"head '{head.name}': '{word}' is not one token of this tokenizer, but {len(ids)} ({pieces}); name "
                "words that are, or take head: linear"
            )
        found += ids
    if len(set(found)) != len(found):
        raise ConfigError(f"head '{head.name}': {' and '.join(map(repr, head.words))} are the same token")
    return tuple(found)


def assemble(
    backbone: Backbone, settings: EmbedderSettings, prompt: Any = None, media: MediaStore | None = None
) -> tuple[EmbeddingModel, Preprocessor]:
    """Puts pooling, projection, adapter and preprocessor around a loaded backbone."""
    prompt = prompt if prompt is not None else PROMPTS.build(settings.prompt)
    if settings.name_or_path not in FOLDERS and os.path.isdir(settings.name_or_path):  # checkpoints load from anywhere
        settings = replace(settings, name_or_path=os.path.abspath(settings.name_or_path))
    lengths = Lengths(**settings.lengths)
    backbone.family.set_pixel_limits(lengths.min_pixels, lengths.max_pixels)
    pooling = POOLINGS.build(settings.pooling, hidden_size=backbone.config.get_text_config().hidden_size)
    last = vars(type(pooling))["name"] == "last_token"
    append_eos = prompt.append_eos if prompt.append_eos is not None else last
    module = apply_adapter(backbone, settings.adapter or {"type": "none"}, settings.freeze)
    projection: nn.Linear | Head | None = None
    if settings.head is not None:
        projection = HEADS.build(block_of(settings.head), hidden_size=pooling.embedding_size)
        if isinstance(projection, Attention):
            check_lists(projection, backbone)
    elif settings.projection is not None:
        projection = nn.Linear(pooling.embedding_size, settings.projection, bias=False)
    device = next(backbone.model.parameters()).device
    model = EmbeddingModel(module, backbone.family, pooling, projection, settings.normalize, settings).to(device)
    return model, Preprocessor(backbone.processor, backbone.family, prompt, lengths, media, append_eos, last)


_SOUNDS = ("input_features", "feature_attention_mask")
_SEQUENCE = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # tensors of shape (B, T)


def media_of(tensors: dict[str, Any]) -> dict[str, Any]:
    """Those of pictures and sounds, and nothing of texts."""
    return {name: tensor for name, tensor in tensors.items() if name not in _SEQUENCE}


def _summed(of_tokens: torch.Tensor, inputs: ModelInputs) -> torch.Tensor:
    """(rows, T, N) of right-padded tokens -> (B, N), sums over those of each input."""
    lengths = inputs.tensors["attention_mask"].sum(1, keepdim=True)  # (rows, 1)
    real = torch.arange(of_tokens.shape[1], device=lengths.device) < lengths  # (rows, T)
    return (of_tokens * real.unsqueeze(-1)).sum(1)[: len(inputs)]


def _of_last(pool_mask: torch.Tensor, last: LastTokens | None) -> torch.Tensor:
    """The pool mask of the hidden states: (B, 1) where these are of the last tokens alone."""
    return pool_mask if last is None or not last.calls else torch.ones_like(pool_mask[:, :1])


def right_padded(inputs: ModelInputs) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """The batch with its padding on the right: tensors, pool mask (B, T), and predicted (B, T), if any.

    Image order is unchanged by it.
    """
    if inputs.padding != "left":
        return dict(inputs.tensors), inputs.pool_mask, inputs.predicted
    attended = inputs.tensors["attention_mask"]  # (B, T)
    columns = torch.arange(attended.shape[1], device=attended.device)
    order = (columns + (attended.shape[1] - attended.sum(1, keepdim=True))) % attended.shape[1]  # (B, T)
    tensors = {
        name: tensor.gather(1, order) if name in _SEQUENCE else tensor for name, tensor in inputs.tensors.items()
    }
    predicted = None if inputs.predicted is None else inputs.predicted.gather(1, order)
    return tensors, inputs.pool_mask.gather(1, order), predicted
