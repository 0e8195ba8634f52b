"""The benchmark and its GPU script run, at toy shapes: what a first minute on a GPU should not be spent on."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def benchmarks(*arguments, **environment):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(output, file) of a run over two numbers of tokens, half of them masked."""
    out = tmp_path_factory.mktemp("results")
    providers = ["alignloss", "full logits", "Liger", "CCE"]
    done = benchmarks(
        *("run", "--shapes", "32x256", "--tokens", "64", "128", "--masked", "0.5", "--rounds", "1"),
        *("--out", str(out), "--name", "toy", "--device", "cpu", "--providers", *providers),
        PYTHONPATH=str(hidden_peers(tmp_path_factory.mktemp("hidden"))),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, out / "toy.json"


def hidden_peers(folder):
    """A folder on the path in which Liger cannot be imported, and CCE fails when it runs."""
    (folder / "liger_kernel.py").write_text("raise ImportError('hidden')")
    (folder / "cut_cross_entropy.py").write_text("def linear_cross_entropy(*a, **k): raise RuntimeError('no driver')")
    return folder


def test_every_number_is_recorded_with_device_versions_and_commit(measured):
    document = json.loads(measured[1].read_text())
    assert {"command", "device", "threads", "versions", "commit", "units"} <= set(document)
    rows = {(row["tokens"], row["provider"], row["mode"]): row for row in document["rows"]}
    assert {provider for _, provider, _ in rows} == {"bare GEMMs", "alignloss", "full logits"}
    for tokens in (64, 128):
        step = rows[tokens, "alignloss", "DPO step"]
        assert step["labelled"] == tokens // 2
        assert step["seconds"] > 0 and step["of_alignloss"] == 1
        # 3 GEMMs of 2 N V H
        assert step["tflops"] * step["seconds"] == pytest.approx(3 * 2 * tokens // 2 * 256 * 32 * 1e-12)
        assert step["gradient_bytes"] == 4 * 32 * (tokens + 256)
        # hidden, weight, labels, upstream
        assert step["input_bytes"] == 4 * 32 * (tokens + 256) + 12 * tokens
        assert step["workspace_bytes"] > 0
        assert 0 < step["dhidden_error"] < 1e-5
        assert rows[tokens, "full logits", "forward"]["logps_error_rms"] < 1e-5


def test_a_missing_peer_is_a_line(measured):
    assert "Liger is left out: hidden" in measured[0]
    assert "CCE does not run here: RuntimeError: no driver" in measured[0]


def test_time_and_memory_are_plotted(measured):
    assert measured[1].with_name("toy-tokens.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "gpt-5"], "HxV or one of smollm2-135m"),
        (["--tokens", "63"], "8 sequences of one length; got 63"),
        (["--masked", "1.0"], "in [0, 1); got 1.0"),
        (["--rounds", "0"], "rounds are at least 1"),
        (["--measure", "step", "--shapes", "32x256"], "needs shapes of models"),
    ],
)
def test_bad_input_is_explained(arguments, message, tmp_path):
    done = benchmarks("run", "--out", str(tmp_path), *arguments)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_run_of_one_measure_is_plotted_and_one_of_nothing_says_so(tmp_path):
    common = ["run", "--shapes", "32x256", "--tokens", "64", "128", "--device", "cpu", "--providers", "alignloss"]
    done = benchmarks(*common, "--measure", "memory", "--modes", "forward", "--out", str(tmp_path))
    assert done.returncode == 0 and (tmp_path / "latest-tokens.png").exists(), done.stderr
    done = benchmarks(*common, "--measure", "error", "--modes", "frozen head", "--out", str(tmp_path))
    assert done.returncode == 0 and "nothing of this was to be measured" in done.stdout
    (tmp_path / "other.json").write_text("{}")
    done = benchmarks("plot", str(tmp_path / "other.json"))
    assert done.returncode == 1 and "is no file that `run` wrote" in done.stderr


def test_the_gpu_script_installs_tests_and_measures_without_network(tmp_path):
    source, out = tmp_path / "source", tmp_path / "results of it"
    for name in ("alignloss", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(tmp_path / "venv", with_pip=False)
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (packages / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    done = subprocess.run(
        ["bash", str(source / "benchmarks" / "gpu.sh"), str(out), "--toy", "--parts", "install tests time memory"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(tmp_path / "venv" / "bin" / "python")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== everything finished" in done.stdout
    assert {path.name for path in out.iterdir()} == {
        "log.txt",
        "toy-time.json",
        "toy-memory.json",
    }
    assert list(packages.glob("*alignloss*"))
    for arguments, message in (([], "--wheels DIR"), (["--parts", "tset"], "no part tset"), (["--parts"], "--wheels")):
        command = ["bash", str(source / "benchmarks" / "gpu.sh"), *([str(out)] if arguments else []), *arguments]
        usage = subprocess.run(command, capture_output=True, text=True)
        assert usage.returncode == 2 and message in usage.stdout
