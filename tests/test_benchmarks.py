"""The benchmark and its GPU script run, at toy shapes: what a first minute on a GPU should not be spent on."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.accuracy import Setting, exact_logps, make, measure_accuracy, summary
from benchmarks.cases import case
from benchmarks.measure import search
from benchmarks.report import plot

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
    assert {provider for _, provider, _ in rows} == {"bare GEMMs", "F.linear", "alignloss", "full logits"}
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
        *((["--name", name], f"without folders; got {name!r}") for name in ("../other", "..", "")),
        (["accuracy", "--masked", "0.5"], "leave out --masked"),
        (["accuracy", "--most", "9"], "leave out --masked and --most"),
        (["--pairs", "0"], "sequences come in pairs; got 0"),
        (["step"], "a whole step needs shapes of models, out of smollm2-135m"),
    ],
)
def test_bad_input_is_explained(arguments, message, tmp_path, monkeypatch):
    command = () if arguments[0] in ("step", "accuracy") else ("run",)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *command, *arguments, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=re.escape(message)):
        main()


@pytest.mark.nightly
def test_a_run_of_one_measure_is_plotted_and_one_of_nothing_says_so(tmp_path):
    common = ["run", "--shapes", "32x256", "--tokens", "64", "128", "--device", "cpu", "--providers", "alignloss"]
    done = benchmarks(*common, "--measure", "memory", "--modes", "forward", "--out", str(tmp_path))
    assert done.returncode == 0 and (tmp_path / "latest-tokens.png").exists(), done.stderr
    done = benchmarks(*common, "--measure", "error", "--modes", "frozen head", "--out", str(tmp_path))
    assert done.returncode == 0 and "nothing of this was to be measured" in done.stdout
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match="is no file that `run` wrote"):
        plot(tmp_path / "other.json")


def test_what_fits_is_searched_for_up_to_a_limit():
    def needed(size):
        if size > 200:
            raise MemoryError("no more")
        return 10 * size

    # 8, 16, 32, 64 fit, 128 does not; halfway back 96 does, 112 and 104 do not
    assert search(needed, 1000, 8, 1 << 20, 1) == (96, "104: 9.69e-07 GiB")
    # 160 fits, 320 and 240 do not, 200 does
    assert search(needed, 10_000, 40, 1 << 20, 40) == (200, "240: MemoryError: no more")
    assert search(needed, 10_000, 8, 20, 1) == (16, "the most that was tried, 20")
    assert search(needed, 10, 8, 20, 2)[0] == 0


@pytest.mark.nightly
def test_the_most_tokens_that_fit_are_measured(tmp_path):
    common = ["run", "--shapes", "32x256", "--tokens", "64", "--device", "cpu", "--modes", "forward"]
    done = benchmarks(
        *(*common, "--measure", "longest", "--memory", "0.002", "--providers", "alignloss", "full logits"),
        *("--out", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    rows = {row["provider"]: row for row in json.loads((tmp_path / "latest.json").read_text())["rows"]}
    # 0.002 GiB: a position of full logits takes two rows of 256 floats, 32 of hidden states, label and upstream
    most = (0.002 * 2**30 - 4 * 32 * 256) / (4 * (2 * 256 + 32) + 12)
    assert 0.8 * most <= rows["full logits"]["most_tokens"] <= most
    assert rows["alignloss"]["most_tokens"] > 3 * rows["full logits"]["most_tokens"]
    assert "GiB" in rows["alignloss"]["stopped_by"]


@pytest.mark.nightly
def test_a_whole_step_is_measured_beside_its_estimate(tmp_path):
    done = benchmarks(
        *("step", "--shapes", "smollm2-135m", "--lengths", "16", "--rounds", "1", "--train", "lora", "--optimizer"),
        *("--providers", "alignloss", "full logits", "--dtype", "bfloat16", "--device", "cpu", "--out", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "latest.json").read_text())["rows"]
    assert [(row["provider"], row["mode"]) for row in rows] == [
        ("alignloss", "lora, AdamW"),
        ("full logits", "lora, AdamW"),
    ]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"])
        assert row["peak_bytes"] == pytest.approx(row["estimated_bytes"], rel=0.1)


@pytest.mark.nightly
def test_block_sizes_and_profiles_are_measured(tmp_path):
    common = ["--shapes", "32x256", "--tokens", "64", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    done = benchmarks("kernels", *common, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "latest.json").read_text())["rows"]
    assert {row["mode"] for row in rows} >= {
        "statistics",
        "fold, for U",
        "gradient of held logits",
        "forward",
        "frozen head",
        "DPO step",
    }
    assert not any("failed" in row for row in rows)
    gemms = [row["provider"] for row in rows if row["provider"].startswith("Triton GEMM") and row["tflops"] > 0]
    assert gemms and any(name.endswith("relative to the target") for name in gemms)
    done = benchmarks("run", *common, "--measure", "profile", "--providers", "alignloss", "--modes", "forward")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "latest.json").read_text())["rows"]
    assert 0.3 < sum(row["share"] for row in rows) <= 1 + 1e-9
    assert "aten::addmm" in {row["kernel"] for row in rows}


def test_accuracy_is_measured_against_float64_where_distributions_are_sharp_and_offset():
    chosen = case("64x500", tokens=256, masked=0.0, dtype="float32", device="cpu", sequences=2)
    rows = []
    for setting in (Setting("certain", 0.0), Setting("flat", 30.0)):
        found = measure_accuracy(chosen, setting, ["alignloss", "full logits"])
        rows += [{"vocabulary": chosen.vocabulary} | row for row in found]
    ours, logits, *_ = rows
    logps = exact_logps(make(chosen, Setting("certain", 0.0)))
    assert 0.99 < logps.mean().exp() < 1
    assert 3 * ours["logps_error_rms"] < logits["logps_error_rms"] < 1e-5
    assert 3 * ours["dhidden_error"] < logits["dhidden_error"] < 0.1
    mine, other = summary(rows)
    assert mine["sum_error_of_alignloss"] == 1 and other["dhidden_error"] == logits["dhidden_error"]


@pytest.mark.nightly
def test_the_time_of_the_host_is_measured_with_launches_that_do_nothing(tmp_path):
    pytest.importorskip("trl")
    toy = "host", "--shapes", "llama-3-8b", "--rounds", "2", "--out", str(tmp_path)
    assert "kernels are to be compiled" in benchmarks(*toy, TRITON_INTERPRET="1").stderr
    done = benchmarks(*toy, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    rows = {(r["provider"], r["mode"]): r for r in json.loads((tmp_path / "latest.json").read_text())["rows"]}
    assert not any("failed" in row or row["seconds"] <= 0 for row in rows.values())
    # rows and their targets, exponentials, their repair and sums, results; and the GEMM of U
    assert rows["alignloss", "frozen head"]["calls"] == 7
    assert rows["alignloss", "DPO step, a further group"]["groups"] > 2


@pytest.mark.nightly
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
        [
            "bash",
            str(source / "benchmarks" / "gpu.sh"),
            str(out),
            "--toy",
            "--parts",
            "install tests time memory",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(tmp_path / "venv" / "bin" / "python"), "ALIGNLOSS_COMMIT": "0123456789ab"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== everything finished" in done.stdout
    assert {path.name for path in out.iterdir()} == {
        "log.txt",
        "toy-time.json",
        "toy-memory.json",
        "results.tar.gz",
    }
    assert json.loads((out / "toy-time.json").read_text())["commit"] == "0123456789ab"
    assert list(packages.glob("*alignloss*"))
    for arguments, message in (([], "--wheels DIR"), (["--parts", "tset"], "no part tset"), (["--parts"], "--wheels")):
        command = ["bash", str(source / "benchmarks" / "gpu.sh"), *([str(out)] if arguments else []), *arguments]
        usage = subprocess.run(command, capture_output=True, text=True)
        assert usage.returncode == 2 and message in usage.stdout


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("command", "options", "providers"),
    [
        ("step", ("--trainers", "--prompts", "0.5"), {"TRL", "alignloss", "alignloss, shared prompts"}),
        ("references", ("--examples", "3"), {"TRL", "alignloss", "alignloss, score"}),
    ],
)
def test_trainers_beside_trl(command, options, providers, tmp_path):
    pytest.importorskip("trl")
    done = benchmarks(
        *(command, "--shapes", "smollm2-135m", "--lengths", "32", "--pairs", "1", "--rounds", "1", *options),
        *("--device", "cpu", "--out", str(tmp_path), "--name", "toy"),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "toy.json").read_text())["rows"]
    assert {row["provider"] for row in rows} == providers
    for row in rows:
        assert "failed" not in row and row["seconds"] > 0 and row["of_alignloss"] > 0
        assert row.get("nats_apart", 0) < 1e-2  # float32 sums of some hundred nats
