"""What all backends of ``key_smoothing`` share."""

EPS = 1e-12  # a key shorter than this counts as this long, as in F.normalize
