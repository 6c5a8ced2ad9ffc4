"""The base class of all errors that the user can mend. A message names the problem and the remedy."""


class FastzsError(Exception):
    """The request cannot be served; the message is one sentence for the user."""
