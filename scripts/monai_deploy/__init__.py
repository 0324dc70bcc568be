"""The bundle as an application on MONAI Deploy: ``python -m scripts.monai_deploy --help`` makes it."""
