"""The base install is torch alone, and the folder kernels/ never hides Hugging Face's package of that name."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, *, cwd: Path, python: str = sys.executable, **environment: str) -> str:
    done = subprocess.run([python, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_neither_triton_nor_transformers(tmp_path):
    code = """
import sys
sys.modules |= dict.fromkeys(("triton", "transformers", "rich", "typer", "matplotlib"))  # importing None fails
import torch, alignloss
hidden, weight = torch.randn(2, 3, 4), torch.randn(7, 4)
print(alignloss.linear_logprob(hidden, weight, torch.ones(2, 3, dtype=torch.long)).shape)
"""
    assert "torch.Size([2, 3])" in run(code, cwd=tmp_path)


def test_import_loads_no_optional_package(tmp_path):
    code = "import sys, alignloss; print(sorted({'transformers', 'rich', 'typer', 'matplotlib'} & set(sys.modules)))"
    assert run(code, cwd=tmp_path).strip() == "[]"


@pytest.fixture
def scratch(tmp_path):
    """Install alignloss from a copy of the sources beside Hugging Face's `kernels`: (python, the copy's root)."""

    def install(*options: str) -> tuple[str, Path]:
        venv.create(tmp_path / "venv", with_pip=False)
        python = str(tmp_path / "venv" / "bin" / "python")
        packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
        (packages / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        source = tmp_path / "source"
        for name in ("alignloss", "kernels"):
            shutil.copytree(ROOT / name, source / name)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--force-reinstall"]
        subprocess.run([*pip, "kernels==0.11.0"], check=True, capture_output=True)
        subprocess.run([*pip, "--no-build-isolation", *options, str(source)], check=True, capture_output=True)
        return python, source

    return install


USE_BOTH = """
import transformers, kernels, alignloss, alignloss.kernels.blocks
assert hasattr(kernels, "get_kernel"), kernels
print(alignloss.__file__)
"""


def test_both_packages_work_from_a_wheel(scratch, tmp_path):
    python, _ = scratch()
    assert "site-packages" in run(USE_BOTH, cwd=tmp_path, python=python)


@pytest.mark.nightly
def test_both_packages_work_from_the_root_of_an_editable_install(scratch):
    # `python -c` puts the working directory first on sys.path, where the folder kernels/ lies
    python, source = scratch("-e")
    assert str(source) in run(USE_BOTH, cwd=source, python=python)


def test_transformers_works_from_the_root_without_the_other_package():
    # transformers imports whatever is called `kernels` when it looks for that package
    run(
        "from transformers import LlamaForCausalLM; import kernels; assert not hasattr(kernels, '__version__')",
        cwd=ROOT,
    )
