"""The base of all errors that are the user's to mend. Their messages name what is wrong and what to do."""


class FastzsError(Exception):
    """What fastzs refuses or cannot do; the message is one sentence for the user."""
