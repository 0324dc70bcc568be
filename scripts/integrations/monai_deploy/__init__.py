"""The bundle as an application on MONAI Deploy: ``python -m scripts.integrations.monai_deploy --help`` makes it."""
