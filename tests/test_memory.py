"""A thousand images take no more memory than a few batches of them, whatever they come in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, sys
import torch
from PIL import Image
from bench.machine import peak_megabytes
from fastzs.models import NACLIP, MaskCLIP
from fastzs.segmenter import Segmenter
from tests.tiny import tiny_clip

torch.set_num_threads(1)
kind, system = sys.argv[1:]
SIDE, BATCH = 320, 8
Image.effect_noise((SIDE, SIDE), 64).convert("RGB").save("noise.png")
model = MaskCLIP(tiny_clip()) if system == "maskclip" else NACLIP(tiny_clip(), refine="none")
segmenter = Segmenter(model, short_side=32, crop=0, batch_size=BATCH)

def images(count):
    if kind == "list":
        return ["noise.png"] * count
    return (torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8) for _ in range(count))

def run(count):
    found = 0
    for result in segmenter(images(count), ["cat", "dog", "sky"], scores=True):
        found += result.labels.shape == (SIDE, SIDE)
    assert found == count

run(4 * BATCH)  # what is loaded and kept at the first call
print(json.dumps([peak_megabytes(lambda: run(count), "cpu") for count in (4 * BATCH, 1000)]))
"""
IMAGE = 320 * 320 * 3 / 1e6  # MB: of a retained image; a result's labels and scores take 5/3 of it beside
NOISE = 0.02  # of a thousand images: what the allocator keeps


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "system"), [("list", "maskclip"), ("generator", "maskclip"), ("list", "naclip")])
def test_a_thousand_images_take_the_memory_of_a_few_batches(kind, system, tmp_path):
    command = [sys.executable, "-c", CHILD, kind, system]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "FASTZS_CACHE": str(tmp_path), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout)
    assert few > 0  # the peak is measured
    assert many - few < NOISE * 1000 * IMAGE, (few, many)
