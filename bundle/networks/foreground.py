"""Which patches of an image show the body: the others have no part in moments, thresholds, image score and map."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bundle.errors import BundleError, shown

AUTO = 0.02  # of the range of intensities: air in a window of CT, in an MR or ultrasound image is darker


def air_level(foreground: float | Literal["auto", "all"]) -> float:
    """The intensity, in [0, 1], up to which it is air by the setting ``foreground``; below 0 where nothing is.

    Raises:
        BundleError: for another word, or a threshold out of range.
    """
    number = not isinstance(foreground, (str, bool)) and 0 <= foreground < 1
    if foreground not in ("auto", "all") and not number:
        raise BundleError(f"foreground is {shown(foreground)}: give auto, all, or an intensity in [0, 1) as 0.05")
    return {"auto": AUTO, "all": -1.0}[foreground] if isinstance(foreground, str) else float(foreground)


class Foreground(nn.Module):
    """Finds the patches of an image that show the body, holes included.

    A patch is in the foreground if its mean intensity exceeds a threshold, or if there is foreground to its left and
    right, above and below: a black cyst in a gray organ is no air. An image without air, as of histology, is foreground
    as a whole. All by products and sums that TorchScript, ONNX and OpenVINO have.

    Args:
        grid: height and width of the map, in patches.
        foreground: ``auto``: mean intensities above 0.02 of the range; ``all``: every patch; or another threshold, in
            [0, 1).

    Raises:
        BundleError: for another word, or a threshold out of range.
    """

    before_row: Tensor
    before_column: Tensor

    def __init__(self, grid: list[int], foreground: float | Literal["auto", "all"] = "auto") -> None:
        super().__init__()
        self.air = air_level(foreground)
        self.takes_all = self.air < 0
        self.register_buffer("before_row", torch.ones(grid[0], grid[0]).tril(), persistent=False)
        self.register_buffer("before_column", torch.ones(grid[1], grid[1]).triu(), persistent=False)

    def forward(self, brightness: Tensor) -> Tensor:
        """Whether each patch is inside, [B, h, w] bool, from its mean intensity ``brightness`` [B, h, w] in [0, 1]."""
        if self.takes_all:
            return torch.ones_like(brightness) > 0
        bright = (brightness.float() > self.air).float()
        left, right = torch.matmul(bright, self.before_column), torch.matmul(bright, self.before_column.t())
        above, below = torch.matmul(self.before_row, bright), torch.matmul(self.before_row.t(), bright)
        return bright + left * right * above * below > 0


def mean_brightness(image: Tensor, patch_size: int) -> Tensor:
    """The mean intensity [B, 1, h, w] of every patch of ``image`` [B, C, H, W]."""
    return F.avg_pool2d(image.mean(dim=1, keepdim=True), patch_size)
