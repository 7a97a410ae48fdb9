"""`python -m hf_dms`, for `accelerate launch -m hf_dms prune RECIPE`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
