"""Tiny random backbones of every supported family, built from their configs, with a tokenizer trained on the spot.

Real architectures of transformers with a few hundred thousand parameters each; nothing is downloaded. `build_family`
writes a folder that `load_backbone` reads as it would read a downloaded model. Costs about half a second each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import mmembed.backbones  # noqa: F401  declares the operators that torchvision misses
from mmembed.content import to_content
from mmembed.models.embedding_model import EmbedderSettings, EmbeddingModel, build_from_settings
from mmembed.preprocess import Item, Preprocessor

TEXT_FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma3_text")
VISION_FAMILIES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava_onevision",
    "smolvlm",
    "idefics3",
    "gemma3",
    "paligemma",
)
FAMILIES = TEXT_FAMILIES + VISION_FAMILIES
AUDIO_FAMILIES = ("qwen2_5_omni",)  # text, pictures and sounds
MOE_FAMILIES = ("qwen3_moe", "mixtral", "qwen3_vl_moe")  # mixtures of experts
MODEL_TYPES = {*FAMILIES, *MOE_FAMILIES, *(f"{name}_thinker" for name in AUDIO_FAMILIES)}  # that are built tiny

DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,  # a multiple of the 4-bit block
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}
EXPERTS = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "initializer_range": 0.2,  # at 0.02 the experts of so small a model hardly differ
}
CHATML = (
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{%- for part in message.content -%}{%- if part.type == 'image' -%}IMAGE"
    "{%- elif part.type == 'audio' -%}AUDIO{%- else -%}{{ part.text }}"
    "{%- endif -%}{%- endfor -%}{% endif %}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)
GEMMA_CHAT = (
    CHATML.replace("<|im_start|>", "<start_of_turn>")
    .replace("<|im_end|>", "<end_of_turn>")
    .replace("{%- for message", "{{ bos_token }}{%- for message", 1)
)
SENTENCES = (
    "The cat sat on the mat while the dog slept in the garden.",
    "A red bus drives through the old town of Prague.",
    "What is the capital of France? Paris is the capital of France.",
    "Instruct: Given a question, retrieve passages.\nQuery: ",
    "Photosynthesis turns sunlight, water and carbon dioxide into sugar.",
    "Der Hund schläft im Garten, und die Katze auch.",
    "Summarize the given text in one word: user system assistant",
    "Der schöne Tag! 12345 67890 (see table 3) - naïve café",
)
MARKS = {
    "qwen": (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
    "omni": (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_bos|>",
        "<|vision_eos|>",
        "<|audio_bos|>",
        "<|audio_eos|>",
        "<|IMAGE|>",
        "<|AUDIO|>",
        "<|VIDEO|>",
    ),
    "llava": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
    "idefics": (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<fake_token_around_image>",
        "<image>",
        "<end_of_utterance>",
        "<global-img>",
        "<video>",
        *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
    ),
    "gemma": (
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    ),
    "pali": ("<pad>", "<eos>", "<bos>", "<unk>", "<image>"),
}


TEXTS = ("a red bus in Prague", "The cat", "Photosynthesis turns sunlight, water and carbon dioxide into sugar.")


def picture(seed: int = 0, width: int = 90, height: int = 60) -> Image.Image:
    """A picture of coloured noise."""
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8))


def tone(pitch: float = 440.0, seconds: float = 0.5, rate: int = 16000) -> np.ndarray:
    """A sine of so many Hz with one overtone."""
    time = np.arange(int(seconds * rate)) * (2 * np.pi / rate)
    return (0.5 * np.sin(pitch * time) + 0.2 * np.sin(2 * pitch * time)).astype(np.float32)


def build_family(name: str, folder: Path) -> Path:
    """Writes a tiny model of family `name` with its processor into `folder / name`; returns that folder."""
    torch.manual_seed(0)
    target = Path(folder) / name
    model, processor = _BUILDERS[name](name)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    return target


@cache
def _tokenizer_json(kind: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES * 4,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=list(MARKS[kind]),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer.to_str()


def make_tokenizer(kind: str, add_bos: bool = False, **special: Any) -> tf.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; `add_bos` makes it open every text with its first mark, as Llama's does."""
    backend = Tokenizer.from_str(_tokenizer_json(kind))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if kind in ("gemma", "pali"):
        names = {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}
    if add_bos:
        names["bos_token"] = names.get("bos_token", "<|im_start|>")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{names['bos_token']} $A",
            special_tokens=[(names["bos_token"], backend.token_to_id(names["bos_token"]))],
        )
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, **names, **special)


def _ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }


def _text(name: str) -> tuple[Any, Any]:
    kind = "gemma" if name == "gemma3_text" else "qwen"
    tokenizer = make_tokenizer(kind, add_bos=name in ("llama", "mistral", "gemma3_text"))
    tokenizer.chat_template = GEMMA_CHAT if kind == "gemma" else CHATML
    cls = {
        "qwen2": tf.Qwen2Config,
        "qwen3": tf.Qwen3Config,
        "llama": tf.LlamaConfig,
        "mistral": tf.MistralConfig,
        "qwen3_moe": tf.Qwen3MoeConfig,
        "mixtral": tf.MixtralConfig,
        "gemma3_text": tf.Gemma3TextConfig,
    }[name]
    extra: dict[str, Any] = {
        "qwen3": {"head_dim": 16},
        "qwen3_moe": {"head_dim": 16, **EXPERTS, "mlp_only_layers": []},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2, "head_dim": 16},
        "mistral": {"sliding_window": 16},
        "gemma3_text": {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    }.get(name, {})
    config = cls(**DECODER, **_ids(tokenizer), tie_word_embeddings=True, **extra)
    return tf.AutoModelForCausalLM.from_config(config), tokenizer


def _qwen_vl(name: str) -> tuple[Any, Any]:
    tokenizer = make_tokenizer("qwen")
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer.chat_template = template
    marks = {
        f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>")
        for key, mark in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = {**DECODER, **_ids(tokenizer), "rope_parameters": rope}
    if name == "qwen2_vl":
        patch, config_class, processor_class, video = (
            14,
            tf.Qwen2VLConfig,
            tf.Qwen2VLProcessor,
            tf.Qwen2VLVideoProcessor,
        )
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": patch}
    elif name == "qwen2_5_vl":
        patch, config_class, processor_class, video = (
            14,
            tf.Qwen2_5_VLConfig,
            tf.Qwen2_5_VLProcessor,
            tf.Qwen2VLVideoProcessor,
        )
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": patch,
            "fullatt_block_indexes": [1],
        }
    else:
        mixture = name == "qwen3_vl_moe"
        patch, config_class, processor_class, video = (
            16,
            tf.Qwen3VLMoeConfig if mixture else tf.Qwen3VLConfig,
            tf.Qwen3VLProcessor,
            tf.Qwen3VLVideoProcessor,
        )
        text |= {"head_dim": 16, "rope_parameters": {**rope, "mrope_interleaved": True}}
        text |= EXPERTS if mixture else {}
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": patch,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        }
    config = config_class(text_config=text, vision_config=vision, tie_word_embeddings=True, **marks)
    size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 12 * (2 * patch) ** 2}
    images = tf.Qwen2VLImageProcessor(patch_size=patch, merge_size=2, temporal_patch_size=2, size=size)
    processor = processor_class(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=video(patch_size=patch, size=size),
        chat_template=template,
    )
    return tf.AutoModelForImageTextToText.from_config(config), processor


def _qwen_omni(name: str) -> tuple[Any, Any]:
    marks = {
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }
    tokenizer = make_tokenizer("omni", extra_special_tokens=marks)
    template = CHATML.replace("IMAGE", "<|vision_bos|><|IMAGE|><|vision_eos|>", 1).replace(
        "%}AUDIO{", "%}<|audio_bos|><|AUDIO|><|audio_eos|>{"
    )
    tokenizer.chat_template = template
    mark = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    config = tf.Qwen2_5OmniThinkerConfig(
        text_config={**DECODER, **_ids(tokenizer), "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
        },
        audio_config={
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "num_mel_bins": 16,
            "output_dim": 64,
            "initializer_range": 0.2,  # at 0.02 so small a tower hardly hears
        },
        image_token_id=mark("<|IMAGE|>"),
        audio_token_id=mark("<|AUDIO|>"),
        video_token_id=mark("<|VIDEO|>"),
        vision_start_token_id=mark("<|vision_bos|>"),
        audio_start_token_id=mark("<|audio_bos|>"),
        audio_end_token_id=mark("<|audio_eos|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    size = {"shortest_edge": 28**2, "longest_edge": 12 * 28**2}
    processor = tf.Qwen2_5OmniProcessor(
        image_processor=tf.Qwen2VLImageProcessor(patch_size=14, merge_size=2, temporal_patch_size=2, size=size),
        video_processor=tf.Qwen2VLVideoProcessor(patch_size=14, size=size),
        feature_extractor=tf.WhisperFeatureExtractor(feature_size=16, chunk_length=300),
        tokenizer=tokenizer,
        chat_template=template,
    )
    return tf.Qwen2_5OmniThinkerForConditionalGeneration(config), processor


def _llava_onevision(name: str) -> tuple[Any, Any]:
    tokenizer = make_tokenizer("llava", extra_special_tokens={"image_token": "<image>", "video_token": "<video>"})
    template = CHATML.replace("IMAGE", "<image>")
    tokenizer.chat_template = template
    pinpoints = [[56, 56], [56, 112], [112, 56], [112, 112]]
    config = tf.LlavaOnevisionConfig(
        text_config=tf.Qwen2Config(**DECODER, **_ids(tokenizer)).to_dict(),
        vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    processor = tf.LlavaOnevisionProcessor(
        image_processor=tf.LlavaOnevisionImageProcessor(
            size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        video_processor=tf.LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    return tf.AutoModelForImageTextToText.from_config(config), processor


def _idefics(name: str) -> tuple[Any, Any]:
    tokenizer = make_tokenizer("idefics")
    template = CHATML.replace("IMAGE", "<image>")
    tokenizer.chat_template = template
    config_class = {"idefics3": tf.Idefics3Config, "smolvlm": tf.SmolVLMConfig}[name]
    config = config_class(
        text_config=tf.LlamaConfig(**DECODER, **_ids(tokenizer)).to_dict(),
        vision_config={
            **{
                key: VISION[key]
                for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            },
            "image_size": 64,
            "patch_size": 16,
        },
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    sizes = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}}
    shared = {"tokenizer": tokenizer, "image_seq_len": 4, "chat_template": template}
    if name == "idefics3":
        processor = tf.Idefics3Processor(image_processor=tf.Idefics3ImageProcessor(**sizes), **shared)
    else:
        processor = tf.SmolVLMProcessor(
            image_processor=tf.SmolVLMImageProcessor(**sizes), video_processor=tf.SmolVLMVideoProcessor(), **shared
        )
    return tf.AutoModelForImageTextToText.from_config(config), processor


def _gemma3(name: str) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(
        "gemma",
        add_bos=True,
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    template = GEMMA_CHAT.replace("IMAGE", "<start_of_image>")
    tokenizer.chat_template = template
    mark = tokenizer.convert_tokens_to_ids
    text = {
        **DECODER,
        **_ids(tokenizer),
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    config = tf.Gemma3Config(
        text_config=text,
        vision_config=VISION,
        mm_tokens_per_image=4,
        boi_token_id=mark("<start_of_image>"),
        eoi_token_id=mark("<end_of_image>"),
        image_token_id=mark("<image_soft_token>"),
        image_token_index=mark("<image_soft_token>"),
    )
    model = tf.AutoModelForImageTextToText.from_config(config)
    torch.nn.init.normal_(
        model.model.multi_modal_projector.mm_input_projection_weight, std=0.02
    )  # zeros: no image would matter
    processor = tf.Gemma3Processor(
        image_processor=tf.Gemma3ImageProcessor(size={"height": 56, "width": 56}, image_seq_length=4),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=template,
    )
    return model, processor


def _paligemma(name: str) -> tuple[Any, Any]:
    tokenizer = make_tokenizer("pali", extra_special_tokens={"image_token": "<image>"})
    images = tf.SiglipImageProcessor(size={"height": 56, "width": 56})
    images.image_seq_length = 16
    processor = tf.PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)  # adds its location tokens first
    config = tf.PaliGemmaConfig(
        text_config={**DECODER, **_ids(tokenizer), "model_type": "gemma", "head_dim": 16},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=64,
        hidden_size=64,
    )
    return tf.AutoModelForImageTextToText.from_config(config), processor


_BUILDERS: dict[str, Callable[[str], tuple[Any, Any]]] = {
    **dict.fromkeys((*TEXT_FAMILIES, "qwen3_moe", "mixtral"), _text),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _qwen_vl),
    "qwen2_5_omni": _qwen_omni,
    "llava_onevision": _llava_onevision,
    "smolvlm": _idefics,
    "idefics3": _idefics,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
}


def build(folder: Path, **settings: object) -> tuple[EmbeddingModel, Preprocessor]:
    model, preprocessor = build_from_settings(EmbedderSettings(str(folder), **settings))
    return model.eval(), preprocessor


def contents(name: str) -> list[object]:
    """Text; and for vision families image, image with text, several images of several shapes."""
    if name in (*TEXT_FAMILIES, "qwen3_moe", "mixtral"):
        return list(TEXTS)
    sounds: list[object] = [
        {"audio": tone(440), "sampling_rate": 16000},
        {"audio": tone(880, 0.31), "sampling_rate": 16000, "text": "what is heard"},
        {"audio": tone(660, 0.7, 22050), "sampling_rate": 22050, "image": picture(5)},
    ]
    return [
        *(sounds if name in AUDIO_FAMILIES else []),
        *TEXTS,
        {"image": picture(1)},
        {"image": picture(2, 40, 100), "text": "what is it"},
        {"images": [picture(3), picture(4, 120, 56)], "text": "compare"},
    ]


def items(name: str) -> list[Item]:
    return [
        Item(to_content(content), "query" if at % 2 else "document", "Find it")
        for at, content in enumerate(contents(name))
    ]


@torch.inference_mode()
def vectors(
    model: EmbeddingModel, preprocessor: Preprocessor, batch: list[Item], side: str | None = None
) -> torch.Tensor:
    return model(preprocessor(batch, side)).vectors
