"""``fastzs train``: train a model on a data set under a protocol."""

import difflib
import inspect
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from fastzs import __version__
from fastzs.recipe import Recipe, check_keys

if TYPE_CHECKING:
    from fastzs.data.protocols import Protocol
    from fastzs.evaluate import AnyDataset
    from fastzs.vocabulary import Vocabulary

HELP = "train a model on a data set"
PRESETS = Path(__file__).parents[1] / "presets"
CONFIG = "config.yaml"
MODEL_SETTINGS = ("options", "loss_weights", "transform")  # that stages may change, beside the recipe's


def parser() -> ArgumentParser:
    options = ArgumentParser(
        description="Train a model under a named protocol, or go on with a training that stopped: the same command "
        "does. Writes the settings in full (config.yaml), log.csv, evaluation.csv, TensorBoard's files where that is "
        "installed, and checkpoints: OUTPUT/last and OUTPUT/best are folders that --checkpoint of other commands "
        "takes. Under torchrun the processes share every batch out."
    )
    add = options.add_argument
    add("--preset", type=str | None, help=f"named settings: {', '.join(presets())}")
    add("--config", action="config", help="YAML file with any of these options; comes after the preset")
    add("--output", type=str, required=True, help="folder for the results")
    add("--protocol", type=str | None, help="name (voc15-5, coco156-15, shapes, ...) or YAML file of a protocol")
    add("--data", type=str | None, help="folder of the protocol's data set, laid out as usual")
    add("--split", type=str, default="train", help="to train on, as the data set calls it")
    add("--test-split", type=str, default="val", help="to evaluate on")
    add("--images", type=str | None, help="own data: folder of images (with --masks)")
    add("--masks", type=str | None, help="own data: folder of masks named like the images")
    add("--test-images", type=str | None, help="own data: images to evaluate on (with --test-masks)")
    add("--test-masks", type=str | None, help="own data: their masks")
    add("--label-file", type=str | None, help="own data: YAML file of what values or colours of masks mean (7: road)")
    add("--classes-file", type=str | None, help="YAML list of the classes' names, or of name: [synonyms]")
    add("--embeddings", type=str | None, help=".npy file with the classes' text vectors, instead of a text tower")
    add("--templates", type=str | None, help="named prompt templates")
    add("--model", type=str, default="clip_rc", help="model")
    add("--backbone", type=str | None, help="CLIP architecture, as open_clip calls it; else the model's own")
    add("--weights", type=str | None, help="as for fastzs segment")
    add("--start", type=str | None, help="checkpoint whose weights to start from: file, folder, hub id")
    add("--options", type=dict[str, Any], default={}, help="settings of the model, as --options.prompts=10")
    add(
        "--loss-weights",
        type=dict[str, Any],
        default={},
        help="weights of the loss's parts, as --loss-weights.focal=100",
    )
    add("--transform", type=dict[str, Any], default={}, help="augmentation, as --transform.flip=0")
    add(
        "--stages",
        type=list[dict[str, Any]],
        default=[],
        help="trainings one after the other, each from the weights of the one before, with what it changes: "
        "[{}, {max_steps: 400, options: {stage: mixed}}]; each has a folder of its own in OUTPUT",
    )
    add("--device", type=str, default="auto", help="auto, cpu, cuda, mps")
    types = get_type_hints(Recipe)
    for item in fields(Recipe):
        default = item.default_factory() if callable(item.default_factory) else item.default
        add(f"--{item.name.replace('_', '-')}", type=types[item.name], default=default, help=item.metadata["help"])
    return options


def presets() -> list[str]:
    """Names of all presets."""
    return sorted(path.relative_to(PRESETS).with_suffix("").as_posix() for path in PRESETS.rglob("*.yaml"))


def preset_files(arguments: list[str], contents: list[dict[str, Any]]) -> list[str]:
    """The files of the presets that a command's arguments, or else its configuration files, name.

    Raises:
        ValueError: there is no such preset; the nearest known are named.
    """
    names = [value for flag, value in pairwise(arguments) if flag == "--preset"]
    names += [item.removeprefix("--preset=") for item in arguments if item.startswith("--preset=")]
    for content in contents if not names else ():
        names += [str(content["preset"])] if content.get("preset") else []
    for name in names:
        if name not in presets():
            near = difflib.get_close_matches(name, presets(), n=3, cutoff=0.4) or presets()
            raise ValueError(f"unknown preset {name!r}; nearest known: {', '.join(near)}")
    return [str(PRESETS / f"{name}.yaml") for name in names]


def run(config: Namespace) -> int:
    """Train; 0 when it is done, 128 plus the signal's number if one stopped it."""
    from fastzs import stages
    from fastzs.files import output_path

    settings, output = config.as_dict(), output_path(config.output)
    known = [*MODEL_SETTINGS, *(item.name for item in fields(Recipe))]
    every = stages.staged(settings, config.stages, known)
    for number, one in enumerate(every, start=1):
        stage = config.clone()
        for key in known:
            stage[key] = one[key]
        stage.stages, stage.output = [], str(stages.folder(output, number))
        if number > 1:
            stage.start = str(stages.folder(output, number - 1) / "last")
        finished = stages.steps_done(Path(stage.output)) >= stage.max_steps
        stages.check_order(output, number, finished)
        if not finished and (stopped := _run(stage)):
            return stopped
    if every:
        stages.link(output, len(every))
        return 0
    return _run(config)


def _run(config: Namespace) -> int:
    recipe = Recipe(**{item.name: config[item.name] for item in fields(Recipe)})
    protocol = _protocol(config)
    if recipe.setting != "supervised" and not protocol.unseen:
        raise ValueError(
            f"protocol {protocol.name} has no unseen classes, so --setting {recipe.setting} means nothing there; "
            "use --setting supervised"
        )
    from fastzs.files import output_path
    from fastzs.locks import hold

    output = output_path(config.output)
    with hold(output, "train"):
        return _train(config, recipe, protocol, output)


def _train(config: Namespace, recipe: Recipe, protocol: "Protocol", output: Path) -> int:
    import torch

    from fastzs import ranks
    from fastzs.data.protocols import ignore_label
    from fastzs.data.transforms import training_transform
    from fastzs.devices import choose_device
    from fastzs.train import train

    device = ranks.join(choose_device(config.device))
    try:
        vocabulary = _vocabulary(config, protocol)
        dataset = _dataset(config, protocol, config.split, config.images, config.masks)
        evaluate, tested = _evaluation(config, protocol, vocabulary)
        torch.manual_seed(recipe.seed)
        model = _model(config, protocol, recipe)
        _check_arguments(model.loss_parts, config.loss_weights, "loss-weights", model.class_options)
        _check_arguments(training_transform, config.transform, "transform")
        transform = training_transform(
            model.crop or model.short_side,
            model.mean,
            model.std,
            ignored=ignore_label(len(protocol.classes)),
            **{key: _tuple(value) for key, value in config.transform.items()},
        )
        if ranks.rank() == 0:
            _write_config(config, protocol, output)
            print(f"{config.model} on {dataset.what}, {len(dataset)} images; protocol {protocol}; {tested}")
        outcome = train(
            model,
            dataset,
            transform,
            vocabulary,
            recipe,
            output,
            seen=protocol.seen if recipe.setting != "supervised" else None,
            loss_weights=config.loss_weights,
            evaluate=evaluate,
            best="hIoU" if protocol.unseen else "mIoU",
            about={
                "protocol": protocol.name,
                "data": dataset.what,
                "vocabulary": vocabulary.hash,
                "model": config.model,
                "backbone": model.backbone_name,
                "weights": model.weights,
                "text": None if vocabulary.embeddings is not None else model.clip.fingerprint,
                "start": config.start,
                "options": config.options,
                "transform": config.transform,
            },
            device=device,
        )
        if ranks.rank() == 0:
            print(_told(outcome, recipe, output, protocol))
        return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by
    finally:
        ranks.leave()


def _protocol(config: Namespace) -> "Protocol":
    from fastzs.data.protocols import Protocol, protocol

    if config.protocol is None and config.classes_file is None:
        raise ValueError("name the protocol with --protocol, or for own data the classes with --classes-file")
    if config.protocol is not None:
        return protocol(config.protocol)
    from fastzs.vocabulary import Vocabulary

    return Protocol(Path(config.classes_file).stem, Vocabulary(_words(config.classes_file)).names)


def _words(path: str) -> list:
    from fastzs.yaml_files import read_classes

    return read_classes(Path(os.path.expanduser(path)))


def _vocabulary(config: Namespace, protocol: "Protocol") -> "Vocabulary":
    from fastzs.vocabulary import Vocabulary

    words = protocol.entries if config.classes_file is None else _words(config.classes_file)
    if len(words) != len(protocol.classes):
        raise ValueError(
            f"classes file {config.classes_file} has {len(words)} classes, "
            f"but protocol {protocol.name} has {len(protocol.classes)}"
        )
    return Vocabulary(words, templates=config.templates, synonyms="mean", embeddings=config.embeddings)


def _dataset(
    config: Namespace, protocol: "Protocol", split: str, images: str | None, masks: str | None
) -> "AnyDataset":
    from fastzs.data.datasets import FolderDataset, open_dataset

    if (images is None) != (masks is None):
        raise ValueError("a folder of images and one of their masks go together; one of them is missing")
    if images is None or masks is None:
        if config.label_file is not None and config.images is None:
            raise ValueError("--label-file is for own masks, with --images and --masks")
        return open_dataset(protocol, config.data, split)
    if config.data is not None:
        raise ValueError("name the data once: with --data, or with --images and --masks")
    from fastzs.yaml_files import label_file

    remap = label_file(config.label_file, protocol.classes)
    return FolderDataset(images, masks, protocol.classes, reduce_zero_label=protocol.reduce_zero_label, remap=remap)


def _evaluation(
    config: Namespace, protocol: "Protocol", vocabulary: "Vocabulary"
) -> tuple[Callable[[Any], Mapping[str, float]] | None, str]:
    """What scores the model on the way, and a sentence on what it is scored on."""
    if config.images is not None and config.test_images is None:
        return None, "not evaluated on the way, since there are no --test-images"
    dataset = _dataset(config, protocol, config.test_split, config.test_images, config.test_masks)

    def evaluate(model: Any) -> Mapping[str, float]:
        from fastzs.evaluate import evaluate, summary
        from fastzs.segmenter import Segmenter

        matrices = evaluate(Segmenter(model), dataset, protocol, vocabulary)
        return summary(next(iter(matrices.values())).scores_of(protocol))

    return evaluate, f"evaluated on {dataset.what}, {len(dataset)} images"


def _model(config: Namespace, protocol: "Protocol", recipe: Recipe) -> Any:
    from fastzs.loading import check_options
    from fastzs.models.words import FixedClasses
    from fastzs.registry import systems

    trained = {name: entry for name, entry in systems().items() if entry.trained}
    if config.model not in trained:
        raise ValueError(f"there is no model {config.model!r} to train; there are {', '.join(trained)}")
    entry, options = trained[config.model], dict(config.options)
    check_options(entry, options)
    given = {name: config[name] for name in ("backbone", "weights") if config[name] is not None}
    kind: Any = entry.kind
    if issubclass(kind, FixedClasses):
        options.setdefault("classes", list(protocol.classes))
    # The scores of classes that were trained with labels are lowered in testing, as published.
    options["seen"] = [protocol.classes[i] for i in protocol.seen] if recipe.setting == "inductive" else None
    if config.start is None:
        return kind(**given, **options)
    return kind.open(config.start, **given, **options)


def _check_arguments(function: Callable, given: Mapping[str, Any], what: str, reserved: Collection[str] = ()) -> None:
    taken = inspect.signature(function).parameters.values()
    names = [p.name for p in taken if p.kind is p.KEYWORD_ONLY and p.name not in reserved]
    check_keys(given, names, f"--{what}")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _write_config(config: Namespace, protocol: "Protocol", output: Path) -> None:
    import yaml

    from fastzs.files import write_atomically
    from fastzs.runs import OutputError

    kept = {key: value for key, value in config.as_dict().items() if key not in ("config", "preset", "output")}
    about = f"# fastzs {__version__}" + (f", from the preset {config.preset}" if config.preset else "")
    text = f"{about}\n# protocol {protocol}\n{yaml.safe_dump(_plain(kept), sort_keys=False)}"
    try:
        write_atomically(output / CONFIG, text.encode())
    except OSError as error:
        raise OutputError(f"cannot write {output / CONFIG}: {error.strerror}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _told(outcome: Any, recipe: Recipe, output: Path, protocol: "Protocol") -> str:
    scores = ", ".join(f"{name} {100 * value:.2f}" for name, value in outcome.scores.items())
    if outcome.stopped_by is not None:
        return f"stopped by {outcome.stopped_by.name} after step {outcome.step}; the same command goes on from {output}"
    return f"{outcome.step} of {recipe.max_steps} steps done" + (f"; {protocol.name}: {scores}" if scores else "")
