"""``fastzs models``: the systems, what is trained of each, which checkpoints it reads; the backbones."""

from jsonargparse import ArgumentParser, Namespace

HELP = "list the systems"


def parser() -> ArgumentParser:
    parser = ArgumentParser(description="List the systems: paper, what is trained, what is needed, checkpoints read.")
    parser.add_argument("--backbones", action="store_true", help="list CLIP backbones and their weights instead")
    return parser


def run(config: Namespace) -> int:
    """Print the systems, or the backbones; 0."""
    if config.backbones:
        from fastzs.clip.backbones import lines, list_backbones

        print("\n".join(lines(list_backbones(pretrained=True))))
        return 0
    from fastzs.registry import systems

    for system in systems().values():
        print(f"{system.name}: {system.paper}")
        for what in ("does", "trained", "needs", "checkpoints"):
            print(f"  {what + ':':12} {getattr(system, what) or 'nothing'}")
    print("\nTheir figures stand in docs/systems.md; options in the docstrings of fastzs.models.")
    return 0
