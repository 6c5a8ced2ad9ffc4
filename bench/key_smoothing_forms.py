"""Where key smoothing over all pairs is quicker than its linear form: what the rule of key_smoothing chooses by.

    python -m bench.key_smoothing_forms    # single-threaded, seconds

Both forms in turn, in processor time, best of several, around the N where both need as many operations.
"""

import torch

from fastzs.kernels.key_smoothing.api import pairs_are_quicker
from fastzs.kernels.key_smoothing.linear import key_smoothing_linear

from .timing import timed

SHAPES = [(768, 20), (768, 171), (2048, 847)]  # channels, classes
SHARES = [0.5, 0.65, 0.8, 1.0]  # of the N where both need as many operations
TURNS = 15


def linear(keys: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    return key_smoothing_linear(keys, probs, "paper", 1.0)


def pairs(keys: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    return torch.ops.fastzs.key_smoothing_pairwise(keys, probs)


def main() -> None:
    """Print the times of both forms and which of them the rule takes."""
    torch.set_num_threads(1)
    for width, classes in SHAPES:
        for share in SHARES:
            positions = round(share * 2 * width * classes / (width + classes))
            inputs = torch.randn(1, positions, width), torch.rand(1, classes, positions)
            times: dict = {linear: [], pairs: []}
            for _ in range(TURNS):
                for form, taken in times.items():
                    taken.append(1e3 * timed(form, [inputs] * 3, 3)["processor seconds"])
            of_linear, of_pairs = (min(taken) for taken in times.values())
            print(
                f"D {width}, C {classes}, N {positions:4} ({share:.2f}): linear {of_linear:6.2f} ms, pairs "
                f"{of_pairs:6.2f} ms, {of_pairs / of_linear:.2f}; takes "
                f"{'pairs' if pairs_are_quicker(*inputs) else 'linear'}"
            )


if __name__ == "__main__":
    main()
