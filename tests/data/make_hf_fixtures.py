"""Make ``tests/data/hf``: tiny random DINO networks of Hugging Face transformers, with inputs and their outputs.

Only needed to renew the fixtures (made with transformers 5.24.0): the tests read the files alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

FOLDER = Path(__file__).parent / "hf"
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_register_tokens": 4}
NETWORKS: dict[str, nn.Module] = {
    "vit": DINOv3ViTModel(DINOv3ViTConfig(**VIT, intermediate_size=128)),
    "vit_gated": DINOv3ViTModel(DINOv3ViTConfig(**VIT, intermediate_size=128, use_gated_mlp=True, hidden_act="silu")),
    "convnext": DINOv3ConvNextModel(DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])),
}
LEARNED = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
LEARNED_NETWORKS: dict[str, nn.Module] = {
    "dinov2": Dinov2Model(Dinov2Config(**LEARNED)),
    "dinov2_gated": Dinov2Model(Dinov2Config(**LEARNED, use_swiglu_ffn=True)),
    "dinov2_registers": Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**LEARNED)),
}
LEARNED_SIZES = [(56, 56), (84, 84), (42, 98)]  # pixels; their grids of patches are not that of training, 5 x 5


def as_maps(tokens: Tensor, prefix: int, size: tuple[int, int]) -> Tensor:
    """Tokens [B, prefix + h * w, C] to a map [B, C, h, w]."""
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, size)


def write(path: Path, arrays: dict[str, Tensor]) -> None:
    """Write ``arrays`` as .safetensors."""
    save_file({key: value.contiguous() for key, value in arrays.items()}, path)


def save_network(name: str, network: nn.Module) -> None:
    """Give ``network`` random values and write it as ``save_pretrained`` does."""
    for parameter in network.eval().parameters():
        # the initial layer scales and biases would hide a wrong key
        parameter.normal_(0.1, 0.3)
    network.save_pretrained(FOLDER / name)


def make_dinov3() -> None:
    """Write one folder per network, with ``io.safetensors`` in it."""
    for name, network in NETWORKS.items():
        save_network(name, network)
        image = torch.randn(2, 3, 64, 96)
        output = network(image, output_hidden_states=True)
        if name == "convnext":
            arrays = {"stage2": output.hidden_states[3], "last": as_maps(output.last_hidden_state, 1, (2, 3))}
        else:
            arrays = {"last": as_maps(output.last_hidden_state, 5, (4, 6))}
            arrays["block0"] = as_maps(network.norm(output.hidden_states[1]), 5, (4, 6))
        write(FOLDER / name / "io.safetensors", {"image": image, **arrays})


def make_dinov2() -> None:
    """Write one folder per network, with ``io.safetensors`` in it, and the images that they share."""
    images = {f"{height}x{width}": torch.randn(1, 3, height, width).half() for height, width in LEARNED_SIZES}
    write(FOLDER / "dinov2_images.safetensors", images)
    for name, network in LEARNED_NETWORKS.items():
        save_network(name, network)
        prefix = 5 if "registers" in name else 1
        arrays = {}
        for size, image in images.items():
            output = network(image.float(), output_hidden_states=True)
            grid = (image.shape[2] // 14, image.shape[3] // 14)
            arrays[f"{size}_last"] = as_maps(output.last_hidden_state, prefix, grid)
            arrays[f"{size}_block0"] = as_maps(network.layernorm(output.hidden_states[1]), prefix, grid)
        write(FOLDER / name / "io.safetensors", arrays)


@torch.no_grad()
def main() -> None:
    """Make all of them."""
    torch.manual_seed(0)
    make_dinov3()
    make_dinov2()


if __name__ == "__main__":
    main()
