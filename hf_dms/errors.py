"""The errors that a user may want to catch."""


class HfDmsError(ValueError):
    """Something that a user can mend: a recipe, a request, a model, data. The message says what, and how."""


class VerificationError(RuntimeError):
    """Two models that must compute the same do not; nothing was saved."""


class NonFiniteError(RuntimeError):
    """Loss or gradients were not finite for too many steps in a row."""
