"""`python -m hf_dms`, for `accelerate launch -m hf_dms prune RECIPE`."""

import sys

from .cli import command

if __name__ == "__main__":
    sys.exit(command())
