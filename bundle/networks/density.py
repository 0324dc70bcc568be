"""The density of patch embeddings: how likely each is, given those around it.

The product over all patches is a joint likelihood of the map where the context is ``causal`` and looked at in one
raster order. Where each patch is conditioned on some patches on all sides it is a composite conditional likelihood
(Lindsay, Contemporary Mathematics 80, 1988; Varin, Reid and Firth, Statistica Sinica 21, 2011): each factor is a
conditional density, but their product is no density of the map. Besag's pseudo-likelihood (1975) is the case in which
each patch is conditioned on all others; here it is conditioned on those that the context sees. Where a patch sees
itself there is no likelihood at all, of which a warning is given; such contexts are kept since the authors' code has
them.
"""

import logging
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.errors import BundleError, check, check_choice
from bundle.networks.context import (
    CONTEXTS,
    POSITION_CHANNELS,
    ContextNetwork,
    LinearContext,
    MaskedStack,
    position_code,
)
from bundle.networks.gaussian import COVARIANCES, FITTED, fit_gaussian
from bundle.networks.settings import remembers_settings
from bundle.networks.weights import read_plain

ORDERS: dict[int, list[list[int]]] = {  # dimensions to flip
    1: [[]],
    2: [[], [-2, -1]],
    4: [[], [-2, -1], [-1], [-2]],
}
LOG_VARIANCE_LIMIT = 7.0  # of the learned variances, so that no patch has an infinite likelihood

logger = logging.getLogger(__name__)


class SpatialARDensity(nn.Module):
    """A Gaussian of each patch embedding given its context: its mean is predicted, its covariance learned or fitted.

    The mean is the sum of a linear prediction in closed form (:class:`~bundle.networks.context.LinearContext`) and of a
    context network that is trained, averaged over raster orders.

    Args:
        in_channels: channels C of the patch embeddings.
        mode: which patches a prediction sees, a key of :data:`~bundle.networks.context.CONTEXTS`: ``guarded`` a ring
            without the nearest patches, ``streams`` all but itself, ``causal`` what comes earlier in raster order,
            ``bidirectional`` and ``standard`` as the paper, ``zero`` and ``position`` no patch at all.
        linear_components: principal components that the linear prediction looks at; 0: no linear prediction.
        orders: 1, 2 or 4 raster orders, whose predictions are averaged.
        share_orders: one context network for all orders, instead of one each.
        position_code: tell the context network where in the map it is.
        covariance: of the residual: ``isotropic`` and fixed to 1 (the paper), ``diagonal`` and learned for each patch,
            ``low_rank`` or ``full`` and fitted in closed form.
        rank: of ``low_rank``.
        shrinkage: of fitted covariances, in [0, 1]; None: as Ledoit and Wolf choose it.
        context: settings of the context network of ``mode``: ``hidden_channels``, ``kernel_size``, ...

    Raises:
        BundleError: for an unknown mode or covariance, a setting that the mode does not have, or a number out of range.

    Attributes:
        likelihood: what the product over all patches of a map is: ``joint``, ``composite``, or ``none`` where a patch
            sees itself.
        fit: kind, rank and shrinkage of the covariance, as :func:`~bundle.networks.gaussian.fit_gaussian` takes them.
    """

    residual_mean: Tensor
    whitening: Tensor
    log_determinant: Tensor
    flips: list[list[int]]
    settings: dict[str, Any]

    @remembers_settings
    def __init__(
        self,
        in_channels: int,
        mode: str = "guarded",
        *,
        linear_components: int = 32,
        orders: int = 1,
        share_orders: bool = True,
        position_code: bool = False,
        covariance: str = "full",
        rank: int = 32,
        shrinkage: float | None = None,
        **context: Any,
    ) -> None:
        super().__init__()
        check_density(in_channels, mode, linear_components, orders, covariance, rank, shrinkage)
        for name in context:
            check_choice(f"setting of mode '{mode}'", name, CONTEXTS[mode].known_settings())
        self.in_channels = in_channels
        self.learns_variance = covariance == "diagonal"
        self.whitens = covariance in FITTED
        self.codes_position = position_code
        self.variance_limit = LOG_VARIANCE_LIMIT
        self.flips = ORDERS[orders]
        self.fit: dict[str, Any] = {"kind": covariance, "rank": rank, "shrinkage": shrinkage}
        inputs = in_channels + POSITION_CHANNELS * position_code
        outputs = in_channels * (2 if self.learns_variance else 1)
        networks = [CONTEXTS[mode](inputs, outputs, **context) for _ in range(1 if share_orders else orders)]
        self.contexts = nn.ModuleList(networks)
        self.likelihood = self._likelihood(mode, networks[0], orders, linear_components)
        self.linear = LinearContext(in_channels, linear_components, networks[0].taps()) if linear_components else None
        self.mode = mode
        self.unused = {
            *(["rank"] if covariance != "low_rank" else []),
            *(["shrinkage"] if not self.whitens else []),
            *(["share_orders"] if orders == 1 else []),
        }
        self.register_buffer("residual_mean", torch.zeros(in_channels))
        self.register_buffer("whitening", torch.eye(in_channels))
        self.register_buffer("log_determinant", torch.zeros(()))

    @staticmethod
    def _likelihood(mode: str, network: ContextNetwork, orders: int, linear_components: int) -> str:
        """What the product over all patches is; a warning where it is nothing."""
        if not network.sees_itself():
            return "joint" if network.joint and orders == 1 else "composite"
        taps = network.taps()
        check(
            linear_components == 0 or not taps[len(taps) // 2, len(taps) // 2],
            "linear_components",
            linear_components,
            f"mode '{mode}' sees its own target, which a linear prediction would copy: give 0",
        )
        logger.warning(
            f"mode '{mode}' with these dilations and this kernel_size sees the patch that it predicts, so it gives no "
            "likelihood: kernel_size 3 with dilations [1,2,4,2,2] hides it in mode 'bidirectional', other modes always "
            "do"
        )
        return "none"

    def forward(self, features: Tensor) -> Tensor:
        """Predict ``features`` [B, C, h, w] from their context.

        Returns:
            The mean [B, C, h, w]; if the variance is learned [B, 2 C, h, w], with its logarithm in the second half.
        """
        inputs = torch.cat([features, position_code(features)], dim=1) if self.codes_position else features
        inputs = inputs.contiguous(memory_format=torch.channels_last)  # the fastest order, to learn as well
        predicted = torch.zeros_like(features[:, :1])
        index = 0
        for context in self.contexts:
            for _ in range(len(self.flips) // len(self.contexts)):
                flip = self.flips[index]
                one = context(inputs.flip(flip)).flip(flip) if len(flip) > 0 else context(inputs)
                predicted = one if index == 0 else predicted + one
                index += 1
        if index > 1:
            predicted = predicted / index
        if self.linear is not None:
            linear = self.linear(features)
            padding = predicted.shape[1] - linear.shape[1]
            predicted = predicted + (F.pad(linear, [0, 0, 0, 0, 0, padding]) if padding > 0 else linear)
        return predicted

    @torch.jit.export
    def residual(self, features: Tensor) -> Tensor:
        """What the prediction leaves of ``features`` [B, C, h, w], in learned deviations where they are learned."""
        return self.residual_of(self(features), features)

    @torch.jit.export
    def residual_of(self, prediction: Tensor, features: Tensor) -> Tensor:
        """What ``prediction``, as :meth:`forward` gives it, leaves of ``features`` [B, C, h, w]."""
        residual = features - prediction[:, : self.in_channels]
        if self.learns_variance:
            residual = residual * torch.exp(-0.5 * self._log_variance(prediction))
        return residual

    def _log_variance(self, prediction: Tensor) -> Tensor:
        return prediction[:, self.in_channels :].float().clamp(-self.variance_limit, self.variance_limit)

    @torch.jit.ignore
    def loss(self, prediction: Tensor, features: Tensor) -> Tensor:
        """What training minimizes, a scalar: twice the negative log-likelihood per channel, without constants.

        For the isotropic covariance it is the mean squared error of the paper.
        """
        loss = self._surprise(prediction, features).mean()
        # without parameters there is nothing to learn, and going backward does nothing
        return loss if loss.requires_grad else loss.requires_grad_()

    @torch.jit.ignore
    def log_likelihood(self, prediction: Tensor, features: Tensor) -> Tensor:
        """The log-likelihood of every patch given its context, in nats, normalized, [B, h, w]."""
        constant = self.in_channels * math.log(2 * math.pi) + self.log_determinant
        return -0.5 * (self._surprise(prediction, features).sum(dim=1) + constant)

    @torch.jit.ignore
    def log_scale(self, prediction: Tensor) -> Tensor:
        """The sum of the logarithms of the learned deviations of every patch, [B, h, w]; 0 where none are learned."""
        if not self.learns_variance:
            return torch.zeros_like(prediction[:, 0])
        return 0.5 * self._log_variance(prediction).sum(dim=1)

    def _surprise(self, prediction: Tensor, features: Tensor) -> Tensor:
        """Squares of the whitened residual, plus the logarithms of learned variances, [B, C, h, w]."""
        residual = self.residual_of(prediction, features)
        if self.whitens:
            residual = F.conv2d(residual - self.residual_mean[:, None, None], self.whitening[:, :, None, None])
        square = residual.square()
        return square + self._log_variance(prediction) if self.learns_variance else square

    @torch.jit.ignore
    @torch.no_grad()
    def fit_linear(self, training: Iterable[Tensor], held_out: Iterable[Tensor]) -> None:
        """Fit the linear prediction, if there is one, and what contexts fit, to healthy standardized embeddings.

        Args:
            training: batches of [B, C, h, w], iterated more than once.
            held_out: the same, of images that choose the ridge.
        """
        for context in self.contexts:
            context.fit(training)  # type: ignore[operator]
        if self.linear is not None:
            self.linear.fit(training, held_out)

    @torch.jit.ignore
    @torch.no_grad()
    def fit_covariance(self, training: Iterable[Tensor]) -> None:
        """Fit the covariance, if it is one that is fitted, to healthy standardized embeddings."""
        if not self.whitens:
            return
        residuals = (self.residual(batch.to(self.whitening.device)) for batch in training)
        fitted = fit_gaussian(residuals, **self.fit)
        for buffer, value in zip((self.residual_mean, self.whitening, self.log_determinant), fitted, strict=True):
            buffer.copy_(value)

    @torch.jit.ignore
    def describe(self) -> dict[str, Any]:
        """The settings that it uses, as plain JSON values."""
        used = {name: value for name, value in self.settings.items() if name not in self.unused}
        context: Any = self.contexts[0]
        return {"mode": self.mode, **used, **context.settings}


def check_density(
    in_channels: int,
    mode: str,
    linear_components: int,
    orders: int,
    covariance: str,
    rank: int,
    shrinkage: float | None,
) -> None:
    """Refuse what no :class:`SpatialARDensity` of ``in_channels`` channels can be made with.

    Raises:
        BundleError: for an unknown mode or covariance, or a number out of range.
    """
    check_choice("density mode", mode, CONTEXTS)
    check_choice("covariance", covariance, COVARIANCES)
    check(orders in ORDERS, "orders", orders, "1, 2 or 4")
    check(rank >= 1, "rank", rank, "at least 1")
    check(shrinkage is None or 0 <= shrinkage <= 1, "shrinkage", shrinkage, "null, or 0 to 1")
    check(
        0 <= linear_components <= in_channels,
        "linear_components",
        linear_components,
        f"0 to {in_channels}, the channels of the embeddings",
    )
    for name, value, only in (("linear_components", linear_components, 0), ("orders", orders, 1)):
        blind = not CONTEXTS[mode].looks
        check(not blind or value == only, name, value, f"mode '{mode}' looks at no other patch: give {only}")


def squared_error(prediction: Tensor, features: Tensor) -> Tensor:
    """The patch map of the paper: squared error averaged over channels, [B, C, H, W] twice to [B, H, W]."""
    return F.mse_loss(prediction, features, reduction="none").mean(dim=1)


def load_paper_checkpoint(path: str | os.PathLike, dilations: Sequence[int]) -> SpatialARDensity:
    """Build the density network that a checkpoint of the authors' own code holds.

    Channels, depth, kernel and mode follow from the shapes and masks in the file, which does not hold the dilations.

    Args:
        path: file with ``model_state_dict`` (keys ``net.0.weight``, ``net.0.bias``, ``net.0.mask``, ``net.2.weight``,
            ...).
        dilations: one per layer, as the network was trained.

    Returns:
        The network with the weights loaded, in evaluation mode.

    Raises:
        BundleError: if the file is missing, is no such checkpoint, or has another number of layers than ``dilations``.
    """
    if not os.path.isfile(path):
        raise BundleError(f"no checkpoint at '{path}': give the path of the authors' .pth file")
    try:
        state = read_plain(path)["model_state_dict"]
        weights = [state[f"net.{2 * i}.weight"] for i in range(sum(key.endswith(".weight") for key in state))]
    except Exception as error:
        raise BundleError(
            f"'{path}' is no checkpoint of the authors' code (it needs 'model_state_dict' with 'net.0.weight', ...): "
            f"{str(error).splitlines()[0]}"
        ) from error
    if len(weights) != len(dilations):
        raise BundleError(
            f"'{path}' has {len(weights)} layers, but {len(dilations)} dilations were given ({list(dilations)}): "
            "give one per layer"
        )
    masked = [f"net.{2 * i}.mask" in state for i in range(len(weights))]
    mode = "causal" if all(masked) else "bidirectional" if masked[0] else "standard"
    density = SpatialARDensity(
        in_channels=weights[0].shape[1],
        hidden_channels=weights[0].shape[0],
        dilations=dilations,
        kernel_size=weights[0].shape[-1],
        mode=mode,
        linear_components=0,
        covariance="isotropic",
    )
    (stack,) = density.contexts
    assert isinstance(stack, MaskedStack)
    for index, has_mask in enumerate(masked):
        taps = stack.layer_taps(stack.kernel_size, first=index == 0)
        if has_mask and not torch.equal(state[f"net.{2 * index}.mask"], taps.expand_as(weights[index])):
            raise BundleError(
                f"'{path}' has a mask in layer {index} that is not the paper's {mode} mask: it can't be loaded"
            )
    stack.load_state_dict({key: value for key, value in state.items() if not key.endswith(".mask")})
    return density.eval()
