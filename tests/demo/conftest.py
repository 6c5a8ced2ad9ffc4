"""One model for the tests of the page, and the scene that the README shows."""

from pathlib import Path

import pytest

from fastzs.demo.answers import Answers

SCENE = Path(__file__).parents[2] / "docs" / "pictures" / "scene.png"
NAMES = "blue moon, pink cross, cyan heart"


@pytest.fixture(scope="session")
def answers() -> Answers:
    return Answers(precision="fp32")


@pytest.fixture(scope="session")
def scene() -> bytes:
    return SCENE.read_bytes()
