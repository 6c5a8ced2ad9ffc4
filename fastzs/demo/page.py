"""The page: fields on the left, answers on the right. Gradio draws it; nothing is sent to anybody."""

import html
import os
import random
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from PIL import Image

from fastzs.data.shapes import draw
from fastzs.demo.answers import Answers
from fastzs.demo.server import IMAGES
from fastzs.demo.view import card, problem
from fastzs.errors import FastzsError

HOUR = 3600
SCENES, FIRST = 32, 13  # drawings to choose from; what the page begins with
HEAD = "<h1>fastzs: name the classes, get the masks</h1><p style='opacity: 0.75; font-size: 0.9em'>{}</p>"
HINT = '<p class="hint">Drop images, type names, press Enter.</p>'
SYNTAX = "road, sky, person | pedestrian | cyclist: commas separate classes, | adds synonyms"
BACKGROUND = "Pixels of no name: prompt takes what fits general words better, threshold takes low scores"


def mount(app: FastAPI, answers: Answers, folder: str, file_bytes: int) -> FastAPI:
    """Put the page at the root of the server.

    Args:
        folder: where gradio keeps uploads; it gives out no other files.
        file_bytes: largest image.
    """
    # gradio reads these when it is imported and when it makes its parts
    os.environ |= {
        "GRADIO_TEMP_DIR": folder,
        "GRADIO_EXAMPLES_CACHE": folder,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    import gradio as gr
    from gradio.themes import Soft

    with gr.Blocks(title="fastzs", analytics_enabled=False, delete_cache=(HOUR // 6, HOUR)) as page:
        gr.HTML(HEAD.format(html.escape(answers.knows)), padding=True)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                files = gr.File(label="Images", file_count="multiple", height=150, elem_id="files")
                scene = gr.Button("Draw a scene", size="sm", visible=answers.draws)
                names = gr.Textbox(answers.classes, label="Names", info=SYNTAX, lines=1, max_lines=8, elem_id="names")
                ask = gr.Button("Find them", variant="primary")
                background = gr.Radio(
                    ["none", "prompt", "threshold"], value="none", label="Background", info=BACKGROUND
                )
                threshold = gr.Slider(
                    0, 1, 0, step=0.01, label="Score threshold", info="0 takes the system's own", visible=False
                )
                with gr.Row():
                    system = gr.Dropdown(answers.systems, value=answers.systems[0], label="System", min_width=120)
                    precision = gr.Dropdown(
                        answers.precisions, value=answers.precisions[0], label="Precision", min_width=120
                    )
            with gr.Column(scale=3, min_width=360):
                here = Path(__file__).parent
                shown = gr.HTML(
                    HINT,
                    css_template=(here / "view.css").read_text(encoding="utf-8"),
                    js_on_load=(here / "view.js").read_text(encoding="utf-8"),
                )

        def find(paths: list[str] | None, text: str, kind: str, precise: str, rest: str, least: float) -> str:
            return find_all(answers, paths, text, system=kind, precision=precise, background=rest, threshold=least)

        def draw_one() -> tuple[list[str], str]:
            return draw_scene(folder, random.randrange(SCENES))

        def draw_first() -> tuple[list[str], str]:
            return draw_scene(folder, FIRST)

        hidden: dict[str, Any] = {"api_visibility": "private"}  # the HTTP API is /label
        once: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "minimal", **hidden}
        inputs = [files, names, system, precision, background, threshold]
        changes = [files.upload, files.clear, files.delete, names.submit, ask.click, system.input, precision.input]
        gr.on([*changes, background.input, threshold.release], find, inputs, shown, **once)
        background.change(lambda rest: gr.update(visible=rest == "threshold"), background, threshold, **hidden)
        scene.click(draw_one, None, [files, names], **hidden).then(find, inputs, shown, **once)
        if answers.draws:  # the page begins with something to look at
            page.load(draw_first, None, [files, names], **hidden).then(find, inputs, shown, **once)
    page.queue(max_size=16, default_concurrency_limit=1)
    return gr.mount_gradio_app(
        app,
        page,
        "/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        max_file_size=file_bytes,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        theme=Soft(font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


def find_all(answers: Answers, paths: list[str] | None, names: str, **options: object) -> str:
    """The HTML of the answers for several images; what is wrong stands where the answer would be."""
    if not paths or not names.strip():
        return HINT
    if len(paths) > IMAGES:
        return problem(f"expected at most {IMAGES} images side by side, got {len(paths)}")
    parts = []
    for path in paths:
        title = os.path.basename(path)
        try:
            parts.append(card(answers.ask(Path(path).read_bytes(), title, names, **options)))  # type: ignore[arg-type]
        except FileNotFoundError:
            parts.append(problem(f"{title}: uploads are kept for an hour; drop the image again"))
        except (FastzsError, ValueError) as error:
            parts.append(problem(str(error)))
    return f'<div class="answers">{"".join(dict.fromkeys(parts))}</div>'


def draw_scene(folder: str, seed: int) -> tuple[list[str], str]:
    """The path of a drawn image in a folder, and names for what is in it."""
    scene = draw(1, (300, 420), seed=seed, objects=(5, 7), radius=(22, 40))
    drawn = Path(folder, "drawn")
    drawn.mkdir(exist_ok=True)
    path = drawn / f"scene {seed}.png"
    Image.fromarray(scene.images[0].permute(1, 2, 0).numpy()).save(path)
    names = [*dict.fromkeys(f"{colour} {shape}" for _, colour, shape in scene.objects[0]), scene.grounds[0]]
    return [str(path)], ", ".join(names)
