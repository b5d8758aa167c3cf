"""Muon: the orthogonalisation, AdamW against torch's own, and the grouping of parameters."""

import pytest
import torch
from torch import nn

from avdiff.train.muon import MuonAdam, muon_groups, orthogonal


@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (16, 16)])
def test_orthogonal_keeps_directions_and_evens_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonal(matrix)
    sizes = torch.diagonal(u.T @ result @ v.T)  # its singular values, if the directions are kept
    assert (sizes > 0.5).all() and (sizes < 1.4).all()
    assert (result - u @ torch.diag(sizes) @ v).norm() < 0.05 * result.norm()  # bf16


def test_plain_groups_are_adamw() -> None:
    torch.manual_seed(0)
    ours = nn.Linear(5, 3)
    theirs = nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    one = MuonAdam([{"params": list(ours.parameters())}], lr=1e-2, weight_decay=0.1)
    two = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(5):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for net, optimizer in ((ours, one), (theirs, two)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def test_kernels_inside_go_to_muon_and_it_learns() -> None:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("conv_in", nn.Conv2d(2, 8, 1))
    net.add_module("inner", nn.Conv2d(8, 8, 3, padding=1))
    net.add_module("conv_out", nn.Conv2d(8, 2, 1))
    groups = muon_groups({"net": net}, ends=("conv_in", "conv_out"))
    assert [len(g["params"]) for g in groups] == [1, 2, 3]
    assert groups[0]["params"][0] is net.inner.weight and groups[0]["muon"]
    optimizer = MuonAdam(groups, lr=1e-2)
    x = torch.randn(4, 2, 6, 6)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (net(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
