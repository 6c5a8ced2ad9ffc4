"""``fastzs map``: label every pixel of GeoTIFFs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from fastzs.commands.segment import add_model_options, given_job, given_vocabulary

HELP = "label every pixel of GeoTIFFs, of any height"


def parser() -> ArgumentParser:
    options = ArgumentParser(
        description="Label every pixel of GeoTIFFs with one of the classes. Windows are read when it is their turn and "
        "blended where they overlap. Writes NAME.tif for each, with the same georeference, tiles and overviews."
    )
    add = options.add_argument
    add("paths", nargs="*", type=str, help="GeoTIFFs")
    add("--config", action="config", help="YAML file with any of these options (see --print_config)")
    add("--classes", type=str | list[str] | None, help="names, separated by commas")
    add("--classes-file", type=str | None, help="YAML file with a list of names, or of name: [synonyms]")
    add("--output", type=str, required=True, help="folder for the results")
    add("--bands", type=str | None, help="three bands for red, green and blue, as 4,3,2, or one for grey")
    add(
        "--range",
        type=str | None,
        help="values that become black and white, as 0,3000; if omitted, of other bands than 8-bit ones the 2nd to the "
        "98th percentile of a reduced image",
    )
    add("--scale", type=float, default=1.0, help="pixels of the result for each pixel of the map, as 0.5")
    add(
        "--polygons",
        type=float | None,
        help="also write polygons, borders simplified to this tolerance in units of the map; 0 does not simplify",
    )
    add(
        "--polygons-format",
        type=Literal["geojson", "gpkg"],
        default="geojson",
        help="NAME.geojson in longitudes and latitudes, or NAME.gpkg (GeoPackage) in the map's coordinates",
    )
    add_model_options(options)
    return options


def run(config: Namespace) -> int:
    """Segment maps; 0 if every one came out, else 1."""
    vocabulary = given_vocabulary(config)
    if not config.paths:
        raise ValueError("no maps given")
    if config.refine not in (None, "none"):
        raise ValueError(f"--refine {config.refine} follows the edges of whole images, which maps are not")
    from fastzs.files import output_path
    from fastzs.locks import hold
    from fastzs.maps.run import Wanted, check_packages, segment_map
    from fastzs.pictures import ImageError
    from fastzs.progress import ProgressBar

    bands, span = _numbers("--bands", config.bands, int), _numbers("--range", config.range, float)
    if span is not None and len(span) != 2:
        raise ValueError(f"--range: expected a lower and an upper value, as 0,3000, got {config.range}")
    ends = None if span is None else (span[0], span[1])
    wanted = Wanted(bands, ends, config.scale, config.polygons, config.polygons_format)
    check_packages(wanted)
    paths = [Path(os.path.expanduser(path)) for path in config.paths]
    targets = _targets(paths)
    job = given_job(config, vocabulary, {"short_side": 0})
    failed = 0
    with hold(output_path(config.output), "map") as held:
        question = job.segmenter.question(vocabulary, **job.asked)
        tags = {"fastzs.settings": json.dumps(job.facts()["decisive"])}
        for path, target in zip(paths, targets, strict=True):
            with ProgressBar(path.name, "window") as bar:

                def step(windows: int, bar: ProgressBar = bar) -> None:
                    held.check()
                    bar.advance(windows)

                try:
                    segment_map(
                        path,
                        held.folder / target,
                        job.segmenter,
                        question,
                        wanted,
                        tags=tags,
                        start=bar.start,
                        step=step,
                    )
                except ImageError as error:
                    bar.say(f"failed: {error}")
                    failed += 1
        print(f"{len(paths) - failed} of {len(paths)} maps segmented; results in {held.folder}")
    return 1 if failed else 0


def _targets(paths: list[Path]) -> list[str]:
    """
    Raises:
        ValueError: two maps would have one result.
    """
    stems = [path.stem for path in paths]
    for i, stem in enumerate(stems):
        if stem.casefold() in (other.casefold() for other in stems[:i]):
            raise ValueError(f"{paths[i]}: another map is called {stem}, too; give them different --output folders")
    return stems


def _numbers(option: str, given: str | None, kind: Callable[[str], Any]) -> list[Any] | None:
    if given is None:
        return None
    try:
        return [kind(part) for part in given.split(",")]
    except ValueError:
        raise ValueError(f"{option}: expected numbers separated by commas, got {given}") from None
