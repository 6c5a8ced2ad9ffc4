"""Labels of a photograph from an exported model, with ONNX Runtime, NumPy and Pillow alone.

    fastzs export maskclip --output exported --labels --classes road,car,tree,sky
    python examples/onnx_without_torch.py exported photograph.jpg labels.png

The model takes any text vectors, so other names need no other export: write their vectors with another `--classes`, or
compute them with text.onnx.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

folder, photograph, output = map(Path, sys.argv[1:])
about = json.loads((folder / "metadata.json").read_text())
if not about["labels"]:
    sys.exit("expected a model exported with --labels, got one that gives logits")

image = Image.open(photograph).convert("RGB")
if about["size"]:
    height, width = about["size"]
else:  # of any size: as large as the model was made for
    factor = (about["settings"]["short_side"] or min(image.size)) / min(image.size)
    width, height = (round(side * factor) for side in image.size)
pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
mean, std = (np.array(about["settings"][name], np.float32) for name in ("mean", "std"))
images = ((pixels - mean) / std).transpose(2, 0, 1)[None]  # [1, 3, H, W]

text = np.load(folder / "text.npz")
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
(labels,) = session.run(["labels"], {"images": images, "text": text["vectors"]})  # [1, H, W]

picture = Image.fromarray(labels[0].astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
colours = np.random.default_rng(0).integers(64, 256, (256, 3), dtype=np.uint8)
picture.putpalette(colours.tobytes())
picture.save(output)
for label, count in zip(*np.unique(np.asarray(picture), return_counts=True), strict=True):
    print(f"{text['names'][label]}: {100 * count / (image.width * image.height):.1f} %")
