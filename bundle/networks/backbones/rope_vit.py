"""ViT with rotary positions: DINOv3.

Sources: Meta's DINOv3 repository (https://github.com/facebookresearch/dinov3, ``get_intermediate_layers``), timm
(``timm/models/eva.py``), transformers (``models/dinov3_vit``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bundle.networks.backbones.spec import DINOV3_PAGE, Layout, State, dinov3_files, rename
from bundle.networks.backbones.vit import Vit

META = (
    (r"^storage_tokens$", "reg_token"),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
TRANSFORMERS = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^layer\.", "blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.([qv])_proj\.bias$", r".attn.\1_bias"),
    (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
)


def _from_meta(state: State) -> State:
    converted = {}
    for key, value in rename(state, META).items():
        if key.endswith("qkv.bias"):
            # the bias of the key is masked to zero in Meta's code, and absent in timm's
            query, _, content = value.chunk(3)
            converted[key.replace("qkv.bias", "q_bias")] = query
            converted[key.replace("qkv.bias", "v_bias")] = content
        # timm computes the periods of RoPE: every layout gives the same network
        elif not key.startswith(("mask_token", "rope_embed.", "local_cls_norm.")) and not key.endswith(".bias_mask"):
            converted[key] = value
    return converted


def _from_transformers(state: State) -> State:
    gated = any(".mlp.gate_proj." in key for key in state)
    rules = (*TRANSFORMERS, (r"\.mlp\.up_proj\.", ".mlp.fc1_x." if gated else ".mlp.fc1."))
    converted = rename(state, rules)
    converted.pop("embeddings.mask_token", None)
    for key in [key for key in converted if key.endswith(".attention.q_proj.weight")]:
        parts = [converted.pop(key.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        converted[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return converted


@dataclass(frozen=True, kw_only=True)
class RopeVit(Vit):
    """A ViT with rotary positions. Layers are blocks."""

    license: str = "DINOv3"
    page: str = DINOV3_PAGE

    layouts = (
        Layout("meta", "storage_tokens", _from_meta),
        Layout("transformers", "embeddings.cls_token", _from_transformers),
    )

    def to_timm(self, state: State, expected: State) -> tuple[str, State]:
        """See :class:`BackboneSpec`; networks trained without biases of query and value get biases of zero."""
        publisher, state = super().to_timm(state, expected)
        biases = {key: value for key, value in expected.items() if key.endswith((".q_bias", ".v_bias"))}
        if not biases.keys() & state.keys():
            state |= {key: torch.zeros_like(value) for key, value in biases.items()}
        return publisher, state

    def tapped(self, network: Any, layers: list[int], details: list[int], publisher: str, blocks: str) -> nn.Module:
        """See :class:`BackboneSpec`."""
        return _Blocks(network, layers, self.norm_from(network, blocks), blocks == "averaged")


class _Blocks(nn.Module):
    """The blocks up to the deepest tapped one, followed by the final norm from block ``norm_from`` on.

    The same as timm's ``Eva.forward_intermediates``, which TorchScript refuses.
    """

    def __init__(self, network: Any, layers: list[int], norm_from: int, averages: bool) -> None:
        super().__init__()
        self.patch_embed, self.rope, self.norm = network.patch_embed, network.rope, network.norm
        self.cls_token, self.reg_token = network.cls_token, network.reg_token
        self.blocks = network.blocks[: layers[-1] + 1]
        self.layers = layers
        self.norm_from = norm_from
        self.averages = averages

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embed(image)
        height, width = patches.shape[1], patches.shape[2]
        prefix = torch.cat([self.cls_token, self.reg_token], dim=1)
        tokens = torch.cat([prefix.expand(patches.shape[0], -1, -1), patches.flatten(1, 2)], dim=1)
        rope = self.rope.get_embed([height, width])
        maps: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, rope=rope)
            if index in self.layers:
                embeddings = self.norm(tokens) if index >= self.norm_from else tokens
                embeddings = embeddings[:, prefix.shape[1] :]
                maps.append(embeddings.transpose(1, 2).unflatten(2, [height, width]))
        return torch.stack(maps).mean(dim=0) if self.averages else torch.cat(maps, dim=1)


def _dinov3(name: str, timm_name: str) -> RopeVit:
    return RopeVit(timm_name=f"{timm_name}.lvd1689m", files=dinov3_files(name, timm_name))


BACKBONES = {
    # the variants without qkvb have no room for the bias of query and value that Meta's files hold
    "dinov3_vits16": _dinov3("dinov3_vits16", "vit_small_patch16_dinov3_qkvb"),
    "dinov3_vits16plus": _dinov3("dinov3_vits16plus", "vit_small_plus_patch16_dinov3_qkvb"),
    "dinov3_vitb16": _dinov3("dinov3_vitb16", "vit_base_patch16_dinov3_qkvb"),
    "dinov3_vitl16": _dinov3("dinov3_vitl16", "vit_large_patch16_dinov3_qkvb"),
    "dinov3_vith16plus": _dinov3("dinov3_vith16plus", "vit_huge_plus_patch16_dinov3_qkvb"),
    "dinov3_vit7b16": _dinov3("dinov3_vit7b16", "vit_7b_patch16_dinov3"),
}
