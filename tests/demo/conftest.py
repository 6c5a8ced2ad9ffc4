"""One model for the tests of the page, and the scene that the README shows."""

from pathlib import Path

import pytest

from fastzs.demo.answers import Answers

ROOT = Path(__file__).parents[2]
NAMES = "blue moon, pink cross, cyan heart"


@pytest.fixture(scope="session")
def answers() -> Answers:
    return Answers(precision="fp32")


@pytest.fixture(scope="session")
def scene() -> bytes:
    return (ROOT / "docs" / "pictures" / "scene.png").read_bytes()
