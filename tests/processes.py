"""The environment for a process that a test starts."""

import os


def environment(**variables: str) -> dict[str, str]:
    """This process's variables and the given ones, without what pytest and its plugins leave for their own workers.

    pytest-benchmark refuses to run where it sees pytest-xdist's variables, and options of the outer run
    are not meant for the inner one.
    """
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return outer | variables
