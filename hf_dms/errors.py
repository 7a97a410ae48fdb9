"""The errors that a user may want to catch."""


class HfDmsError(ValueError):
    """A mistake that the user can mend. The message says what was found, what was expected and how to fix it."""


class NonFiniteError(HfDmsError):
    """Too many steps in a row whose loss or gradients were not finite."""


class VerificationError(RuntimeError):
    """Two models that must compute the same do not. This is a bug of hf_dms; nothing was saved."""
