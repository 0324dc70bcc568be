"""MONAI Label on this bundle: ``python -m scripts.monai_label``."""
