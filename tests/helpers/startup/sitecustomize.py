"""Imported at the start of every Python process that a test launches: none of them may import bitsandbytes.

Where it is installed, peft imports it, and transformers imports peft: four seconds in each process. Tests of packed
weights run in the process of pytest itself, where it stays.
"""

import sys

sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # as if it were not installed
