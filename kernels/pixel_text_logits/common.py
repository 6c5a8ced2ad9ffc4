"""What all backends of ``pixel_text_logits`` share."""

# A feature shorter than this counts as having this norm, so a zero feature scores 0 (as F.normalize does).
SMALLEST_NORM = 1e-12
