"""``python -m scripts.integrations.monai_deploy``: see :mod:`scripts.integrations.monai_deploy.package`."""

import sys

from scripts.integrations.monai_deploy.package import main

if __name__ == "__main__":
    sys.exit(main())
