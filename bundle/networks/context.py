"""Context networks: from a map of embeddings to a prediction of each from those around it.

Each takes [B, C, h, w] and gives [B, P, h, w]; what a position sees is proved by gradients in
``tests/test_density.py``. :data:`CONTEXTS` lists them by the ``mode`` that chooses them. The keyword arguments of a
class are settings of a model, and a model holds those of its own mode only.
"""

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.errors import check
from bundle.networks.gaussian import moments
from bundle.networks.masked import MaskedConv2d, taps_around, taps_before
from bundle.networks.settings import remembers_settings

LARGEST = 64  # layers, patches between taps, taps of a side: far more than any map has use for
WIDEST = 2**14  # channels
POSITION_CHANNELS = 10  # of :func:`position_code`


class ContextNetwork(nn.Module):
    """What every context network tells of itself.

    Attributes:
        joint: whether the product of its predictions over all patches is a joint likelihood of the map.
        looks: whether it looks at other patches; if it does not, nothing is trained.
        settings: that it was made with.
    """

    joint: ClassVar[bool] = False
    looks: ClassVar[bool] = True
    settings: dict[str, Any]

    def taps(self) -> Tensor:
        """The patches [k, k] that a linear prediction may look at, 1 where it may."""
        raise NotImplementedError

    def sees_itself(self) -> bool:
        """Whether the prediction of a patch depends on the patch itself."""
        return False

    @torch.jit.ignore
    def fit(self, training: Iterable[Tensor]) -> None:
        """Fit what has a closed form to healthy embeddings, batches of [B, C, h, w]; most have nothing of the kind."""

    @classmethod
    def known_settings(cls) -> list[str]:
        """The names of its settings."""
        parameters = inspect.signature(cls).parameters.values()
        return [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]


class MaskedStack(ContextNetwork):
    """Masked, dilated convolutions with ReLU between them, as many as ``dilations`` has entries.

    The network of the paper (arXiv 2603.02974, method section); a subclass says what its layers see.

    Args:
        in_channels, out_channels: C and P.
        hidden_channels: channels between the layers (256 in the paper).
        dilations: one per layer, in patches; (1, 1, 1, 1, 1) is the paper's 'standard' network, (4, 4, 4, 4, 4) its
            'dilated' one.
        kernel_size: odd side of every kernel.

    Raises:
        BundleError: for an even kernel, no layer, or a number out of range.
    """

    @remembers_settings
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int = 96,
        dilations: Sequence[int] = (1, 1, 1, 1, 1),
        kernel_size: int = 7,
    ) -> None:
        super().__init__()
        check_stack(hidden_channels, dilations, kernel_size)
        self.dilations = [int(dilation) for dilation in dilations]
        self.kernel_size = kernel_size
        widths = [in_channels] + [hidden_channels] * (len(dilations) - 1) + [out_channels]
        layers: list[nn.Module] = []
        for index, dilation in enumerate(self.dilations):
            taps = self.layer_taps(kernel_size, first=index == 0)
            layers += [MaskedConv2d(widths[index], widths[index + 1], taps, dilation), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])

    @staticmethod
    def layer_taps(kernel_size: int, first: bool) -> Tensor:
        """The live taps [k, k] of the first layer, or of a later one."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        """Predict ``features`` [B, C, h, w]: [B, P, h, w]."""
        return self.net(features)

    def taps(self) -> Tensor:
        """Those of the first layer."""
        return self.layer_taps(self.kernel_size, first=True)

    def sees_itself(self) -> bool:
        """Whether a path through the taps of all layers leads from a position back to it."""
        reach = sum(self.dilations) * (self.kernel_size // 2)
        seen = torch.zeros(1, 1, 2 * reach + 1, 2 * reach + 1)
        seen[..., reach, reach] = 1
        for index, dilation in enumerate(self.dilations):
            taps = self.layer_taps(self.kernel_size, first=index == 0)[None, None]
            seen = (F.conv2d(seen, taps, padding="same", dilation=dilation) > 0.5).float()
        return bool(seen[..., reach, reach])


class CausalStack(MaskedStack):
    """A position sees only patches earlier in raster order."""

    joint = True

    @staticmethod
    def layer_taps(kernel_size: int, first: bool) -> Tensor:
        """Mask A in the first layer, mask B in later ones."""
        return taps_before(kernel_size, with_center=not first)


class BlindFirstLayerStack(MaskedStack):
    """The first layer hides the center, later ones hide nothing: the paper's 'bidirectional' network.

    With 3x3 kernels a position never sees itself if the first dilation is odd and all others are even; with one
    constant dilation it does, from the second layer on.
    """

    @staticmethod
    def layer_taps(kernel_size: int, first: bool) -> Tensor:
        """All but the center, then all."""
        return taps_around(kernel_size) if first else torch.ones(kernel_size, kernel_size)


class OpenStack(MaskedStack):
    """Nothing is hidden, not even the patch itself: the paper's network without masks, for comparison."""

    @staticmethod
    def layer_taps(kernel_size: int, first: bool) -> Tensor:
        """All."""
        return torch.ones(kernel_size, kernel_size)


class BlindStreams(ContextNetwork):
    """A blind spot by four streams, each of which looks into one direction only.

    A stream is a stack of convolutions that see nothing below their center, shifted by one row, so that it sees the
    half-plane strictly above; turned by 90 degrees it sees one of the other half-planes. Together they see everything
    but the position itself. Source: Laine et al., 'High-Quality Self-Supervised Deep Image Denoising', NeurIPS 2019.

    Args:
        in_channels, out_channels: C and P.
        hidden_channels: channels of a stream.
        dilations: one per layer, in patches.
        kernel_size: odd side of every kernel.

    Raises:
        BundleError: for an even kernel, no layer, or a number out of range.
    """

    @remembers_settings
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int = 96,
        dilations: Sequence[int] = (1, 1, 1, 1, 1),
        kernel_size: int = 7,
    ) -> None:
        super().__init__()
        check_stack(hidden_channels, dilations, kernel_size)
        self.kernel_size = kernel_size
        above = torch.ones(kernel_size, kernel_size)
        above[kernel_size // 2 + 1 :] = 0
        layers: list[nn.Module] = []
        for index, dilation in enumerate(dilations):
            channels = hidden_channels if index else in_channels
            layers += [MaskedConv2d(channels, hidden_channels, above, int(dilation)), nn.ReLU()]
        self.stream = nn.Sequential(*layers)
        self.join = nn.Sequential(
            nn.Conv2d(4 * hidden_channels, hidden_channels, 1), nn.ReLU(), nn.Conv2d(hidden_channels, out_channels, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Predict ``features`` [B, C, h, w]: [B, P, h, w]."""
        seen = []
        for turn in range(4):
            above = self.stream(torch.rot90(features, turn, [2, 3]))
            shifted = F.pad(above, [0, 0, 1, 0])[:, :, : above.shape[2]]
            seen.append(torch.rot90(shifted, -turn, [2, 3]))
        return self.join(torch.cat(seen, dim=1))

    def taps(self) -> Tensor:
        """All but the center."""
        return taps_around(self.kernel_size)


class GuardedRing(ContextNetwork):
    """One look at the ring around a position, between pointwise layers; a guard hides the nearest patches, too.

    Neighbors share receptive fields of the backbone with a lesion, and would help to predict it; the guard, as guard
    cells in radar detection, takes that help away. Since only one layer mixes positions, nothing can leak.

    Args:
        in_channels, out_channels: C and P.
        hidden_channels: channels of the pointwise layers; the look takes a quarter of them.
        kernel_size: odd side of the ring.
        guard: patches on each side of the position that it does not see either.

    Raises:
        BundleError: for an even kernel, or a number out of range.
    """

    @remembers_settings
    def __init__(
        self, in_channels: int, out_channels: int, *, hidden_channels: int = 96, kernel_size: int = 7, guard: int = 1
    ) -> None:
        super().__init__()
        check_kernel(hidden_channels, kernel_size)
        widest = kernel_size // 2 - 1
        check(0 <= guard <= widest, "guard", guard, f"give 0 to {widest} with kernel_size {kernel_size}")
        self.kernel_size, self.guard = kernel_size, guard
        narrow = max(1, hidden_channels // 4)
        self.encode = nn.Sequential(
            nn.Conv2d(in_channels, hidden_channels, 1), nn.GELU(), nn.Conv2d(hidden_channels, narrow, 1)
        )
        self.look = MaskedConv2d(narrow, hidden_channels, taps_around(kernel_size, guard))
        self.refine = nn.Sequential(
            nn.GELU(), nn.Conv2d(hidden_channels, hidden_channels, 1), nn.GELU(),
            nn.Conv2d(hidden_channels, hidden_channels, 1),
        )  # fmt: skip
        self.predict = nn.Conv2d(hidden_channels, out_channels, 1)
        nn.init.zeros_(self.predict.weight)  # training starts from the linear prediction
        nn.init.zeros_(self.predict.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Predict ``features`` [B, C, h, w]: [B, P, h, w]."""
        hidden = self.look(self.encode(features))
        return self.predict(F.gelu(hidden + self.refine(hidden)))

    def taps(self) -> Tensor:
        """The ring."""
        return taps_around(self.kernel_size, self.guard)


class NoPrediction(ContextNetwork):
    """Predicts zero, which is the healthy mean where embeddings are standardized: the residual is the embedding itself.

    Args:
        in_channels, out_channels: C and P.
    """

    joint = True
    looks = False

    @remembers_settings
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels

    def forward(self, features: Tensor) -> Tensor:
        """Predict ``features`` [B, C, h, w]: zeros [B, P, h, w]."""
        return torch.zeros_like(features[:, :1]).expand(-1, self.out_channels, -1, -1)


class PositionMean(NoPrediction):
    """Predicts the mean healthy embedding at the same position, in closed form.

    Maps of another size than the ones that it was fitted to get the mean of the nearest position.

    Args:
        in_channels, out_channels: C and P.
    """

    mean: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self.register_buffer("mean", torch.zeros(1, out_channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Predict ``features`` [B, C, h, w]: [B, P, h, w]."""
        grid = [features.shape[2], features.shape[3]]
        mean = self.mean.to(features.dtype)
        if mean.shape[2] != grid[0] or mean.shape[3] != grid[1]:
            mean = F.interpolate(mean, grid, mode="nearest")
        return mean.expand(features.shape[0], -1, -1, -1)

    @torch.jit.ignore
    @torch.no_grad()
    def fit(self, training: Iterable[Tensor]) -> None:
        """Take the mean of healthy embeddings, batches of [B, C, h, w]."""
        count, total = 0, torch.zeros(())
        for batch in training:
            count, total = count + len(batch), total + batch.double().sum(0, keepdim=True).cpu()
        mean = self.mean.new_zeros(1, self.out_channels, *total.shape[2:])
        mean[:, : total.shape[1]] = total / count
        self.mean = mean

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "mean" in state_dict:  # of any grid
            self.mean = self.mean.new_zeros(state_dict[prefix + "mean"].shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


CONTEXTS: dict[str, type[ContextNetwork]] = {
    "guarded": GuardedRing,
    "streams": BlindStreams,
    "causal": CausalStack,
    "bidirectional": BlindFirstLayerStack,
    "standard": OpenStack,
    "zero": NoPrediction,
    "position": PositionMean,
}


def check_stack(hidden_channels: int, dilations: Sequence[int], kernel_size: int) -> None:
    """Refuse what no stack of layers can be made of.

    Raises:
        BundleError: for an even kernel, no layer, or a number out of range.
    """
    check_kernel(hidden_channels, kernel_size)
    many = not isinstance(dilations, Sequence) or len(dilations) > LARGEST
    whole = not many and all(isinstance(step, int) and 1 <= step <= LARGEST for step in dilations)
    check(whole and len(dilations) > 0, "dilations", dilations, "one whole number >= 1 per layer, try [1,1,1,1,1]")


def check_kernel(hidden_channels: int, kernel_size: int) -> None:
    """Refuse what no convolution can be made of.

    Raises:
        BundleError: for an even kernel, or a number out of range.
    """
    odd = 3 <= kernel_size <= LARGEST and kernel_size % 2 == 1
    check(odd, "kernel_size", kernel_size, "use 3, 5, 7, ...: it must be odd")
    check(1 <= hidden_channels <= WIDEST, "hidden_channels", hidden_channels, "at least 1, the paper uses 256")


class LinearContext(nn.Module):
    """The linear prediction of an embedding from those around it: a ridge regression, fitted in closed form.

    Its inputs are the leading principal components of the embeddings at each tap, each of unit variance, and whether a
    tap lies inside the map. No gradient steps; the ridge is, of a few, the one of highest likelihood on held-out
    healthy patches.

    Args:
        channels: C.
        components: principal components of the context; fewer need fewer healthy images.
        taps: [k, k], 1 where the prediction may look.
    """

    components: Tensor
    offset: Tensor
    weight: Tensor
    placement: Tensor

    RIDGES = (1e-3, 1e-2, 1e-1, 1.0)

    def __init__(self, channels: int, components: int, taps: Tensor) -> None:
        super().__init__()
        self.kernel_size = int(taps.shape[-1])
        self.live = taps.flatten().nonzero().flatten().tolist()
        placement = torch.eye(taps.numel())[self.live]
        self.register_buffer("placement", placement, persistent=False)  # of live taps among all of a kernel
        # buffers: no gradient ever changes them
        self.register_buffer("components", torch.zeros(components, channels, 1, 1))
        self.register_buffer("offset", torch.zeros(components))
        self.register_buffer("weight", torch.zeros(channels, components + 1, len(self.live)))

    def forward(self, features: Tensor) -> Tensor:
        """Predict ``features`` [B, C, h, w], to the same shape."""
        kernel = (self.weight @ self.placement).unflatten(2, [self.kernel_size, self.kernel_size])
        return F.conv2d(self._reduced(features), kernel, padding=self.kernel_size // 2)

    def _reduced(self, features: Tensor) -> Tensor:
        """The components of ``features`` and a channel of ones, [B, components + 1, h, w]."""
        reduced = F.conv2d(features, self.components, self.offset)
        return torch.cat([reduced, torch.ones_like(reduced[:, :1])], dim=1)

    @torch.jit.ignore
    def context(self, features: Tensor) -> Tensor:
        """What the prediction of each patch is linear in, [B * h * w, (components + 1) * taps]."""
        reduced = self._reduced(features)
        unfolded = F.unfold(reduced, self.kernel_size, padding=self.kernel_size // 2)
        seen = unfolded.unflatten(1, (reduced.shape[1], -1))[:, :, self.live]
        return seen.flatten(1, 2).transpose(1, 2).flatten(0, 1)

    @torch.jit.ignore
    @torch.no_grad()
    def fit(self, training: Iterable[Tensor], held_out: Iterable[Tensor]) -> None:
        """Fit to healthy embeddings, batches of [B, C, h, w]; the ridge is chosen on ``held_out`` ones.

        Both are iterated more than once.
        """
        self._fit_components(training)
        context, product, _ = self._moments(training)
        held_context, held_product, held_square = self._moments(held_out)
        values, vectors = torch.linalg.eigh(context)
        rotated = vectors.T @ product
        best = math.inf
        for ridge in self.RIDGES:
            weight = vectors @ (rotated / (values.clamp_min(0) + ridge)[:, None])
            residual = held_square - 2 * (weight * held_product).sum(0) + (weight * (held_context @ weight)).sum(0)
            surprise = float(residual.clamp_min(1e-12).log().sum())
            if surprise < best:
                best = surprise
                self.weight.copy_(weight.T.unflatten(1, self.weight.shape[1:]).to(self.weight.dtype))

    def _fit_components(self, batches: Iterable[Tensor]) -> None:
        mean, covariance = moments(batches)
        values, vectors = torch.linalg.eigh(covariance)
        count = len(self.offset)
        leading = vectors.flip(1)[:, :count] / values.flip(0)[:count].clamp_min(1e-8).sqrt()
        self.components.copy_(leading.T[:, :, None, None])
        self.offset.copy_(-(mean @ leading))

    def _moments(self, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of context times context, of context times target, and of the squared target."""
        count, sums = 0, [torch.zeros(())] * 3
        for batch in batches:
            for part in batch.to(self.weight.device).split(8):  # the context of a patch is large
                context, target = self.context(part), part.movedim(1, -1).flatten(0, 2)
                count += len(target)
                products = (context.T @ context, context.T @ target, target.square().sum(0))
                sums = [total.to(new.device) + new.double() for total, new in zip(sums, products, strict=True)]
        square, product, energy = (total / count for total in sums)
        return square, product, energy


def position_code(features: Tensor) -> Tensor:
    """Where each patch is, as sines and cosines of rows and columns, [B, POSITION_CHANNELS, h, w]."""
    height, width = features.shape[-2], features.shape[-1]
    rows = torch.linspace(-1, 1, height, dtype=features.dtype, device=features.device)
    columns = torch.linspace(-1, 1, width, dtype=features.dtype, device=features.device)
    grid = torch.stack([rows[:, None].expand(height, width), columns[None].expand(height, width)])
    waves = [grid]
    for frequency in (0.5, 1.0):
        waves += [torch.sin(math.pi * frequency * grid), torch.cos(math.pi * frequency * grid)]
    return torch.cat(waves).expand(features.shape[0], -1, -1, -1)
