"""Mixture of experts: equal to a loop over tokens, properties of dropless routing, balance, bias,
load report.
"""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from avdiff.core.moe import Experts, MoE, Router, RoutingStats, balance_loss, load_report

DIM, HIDDEN, EXPERTS, TOP_K = 16, 24, 6, 2
PATHS = ("grouped", "loop", "cast_loop")


def make_moe(seed=0, **kwargs):
    torch.manual_seed(seed)
    kwargs = {"num_experts": EXPERTS, "top_k": TOP_K, **kwargs}
    moe = MoE(DIM, HIDDEN, **kwargs)
    torch.nn.init.normal_(moe.router.weight, std=0.5)  # far from ties
    return moe


def make_tokens(batch=2, tokens=9, seed=1, dtype=torch.float32):
    return torch.randn(
        batch, tokens, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def swiglu(x, wide, narrow):
    gate, up = (x @ wide).chunk(2, -1)
    return (F.silu(gate) * up) @ narrow


def slow_twin(moe, x, modality=None):
    """The formula, one token at a time."""
    e, m = moe.router.num_experts, moe.router.modalities
    groups = (
        torch.zeros(x.shape[:2], dtype=torch.long)
        if modality is None
        else modality.expand(x.shape[:2])
    )
    y, stats = torch.zeros_like(x), torch.zeros(m, 2 * e + 1, dtype=x.dtype)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            token, group = x[b, n], int(groups[b, n])
            probs = torch.exp(moe.router.weight @ token)
            probs = probs / probs.sum()
            biased = probs if moe.router.bias is None else probs + moe.router.bias[max(group, 0)]
            chosen = sorted(range(e), key=lambda i: -biased[i].item())[: moe.router.top_k]
            total = sum(probs[i] for i in chosen)
            out = sum(
                probs[i] / total * swiglu(token, moe.experts.gate_up[i], moe.experts.down[i])
                for i in chosen
            )
            if moe.shared is not None:
                out = out + swiglu(token, moe.shared.proj_in.weight.T, moe.shared.proj_out.weight.T)
            y[b, n] = out
            if group >= 0:
                row = torch.cat(
                    [torch.zeros(e, dtype=x.dtype), probs, torch.ones(1, dtype=x.dtype)]
                )
                row[chosen] = 1.0
                stats[group] = stats[group] + row
    return y, stats


CASES = [
    ("grouped", torch.float32, {}),
    ("cast_loop", torch.float32, {}),
    ("loop", torch.float32, {}),
    ("loop", torch.float64, {}),
    ("cast_loop", torch.float64, {}),
    ("auto", torch.float64, {"top_k": 1}),
    ("grouped", torch.float32, {"top_k": 3, "shared_expert_hidden": 8}),
    ("loop", torch.float64, {"modalities": 2, "selection_bias": True, "shared_expert_hidden": 8}),
]


@pytest.mark.parametrize(("path", "dtype", "options"), CASES)
def test_equals_a_loop_over_tokens_with_gradients(path, dtype, options):
    moe = make_moe(implementation=path, **options).to(dtype)
    modality = None
    if options.get("modalities"):
        modality = torch.tensor([0, 1, 1, 0, -1, 0, 1, 0, -1])
        moe.router.bias.copy_(torch.linspace(-0.3, 0.3, 2 * EXPERTS).view(2, -1))
    x = make_tokens(dtype=dtype)
    mix = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-11}
    )

    def run(function):
        inputs = x.clone().requires_grad_()
        y, stats = function(inputs)
        loss = (y * mix).sum() + balance_loss(RoutingStats(stats)).sum()
        return (y, stats, *torch.autograd.grad(loss, [inputs, *moe.parameters()]))

    fast = run(lambda inputs: moe(inputs, modality))
    slow = run(lambda inputs: slow_twin(moe, inputs, modality))
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_auto_takes_the_path_that_can_run():
    for dim, hidden, dtype in (
        (DIM, HIDDEN, torch.float64),
        (15, 7, torch.float32),
        (DIM, 12, torch.bfloat16),
    ):
        torch.manual_seed(0)
        experts = Experts(dim, hidden, 3).to(dtype)
        x, counts = torch.randn(10, dim, dtype=dtype), torch.tensor([4, 0, 6])
        want = torch.cat(
            [
                swiglu(x[:4], experts.gate_up[0], experts.down[0]),
                swiglu(x[4:], experts.gate_up[2], experts.down[2]),
            ]
        )
        torch.testing.assert_close(experts(x, counts), want)
        with pytest.raises(RuntimeError):  # torch refuses what auto avoids
            Experts(dim, hidden, 3, "grouped").to(dtype)(x, counts)


@pytest.mark.parametrize("path", PATHS)
def test_permuting_tokens_permutes_the_output(path):
    moe, x = make_moe(implementation=path), make_tokens(1, 40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    y, stats = moe(x)
    permuted, permuted_stats = moe(x[:, order])
    torch.testing.assert_close(permuted, y[:, order])
    torch.testing.assert_close(permuted_stats, stats)


@pytest.mark.parametrize("path", PATHS)
def test_batch_of_two_equals_two_singles(path):
    moe, x = make_moe(implementation=path), make_tokens(2, 20)
    both, stats = moe(x)
    singles = [moe(x[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(both, torch.cat([y for y, _ in singles]))
    torch.testing.assert_close(stats, singles[0][1] + singles[1][1])


def test_no_token_is_dropped_when_all_agree():
    moe = make_moe()
    x = make_tokens(1, 1).expand(1, 50, DIM)
    y, stats = moe(x)
    torch.testing.assert_close(y, slow_twin(moe, x[:, :1])[0].expand_as(y))
    assert RoutingStats(stats).counts.sort().values[0].tolist() == [0, 0, 0, 0, 50, 50]


@pytest.mark.parametrize("path", PATHS)
def test_expert_without_tokens_gets_a_zero_gradient(path):
    moe, x = make_moe(implementation=path), make_tokens(1, 3)
    y, stats = moe(x)
    # the gradient of a sum is an expanded tensor, which grouped_mm itself refuses
    y.sum().backward()
    idle = RoutingStats(stats).counts[0] == 0
    assert 0 < idle.sum() < EXPERTS
    for weight in (moe.experts.gate_up, moe.experts.down):
        norms = weight.grad.flatten(1).norm(dim=1)
        assert (norms[idle] == 0).all()
        assert (norms[~idle] > 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens_at_all(path):
    moe = make_moe(implementation=path, modalities=2)
    y, stats = moe(torch.empty(2, 0, DIM))
    assert y.shape == (2, 0, DIM)
    assert torch.equal(balance_loss(RoutingStats(stats)), torch.zeros(2))


@pytest.mark.parametrize("path", PATHS)
def test_autocast_keeps_the_router_in_fp32(path):
    moe, x = make_moe(implementation=path, shared_expert_hidden=8), make_tokens(2, 30)
    y, stats = moe(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, low_stats = moe(x)
        low_experts = moe.experts(x.flatten(0, 1)[:12], torch.tensor([2] * EXPERTS))
    assert low_experts.dtype == torch.bfloat16
    assert low_stats.dtype == torch.float32
    assert torch.equal(low_stats, stats)  # not one token went elsewhere
    torch.testing.assert_close(low, y, rtol=0.05, atol=0.01)
    low.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in moe.parameters())


@pytest.mark.parametrize("path", PATHS)
def test_autocast_gradients_are_close_to_fp32(path):
    moe, x = make_moe(implementation=path), make_tokens(2, 40)
    mix = make_tokens(2, 40, seed=5)

    def gradients(low):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            y, _ = moe(x)
        return torch.autograd.grad((y * mix).sum(), list(moe.parameters()))

    for low, full in zip(gradients(True), gradients(False), strict=True):
        assert (low - full).norm() < 0.03 * full.norm()


def test_bf16_weights_run_and_keep_the_input_type():
    moe = make_moe().to(torch.bfloat16)
    y, stats = moe(make_tokens(dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert stats.dtype == torch.float32


def test_gradient_checkpointing_changes_nothing():
    moe, x = make_moe(modalities=2), make_tokens()
    modality = torch.arange(9) % 2

    def run(forward):
        inputs = x.clone().requires_grad_()
        y, stats = forward(inputs)
        loss = y.square().sum() + balance_loss(RoutingStats(stats)).sum()
        return (stats, *torch.autograd.grad(loss, [inputs, *moe.parameters()]))

    plain = run(lambda inputs: moe(inputs, modality))
    again = run(lambda inputs: checkpoint(moe, inputs, modality, use_reentrant=False))
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def one_hot_router(modalities=1, top_k=1):
    """A router that sends token e_i to expert i with near certainty."""
    router = Router(EXPERTS, EXPERTS, top_k, modalities)
    with torch.no_grad():
        router.weight.copy_(torch.eye(EXPERTS) * 50)
    return router


def test_balance_loss_is_one_at_balance_and_bounded_at_collapse():
    router = one_hot_router(modalities=3)
    even, collapsed = torch.eye(EXPERTS).repeat(4, 1), torch.eye(EXPERTS)[:1].repeat(24, 1)
    modality = torch.tensor([0] * 24 + [1] * 24)  # the third modality is silent
    stats = RoutingStats(router(torch.cat([even, collapsed]), modality)[2])
    torch.testing.assert_close(balance_loss(stats), torch.tensor([1.0, EXPERTS, 0.0]))
    # two experts that share every token: E/K
    both = torch.zeros(10, EXPERTS)
    both[:, :2] = 1.0
    loss = balance_loss(RoutingStats(one_hot_router(top_k=2)(both)[2]))
    torch.testing.assert_close(loss, torch.tensor([EXPERTS / 2]))


def test_balance_loss_pulls_towards_balance():
    torch.manual_seed(0)
    router, x = (
        Router(DIM, EXPERTS, TOP_K),
        make_tokens(1, 200)[0] + 1.0,
    )  # a common offset that favours some experts
    torch.nn.init.normal_(router.weight, std=0.3)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    seen = []
    for _ in range(60):
        stats = RoutingStats(router(x)[2])
        seen.append(load_report(stats).max_over_mean.item())
        optimizer.zero_grad()
        balance_loss(stats).sum().backward()
        optimizer.step()
    assert seen[0] > 1.8
    assert seen[-1] < 1.35


def test_accumulated_micro_batches_equal_the_full_batch():
    moe, x = make_moe(modalities=2), make_tokens(8, 12)
    modality = (torch.arange(12) % 3 == 0).long()
    weight = moe.router.weight
    full = RoutingStats(moe(x, modality)[1])
    (full_grad,) = torch.autograd.grad(balance_loss(full).sum(), weight)
    parts = [RoutingStats(moe(part, modality)[1]) for part in x.split(2)]
    load = sum((p.detach() for p in parts[1:]), parts[0].detach())
    losses = torch.stack([balance_loss(p, load) for p in parts])
    torch.testing.assert_close(losses.mean(0), balance_loss(full))
    (part_grad,) = torch.autograd.grad(losses.sum(-1).mean(), weight)
    torch.testing.assert_close(part_grad, full_grad)
    own = torch.stack([balance_loss(p) for p in parts]).mean(0)
    assert (
        own > balance_loss(full)
    ).all()  # small batches look less balanced than they are: why load is there
    torch.testing.assert_close(
        (parts[0] + parts[1]).data, RoutingStats(moe(x[:4], modality)[1]).data
    )


def reduce_on_rank(rank, store, answers):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    data = torch.full((2, 2 * EXPERTS + 1), float(rank + 1), requires_grad=True)
    answers.put((rank, RoutingStats(data).all_reduce().data.tolist()))
    dist.barrier()
    dist.destroy_process_group()


def test_all_reduce_sums_over_ranks(tmp_path):
    stats = RoutingStats(torch.ones(1, 2 * EXPERTS + 1))
    assert torch.equal(stats.all_reduce().data, stats.data)  # one process: nothing to add
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    ranks = [
        context.Process(target=reduce_on_rank, args=(r, tmp_path / "store", answers))
        for r in range(2)
    ]
    for rank in ranks:
        rank.start()
    got = dict(answers.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join(timeout=60)
    assert got == {rank: [[3.0] * (2 * EXPERTS + 1)] * 2 for rank in range(2)}


def test_selection_bias_moves_the_load_and_not_the_weights():
    moe, x = make_moe(selection_bias=True, modalities=2), make_tokens(1, 400) + 0.7
    modality = (torch.arange(400) < 300).long()
    plain = make_moe(modalities=2)
    assert torch.equal(moe(x, modality)[0], plain(x, modality)[0])  # starts at zero
    before = load_report(RoutingStats(moe(x, modality)[1])).max_over_mean
    for rate in (5e-3,) * 150 + (1e-3,) * 150 + (2e-4,) * 100:
        with torch.no_grad():
            stats = RoutingStats(moe(x, modality)[1])
        moe.router.update_bias(stats.counts, rate)
    after = load_report(RoutingStats(moe(x, modality)[1]))
    assert (before > 1.5).all()
    assert (after.max_over_mean < 1.15).all()
    assert (after.dead == 0).all()
    experts, weights, _ = moe.router(x[0], modality)
    probs = F.linear(x[0], moe.router.weight).softmax(-1).gather(-1, experts)
    torch.testing.assert_close(weights, probs / probs.sum(-1, keepdim=True))
    assert "router.bias" in moe.state_dict()
    assert "router.bias" not in dict(moe.named_parameters())


def test_bias_of_a_silent_modality_stays():
    router = Router(DIM, 4, 1, modalities=2, selection_bias=True)
    router.update_bias(torch.tensor([[8.0, 0.0, 4.0, 4.0], [0.0, 0.0, 0.0, 0.0]]), rate=0.5)
    torch.testing.assert_close(
        router.bias, torch.tensor([[-0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    )
    with pytest.raises(ValueError, match="selection_bias=False"):
        Router(DIM, 4, 1).update_bias(torch.ones(4))


def test_load_report_by_layer_and_modality():
    counts = torch.tensor(
        [[[6.0, 6.0, 6.0, 6.0], [24.0, 0.0, 0.0, 0.0]], [[12.0, 12.0, 0.0, 0.0], [0.0] * 4]]
    )
    tokens = counts.sum(-1, keepdim=True) / 2
    stats = RoutingStats.stack(
        list(torch.cat([counts, torch.full_like(counts, 0.25) * tokens, tokens], dim=-1))
    )
    report = load_report(stats)
    torch.testing.assert_close(report.share[0], torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]]))
    assert report.max_over_mean.tolist() == [[1.0, 4.0], [2.0, 0.0]]
    assert report.dead.tolist() == [[0, 3], [2, 0]]
    assert stats.tokens.tolist() == [[12.0, 12.0], [12.0, 0.0]]
    assert balance_loss(stats).shape == (2, 2)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"top_k": 7}, "top_k=7"),
        ({"top_k": 0}, "top_k=0"),
        ({"modalities": 0}, "modalities=0"),
        ({"implementation": "fast"}, "implementation='fast'"),
    ],
)
def test_refuses_what_does_not_fit(kwargs, text):
    with pytest.raises(ValueError, match=text):
        make_moe(**kwargs)
