"""``fastzs demo``: a page in the browser to try names on images."""

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from fastzs.needed import check_installed

HELP = "a page in the browser to try names on images"
PORT = 7860


def parser() -> ArgumentParser:
    options = ArgumentParser(
        description="Serve a page on this machine: drop images, type names, see masks, change the names and see again "
        "at once. It listens on 127.0.0.1 only and sends nothing to anybody; docs/demo.md has its HTTP API."
    )
    add = options.add_argument
    add("--model", type=str | None, help="the system that is chosen first, or a checkpoint; see fastzs models")
    add("--backbone", type=str | None, help="CLIP architecture, as open_clip calls it; else the model's own")
    add(
        "--weights",
        type=str | None,
        help="open_clip's name of weights, a file or folder; 'shapes', the small model that is built in, if neither "
        "these nor a backbone nor a checkpoint is named",
    )
    add("--checkpoint", type=str | None, help="trained model: .pth or safetensors file, folder, hub id")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add(
        "--precision",
        type=Literal["auto", "fp32", "bf16", "fp16", "int8"],
        default="auto",
        help="the precision that is chosen first",
    )
    add("--port", type=int, default=PORT, help="of 127.0.0.1; 0 takes any that is free")
    add("--max-megabytes", type=float, default=20, help="largest image file")
    add("--max-pixels", type=int, default=40_000_000, help="largest image")
    return options


def run(config: Namespace) -> int:
    """Serve until Ctrl-C; 0."""
    for package in ("gradio", "pycocotools"):
        check_installed(package, package, "pages of fastzs demo", "demo")
    for name in ("max_megabytes", "max_pixels"):
        if not config[name] > 0:
            raise ValueError(f"--{name.replace('_', '-')}: expected a number above 0, got {config[name]}")
    from fastzs.demo.answers import Answers
    from fastzs.demo.page import mount
    from fastzs.demo.server import HOST, application, listen, serve
    from fastzs.pictures import limit_pixels

    limit_pixels(config.max_pixels)
    listening = listen(config.port)  # before the model, so that a busy port is said at once
    names = ("backbone", "weights", "checkpoint", "device", "precision")
    answers = Answers(config.model, **{name: config[name] for name in names})
    file_bytes = round(config.max_megabytes * (1 << 20))
    port = listening.getsockname()[1]
    serve(
        lambda folder: mount(application(answers, folder, file_bytes), answers, folder, file_bytes),
        listening,
        lambda: print(f"fastzs demo: http://{HOST}:{port} (Ctrl-C ends it)", flush=True),
    )
    return 0
