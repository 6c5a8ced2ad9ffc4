"""The command line: ``fastzs COMMAND``, the commands of :mod:`fastzs.commands`.

Every option can also stand in a YAML file given with ``--config``; ``--print_config`` writes one.
"""

import sys

from jsonargparse import ArgumentParser

from fastzs import __version__
from fastzs.commands import doctor, evaluate, models, segment

COMMANDS = {"segment": segment, "evaluate": evaluate, "models": models, "doctor": doctor}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit code: 0 if everything asked for came out, 1 if some pictures did not, 2 if the command could not be
        carried out (one sentence on stderr says why), 130 after an interrupt.
    """
    config = _parser().parse_args(_config_first(sys.argv[1:] if arguments is None else arguments))
    try:
        return COMMANDS[config.command].run(config[config.command])
    except KeyboardInterrupt:
        print("fastzs: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        print(f"fastzs {config.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="fastzs", description="Name the classes, get the masks.", version=__version__)
    commands = parser.add_subcommands(dest="command", required=True)
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, command.parser(), help=command.HELP)
    return parser


def _config_first(arguments: list[str]) -> list[str]:
    """Put ``--config FILE`` in front of a command's other arguments.

    The parser lets what comes later win; this way the command line wins over the file wherever it stands.
    """
    command, rest, files = arguments[:1], list(arguments[1:]), []
    while "--config" in rest[:-1]:
        at = rest.index("--config")
        files += rest[at : at + 2]
        del rest[at : at + 2]
    return [*command, *files, *rest]


def _is_for_the_user(error: Exception) -> bool:
    from fastzs.runs import OutputError

    return isinstance(error, ValueError | OutputError)
