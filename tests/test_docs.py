"""The README, docs/ and docstrings: their Python code runs, prints what they show, and their links lead somewhere.

The code of docs/processes.md needs more than one process, and runs in test_processes.py; that of docs/train.md in
test_train.py.
"""

import copy
import doctest
import io
import json
import operator
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from test_processes import Model, V

import alignloss
import alignloss.hf

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
FENCED = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.M)
ELSEWHERE = ("docs/processes.md", "docs/train.md")
WITH_CODE = [name for name, text in TEXTS.items() if "```python\n" in text and name not in ELSEWHERE]
B, T = 2, 6


def stand_ins():
    """What the pages leave to the reader: small models, a batch of B pairs, the same batch packed."""
    torch.manual_seed(0)
    model, ref_model = Model(tied=False), Model(tied=False)
    input_ids = torch.randint(0, V, (2 * B, T))
    attention_mask = (torch.arange(T) < torch.tensor([[6], [5], [4], [6]])).long()
    completion_mask = attention_mask * (torch.arange(T) >= 2)
    labels = alignloss.next_token_labels(input_ids, completion_mask)
    hidden = model.model(input_ids, attention_mask).last_hidden_state.detach()
    ref_hidden = ref_model.model(input_ids, attention_mask).last_hidden_state.detach()
    ref_logps = alignloss.sequence_logprob(ref_hidden, ref_model.lm_head.weight, labels).logps.detach()
    keep = attention_mask.bool()
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "ref_logps": ref_logps,
    }
    return batch | {
        "alignloss": alignloss,
        "torch": torch,
        "B": B,
        "model": model,
        "ref_model": ref_model,
        "loader": [batch],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": alignloss.DPOLoss(),
        "hidden": hidden.requires_grad_(),
        "weight": copy.deepcopy(model.lm_head.weight),
        "labels": labels,
        "ref_hidden": ref_hidden,
        "ref_weight": ref_model.lm_head.weight,
        "packed_ids": input_ids[keep],
        "packed_completion_mask": completion_mask[keep],
        "packed_hidden": hidden[keep],
        "cu_seqlens": torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)),
        "pairs_in_all": 2 * B,
        "chosen_tokens_in_all": 20,
        "desirable": torch.arange(2 * B) % 2 == 0,
        "scores": torch.zeros(B),
        "prompts": [torch.tensor([1])],
        "completions": [torch.tensor([2])],
        "samples": [torch.tensor([3])],
        "generate": lambda prompts: [torch.tensor([3])],
        "sum_logps": lambda batch: torch.zeros(2),
        "pad_token_id": 0,
        "temperature": 0.7,
        "old_logps": torch.zeros(2 * B, T),
        "advantages": torch.ones(2 * B),
    }


def of_transformers(names):
    """The same names with a model of transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    config = transformers.Gemma2Config(vocab_size=V, **sizes, num_key_value_heads=1, pad_token_id=0)
    return names | {"model": transformers.Gemma2ForCausalLM(config), "batch": names["loader"][0]}


def of_trl(names, folder):
    """The same names with what a trainer of TRL takes."""
    test_trl = pytest.importorskip("test_trl")
    data = {
        "model": test_trl.model(),
        "ref_model": test_trl.model(1),
        "args": test_trl.arguments(test_trl.trl.DPOConfig, folder),
        "dataset": test_trl.PAIRS,
        "tokenizer": test_trl.tokenizer(),
    }
    return names | data


def run(page, folder=None):
    """Run the Python blocks of a page in order, in one namespace; what a block prints stands in the block after it."""
    names, blocks = stand_ins(), FENCED.findall(TEXTS[page])
    if page in ("docs/transformers.md", "docs/share-prompts.md", "docs/recipes.md"):
        names = of_transformers(names)
    if page == "docs/trl.md":
        names = of_trl(names, folder)
    for (language, code), (following, after) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language == "python":
            with redirect_stdout(io.StringIO()) as printed:
                exec(compile(code, page, "exec"), names)
            if page != "docs/trl.md":  # whose trainers print their logs
                assert printed.getvalue() == (after if following == "text" else "")
    return names


@pytest.mark.parametrize("page", WITH_CODE)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of trainers
def test_the_code_of_a_page_runs(page, tmp_path):
    run(page, tmp_path)


def test_the_training_loop_changes_the_model():
    names = run("README.md")
    assert names["out"].loss.isfinite() and names["labels"].shape == (2 * B, T)
    before, after = stand_ins()["model"].parameters(), names["model"].parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_code_of_the_losses_gives_gradients_and_metrics():
    names = run("docs/losses.md")
    names["loss"].backward()
    assert names["hidden"].grad.isfinite().all()
    assert names["logged"]["rewards/accuracies"] <= 1


def test_a_model_of_transformers_trains():
    names = run("docs/transformers.md")
    assert names["softcap"] == 30.0
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


def test_packed_sequences_have_the_loss_of_padded_ones():
    names = run("docs/batches.md")
    expected = names["loss_fn"](names["hidden"], names["weight"], names["labels"], ref_logps=names["ref_logps"])
    got = names["loss_fn"](
        names["packed_hidden"],
        names["weight"],
        names["packed_labels"],
        ref_logps=names["ref_logps"],
        cu_seqlens=names["padded"],
        real_sequences=names["real"],
    )
    torch.testing.assert_close(got.losses, expected.losses)


def test_the_table_has_every_loss_once():
    names = re.findall(r"^\| `(\w+)` \|", TEXTS["docs/losses.md"], re.M)
    assert sorted(names) == sorted(alignloss.losses.LOSSES)
    assert re.findall(r"any of (\d+) \[losses\]", TEXTS["README.md"]) == [str(len(names))]


def test_the_readme_is_short_and_its_measurements_are_those_of_the_pages():
    readme = TEXTS["README.md"]
    assert readme.count("\n") <= 180
    rows = re.search(r"^## Measured\n(.*?)^## ", readme, re.S | re.M).group(1).split("\n")
    rows = [row for row in rows if row.startswith("| ")]
    assert len(rows) > 5 and set(rows) <= {*TEXTS["docs/measured.md"].split("\n"), *TEXTS["docs/gpu.md"].split("\n")}


def test_the_numbers_of_a_gpu_are_those_of_the_result_file():
    providers = {
        "alignloss": "alignloss", "its 1, 2, 4 and 3 GEMMs, bare": "bare GEMMs", "TRL 1.16": "TRL",
        "Liger 0.8.5": "Liger", "Liger 0.8.5, CuTe kernels for sm_90": "Liger SM90", "full logits": "full logits",
    }  # fmt: skip
    found = json.loads((ROOT / "benchmarks/results/h200-time.json").read_text())
    measured = {(row["hidden"], row["provider"], row["mode"]): row for row in found["rows"]}
    checked = 0
    for hidden, table in re.findall(r"^\| H (\d+), V [\d,]+ \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXTS["docs/gpu.md"], re.M):
        for label, *cells in (line.strip("|").split("|") for line in table.splitlines()):
            for mode, cell in zip(("forward", "frozen head", "trainable head", "DPO step"), cells, strict=True):
                if cell.strip():
                    row = measured[int(hidden), providers[label.strip()], mode]
                    ratio = f" ({row['of_alignloss']:.2f}x)" if row["provider"] != "alignloss" else ""
                    assert cell.strip() == f"{row['seconds'] * 1e3:.1f}{ratio}"
                    checked += 1
    assert checked == 42
    assert re.search(rf"commit\s`{found['commit']}", TEXTS["docs/gpu.md"])


def test_the_shares_of_four_losses_are_those_of_the_result_file():
    result = json.loads((ROOT / "benchmarks/results/cpu-float32-smollm2-135m-curves.json").read_text())
    rows = re.findall(r"^\| (DPO|IPO|KTO|CPO) \| (.*) \| (.*) \|$", TEXTS["docs/train.md"], re.M)
    assert len(rows) == 4 and result["environment"]["commit"] in TEXTS["docs/train.md"]
    for loss, *cells in rows:
        for way, cell in zip(("lora", "full"), cells, strict=True):
            log = result["runs"][f"{loss.lower()}, {way}"]["log"]
            shares = [entry["eval_rewards/accuracies"] for entry in log if "eval_loss" in entry]
            assert cell == " → ".join(f"{share:.0%}" for share in shares)
            assert shares[-1] > shares[0]


def test_what_trains_within_a_limit_is_that_of_the_result_files():
    (section,) = re.findall(r"^## What trains within a limit\n(.*?)^## ", TEXTS["docs/measured.md"], re.M | re.S)
    rows = re.findall(r"^\| (alignloss|full logits|TRL 1.16) \| (.*) \|$", section, re.M)
    found = {}
    for name in ("limit", "limit-lora"):
        result = json.loads((ROOT / f"benchmarks/results/cpu-float32-smollm2-135m-{name}.json").read_text())
        assert result["commit"] in TEXTS["docs/measured.md"]
        for row in result["rows"]:
            size = next(key for key in ("most_length", "most_vocabulary") if key in row)
            found[row["provider"], row["mode"].split(",")[0], size] = row[size], row.get(f"estimated_{size}")
    columns = ("full", "most_length"), ("full", "most_vocabulary"), ("lora", "most_length")
    assert len(rows) == 3 and len(found) == 9
    for label, cells in rows:
        for column, cell in zip(columns, cells.split(" | "), strict=True):
            measured, expected = found[(label.removesuffix(" 1.16"), *column)]
            assert cell == f"{measured:,}" + (f" ({expected:,}, {expected / measured:.2f})" if expected else "")
            assert expected is None or abs(expected / measured - 1) <= 0.1


def anchors(text):
    """Of its headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_of_tests_lead_somewhere(page):
    text = FENCED.sub("", TEXTS[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            path = (PAGES[page].parent / name).resolve() if name else PAGES[page]
            assert path.exists(), target
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target
    for name in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / name).exists(), name


def test_every_page_is_in_the_index():
    listed = set(re.findall(r"^[\w-]+$", TEXTS["docs/index.md"], re.M))
    assert listed == {path.stem for name, path in PAGES.items() if name.startswith("docs/")} - {"index"}


@pytest.mark.parametrize("name", alignloss.__all__ + [f"hf.{name}" for name in alignloss.hf.__all__])
def test_the_examples_of_docstrings_run(name):
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    public = operator.attrgetter(name)(alignloss)
    (found,) = finder.find(public, name, globs=vars(alignloss.hf) | {"torch": torch, "alignloss": alignloss})
    assert runner.run(found).failed == 0
    # a tuple is what another's example returns
    assert found.examples or (isinstance(public, type) and issubclass(public, (tuple, Exception)))
