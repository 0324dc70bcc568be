"""``python -m scripts.monai_deploy``: see :mod:`scripts.monai_deploy.package`."""

import sys

from scripts.monai_deploy.package import main

if __name__ == "__main__":
    sys.exit(main())
