"""Muon: the orthogonalisation, AdamW against torch's own, and the grouping of parameters."""

import pytest
import torch
from torch import nn

from avdiff.train.loop.muon import MuonAdam, directions, muon_groups, muon_split, orthogonal


@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (16, 16)])
def test_orthogonal_keeps_directions_and_evens_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonal(matrix).float()
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


def test_stacks_and_matrices_of_one_shape_together_are_each_alone() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(6, 10), torch.randn(3, 6, 10), torch.randn(10, 6), torch.randn(6, 10)]
    for found, alone in zip(directions(matrices), map(orthogonal, matrices), strict=True):
        assert found.shape == alone.shape
        torch.testing.assert_close(found, alone, rtol=0, atol=0.02)  # bf16 sums in another order


def test_muon_split_keeps_rates_and_leaves_no_parameter_out() -> None:
    inner, table, bias = (nn.Parameter(torch.zeros(s)) for s in ((4, 4), (9, 4), (4,)))
    groups = muon_split({id(inner)}, {"params": [bias, table, inner], "lr": 0.5})
    assert [[id(p) for p in g["params"]] for g in groups] == [[id(inner)], [id(table)], [id(bias)]]
    assert all(g["lr"] == 0.5 for g in groups)
    assert groups[0]["muon"] and groups[2]["weight_decay"] == 0.0
