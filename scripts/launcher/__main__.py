"""``python -m dinov3_spatial_ar``: see :mod:`.bundle_command`."""

from .bundle_command import main

if __name__ == "__main__":
    main()
