"""The one exception that stands for a mistake in what the user gave us."""


class UserError(ValueError):
    """One sentence: what was wrong, what is allowed, and the way out. Commands print it and exit with code 2."""
