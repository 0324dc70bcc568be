"""The backbones that can be taken, by name: rows in the module of their kind."""

from bundle.networks.backbones import convnext, efficientnet, learned_vit, rope_vit
from bundle.networks.backbones.spec import BackboneSpec

BACKBONES: dict[str, BackboneSpec] = {
    **rope_vit.BACKBONES,
    **convnext.BACKBONES,
    **learned_vit.BACKBONES,
    **efficientnet.BACKBONES,
}

__all__ = ["BACKBONES", "BackboneSpec"]
