"""The errors that a user may want to catch."""


class HfDmsError(ValueError):
    """A mistake that the user can fix. The message says what was found, what was expected and how to fix it."""


class NonFiniteError(HfDmsError):
    """The loss or the gradients were not finite for too many steps in a row (`dms.max_nonfinite_steps`)."""


class VerificationError(RuntimeError):
    """Two models that must give the same outputs do not. This is a bug in hf_dms; nothing was saved."""
