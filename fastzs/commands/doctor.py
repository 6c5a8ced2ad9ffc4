"""``fastzs doctor``: what is there and what is used."""

from jsonargparse import ArgumentParser, Namespace

HELP = "print what is there and what is used"


def parser() -> ArgumentParser:
    return ArgumentParser(description="Print versions, devices, what was built, and which backend each op takes.")


def run(config: Namespace) -> int:
    """Print the report; 1 if an op has a problem, else 0."""
    from fastzs import doctor

    found = doctor.report()
    print(doctor.text(found))
    return 1 if any(op["problem"] for op in found["ops"]) else 0
