"""MONAI Label on this bundle: ``python -m scripts.integrations.monai_label``."""
