"""``fastzs models``: the systems, what is trained of each, which checkpoints it reads."""

from jsonargparse import ArgumentParser, Namespace

HELP = "list the systems"


def parser() -> ArgumentParser:
    return ArgumentParser(description="List the systems: paper, what is trained, what is needed, checkpoints read.")


def run(config: Namespace) -> int:
    """Print the systems; 0."""
    from fastzs.registry import systems

    for system in systems().values():
        print(f"{system.name}: {system.paper}")
        for what in ("does", "trained", "needs", "checkpoints"):
            print(f"  {what + ':':12} {getattr(system, what) or 'nothing'}")
    print("\nTheir figures stand in docs/systems.md; options in the docstrings of fastzs.models.")
    return 0
