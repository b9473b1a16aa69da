"""Small random configurations of architectures of Hugging Face's transformers that people use most, built offline."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxlrd.graph.inputs import Inputs

PREFIX = "transformers:"
_VOCABULARY, _LENGTH, _IMAGE, _FRAMES = 128, 12, 64, 48

_TOKENS = {"vocab_size": _VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_ENCODER = {
    **_TOKENS,
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "max_position_embeddings": 64,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2}
_GPT = {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_BOTH = {
    **_TOKENS,
    **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
    **{"max_position_embeddings": 64, "decoder_start_token_id": 0},
}
_T5 = {**_TOKENS, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_VISION = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": _IMAGE, "patch_size": 16},
}
_WINDOWS = {"image_size": _IMAGE, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_AUDIO = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"vocab_size": _VOCABULARY, "conv_dim": [32, 32, 32], "conv_kernel": [5, 3, 2], "conv_stride": [4, 2, 2]},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
}
_TWO_TOWERS = {
    "text_config": {**_ENCODER, "projection_dim": 32},
    "vision_config": {**_VISION, "projection_dim": 32},
    "projection_dim": 32,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_HYBRID_BACKBONE = {
    **{"model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1]},
    **{"layer_type": "basic", "out_features": ["stage2"]},
}

TEXT, TEXT_TO_TEXT, IMAGE, SOUND, SPECTROGRAM, TEXT_AND_IMAGE = (
    "text", "text to text", "image", "sound", "spectrogram", "text and image",
)  # fmt: skip

MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertForMaskedLM", "BertConfig", _ENCODER, TEXT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _ENCODER, TEXT),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", _ENCODER, TEXT),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {**_TOKENS, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
        TEXT,
    ),
    "electra": ("ElectraForPreTraining", "ElectraConfig", {**_ENCODER, "embedding_size": 32}, TEXT),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 64},
        TEXT,
    ),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**_ENCODER, "embedding_size": 32}, TEXT),
    "mpnet": ("MPNetModel", "MPNetConfig", _ENCODER, TEXT),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**_ENCODER, "cls_token_id": 0, "sep_token_id": 1},
        TEXT,
    ),
    "xlnet": ("XLNetModel", "XLNetConfig", {**_TOKENS, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}, TEXT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT, TEXT),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 8}, TEXT),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {**_ENCODER, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        TEXT,
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _ENCODER, TEXT),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT, TEXT),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_ENCODER, "ffn_dim": 128, "word_embed_proj_dim": 32}, TEXT),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**_TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4}, TEXT),
    "falcon": ("FalconForCausalLM", "FalconConfig", _ENCODER, TEXT),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER, TEXT),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "head_dim": 16}, TEXT),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_DECODER, "num_local_experts": 4}, TEXT),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER, TEXT),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_DECODER, **_EXPERTS, "shared_expert_intermediate_size": 64},
        TEXT,
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 16}, TEXT),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_DECODER, **_EXPERTS, "head_dim": 16}, TEXT),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_DECODER, "head_dim": 16}, TEXT),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_DECODER, "head_dim": 16}, TEXT),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_DECODER, "head_dim": 16}, TEXT),
    "phi": ("PhiForCausalLM", "PhiConfig", _ENCODER, TEXT),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER, TEXT),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _DECODER, TEXT),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _DECODER, TEXT),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", _DECODER, TEXT),
    "cohere": ("CohereForCausalLM", "CohereConfig", _DECODER, TEXT),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _DECODER, TEXT),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**_TOKENS, "hidden_size": 64, "num_hidden_layers": 2}, TEXT),
    "rwkv": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {**_TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "rescale_every": 1, "context_length": 64},
        TEXT,
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5, TEXT_TO_TEXT),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", {**_T5, "feed_forward_proj": "gated-gelu"}, TEXT_TO_TEXT),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BOTH, TEXT_TO_TEXT),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", _BOTH, TEXT_TO_TEXT),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", _BOTH, TEXT_TO_TEXT),
    "marian": ("MarianMTModel", "MarianConfig", _BOTH, TEXT_TO_TEXT),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_BOTH, "num_mel_bins": 16, "max_source_positions": _FRAMES // 2, "max_target_positions": 64},
        SPECTROGRAM,
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", _AUDIO, SOUND),
    "hubert": ("HubertForCTC", "HubertConfig", _AUDIO, SOUND),
    "vit": ("ViTForImageClassification", "ViTConfig", _VISION, IMAGE),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", _VISION, IMAGE),
    "beit": ("BeitForImageClassification", "BeitConfig", {**_VISION, "use_relative_position_bias": True}, IMAGE),
    "swin": ("SwinForImageClassification", "SwinConfig", _WINDOWS, IMAGE),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", _WINDOWS, IMAGE),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", _VISION, IMAGE),
    "clip": ("CLIPModel", "CLIPConfig", _TWO_TOWERS, TEXT_AND_IMAGE),
    "siglip": ("SiglipModel", "SiglipConfig", _TWO_TOWERS, TEXT_AND_IMAGE),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2, "image_size": _IMAGE},
        IMAGE,
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 2], "hidden_sizes": [32, 64]},
            **{"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]},
            "decoder_hidden_size": 32,
        },
        IMAGE,
    ),
    "detr": (
        "DetrForObjectDetection",
        "DetrConfig",
        {
            **{"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4},
            **{"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 8},
            **{"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None},
            "backbone_config": _HYBRID_BACKBONE,
        },
        IMAGE,
    ),
}
"""By name: the class, its configuration's class and arguments, and the kind of its inputs."""


def names() -> list[str]:
    """Return the names of the models. Raises ImportError without transformers."""
    _library()
    return [f"{PREFIX}{name}" for name in MODELS]


def parameters(name: str) -> int:
    """Return the number of a model's parameters."""
    return sum(p.numel() for p in build(name).parameters())


def build(name: str) -> nn.Module:
    """Return a model with seeded random weights in eval mode."""
    library = _library()
    model, config, options, _ = MODELS[name.removeprefix(PREFIX)]
    kind = getattr(library, config)
    if isinstance(options.get("backbone_config"), dict):
        backbone = dict(options["backbone_config"])
        options = {**options, "backbone_config": library.AutoConfig.for_model(backbone.pop("model_type"), **backbone)}
    torch.manual_seed(0)
    built: nn.Module = getattr(library, model)(kind(**options))
    return built.eval()


def inputs(name: str) -> Inputs:
    """Return seeded inputs by name, of a batch of two."""
    return Inputs((), _INPUTS[MODELS[name.removeprefix(PREFIX)][3]](torch.Generator().manual_seed(0)))


def _ids(generator: torch.Generator, length: int = _LENGTH) -> torch.Tensor:
    return torch.randint(2, _VOCABULARY, (2, length), generator=generator)


def _image(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(2, 3, _IMAGE, _IMAGE, generator=generator)


_INPUTS: dict[str, Any] = {
    TEXT: lambda g: {"input_ids": _ids(g)},
    TEXT_TO_TEXT: lambda g: {"input_ids": _ids(g), "decoder_input_ids": _ids(g, _LENGTH // 2)},
    IMAGE: lambda g: {"pixel_values": _image(g)},
    SOUND: lambda g: {"input_values": torch.randn(2, 800, generator=g)},
    SPECTROGRAM: lambda g: {
        "input_features": torch.randn(2, 16, _FRAMES, generator=g),
        "decoder_input_ids": _ids(g, _LENGTH // 2),
    },
    TEXT_AND_IMAGE: lambda g: {"input_ids": _ids(g), "pixel_values": _image(g)},
}


def _library() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers
