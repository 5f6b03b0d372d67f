"""Muon turns a gradient into a step of the same size in every direction; tables and vectors stay with AdamW."""

from __future__ import annotations

import torch
from torch import nn

from tests.tiny_recipe import Tiny
from trainer.loop import Settings
from trainer.optimizers import ROOT_MEAN_SQUARE, Muon, optimizers_of, orthogonalised


def test_an_orthogonalised_matrix_keeps_its_directions_and_levels_their_strengths():
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(40, 12, generator=generator))
    strengths = torch.logspace(0, -2, 12)
    for matrix, u, v in (
        (left * strengths @ right.T, left, right),
        ((left * strengths @ right.T).T, right, left),
    ):
        levelled = u.T @ orthogonalised(matrix) @ v
        assert torch.all((levelled.diagonal() > 0.6) & (levelled.diagonal() < 1.25))
        assert (levelled - levelled.diagonal().diag()).abs().max() < 1e-4


def test_a_step_on_a_convolution_has_the_size_of_one_of_adamw():
    weight = nn.Parameter(torch.zeros(16, 8, 3, 3))
    optimizer = Muon([{"params": [weight]}], lr=0.01, weight_decay=0.0)
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 1e-4
    optimizer.step()
    size = float(weight.detach().square().mean().sqrt())
    assert 0.7 * ROOT_MEAN_SQUARE * 0.01 < size < 1.2 * ROOT_MEAN_SQUARE * 0.01
    assert (weight.detach() * weight.grad).sum() < 0


def test_muon_takes_matrices_and_convolutions_and_adamw_the_rest(tmp_path):
    recipe = Tiny()
    recipe.table = nn.Embedding(5, 4)
    recipe.convolution = nn.Conv2d(4, 4, 3)
    settings = Settings(output=tmp_path, steps=1, batch=1, optimizer="muon")
    muon, adamw = optimizers_of(recipe.groups(settings), settings.rate)
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in (muon, adamw)]
    assert id(recipe.convolution.weight) in held[0]
    assert {id(recipe.table.weight), id(recipe.convolution.bias)} <= held[1]
    assert held[0] | held[1] == {id(p) for p in recipe.parameters()} and not held[0] & held[1]


def test_adamw_alone_is_the_default(tmp_path):
    settings = Settings(output=tmp_path, steps=1, batch=1)
    (only,) = optimizers_of(Tiny().groups(settings), settings.rate)
    assert isinstance(only, torch.optim.AdamW)
