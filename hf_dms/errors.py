"""The errors that a user may want to catch, and a part of their messages."""

import difflib
from collections.abc import Iterable


class HfDmsError(ValueError):
    """A mistake that the user can fix. The message says what was found, what was expected and how to fix it."""


class NonFiniteError(HfDmsError):
    """The loss or the gradients were not finite for too many steps in a row (`dms.max_nonfinite_steps`)."""


class VerificationError(RuntimeError):
    """Two models that must give the same outputs do not. This is a bug in hf_dms; nothing was saved."""


def did_you_mean(given: str, known: Iterable[str], prefix: str = "") -> str:
    """ " Did you mean X?" for the known name that is closest to what was given; empty if none is close."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" Did you mean {prefix}{near[0]}?" if near else ""
