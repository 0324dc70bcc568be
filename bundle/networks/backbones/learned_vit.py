"""ViT with learned positions: DINOv2 and what was trained from it.

Sources: Meta's DINOv2 repository (https://github.com/facebookresearch/dinov2, ``interpolate_pos_encoding``), timm
(``timm/models/vision_transformer.py``), transformers (``models/dinov2``, ``models/dinov2_with_registers``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bundle.networks.backbones.spec import Layout, State, rename
from bundle.networks.backbones.vit import Vit

META = (
    (r"^register_tokens$", "reg_token"),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # the training code groups blocks
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
TRANSFORMERS = (
    (r"^embeddings\.(cls|mask)_token$", r"\1_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)


def _from_meta(state: State) -> State:
    return _settle_tokens(rename(state, META))


def _from_transformers(state: State) -> State:
    converted = rename(state, TRANSFORMERS)
    for query in [key for key in converted if ".attention.attention.query." in key]:
        parts = [converted.pop(query.replace("query", part)) for part in ("query", "key", "value")]
        converted[query.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return _settle_tokens(converted)


def _settle_tokens(state: State) -> State:
    """Without the token for masks; with registers, the position of the class token is part of it, as in timm."""
    state.pop("mask_token", None)
    if "reg_token" in state:
        positions = state.pop("pos_embed")
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    return state


class Interpolation(NamedTuple):
    """How learned positions come to another grid; always bicubic.

    Attributes:
        name: for the identity of a model.
        antialias: as ``torch.nn.functional.interpolate`` has it.
        offset: patches that are added to the side of the new grid where the scale is computed.
    """

    name: str
    antialias: bool
    offset: float


ANTIALIASED = Interpolation("bicubic, antialiased", antialias=True, offset=0.0)
INTERPOLATIONS = {
    "meta": Interpolation("bicubic, 0.1 patches larger", antialias=False, offset=0.1),
    "transformers": Interpolation("bicubic", antialias=False, offset=0.0),
    "timm": ANTIALIASED,
}


@dataclass(frozen=True, kw_only=True)
class LearnedVit(Vit):
    """A ViT with learned positions. Layers are blocks.

    Positions come to another grid as the publisher of the file does it; all agree where there are registers.

    Attributes:
        registers: whether the network has register tokens.
    """

    license: str = "Apache-2.0"
    page: str = "https://github.com/facebookresearch/dinov2"
    patch: int = 14
    image_size: int = 322
    registers: bool = False

    layouts = (
        Layout("meta", "mask_token", _from_meta),
        Layout("transformers", "embeddings.position_embeddings", _from_transformers),
    )
    timm_kwargs: ClassVar = {"dynamic_img_size": True}

    def interpolation(self, publisher: str) -> Interpolation:
        """How the positions of a file of ``publisher`` come to another grid."""
        return ANTIALIASED if self.registers else INTERPOLATIONS[publisher]

    def tapped(self, network: Any, layers: list[int], details: list[int], publisher: str, blocks: str) -> nn.Module:
        """See :class:`BackboneSpec`."""
        norm_from, averages = self.norm_from(network, blocks), blocks == "averaged"
        return _Blocks(network, layers, norm_from, averages, self.interpolation(publisher))

    def describe(self, publisher: str) -> dict[str, Any]:
        """How positions are interpolated."""
        return {"positions": self.interpolation(publisher).name}


class _Blocks(nn.Module):
    """The blocks up to the deepest tapped one, followed by the final norm from block ``norm_from`` on.

    The same as timm's ``VisionTransformer.forward_intermediates``, which TorchScript refuses, but for the interpolation
    of positions.
    """

    def __init__(
        self, network: Any, layers: list[int], norm_from: int, averages: bool, interpolation: Interpolation
    ) -> None:
        super().__init__()
        self.patch_embed, self.norm = network.patch_embed, network.norm
        prefix, positions = network.cls_token, network.pos_embed
        if not network.no_embed_class:
            prefix, positions = prefix + positions[:, :1], positions[:, 1:]
        if network.reg_token is not None:
            prefix = torch.cat([prefix, network.reg_token], dim=1)
        self.prefix = nn.Parameter(prefix.detach())
        learned = positions.detach()[0].unflatten(0, network.patch_embed.grid_size)
        self.positions = Positions(learned, interpolation)
        self.blocks = network.blocks[: layers[-1] + 1]
        self.layers = layers
        self.norm_from = norm_from
        self.averages = averages

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embed(image)
        height, width = patches.shape[1], patches.shape[2]
        patches = (patches + self.positions(height, width)).flatten(1, 2)
        tokens = torch.cat([self.prefix.expand(patches.shape[0], -1, -1), patches], dim=1)
        maps: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index in self.layers:
                embeddings = self.norm(tokens) if index >= self.norm_from else tokens
                embeddings = embeddings[:, self.prefix.shape[1] :]
                maps.append(embeddings.transpose(1, 2).unflatten(2, [height, width]))
        return torch.stack(maps).mean(dim=0) if self.averages else torch.cat(maps, dim=1)


class Positions(nn.Module):
    """Learned positions at any grid of patches, by two matrix products.

    The same as ``torch.nn.functional.interpolate(mode="bicubic")`` to rounding. That has no antialiased form in ONNX
    that runtimes agree on, and its scale factors are fixed in an export.

    Args:
        learned: [h, w, C], for the grid in training.
        interpolation: of the publisher.
    """

    def __init__(self, learned: Tensor, interpolation: Interpolation) -> None:
        super().__init__()
        self.learned = nn.Parameter(learned)
        self.antialias = interpolation.antialias
        self.offset = interpolation.offset

    def forward(self, height: int, width: int) -> Tensor:
        """The positions [height, width, C]."""
        precision = torch.float64  # which no automatic cast to 16 bits touches
        if not torch.jit.is_scripting():
            if torch.compiler.is_exporting():
                precision = torch.float32  # TensorRT has no double
        learned = self.learned.to(precision)
        trained = torch.tensor([learned.shape[0], learned.shape[1]], dtype=learned.dtype, device=learned.device)
        wanted = torch.stack([_number(height, learned), _number(width, learned)])
        # the grid in training is left as it is
        steps = torch.where((wanted == trained).all(), 1.0, trained / (wanted + self.offset))
        rows = cubic_matrix(learned.shape[0], height, steps[0], self.antialias)
        columns = cubic_matrix(learned.shape[1], width, steps[1], self.antialias)
        tall = (rows @ learned.flatten(1)).unflatten(1, [learned.shape[1], learned.shape[2]])
        return (columns @ tall).to(self.learned.dtype)


def cubic_matrix(old: int, new: int, step: Tensor, antialias: bool) -> Tensor:
    """The [new, old] weights of a bicubic resize.

    Args:
        old: number of places that there are.
        new: number of places that are wanted.
        step: old places per new place; its type and device are those of the result.
        antialias: with a kernel as wide as a new place, else as an old one.
    """
    centers = ((torch.arange(new, device=step.device) + 0.5).to(step.dtype) * step).unsqueeze(1)
    if antialias:
        places = torch.arange(old, device=step.device) + 0.5
        weights = _cubic((places - centers) / step.clamp(min=1.0), -0.5)
        return weights / weights.sum(dim=1, keepdim=True)
    # the places at the borders stand for those beyond
    beyond = torch.arange(-2, old + 2, device=step.device)
    inside = torch.arange(old, device=step.device)
    stands_for = beyond.clamp(0, old - 1).unsqueeze(1) == inside
    return _cubic(beyond + 0.5 - centers, -0.75) @ stands_for.to(step.dtype)


def _cubic(distance: Tensor, slope: float) -> Tensor:
    """Keys' kernel with ``slope`` at distance 1."""
    x = distance.abs()
    near = ((slope + 2) * x - (slope + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * slope
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _number(value: int, like: Tensor) -> Tensor:
    return torch.scalar_tensor(value, dtype=like.dtype, device=like.device)


def _dinov2(size: str, registers: bool = False) -> LearnedVit:
    timm_name = f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2"
    meta = f"dinov2_vit{size[0]}14{'_reg4' if registers else ''}_pretrain"
    transformers = f"dinov2-{'with-registers-' if registers else ''}{size}"
    files = (f"{meta}*", f"{timm_name}*", transformers)
    return LearnedVit(timm_name=f"{timm_name}.lvd142m", files=files, registers=registers)


BACKBONES = {
    "dinov2_vits14": _dinov2("small"),
    "dinov2_vitb14": _dinov2("base"),
    "dinov2_vitl14": _dinov2("large"),
    "dinov2_vitg14": _dinov2("giant"),
    "dinov2_vits14_reg": _dinov2("small", registers=True),
    "dinov2_vitb14_reg": _dinov2("base", registers=True),
    "dinov2_vitl14_reg": _dinov2("large", registers=True),
    "dinov2_vitg14_reg": _dinov2("giant", registers=True),
    "rad_dino": LearnedVit(
        timm_name="vit_base_patch14_dinov2.lvd142m",
        license="MIT",
        page="https://huggingface.co/microsoft/rad-dino",
        files=("rad-dino",),
        repository="microsoft/rad-dino",
        mean=(0.5307, 0.5307, 0.5307),
        std=(0.2583, 0.2583, 0.2583),
    ),
}
