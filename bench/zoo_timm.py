"""One small model of each of timm's families (modules of timm.models), and more where kinds of layers differ inside."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from fxlrd.graph.inputs import Inputs

PREFIX = "timm:"
_SMALL = {"img_size": 64}
_SHALLOW = {"depth": 2}

MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "beit_base_patch16_224": ({**_SMALL, **_SHALLOW}, 64),
    "beitv2_base_patch16_224": ({**_SMALL, **_SHALLOW}, 64),
    "mobileone_s1": ({}, 64),
    "repvgg_a0": ({}, 64),
    "gernet_s": ({}, 64),
    "resnet50_clip_gap": ({}, 64),
    "halonet_h1": ({}, 256),
    "eca_botnext26ts_256": ({}, 256),
    "lambda_resnet26t": ({}, 128),
    "cait_xxs24_224": ({**_SMALL, **_SHALLOW}, 64),
    "coat_tiny": ({}, 224),
    "convit_tiny": ({}, 224),
    "convmixer_768_32": ({}, 64),
    "convnext_zepto_rms": ({}, 64),
    "cpubone_nano": ({}, 64),
    "vit_tiny_patch16_224": (_SMALL, 64),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 56, **_SHALLOW}, 56),
    "vit_base_patch16_siglip_gap_224": ({**_SMALL, **_SHALLOW}, 64),
    "crossvit_tiny_240": ({}, 240),
    "csatv2": ({}, 256),
    "cs3darknet_focus_s": ({}, 64),
    "cspnext_tiny": ({}, 64),
    "davit_tiny": ({}, 64),
    "deepseek_vit_412m": (_SHALLOW, 126),
    "deit_tiny_distilled_patch16_224": (_SMALL, 64),
    "deit3_small_patch16_224": ({**_SMALL, **_SHALLOW}, 64),
    "densenet121": ({}, 64),
    "dla46x_c": ({}, 64),
    "dpn48b": ({}, 64),
    "edgenext_xx_small": ({}, 64),
    "efficientformer_l1": ({}, 224),
    "efficientformerv2_s0": ({}, 224),
    "mobilenetv2_035": ({}, 64),
    "efficientnet_b0": ({}, 64),
    "tf_efficientnet_b0": ({}, 64),
    "tf_mixnet_s": ({}, 64),
    "efficientvim_m1": ({}, 64),
    "efficientvit_b0": ({}, 64),
    "efficientvit_m0": ({}, 224),
    "eva02_tiny_patch14_224": ({"img_size": 56}, 56),
    "vit_tiny_patch16_dinov3_qkvb": (_SMALL, 64),
    "fasternet_t0": ({}, 64),
    "fastvit_t8": ({}, 64),
    "focalnet_tiny_srf": ({}, 64),
    "gcvit_xxtiny": ({}, 224),
    "naflexvit_base_patch16_gap": (_SHALLOW, 64),
    "gemma4_vit_167m": (_SHALLOW, 96),
    "qwen3_vit_88m": (_SHALLOW, 64),
    "ghostnet_050": ({}, 64),
    "mobilenetv3_small_050": ({}, 64),
    "tf_mobilenetv3_small_075": ({}, 64),
    "hardcorenas_b": ({}, 64),
    "hgnetv2_b0": ({}, 64),
    "hiera_tiny_224": ({}, 224),
    "sam2_hiera_tiny": ({}, 224),
    "resnet10t": ({}, 64),
    "seresnextaa101d_32x8d": ({"layers": (1, 1, 1, 1)}, 64),
    "hrnet_w18_small": ({}, 64),
    "iformer_t": ({}, 64),
    "inception_next_atto": ({}, 64),
    "inception_resnet_v2": ({}, 96),
    "inception_v3": ({}, 96),
    "inception_v4": ({}, 96),
    "lcnetv2_small": ({}, 64),
    "levit_128s": ({}, 224),
    "lowformer_b0": ({}, 64),
    "maxvit_pico_rw_256": ({}, 256),
    "coatnet_pico_rw_224": ({}, 224),
    "mambaout_femto": ({}, 64),
    "poolformerv2_s12": ({}, 64),
    "caformer_s18": ({}, 64),
    "gmlp_ti16_224": (_SMALL, 64),
    "mixer_s32_224": ({}, 224),
    "mobilenetv5_base": ({}, 64),
    "mobilevit_xxs": ({}, 64),
    "mobilevitv2_050": ({}, 64),
    "mvitv2_tiny": ({}, 224),
    "nasnetalarge": ({}, 96),
    "jx_nest_tiny": ({}, 224),
    "nextvit_small": ({}, 64),
    "nf_regnet_b0": ({}, 64),
    "eca_nfnet_l0": ({}, 64),
    "dm_nfnet_f0": ({}, 64),
    "pit_ti_224": ({}, 224),
    "pnasnet5large": ({}, 96),
    "pvt_v2_b0": ({}, 64),
    "rdnet_tiny": ({}, 64),
    "regnetx_002": ({}, 64),
    "repghostnet_050": ({}, 64),
    "repvit_m1": ({}, 64),
    "res2next50": ({}, 64),
    "resnest14d": ({}, 64),
    "resnetv2_50": ({}, 64),
    "resnetv2_50x1_bit": ({}, 64),
    "rexnet_100": ({}, 64),
    "selecsls42": ({}, 64),
    "legacy_seresnet18": ({}, 64),
    "sequencer2d_s": ({}, 224),
    "shvit_s1": ({}, 64),
    "skresnet18": ({}, 64),
    "starnet_s050": ({}, 64),
    "swiftformer_xs": ({}, 224),
    "swin_tiny_patch4_window7_224": ({}, 224),
    "swinv2_tiny_window8_256": (_SMALL, 64),
    "swinv2_cr_tiny_224": ({}, 224),
    "tiny_vit_5m_224": ({}, 224),
    "tnt_s_patch16_224": (_SHALLOW, 224),
    "tresnet_m": ({}, 64),
    "twins_pcpvt_small": ({}, 224),
    "vgg11": ({}, 64),
    "visformer_tiny": ({}, 224),
    "vit_tiny_r_s16_p8_224": ({}, 224),
    "vit_relpos_small_patch16_224": ({**_SMALL, **_SHALLOW}, 64),
    "samvit_base_patch16_224": (_SHALLOW, 224),
    "vitamin_small_224": ({}, 224),
    "volo_d1_224": ({}, 224),
    "ese_vovnet19b_slim": ({}, 64),
    "legacy_xception": ({}, 96),
    "xception41": ({}, 96),
    "xcit_nano_12_p8_224": ({}, 64),
}
"""By name: the builder's options, and the height and width of the input."""


def names() -> list[str]:
    """Return the names of the models. Raises ImportError without timm."""
    importlib.import_module("timm")
    return [f"{PREFIX}{name}" for name in MODELS]


def parameters(name: str) -> int:
    """Return the number of a model's parameters."""
    return sum(p.numel() for p in build(name).parameters())


def build(name: str) -> nn.Module:
    """Return a model with seeded random weights in eval mode."""
    import timm

    torch.manual_seed(0)
    name = name.removeprefix(PREFIX)
    model: nn.Module = timm.create_model(name, pretrained=False, **MODELS[name][0])
    return model.eval()


def inputs(name: str) -> Inputs:
    """Return a seeded batch of two images."""
    size = MODELS[name.removeprefix(PREFIX)][1]
    return Inputs((torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),))
