"""The density of patch embeddings: how likely each is, given those around it.

In ``causal`` mode with one raster order the product over all patches is a joint likelihood of the map. In the blind
modes (``guarded``, ``streams``, ``bidirectional`` with 3x3 kernels and odd, then even dilations) and with several
orders each factor is conditioned on patches on all sides, and the product is a pseudo-likelihood. In ``standard`` mode,
and in ``bidirectional`` mode otherwise, a patch sees itself, and there is no likelihood at all, of which a warning is
given; both are kept since the authors' code has them.
"""

import logging
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.errors import BundleError, check_choice
from bundle.networks.context import (
    POSITION_CHANNELS,
    BlindStreams,
    GuardedRing,
    LinearContext,
    MaskedStack,
    position_code,
)
from bundle.networks.gaussian import COVARIANCES, FITTED, fit_gaussian
from bundle.networks.masked import kernel_taps

MODES = ("guarded", "streams", "causal", "bidirectional", "standard")
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
        mode: which patches a prediction sees: ``guarded`` a ring without the nearest patches, ``streams`` all but
            itself, ``causal`` what comes earlier in raster order, ``bidirectional`` and ``standard`` as the paper.
        hidden_channels: width of the context network (256 in the paper).
        dilations: of ``causal``, ``bidirectional``, ``standard`` and ``streams``, one per layer; (1, 1, 1, 1, 1) is the
            paper's 'standard' network, (4, 4, 4, 4, 4) its 'dilated' one.
        kernel_size: odd side of every kernel.
        guard: patches on each side that ``guarded`` hides beside the target itself.
        linear_components: principal components that the linear prediction looks at; 0: no linear prediction.
        orders: 1, 2 or 4 raster orders, whose predictions are averaged.
        share_orders: one context network for all orders, instead of one each.
        position_code: tell the context network where in the map it is.
        covariance: of the residual: ``isotropic`` and fixed to 1 (the paper), ``diagonal`` and learned for each patch,
            ``low_rank`` or ``full`` and fitted in closed form.
        rank: of ``low_rank``.
        shrinkage: of fitted covariances, in [0, 1]; None: as Ledoit and Wolf choose it.

    Raises:
        BundleError: for an unknown mode or covariance, an even kernel, no layer, or a number out of range.

    Attributes:
        likelihood: what the product over all patches of a map is: ``joint``, ``pseudo``, or ``none`` where a patch sees
            itself.
    """

    residual_mean: Tensor
    whitening: Tensor
    log_determinant: Tensor
    flips: list[list[int]]

    def __init__(
        self,
        in_channels: int,
        mode: str = "guarded",
        hidden_channels: int = 96,
        dilations: Sequence[int] = (1, 1, 1, 1, 1),
        kernel_size: int = 7,
        guard: int = 1,
        linear_components: int = 32,
        orders: int = 1,
        share_orders: bool = True,
        position_code: bool = False,
        covariance: str = "full",
        rank: int = 32,
        shrinkage: float | None = None,
    ) -> None:
        super().__init__()
        check_choice("density mode", mode, MODES)
        check_choice("covariance", covariance, COVARIANCES)
        _check(
            kernel_size >= 3 and kernel_size % 2 == 1, "kernel_size", kernel_size, "use 3, 5, 7, ...: it must be odd"
        )
        _check(
            isinstance(dilations, Sequence) and len(dilations) > 0 and all(_is_whole(one) for one in dilations),
            "dilations",
            dilations,
            "one whole number >= 1 per layer, try [1,1,1,1,1]",
        )
        _check(hidden_channels >= 1, "hidden_channels", hidden_channels, "at least 1, the paper uses 256")
        _check(
            mode != "guarded" or 0 <= guard < kernel_size // 2,
            "guard",
            guard,
            f"give 0 to {kernel_size // 2 - 1} with kernel_size {kernel_size}",
        )
        _check(orders in ORDERS, "orders", orders, "1, 2 or 4")
        _check(rank >= 1, "rank", rank, "at least 1")
        _check(shrinkage is None or 0 <= shrinkage <= 1, "shrinkage", shrinkage, "null, or 0 to 1")
        _check(
            0 <= linear_components <= in_channels,
            "linear_components",
            linear_components,
            f"0 to {in_channels}, the channels of the embeddings",
        )
        _check(
            mode != "standard" or linear_components == 0,
            "linear_components",
            linear_components,
            "mode 'standard' sees its own target, which a linear prediction would copy: give 0",
        )
        leaks = mode in ("bidirectional", "standard") and MaskedStack.sees_itself(dilations, kernel_size, mode)
        self.likelihood = "none" if leaks else "joint" if mode == "causal" and orders == 1 else "pseudo"
        if leaks:
            logger.warning(
                f"mode '{mode}' with kernel_size {kernel_size} and dilations {list(dilations)} sees the patch that it "
                "predicts, so it gives no likelihood: kernel_size 3 with dilations [1,2,4,2,2] hides it in mode "
                "'bidirectional', other modes always do"
            )
        self.settings: dict[str, Any] = {
            "mode": mode,
            "hidden_channels": hidden_channels,
            "dilations": [int(dilation) for dilation in dilations],
            "kernel_size": kernel_size,
            "guard": guard,
            "linear_components": linear_components,
            "orders": orders,
            "share_orders": share_orders,
            "position_code": position_code,
            "covariance": covariance,
            "rank": rank,
            "shrinkage": shrinkage,
        }
        self.in_channels = in_channels
        self.learns_variance = covariance == "diagonal"
        self.whitens = covariance in FITTED
        self.codes_position = position_code
        self.variance_limit = LOG_VARIANCE_LIMIT
        self.flips = ORDERS[orders]
        taps = kernel_taps(mode, kernel_size, True, guard if mode == "guarded" else 0)
        self.linear = LinearContext(in_channels, linear_components, taps) if linear_components else None
        self.contexts = nn.ModuleList(self._context() for _ in range(1 if share_orders else orders))
        self.register_buffer("residual_mean", torch.zeros(in_channels))
        self.register_buffer("whitening", torch.eye(in_channels))
        self.register_buffer("log_determinant", torch.zeros(()))

    def _context(self) -> nn.Module:
        settings = self.settings
        inputs = self.in_channels + POSITION_CHANNELS * settings["position_code"]
        outputs = self.in_channels * (2 if self.learns_variance else 1)
        hidden, kernel = settings["hidden_channels"], settings["kernel_size"]
        if settings["mode"] == "guarded":
            return GuardedRing(inputs, outputs, hidden, kernel, settings["guard"])
        if settings["mode"] == "streams":
            return BlindStreams(inputs, outputs, hidden, settings["dilations"], kernel)
        return MaskedStack(inputs, outputs, hidden, settings["dilations"], kernel, settings["mode"])

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
        return self._residual(self(features), features)

    def _residual(self, prediction: Tensor, features: Tensor) -> Tensor:
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
        return self._surprise(prediction, features).mean()

    @torch.jit.ignore
    def log_likelihood(self, prediction: Tensor, features: Tensor) -> Tensor:
        """The log-likelihood of every patch given its context, in nats, normalized, [B, h, w]."""
        constant = self.in_channels * math.log(2 * math.pi) + self.log_determinant
        return -0.5 * (self._surprise(prediction, features).sum(dim=1) + constant)

    @torch.jit.ignore
    def negative_log_likelihood(self, prediction: Tensor, features: Tensor) -> Tensor:
        """Its negative mean, in nats per patch: comparable between images, and between settings on equal features."""
        return -self.log_likelihood(prediction, features).mean()

    def _surprise(self, prediction: Tensor, features: Tensor) -> Tensor:
        """Squares of the whitened residual, plus the logarithms of learned variances, [B, C, h, w]."""
        residual = self._residual(prediction, features)
        if self.whitens:
            residual = F.conv2d(residual - self.residual_mean[:, None, None], self.whitening[:, :, None, None])
        square = residual.square()
        return square + self._log_variance(prediction) if self.learns_variance else square

    @torch.jit.ignore
    @torch.no_grad()
    def fit_linear(self, training: Iterable[Tensor], held_out: Iterable[Tensor]) -> None:
        """Fit the linear prediction, if there is one, to healthy standardized embeddings.

        Args:
            training: batches of [B, C, h, w], iterated more than once.
            held_out: the same, of images that choose the ridge.
        """
        if self.linear is not None:
            self.linear.fit(training, held_out)

    @torch.jit.ignore
    @torch.no_grad()
    def fit_covariance(self, training: Iterable[Tensor]) -> None:
        """Fit the covariance, if it is one that is fitted, to healthy standardized embeddings."""
        if not self.whitens:
            return
        residuals = (self.residual(batch.to(self.whitening.device)) for batch in training)
        settings = self.settings
        fitted = fit_gaussian(residuals, settings["covariance"], settings["rank"], settings["shrinkage"])
        for buffer, value in zip((self.residual_mean, self.whitening, self.log_determinant), fitted, strict=True):
            buffer.copy_(value)

    @torch.jit.ignore
    def describe(self) -> dict[str, Any]:
        """The hyper-parameters that the weights depend on, and the kind of likelihood, as plain JSON values."""
        return {**self.settings, "likelihood": self.likelihood}


def squared_error(prediction: Tensor, features: Tensor) -> Tensor:
    """The patch map of the paper: squared error averaged over channels, [B, C, H, W] twice to [B, H, W]."""
    return F.mse_loss(prediction, features, reduction="none").mean(dim=1)


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and number >= 1


def _check(holds: bool, name: str, value: Any, remedy: str) -> None:
    if not holds:
        raise BundleError(f"{name} is {value}: {remedy}")


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
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
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
        guard=0,
    )
    for index, has_mask in enumerate(masked):
        taps = kernel_taps(mode, weights[0].shape[-1], first=index == 0)
        if has_mask and not torch.equal(state[f"net.{2 * index}.mask"], taps.expand_as(weights[index])):
            raise BundleError(
                f"'{path}' has a mask in layer {index} that is not the paper's {mode} mask: it can't be loaded"
            )
    density.contexts[0].load_state_dict({key: value for key, value in state.items() if not key.endswith(".mask")})
    return density.eval()
