"""The bundle as an installed package: ``python -m dinov3_spatial_ar run inferring --config_file inference.json``."""
