"""Faults put into the kernels and the Python around them, one at a time: a test finds each."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    fault: str
    file: str
    before: str  # which the file has exactly once
    after: str
    tests: str  # what finds it, as given to pytest


KERNELS = "tests/test_kernels.py -k "
MUTANTS = [
    Mutant(
        "padding of a row takes part in its sums",
        "kernels/tile.py",
        "z = tl.where((v < Vs) & (v != target), z,",
        "z = tl.where(v != target, z,",
        KERNELS + "padded_rows",
    ),
    Mutant(
        "the target is left in the sums",
        "kernels/tile.py",
        "z = tl.where((v < Vs) & (v != target), z,",
        "z = tl.where(v < Vs, z,",
        KERNELS + "fold_over_slices",
    ),
    Mutant(
        "sums are not rescaled where the reference moves",
        "kernels/tile.py",
        "sums = s * decay + total",
        "sums = s + total",
        KERNELS + "fold_over_slices",
    ),
    Mutant(
        "U is not rescaled",
        "kernels/tile.py",
        "tl.store(u + row * H + k, u_k * decay,",
        "tl.store(u + row * H + k, u_k,",
        KERNELS + "what_a_fold_leaves",
    ),
    Mutant(
        "U2 keeps its old centre",
        "kernels/tile.py",
        "(u2_k + u_k * moved) * decay",
        "u2_k * decay",
        KERNELS + "derivative_of_the_entropy",
    ),
    Mutant(
        "a row without coefficient keeps what is no number",
        "kernels/tile.py",
        "    d = tl.where(used, d, 0.0)\n    if NARROW",
        "    if NARROW",
        "tests/test_not_finite.py -k leaves_no_trace",
    ),
    Mutant(
        "held tiles of an old reference are not rescaled",
        "kernels/tile.py",
        "-tl.exp(tl.load(reference + row) - m) / rounded",
        "-1.0 / rounded",
        "tests/test_onepass.py -k older_reference",
    ),
    Mutant(
        "a label past 32 bits wraps into the tile",
        "kernels/tile.py",
        "    v = label - first\n    return",
        "    v = (label - first).to(tl.int32)\n    return",
        KERNELS + "label_outside",
    ),
    Mutant(
        "offsets of 32 bits",
        "kernels/tile.py",
        "    row = tl.program_id(0).to(tl.int64)\n    step = tl.cast(state_stride, tl.int64)\n    at = state + row",
        "    row = tl.program_id(0)\n    step = tl.cast(state_stride, tl.int64)\n    at = state + row",
        "tests/test_emulated_offsets.py --emulate sm_90 -k tile_of_logits -m nightly",
    ),
    Mutant(
        "the last tile of the vocabulary has no end",
        "kernels/stats.py",
        "if (here > 0) | (first + BLOCK_V > V):",
        "if here > 0:",
        KERNELS + "statistics_gemm",
    ),
    Mutant(
        "partial sums are added without their references",
        "kernels/stats.py",
        "s += tl.sum(s_t * decay, 0)",
        "s += tl.sum(s_t, 0)",
        KERNELS + "statistics_gemm",
    ),
    Mutant(
        "the tail of H is not masked",
        "kernels/stats.py",
        "inside = start + k < H\n        h = tl.load(h_rows",
        "inside = start + k < H + BLOCK_H\n        h = tl.load(h_rows",
        KERNELS + "statistics_gemm",
    ),
    Mutant(
        "rows whose reference was far off are not repaired",
        "kernels/exps.py",
        "tl.where((top > FAR) | too_low, reference + top, reference)",
        "reference + 0.0 * tl.where(too_low, 1.0, 0.0)",
        KERNELS + "whatever_the_reference --emulate sm_90",
    ),
    Mutant(
        "weights of U add up to the sum before rounding",
        "kernels/rows.py",
        "inverse = tl.where(rounded == 0, 0.0, 1.0 / rounded)",
        "inverse = tl.where(s == 0, 0.0, 1.0 / s).to(tl.float32)",
        "tests/test_gpu_decisions.py --emulate sm_90 -k rows_of_a_head_share",
    ),
    Mutant(
        "the sum of the reference is not rescaled",
        "kernels/kl.py",
        "gap * ref_decay + tl.sum(gaps, 0)",
        "gap + tl.sum(gaps, 0)",
        "tests/test_kl.py -k values_and_gradients",
    ),
    Mutant(
        "a block of tokens reaches into the next sequence",
        "kernels/sequence.py",
        "        mask = at + t < stop\n        spread",
        "        mask = at + t < stop + 1\n        spread",
        KERNELS + "sequence_sums",
    ),
    Mutant(
        "labels are not clamped where they are an index",
        "alignloss/backends/_torch.py",
        "weight[labels.clamp(0, len(weight) - 1)]",
        "weight[labels]",
        "tests/test_traps.py -k unchecked_a_label",
    ),
    Mutant(
        "a slice does not begin its sum of products",
        "alignloss/ops/walk.py",
        "addmm(u, exps, weight, beta=int(first > 0))",
        "addmm(u, exps, weight, beta=1)",
        "tests/test_exactness.py -k every_gradient",
    ),
    Mutant(
        "a recomputed group overwrites the gradient of the others",
        "alignloss/ops/walk.py",
        "count, beta = part.stop - start, int(start > 0 or add)",
        "count, beta = part.stop - start, int(start > 0)",
        "tests/test_onepass.py -k loss_outputs",
    ),
    Mutant(
        "a second backward scales what the first one handed over",
        "alignloss/ops/onepass.py",
        "gradient, ctx.gradient = ctx.gradient, None",
        "gradient = ctx.gradient",
        "tests/test_onepass.py -k second_backward",
    ),
    Mutant(
        "a gradient that groups share is not counted in their memory",
        "alignloss/ops/sizes.py",
        "        held += self.accumulator_bytes(several)\n",
        "",
        "tests/test_plan.py -k 'tenth or 29th'",
    ),
    Mutant(
        "the gradient goes to the first columns in place of the last",
        "alignloss/ops/columns.py",
        "gradient[:, -ctx.trained_columns.shape[1] :]",
        "gradient[:, : ctx.trained_columns.shape[1]]",
        "tests/test_columns.py -k used_twice",
    ),
    Mutant(
        "the first label past the vocabulary counts as one of it",
        "alignloss/checks.py",
        "labelled & ((labels < 0) | (labels >= vocabulary))",
        "labelled & ((labels < 0) | (labels > vocabulary))",
        "tests/test_traps.py -k outside_the_vocabulary_raises",
    ),
    Mutant(
        "a gradient of parts counts once in all",
        "alignloss/ops/processes.py",
        "return gradient * ctx.size, None",
        "return gradient, None",
        "tests/test_split_sequences.py -k other_calls",
    ),
    Mutant(
        "a part's sums keep its own reference",
        "alignloss/ops/vocabulary.py",
        "                decay * wide[SUM],",
        "                wide[SUM],",
        "tests/test_split_vocabulary.py -k every_call",
    ),
    Mutant(
        "U of a part keeps its own reference",
        "alignloss/ops/vocabulary.py",
        "            u.mul_(decay.to(u.dtype)[:, None])\n        state",
        "        state",
        "tests/test_split_vocabulary.py -k every_call",
    ),
    Mutant(
        "U2 of a part keeps its own centre",
        "alignloss/ops/vocabulary.py",
        "u2.addcmul_(u, moved.to(u.dtype)[:, None]).mul_(",
        "u2.mul_(",
        "tests/test_split_vocabulary.py -k every_call",
    ),
    Mutant(
        "every part begins at 0",
        "alignloss/ops/vocabulary.py",
        "local = labels - sum(self.parts[:rank])",
        "local = labels",
        "tests/test_split_vocabulary.py -k every_call",
    ),
    Mutant(
        "sizes follow from the part of each process",
        "alignloss/ops/head.py",
        "vocabulary = self.split.widest",
        "vocabulary = len(weight) or 1",
        "tests/test_split_vocabulary.py -k every_call",
    ),
    Mutant(
        "U is rounded before it is added up",
        "alignloss/ops/walk.py",
        "                    self.split.add_up(whole)\n                    rounded.copy_(whole)",
        "                    rounded.copy_(whole)\n                    self.split.add_up(rounded)",
        "tests/test_split_vocabulary.py -k rounded",
    ),
    Mutant(
        "the order of data is not compared",
        "alignloss/ops/processes.py",
        "values.long() ^ (torch.arange(1, len(values) + 1, device=values.device) * 2654435761)",
        "values.long()",
        "tests/test_split_sequences.py -k step_asks",
    ),
    Mutant(
        "the last rows of hidden states are not compared",
        "alignloss/ops/vocabulary.py",
        "torch.arange(0, scored, -(-scored // 64), device=hidden.device)",
        "torch.arange(0, min(scored, 46), device=hidden.device)",
        "tests/test_split_vocabulary.py -k every_process",
    ),
    Mutant(
        "a DTensor that was written to is not seen",
        "alignloss/ops/vocabulary.py",
        "            if given[name]._version != version:",
        "            if given[name]._version < version:",
        "tests/test_split_vocabulary.py -k written",
    ),
    Mutant(
        "what a hook makes of logits passes",
        "alignloss/ops/module_head.py",
        "or origin.other or not same or narrow",
        "or origin.other or narrow",
        "tests/test_module_head.py -k are_refused",
    ),
    Mutant(
        "a row far from its target is not repaired",
        "kernels/sums.py",
        "(total < MOST * slack)",
        "(total > 0)",
        "tests/test_kernels.py --emulate sm_90 -k sums_by_a_gemm",
    ),
    Mutant(
        "under a softcap the target stays in its sums",
        "kernels/exps.py",
        "e = tl.where(x == NONE, 0.0, tl.exp2(bits - 2 * bits * r))",
        "e = tl.exp2(bits - 2 * bits * r)",
        "tests/test_kernels.py --emulate sm_90 -k under_a_softcap",
    ),
    Mutant(
        "a row without a coefficient keeps what is no number",
        "kernels/rows.py",
        "value = tl.where(by == 0, 0.0, value * by)",
        "value = value * by",
        KERNELS + "their_coefficients",
    ),
    Mutant(
        "dhidden of one pass lacks the upstream gradient",
        "alignloss/ops/onepass.py",
        "scale_rows(dlogp, coefficient, factor, index, dhidden)",
        "scale_rows(dlogp, coefficient, factor / factor, index, dhidden)",
        "tests/test_onepass.py",
    ),
    Mutant(
        "the gradient of a group goes to the first positions",
        "alignloss/modules/groups.py",
        "torch.zeros_like(logps).index_copy_(0, positions, slopes)",
        "torch.zeros_like(logps).index_copy_(0, positions - positions[0], slopes)",
        "tests/test_onepass.py",
    ),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package and its tests elsewhere, where they may be changed."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("alignloss", "docs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", folder / "kernels")
    (folder / "alignloss" / "kernels").symlink_to("../kernels")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def outcome(folder, tests):
    # conftest decides anew between the interpreter and the emulator
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{folder}:{folder / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {tests}"
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout[-3000:] + done.stderr[-2000:]


@cache
def passes_without_a_fault(folder, tests):
    return outcome(folder, tests)


def test_every_fault_names_a_line_as_it_is():
    lost = [m.fault for m in MUTANTS if (ROOT / m.file).read_text().count(m.before) != 1 or m.after == m.before]
    assert not lost


@pytest.mark.nightly
@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.fault for mutant in MUTANTS])
def test_a_fault_is_found(mutant, copy):
    code, said = passes_without_a_fault(copy, mutant.tests)
    assert code == 0, said
    path = copy / mutant.file
    text = path.read_text()
    assert text.count(mutant.before) == 1 and mutant.after != mutant.before
    path.write_text(text.replace(mutant.before, mutant.after))
    try:
        code, said = outcome(copy, mutant.tests)
    finally:
        path.write_text(text)
    assert code == 1 and " failed" in said, said
