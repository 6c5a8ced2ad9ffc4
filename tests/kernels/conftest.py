"""What kernel tests share: NaN-filled outputs."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_empty_tensors():
    """Fill every ``torch.empty`` with NaN (or the largest integer), so that what a kernel forgets to write shows.

    Also fills what C++ allocates through the dispatcher, as ``torch::stable::new_empty`` does.
    """
    flag = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = flag
