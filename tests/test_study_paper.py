"""The paper's runs as a whole, with a tiny model: plan, data, training, a local task, answers, judgments, report."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
pandas, transformers, yaml = (pytest.importorskip(name) for name in ("pandas", "transformers", "yaml"))
for package in ("scipy", "peft", "trl", "tokenizers"):
    pytest.importorskip(package)
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from benchmarks.study import harness, paper, rows  # noqa: E402
from benchmarks.study.plan import as_text, read_plan  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[1]
LETTERS = [chr(code) for code in range(32, 127)]
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}a:{% endif %}"  # noqa: E501
TASK = """
task: local_letters
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def model(folder, template):
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "\n", *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    for part in (transformers.LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    names = ["ab", "cd", "efg", "h", "gh", "ba", "dc", "hh"]
    chat = lambda prompt, text: [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    pairs = [{"prompt": f"{n}?", "chosen": chat(f"{n}?", f"yes {n}"), "rejected": chat(f"{n}?", "no")} for n in names]
    written(folder / "questions.jsonl", [{"question": f"{name}?"} for name in names])
    (folder / "tasks").mkdir()
    (folder / "tasks/local.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    turns = [{"question_id": 81, "category": "writing", "turns": ["ab?", "cd?"]}]
    entries = {
        "base": model(folder / "base", None),
        "instruct": model(folder / "instruct", TEMPLATE),
        "sft_data": {"name": str(written(folder / "sft.jsonl", [{"messages": row["chosen"]} for row in pairs]))},
        "pairs": {"name": str(written(folder / "pairs.jsonl", pairs))},
        "count": 8,
        "train": {"steps": 1, "batch_size": 4, "max_length": 64, "cpu": True, "lora": 2},
        "sft": {"learning_rate": 1e-3},
        "methods": {name: {"learning_rate": 1e-3} for name in ("sft", "dpo", "kto")},
        "tasks": {"local_letters": {"metric": "acc,none", "family": "truthfulness", "examples": 0}},
        "task_folder": str(folder / "tasks"),
        "mt_bench": str(written(folder / "mt.jsonl", turns)), "answer_tokens": 3,
    }  # fmt: skip
    entries["methods"]["dpo"]["beta"] = 0.5
    (folder / "plan.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    return folder / "plan.yaml"


def study(plan, out):
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "study",
        "--profile",
        "paper",
        "--plan",
        str(plan),
        "--out",
        str(out),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.nightly
def test_from_a_plan_to_a_report(plan, tmp_path):
    out = tmp_path / "out"
    done = study(plan, out)
    assert done.returncode == 0, done.stderr[-2000:]
    with open(out / "runs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["scenario"], line["method"], line["pairs"], line["rows"]) for line in lines] == [
        (scenario, method, "8", "8") for scenario in paper.SCENARIOS for method in ("sft", "dpo", "kto")
    ]
    assert all(0 <= float(line[name]) <= 1 for line in lines for name in ("local_letters", "start_local_letters"))
    configs = {path.stem: yaml.safe_load(path.read_text()) for path in (out / "configs").iterdir()}
    # as many pairs in a step; adapters beside the start with its own merged
    assert [configs[f"after_SFT-{method}-0-8"]["batch_size"] for method in ("dpo", "kto")] == [4, 8]
    assert configs["after_SFT-dpo-0-8"]["model"] == str(out / "runs/start-0/merged")
    assert (out / "runs/after_SFT-dpo-0-8/model/adapter_model.safetensors").exists()
    answers = [json.loads(line) for line in (out / "answers/without_SFT-sft-0-8.jsonl").read_text().splitlines()]
    assert answers[0]["question_id"] == 81 and len(answers[0]["choices"][0]["turns"]) == 2
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "After SFT, alignment gains (truthfulness)" in page
    # gone on with: nothing is trained or scored again, and a judge's scores are read
    folders = [out / name for name in ("runs", "scores", "answers", "data")]
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}
    (out / "mt_bench.csv").write_text("name,score\nwithout_SFT-sft-0-8,5.5\n")  # and none of the start
    done = study(plan, out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert before == {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}
    with open(out / "runs.csv", newline="") as file:
        line = {(line["scenario"], line["method"]): line for line in csv.DictReader(file)}["without SFT", "sft"]
    assert (line["mt_bench"], line["start_mt_bench"]) == ("5.5", "")
    assert {line["beta"] for line in lines} == {"1.0", "0.5", "0.1"}
    # another family says no more than where a score stands
    text = plan.read_text()
    other = plan.with_name("family.yaml")
    other.write_text(text.replace("family: truthfulness", "family: reasoning"))
    assert study(other, out).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}
    # another fine-tuning at the start: nothing that began with the old one passes for its own
    other = plan.with_name("other.yaml")
    other.write_text(text.replace("sft:\n  learning_rate: 0.001", "sft:\n  learning_rate: 0.002"))
    assert other.read_text() != text
    done = study(other, out)
    assert done.returncode == 1 and "start-0 was trained with other options" in done.stderr


def test_rows_are_read_whatever_their_form():
    def chat(*texts):
        roles = ("user", "assistant") * 2
        return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]

    more = [{"role": "user", "content": "a", "name": "b"}, {"role": "assistant", "content": "b"}]
    for row in (
        {"prompt": "a", "chosen": chat("a", "b"), "rejected": chat("a", "c"), "messages": chat("x", "y")},
        {"prompt": chat("a"), "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": more, "rejected": "c"},
    ):
        assert rows.read_row(row) == (chat("a"), "b", "c")
    assert rows.read_row({"messages": chat("a", "x", "y", "b")}) == (chat("a", "x", "y"), "b", None)
    assert rows.read_row({"prompt": "a", "completion": "b"}) == (chat("a"), "b", None)
    assert as_text(chat("a", "x", "y")) == "User: a\n\nAssistant: x\n\nUser: y\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, r"row 1, with chosen, rejected: KeyError\('prompt'\)"),
        ({"prompt": "a", "chosen": "b"}, r"KeyError\('rejected'\)"),
        (
            {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
            "not the assistant's",
        ),
    ],
)
def test_rows_that_cannot_be(plan, tmp_path, row, message):
    made = read_plan(plan)
    made.pairs.name = str(written(tmp_path / "pairs.jsonl", [row]))
    with pytest.raises(SystemExit, match=message):
        rows.write_rows(made, tmp_path, "dpo", 0, 1, chat=True)


def test_the_plan_that_comes_with_it():
    plan = read_plan(ROOT / "benchmarks/study/paper.yaml")
    assert len(plan.tasks) == 12 and set(plan.methods) == {"sft", "dpo", "ipo", "kto", "cpo"}
    assert len(paper.trainings(plan)) == 3 * 5 + 2 * 5
    again = plan.model_copy(update={"sizes": [plan.count]})
    assert len(paper.trainings(again)) == 3 * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None, "bose": 1}, "base: Field required; bose: Extra inputs"),
        ({"methods": {"dpo": {"beta": 1}}}, "methods.dpo.learning_rate: Field required"),
        ({"methods": {"dpp": {"learning_rate": 1}}}, "methods: Value error, .*got 'dpp'; did you mean"),
        ({"tasks": {"mmlu": {"metric": "acc"}}}, "tasks.mmlu.family: Field required"),
        ({"pairs": "a/b"}, "pairs: Input should be a valid dictionary"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"count": 0}, "count: Input should be greater than 0"),
        ({"mt_bench": "nowhere.jsonl"}, "mt_bench: Value error, there is no nowhere.jsonl"),
        ({"pairs": {"name": "nowhere.jsonl"}}, "pairs.name: Value error, there is no file nowhere.jsonl"),
        ({"tasks": {"mmlu": {"metric": "acc", "family": "x"}}}, "tasks.mmlu.family: Input should be 'dialogue'"),
    ],
)
def test_a_plan_that_cannot_be(plan, tmp_path, change, message):
    entries = yaml.safe_load(plan.read_text()) | change
    entries = {name: value for name, value in entries.items() if value is not None}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(entries))
    with pytest.raises(SystemExit, match=message):
        read_plan(path)
    with pytest.raises(SystemExit, match="cannot be read"):
        read_plan(tmp_path / "none.yaml")


REFUSED_ALIKE = [
    ({"methods": {"dpo": {"learning_rate": 1e-3, "betta": 0.1}}}, "methods.dpo: unknown option 'betta'; did you"),
    ({"methods": {"dpo": {"learning_rate": -1}}}, "methods.dpo: --learning-rate must be a number from 0 on"),
    ({"seeds": [-1]}, "--seed must lie in"),
    ({"train": {"stepps": 1}}, "unknown option 'stepps'"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"methods": {"dpo": {"learning_rate": 1e-3, "beta": -0.1}}},
            "methods.dpo: .*beta must lie in",
            marks=pytest.mark.nightly,
        ),
        ({"sft": {"learning_rate": "fast"}}, "sft.learning_rate: Input should be a valid number"),
        pytest.param(
            {"sft": {"learning_rate": 1e-3, "epochs": 1}},
            "sft: --steps and --epochs are both given",
            marks=pytest.mark.nightly,
        ),
        pytest.param({"base": "/nowhere/model"}, "sft: there is no folder /nowhere/model", marks=pytest.mark.nightly),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in REFUSED_ALIKE),
    ],
)
def test_options_that_a_training_would_refuse(plan, tmp_path, change, message):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(plan.read_text()) | change))
    with pytest.raises(SystemExit, match=message):
        paper.run_all(read_plan(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_is_known_by_its_files(plan):
    folder = Path(read_plan(plan).base)
    before = paper._given("base", str(folder))
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"abcd")
    after = paper._given("base", str(folder))
    weights.write_bytes(content)
    assert before.made_of != after.made_of and before == paper._given("base", str(folder))


def test_questions_are_known_by_all_files_beside_the_tasks_and_those_they_name(plan):
    made = read_plan(plan)
    tasks = Path(made.task_folder)
    (tasks / "utils.py").write_text("")
    found = {path.name for path in harness.files_of(made)}
    assert found == {"local.yaml", "utils.py", "questions.jsonl", "mt.jsonl"}


def test_a_set_of_fewer_pairs(plan, tmp_path):
    with pytest.raises(SystemExit, match="has 8 pairs; the plan asks for 9"):
        rows.write_rows(read_plan(plan), tmp_path, "dpo", 0, 9, chat=True)


def test_judgments_name_their_models(tmp_path):
    path = tmp_path / "mt_bench.csv"
    assert paper.judgments(path, {"base"}) == {}
    path.write_text("name,score\nbase,2\n")
    assert paper.judgments(path, {"base"}) == {"base": 2.0}
    with pytest.raises(SystemExit, match="has scores of base; the models are instruct"):
        paper.judgments(path, {"instruct"})
    for text, message in (
        ("model,score\nbase,2\n", "needs a name and a score"),
        ("name,score\nbase,nan\n", "nan is not from 1 to 10"),
        ("name,score\nbase,11\n", "11.0 is not from 1 to 10"),
        ("name,score\nbase,2\nbase,3\n", "base twice"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit, match=message):
            paper.judgments(path, {"base"})
