"""Seeds of a place, and random numbers that leave the others alone."""

import random

import numpy as np
import pytest
import torch

from qmimic_d2.randomness import mixed_seed, own_randomness


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_a_seed_depends_on_every_word_and_on_their_order():
    seeds = [mixed_seed(1, 0, 5), mixed_seed(1, 5, 0), mixed_seed(2, 0, 5), mixed_seed(1, 0, 6), mixed_seed(1, 0, 5, 1)]
    assert len(set(seeds)) == len(seeds)
    assert mixed_seed(1, 0, 5) == seeds[0]
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_block_draws_by_its_seed_alone():
    with own_randomness(3):
        first = draw()
    draw()
    with own_randomness(3):
        assert draw() == first
    with own_randomness(4):
        assert draw() != first


def test_the_generators_go_on_as_if_the_block_had_drawn_nothing():
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    with pytest.raises(RuntimeError), own_randomness(3):
        draw()
        raise RuntimeError
    assert draw() == expected
