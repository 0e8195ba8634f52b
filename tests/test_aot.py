"""Every kernel configuration compiles for GPUs that are not here, within their resources."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(other, marks=pytest.mark.nightly) for other in ("sm_80", "sm_100", "gfx942"))]
)
def test_kernels_compile_within_resources(target, tmp_path):
    path = tmp_path / "report.json"
    # in a process of its own: the interpreter, on for the other tests, is chosen at import
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run(
        [sys.executable, "-m", "alignloss.kernels.aot", str(path), target], check=True, env=environment, cwd=tmp_path
    )
    rows = json.loads(path.read_text())["kernels"]
    assert len(rows) >= 43
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert not row["warnings"], row
        assert row["tensor_cores"] or not row["wants_tensor_cores"], row
    if target.startswith("sm_"):
        # each read of a float32 tile, whatever the width of the slice, goes by 16 bytes
        for kernel, loads in (("fold_fwd", 2), ("dlogits_bwd", 1), ("held_bwd[fp32", 1), ("kl_fwd", 4), ("kl_bwd", 2)):
            found = [row["vector_loads"] for row in rows if row["variant"].startswith(kernel)]
            assert len(found) >= 2 and min(found) >= loads, (kernel, found)
        # and so does each read of a bias, where that width is a multiple of 16
        for kernel, loads in (("fold_fwd", 4), ("dlogits_bwd", 2), ("kl_fwd", 8), ("kl_bwd", 4)):
            whole = [row for row in rows if row["variant"].startswith(kernel) and "all=True, whole" in row["variant"]]
            assert whole and min(row["vector_loads"] for row in whole) >= loads, (kernel, whole)
