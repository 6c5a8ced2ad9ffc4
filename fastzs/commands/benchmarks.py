"""``fastzs benchmarks``, and ``fastzs evaluate --benchmarks``: the eight benchmarks of the training-free line."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from fastzs.data.benchmarks import Benchmark
    from fastzs.data.pairs import PairsDataset

HELP = "list the eight benchmarks and what their folders must hold"


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="List the eight benchmarks of the training-free line, what is asked for in each, and what the data "
        "folder must hold. With --data, say what is there."
    )
    parser.add_argument("--data", type=str | None, help="folder that holds the data sets")
    return parser


def run(config: Namespace) -> int:
    """Print the benchmarks; 0."""
    from fastzs.data.benchmarks import BENCHMARKS

    for name, benchmark in BENCHMARKS.items():
        print(f"{name}: {len(benchmark.rules.classes)} classes, background: {benchmark.rules.background}")
        print(f"  needs:   {benchmark.folder}")
        if config.data is not None:
            print(f"  here:    {found(benchmark, config.data)}")
    return 0


def found(benchmark: "Benchmark", data: str) -> str:
    """How many images a data folder has for a benchmark, or what is wrong with it."""
    from fastzs.data.datasets import open_dataset
    from fastzs.data.masks import DataError

    try:
        return f"{len(open_dataset(benchmark.rules, os.path.expanduser(data), 'val'))} images"
    except DataError as error:
        return str(error).splitlines()[0]


def chosen(wanted: str) -> list["Benchmark"]:
    """The benchmarks of a list by commas, or all.

    Raises:
        ValueError: there is none of that name.
    """
    import difflib

    from fastzs.data.benchmarks import BENCHMARKS

    names = list(BENCHMARKS) if wanted == "all" else [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=2, cutoff=0.0)
            raise ValueError(f"unknown benchmark {name!r}; nearest known: {', '.join(near)}; or all")
    return [BENCHMARKS[name] for name in names]


def evaluate_all(config: Namespace, folder: Path | None) -> int:
    """Score a system on benchmarks and print one row; what is in ``folder`` with the same settings is not run again."""
    from fastzs import ranks
    from fastzs.data.benchmarks import SYSTEMS
    from fastzs.devices import choose_device
    from fastzs.loading import default_model

    benchmarks = chosen(config.benchmarks)
    config.model = config.model or default_model(config.weights, config.checkpoint)
    if config.model not in SYSTEMS:
        raise ValueError(f"--benchmarks runs {', '.join(SYSTEMS)}, whose settings there are known; got {config.model}")
    datasets = _opened(benchmarks, config.data, config.split)
    device = ranks.join(choose_device(config.device))
    try:
        scores = {}
        for benchmark, dataset in zip(benchmarks, datasets, strict=True):
            scores[benchmark.protocol] = _score(config, benchmark, dataset, folder, str(device))
        if ranks.rank() == 0:
            print(row(config.model, scores))
    finally:
        ranks.leave()
    return 0


def row(system: str, scores: dict[str, float]) -> str:
    """Markdown: the mIoU of each benchmark in percent, and their mean."""
    names, values = list(scores), list(scores.values())
    if len(values) > 1:
        names, values = [*names, "mean"], [*values, sum(values) / len(values)]
    lines = (["mIoU", *names], ["---"] * (1 + len(names)), [system, *(f"{value:.2f}" for value in values)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _scored(path: Path, key: dict[str, Any]) -> float | None:
    """mIoU in percent as an earlier run found it; None if there was none with these settings and data."""
    try:
        before = json.loads(path.read_text())
        same = before["settings"] == json.loads(json.dumps(key))
        return float(before["scores"]["mIoU"]) * 100 if same else None
    except (OSError, ValueError, LookupError, TypeError):  # nothing there, or cut short
        return None


def _opened(benchmarks: "list[Benchmark]", data: str, split: str) -> "list[PairsDataset]":
    """The data sets of all benchmarks, so that what is missing is said before any is scored.

    Raises:
        DataError: says of each that cannot be used why.
    """
    from fastzs.data.datasets import open_dataset
    from fastzs.data.masks import DataError
    from fastzs.data.pairs import PairsDataset

    found, problems = [], []
    for benchmark in benchmarks:
        try:
            dataset = open_dataset(benchmark.rules, os.path.expanduser(data), split)
            assert isinstance(dataset, PairsDataset)  # all the eight are files
            found.append(dataset)
        except DataError as error:
            problems.append(f"{benchmark.protocol}: {error}")
    if problems:
        raise DataError("\n".join(problems))
    return found


def _score(
    config: Namespace, benchmark: "Benchmark", dataset: "PairsDataset", folder: Path | None, device: str
) -> float:
    """mIoU in percent."""
    import fastzs
    from fastzs import ranks
    from fastzs.commands.evaluate import progress
    from fastzs.commands.training_free import model_options
    from fastzs.data.benchmarks import LONG_SIDE
    from fastzs.evaluate import evaluate, report
    from fastzs.files import write_atomically
    from fastzs.identity import identity
    from fastzs.vocabulary import Vocabulary

    setting, rules = benchmark.of(config.model), benchmark.rules
    options: dict[str, Any] = {"batch_size": config.batch_size, "device": device, "precision": config.precision}
    options["windows"] = config.windows
    published = {"guide": "enlarged", "working_side": 1 << 20} | setting.options | model_options(config)
    segmenter = fastzs.load(config.model, backbone=config.backbone, weights=config.weights, **options, **published)
    segmenter.short_side, segmenter.crop, segmenter.stride = setting.short_side, setting.crop, setting.stride
    segmenter.long_side, segmenter.antialias = LONG_SIDE, False
    vocabulary = Vocabulary.of_phrases(rules.classes, benchmark.phrases(config.model), config.templates)
    key = identity(
        segmenter, vocabulary, background="none", threshold=setting.threshold, options=published, regions=config.regions
    )
    key |= {"benchmark": benchmark.protocol, "threshold": setting.threshold, "data": dataset.stamp()}
    path = None if folder is None else folder / f"{benchmark.protocol}.json"
    if path is not None and (score := _scored(path, key)) is not None:
        return score
    with progress(ranks.rank() == 0, dataset, rules, None) as step:
        (matrix,) = evaluate(
            segmenter,
            dataset,
            rules,
            vocabulary,
            threshold=setting.threshold,
            regions=config.regions,
            workers=config.workers,
            step=step,
        ).values()
    found = report(matrix, rules)
    if path is not None and ranks.rank() == 0:
        about = {"benchmark": benchmark.protocol, "model": config.model, "settings": key}
        write_atomically(path, json.dumps(about | found, indent=1).encode())
    return found["scores"]["mIoU"] * 100
