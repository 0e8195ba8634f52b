"""`plan` says beforehand what a step does: its GEMMs as the profiler counts them, its peak as the allocator does."""

from itertools import product

import pytest
import torch
from alignloss.kernels.blocks import SLICE
from torch.profiler import ProfilerActivity, profile

import alignloss
from alignloss import plan
from alignloss.commands.measure import peak_bytes
from alignloss.ops.sizes import Footprint, Sizes

MIB = 1 << 20
N, T, H, V = 2048, 128, 256, 8192

# what trains, in a loss module, workspace: which regime that is, and in how many groups
STEPS = {
    ("", False, None): (1, 0),
    ("hidden", False, None): (2, 0),
    ("hidden weight", False, None): (4, 0),
    ("weight", False, None): (4, 0),
    ("hidden weight", True, 256 * MIB): (3, 1),
    ("hidden weight", True, 48 * MIB): (3, 2),
    ("hidden weight", True, 2 * MIB): (4, 0),
}


def problem(trains, module, workspace, dtype, masked):
    """A step, and the plan of it."""
    hidden = torch.randn(N // T, T, H).to(dtype).requires_grad_("hidden" in trains)
    weight = (torch.randn(V, H) * H**-0.5).to(dtype).requires_grad_("weight" in trains)
    labels = torch.randint(0, V, (N // T, T))
    labels[:, : int(T * masked)] = -100
    tokens = int((labels >= 0).sum())

    def step():
        with torch.set_grad_enabled(bool(trains)):
            if module:
                loss = alignloss.SFTLoss(workspace_bytes=workspace)(hidden, weight, labels).loss
            else:
                loss = alignloss.linear_logprob(hidden, weight, labels, workspace_bytes=workspace).sum()
        if trains:
            loss.backward()

    return step, plan(
        tokens,
        H,
        V,
        train_hidden="hidden" in trains,
        train_head="weight" in trains,
        pair_tokens=tokens // (N // T) if module else None,
        positions=N,
        dtype=dtype,
        device="cpu",
        workspace_bytes=workspace,
    )


@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, 0.5), (torch.bfloat16, 0)])
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_peak_within_a_tenth(case, masked, dtype):
    step, expected = problem(*case, dtype, masked)
    assert peak_bytes(step) == pytest.approx(expected.peak_bytes, rel=0.1, abs=MIB / 2)
    assert expected.workspace_bytes <= expected.budget_bytes


@pytest.mark.parametrize(("case", "regime"), STEPS.items(), ids=str)
def test_regime_and_gemms(case, regime):
    step, expected = problem(*case, torch.float32, masked=0)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, acc_events=True) as prof:
        step()
    assert (expected.regime, expected.groups > 1) == (regime[0], regime[1] > 1)
    flops = sum(event.flops for event in prof.key_averages() if event.key in ("aten::mm", "aten::addmm"))
    assert flops == pytest.approx(expected.flops, rel=0.001)
    assert len(expected.tiles) == (2 if regime[0] == 4 else 1)
    assert all(0 < rows <= N and 0 < columns <= V for rows, columns in expected.tiles)
    assert expected.flops == expected.gemms * 2 * N * H * V


@pytest.mark.nightly_where(lambda training, dtype: training and dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_full_logits_within_a_tenth(training, dtype):
    hidden, weight = (torch.randn(n, H).to(dtype).requires_grad_(training) for n in (N, V))
    labels = torch.randint(0, V, (N,))

    def step():
        logps = torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, labels[:, None])
        if training:
            logps.sum().backward()

    gradients = (hidden.nbytes + weight.nbytes) * training
    expected = plan(N, H, V, train_hidden=training, train_head=training, dtype=dtype, device="cpu").full_logits_bytes
    # the gradient of the head is not there yet when the logits peak
    assert expected - gradients <= peak_bytes(step) - gradients <= 1.1 * expected


@pytest.mark.parametrize("device", [{"device": "cpu"}, {"device": "cuda", "device_memory": 80 << 30}])
def test_the_least_budget_of_one_pass_is_exact(device):
    shape = {"train_head": True, "dtype": torch.bfloat16, **device}
    for pairs in (256, [1000, 600, 448]):
        floor = plan(N, H, V, pair_tokens=pairs, **shape).one_pass_bytes
        enough = plan(N, H, V, pair_tokens=pairs, workspace_bytes=floor, **shape)
        short = plan(N, H, V, pair_tokens=pairs, workspace_bytes=floor - 1, **shape)
        assert (enough.regime, enough.recomputed_tokens) == (3, 0)
        assert short.recomputed_tokens > 0


def test_groups_of_a_gpu_hold_enough_tokens_to_be_worth_a_pass_over_the_gradient():
    # float32: 16 KiB of logits per token of 4,096 entries; 4,096 tokens in pairs of 512
    shape = {
        "train_head": True,
        "pair_tokens": 512,
        "dtype": torch.float32,
        "device": "cuda",
        "device_memory": 80 << 30,
    }
    few, enough = (plan(4096, 256, 4096, workspace_bytes=size * MIB, **shape) for size in (12, 24))
    assert (few.regime, few.gemms) == (4, 4)  # some 700 tokens would fit
    assert (enough.regime, enough.groups) == (3, 4)
    # in 16 bits a group of a small head takes the host longer than the GPU
    shape |= {"dtype": torch.bfloat16, "workspace_bytes": 3072 * MIB}
    small, large = (plan(16_384, width, 131_072, **shape) for width in (64, 2048))
    assert (small.regime, small.gemms) == (4, 4)  # some 12,000 tokens would fit, of 20,266
    assert (large.regime, large.gemms) == (3, 3) and large.groups > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_pairs_in_one_pass_and_others_recomputed(dtype):
    # 200 tokens of 8,192 float32 logits are 6.25 MiB, 1,448 are 45 MiB
    lengths, workspace = [1448, 200, 200, 200], 24 * MIB
    mixed = plan(N, H, V, train_head=True, pair_tokens=lengths, dtype=dtype, device="cpu", workspace_bytes=workspace)
    assert (mixed.regime, mixed.recomputed_tokens) == (3, 1448)
    assert mixed.gemms == 3 + 1448 / N
    hidden, weight = (torch.randn(n, H).to(dtype).requires_grad_() for n in (N, V))
    labels, offsets = torch.randint(0, V, (N,)), torch.tensor([0, *lengths]).cumsum(0)
    loss_fn = alignloss.SFTLoss(workspace_bytes=workspace)
    peak = peak_bytes(lambda: loss_fn(hidden, weight, labels, cu_seqlens=offsets).loss.backward())
    assert peak == pytest.approx(mixed.peak_bytes, rel=0.1)
    assert mixed.workspace_bytes <= mixed.budget_bytes == workspace


@pytest.mark.parametrize(("dtype", "trained"), [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)])
def test_peak_of_many_tokens_and_a_small_head(dtype, trained):
    tokens, width, vocabulary = 16384, 256, 2048
    hidden, weight = torch.randn(tokens, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,))

    def step():
        logps = alignloss.linear_logprob(hidden.requires_grad_(trained), weight, labels)
        if trained:
            logps.sum().backward()

    expected = plan(tokens, width, vocabulary, train_hidden=trained, dtype=dtype, device="cpu")
    assert peak_bytes(step) == pytest.approx(expected.peak_bytes, rel=0.1)


def test_an_empty_pair_beside_one_that_is_too_long():
    shape = {"train_head": True, "dtype": torch.float32, "device": "cpu", "workspace_bytes": 20_000}
    assert plan(120, 8, 300, pair_tokens=[120, 0], **shape).recomputed_tokens == 120


def test_pairs_of_one_size_are_arranged_as_a_list_of_them():
    shape = {"train_head": True, "dtype": torch.bfloat16, "device": "cpu"}
    for pair, workspace in product((100, 300, 512, 600, 1000, N), (24 * MIB, 32 * MIB, 48 * MIB, 64 * MIB)):
        whole, remainder = divmod(N, pair)
        pairs = iter([pair] * whole + [remainder] * (remainder > 0))
        one = plan(N, H, V, pair_tokens=pair, workspace_bytes=workspace, **shape)
        assert one == plan(N, H, V, pair_tokens=pairs, workspace_bytes=workspace, **shape)


def test_budgets_of_gpus_follow_from_their_total_memory():
    gib = 1 << 30
    budgets = [plan(N, H, V, device_memory=size * gib).budget_bytes // MIB for size in (8, 24, 80, 192)]
    assert budgets == [64, 96, 320, 512]


@pytest.mark.parametrize(
    ("tokens", "gigabytes", "budget", "gemms"),
    [
        (8192, 80, 80 * 1024 // 29, 3),  # one group of 8,192 tokens: 2,004 MiB of exponentials, and what goes over them
        (8192, 24, 96, 4),  # a 29th is less than the fp32 gradient that groups share
        (16384, 192, 192 * 1024 // 29, 3),
    ],
)
def test_a_step_of_a_loss_takes_a_29th_of_a_gpu_where_one_pass_then_fits(tokens, gigabytes, budget, gemms):
    shape = {"train_head": True, "device_memory": gigabytes << 30}
    planned = plan(tokens, 4096, 128256, pair_tokens=1024, **shape)
    assert (planned.budget_bytes // MIB, planned.gemms) == (budget, gemms)
    assert planned.workspace_bytes <= planned.budget_bytes
    given = plan(tokens, 4096, 128256, pair_tokens=1024, workspace_bytes=512 * MIB, **shape)
    assert (given.budget_bytes, given.gemms) == (512 * MIB, 4)
    # nothing is gained by it elsewhere
    assert plan(tokens, 4096, 128256, **shape).budget_bytes == max(64, min(512, gigabytes * 4)) * MIB


def test_the_summary_says_what_runs():
    text = str(plan(8192, 4096, 128256, train_head=True, pair_tokens=2048, device_memory=24 << 30))
    assert "regime 4" in text
    assert "4 GEMMs of 8.61 TFLOP" in text
    # 8192 tokens of 128,256 logits: three times 4 bytes
    assert "full logits      12,024.0 MiB" in text
    assert "one pass needs   workspace_bytes >= " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens must be a positive integer, got 0"),
        ({"vocabulary": 2.0}, "vocabulary must be a positive integer"),
        ({"positions": 9}, "at least tokens=10; got 9"),
        ({"pair_tokens": [4, 4]}, "must sum to tokens=10, got 8"),
        ({"pair_tokens": 0}, "pair_tokens must be a positive integer, got 0"),
        ({"pair_tokens": 11}, "must be at most tokens=10; got 11"),
        ({"pair_tokens": [13, -3]}, "each of pair_tokens must be an integer, at least 0, got -3"),
        ({"pair_tokens": "10"}, "pair_tokens must be a positive integer, got '10'"),
        ({"train_head": 2}, "train_head must be True or False, got 2"),
        ({"softcap": 0}, "softcap must be a positive number, got 0"),
        ({"workspace_bytes": float("nan")}, "workspace_bytes must be a positive number, got nan"),
        ({"device_memory": 80 << 30}, "device_memory is that of a GPU"),
        ({"dtype": torch.float64, "weight_dtype": torch.float32}, "never casts from or to float64"),
        ({"workspace_bytes": 0}, "workspace_bytes must be a positive number, got 0"),
        ({"device": "mps"}, "device must be 'cpu' or 'cuda', got 'mps'"),
        ({"device": "cuda"}, "give device_memory in bytes"),
        ({"backend": "cuda"}, "backend must be"),
        ({"dtype": torch.int8}, "dtype must be"),
    ],
)
def test_bad_input_is_explained(arguments, message):
    if arguments == {"device": "cuda"} and torch.cuda.is_available():
        pytest.skip("there is a GPU whose memory can be read")
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        plan(**{"tokens": 10, "hidden_size": 8, "vocabulary": 16, "device": "cpu"} | arguments)


@pytest.mark.parametrize("vocabulary", [101, 128257])
@pytest.mark.parametrize("workspace", [1 << 18, 1 << 27, 1 << 33])
def test_slices_of_a_gpu_find_their_rows_in_its_cache_and_their_padding_fits_the_workspace(workspace, vocabulary):
    half = torch.bfloat16
    foot = Footprint(vocabulary, 64, half, half, half, False, False, "cuda", "triton")
    sizes = foot.forward_tile(8192, 0, 1, workspace), foot.backward_tile(8192, 0, 1, True, workspace)[0]
    for rows, columns, needed in (*sizes, foot.fit_tile(8192, Sizes(64, 64, 8), workspace, 4096)):
        assert columns <= SLICE
        assert foot.pitch(columns) % 64 == 0 <= foot.pitch(columns) - columns < 64
        assert rows * foot.pitch(columns) * 4 <= needed <= workspace
    assert foot.held_columns(1) <= SLICE


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_tile_fits_the_workspace_wherever_the_least_one_does(device):
    generator = torch.Generator().manual_seed(0)

    def some(low, high):
        """An integer from 10^low to 10^high, as often small as large."""
        return int(10 ** (low + (high - low) * torch.rand((), generator=generator).item()))

    for dtype, stored, softcap, direct in product(
        (torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16), *[(False, True)] * 2
    ):
        for _ in range(100):
            vocabulary, rows, workspace = some(0, 5), some(0, 4), some(3, 8)
            foot = Footprint(vocabulary, some(0, 4), dtype, dtype, stored, False, softcap, device, "torch")
            for sizes, tile in (
                (foot._forward_bytes(0, 1), foot.forward_tile(rows, 0, 1, workspace)),
                (
                    foot._backward_bytes(False, direct),
                    foot.backward_tile(rows, 0, 1, direct, workspace, rounded=False)[0],
                ),
            ):
                least, columns = min(rows, 16), min(vocabulary, foot.pitch(16))
                needed = least * (sizes.row + foot.pitch(columns) * sizes.cell) + columns * sizes.column
                assert tile.bytes <= max(workspace, needed)
