"""Each Triton kernel against float64, on a GPU, in the interpreter (float32 and float16 there), or emulated."""

import itertools
import os

import pytest
import torch
from reference import error, inputs, leaf, logits, replace_kernels, state_of_targets

pytest.importorskip("triton")

from alignloss.kernels import blocks, exps, kl, rows, sequence, stats, sums, tile
from alignloss.kernels.state import STATE_ROWS

import alignloss
from alignloss import losses
from alignloss.backends import Tokens, _torch, _triton
from alignloss.backends import Transform as T
from alignloss.ops.logprob import output_dtypes

pytestmark = pytest.mark.emulated("forward", "reverse")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAPS = [None, 2.0]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# of 16 bits; the interpreter has no arithmetic in bf16
NARROW = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]


def fresh_state(rows):
    state = torch.zeros(STATE_ROWS, rows, device=DEVICE)
    state[0], state[2], state[6] = -1e30, torch.nan, -torch.inf
    return state


def expected_state(x, labels, cap):
    """The nine rows in float64, relative to the reference that the kernel chose; nothing rounded."""

    def at(reference):
        z = x if cap is None else cap * torch.tanh(x)
        rest = z.masked_fill(torch.nn.functional.one_hot(labels, x.shape[1]).bool(), -torch.inf)
        e = (rest - reference[:, None]).exp()
        ze = torch.where(e > 0, (rest - reference[:, None]) * e, 0)
        target = x.gather(1, labels[:, None]).squeeze(1)
        s = e.sum(1)
        rows = [reference, s, target, ze.sum(1), z.sum(1), e.square().sum(1), rest.amax(1), s, 0 * s]
        return torch.stack(rows)

    return at


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "N", "H", "V"),
    [(torch.float32, 17, 33, 97), (torch.float32, 1, 16, 33), *((dtype, 16, 48, 64) for dtype in NARROW)],
)
def test_statistics_gemm_and_combination(cap, with_bias, dtype, N, H, V):
    hidden, weight, bias, labels = inputs(N, hidden_size=H, vocabulary=V, masked=0.0)
    hidden, weight = hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)
    bias, labels = (bias.float().to(DEVICE) if with_bias else None), labels.to(DEVICE)
    state = state_of_targets(hidden, weight, labels, bias, 1.5)
    stats.stats_fwd(hidden, weight, bias, labels, state, 1.5, cap, True, "ieee")
    x = hidden.double() @ weight.double().T * 1.5 + (0 if bias is None else bias.double())
    for got, expected in zip(state[:7], expected_state(x, labels, cap)(state[0].double())[:7], strict=True):
        assert float((got - expected).abs().max()) <= 2e-5 * max(1.0, float(expected.abs().max()))


# operands (rows, 48) in 16 bits out of a (rows + 1, 64), and whether the copy engine reaches their blocks
LAYOUTS = {
    "contiguous": (lambda t: t[:-1, :48].contiguous(), True),
    "aligned rows of a wider tensor": (lambda t: t[1:, 8:56], True),
    "rows that begin at an odd entry": (lambda t: t[1:, 1:49], False),
    "rows of an odd length": (lambda t: t.flatten()[: (len(t) - 1) * 49].view(-1, 49)[:, :48], False),
    "one row repeated": (lambda t: t[:1, :48].expand(len(t) - 1, 48), False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", ["hidden", "weight"])
def test_statistics_of_operands_that_the_copy_engine_reaches_and_of_others(operand, layout, monkeypatch):
    N, V = 19, 130
    given = {name: torch.randn(rows + 1, 64, device=DEVICE).half() for name, rows in (("hidden", N), ("weight", V))}
    view, reached = LAYOUTS[layout]
    given = {name: (view if name == operand else LAYOUTS["contiguous"][0])(t) for name, t in given.items()}
    labels, launched = torch.arange(N, device=DEVICE), []
    state = state_of_targets(*given.values(), labels)
    for name in ("stats_fwd_kernel", "stats_copied_fwd_kernel"):
        kernel = getattr(stats, name)
        noted = type("Noted", (), {"__getitem__": lambda _, grid, n=name, k=kernel: (launched.append(n), k[grid])[1]})
        monkeypatch.setattr(stats, name, noted())
    stats.stats_fwd(*given.values(), None, labels, state, 1.0, None, False, "ieee")
    x = given["hidden"].double() @ given["weight"].double().T
    for got, expected in zip(state[:3], expected_state(x, labels, None)(state[0].double())[:3], strict=True):
        assert float((got - expected).abs().max()) <= 2e-5 * max(1.0, float(expected.abs().max()))
    reached &= blocks.architecture(torch.device(DEVICE)) in blocks.COPY_ENGINE
    assert launched == ["stats_copied_fwd_kernel" if reached else "stats_fwd_kernel"]


def exponentials(hidden, weight, labels, linear, columns, cap=None):
    """state, U, and for each slice its tile in memory of its own, with the references that it is relative to."""
    kind, size, capped = blocks.architecture(hidden.device), hidden.element_size(), cap is not None
    block_v = blocks.exponential_blocks(kind, size, capped)[1]
    state, u, tiles = state_of_targets(hidden, weight, labels, None, linear, reference=not capped), None, []
    for first in range(0, len(weight), columns):
        part = weight[first : first + columns]
        padded = -(-len(part) // blocks.PITCH) * blocks.PITCH
        out = torch.full((len(hidden), padded), torch.nan, device=DEVICE, dtype=weight.dtype)
        exps.exps_fwd(hidden, part, labels, state, u, out[:, : len(part)], first, linear, cap)
        finite = hidden.isfinite().all(1)
        assert not out[finite, : -(-len(part) // block_v) * block_v].isnan().any()
        assert not out[:, len(part) :].nan_to_num().any()
        product = out[:, : len(part)].float() @ part.float()
        u = product if u is None else u + product
        tiles.append((out[:, : len(part)].double(), state[0].double()))
    return state, u, tiles


# the interpreter has no bf16, and warns of the infinities that are repaired
WRITTEN = torch.float32 if INTERPRETED else torch.bfloat16


with_a_copy_engine = pytest.mark.skipif(
    "blocks.architecture(torch.device(DEVICE)) not in blocks.COPY_ENGINE", reason="a GPU with a copy engine"
)
overflows = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
FAR = [
    pytest.param(far, marks=pytest.mark.nightly if INTERPRETED or far < 200 else ())
    for far in ([200] if INTERPRETED else [0, 30, 60, 100, 200])
]


def far_targets(N, H, V, far, linear):
    """hidden, weight, labels in 16 bits: half of the targets lie `far` nats above the others, or below."""
    hidden, weight, _, labels = inputs(N, hidden_size=H, vocabulary=V, masked=0.0)
    hidden[:, -1], weight[:, -1] = 1, 0
    labels[::4], labels[1::4] = 5, V - 2
    weight[5], weight[V - 2] = 0, 0
    weight[5, -1], weight[V - 2, -1] = far / linear, -far / linear
    return hidden.to(DEVICE, WRITTEN), weight.to(DEVICE, WRITTEN), labels.to(DEVICE)


@with_a_copy_engine
@overflows
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize(("N", "H", "V"), [(150, 48, 337), (3, 72, 1), (37, 72, 600)])
def test_sums_by_a_gemm_that_knows_the_reference_of_a_row(N, H, V, far):
    """They are what the kernel that looks for the largest logit finds; with rows of no other logit, and of NaN."""
    linear = 1.5
    if V == 1:
        hidden, weight, labels = (t.to(DEVICE) for t in (torch.randn(N, H), torch.randn(1, H), torch.zeros(N).long()))
        hidden, weight = hidden.to(WRITTEN), weight.to(WRITTEN)
    else:
        hidden, weight, labels = far_targets(N, H, V, far, linear)
        hidden[2] = torch.nan
    begin = state_of_targets(hidden, weight, labels, None, linear)
    state, plain = begin.clone(), begin.clone()
    sums.sums_fwd(hidden, weight, labels, state, linear, None)
    stats.stats_fwd(hidden, weight, None, labels, plain, linear, None, False, "ieee")
    z = hidden.double() @ weight.double().T * linear
    target = z.gather(1, labels[:, None]).squeeze(1)
    exact = z.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    for found in (state, plain):
        lse = found[0].double() + found[1].double().log()
        assert torch.equal(lse.isnan(), exact.isnan()) and torch.equal(lse == -torch.inf, exact == -torch.inf)
        finite = exact.isfinite()
        assert not finite.any() or float((lse - exact)[finite].abs().max()) <= 3e-5
    near = (exact - target).abs() < 50
    assert torch.equal(state[0][near], state[2][near])  # and nothing of theirs was computed twice
    assert torch.equal(state[2:].nan_to_num(), begin[2:].nan_to_num())


@pytest.mark.parametrize(
    ("total", "repaired"), [(1.0, 0), (1.5e26, 0), (0.7e-26, 0), (3e26, 1), (0.0, 1), (torch.nan, 1)]
)
def test_a_sum_that_one_kernel_may_find_near_is_not_read_repaired_by_another(total, repaired):
    """The kernel that repairs adds in another order: what it repairs begins at 1e26, what is read repaired at 2e26."""
    N, tiles = 20, 3
    partials, state = torch.full((3, tiles, N), torch.nan, device=DEVICE), torch.zeros(STATE_ROWS, N, device=DEVICE)
    partials[0] = total / tiles
    if repaired:
        partials[1], partials[2] = 5.0, 1 / 3
    state[2] = 4.0
    launch = sums.settle_sums_kernel[(2,)]
    launch(state, partials, N, tiles, state.stride(0), BLOCK_N=16, BLOCK_T=64, **blocks.OPTIONS)
    m, s = (5.0, 1.0) if repaired else (4.0, total)
    torch.testing.assert_close(state[:2], torch.tensor([[m], [s]], device=DEVICE).expand(2, N))


@with_a_copy_engine
@overflows
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize(("N", "H", "V", "columns"), [(150, 48, 337, 337), (37, 72, 600, 256)])
def test_exponentials_written_by_the_gemm_whatever_the_reference_of_a_row(N, H, V, columns, far):
    """Of targets far from the others rows end near their largest logit."""
    linear = 1.5
    hidden, weight, labels = far_targets(N, H, V, far, linear)
    state, u, tiles = exponentials(hidden, weight, labels, linear, columns)
    z = hidden.double() @ weight.double().T * linear
    target = z.gather(1, labels[:, None]).squeeze(1)
    rest = z.scatter(1, labels[:, None], -torch.inf)
    off = rest.amax(1) - state[0].double()
    assert float(off.abs().max()) <= 60.1
    # those whose targets are near stay where they began
    near = (rest.amax(1) - target).abs() < 50
    assert torch.equal(state[0][near], state[2][near]) and float((state[2] - target).abs().max()) <= 1e-4
    e = (rest - state[0].double()[:, None]).exp()
    assert float((state[1] / e.sum(1) - 1).abs().max()) <= 2e-5
    rounding = torch.finfo(WRITTEN).eps
    for (got, reference), part in zip(tiles, rest.split(columns, 1), strict=True):
        expected = (part - reference[:, None]).exp()
        assert float(((got - expected).abs() - (rounding + 2e-5) * expected).max()) <= 1e-30
    kept = sum(got.sum(1) * (reference - state[0].double()).exp() for got, reference in tiles)
    assert float((state[7] / kept - 1).abs().max()) <= 2e-5
    expected = e @ weight.double()
    scale = e.sum(1) * weight.double().abs().max()
    assert float(((u.double() - expected).abs().amax(1) / scale).max()) <= rounding + 2e-5


@with_a_copy_engine
@overflows
@pytest.mark.nightly_where(lambda N, cap, **_: (N == 37) != (cap == 60))
@pytest.mark.parametrize("cap", [2.0, 60.0])
@pytest.mark.parametrize(("N", "H", "V", "columns"), [(150, 48, 337, 337), (37, 72, 600, 256), (3, 72, 1, 1)])
def test_exponentials_and_sums_under_a_softcap_are_relative_to_0(N, H, V, columns, cap):
    """Of logits that are small, near their bounds and beyond what tanh tells from 1; with a row of NaN, and of none."""
    linear = 1 / cap
    if V == 1:
        hidden, weight, labels = (t.to(DEVICE) for t in (torch.randn(N, H), torch.randn(1, H), torch.zeros(N).long()))
    else:
        hidden, weight, _, labels = inputs(N, hidden_size=H, vocabulary=V, masked=0.0)
        # the last rows and tokens: saturated, the likeliest and the least likely ones
        hidden[-9:] *= cap * torch.tensor([0.01, 1, 3, 10, 30, -1, -10, -1000, 1000]).double()[:, None]
        hidden[2] = torch.nan
    hidden, weight, labels = hidden.to(DEVICE, WRITTEN), weight.to(DEVICE, WRITTEN), labels.to(DEVICE)
    begin = state_of_targets(hidden, weight, labels, None, linear)
    state, u, tiles = exponentials(hidden, weight, labels, linear, columns, cap)
    summed = begin.clone()
    sums.sums_fwd(hidden, weight, labels, summed, linear, cap)
    x = hidden.double() @ weight.double().T * linear
    other = torch.ones_like(x, dtype=torch.bool).scatter(1, labels[:, None], False)
    e = torch.where(other, (cap * x.tanh()).exp(), 0)
    slope = torch.where(other, e * 4 / (x.exp() + (-x).exp()).square(), 0)
    # a logit errs by what fp32 makes of it, and a factor exp(z) by as much
    near = 4e-6 * (1 + cap)
    rounded = torch.finfo(WRITTEN).eps + near + 2e-6 * (hidden.double().abs() @ weight.double().abs().T) * linear
    for found in (state, summed):
        assert not found[0].any() and torch.equal(found[2:7].nan_to_num(), begin[2:7].nan_to_num())
        torch.testing.assert_close(found[1].double(), e.sum(1), rtol=near, atol=0, equal_nan=True)
    assert torch.equal(state[7].nan_to_num(), state[1].nan_to_num())
    most = rounded * slope + 1e-6 * e  # 1 - t^2 errs by units of 1
    got = torch.cat([tile for tile, _ in tiles], 1)
    assert not any(reference.any() for _, reference in tiles) and torch.equal(got.isnan(), slope.isnan())
    assert not ((got - slope).abs() > most).any()
    off = (u.double() - slope @ weight.double()).abs()
    assert not (off > (most @ weight.double().abs())).any()


def set_precision(switch, value):
    """Set a switch of torch for float32 products; of "matmul", "cuda" and "all", the first that is set decides."""
    if switch == "legacy flag":
        torch.backends.cuda.matmul.allow_tf32 = value == "tf32"
    elif switch == "legacy function":
        torch.set_float32_matmul_precision({"ieee": "highest", "tf32": "high", "bf16": "medium"}[value])
    elif switch == "cuda":
        torch._C._set_fp32_precision_setter("cuda", "all", value)
    else:
        (torch.backends.cuda.matmul if switch == "matmul" else torch.backends).fp32_precision = value


SWITCHES = [
    *itertools.product(("matmul", "cuda"), ("tf32", "ieee", "none")),
    *itertools.product(("all",), ("tf32", "ieee", "none", "bf16")),
    *itertools.product(("legacy flag",), ("tf32", "ieee")),
    *itertools.product(("legacy function",), ("tf32", "ieee", "bf16")),
]


@pytest.fixture
def _precision_as_it_was():
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has the legacy switches alone")
    yield
    set_precision("legacy function", "ieee")
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    for switch in ("matmul", "cuda", "all"):
        set_precision(switch, "none")


@pytest.mark.usefixtures("_precision_as_it_was")
@pytest.mark.parametrize("first", SWITCHES, ids=" ".join)
def test_float32_products_are_as_exact_as_those_of_torch_however_it_was_told(first, monkeypatch):
    asked = []
    monkeypatch.setattr(stats, "stats_fwd", lambda *arguments: asked.append(arguments[-1]))
    hidden, weight, _, labels = (t.to(DEVICE) for t in inputs(3, dtype=torch.float32))
    for then in SWITCHES:
        own = dict.fromkeys(("matmul", "cuda", "all"), "none")
        for switch in own:
            set_precision(switch, "none")
        for switch, value in (first, then):
            set_precision(switch, value)
            # a legacy switch sets the one of cuBLAS, and its third level is TF32 on a GPU
            legacy = switch.startswith("legacy")
            own["matmul" if legacy else switch] = "tf32" if legacy and value == "bf16" else value
        _triton.statistics(hidden, weight, None, labels, fresh_state(3), T(1.0, None, 1.0), 0, 1 << 20)
        decides = next((value for value in own.values() if value != "none"), "none")
        assert asked.pop() == ("tf32" if decides == "tf32" else "ieee"), then


def several_blocks(monkeypatch):
    """Let two tiles' rows take several blocks, and every row several warps, which have to wait for each other."""
    for module, name, value in ((tile, "TILE_ENTRIES", 32), (kl, "KL_BLOCK", 64), (kl, "KL_WARPS", 2)):
        monkeypatch.setattr(module, name, value)


class Folded:
    """A row of tiles folded slice by slice, and what a walk sums of what is left in them."""

    def __init__(self, cap, save, dtype, extras=True):
        N, H, V = 5, 33, 300
        self.x = torch.randn(N, V, dtype=torch.float64, device=DEVICE) * 3
        self.x[:2, 160:] += 60  # the reference has to move
        self.labels = torch.tensor([0, 200, 299, 149, 150], device=DEVICE)
        self.weight = torch.randn(V, H, dtype=torch.float64, device=DEVICE)
        self.state, self.cap = fresh_state(N), cap
        self.u, self.u2 = torch.zeros(2, N, H, device=DEVICE)
        self.rounded = torch.zeros(2, N, dtype=torch.float64, device=DEVICE)  # sums of what is left
        for first, last in ((0, 150), (150, 300)):
            part = self.x[:, first:last].float().contiguous()
            spare = torch.empty_like(part) if save == 2 else None
            sums = (self.u if save else None, self.u2 if save > 1 else None)
            old, old_centre = self.state[0].double(), self.centre()
            e, ze = tile.fold_fwd(part, None, spare, self.state, self.labels, *sums, first, cap, save, extras, dtype)
            shift = old - self.state[0].double()
            self.rounded[1] += self.rounded[0] * (shift + old_centre - self.centre())
            self.rounded = self.rounded * shift.exp()
            self.rounded += torch.stack([t.double().sum(1) if t is not None else 0 * shift for t in (e, ze)])
            for total, left in ((self.u, e), (self.u2, ze))[:save]:
                total += left.float() @ self.weight[first:last].float()

    def centre(self):
        """The mean of z - m over v != y so far."""
        return torch.where(self.state[1] == 0, 0, self.state[3].double() / self.state[1].double())

    def exponentials(self):
        """z and exp(z - m) dz/dx without the target, exactly."""
        z = self.x if self.cap is None else self.cap * torch.tanh(self.x)
        slope = torch.ones_like(self.x) if self.cap is None else 1 - torch.tanh(self.x) ** 2
        e = (z - self.state[0, :, None].double()).exp().scatter(1, self.labels[:, None], 0)
        return z, e * slope


FOLDED = {torch.float32: 2e-5} | {dtype: {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype] for dtype in NARROW}


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("save", [0, 1, 2])
@pytest.mark.parametrize("dtype", FOLDED)
@pytest.mark.parametrize("extras", [True, False])
def test_fold_over_slices(extras, cap, save, dtype, monkeypatch):
    several_blocks(monkeypatch)
    fold = Folded(cap, save, dtype, extras or save == 2)
    expected = expected_state(fold.x, fold.labels, cap)(fold.state[0].double())
    if cap is None:
        expected[7] = fold.rounded[0]
    if cap is None and save == 2:
        scale = 20 * float(fold.rounded[0].norm())
        assert float((fold.state[8] - fold.rounded[1]).norm()) <= 2e-5 * scale
    for row, (got, value) in enumerate(zip(fold.state[:8], expected, strict=False)):
        taken = row in (0, 1, 2, 6) or (save if row == 7 else extras or save == 2)
        assert error(got, value if taken else torch.zeros_like(value)) <= 2e-5
    if extras:
        assert torch.equal(fold.state[0], fold.state[6])


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("save", [1, 2])
@pytest.mark.parametrize("dtype", FOLDED)
def test_what_a_fold_leaves_for_the_derivative_of_log_p(cap, save, dtype, monkeypatch):
    several_blocks(monkeypatch)
    fold = Folded(cap, save, dtype)
    _, e = fold.exponentials()
    assert error(fold.u, e @ fold.weight) <= FOLDED[dtype]


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("dtype", FOLDED)
def test_what_a_fold_leaves_for_the_derivative_of_the_entropy(cap, dtype, monkeypatch):
    several_blocks(monkeypatch)
    fold = Folded(cap, 2, dtype)
    z, e = fold.exponentials()
    centred = z - fold.state[0, :, None] - fold.centre()[:, None]
    assert error(fold.u2, (e * centred) @ fold.weight) <= 2 * FOLDED[dtype]


def padded(values, padding=torch.nan):
    """Values (N, V) as a tile of a GPU is stored, with NaN in the padding and beyond the last row."""
    rows, columns = values.shape
    pitch = -(-columns // blocks.PITCH) * blocks.PITCH
    memory = torch.full((rows * pitch + 64,), padding, dtype=values.dtype)
    tile = memory[: rows * pitch].view(rows, pitch)[:, :columns]
    tile.copy_(values)
    return tile, memory[rows * pitch :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("V", [150, 64, 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_padded_rows_are_the_same_as_dense_ones(with_bias, V, dtype, monkeypatch):
    several_blocks(monkeypatch)
    N, first = 3, 50
    x, x_ref = torch.randn(2, N, V)
    bias = torch.randn(V) if with_bias else None
    labels = torch.tensor([first, first + V - 1, first + V])  # the last one is in the padding, or beyond
    state, kl_state = fresh_state(N), torch.zeros(5, N)
    kl_state[[0, 2]] = -1e30

    def run(of):
        sums, tops = state.clone(), kl_state.clone()
        tiles = [of(t) for t in (x, x, x, x, x, x_ref, x, x_ref)]
        (a, _), (spare, _), (b, _), (c, _), *kl_tiles = tiles
        results = [*tile.fold_fwd(a, bias, spare, sums, labels, None, None, first, 2.0, 2, True, dtype), sums.clone()]
        results.append(tile.dlogits_bwd(b, bias, sums, labels, torch.ones(N), None, first, 2.0, dtype))
        held, _ = of(c.to(dtype))
        tile.held_bwd(held, torch.zeros(N), sums, labels, torch.ones(N), first, None)
        (p, _), (q, _), (p2, _), (q2, _) = kl_tiles
        kl.kl_fwd(p, q, bias, bias, tops, 2.0)
        results += [held, tops.clone(), kl.kl_bwd(p2, q2, bias, bias, tops.abs(), torch.ones(N), 2.0, 1.0, dtype)]
        assert all(beyond.isnan().all() for _, beyond in tiles)
        return results

    dense = run(lambda values: (values.clone(), torch.full((1,), torch.nan)))
    for got, expected in zip(run(padded), dense, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.nightly_where(lambda special, **_: INTERPRETED and special is None)  # emulated by day
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize(("with_bias", "with_ref_bias"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("special", [None, -torch.inf, torch.inf, torch.nan])
def test_a_bias_added_by_a_kernel_is_one_added_before(special, with_bias, with_ref_bias, cap, monkeypatch):
    several_blocks(monkeypatch)
    N, V, first = 4, 150, 50
    x, x_ref = torch.randn(2, N, V)
    biases = torch.randn(2, V) * 5
    if special is not None:
        biases[:, 3] = biases[:, 149] = special
    labels = torch.tensor([first, first + 3, first + 149, 0])  # the last one is in another slice
    given = [bias if use else None for bias, use in zip(biases, (with_bias, with_ref_bias), strict=True)]

    def run(x, x_ref, bias, ref_bias):
        sums, tops, used = fresh_state(N), torch.zeros(5, N), torch.ones(N)
        tops[[0, 2]] = -1e30
        mix = torch.tensor([0.5, -0.3, 0.2])[:, None].expand(3, N).contiguous()

        def tiles(count):
            return [t.clone() for t in (x, x_ref, x, x)][:count]

        results = []
        for save in (0, 1, 2):
            t, _, spare = tiles(3)
            spare = spare if save == 2 else None
            out = tile.fold_fwd(t, bias, spare, sums, labels, None, None, first, cap, save, True, torch.float32)
            results += [*(t for t in out if save and t is not None), sums.clone()]
        for m in (None, mix):
            results.append(tile.dlogits_bwd(*tiles(1), bias, sums, labels, used, m, first, cap, torch.float16))
        kl.kl_fwd(*tiles(2), bias, ref_bias, tops, cap)
        results += [tops.clone(), kl.kl_bwd(*tiles(2), bias, ref_bias, tops, used, cap, 1.0, torch.float32)]
        return results

    got = run(x, x_ref, *given)
    expected = run(*(t if b is None else t + b for t, b in zip((x, x_ref), given, strict=True)), None, None)
    for value, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_bias_is_not_read_beyond_its_slice(monkeypatch):
    several_blocks(monkeypatch)
    N, V = 3, 70
    beyond = torch.full((128,), torch.nan)
    bias = beyond[:V].normal_()
    labels, used, sums, tops = torch.arange(N), torch.ones(N), fresh_state(N), torch.zeros(5, N)
    tops[[0, 2]] = -1e30

    def tiles(count):
        return [padded(torch.randn(N, V), padding=0.0)[0] for _ in range(count)]

    (a, spare), (b,), (p, q), (p2, q2) = map(tiles, (2, 1, 2, 2))
    tile.fold_fwd(a, bias, spare, sums, labels, None, None, 0, None, 2, True, torch.float32)
    tile.dlogits_bwd(b, bias, sums, labels, used, None, 0, None, torch.float32)
    kl.kl_fwd(p, q, bias, bias, tops, None)
    kl.kl_bwd(p2, q2, bias, bias, tops, used, None, 1.0, torch.float32)
    assert not sums.isnan().any() and not tops.isnan().any()
    for written in (a, spare, b, p2):
        # the padding of the rows, which is read and written too
        assert not written.as_strided((N, 128), (128, 1)).isnan().any()


@pytest.mark.parametrize("cap", CAPS)
def test_a_backward_adds_the_bias_as_the_forward_did_to_the_last_bit(cap, monkeypatch):
    several_blocks(monkeypatch)
    N, V = 3, 150
    x, bias = torch.randn(N, V) * 3, torch.randn(V) * 30
    labels, sums = torch.full((N,), V), fresh_state(N)  # in another slice
    e, _ = tile.fold_fwd(x.clone(), bias, None, sums, labels, None, None, 0, cap, 1, False, torch.float32)
    sums[1] = 1
    dz = tile.dlogits_bwd(x.clone(), bias, sums, labels, torch.ones(N), None, 0, cap, torch.float32)
    assert torch.equal(dz, -e)


@pytest.mark.parametrize("label", [-(2**63), -(2**31) - 1, -100, 2**31 + 3, 2**32 + 3, 2**63 - 1])
def test_a_label_outside_the_vocabulary_is_in_no_tile_however_far(label):
    x, state = torch.randn(1, 40), fresh_state(1)
    label = torch.tensor([label])
    out, _ = tile.fold_fwd(x.clone(), None, None, state, label, None, None, 0, None, 1, False, torch.float32)
    assert bool(state[2].isnan()) and float(out.min()) > 0
    z = x.double() - state[0].double()
    torch.testing.assert_close(state[1].double(), z.exp().sum(1), rtol=1e-6, atol=0)
    d = tile.dlogits_bwd(x.clone(), None, state, label, torch.ones(1), None, 0, None, torch.float32)
    assert float(d.max()) < 0


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dlogits_against_autograd(cap, entropy, dtype, monkeypatch):
    several_blocks(monkeypatch)
    N, V = 5, 300
    x = leaf(torch.randn(N, V) * 2)
    labels = torch.tensor([0, 200, 299, 149, 150])
    a, b = (torch.randn(N, dtype=torch.float64) for _ in range(2)) if entropy else (torch.ones(N).double(), None)
    z = x if cap is None else cap * torch.tanh(x)
    logps = z.log_softmax(1)
    value = (a * logps.gather(1, labels[:, None]).squeeze(1)).sum()
    if b is not None:
        value = value + (b * torch.special.entr(logps.exp()).sum(1)).sum()
    value.backward()
    rest = 1 - logps.detach().exp().gather(1, labels[:, None])
    state = expected_state(x.detach(), labels, cap)(z.detach().amax(1)).float()
    mix = None
    if b is not None:
        tokens = Tokens(None, labels, None, -100, torch.float32)
        mix, coefficient = torch.empty(3, N), torch.empty(N)
        upstream = a.float(), b.float()
        _torch.weigh(
            tokens, slice(0, N), tokens.labels, state, T(1.0, cap, 1.0), *upstream, coefficient, mix, *(None,) * 6
        )
        rest = (a.abs() + b.abs())[:, None] * rest
    used = torch.ones(N, device=DEVICE)
    used[3] = 0
    values = x.detach().float()
    values[3] = torch.nan  # a row without a gradient, whatever is in it
    first_half, second_half = (
        tile.dlogits_bwd(values[:, s].contiguous(), None, state, labels, used, mix, s.start, cap, dtype)
        for s in (slice(0, 150), slice(150, 300))
    )
    got = torch.cat([first_half, second_half], 1).double() * rest * (cap or 1.0)  # dz / dx = cap sech^2(x)
    x.grad[3] = 0
    assert error(got, x.grad) <= (2e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("indexed", [False, True])
def test_rows_equal_the_specification(indexed, dtype):
    """Gathering, results per token, derivatives and weighing, beside `_torch` in float64."""
    M, H, V, cap = 9, 33, 50, 2.0
    hidden, weight, _, labels = (t.to(DEVICE) for t in inputs(M, hidden_size=H, vocabulary=V, masked=0.0))
    labels[[1, 4]] = torch.tensor([-100, 1000], device=DEVICE)  # ignored, and outside the vocabulary
    index = torch.tensor([8, 1, 0, 4, 5, 2], device=DEVICE) if indexed else None
    N, transform = 6 if indexed else M, T(1.3, cap, 0.7)
    part = slice(2, N)
    C = N - 2
    z = torch.randn(N, V, dtype=torch.float64, device=DEVICE) * 3
    z[2] += 400 * torch.nn.functional.one_hot(torch.tensor(3), V).to(DEVICE)
    wanted = labels if index is None else labels[index]
    sums = expected_state(z, wanted.clamp(0, V - 1), None)(z.amax(1))
    sums[2, wanted == 1000] = torch.nan
    upstream = [torch.randn(M, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    u = torch.randn(2, N, H, dtype=torch.float64, device=DEVICE)
    results = []
    for backend, wide, narrow in ((_torch, torch.float64, torch.float64), (_triton, torch.float32, dtype)):
        tokens = Tokens(hidden.to(narrow), labels, index, -100, narrow)
        state = sums.to(wide)
        picked = torch.zeros(C, dtype=torch.int64, device=DEVICE) if indexed else labels[part].clone()
        block = torch.empty(C, H, dtype=narrow, device=DEVICE)
        begun = torch.empty(STATE_ROWS, C, dtype=wide, device=DEVICE)
        backend.gather(tokens, part, picked, block, begun)
        outputs = [torch.zeros(M, dtype=kind, device=DEVICE) for kind in output_dtypes(wide)]
        derivatives = [torch.empty(C, H, dtype=narrow, device=DEVICE) for _ in range(2)]
        accumulated = u[:, part].to(wide).contiguous()
        head = weight.to(narrow)
        backend.finish(tokens, part, picked, state[:, part], *accumulated, head, transform, outputs, *derivatives)
        coefficient, mix = torch.empty(C, dtype=wide, device=DEVICE), torch.empty(3, C, dtype=wide, device=DEVICE)
        dhidden, again, scaled = torch.zeros_like(tokens.hidden), torch.empty_like(block), torch.empty_like(block)
        unit = torch.tensor(2.0, dtype=wide, device=DEVICE)
        backend.weigh(
            tokens, part, picked, state[:, part], transform, *(g.to(wide) for g in upstream), coefficient, mix, unit,
            *derivatives, dhidden, again, scaled,
        )  # fmt: skip
        results.append((picked, block, begun, *outputs, *derivatives, coefficient, mix, dhidden, again, scaled))
    for value, exact in zip(results[1], results[0], strict=True):
        assert torch.equal(value.isnan(), exact.isnan())
        assert error(value.double().nan_to_num(), exact.double().nan_to_num()) <= (
            2e-5 if dtype == torch.float32 else 2e-3
        )


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scaling_in_place_and_not_by_one(dtype, factor, monkeypatch):
    monkeypatch.setattr(rows, "SCALE_PROGRAMS", 2)  # which take several blocks each
    gradient = torch.randn(7, 701, device=DEVICE).to(dtype)
    expected = (gradient.float() * factor).to(dtype)
    rows.scale_bwd(gradient, torch.tensor(factor, device=DEVICE))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("factor", [1.0, -0.3, 0.0])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_times_their_coefficients(dtype, indexed, factor):
    values = torch.randn(4, 1030).to(dtype)
    coefficient = torch.tensor([2.0, 0.0, float("nan"), -0.5])
    values[1] = float("nan")  # of a row without a gradient
    index = torch.tensor([5, 9, 0, 9, 3, 9, 2, 9])[::2] if indexed else None  # not contiguous
    by = [2 * factor, 0.0, float("nan") if factor else 0.0, -0.5 * factor]
    expected = torch.zeros(6 if indexed else 4, 1030)
    for n, b in enumerate(by):
        expected[n if index is None else index[n]] = values[n].float() * b if b else 0.0
    for backend in (_torch, _triton):
        out = torch.zeros(expected.shape, dtype=dtype, device=DEVICE)
        backend.scale_rows(values, coefficient, torch.tensor(factor), index, out)
        assert torch.equal(out.nan_to_num(7.0), expected.to(dtype).nan_to_num(7.0))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_sequence_sums_and_their_adjoint(packed, weighted):
    values = torch.randn(2500)
    weights = torch.rand(2500, dtype=torch.float64) if weighted else None
    # packed: an empty sequence, a long one, a token of none
    bounds = (
        [(0, 1), (1, 1), (1, 1300), (1300, 2499)] if packed else [(0, 625), (625, 1250), (1250, 1875), (1875, 2500)]
    )
    offsets = torch.tensor([0, *(stop for _, stop in bounds)]) if packed else None
    factors = torch.ones(2500, dtype=torch.float64) if weights is None else weights
    expected = torch.stack([(values.double() * factors)[i:j].sum() for i, j in bounds])
    for backend in (_torch, _triton):
        torch.testing.assert_close(backend.sequence_sum(values, offsets, 4, weights), expected)
    dsums = torch.tensor([1.0, 5.0, -2.0, 3.0], dtype=torch.float64)
    spread = torch.zeros(2500, dtype=torch.float64)
    for (i, j), g in zip(bounds, dsums.tolist(), strict=True):
        spread[i:j] = g
    for backend in (_torch, _triton):
        got = backend.sequence_scatter(dsums, offsets, weights, 2500)
        torch.testing.assert_close(got, spread * factors)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "cpo"])
def test_fused_losses_equal_the_plain_ones(loss, scale):
    B, lengths = 3, torch.tensor([5, 0, 7, 3, 4, 6])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    tokens = int(lengths.sum())
    values = torch.randn(tokens) * scale
    labels = torch.randint(0, 9, (tokens,))
    nll_labels = labels.clone()
    labels[torch.rand(tokens) < 0.3] = -100
    ref = torch.randn(6, dtype=torch.float64) * scale
    desirable, kl = torch.arange(6) % 2 == 0, torch.linspace(-1, 1, 6, dtype=torch.float64)
    pairwise = torch.tensor([1.0, 0.0, 0.5] * (2 if loss == "kto" else 1), dtype=torch.float64)
    options = {"beta": 0.3, "label_smoothing": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    *got, slopes, scales = sequence.preference_fwd(
        values, None, labels, nll_labels, offsets, 6, ref, desirable, kl, pairwise, None, None,
        loss, -100, 0.4, *options.values(),
    )  # fmt: skip
    exact = leaf(values)
    sums = _torch.sequence_sum(exact.masked_fill(labels == -100, 0), offsets, 6, None)
    c, r, rc, rr = sums[:B], sums[B:], ref[:B], ref[B:]
    counts = torch.stack([(labels[i:j] != -100).sum() for i, j in itertools.pairwise(offsets.tolist())]).clamp(min=1)
    losses_, *rewards = {
        "dpo": lambda: losses.dpo_loss(c, r, rc, rr, beta=0.3, label_smoothing=0.1),
        "ipo": lambda: losses.ipo_loss(c, r, rc, rr, counts[:B], counts[B:], beta=0.3),
        "kto": lambda: losses.kto_loss(
            sums, ref, desirable, kl, beta=0.3, desirable_weight=1.3, undesirable_weight=0.7
        ),
        "cpo": lambda: losses.cpo_loss(c, r, beta=0.3, label_smoothing=0.1),
    }[loss]()
    nll_loss = -exact[: offsets[B]].mean()
    total = (losses_ * pairwise).sum() / len(losses_)
    expected = [total, losses_, sums, torch.cat(rewards)]
    if loss != "kto":
        expected[0] = total = total + 0.4 * nll_loss
        expected.append(nll_loss)
    for value, e in zip(got, expected, strict=False):
        torch.testing.assert_close(value, e.detach().float(), rtol=1e-6, atol=1e-30)
    (2 * total).backward()
    dvalues = sequence.preference_bwd(
        torch.tensor(2.0), slopes, scales, None, labels, nll_labels, offsets, loss != "kto", -100
    )
    torch.testing.assert_close(dvalues, exact.grad, rtol=1e-6, atol=1e-30)


def test_the_backend_reaches_every_kernel(monkeypatch):
    launched = set()
    replace_kernels(monkeypatch, lambda module, name, kernel: Recorder(kernel, name, launched))
    hidden, weight, _, labels = (t.to(DEVICE) for t in inputs(4, 6, dtype=torch.float32))
    h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
    alignloss.CPOLoss(backend="triton")(h, w, labels).loss.backward()
    logps = alignloss.sequence_logprob(h, w, labels, backend="triton").logps
    logps.sum().backward()
    alignloss.SFTLoss(backend="triton")(h, w, labels).loss.backward()  # in one pass
    alignloss.linear_kl(h, w, hidden, weight, labels, backend="triton").sum().backward()
    logps = alignloss.sequence_logprob(hidden, weight, labels, backend="triton").logps
    assert (
        error(
            logps.cpu(),
            logits(hidden, weight)
            .log_softmax(-1)
            .gather(-1, labels.clamp(min=0)[..., None])
            .squeeze(-1)
            .masked_fill(labels == -100, 0)
            .sum(1)
            .cpu(),
        )
        < 1e-5
    )
    assert launched == {
        "gather_fwd_kernel",
        "finish_fwd_kernel",
        "rows_bwd_kernel",
        "stats_fwd_kernel",
        "combine_fwd_kernel",
        "fold_fwd_kernel",
        "dlogits_bwd_kernel",
        "held_bwd_kernel",
        "kl_bwd_kernel",
        "kl_fwd_kernel",
        "sequence_fwd_kernel",
        "sequence_bwd_kernel",
        "preference_fwd_kernel",
        "preference_reduce_fwd_kernel",
        "preference_bwd_kernel",
        "scale_bwd_kernel",
        "scale_rows_bwd_kernel",
    }


class Recorder:
    def __init__(self, kernel, name, launched):
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.add(self.name)
        return self.kernel[grid]
