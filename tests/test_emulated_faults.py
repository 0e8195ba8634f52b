"""With `--emulate`: a fault in a compiled kernel of ours is found. Each is planted in the PTX of its own launch."""

import itertools
import re

import pytest
import torch

pytest.importorskip("triton")

import emulator
import triton
import triton.language as tl
from alignloss.kernels import blocks, exps, kl, stats, sums, tile
from alignloss.kernels.state import STATE_ROWS
from emulator.driver import gpu
from emulator.text import PTXError
from reference import as_on_a_gpu, inputs, leaf, replace_kernels, state_of_targets
from triton.tools.tensor_descriptor import TensorDescriptor

import alignloss

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emulator.emulated is None, reason="needs --emulate"),
]
KERNELS = (
    "gather_fwd", "finish_fwd", "rows_bwd", "scale_rows_bwd", "scale_bwd", "stats_fwd", "combine_fwd", "fold_fwd",
    "dlogits_bwd", "held_bwd", "kl_fwd", "kl_bwd", "sequence_fwd", "sequence_bwd", "preference_fwd",
    "preference_reduce_fwd", "preference_bwd", "settle_fwd", "stats_copied_fwd", "exps_fwd", "repair_fwd", "sums_fwd",
    "repair_sums", "settle_sums",
)  # fmt: skip
GEMMS = ("stats", "exps", "repair", "sums")


class Recorded:
    """A kernel that keeps one launch of each kind: of types and constants."""

    def __init__(self, kernel, name, launches):
        self.kernel, self.name, self.launches = kernel, name.removesuffix("_kernel"), launches

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            kinds = [getattr(a, "dtype", type(a)) for a in arguments]
            key = self.name, str(kinds), str(sorted(constants.items(), key=str))
            self.launches.setdefault(key, (self.kernel, grid, copied(arguments), constants))
            self.kernel[grid](*arguments, **constants)

        return launch


def copied(arguments):
    """The same tensors elsewhere; what shares memory does so again."""
    storages = {}

    def copy(value):
        if isinstance(value, TensorDescriptor):
            return TensorDescriptor(copy(value.base), value.shape, value.strides, value.block_shape)
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()
        made = torch.empty(0, dtype=value.dtype)
        return made.set_(storages[storage.data_ptr()], value.storage_offset(), value.shape, value.stride())

    return [copy(value) for value in arguments]


@pytest.fixture(scope="module")
def launches():
    """Of every kernel, with several rounds of each loop and several warps a row, by kernel, types and constants."""
    found = {}

    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (tile, "TILE_ENTRIES", 32), (kl, "KL_BLOCK", 64), (kl, "KL_WARPS", 2), (stats, "COMBINE_BLOCK_T", 2),
            (exps, "COMBINE_BLOCK_T", 2), (exps, "multiprocessors", lambda device: 1),
            (sums, "COMBINE_BLOCK_T", 2), (sums, "multiprocessors", lambda device: 1),
        ):  # fmt: skip
            patch.setattr(module, name, value)
        as_on_a_gpu(patch)
        replace_kernels(patch, lambda module, name, kernel: Recorded(kernel, name, found))
        torch.manual_seed(0)
        for dtype, softcap in itertools.product((torch.bfloat16, torch.float32), (None, 2.0)):
            # rows of several warps with labels: what they write over zeros of the last copies, which fill with zeros,
            # must not be zero again
            hidden, weight, bias, labels = inputs(2, 40, vocabulary=600, hidden_size=200, dtype=dtype)
            h, w, b = (leaf(t, dtype) for t in (hidden, weight, bias))
            options = {"softcap": softcap, "backend": "triton"}
            alignloss.sequence_logprob(hidden, weight, labels, bias, **options)
            alignloss.CPOLoss(**options)(h, w, labels, b).loss.backward()
            alignloss.sequence_logprob(h, w, labels, b, **options).logps.sum().backward()
            names = ("entropy", "is_top1", "lse")
            small = options | {"workspace_bytes": 30_000}
            alignloss.linear_logprob_stats(h, w, labels, b, stats=names, **small).entropy.sum().backward()
            alignloss.linear_kl(h, w, hidden, weight, labels, **options).sum().backward()
            if dtype == torch.float32:
                state, index = torch.zeros(STATE_ROWS, 80), torch.zeros(80, dtype=torch.int64)
                stats.stats_fwd(hidden.view(80, -1), weight, None, index, state, 1.0, softcap, False, "tf32")
        if emulator.emulated in blocks.COPY_ENGINE:
            write_exponentials()
    return found


def write_exponentials():
    """Of two slices of three tiles, with rows whose references are moved in each and sums that follow them."""
    hidden, weight, _, labels = inputs(80, vocabulary=1040, hidden_size=200, masked=0.0, dtype=torch.bfloat16)
    hidden[:, -1] = 1
    labels[::2] = 7
    weight[7], weight[900] = 0, 0
    weight[7, -1], weight[900, -1] = -100, 100
    for cap in (None, 30.0):
        state = state_of_targets(hidden, weight, labels, reference=cap is None)
        sums.sums_fwd(hidden, weight, labels, state.clone(), 1.0, cap)
        for first, u in ((0, None), (520, torch.randn(80, 200))):
            out = torch.empty(80, 576, dtype=torch.bfloat16)[:, :520]
            exps.exps_fwd(hidden, weight[first : first + 520], labels, state, u, out, first, 1.0, cap)


def run(launch, change=lambda ptx: ptx):
    """Whether a launch of the changed PTX is refused or leaves a finding; and the launch."""
    kernel, grid, arguments, constants = launch
    gpu.change = change
    try:
        kernel[grid](*copied(arguments), **constants)
        return bool(gpu.findings), gpu.launches[kernel.__name__]
    except PTXError:
        return True, gpu.launches.get(kernel.__name__)
    finally:
        gpu.change = None
        gpu.clear()


def planted(launch, pattern, replacement):
    """For each place that a launch reaches and that matches: its line, whether a fault is found, and the launch."""
    found, whole = run(launch)
    assert not found
    lines = whole.program.text.ptx.split("\n")
    for number in sorted(whole.reached):
        text, count = re.subn(pattern, replacement, lines[number - 1])
        if count:
            changed = "\n".join([*lines[: number - 1], text, *lines[number:]])
            yield number, run(launch, lambda ptx, changed=changed: changed)[0], whole


def around(whole, number):
    """The instructions that the warps execute between a barrier and the one before it, and the one after it."""
    before, after, sides, at_barrier = set(), set(), [set()], []
    for place in whole.path:
        for instruction in whole.program.text.blocks[place]:
            if instruction.opcode.startswith("bar"):
                at_barrier.append(instruction.line)
                sides.append(set())
            else:
                sides[-1].add(instruction.opcode)
    for place, line in enumerate(at_barrier):
        if line == number:
            before |= sides[place]
            after |= sides[place + 1]
    return before, after


# before and after a barrier that is needed. A copy is written when it is waited for, and the kernels of the statistics
# write no tensor that they read
READ, WRITTEN = r"ld\.shared|ldmatrix|wgmma\.mma", r"st\.shared|stmatrix"
ORDERED = (
    (rf"{WRITTEN}|cp\.async\.wait", rf"{READ}|{WRITTEN}"),
    (READ, rf"{WRITTEN}|cp\.async\.c[ag]"),
    (r"wgmma\.wait", r"cp\.async\.bulk"),  # by an engine, over what warps have read
    (WRITTEN, r"cp\.async\.bulk\.tensor\.2d\.global"),  # which an engine reads
    (r"cp\.async\.bulk\.wait", WRITTEN),
    (r"st\.global", r"[ls][dt]\.global"),
    (r"ld\.global", r"st\.global"),
)


def may_be_spare(whole, number):
    """Whether what stands on the two sides of a barrier need not be ordered.

    Around what one elected thread asks of an engine Triton puts several barriers, of which one suffices.
    """

    def has(side, pattern):
        return any(re.match(pattern, opcode) for opcode in side)

    before, after = around(whole, number)
    ordered = ORDERED[:5] if whole.program.text.name.startswith(GEMMS) else ORDERED
    return not any(has(before, first) and has(after, then) for first, then in ordered)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly if name.startswith(GEMMS) else ()) for name in KERNELS]
)
def test_a_barrier_that_is_missing(name, launches):
    barriers = spare = 0
    for key, launch in launches.items():
        if key[0] == name:
            for number, found, whole in planted(launch, r"bar\.sync", "// bar.sync"):
                barriers += 1
                assert found or may_be_spare(whole, number), f"{key}, line {number}"
                spare += not found
    print(f"{name}: {barriers} barriers, {spare} spare")
    if name.startswith(("fold", "kl", "gather", "stats_fwd", "sequence_fwd", "preference_reduce")):
        assert barriers > 2 * spare


# what is planted, and on which GPUs there is a place for it
EVERY = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
WAITS = {
    "copies": (EVERY, r"cp\.async\.wait_group\s+(?:0x)?(\d+)", lambda m: f"cp.async.wait_group {int(m[1]) + 1}"),
    "products": (
        ("sm_90",), r"(wgmma\.wait_group\.sync\.aligned) (\d+)", lambda m: f"{m[1]} {int(m[2]) + 1}",
    ),
    "an mbarrier": (("sm_90", "sm_100"), r"mbarrier\.try_wait\S+\s+(\S+),.*", lambda m: f"mov.pred {m[1]}, -1;"),
    "a signal of an engine": (("sm_100",), r"@\S+ tcgen05\.commit.*", ""),
    "what threads have written": (("sm_90", "sm_100"), r"fence\.proxy\.async.*", ""),
    "what an engine reads": (
        ("sm_90", "sm_100"),
        r"(cp\.async\.bulk\.wait_group(?:\.read)?)\s+(\d+)", lambda m: f"{m[1]} {int(m[2]) + 1}",
    ),
}  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_that_is_too_weak(wait, launches):
    architectures, pattern, replacement = WAITS[wait]
    places = 0
    for key, launch in launches.items():
        if key[0].startswith(GEMMS):
            for number, found, _ in planted(launch, pattern, replacement):
                places += 1
                assert found, f"{key}, line {number}"
    print(f"{wait}: {places} places")
    assert bool(places) == (emulator.emulated in architectures)


@triton.jit
def doubled_kernel(x, out, n, seen, stride, BLOCK: tl.constexpr):
    row, v = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(out + row * stride + v, 2 * tl.load(x + row * 100 + v, mask=v < seen), mask=v < n)


@pytest.mark.parametrize(
    ("n", "seen", "stride", "message"),
    [
        (100, 100, 100, None),
        (100, 101, 100, "outside of every tensor"),
        (101, 100, 100, "outside of every tensor"),
        (100, 100, 101, "outside of every tensor"),
        (100, 100, 99, "write two values"),
    ],
)
def test_a_mask_or_a_stride_that_is_wrong(n, seen, stride, message):
    x = torch.randn(3, 100)
    out = torch.empty_like(x)
    try:
        doubled_kernel[(3,)](x, out, n, seen, stride, BLOCK=128)
        found = gpu.report()
    except PTXError as error:
        found = str(error)
    gpu.clear()
    if message is None:
        torch.testing.assert_close(out, 2 * x, rtol=0, atol=0)
        assert not found
    else:
        assert message in found
