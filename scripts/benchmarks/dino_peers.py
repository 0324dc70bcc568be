"""Peers that are made for the blocks of a DINO network: Dinomaly, INP-Former and SuperADD, by anomalib's torch models.

They take the tokens of several blocks of a ViT, before its final norm, from the weights that the bundle loads; the
blocks are the setting ``layers``. Sources: Guo et al., 'Dinomaly: The Less Is More Philosophy in Multi-Class
Unsupervised Anomaly Detection', arXiv 2405.14325; Luo et al., 'Exploring Intrinsic Normal Prototypes within a Single
Image for Universal Anomaly Detection' (INP-Former), arXiv 2503.02424; SuperADD as anomalib 2.7 has it
(``anomalib/models/image/dinomaly``, ``.../inp_former``, ``.../super_add``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bundle.errors import BundleError, check
from scripts.benchmarks.peers import BankPeer, Peer, PeerFeatures, bytes_of

WIDTHS = {384: "small", 768: "base", 1024: "large"}  # anomalib knows the size of an encoder by its name
LAYERS = 8  # that Dinomaly and INP-Former reconstruct, in two groups of four
WARM_UP = 100  # steps, at most a tenth of all


class BlockTokens(nn.Module):
    """All tokens of the tapped blocks of a ViT, before the final norm: [CLS, registers, patches] in raster order.

    Args:
        features: of a ViT, without tiles.

    Raises:
        BundleError: for a backbone without blocks, or tiles.

    Attributes:
        patch_size: in pixels.
        num_register_tokens: tokens between the first one and the patches.
        width: channels of a token.
    """

    def __init__(self, features: PeerFeatures) -> None:
        super().__init__()
        network: Any = features.detector.features
        blocks = getattr(network.backbone, "blocks", None)
        if blocks is None:
            raise BundleError(f"backbone {network.backbone_name} has no tokens: take a ViT such as dinov3_vits16")
        check(features.detector.tiles == 1, "tiles", features.detector.tiles, "give 1, the peer sees whole images")
        self.features = features
        self.tapped = [blocks[layer] for layer in network.layers]
        self.names = [f"blocks.{layer}" for layer in network.layers]
        self.patch_size = network.patch_size
        device = next(self.parameters()).device
        tokens = self(torch.zeros(1, 3, self.patch_size, self.patch_size, device=device))[self.names[0]]
        self.num_register_tokens, self.width = tokens.shape[1] - 2, tokens.shape[2]

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The tokens of each block [B, 1 + registers + h * w, C] of normalized ``images`` [B, 3, H, W], in 32 bits."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}

        def note(name: str) -> Any:
            return lambda _block, _inputs, tokens: found[name].append(tokens.float())

        hooks = [block.register_forward_hook(note(name)) for name, block in zip(self.names, self.tapped, strict=True)]
        try:
            self.features(images)  # on a CPU in parts
        finally:
            for hook in hooks:
                hook.remove()
        return {name: torch.cat(parts) for name, parts in found.items()}


class ReconstructionPeer(Peer):
    """A decoder learns to reconstruct the tokens of healthy images; the distance is one less the cosine.

    Optimizer, schedule and first weights are those of anomalib's training; the schedule goes on with every step, as in
    the authors' code. Images are drawn at random, which depends on the global random state of torch. Healthy images
    are kept in memory, in 16 bits, while it learns.

    Args:
        features: of a ViT with eight tapped blocks, see :class:`BlockTokens`.
        steps: of training.
        batch_size: images in a step.

    Raises:
        BundleError: if anomalib is not installed, or the backbone does not fit.
    """

    package: str
    model_name: str
    trained: tuple[str, ...]
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, features: PeerFeatures, steps: int, batch_size: int) -> None:
        tokens = BlockTokens(features)
        if len(tokens.names) != LAYERS or tokens.width not in WIDTHS:
            raise BundleError(
                f"{self.name} reconstructs {LAYERS} blocks with {', '.join(map(str, WIDTHS))} channels, not "
                f"{len(tokens.names)} with {tokens.width}: give --layers [2,3,4,5,6,7,8,9]"
            )
        check(steps >= 1, "steps", steps, "at least 1")
        layers = [int(name.rpartition(".")[2]) for name in tokens.names]
        encoder = f"vit_{WIDTHS[tokens.width]}"
        named = {"encoder_name": encoder, "target_layers": layers, **self.options}
        super().__init__(tokens, self.package, f"{self.model_name}Model", **named)
        self.lightning = import_module(f"anomalib.models.image.{self.package}.lightning_model")
        self.steps, self.batch_size = steps, batch_size
        self.fitted = False

    @abstractmethod
    def loss(self, images: Tensor, step: int) -> Tensor:
        """What a step of training minimizes."""

    def fit(self, images: Iterable[Tensor]) -> None:
        """Learn from healthy ``images``, batches of [B, 3, H, W], normalized as the features need it."""
        kept = [batch.half() for batch in images]
        if not kept:
            raise BundleError(f"{self.name} has no healthy image to learn from: give at least one")
        healthy = torch.cat(kept)
        modules = nn.ModuleList([self.model.get_submodule(name) for name in self.trained])
        getattr(self.lightning, self.model_name)._initialize_trainable_modules(modules)
        self.model.to(healthy.device).train()
        options = self.lightning.TRAINING_CONFIG
        components = import_module("anomalib.models.image.dinomaly.components")
        optimizer = components.StableAdamW([{"params": list(modules.parameters())}], **options["optimizer"])
        length = {"total_iters": self.steps, "warmup_iters": min(WARM_UP, self.steps // 10)}
        schedule = components.WarmCosineScheduler(optimizer, **{**options["scheduler"], **length})
        for step in range(self.steps):
            chosen = torch.randint(len(healthy), (self.batch_size,))
            optimizer.zero_grad()
            self.loss(healthy[chosen].float(), step).backward()
            nn.utils.clip_grad_norm_(modules.parameters(), options["trainer"]["gradient_clip_val"])
            optimizer.step()
            schedule.step()
        self.fitted = True

    def _fill_bank(self) -> None:
        """Nothing: it stores weights."""

    @property
    def stored(self) -> dict[str, Tensor]:
        """The trained weights; none before :meth:`fit`."""
        if not self.fitted:
            return {}
        return {
            f"{name}.{key}": value
            for name in self.trained
            for key, value in self.model.get_submodule(name).state_dict().items()
        }

    @stored.setter
    def stored(self, tensors: Mapping[str, Tensor]) -> None:
        for name in self.trained:
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            self.model.get_submodule(name).load_state_dict(own)
        self.model.to(next(iter(tensors.values())).device)
        self.fitted = True


class DinomalyPeer(ReconstructionPeer):
    """Dinomaly: a noisy bottleneck and a decoder with linear attention."""

    name = "Dinomaly"
    package, model_name = "dinomaly", "Dinomaly"
    trained = ("bottleneck", "decoder")

    def __init__(self, features: PeerFeatures, steps: int = 5000, batch_size: int = 16) -> None:
        super().__init__(features, steps, batch_size)

    def loss(self, images: Tensor, step: int) -> Tensor:
        """The cosine distance, most of all where it is large."""
        return self.model(images, global_step=step)


class InpFormerPeer(ReconstructionPeer):
    """INP-Former: a decoder that sees nothing but a few prototypes, drawn from the image itself. Images are square."""

    name = "INP-Former"
    package, model_name = "inp_former", "InpFormer"
    trained = ("bottleneck", "decoder", "aggregation", "prototype_token")
    options: ClassVar = {"remove_class_token": True}

    def __init__(self, features: PeerFeatures, steps: int = 5000, batch_size: int = 16) -> None:
        height, width = features.detector.image_size
        check(height == width, "image_size", [height, width], f"give one side, {self.name} takes square images")
        super().__init__(features, steps, batch_size)

    def loss(self, images: Tensor, step: int) -> Tensor:
        """The cosine distance, and that of the prototypes to what they stand for."""
        return self.model(images)


class SuperAddPeer(BankPeer):
    """SuperADD: a bank for every tapped block, Euclidean distance to the nearest, averaged over the blocks.

    Images are taken whole, not in overlapping parts: they have the size that the backbone sees. The image score is the
    mean of the top 0.1 % of the map. Which features are kept depends on the global random state of torch.

    Args:
        features: of a ViT, see :class:`BlockTokens`; square images.
        bank_size: features that are kept of each block.

    Raises:
        BundleError: if anomalib is not installed, or the backbone does not fit.
    """

    name = "SuperADD"
    extractor_name = "DinoV3Backbone"

    def __init__(self, features: PeerFeatures, bank_size: int = 100_000) -> None:
        tokens = BlockTokens(features)
        height, width = features.detector.image_size
        check(height == width, "image_size", [height, width], f"give one side, {self.name} takes square images")
        super().__init__(
            _PatchTokens(tokens),
            "super_add",
            "SuperADDModel",
            layers=list(features.layers),
            patch_size=height,
            patch_overlap=tokens.patch_size,
            max_database_size=bank_size,
        )

    @torch.no_grad()
    def keep(self, images: Iterable[Tensor]) -> int:
        """See :meth:`Peer.keep`."""
        self.model.embedding_store = {index: [] for index in range(len(self.model.layers))}
        self.model.memory_bank = torch.empty(0)
        self.model.train()
        for batch in images:
            self.model.to(batch.device)(batch)
        kept = self.model.embedding_store
        if not kept[0]:
            raise BundleError(f"{self.name} has no healthy image to store: give at least one")
        return sum(map(bytes_of, kept.values()))

    def _fill_bank(self) -> None:
        self.model.subsample_embedding()

    def detect(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Peer.detect`."""
        maps, scores = super().detect(images)
        return maps.unsqueeze(1), scores

    def score(self, maps: Tensor) -> Tensor:
        """The mean of the top of each map [B, 1, H, W], as the model takes it."""
        pixels = maps.flatten(1)
        return pixels.topk(max(1, int(pixels.shape[1] * self.model.score_quantile)), dim=1).values.mean(dim=1)


class _PatchTokens(nn.Module):
    """The tokens of patches alone, a tensor for each block [B, h * w, C], as SuperADD asks for them."""

    def __init__(self, tokens: BlockTokens) -> None:
        super().__init__()
        self.tokens = tokens
        self.model_patch_size = tokens.patch_size

    def forward(self, images: Tensor) -> list[Tensor]:
        return [one[:, 1 + self.tokens.num_register_tokens :] for one in self.tokens(images).values()]
