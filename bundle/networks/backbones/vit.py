"""What all ViTs have in common: layers are blocks, tapped in the middle of the network, where nothing else is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bundle.networks.backbones.spec import BackboneSpec

BLOCKS = ("averaged", "joined", "normed")
"""How tapped blocks become one map: averaged, joined along the channels, or joined, each after the final norm.

The last block of the network is followed by the final norm always.
"""


@dataclass(frozen=True, kw_only=True)
class Vit(BackboneSpec):
    """A ViT. Layers are blocks.

    Attributes:
        TAPPED: shares of the depth after which it is tapped by default: of twelve blocks, after five and after seven.
    """

    has_blocks: ClassVar[bool] = True
    TAPPED: ClassVar[tuple[float, ...]] = (5 / 12, 7 / 12)

    def depth(self, network: Any) -> int:
        """The number of blocks."""
        return len(network.blocks)

    def default_layers(self, network: Any) -> tuple[int, ...]:
        """See :class:`BackboneSpec`; the first block at least."""
        depth = self.depth(network)
        return tuple(max(0, round(share * depth) - 1) for share in self.TAPPED)

    def norm_from(self, network: Any, blocks: str) -> int:
        """The first block that is followed by the final norm."""
        return 0 if blocks == "normed" else self.depth(network) - 1
