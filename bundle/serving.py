"""The MLflow model of a checkpoint at work: pictures in, scores and maps out, as ``inferring`` finds them.

MLflow calls :func:`_load_pyfunc` for models that :func:`bundle.mlflow_model.save_model` wrote.
"""

from __future__ import annotations

import base64
import io
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from monai.bundle import ConfigParser

from bundle import NAME
from bundle.command_line import set_knobs
from bundle.errors import user_error
from bundle.inferers import detect_slices
from bundle.mlflow_model import ANSWER, IMAGE, ROOT
from bundle.provenance import model_words
from bundle.results import CaseResult
from bundle.writers import write_map


class ServedModel:
    """The evaluator of ``configs/inference.json`` on pictures in memory, one request after the other.

    Args:
        checkpoint: of a training.
        knobs: of inference, by name; what is None is as the config has it.

    Raises:
        MlflowException: in one line, for what is a ``BundleError`` elsewhere: no checkpoint, no weights of its
            backbone, or a knob that is none.
    """

    def __init__(self, checkpoint: str, knobs: Mapping[str, Any]) -> None:
        with _one_line():
            parser = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "inference.json"))
            set_knobs(parser, {name: value for name, value in knobs.items() if value is not None})
            for name, value in {"checkpoint": checkpoint, "cases": [], "handlers": []}.items():
                parser[name] = value
            parser.get_parsed_content("load_checkpoint")
            self.evaluator = parser.get_parsed_content("evaluator")
            self.dataset, self.slices = (parser.get_parsed_content(name) for name in ("dataset", "dataloader"))
            self.detector = parser.get_parsed_content("network")
        self.model = model_words(self.detector.describe())
        self._lock = threading.Lock()  # MLflow's server answers in threads, and the evaluator has one state

    def predict(self, data: pd.DataFrame) -> pd.DataFrame:
        """What is found in pictures.

        Args:
            data: whose column ``image`` holds the bytes of PNG, JPEG, BMP or TIFF files, or these in base64.

        Returns:
            A row for each picture: ``score`` and ``image_threshold``, whether the score is above, the ``threshold`` of
            the map, whether the picture is like the training data (None: the model cannot tell), and if not, why it is
            ``unlike`` them; and the ``map``: a TIFF file of 32-bit floats on the grid of the picture, z-scores among
            healthy patches.

        Raises:
            MlflowException: in one line, for a picture that cannot be read, or is too large.
        """
        with self._lock, tempfile.TemporaryDirectory(prefix=f"{NAME}-") as folder, _one_line(folder):
            files = [Path(folder, f"{row}.png") for row in range(len(data))]  # readers look at the content alone
            for file, content in zip(files, data[IMAGE], strict=True):
                file.write_bytes(_decoded(content))
            self.dataset.data = [{"name": row, "image": str(file)} for row, file in enumerate(files)]
            found: dict[int, dict[str, Any]] = {}
            for batch in self.slices:  # gray pictures and those in color go in batches of their own
                detect_slices(self.evaluator, batch)  # no run of the engine, which would go on after one that failed
                for case, output in zip(self.evaluator.state.batch, self.evaluator.state.output, strict=True):
                    found[case["name"]] = self._row(CaseResult.from_output({**case, **output}, self.detector))
        return pd.DataFrame([found[row] for row in range(len(data))], data.index, columns=list(ANSWER))

    def _row(self, result: CaseResult) -> dict[str, Any]:
        content = io.BytesIO()
        write_map(content, result, self.model)
        return {
            "score": result.score,
            "image_threshold": result.image_threshold,
            "above_image_threshold": result.score > result.image_threshold,
            "threshold": result.threshold,
            "in_distribution": None if result.unlike is None else not result.unlike,
            "unlike": result.warning,
            "map": content.getvalue(),
        }


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> ServedModel:
    """The model whose checkpoint is at ``path``; MLflow gives both."""
    return ServedModel(path, model_config or {})


def _decoded(content: bytes) -> bytes:
    """A file that may still be in base64, which no file of a picture is: MLflow decodes only some forms of requests."""
    try:
        return base64.b64decode(content.translate(None, b"\r\n"), validate=True)
    except ValueError:
        return content


@contextmanager
def _one_line(folder: str = "") -> Iterator[None]:
    """Errors of the user's making as MLflow's, which name the row of a file in ``folder``."""
    try:
        yield
    except Exception as error:
        cause = user_error(error)
        if cause is None:
            raise
        words = re.sub(rf"{re.escape(folder)}/(\d+)\.png", r"row \1", str(cause)) if folder else str(cause)
        raise MlflowException.invalid_parameter_value(words) from error
