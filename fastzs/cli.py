"""The command line: ``fastzs COMMAND``, the commands of :mod:`fastzs.commands`.

Every option can also stand in a YAML file given with ``--config``; ``--print_config`` writes one.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from fastzs import __version__, yaml_files
from fastzs.commands import (
    benchmarks,
    compare,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    maps,
    models,
    profile,
    segment,
    train,
)
from fastzs.errors import FastzsError
from fastzs.files import read_text
from fastzs.recipe import check_keys
from fastzs.renamed import SETTINGS, current, current_flags
from fastzs.terminal import lenient_streams

COMMANDS: dict[str, Any] = {
    "segment": segment,
    "map": maps,
    "convert": convert,
    "export": export,
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "models": models,
    "demo": demo,
    "benchmarks": benchmarks,
    "profile": profile,
    "doctor": doctor,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    What cannot be printed (a closed pipe, a full disk, letters beyond ASCII) costs no result.

    Returns:
        Exit code: 0 if everything asked for came out, 1 if some images did not or standard output is full, 2 if the
        command could not be carried out (one sentence on stderr says why), 130 after an interrupt, 143 after a SIGTERM.
    """
    with lenient_streams() as out:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        out.flush()
        if out.problem is not None:
            print(f"fastzs: standard output cannot be written: {out.problem}", file=sys.stderr)
            return max(code, 1)
        return code


def _run(arguments: list[str]) -> int:
    name = arguments[0] if arguments else ""
    try:
        paths: list[str] = []
        if name in COMMANDS:
            arguments, paths = _config_first(arguments)
        config = _parser().parse_args(arguments)
        if "paths" in config[config.command] and not config[config.command].paths:
            config[config.command].paths = paths
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


def _config_first(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Put ``--config FILE``, and the files that presets stand for, in front of a command's other arguments.

    The parser lets what comes later win; this way the command line wins over the files wherever they stand.

    Returns:
        The arguments, with the content of the user's files in the place of their names; and the files' ``paths``,
        which the parser would let an empty list on the command line win over.

    Raises:
        ValueError: a file cannot be read or has a key that the command does not know, or there is no such preset.
    """
    name, *rest = arguments
    rest = _names_as_written(rest)
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
    rest = current_flags(rest, known)
    contents = [_as_written(file, known) for file in files]
    paths = next((content["paths"] for content in reversed(contents) if "paths" in content), [])
    presets = command.preset_files(rest, contents) if hasattr(command, "preset_files") else []
    configs = [*presets, *(yaml.safe_dump(content) for content in contents)]
    return [name, *(part for config in configs for part in ("--config", config)), *rest], paths


def _names_as_written(arguments: list[str]) -> list[str]:
    """Give ``--classes`` as a list where YAML, which the parser reads, sees nothing or a list in ``#road, car``."""
    out: list[str] = []
    for item in arguments:
        if item.startswith("--classes="):
            item = f"--classes={_listed(item.removeprefix('--classes='))}"
        elif out and out[-1] == "--classes":
            item = _listed(item)
        out.append(item)
    return out


def _listed(names: str) -> str:
    text = names.strip()
    plain = text.lower() != "null" and text[:1] not in tuple("#&!~-")
    return names if plain else json.dumps(names.split(","))


def _as_written(file: str, known: list[str]) -> dict[str, Any]:
    """The content of a configuration file; names of classes and paths are the texts that stand there.

    Raises:
        ValueError: it cannot be read, or has a key that is not known or stands under two names; the message names it.
    """
    path = Path(os.path.expanduser(file))
    root = yaml_files.read(path, "configuration")
    if root is None:
        return {}
    items = root.mapping("a mapping of options")
    old = {key for key, new in SETTINGS.items() if new in known}
    check_keys([key.replace("-", "_") for key in items if key not in old], known, file)
    try:
        content = yaml.safe_load(read_text(path))
    except (OSError, yaml.YAMLError) as error:  # such as objects of Python, which are not made
        raise ValueError(f"configuration {file}: cannot be read: {' '.join(str(error).split())}") from error
    for key in ("classes", "seen", "paths"):
        if key in items and not items[key].is_null:
            item = items[key]
            content[key] = [one.text() for one in item.items()] if item.is_list else item.text()
    if isinstance(paths := content.get("paths", []), str):
        content["paths"] = [paths]
    return current(content, known)
