"""The GPU in NumPy (`emulator`): what its instructions compute, and that it flags what is wrong with a program."""

import math

import pytest
import torch

pytest.importorskip("triton")

from emulator import text
from emulator.driver import extent, regions
from emulator.machine import Launch, Settings
from emulator.text import PTXError
from emulator.translation import translate

# thread t of block b finds its place of 8 bytes in the second tensor at %rd1, and at %r1 in shared memory
PROGRAM = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid {threads}
{{
	.reg .pred %p<20>;
	.reg .b16 %rs<20>;
	.reg .b32 %r<40>;
	.reg .b64 %rd<40>;
	ld.param.b64 %rd0, [kernel_param_0];
	ld.param.b64 %rd1, [kernel_param_1];
	mov.u32 %r0, %tid.x;
	mov.u32 %r2, %ctaid.x;
	mul.lo.s32 %r3, %r2, {threads};
	add.s32 %r3, %r3, %r0;
	mul.wide.u32 %rd2, %r3, 8;
	add.s64 %rd1, %rd1, %rd2;
	shl.b32 %r1, %r0, 3;
	mov.b32 %r4, global_smem;
	add.s32 %r1, %r1, %r4;
	{body}
	ret;
}}
"""


def run(body, given=None, threads=32, blocks=1, result=None, **settings):
    """The second tensor, by default an int64 for each thread, and what was found."""
    program = translate(text.parse(PROGRAM.format(body=body, threads=threads)))
    given = torch.arange(threads * blocks) if given is None else given
    result = torch.full((threads * blocks,), -1) if result is None else result
    tensors = {"given": given, "result": result}
    raw = {f"kernel_param_{i}": t.data_ptr().to_bytes(8, "little") for i, t in enumerate(tensors.values())}
    launch = Launch(program, raw, regions(tensors), 16384, Settings(**settings))
    launch.run((blocks, 1, 1))
    return result, {finding.kind for finding in launch.findings}


def bits(value):
    return torch.tensor(value, dtype=torch.float32).view(torch.int32).item()


def wide_bits(value):
    return torch.tensor(value, dtype=torch.float64).view(torch.int64).item()


INF, NAN = "0f7F800000", "0f7FFFFFFF"
ONE, TWO, THREE, TENTH = "0f3F800000", "0f40000000", "0f40400000", "0f3DCCCCCD"
# instruction, result; what is a float is float32 in %r and float64 in %rd
COMPUTED = [
    ("add.s32 %r9, 2147483647, 1", -(2**31)),
    ("sub.s64 %rd9, 3, 5", -2),
    ("mul.lo.s32 %r9, -70000, 70000", -4900000000 + 2**32 * 1),
    ("mul.wide.s32 %rd9, -70000, 70000", -4900000000),
    ("mul.wide.u32 %rd9, -1, 2", 2 * (2**32 - 1)),
    ("mad.wide.s32 %rd9, -3, 5, 100", 85),
    ("mad.lo.s64 %rd9, 3, 12, 5", 41),
    ("div.s32 %r9, -7, 2", -3),
    ("min.s32 %r9, -7, 2", -7),
    ("max.s64 %rd9, -7, 2", 2),
    ("neg.s32 %r9, 5", -5),
    ("shl.b32 %r9, 1, 40", 0),
    ("shr.s32 %r9, -8, 1", -4),
    ("shr.s32 %r9, -8, 99", -1),
    ("shr.u32 %r9, -8, 28", 15),
    ("bfe.u32 %r9, 0x1234ABCD, 8, 8", 0xAB),
    ("bfe.s32 %r9, 0x1234ABCD, 8, 8", 0xAB - 256),
    ("bfe.u32 %r9, -1, 28, 8", 15),
    ("and.b32 %r9, 12, 10", 8),
    ("or.b64 %rd9, 12, 10", 14),
    ("xor.b32 %r9, 12, 10", 6),
    ("not.b32 %r9, 0", -1),
    ("selp.b32 %r9, 1, 2, %p9", 2),
    (f"add.f32 %r9, {ONE}, {TENTH}", 1.1),
    (f"mul.f32 %r9, {INF}, 0f00000000", math.nan),
    # (1 + 2^-12)^2 - 1 = 2^-11 + 2^-24, which a product rounded before the sum would lose
    ("fma.rn.f32 %r9, 0f3F800800, 0f3F800800, 0fBF800000", 2**-11 + 2**-24),
    ("fma.rn.f64 %rd9, 0d3FF0000000000000, 0d4000000000000000, 0d4008000000000000", 5.0),
    (f"div.full.f32 %r9, {ONE}, {THREE}", 1 / 3),
    ("div.rn.f64 %rd9, 0d3FF0000000000000, 0d4008000000000000", 1 / 3),
    (f"max.f32 %r9, {NAN}, {ONE}", 1.0),
    (f"max.f32 %r9, {ONE}, {NAN}, {TWO}", 2.0),
    (f"neg.f32 %r9, {ONE}", -1.0),
    ("abs.f32 %r9, 0fBF800000", 1.0),
    ("abs.ftz.f32 %r9, 0f80000001", 0.0),
    (f"ex2.approx.f32 %r9, {THREE}", 8.0),
    ("ex2.approx.f32 %r9, 0fFF800000", 0.0),
    ("ex2.approx.f32 %r9, 0fC3000000", 2.0**-128),
    ("ex2.approx.ftz.f32 %r9, 0fC3000000", 0.0),
    ("ex2.approx.ftz.f32 %r9, 0f42C80000", 2.0**100),
    ("cvt.rn.f32.f64 %r9, 0d3FD5555555555555", 1 / 3),
    (f"cvt.f64.f32 %rd9, {TENTH}", torch.tensor(0.1).double().item()),
    ("cvt.rn.f64.s64 %rd9, -3", -3.0),
    ("cvt.s64.s32 %rd9, -3", -3),
    ("cvt.u64.u32 %rd9, -3", 2**32 - 3),
    ("cvt.u32.u64 %r9, -3", -3),
    # half a unit of bf16 above 1 goes to the even 1, one and a half to 1 + 2^-6
    ("cvt.rn.bf16x2.f32 %r9, 0f3F808000, 0f3F818000", (0x3F80 << 16) + 0x3F82),
    ("cvt.rn.f16x2.f32 %r9, 0f3F800000, 0f40000000", (0x3C00 << 16) + 0x4000),
    ("mov.b64 %rd9, {1, 2}", 1 + (2 << 32)),
    ("mov.b32 {%rs8, %rs9}, 0x00070005; cvt.u32.u16 %r9, %rs9", 7),
    (f"mov.b64 %rd8, {{{ONE}, {TWO}}}; add.f32x2 %rd9, %rd8, %rd8", bits(2.0) + (bits(4.0) << 32)),
    ("mov.b16 %rs1, 0x3F80; mov.b16 %rs2, 0x4000; fma.rn.f32.bf16 %r9, %rs1, %rs2, 0f3F800000", 3.0),
    ("mov.b16 %rs1, 0x3F80; add.rn.f32.bf16 %r9, %rs1, 0f40000000", 3.0),
    ("mov.b16 %rs1, 0x3C00; add.rn.f32.f16 %r9, %rs1, 0f40000000", 3.0),
    ("mov.b16 %rs1, 0x4049; cvt.f32.bf16 %r9, %rs1", 3.140625),
    ("setp.lt.s32 %p9, -1, 1; selp.b32 %r9, 1, 0, %p9", 1),
    ("setp.lt.u32 %p9, -1, 1; selp.b32 %r9, 1, 0, %p9", 0),
    (f"setp.lt.f32 %p9, {NAN}, {ONE}; selp.b32 %r9, 1, 0, %p9", 0),
    (f"setp.geu.f32 %p9, {NAN}, {ONE}; selp.b32 %r9, 1, 0, %p9", 1),
    (f"setp.ne.f32 %p9, {NAN}, {ONE}; selp.b32 %r9, 1, 0, %p9", 0),
    (f"setp.neu.f32 %p9, {NAN}, {ONE}; selp.b32 %r9, 1, 0, %p9", 1),
    ("setp.eq.b64 %p9, 0, 0; @%p9 mov.b32 %r9, 5; @!%p9 mov.b32 %r9, 6", 5),
]


@pytest.mark.parametrize(("instruction", "expected"), COMPUTED, ids=[c[0] for c in COMPUTED])
def test_what_an_instruction_computes(instruction, expected):
    wide = "%rd9" in instruction
    widened = "" if wide else "cvt.s64.s32 %rd9, %r9;"
    result, _ = run(f"mov.pred %p9, 0; {instruction}; {widened} st.global.b64 [%rd1], %rd9;")
    got = result[0]
    if isinstance(expected, float):
        got = got.view(torch.float64) if wide else got.to(torch.int32).view(torch.float32)
        expected = torch.tensor(expected, dtype=got.dtype)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert int(got) == expected if wide else int(got.to(torch.int32)) == expected


@pytest.mark.parametrize(
    ("shuffle", "source"),
    [
        ("bfly.b32 %r9, %r0, 5, 31", lambda lane: lane ^ 5),
        ("idx.b32 %r9, %r0, 7, 31", lambda lane: 7),
        ("up.b32 %r9, %r0, 3, 0", lambda lane: max(lane - 3, 0) if lane >= 3 else lane),
        ("down.b32 %r9, %r0, 3, 31", lambda lane: lane + 3 if lane + 3 < 32 else lane),
        # within segments of 8 lanes: c = (32 - 8) << 8 | 31
        ("bfly.b32 %r9, %r0, 4, 6175", lambda lane: lane ^ 4),
        ("idx.b32 %r9, %r0, 2, 6175", lambda lane: lane // 8 * 8 + 2),
        ("down.b32 %r9, %r0, 3, 6175", lambda lane: lane + 3 if lane % 8 + 3 < 8 else lane),
    ],
)
def test_a_shuffle_reads_another_lane(shuffle, source):
    result, _ = run(f"shfl.sync.{shuffle}, -1; cvt.u64.u32 %rd9, %r9; st.global.b64 [%rd1], %rd9;")
    assert result.tolist() == [source(lane) for lane in range(32)]


def test_lanes_that_part_meet_again():
    """A loop that lane t leaves after t rounds, and a branch inside it."""
    result, _ = run("""
    mov.b32 %r9, 0; mov.b32 %r10, 0;
again:
    and.b32 %r11, %r9, 1; setp.eq.b32 %p2, %r11, 0;
    @%p2 bra even;
    add.s32 %r10, %r10, 100;
even:
    add.s32 %r10, %r10, 1; add.s32 %r9, %r9, 1;
    setp.lt.s32 %p1, %r9, %r0; @%p1 bra again;
    cvt.u64.u32 %rd9, %r10; st.global.b64 [%rd1], %rd9;""")
    assert result.tolist() == [rounds + 100 * (rounds // 2) for rounds in [1, *range(1, 32)]]


@pytest.mark.parametrize("order", ["together", "forward", "reverse"])
def test_blocks_that_end_early_and_warps_that_part(order):
    """Block b adds b times, warp w only where w is odd; every warp waits for the others in each round."""
    body = """
    mov.b32 %r9, 0; mov.b64 %rd9, 0; shr.u32 %r11, %r0, 5; and.b32 %r11, %r11, 1; setp.eq.b32 %p1, %r11, 0;
again:
    setp.le.s32 %p2, %r2, %r9; @%p2 bra done;
    @%p1 bra skip;
    add.s64 %rd9, %rd9, 1;
skip:
    bar.sync 0; add.s32 %r9, %r9, 1; bra again;
done:
    st.global.b64 [%rd1], %rd9;"""
    result, found = run(body, threads=128, blocks=3, order=order)
    assert not found
    assert result.view(3, 4, 32)[:, :, 0].tolist() == [[0, b, 0, b] for b in range(3)]


# a program in which thread t passes something to thread t + 32, with a hole; what is found
WRONG = {
    "another warp's write is read without a barrier": (
        "st.shared.b64 [%r1], %rd2; xor.b32 %r5, %r0, 32; shl.b32 %r5, %r5, 3; add.s32 %r5, %r5, %r4;"
        "ld.shared.b64 %rd9, [%r5]; st.global.b64 [%rd1], %rd9;",
        "shared memory: read",
    ),
    "another lane's write is read without a barrier": (
        "st.shared.b64 [%r1], %rd2; xor.b32 %r5, %r0, 1; shl.b32 %r5, %r5, 3; add.s32 %r5, %r5, %r4;"
        "ld.shared.b64 %rd9, [%r5]; st.global.b64 [%rd1], %rd9;",
        "shared memory: read",
    ),
    "what another warp reads is overwritten": (
        "st.shared.b64 [%r1], %rd2; bar.sync 0; xor.b32 %r5, %r0, 32; shl.b32 %r5, %r5, 3; add.s32 %r5, %r5, %r4;"
        "ld.shared.b64 %rd9, [%r5]; st.shared.b64 [%r1], %rd9;",
        "shared memory: ",
    ),
    "two threads write two values to one place": ("st.shared.b32 [%r4], %r0;", "two threads of one instruction"),
    "two warps write two values to one place": (
        "setp.lt.u32 %p1, %r0, 32; shr.u32 %r5, %r0, 5; @%p1 st.shared.b32 [%r4], 1; @!%p1 st.shared.b32 [%r4], 2;",
        "shared memory: write races with a write",
    ),
    "blocks write one place": (
        "ld.param.b64 %rd1, [kernel_param_1]; setp.eq.b32 %p1, %r0, 0; cvt.u64.u32 %rd9, %r2;"
        "@%p1 st.global.b64 [%rd1], %rd9;",
        "global memory: ",
    ),
    "a block reads what another writes": (
        "st.global.b64 [%rd1], %rd2; ld.param.b64 %rd1, [kernel_param_1]; ld.global.b64 %rd9, [%rd1];",
        "global memory: ",
    ),
    "shared memory is read before it is written": (
        "ld.shared.b64 %rd9, [%r1];",
        "shared memory: read of what nothing wrote",
    ),
    "a copy is read before it is there": (
        "cp.async.ca.shared.global [%r1], [%rd0], 8; cp.async.commit_group; ld.shared.b64 %rd9, [%r1];"
        "cp.async.wait_group 0;",
        "shared memory: read while a write is under way",
    ),
    "a copy of another warp is read without a barrier": (
        "cp.async.ca.shared.global [%r1], [%rd0], 8; cp.async.commit_group; cp.async.wait_group 0;"
        "xor.b32 %r5, %r0, 32; shl.b32 %r5, %r5, 3; add.s32 %r5, %r5, %r4; ld.shared.b64 %rd9, [%r5];",
        "shared memory: read races with a write",
    ),
    "a wait that leaves one group too many under way": (
        "cp.async.ca.shared.global [%r1], [%rd0], 8; cp.async.commit_group;"
        "cp.async.ca.shared.global [%r1+4096], [%rd0], 8; cp.async.commit_group; cp.async.wait_group 2;"
        "ld.shared.b64 %rd9, [%r1]; cp.async.wait_group 0;",
        "shared memory: read while a write is under way",
    ),
    "a copy that nobody waits for": (
        "cp.async.ca.shared.global [%r1], [%rd0], 8; cp.async.commit_group;",
        "ends with cp.async under way",
    ),
    "a barrier that half of the warps reach": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra over; bar.sync 0;\nover:\nmov.b32 %r9, 0;",
        "not every warp",
    ),
    "an mbarrier is used without a barrier after its initialization": (
        "setp.eq.b32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r4], 1;"
        "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], 0;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r4], 0; @!%p2 bra again;",
        "mbarrier is",  # used too early, or none yet
    ),
}  # fmt: skip


@pytest.mark.parametrize("order", ["together", "forward", "reverse"])
@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_is_found_in_every_order_of_warps(fault, order):
    body, kind = WRONG[fault]
    try:
        _, found = run(body, given=torch.zeros(1, dtype=torch.int64), threads=64, blocks=2, order=order)
    except PTXError as error:
        found = {str(error)}
    assert any(kind in finding for finding in found), found


RIGHT = [
    "st.shared.b64 [%r1], %rd2; bar.sync 0; xor.b32 %r5, %r0, 32; shl.b32 %r5, %r5, 3; add.s32 %r5, %r5, %r4;"
    "ld.shared.b64 %rd9, [%r5]; bar.sync 0; st.shared.b64 [%r1], %rd9;",
    "st.shared.b32 [%r4], 7;",  # one value
    "cp.async.ca.shared.global [%r1], [%rd0], 8; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"
    "xor.b32 %r5, %r0, 32; shl.b32 %r5, %r5, 3; add.s32 %r5, %r5, %r4; ld.shared.b64 %rd9, [%r5];",
    "setp.eq.b32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r4], 1; bar.sync 0;"
    "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], 0;\nagain:\n"
    "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r4], 0; @!%p2 bra again;",
]


@pytest.mark.parametrize("order", ["together", "forward", "reverse"])
@pytest.mark.parametrize("body", RIGHT)
def test_what_is_right_is_not_found_wrong(body, order):
    _, found = run(body, given=torch.zeros(1, dtype=torch.int64), threads=64, blocks=2, order=order)
    assert not found


REFUSED = {
    "st.global.b64 [%rd1+8], %rd2;": "outside of every tensor",
    "st.global.b64 [%rd1+-8], %rd2;": "outside of every tensor",
    "mov.b64 %rd9, 0; ld.global.b64 %rd8, [%rd9];": "outside of every tensor",
    "st.shared.b64 [%r1+16384], %rd2;": "outside of the 16384",
    "mov.b32 %r9, 0; ld.shared.b32 %r8, [%r9];": "outside of the 16384",
    "ld.shared.b64 %rd9, [%r1+4];": "misaligned access of 8 bytes",
    "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r4], 0;": "no mbarrier",
    "setp.eq.b32 %p1, %r0, 0; @%p1 bra over; bar.sync 0;\nover:\nmov.b32 %r9, 0;": "some lanes of a warp",
    "setp.eq.b32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r4], 1; bar.sync 0;\nagain:\n"
    "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r4], 0; @!%p2 bra again;": "deadlock",
    "prmt.b32 %r9, %r0, %r0, 1;": "unknown instruction",
    "add.sat.s32 %r9, %r0, %r0;": "unknown instruction",
    "add.rz.f32 %r9, %r0, %r0;": "unknown instruction",
    "ld.volatile.global.b32 %r9, [%rd1];": "unknown instruction",
    "atom.global.add.u32 %r9, [%rd1], 1;": "unknown instruction",
    "setp.lt.and.s32 %p1, %r0, 1, %p1;": "unknown instruction",
    "bar.sync 1, 64;": "some of the threads",
    "mov.u32 %r9, %clock;": "unknown register",
    "add.s32 %r9, %r0, %rd1;": "of b64 read as s32",
    "add.s32 %rd9, %r0, %r0;": "of b64 written as s32",
    "add.s32 %r9, %r0;": "2 operands",
    "shfl.sync.bfly.b32 %r9, %r0, 1, 31, 1;": "some lanes of a warp",
    "cvt.rz.bf16.f32 %rs1, %r0;": "unknown instruction",
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r5,%r6}, {%r5,%r6}, {%r5}, {%r5,%r6};": "shape of a product",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r5,%r6,%r7,%r8}, %rd1, %rd2, %p1, 1, -1, 0, 0;": "negated",
}  # fmt: skip


@pytest.mark.parametrize("body", REFUSED, ids=lambda body: body[:60])
def test_what_it_does_not_know_is_refused(body):
    with pytest.raises(PTXError, match=REFUSED[body]):
        run(body)


def test_views_of_a_tensor_are_bounded_by_their_rows():
    storage = torch.zeros(10, 64)
    rows = storage[2:5, :50]
    first, end = extent(rows)
    assert (first - storage.data_ptr(), end - storage.data_ptr()) == (2 * 256, 5 * 256)  # with the padding of a row
    assert extent(storage[9:, :50])[1] == storage.data_ptr() + storage.nbytes
    assert len(regions({"a": rows, "b": rows[1:], "c": torch.zeros(3)})) == 2  # what overlaps is one


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_a_product_of_fragments(kind):
    """Each lane loads its part of A and B by the tables of the specification, and stores its part of D by them."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[kind]
    k, in_word = (8, 1) if kind == "tf32" else (16, 2)
    a, b = ((torch.randn(rows, k) * 64).round().div(64).to(dtype) for rows in (16, 8))  # exact in TF32; B by columns
    row, word = 4 * k // in_word, 4  # bytes
    body = ["shr.u32 %r10, %r0, 2; and.b32 %r11, %r0, 3;"]  # group of the lane, lane in the group

    def place(register, first, pitch, width):
        """Byte of (group, lane in the group) in a matrix, and the address there in %rd5."""
        body.append(f"mad.lo.s32 %r12, %r10, {pitch}, {first}; mad.lo.s32 %r12, %r11, {width}, %r12;")
        body.append(f"cvt.u64.u32 %rd5, %r12; add.s64 %rd5, %rd5, {register};")

    for i in range(4):  # rows group + 8 (i & 1), the second half of the columns for i >= 2
        place("%rd0", 8 * (i & 1) * row + (i >> 1) * row // 2, row, word)
        body.append(f"ld.global.b32 %r{20 + i}, [%rd5];")
    for i in range(2):
        place("%rd0", 16 * row + i * row // 2, row, word)
        body.append(f"ld.global.b32 %r{24 + i}, [%rd5];")
    body += [f"mov.b32 %r{30 + i}, 0f3F000000;" for i in range(4)]  # the sum begins at 1/2
    shape = f"m16n8k{k}.row.col.f32.{kind}.{kind}.f32"
    registers = "{%r20,%r21,%r22,%r23}, {%r24,%r25}, {%r30,%r31,%r32,%r33}"
    body.append(f"mma.sync.aligned.{shape} {{%r30,%r31,%r32,%r33}}, {registers}; ld.param.b64 %rd1, [kernel_param_1];")
    place("%rd1", 0, 32, 8)
    body += [f"st.global.b32 [%rd5+{4 * (i & 1) + 256 * (i >> 1)}], %r{30 + i};" for i in range(4)]
    result = torch.full((16, 8), torch.nan)
    _, found = run("".join(body), torch.cat([a.flatten(), b.flatten()]), result=result)
    assert not found
    torch.testing.assert_close(result, (0.5 + a.double() @ b.double().T).float(), rtol=0, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_of_8_x_8(transposed):
    """Lane t gets entries 2 (t % 4) and the next of row t // 4, or of that column."""
    trans = ".trans" if transposed else ""
    body = f"""
    mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd0; ld.global.b32 %r9, [%rd5];
    shl.b32 %r5, %r0, 2; add.s32 %r5, %r5, %r4; st.shared.b32 [%r5], %r9; bar.sync 0;
    and.b32 %r5, %r0, 7; shl.b32 %r5, %r5, 4; add.s32 %r5, %r5, %r4;
    ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r9}}, [%r5];
    cvt.u64.u32 %rd9, %r9; st.global.b64 [%rd1], %rd9;"""
    given = torch.arange(64, dtype=torch.int16).view(8, 8)
    result, found = run(body, given)
    matrix = given.T if transposed else given
    assert not found
    assert result.tolist() == [
        int(matrix[lane // 4, 2 * (lane % 4)]) + (int(matrix[lane // 4, 2 * (lane % 4) + 1]) << 16)
        for lane in range(32)
    ]
