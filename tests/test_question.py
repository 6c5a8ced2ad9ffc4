"""Seen classes that are nearly one of the names: said once, and nothing is changed."""

import logging

from fastzs.models import MaskCLIP
from fastzs.question import seen_classes
from tests.tiny import tiny_clip


def test_a_seen_class_that_is_nearly_a_name_is_told_once(caplog):
    model = MaskCLIP(tiny_clip())
    model.seen = ["motor bike", "tree", "sky", "bus stop"]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            trained, _ = seen_classes(model, ["road", "sky", "motorbike"])
    assert trained == [1]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "seen class 'motor bike' is not among the names and so not calibrated; is it 'motorbike'?"
