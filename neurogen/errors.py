"""The one exception type for what a user can mend."""


class UserError(ValueError):
    """Bad input, stated in one line: the value, the limit it broke and what to do about it.

    Scripts print it as `error: ...` and exit with code 2; no traceback, since the line is the whole story.
    """
