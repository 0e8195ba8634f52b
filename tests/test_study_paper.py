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

from benchmarks.study import paper  # noqa: E402
from benchmarks.study.plan import Plan, read_plan  # noqa: E402

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
        "count": 8, "sizes": [4],
        "train": {"steps": 1, "batch_size": 4, "max_length": 64, "cpu": True},
        "methods": {"sft": {"learning_rate": 1e-3}, "dpo": {"learning_rate": 1e-3, "lora": 2}},
        "tasks": {"local_letters": {"metric": "acc,none", "family": "truthfulness", "examples": 0}},
        "task_folder": str(folder / "tasks"),
        "mt_bench": str(written(folder / "mt.jsonl", turns)), "answer_tokens": 3,
    }  # fmt: skip
    (folder / "plan.yaml").write_text(yaml.safe_dump(entries))
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
    assert [(line["scenario"], line["method"], line["pairs"]) for line in lines] == [
        (scenario, method, "8") for scenario in paper.SCENARIOS for method in ("sft", "dpo")
    ] + [("after SFT", method, "4") for method in ("sft", "dpo")]
    assert all(0 <= float(line[name]) <= 1 for line in lines for name in ("local_letters", "start_local_letters"))
    assert (out / "runs/after_SFT-dpo-0-8/model/adapter_model.safetensors").exists()
    answers = [json.loads(line) for line in (out / "answers/without_SFT-sft-0-8.jsonl").read_text().splitlines()]
    assert answers[0]["question_id"] == 81 and len(answers[0]["choices"][0]["turns"]) == 2
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "Alignment after SFT gains (truthfulness)" in page
    # gone on with: nothing is trained or scored again, and a judge's scores are read
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    (out / "mt_bench.csv").write_text("name,score\nbase,2\nwithout_SFT-sft-0-8,5.5\n")
    done = study(plan, out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    with open(out / "runs.csv", newline="") as file:
        line = {(line["scenario"], line["method"]): line for line in csv.DictReader(file)}["without SFT", "sft"]
    assert (line["mt_bench"], line["start_mt_bench"]) == ("5.5", "2.0")
    # another plan in the same folder
    plan.write_text(plan.read_text().replace("learning_rate: 0.001", "learning_rate: 0.002", 1))
    done = study(plan, out)
    assert done.returncode == 1 and "other options than the plan now says" in done.stderr


def test_rows_are_read_whatever_their_form(tmp_path):
    chat = lambda *texts: [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts)]  # noqa: B905
    path = written(
        tmp_path / "rows.jsonl",
        [
            {"prompt": "a", "chosen": chat("a", "b"), "rejected": chat("a", "c")},
            {"prompt": chat("a"), "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"},
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"messages": chat("a", "x", "y", "b")},
            {"prompt": "a", "completion": "b"},
        ],
    )
    rows = list(paper.rows_of({"name": str(path)}))
    assert rows[:3] == [(chat("a"), "b", "c")] * 3
    assert rows[3:] == [(chat("a", "x", "y"), "b", None), (chat("a"), "b", None)]
    assert paper.as_text(rows[3][0]) == "User: a\n\nAssistant: x\n\nUser: y\n\nAssistant:"


def test_the_plan_that_comes_with_it():
    plan = read_plan(ROOT / "benchmarks/study/paper.yaml")
    assert len(plan.tasks) == 12 and set(plan.methods) == {"sft", "dpo", "ipo", "kto", "cpo"}
    runs = paper.trainings(plan)
    assert len(runs) == len(set(runs)) == 3 * 5 + 2 * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None, "bose": 1}, r"unknown entries \['bose'\], missing ones \['base'\]"),
        ({"methods": {"dpo": {"beta": 1}}}, "methods.dpo needs a learning_rate"),
        ({"tasks": {"mmlu": {"metric": "acc"}}}, "tasks.mmlu needs metric and family"),
    ],
)
def test_a_plan_that_cannot_be(plan, tmp_path, change, message):
    entries = yaml.safe_load(plan.read_text()) | change
    entries = {name: value for name, value in entries.items() if value is not None}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(entries))
    with pytest.raises(SystemExit, match=message):
        read_plan(path)


def test_a_set_of_fewer_pairs(plan, tmp_path):
    made = Plan(**yaml.safe_load(plan.read_text()))
    with pytest.raises(SystemExit, match="has 8 pairs; the plan asks for 9"):
        paper._data(made, tmp_path, "dpo", 0, 9, chat=True)
