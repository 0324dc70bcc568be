"""Make ``tests/data/hf``: tiny random DINOv3 networks of Hugging Face transformers, with an input and its outputs.

Only needed to renew the fixtures (made with transformers 5.24.0): the tests read the files alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTConfig, DINOv3ViTModel

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_register_tokens": 4}
NETWORKS: dict[str, nn.Module] = {
    "vit": DINOv3ViTModel(DINOv3ViTConfig(**VIT, intermediate_size=128)),
    "vit_gated": DINOv3ViTModel(DINOv3ViTConfig(**VIT, intermediate_size=128, use_gated_mlp=True, hidden_act="silu")),
    "convnext": DINOv3ConvNextModel(DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])),
}


def as_maps(tokens: Tensor, prefix: int, size: tuple[int, int]) -> Tensor:
    """Tokens [B, prefix + h * w, C] to a map [B, C, h, w]."""
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, size)


@torch.no_grad()
def main() -> None:
    """Write one folder per network, as ``save_pretrained`` does, with ``io.safetensors`` beside it."""
    torch.manual_seed(0)
    for name, network in NETWORKS.items():
        for parameter in network.eval().parameters():
            # the initial layer scales and biases would hide a wrong key
            parameter.normal_(0.1, 0.3)
        folder = Path(__file__).parent / "hf" / name
        network.save_pretrained(folder)
        image = torch.randn(2, 3, 64, 96)
        output = network(image, output_hidden_states=True)
        if name == "convnext":
            arrays = {"stage2": output.hidden_states[3], "last": as_maps(output.last_hidden_state, 1, (2, 3))}
        else:
            arrays = {"last": as_maps(output.last_hidden_state, 5, (4, 6))}
            arrays["block0"] = as_maps(network.norm(output.hidden_states[1]), 5, (4, 6))
        arrays = {key: value.contiguous() for key, value in arrays.items()}
        save_file({"image": image, **arrays}, folder / "io.safetensors")


if __name__ == "__main__":
    main()
