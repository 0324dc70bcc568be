"""A trained model as a folder that MLflow loads and serves: the checkpoint, the code that runs it, and what both need.

The code is a copy of the bundle and of its configs. So the folder is whole wherever it comes from, a clone or an
installed package, and there is nothing to install but public packages. Nothing is pickled. The weights of the backbone
stay where they are: whoever loads the model needs them as for any other command.
"""

from __future__ import annotations

import io
import os
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image, ImageDraw

from bundle import NAME
from bundle.errors import BundleError

ROOT = Path(__file__).resolve().parents[1]  # of a clone, of the installed package, or of the code in a model of MLflow
LOADER = "bundle.serving"
IMAGE = "image"  # the column of the input
ANSWER = {
    "score": "double",
    "image_threshold": "double",
    "above_image_threshold": "boolean",
    "threshold": "double",
    "in_distribution": "boolean",
    "unlike": "string",
    "map": "binary",
}
MAY_BE_NONE = ("in_distribution",)  # where the model cannot tell
# of inference, which whoever loads the model may set; None: as configs/inference.json has them
KNOBS = ("weights", "weights_sha256", "device", "precision", "batch_size", "max_voxels")
_SIDE = 64  # of the example, in pixels


def save_model(folder: str | os.PathLike, checkpoint: str | os.PathLike, **about: Any) -> None:
    """Write the MLflow model of a checkpoint.

    Args:
        folder: to be made, or empty.
        checkpoint: ``model.pt`` of a training.
        about: what an ``mlflow.models.Model`` is to know of itself, such as its ``run_id``.

    Raises:
        BundleError: if the bundle is not installed, so that nobody knows what it needs.
        OSError: if the checkpoint has gone, or the folder cannot be written.
    """
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # it copies what lies in the working folder
    import pandas as pd
    from mlflow import pyfunc  # slow to import
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    answer: list[Any] = [ColSpec(kind, name, required=name not in MAY_BE_NONE) for name, kind in ANSWER.items()]
    pyfunc.save_model(
        folder,
        loader_module=LOADER,
        data_path=str(checkpoint),
        code_paths=[str(ROOT / name) for name in ("bundle", "configs")],
        mlflow_model=Model(**about),
        signature=ModelSignature(Schema([ColSpec("binary", IMAGE)]), Schema(answer)),
        input_example=pd.DataFrame({IMAGE: [example()]}),
        pip_requirements=requirements(),
        model_config=dict.fromkeys(KNOBS),
        metadata={"input_example": "SYNTHETIC: an ellipse, of nobody"},
    )


def example() -> bytes:
    """A synthetic picture of a bright ellipse, as PNG."""
    picture = Image.new("L", (_SIDE, _SIDE))
    ImageDraw.Draw(picture).ellipse((_SIDE // 8, _SIDE // 16, _SIDE * 7 // 8, _SIDE * 15 // 16), fill=160)
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def requirements() -> list[str]:
    """The packages that the bundle needs, without those of its extras, in the versions that are installed here.

    Raises:
        BundleError: if this is no clone and the bundle is not installed.
    """
    clone = ROOT / "pyproject.toml"  # which knows more than the metadata of a clone that has changed since
    try:
        own = tomllib.loads(clone.read_text())["project"]["dependencies"] if clone.is_file() else None
        needed = [Requirement(text) for text in own or metadata.requires(NAME) or []]
    except metadata.PackageNotFoundError as error:
        raise BundleError(f"{NAME} is not installed, so its requirements are not known: pip install it") from error
    return [f"{one.name}=={Version(metadata.version(one.name)).public}" for one in needed if one.marker is None]
