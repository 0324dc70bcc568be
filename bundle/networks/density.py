"""The density of patch embeddings: a masked, dilated 2D autoregressive convolutional network.

Source: Erdil et al., 'Spatial Autoregressive Modeling of DINOv3 Embeddings for Unsupervised Anomaly Detection',
arXiv 2603.02974, method section.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.errors import BundleError, check_choice

MODES = ("causal", "bidirectional", "standard")


class MaskedConv2d(nn.Conv2d):
    """A convolution with 'same' zero padding that spends no time on the dead taps of its kernel.

    A causal 3x3 kernel costs its 4 or 5 live taps instead of 9: its rows above the center and its row of the center are
    convolutions of their own. The mask is a buffer that no optimizer sees and no checkpoint holds: it follows from the
    mode.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        taps: [k, k], 1 where the kernel may look and 0 where it may not.
        dilation: distance between taps, in patches.
    """

    taps: Tensor

    def __init__(self, in_channels: int, out_channels: int, taps: Tensor, dilation: int = 1) -> None:
        super().__init__(in_channels, out_channels, taps.shape[-1], dilation=dilation)
        self.register_buffer("taps", taps.to(torch.float32), persistent=False)
        self.step = dilation
        self.parts = live_parts(taps)
        lowest = self.parts[-1][1] - 1
        reach = (taps.shape[0] // 2) * dilation
        self.margins = [reach, reach, reach, max(0, lowest * dilation - reach)]  # nothing below what is looked at

    def forward(self, features: Tensor) -> Tensor:
        """Convolve ``features`` [B, C_in, H, W] to [B, C_out, H, W]."""
        padded = F.pad(features, self.margins)
        result = self._convolve(padded, self.parts[0], self.bias, features.shape[-2], features.shape[-1])
        for part in self.parts[1:]:
            result = result + self._convolve(padded, part, None, features.shape[-2], features.shape[-1])
        return result

    def _convolve(self, padded: Tensor, part: list[int], bias: Tensor | None, height: int, width: int) -> Tensor:
        top, bottom, left, right = part
        rows = padded[:, :, top * self.step : (bottom - 1) * self.step + height]
        seen = rows[:, :, :, left * self.step : (right - 1) * self.step + width]
        weight = (self.weight * self.taps)[:, :, top:bottom, left:right]
        return F.conv2d(seen, weight, bias, dilation=self.step)


def live_parts(taps: Tensor) -> list[list[int]]:
    """The live taps [k, k] as one or two rectangles [top, bottom, left, right], ends exclusive, from top to bottom.

    Two where the rows above need other columns than the lowest row, as in causal kernels; else the box around all live
    taps, in which single dead ones cost less than another convolution would.
    """
    rows, columns = taps.any(dim=1).nonzero().flatten(), taps.any(dim=0).nonzero().flatten()
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    lowest = taps[bottom - 1].nonzero().flatten()
    end = int(lowest[-1]) + 1
    if bottom - top == 1 or end == right:
        return [[top, bottom, left, right]]
    return [[top, bottom - 1, left, right], [bottom - 1, bottom, left, end]]


def kernel_taps(mode: str, kernel_size: int, first: bool) -> Tensor:
    """The live taps [k, k] of a layer.

    ``causal`` sees what comes earlier in raster order; its first layer hides the center (PixelCNN mask A), later
    layers show it (mask B). ``bidirectional`` hides the center in its first layer only. ``standard`` hides nothing.
    """
    taps = torch.ones(kernel_size, kernel_size)
    center = kernel_size // 2
    if mode == "causal":
        taps[center, center + 1 :] = 0
        taps[center + 1 :] = 0
    if mode != "standard" and first:
        taps[center, center] = 0
    return taps


class SpatialARDensity(nn.Module):
    """Predicts each patch embedding from those around it: the mean of p(z_ij | context), a Gaussian.

    Masked convolutions with ReLU between them, as many layers as ``dilations`` has entries. With a fixed isotropic
    variance the squared error of the prediction is the negative log-likelihood up to a constant (arXiv 2603.02974).

    What a position sees, proved in ``tests/test_density.py``: in ``causal`` mode only patches earlier in raster order,
    never itself. In ``bidirectional`` mode with one constant dilation it does see itself from the third layer on, and
    in ``standard`` mode at once; both are kept since the authors publish them.

    Args:
        in_channels: channels C of the patch embeddings.
        hidden_channels: channels between the layers (256 in the paper).
        dilations: one per layer; (1, 1, 1, 1, 1) is the paper's 'standard' network, (4, 4, 4, 4, 4) its 'dilated' one.
        kernel_size: odd side of every kernel.
        mode: ``causal``, ``bidirectional`` or ``standard``.

    Raises:
        BundleError: for an unknown mode, an even kernel, no layer, or a number below 1.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int = 256,
        dilations: Sequence[int] = (1, 1, 1, 1, 1),
        kernel_size: int = 3,
        mode: str = "causal",
    ) -> None:
        super().__init__()
        check_choice("density mode", mode, MODES)
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise BundleError(f"kernel_size must be odd and at least 3, got {kernel_size}: use 3, 5, 7, ...")
        if not dilations or min(dilations) < 1:
            raise BundleError(
                f"dilations must hold one whole number >= 1 per layer, got {list(dilations)}: try [1,1,1,1,1]"
            )
        if hidden_channels < 1:
            raise BundleError(f"hidden_channels must be at least 1, got {hidden_channels}: the paper uses 256")
        self.mode = mode
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.dilations = [int(d) for d in dilations]
        self.kernel_size = kernel_size

        widths = [in_channels] + [hidden_channels] * (len(dilations) - 1) + [in_channels]
        layers: list[nn.Module] = []
        for index, dilation in enumerate(self.dilations):
            taps = kernel_taps(mode, kernel_size, first=index == 0)
            layers += [MaskedConv2d(widths[index], widths[index + 1], taps, dilation), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, features: Tensor) -> Tensor:
        """Predict ``features`` [B, C, H, W] from their context; returns [B, C, H, W]."""
        return self.net(features.contiguous(memory_format=torch.channels_last))  # the fastest order, to learn as well

    def describe(self) -> dict[str, object]:
        """The hyper-parameters that the weights depend on, as plain JSON values."""
        return {
            "mode": self.mode,
            "hidden_channels": self.hidden_channels,
            "dilations": self.dilations,
            "kernel_size": self.kernel_size,
        }


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
    )
    for index, has_mask in enumerate(masked):
        taps = kernel_taps(mode, density.kernel_size, first=index == 0)
        if has_mask and not torch.equal(state[f"net.{2 * index}.mask"], taps.expand_as(weights[index])):
            raise BundleError(
                f"'{path}' has a mask in layer {index} that is not the paper's {mode} mask: it can't be loaded"
            )
    density.load_state_dict({key: value for key, value in state.items() if not key.endswith(".mask")})
    return density.eval()
