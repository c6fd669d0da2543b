"""Random numbers that depend on a place in the training alone, not on what was drawn before it."""

import contextlib
import random
from typing import Iterator

import numpy as np
import torch

__all__ = ["mixed_seed", "own_randomness"]


def mixed_seed(*words: int) -> int:
    """One seed of 32 bits from several numbers >= 0; near ones give unrelated seeds."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


@contextlib.contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """
    Seeds Python's, NumPy's and PyTorch's generators on the CPU for the length of a block.

    After it they continue as if the block had drawn nothing.
    """
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        # torch.manual_seed would seed the GPUs as well
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)
