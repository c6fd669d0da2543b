"""What every test starts from."""

import pytest
import torch

# The order of a sum, and so its last bits, depends on the number of threads.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, alone and among others."""
    torch.manual_seed(0)
