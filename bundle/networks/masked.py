"""Convolutions that do not see what they must not, and spend no time on it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


def taps_around(kernel_size: int, guard: int = 0) -> Tensor:
    """The taps [k, k] of a kernel that sees all but its center, and all that is within ``guard`` patches of it."""
    taps = torch.ones(kernel_size, kernel_size)
    hidden = slice(kernel_size // 2 - guard, kernel_size // 2 + guard + 1)
    taps[hidden, hidden] = 0
    return taps


def taps_before(kernel_size: int, with_center: bool) -> Tensor:
    """The taps [k, k] of a kernel that sees what comes earlier in raster order, and maybe the center.

    Masks B and A of PixelCNN (van den Oord et al., *Pixel Recurrent Neural Networks*, ICML 2016).
    """
    taps = torch.ones(kernel_size, kernel_size)
    center = kernel_size // 2
    taps[center, center + with_center :] = 0
    taps[center + 1 :] = 0
    return taps
