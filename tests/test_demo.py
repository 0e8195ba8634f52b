"""The demo: its data follow their rules, and both arms agree."""

import calendar
import importlib.util
import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest
import torch

from alignloss.commands.measure import peak_bytes

Row = tuple[str, str, str]
SCRIPT = Path(__file__).parents[1] / "scripts" / "make_preferences.py"
DATA = files("alignloss.commands").joinpath("data/preferences.jsonl")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_preferences", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_data_file_is_what_the_script_writes(script: ModuleType, tmp_path: Path) -> None:
    assert DATA.read_bytes() == script.make_text().encode()
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "again.jsonl")], check=True)
    assert (tmp_path / "again.jsonl").read_bytes() == DATA.read_bytes()


def test_data_file_is_valid() -> None:
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 360
    assert all(list(row) == ["prompt", "chosen", "rejected"] for row in rows)
    assert all(isinstance(text, str) and text and text == text.strip() for row in rows for text in row.values())
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_length_does_not_give_the_answer_away() -> None:
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / len(rows)
    shorter = sum(len(row["chosen"]) < len(row["rejected"]) for row in rows) / len(rows)
    assert longer > 0.2
    assert shorter > 0.2


def check_arithmetic(prompt: str, chosen: str, rejected: str) -> None:
    a, sign, b = re.fullmatch(r"What is (\d+) ([-+*]) (\d+)\?", prompt).groups()
    result = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
    assert chosen == f"{a} {sign} {b} = {result}."
    assert abs(int(re.fullmatch(rf"{a} \{sign} {b} = (\d+)\.", rejected)[1]) - result) in (1, 2, 3, 10)


UNITS = {"metres": 1, "centimetres": 0.01, "kilometres": 1e3, "kilograms": 1, "grams": 1e-3, "litres": 1}
UNITS |= {"millilitres": 1e-3, "seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800}
UNITS |= {"inches": 1, "feet": 12, "yards": 36}


def check_unit_conversion(prompt: str, chosen: str, rejected: str) -> None:
    small, count, large = re.fullmatch(r"How many (\w+) are in (\d+) (\w+)\?", prompt).groups()
    result = int(count) * UNITS[large] / UNITS[small]
    assert float(chosen.removesuffix(f" {small}.")) == pytest.approx(result)
    assert float(rejected.removesuffix(f" {small}.")) != pytest.approx(result)


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def check_ordering(prompt: str, chosen: str, rejected: str) -> None:
    assert numbers(chosen) == sorted(numbers(prompt)) == sorted(numbers(rejected)) != numbers(rejected)


def check_past_tense(prompt: str, chosen: str, rejected: str) -> None:
    verb = prompt.split('"')[1]
    past, regular = chosen.split('"')[1], rejected.split('"')[1]
    assert regular == re.sub("eed$", "ed", verb + "ed")
    assert past != regular
    assert not past.endswith("ed") or verb.endswith("eed")


def check_spelling(prompt: str, chosen: str, rejected: str) -> None:
    right, wrong = chosen.split('"')[1], rejected.split('"')[1]
    assert sorted(prompt.split('"')[1::2]) == sorted([right, wrong])


def check_concise(prompt: str, chosen: str, rejected: str) -> None:
    assert rejected.lower().endswith(chosen.lower())
    assert len(rejected) > len(chosen) + 25


def check_polite(prompt: str, chosen: str, rejected: str) -> None:
    assert chosen.startswith(("Thank you", "I am sorry"))
    assert chosen.split(".")[1].strip() in rejected
    assert re.search(r"Say (\w+)\.", prompt)[1] in rejected


FORMATS = {
    "separated by commas": r"\w+, \w+, \w+",
    "in capital letters, with spaces between": r"[A-Z]+ [A-Z]+ [A-Z]+",
    "as a numbered list": r"1\. \w+ 2\. \w+ 3\. \w+",
    "joined by hyphens": r"\w+-\w+-\w+",
}


def check_list_format(prompt: str, chosen: str, rejected: str) -> None:
    pattern = FORMATS[prompt.split(", ", 1)[1].removesuffix(".")]
    assert re.fullmatch(pattern, chosen)
    assert not re.fullmatch(pattern, rejected)
    words = [set(re.findall(r"[a-z]+", text.lower())) for text in (chosen, rejected)]
    assert words[0] == words[1]
    assert len(words[0]) == 3


def check_straight_answer(prompt: str, chosen: str, rejected: str) -> None:
    what, item = re.fullmatch(r"Which (\w+) comes after (\w+)\?", prompt).groups()
    letters = [chr(ord("A") + i) for i in range(26)]
    items = {"day": list(calendar.day_name), "month": list(calendar.month_name)[1:], "letter": letters}[what]
    after = items[(items.index(item) + 1) % len(items)]
    assert chosen == f"After {item} comes {after}."
    assert not re.search(rf"\b{after}\b", rejected)


CHECKS = {
    "arithmetic": check_arithmetic,
    "unit_conversion": check_unit_conversion,
    "ordering": check_ordering,
    "past_tense": check_past_tense,
    "spelling": check_spelling,
    "concise": check_concise,
    "polite": check_polite,
    "list_format": check_list_format,
    "straight_answer": check_straight_answer,
}


@pytest.mark.parametrize("family", CHECKS)
def test_rule(script: ModuleType, family: str) -> None:
    rows: list[Row] = script.make_rows()[family]
    assert len(rows) == script.PER_FAMILY
    for row in rows:
        CHECKS[family](*row)


def test_tables_do_not_contradict_themselves(script: ModuleType) -> None:
    assert len(set(script.CAPITALS.values())) == len(script.CAPITALS)
    assert set(script.SPELLINGS).isdisjoint(script.SPELLINGS.values())
    assert all(len({word, *both}) == 3 for word, both in script.OPPOSITES.items())


def test_peak_bytes_counts_what_is_held_at_once() -> None:
    def work() -> torch.Tensor:
        a = torch.ones(1000, 250)  # 1 MB
        b = torch.cat([a, a])  # 2 MB beside it
        del a
        return b + 1  # 2 MB beside b

    assert peak_bytes(work) == pytest.approx(4_000_000, abs=1000)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    from alignloss.commands.demo import run

    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small, and threads that wait for a busy core cost more than they bring
    try:
        result = run("tiny", steps=2, out=out)
    finally:
        torch.set_num_threads(threads)
    assert json.loads((out / "demo.json").read_text()) == result
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    return result


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "cpo"])
def test_both_arms_agree(report: dict, name: str) -> None:
    result = report["results"][name]
    ours, theirs = result["alignloss"], result["full_logits"]
    assert len(ours["losses"]) == len(theirs["losses"]) == 2
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=2e-5)
    assert result["loss_difference"]["step_1"] <= 2e-5
    # relative to float64, in units of what plain torch reaches in float32
    assert ours["gradient_error"] <= 2 * theirs["gradient_error"]
    assert ours["peak_bytes"] < theirs["peak_bytes"]
    assert ours["accuracy_before"] == pytest.approx(theirs["accuracy_before"])


def test_report_says_where_it_was_measured(report: dict) -> None:
    assert report["environment"]["versions"]["torch"] == torch.__version__
    assert report["environment"]["device"]
    assert report["settings"]["steps"] == 2


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alignloss.commands", *arguments], cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.nightly
def test_cli_help(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    shown = command("--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "demo" in shown.stdout


def test_cli_refuses_an_unknown_model(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    refused = command("demo", "--model", "huge", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "alignloss: --model must be one of smollm2, tiny, got 'huge'\n"


@pytest.mark.parametrize(("package", "extra"), [("rich", "cli"), ("gguf", "demo")])
def test_cli_names_the_extra_when_a_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str, extra: str
) -> None:
    from alignloss.commands import __main__ as cli

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    monkeypatch.setattr(sys, "argv", ["alignloss", "demo"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    message = f"needs {package}; in the project's folder: pip install '.[{extra}]'"
    assert message in capsys.readouterr().err
