"""The command line: ``fastzs COMMAND``, the commands of :mod:`fastzs.commands`.

Every option can also stand in a YAML file given with ``--config``; ``--print_config`` writes one.
"""

import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from fastzs import __version__
from fastzs.commands import doctor, evaluate, models, profile, segment, train
from fastzs.errors import FastzsError
from fastzs.recipe import check_keys

COMMANDS: dict[str, Any] = {
    "segment": segment,
    "train": train,
    "evaluate": evaluate,
    "models": models,
    "profile": profile,
    "doctor": doctor,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit code: 0 if everything asked for came out, 1 if some pictures did not, 2 if the command could not be
        carried out (one sentence on stderr says why), 130 after an interrupt, 143 after a SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else ""
    try:
        if name in COMMANDS:
            arguments = _config_first(arguments)
        config = _parser().parse_args(arguments)
        return COMMANDS[config.command].run(config[config.command])
    except KeyboardInterrupt:
        print("fastzs: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(error, FastzsError | ValueError):
            raise
        print(f"fastzs {name}: {error}", file=sys.stderr)
        return 2


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="fastzs", description="Name the classes, get the masks.", version=__version__)
    commands = parser.add_subcommands(dest="command", required=True)
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, command.parser(), help=command.HELP)
    return parser


def _config_first(arguments: list[str]) -> list[str]:
    """Put ``--config FILE``, and the files that presets stand for, in front of a command's other arguments.

    The parser lets what comes later win; this way the command line wins over the files wherever they stand.

    Raises:
        ValueError: a file has a key that the command does not know, or there is no such preset.
    """
    name, *rest = arguments
    files = []
    while "--config" in rest[:-1]:
        at = rest.index("--config")
        files.append(rest[at + 1])
        del rest[at : at + 2]
    for item in [item for item in rest if item.startswith("--config=")]:
        files.append(item.removeprefix("--config="))
        rest.remove(item)
    command = COMMANDS[name]
    known = [action.dest for action in command.parser()._actions]
    for file in files:
        check_keys(_keys(file), known, file)
    if hasattr(command, "preset_files"):
        files = [*command.preset_files(rest, files), *files]
    return [name, *(part for file in files for part in ("--config", file)), *rest]


def _keys(file: str) -> list[str]:
    """Names at the top of a YAML file; of what cannot be read, none, since the parser says what is wrong with it."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    return [str(key).replace("-", "_") for key in content] if isinstance(content, dict) else []
