"""``fastzs evaluate``: score a model or somebody's label maps under a protocol."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from fastzs.commands.options import add_regions, add_windows
from fastzs.commands.scores import plot, show, show_fold, write
from fastzs.commands.training_free import add_flags, model_options

if TYPE_CHECKING:
    from fastzs.data.protocols import Protocol
    from fastzs.evaluate import AnyDataset
    from fastzs.folds import FoldScores
    from fastzs.metrics import ConfusionMatrix
    from fastzs.segmenter import Segmenter
    from fastzs.vocabulary import Vocabulary

HELP = "score a model, or label maps, on a data set"


def parser() -> ArgumentParser:
    options = ArgumentParser(
        description="Score a model on a data set, or label maps that lie in a folder, under a named protocol. Prints a "
        "table and writes results.json. Under torchrun the processes share the images out."
    )
    add = options.add_argument
    add("--config", action="config", help="YAML file with any of these options (see --print_config)")
    add("--protocol", type=str | None, help="name (voc15-5, coco156-15, shapes, ...) or YAML file of a protocol")
    add("--data", type=str | None, help="folder of the protocol's data set, laid out as usual")
    add("--split", type=str, default="val", help="as the data set calls it")
    add("--images", type=str | None, help="own data: folder of images (with --masks)")
    add("--masks", type=str | None, help="own data: folder of masks named like the images")
    add("--pairs", type=str | None, help="own data: file with an image and its mask on each line")
    add("--label-file", type=str | None, help="own data: YAML file of what values or colours of masks mean (7: road)")
    add("--classes-file", type=str | None, help="own data without a protocol: YAML list of the names of the labels")
    add("--output", type=str | None, help="folder for results.json and what else is asked for")
    add(
        "--metric",
        type=Literal["standard", "zs3", "cagnet"],
        default="standard",
        help="zs3: classes that occur nowhere count as 0; cagnet: at an eighth of the size; for published tables",
    )
    add(
        "--benchmarks",
        type=str | None,
        help="score a training-free system as published on all eight benchmarks, or on some by commas, below --data",
    )
    add("--overlays", action="store_true", help="also write the labels drawn over each image")
    add("--plots", action="store_true", help="also write bars of the IoU and the confusion matrix (needs matplotlib)")
    add("--predictions", type=str | None, help="score the label maps NAME.png of this folder instead of a model")
    add(
        "--model",
        type=str | None,
        help="a name that fastzs models lists, or a checkpoint of any of them; naclip if omitted (maskclip for the "
        "built-in weights)",
    )
    add("--backbone", type=str | None, help="CLIP architecture, as open_clip calls it; else the model's own")
    add("--weights", type=str | None, help="as for fastzs segment")
    add("--checkpoint", type=str | None, help="trained model: file, folder, hub id")
    add("--options", type=dict[str, Any], default={}, help="settings of the model, as --options.dense=qq")
    add_flags(options)
    add("--words", type=str | None, help="YAML file with other names, or synonyms, for the classes, in their order")
    add("--embeddings", type=str | None, help=".npy file with the classes' text vectors, instead of a text tower")
    add_regions(options)
    add("--templates", type=str | None, help="named prompt templates")
    add(
        "--calibration",
        type=float | list[float] | None,
        help="constant taken from the seen classes' scores (published: 0.1); a list, [0, 0.05, 0.1], tries each; if "
        "omitted, the model's own where it was trained on this protocol's seen classes, else 0",
    )
    add(
        "--against",
        type=str | None,
        help="name of all else (for PASCAL-5i: others): ask for each unseen class alone in the images that hold it",
    )
    add("--short-side", type=int | None, help="resize to this shorter side, 0 leaves the size; else the model's own")
    add("--crop", type=int | tuple[int, int] | None, help="window size, 0 for the whole image; else the model's own")
    add("--stride", type=int | tuple[int, int] | None, help="distance of windows; two thirds of the crop if omitted")
    add_windows(options)
    add("--batch-size", type=int, default=8, help="windows at a time")
    add("--workers", type=int, default=0, help="processes that read images ahead")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", type=Literal["auto", "fp32", "bf16", "fp16"], default="auto", help="numbers of the model")
    return options


def run(config: Namespace) -> int:
    """Evaluate; 0 when it is done."""
    if config.benchmarks is not None:
        return _benchmarks(config)
    if (config.overlays and config.output is None) or (config.plots and config.output is None):
        raise ValueError("--overlays and --plots write files; name a folder for them with --output")
    if config.against is not None:
        for name in ("predictions", "calibration", "words", "embeddings", "regions", "overlays", "plots"):
            if config[name] not in (None, False):
                raise ValueError(f"--against asks a model for two names at a time; leave out --{name}")
    if config.predictions is not None and config.calibration is not None:
        raise ValueError(
            f"--calibration {config.calibration} lowers a model's scores, but --predictions are labels without scores; "
            "leave one of them out"
        )
    if config.predictions is not None and config.regions is not None:
        raise ValueError(
            "--regions is for a model's labels, but --predictions are labels already; leave one of them out"
        )
    if config.plots:
        from fastzs import plots

        plots.check()
    from fastzs.files import output_path
    from fastzs.locks import hold

    folder = None if config.output is None else output_path(config.output)
    with nullcontext() if folder is None else hold(folder, "evaluate"):
        return _evaluate(config, folder)


def _benchmarks(config: Namespace) -> int:
    from fastzs.commands.benchmarks import evaluate_all
    from fastzs.files import output_path
    from fastzs.locks import hold

    if config.data is None:
        raise ValueError("--benchmarks needs the folder that holds the data sets: --data DIR; see fastzs benchmarks")
    folder = None if config.output is None else output_path(config.output)
    with nullcontext() if folder is None else hold(folder, "evaluate"):
        return evaluate_all(config, folder)


def _evaluate(config: Namespace, folder: Path | None) -> int:
    protocol = _protocol(config)

    from fastzs import ranks
    from fastzs.devices import choose_device
    from fastzs.evaluate import report

    device = ranks.join(choose_device(config.device))
    try:
        dataset = _dataset(config, protocol)
        shown = ranks.rank() == 0
        begun = time.monotonic()
        about: dict[str, Any] = {"pictures": len(dataset), "processes": ranks.world(), "metric": config.metric}
        overlays = folder / "overlays" if folder is not None and config.overlays else None
        if config.against is not None:
            segmenter = _segmenter(config, str(device))
            found = _score_fold(segmenter, config, dataset, protocol, shown)
            if ranks.rank() == 0:
                if folder is not None:
                    about |= _about(segmenter, config) | {"seconds": round(time.monotonic() - begun, 3)}
                    write(folder, protocol, dataset, about, [asdict(found)])
                show_fold(found, protocol, dataset, config.model)
                _told(folder)
            return 0
        if config.predictions is not None:
            matrices = {0.0: _score_folder(config, dataset, protocol, overlays, shown)}
            about |= {"predictions": config.predictions}
        else:
            segmenter = _segmenter(config, str(device))
            vocabulary = _vocabulary(config, protocol)
            matrices = _score_model(segmenter, vocabulary, config, dataset, protocol, overlays, shown)
            about |= _about(segmenter, config)
            about |= {"vocabulary": {"hash": vocabulary.hash, "phrases": list(vocabulary.phrases)}}
        about |= {"seconds": round(time.monotonic() - begun, 3)}
        if ranks.rank() == 0:
            # files first: a terminal may fail
            if folder is not None:
                results = [
                    ({} if "predictions" in about else {"calibration": constant}) | report(matrix, protocol)
                    for constant, matrix in matrices.items()
                ]
                write(folder, protocol, dataset, about, results)
                if config.plots:
                    plot(folder, next(iter(matrices.values())), protocol)
            show(matrices, protocol, dataset, about)
            _told(folder)
    finally:
        ranks.leave()
    return 0


def _protocol(config: Namespace) -> "Protocol":
    from fastzs.data.protocols import Protocol, protocol

    if config.protocol is not None:
        if config.classes_file is not None:
            raise ValueError("--protocol brings its classes; --classes-file is for own data without a protocol")
        return protocol(config.protocol)
    if config.classes_file is None:
        raise ValueError("name the protocol with --protocol, or for own data the classes with --classes-file")
    from fastzs.vocabulary import Vocabulary

    names = Vocabulary(_read_classes(config.classes_file)).names
    return Protocol(Path(config.classes_file).stem, names)


def _dataset(config: Namespace, protocol: "Protocol") -> "AnyDataset":
    from fastzs.data.datasets import FolderDataset, PairsFile, open_dataset
    from fastzs.yaml_files import label_file

    reduce, remap = protocol.reduce_zero_label, label_file(config.label_file, protocol.classes)
    if (config.images is None) != (config.masks is None):
        raise ValueError("--images and --masks go together: the folder of images and the folder of their masks")
    if sum(given is not None for given in (config.images, config.pairs, config.data)) > 1:
        raise ValueError("name the data once: with --data, with --images and --masks, or with --pairs")
    if config.images is not None:
        return FolderDataset(config.images, config.masks, protocol.classes, reduce_zero_label=reduce, remap=remap)
    if config.pairs is not None:
        return PairsFile(config.pairs, protocol.classes, reduce_zero_label=reduce, remap=remap)
    if remap is not None:
        raise ValueError("--label-file is for own masks, with --images and --masks or with --pairs")
    return open_dataset(protocol, config.data, config.split)


def _segmenter(config: Namespace, device: str) -> "Segmenter":
    import fastzs
    from fastzs.loading import default_model

    config.model = config.model or default_model(config.weights, config.checkpoint)
    return fastzs.load(
        config.model,
        backbone=config.backbone,
        weights=config.weights,
        checkpoint=config.checkpoint,
        device=device,
        precision=config.precision,
        short_side=config.short_side,
        crop=config.crop,
        stride=config.stride,
        batch_size=config.batch_size,
        windows=config.windows,
        **model_options(config),
    )


def _vocabulary(config: Namespace, protocol: "Protocol") -> "Vocabulary":
    from fastzs.vocabulary import Vocabulary

    words = protocol.entries if config.words is None else _read_classes(config.words)
    return Vocabulary(words, templates=config.templates, embeddings=config.embeddings)


def _read_classes(path: str) -> list:
    from fastzs.yaml_files import read_classes

    return read_classes(Path(os.path.expanduser(path)))


def _score_folder(
    config: Namespace, dataset: "AnyDataset", protocol: "Protocol", overlays: Path | None, shown: bool
) -> "ConfusionMatrix":
    from fastzs.evaluate import evaluate_predictions

    with progress(shown, dataset, protocol, overlays) as step:
        return evaluate_predictions(config.predictions, dataset, protocol, metric=config.metric, step=step)


def _score_model(
    segmenter: "Segmenter",
    vocabulary: "Vocabulary",
    config: Namespace,
    dataset: "AnyDataset",
    protocol: "Protocol",
    overlays: Path | None,
    shown: bool,
) -> "dict[float, ConfusionMatrix]":
    from fastzs.evaluate import evaluate

    given = config.calibration
    constants = [given] if isinstance(given, float | int) else given
    with progress(shown, dataset, protocol, overlays) as step:
        return evaluate(
            segmenter,
            dataset,
            protocol,
            vocabulary,
            calibrations=constants,
            metric=config.metric,
            regions=config.regions,
            workers=config.workers,
            step=step,
        )


def _score_fold(
    segmenter: "Segmenter", config: Namespace, dataset: "AnyDataset", protocol: "Protocol", shown: bool
) -> "FoldScores":
    from fastzs.folds import evaluate_fold

    if not protocol.unseen:
        raise ValueError(f"--against scores unseen classes, but protocol {protocol.name} has none")
    classes = [protocol.classes[i] for i in protocol.unseen]
    with progress(shown, dataset, protocol, None) as step:
        return evaluate_fold(segmenter, dataset, classes, others=config.against, templates=config.templates, step=step)


@contextmanager
def progress(
    shown: bool, dataset: "AnyDataset", protocol: "Protocol", overlays: Path | None
) -> "Iterator[Callable[..., None]]":
    """A bar, and the step that moves it and writes overlays."""
    from fastzs import ranks
    from fastzs.evaluate import save_overlay
    from fastzs.progress import ProgressBar

    with ProgressBar(f"evaluating {protocol.name}", "picture", shown=shown) as progress:
        progress.start(len(range(ranks.rank(), len(dataset), ranks.world())))

        def step(name: str = "", picture: Any = None, labels: Any = None) -> None:
            if overlays is not None:
                save_overlay(overlays, name, picture, labels, protocol)
            progress.advance()

        yield step


def _about(segmenter: "Segmenter", config: Namespace) -> dict[str, Any]:
    from fastzs.doctor import describe_device, versions

    device = describe_device(segmenter.device)
    return {
        "model": config.model,
        "options": dict(config.options),
        "regions": config.regions,
        "checkpoint": config.checkpoint,
        "fingerprint": getattr(segmenter.model, "fingerprint", "") or None,
        "weights": segmenter.model.weights,
        "precision": segmenter.precision,
        "short_side": segmenter.short_side,
        "crop": segmenter.crop,
        "stride": segmenter.stride,
        "windows": segmenter.windows,
        "device": {key: device[key] for key in ("device", "name", "details")},
        "versions": versions(),
    }


def _told(folder: Path | None) -> None:
    if folder is not None:
        print(f"results in {folder}")
