"""Order of the data and random numbers: decided by seed, step and place in the global batch alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from trainer.draws import Draws, ResumableSampler

CPU = torch.device("cpu")


def batches(number, *arguments, **options):
    return list(itertools.islice(ResumableSampler(*arguments, **options), number))


def test_every_epoch_visits_each_sample_once_in_an_order_of_its_own():
    drawn = [index for batch in batches(10, 20, 6, seed=1) for index, _ in batch]
    epochs = [drawn[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = [index for batch in batches(10, 20, 6, seed=2) for index, _ in batch]
    assert other[:20] != epochs[0]


@pytest.mark.parametrize("first", [1, 3, 4, 17])
def test_a_sampler_begins_at_any_batch(first):
    assert batches(9, 7, 4, seed=5, first=first) == batches(9 + first, 7, 4, seed=5)[first:]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_see_what_one_process_sees(processes):
    alone = batches(8, 11, 6, seed=3)
    shares = [batches(8, 11, 6 // processes, seed=3, rank=rank, processes=processes) for rank in range(processes)]
    assert [[draw for part in parts for draw in part] for parts in zip(*shares)] == alone


def test_no_two_draws_have_the_same_augmentation():
    seeds = [seed for batch in batches(30, 5, 4, seed=9) for _, seed in batch]
    assert len(set(seeds)) == len(seeds) == 120


def numbers(draws):
    return [draws.randn(2, 3), draws.rand(), draws.randint(1000, 2), draws.rand(4)]


def test_random_numbers_do_not_depend_on_the_number_of_processes():
    whole = Draws(7, 12, 1, 6, slice(0, 6), CPU)
    parts = [Draws(7, 12, 1, 6, slice(start, start + 2), CPU) for start in (0, 2, 4)]
    for alone, *shared in zip(numbers(whole), *(numbers(part) for part in parts)):
        assert alone.equal(torch.cat(shared))
    assert len({draws.shared() for draws in (whole, *parts)}) == 1


def test_random_numbers_differ_from_step_to_step_and_ignore_the_global_generator():
    def drawn(seed, step, micro):
        torch.rand(3)
        return tuple(Draws(seed, step, micro, 2, slice(0, 2), CPU).rand().tolist())

    assert drawn(0, 1, 0) == drawn(0, 1, 0)
    assert len({drawn(0, 1, 0), drawn(1, 1, 0), drawn(0, 2, 0), drawn(0, 1, 1)}) == 4
