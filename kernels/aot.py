"""Compile every shipped kernel configuration ahead of time, for GPUs that need not be present, and report resources.

    python -m alignloss.kernels.aot report.json [sm_90 gfx942 ...]

Per kernel and target: registers, spilled bytes, shared memory, and whether tensor-core instructions were emitted.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from . import exps, kl, rows, sequence, stats, sums, tile
from .blocks import (
    CAPPED_SLICE,
    COMBINE_BLOCK_N,
    COMBINE_BLOCK_T,
    COPY_ENGINE,
    KL_BLOCK,
    OPTIONS,
    REPAIR_STAGES,
    ROW_WARPS,
    SEQUENCE_BLOCK,
    SLICE,
    TILE_WARPS,
    WIDTH_BLOCK,
    exponential_blocks,
    gemm_blocks,
)

# target -> (Triton's target, row of the table of blocks, bytes of shared memory per program)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "sm_80", 163 << 10),
    "sm_86": (GPUTarget("cuda", 86, 32), "small", 99 << 10),
    "sm_89": (GPUTarget("cuda", 89, 32), "small", 99 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), "sm_90", 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), "sm_100", 227 << 10),
    "sm_120": (GPUTarget("cuda", 120, 32), "small", 99 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "gfx942", 64 << 10),
}
TENSOR_CORES = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma")


class Variant(NamedTuple):
    name: str
    kernel: Any
    types: dict[str, str]  # pointer and scalar types that differ from the defaults below
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    tensor_cores: bool = False
    divisible: tuple[str, ...] = ()  # numbers that are multiples of 16 beside those that always are


class Report(NamedTuple):
    variant: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_cores: bool
    wants_tensor_cores: bool
    vector_loads: int  # of 16 bytes from global memory, in PTX; -1 for AMD
    vector_stores: int
    warnings: list[str]


# scalars by name; every other parameter is a pointer to fp32
_SCALARS = {
    **dict.fromkeys(
        ("N", "M", "V", "H", "Vs", "reach", "B", "tiles", "first", "length", "ignore_index", "count"), "i32"
    ),
    **dict.fromkeys(("linear", "cap", "slack", "lift"), "fp32"),
    **dict.fromkeys(
        ("beta", "label_smoothing", "desirable_weight", "undesirable_weight", "nll_weight", "slope"), "fp64"
    ),
}
# numbers that the launchers pass as multiples of 16, for tiles and usual models, or as 1: Triton compiles for both
_DIVISIBLE = (
    "H", "V", "first", "reach", "tile_stride", "out_stride", "out2_stride", "hidden_stride", "weight_stride",
)  # fmt: skip
_ONE = ("hidden_step", "weight_step")
_INT64_POINTERS = ("labels", "nll_labels", "row_labels", "index", "offsets")
_FP64_POINTERS = ("logps", "dlogps", "values", "dvalues", "weights", "dsums", "kl", "slopes", "scales", "nll")


def variants(blocks: str) -> list[Variant]:
    """Every configuration that the launchers can ask for, the plainest and the fullest of each kind."""
    return _of_gemms(blocks) + _of_tiles(16 if blocks == "gfx942" else 32) + _of_rows() + _of_sequences()


def _of_gemms(blocks: str) -> list[Variant]:
    found = []
    for name, dtype, size, precision, full in (
        ("bf16", "bf16", 2, "ieee", False),
        ("bf16, all", "bf16", 2, "ieee", True),
        ("fp16, all", "fp16", 2, "ieee", True),
        ("tf32", "fp32", 4, "tf32", False),
        ("fp32", "fp32", 4, "ieee", True),
    ):
        block_n, block_v, block_h, warps, stages = gemm_blocks(blocks, size, full)
        pointers = {"hidden": f"*{dtype}", "weight": f"*{dtype}"}
        flags = {"HAS_BIAS": full, "EXTRAS": full}
        tensor_cores = size == 2 or (precision == "tf32" and blocks != "gfx942")
        found.append(
            Variant(
                f"stats_fwd[{name}]",
                stats.stats_fwd_kernel,
                pointers,
                flags
                | {"HAS_CAP": full, "GROUP": 8, "PRECISION": precision}
                | {"BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_H": block_h},
                warps,
                stages,
                tensor_cores,
            )
        )
        if size == 2 and blocks in COPY_ENGINE:
            copied = {
                "hidden": f"tensordesc<{dtype}[{block_n}, {block_h}]>",
                "weight": f"tensordesc<{dtype}[{block_v}, {block_h}]>",
            }
            found.append(
                found[-1]._replace(name=f"stats_copied_fwd[{name}]", kernel=stats.stats_copied_fwd_kernel, types=copied)
            )
            if dtype == "bf16" and not full:
                found += _of_exponentials(blocks, copied)
    combine = {"BLOCK_N": COMBINE_BLOCK_N, "BLOCK_T": COMBINE_BLOCK_T}
    return found + [
        Variant(f"combine_fwd[all={full}]", stats.combine_fwd_kernel, {}, combine | {"EXTRAS": full})
        for full in (False, True)
    ]


def _of_exponentials(blocks: str, operands: dict[str, str]) -> list[Variant]:
    block_n, block_v, block_h, warps, stages = gemm_blocks(blocks, 2, False)
    narrow = exponential_blocks(blocks, 2, True)[1]
    wide, under_cap = (
        operands | {"weight": f"tensordesc<bf16[{v}, {block_h}]>", "exps": f"tensordesc<bf16[{block_n}, {v}]>"}
        for v in (block_v, narrow)
    )
    size = {"BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_H": block_h}
    small, loop = {"BLOCK_N": COMBINE_BLOCK_N, "BLOCK_H": 64}, {"BLOCK_T": COMBINE_BLOCK_T}
    repair = REPAIR_STAGES.get(blocks, stages)
    plain, capped = {"HAS_CAP": False, "GROUP": 8} | size, {"HAS_CAP": True, "GROUP": 8} | size | {"BLOCK_V": narrow}
    found = [
        Variant(f"settle_fwd[begun={begun}, cap={cap}]", exps.settle_fwd_kernel, {}, flags | loop | small)
        for begun, cap in ((False, False), (True, False), (True, True))
        for flags in ({"BEGUN": begun, "HAS_CAP": cap},)
    ]
    found += [
        Variant("sums_fwd[bf16]", sums.sums_fwd_kernel, wide, plain, warps, stages, True),
        Variant("sums_fwd[bf16, cap]", sums.sums_fwd_kernel, under_cap, capped, warps, stages, True),
        Variant("repair_sums[bf16]", sums.repair_sums_kernel, wide, loop | size, warps, repair, True),
        Variant("settle_sums", sums.settle_sums_kernel, {}, {"BLOCK_N": COMBINE_BLOCK_N} | loop),
    ]
    # the width of a slice is a multiple of 16, but for the last one of some vocabularies
    for suffix, divisible in (("", ()), (", whole", ("Vs",))):
        for name, kernel, types, constants, pipelined in (
            ("exps_fwd[bf16", exps.exps_fwd_kernel, wide, plain, stages),
            ("exps_fwd[bf16, cap", exps.exps_fwd_kernel, under_cap, capped, stages),
            ("repair_fwd[bf16", exps.repair_fwd_kernel, wide, loop | size, repair),
        ):
            found.append(Variant(f"{name}{suffix}]", kernel, types, constants, warps, pipelined, True, divisible))
    return found


def _of_tiles(kl_warps: int) -> list[Variant]:
    found = []
    for save, full, dtype in (
        (0, False, "*fp32"),
        (0, True, "*fp32"),
        (1, False, "*bf16"),
        (1, True, "*fp32"),
        (2, True, "*bf16"),
    ):
        flags = {
            "HAS_BIAS": full,
            "HAS_CAP": full,
            "SAVE": save,
            "EXTRAS": full,
            "RESCALE": save > 0,
            "BLOCK": CAPPED_SLICE if full else SLICE,
            "ROW_BLOCK": WIDTH_BLOCK,
        }
        name = f"fold_fwd[{dtype[1:]}, save={save}, all={full}]"
        found.append(Variant(name, tile.fold_fwd_kernel, {"out": dtype, "out2": dtype}, flags, TILE_WARPS))
    for narrow, full in ((False, False), (True, False), (True, True)):
        flags = {
            "HAS_BIAS": full,
            "HAS_CAP": full,
            "ENTROPY": full,
            "NARROW": narrow,
            "BLOCK": CAPPED_SLICE if full else SLICE,
        }
        name = f"dlogits_bwd[narrow={narrow}, all={full}]"
        found.append(Variant(name, tile.dlogits_bwd_kernel, {"out": "*bf16" if narrow else "*fp32"}, flags, TILE_WARPS))
    for name, pointee, cap in (("bf16", "*bf16", False), ("bf16, all", "*bf16", True), ("fp32, all", "*fp32", True)):
        flags = {"HAS_CAP": cap, "BLOCK": CAPPED_SLICE if cap else SLICE}
        found.append(Variant(f"held_bwd[{name}]", tile.held_bwd_kernel, {"tile": pointee}, flags, TILE_WARPS))
    for full in (False, True):
        flags = {"HAS_BIAS": full, "HAS_REF_BIAS": full, "HAS_CAP": full, "BLOCK": KL_BLOCK}
        narrow = {"out": "*bf16"} if full else {}
        suffix = f"[narrow={full}, all={full}]"
        found.append(Variant(f"kl_fwd[all={full}]", kl.kl_fwd_kernel, {}, flags, kl_warps))
        found.append(Variant("kl_bwd" + suffix, kl.kl_bwd_kernel, narrow, flags | {"NARROW": full}, kl_warps))
    # the width of a slice is a multiple of 16, but for the last one of some vocabularies
    return found + [
        variant._replace(name=variant.name.replace("]", ", whole]"), divisible=("Vs",))
        for variant in found
        if "Vs" in variant.kernel.arg_names
    ]


def _of_rows() -> list[Variant]:
    found = []
    narrow_rows = dict.fromkeys(("hidden", "weight", "rows", "scaled", "dlogp", "dentropy", "dhidden"), "*bf16")
    for name, types in (("bf16", narrow_rows), ("fp32", {})):
        block = {"BLOCK": WIDTH_BLOCK}
        compute = {"COMPUTE": rows.DTYPES[torch.bfloat16 if types else torch.float32]}
        for full in (False, True):
            flags = {"HAS_INDEX": full, "HAS_CAP": full, "ENTROPY": full} | block
            gather = (
                dict.fromkeys(("HAS_INDEX", "HAS_ROWS", "TARGETS", "HAS_BIAS", "REFERENCE"), full) | compute | block
            )
            finish = dict.fromkeys(("LSE", "MEAN_LOGITS", "LOG_SUM_SQ", "IS_TOP1"), full) | {"SAVE": 1 + full} | flags
            weigh = dict.fromkeys(("HAS_UNIT", "DHIDDEN", "ROWS", "SCALED"), full) | compute | flags
            finish_types = types | {"is_top1": "*i1", "cap": "fp64"}
            suffix = f"[{name}, all={full}]"
            found.append(Variant("gather_fwd" + suffix, rows.gather_fwd_kernel, types, gather, ROW_WARPS))
            if full:
                references, name_of = gather | {"HAS_BIAS": False}, f"gather_fwd[{name}, references]"
                found.append(Variant(name_of, rows.gather_fwd_kernel, types, references, ROW_WARPS))
            found.append(Variant("finish_fwd" + suffix, rows.finish_fwd_kernel, finish_types, finish, ROW_WARPS))
            found.append(Variant("rows_bwd" + suffix, rows.rows_bwd_kernel, types | {"cap": "fp64"}, weigh, ROW_WARPS))
        for full in (False, True):
            flags, name_of = {"HAS_INDEX": full} | block, f"scale_rows_bwd[{name}, all={full}]"
            scaled_types = dict.fromkeys(("values", "out"), "*bf16") if types else {}
            found.append(Variant(name_of, rows.scale_rows_bwd_kernel, scaled_types, flags, ROW_WARPS))
        scale = {"BLOCK": WIDTH_BLOCK}
        pointers = {"gradient": "*bf16" if types else "*fp32", "count": "i64"}
        found.append(Variant(f"scale_bwd[{name}]", rows.scale_bwd_kernel, pointers, scale, ROW_WARPS))
    return found


def _of_sequences() -> list[Variant]:
    found = []
    for full in (False, True):
        flags = {"PACKED": full, "HAS_WEIGHTS": full, "BLOCK": SEQUENCE_BLOCK}
        suffix = f"[all={full}]"
        sums = {"sums": "*fp64"}
        found.append(Variant("sequence_fwd" + suffix, sequence.sequence_fwd_kernel, sums, flags))
        found.append(Variant("sequence_bwd" + suffix, sequence.sequence_bwd_kernel, {}, flags))
        found.append(Variant("preference_bwd" + suffix, sequence.preference_bwd_kernel, {}, flags | {"PAIRED": True}))
        reduce = dict.fromkeys(("PAIRED", "HAS_PAIR_WEIGHTS", "HAS_NUM_SEQUENCES", "HAS_NUM_TOKENS"), full)
        reduce |= {"BLOCK": SEQUENCE_BLOCK}
        found.append(Variant("preference_reduce_fwd" + suffix, sequence.preference_reduce_fwd_kernel, {}, reduce))
    for loss in ("dpo", "ipo", "kto", "cpo"):
        flags = dict.fromkeys(("PACKED", "HAS_WEIGHTS", "HAS_PAIR_WEIGHTS"), True)
        flags |= {"LOSS": loss, "BLOCK": SEQUENCE_BLOCK}
        found.append(Variant(f"preference_fwd[{loss}]", sequence.preference_fwd_kernel, {"desirable": "*i1"}, flags))
    return found


def _source(variant: Variant) -> ASTSource:
    signature, attributes = {}, {}
    constants = variant.constants | {name: 1 for name in _ONE if name in variant.kernel.arg_names}
    for i, name in enumerate(variant.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in _SCALARS or name.endswith(("stride", "step")):
            signature[name] = variant.types.get(name, _SCALARS.get(name, "i32"))
        else:
            pointee = "*i64" if name in _INT64_POINTERS else "*fp64" if name in _FP64_POINTERS else "*fp32"
            signature[name] = variant.types.get(name, pointee)
        if signature[name].startswith("*") or name in _DIVISIBLE + variant.divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(variant.kernel, signature, constants, attributes)


def compile_variant(name: str, target: str) -> Report:
    """Compile one configuration for one target and read its resources from the assembler."""
    gpu, blocks, limit = TARGETS[target]
    variant = next(v for v in variants(blocks) if v.name == name)
    options = {"num_warps": variant.warps, "num_stages": variant.stages} | OPTIONS
    compiled = triton.compile(_source(variant), target=gpu, options=options)
    shared = compiled.metadata.shared
    if gpu.backend == "hip":
        code = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.vgpr_{what}:\s+(\d+)", code)[1]) for what in ("count", "spill_count"))
        warnings: list[str] = []
        spilled *= 4
        vectors = [-1, -1]
    else:
        code = compiled.asm["ptx"]
        log = _assemble(code, gpu.arch)
        registers = int(re.search(r"Used (\d+) registers", log)[1])
        spilled = int(re.search(r"(\d+) bytes spill stores", log)[1])
        warnings = re.findall(r"C75\d\d.*", log)
        vectors = [len(re.findall(rf"{way}\.global\S*\.v4\.b32", code)) for way in ("ld", "st")]
    emitted = bool(TENSOR_CORES.search(code))
    return Report(name, target, registers, spilled, shared, limit, emitted, variant.tensor_cores, *vectors, warnings)


def _assemble(ptx: str, arch: int) -> str:
    tool = get_ptxas(arch)  # there are several in Triton's wheel
    gpu = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={gpu}", str(path), "-o", str(path.with_suffix(".cubin"))]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def report(targets: list[str]) -> list[Report]:
    """Compile everything for the targets, on every core."""
    jobs = [(v.name, target) for target in targets for v in variants(TARGETS[target][1])]
    with ProcessPoolExecutor() as pool:
        return list(pool.map(compile_variant, *zip(*jobs, strict=True)))


def main() -> None:
    path, *targets = sys.argv[1:]
    rows = report(targets or list(TARGETS))
    document = {"triton": triton.__version__, "kernels": [row._asdict() for row in rows]}
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
    for row in rows:
        flag = " SPILLS" if row.spilled_bytes else ""
        print(f"{row.target:7} {row.variant:45} {row.registers:4} registers {row.shared_bytes:7} B shared{flag}")


if __name__ == "__main__":
    main()
