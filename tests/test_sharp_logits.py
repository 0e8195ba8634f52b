"""Sharp distributions in small tiles: the logits that a backward recomputes are those of the forward's sums."""

import pytest
import torch
from reference import leaf, within

import alignloss

# a GEMM with so many terms rounds differently in another shape
N, H, V = 96, 768, 700
WORKSPACES = [None, 100_000, 20_000]


def sharp(spread, dtype=torch.float32):
    hidden, ref_hidden = torch.randn(2, N, H) * spread * H**-0.5
    weight, ref_weight = torch.randn(2, V, H)
    return hidden, weight, ref_hidden, ref_weight, torch.randint(0, V, (N,)), torch.randn(N)


def kl(hidden, weight, ref_hidden, ref_weight):
    log_p, log_q = (torch.log_softmax(h @ w.T, -1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def logps(hidden, weight, labels):
    return torch.log_softmax(hidden @ weight.T, -1).gather(1, labels[:, None]).squeeze(1)


def gradients(function, tensors, dtype, upstream, trained=(0, 1)):
    leaves = [leaf(t, dtype, i in trained) for i, t in enumerate(tensors)]
    function(*leaves).backward(upstream.to(dtype))
    return [leaves[i].grad for i in trained]


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("spread", [100, 1000])
def test_the_gradient_of_a_kl_is_as_exact_as_that_of_full_logits(spread, workspace):
    *tensors, labels, upstream = sharp(spread)
    exact = gradients(kl, tensors, torch.float64, upstream)
    naive = gradients(kl, tensors, torch.float32, upstream)
    got = gradients(
        lambda *t: alignloss.linear_kl(*t, labels, workspace_bytes=workspace), tensors, torch.float32, upstream
    )
    assert within(got, naive, exact, beyond=1e-6)


@pytest.mark.parametrize("trained", [(1,), (0, 1)])
@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("spread", [100, 1000])
def test_the_gradient_of_a_recomputed_head_is_too(spread, workspace, trained):
    hidden, weight, *_, labels, upstream = sharp(spread)
    exact = gradients(lambda h, w: logps(h, w, labels), (hidden, weight), torch.float64, upstream, trained)
    naive = gradients(lambda h, w: logps(h, w, labels), (hidden, weight), torch.float32, upstream, trained)
    got = gradients(
        lambda h, w: alignloss.linear_logprob(h, w, labels, workspace_bytes=workspace),
        (hidden, weight), torch.float32, upstream, trained,
    )  # fmt: skip
    assert within(got, naive, exact, beyond=1e-6)


@pytest.mark.parametrize("stats", [(), ("entropy",)])
@pytest.mark.parametrize("save", [0, 1, 2])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_backward_share_a_tile(dtype, device, save, stats):
    from alignloss.backends import stat_bits
    from alignloss.ops.sizes import Footprint

    bits = stat_bits(stats, ("lse", "entropy"))
    for indexed in (False, True):
        for softcap in (False, True):
            foot = Footprint(5000, 300, dtype, dtype, dtype, indexed, softcap, device, "torch")
            for workspace in (30_000, 1_000_000, 40_000_000):
                for direct in (False, True):
                    forward = foot.forward_tile(777, bits, save, workspace, True, direct)
                    backward, _ = foot.backward_tile(777, bits, save, direct, workspace)
                    assert forward[:2] == backward[:2]


@pytest.mark.parametrize("head", ["sliced", "transposed"])
@pytest.mark.parametrize("loss", ["log-probability", "groups and a rest"])
def test_a_head_that_is_not_contiguous_is_recomputed_in_the_tiles_of_the_forward(loss, head, monkeypatch):
    from alignloss.ops.sizes import Footprint

    tiles = {"forward_tile": [], "backward_tile": []}
    for name, found in tiles.items():
        original = getattr(Footprint, name)

        def spy(self, *arguments, original=original, found=found, **options):
            result = original(self, *arguments, **options)
            found.append((arguments[0], (result if len(result) == 3 else result[0])[:2]))
            return result

        monkeypatch.setattr(Footprint, name, spy)
    vocabulary, width = 5000, 300
    weight = torch.randn(vocabulary, 2 * width)[:, :width] if head == "sliced" else torch.randn(width, vocabulary).T
    weight, hidden = weight.requires_grad_(), torch.randn(1, 900, width, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, 900))
    if loss == "log-probability":
        alignloss.linear_logprob(hidden, weight, labels, workspace_bytes=64 << 20).sum().backward()
    else:  # one sequence that fits no group, beside short ones
        offsets = torch.tensor([0, 20, 40, 900])
        alignloss.SFTLoss(workspace_bytes=16 << 20)(hidden, weight, labels, cu_seqlens=offsets).loss.backward()
    assert tiles["backward_tile"] and set(tiles["backward_tile"]) <= set(tiles["forward_tile"])
