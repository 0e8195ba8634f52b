"""`score`: log-probabilities of a data set, right whatever the batches, kept, resumed, and taken by the trainers."""

import importlib

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from test_trl import METRICS, PAIRS, REFERENCE, UNPAIRED, V, logs, model, peft, trainer, trl

import alignloss.trl as ours
from alignloss.hf import score

module = importlib.import_module("alignloss.hf.score")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


def tokens(rows=9):
    draw = lambda most: [torch.randint(0, V - 3, (int(torch.randint(0, most, ())),)).tolist() for _ in range(rows)]
    columns = {"prompt_ids": draw(5), "chosen_ids": draw(7), "rejected_ids": draw(9)}
    columns["prompt_ids"][0], columns["chosen_ids"][1] = [], []
    columns["chosen_ids"][0] = [1, 2, 3]
    return Dataset.from_dict(columns)


def exact(made, prompt, completion, max_length=None):
    """The sum of a row by itself, from logits in float64."""
    ids = torch.tensor([(prompt + completion)[:max_length]])
    if ids.numel() < 2:
        return 0.0
    logps = torch.log_softmax(made(input_ids=ids).logits.double(), -1)[:, :-1].gather(-1, ids[:, 1:, None])
    return float(logps.detach().flatten()[max(len(prompt) - 1, 0) :].sum())


@pytest.mark.parametrize("max_length", [None, 6])
@pytest.mark.parametrize("batch_tokens", [1, 30, 16384])
def test_sums_are_those_of_each_row_by_itself(batch_tokens, max_length):
    made, data = model().train(), tokens()
    scored = score(made, data, batch_tokens=batch_tokens, max_length=max_length, progress=False)
    assert made.training
    assert scored.column_names == [*data.column_names, "ref_chosen_logps", "ref_rejected_logps"]
    for row in scored:
        for side in ("chosen", "rejected"):
            expected = exact(made.eval(), row["prompt_ids"], row[f"{side}_ids"], max_length)
            assert abs(row[f"ref_{side}_logps"] - expected) <= 2e-5 * max(1, abs(expected))


@pytest.fixture
def scored_rows(monkeypatch):
    """The rows that a model had to compute."""
    seen, original = [], module._scored
    monkeypatch.setattr(module, "_scored", lambda made, rows, pad: (seen.extend(rows), original(made, rows, pad))[1])
    return seen


def test_what_was_computed_is_read_back(scored_rows, tmp_path):
    made, data = model(), tokens()
    options = {"cache_dir": tmp_path / "scores", "progress": False}
    first = score(made, data, **options)
    count = len(scored_rows)
    assert count == 2 * len(data)
    assert score(model(), data, batch_tokens=20, **options).to_dict() == first.to_dict()  # another process, as it were
    assert len(scored_rows) == count
    # what the numbers depend on
    score(model(1), data, **options)
    score(made, data, max_length=5, **options)
    score(made, data.select(range(8)), **options)
    made.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    score(made, data, **options)
    made.config.rms_norm_eps = 0.1
    score(made, data, **options)
    assert len(scored_rows) == 5 * count + 2 * 8


def test_adapters_are_a_model_of_their_own(scored_rows, tmp_path):
    made, data = model(), tokens()
    options = {"cache_dir": tmp_path, "progress": False}
    base = score(made, data, **options)
    adapted = peft.get_peft_model(made, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    other = score(adapted, data, **options)
    with adapted.disable_adapter():
        again = score(adapted, data, **options)
    assert other["ref_chosen_logps"] != base["ref_chosen_logps"]
    torch.testing.assert_close(torch.tensor(again["ref_chosen_logps"][:]), torch.tensor(base["ref_chosen_logps"][:]))


def test_scaling_and_virtual_tokens_are_part_of_the_model(scored_rows, tmp_path):
    data, options = tokens(), {"cache_dir": tmp_path, "progress": False}
    for alpha in (8, 64):
        made = model()
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
        score(peft.get_peft_model(made, config), data, **options)
    for seed in (1, 2):
        made = model()
        torch.manual_seed(seed)
        prompted = peft.get_peft_model(made, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        score(prompted, data, **options)
    assert len(scored_rows) == 4 * 2 * len(data)
    base = score(model(), data, **options)
    assert len(scored_rows) == 5 * 2 * len(data)
    with prompted.disable_adapter():
        again = score(prompted, data, progress=False)
    assert again.to_dict() == base.to_dict()


def test_numbers_of_layers_and_buffers_that_are_not_saved_are_part_of_the_model(scored_rows, tmp_path):
    data, made = tokens(), model()
    for change in (
        lambda: None,
        lambda: setattr(made.model.norm, "variance_epsilon", 0.5),
        lambda: setattr(made.model.layers[0].self_attn, "scaling", 3.0),
        lambda: made.model.rotary_emb.inv_freq.mul_(0.3),
    ):
        scored_rows.clear()
        change()
        score(made, data, cache_dir=tmp_path, progress=False)
        assert len(scored_rows) == 2 * len(data)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    made, data, original, batches = model(), tokens(), module._scored, []

    def interrupted(*args):
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(len(args[1]))
        return original(*args)

    monkeypatch.setattr(module, "_scored", interrupted)
    options = {"cache_dir": tmp_path, "batch_tokens": 20, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        score(made.train(), data, **options)
    assert made.training
    rest = []
    monkeypatch.setattr(module, "_scored", lambda *args: (rest.append(len(args[1])), original(*args))[1])
    got = score(made, data, **options)
    assert sum(batches) > 0 and sum(batches) + sum(rest) == 2 * len(data)
    expected = score(made, data, progress=False)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        torch.testing.assert_close(torch.tensor(got[name][:]), torch.tensor(expected[name][:]), rtol=1e-5, atol=1e-5)


def test_files_that_are_not_whole_are_not_there(scored_rows, tmp_path):
    made, data = model(), tokens()
    options = {"cache_dir": tmp_path, "progress": False}
    expected = score(made, data, **options)
    (path,) = tmp_path.rglob("*.safetensors")
    written = path.read_bytes()
    path.with_suffix(".unfinished").write_bytes(written[:10])
    # cut off; an index and a log-probability of which a byte is another
    for position in (None, -16 * len(data) - 30, -1):
        (path,) = tmp_path.rglob("*.safetensors")
        path.write_bytes(written[:50] if position is None else damaged(written, position))
        with pytest.warns(UserWarning, match="cannot be read, and is computed again"):
            got = score(made, data, **options)
        assert got.to_dict() == expected.to_dict()
        path.unlink()
    assert len(scored_rows) == 2 * 4 * len(data)


def damaged(content, position):
    changed = bytearray(content)
    changed[position] ^= 0x55
    return bytes(changed)


def test_batches_of_a_trainer_are_no_larger_than_its_steps(tmp_path, monkeypatch):
    sizes, original = [], module._scored
    monkeypatch.setattr(module, "_scored", lambda *args: (sizes.append(len(args[1])), original(*args))[1])
    options = {"precompute_ref_log_probs": True, "per_device_train_batch_size": 2}
    trainer(ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, {"reference_cache": tmp_path / "cache"}, **options)
    assert sum(sizes) == 2 * len(PAIRS) and sizes[0] >= 4 and max(sizes) < 2 * len(PAIRS)
    options["truncation_mode"] = "keep_end"
    with pytest.raises(ValueError, match="cuts rows at their end"):
        trainer(ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, {"reference_cache": tmp_path / "cache"}, **options)


def test_the_trainers_take_what_was_scored(tmp_path):
    reference = model(1)
    options = {"precompute_ref_log_probs": True}
    expected = logs(
        trainer(trl.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, {"ref_model": lambda: reference}, **options)
    )
    made = trainer(ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, REFERENCE)
    scored = score(reference, made.train_dataset, cache_dir=tmp_path / "scores", progress=False)
    again = trainer(ours.DPOTrainer, trl.DPOConfig, scored, tmp_path, **options)
    for truth, got in zip(expected, logs(again), strict=True):
        for name, value in truth.items():
            assert abs(got[name] - value) <= METRICS * max(1, abs(value)), name


def test_unpaired_completions(tmp_path):
    reference = model(1)
    made = trainer(ours.KTOTrainer, trl.KTOConfig, UNPAIRED, tmp_path, REFERENCE, loss_type="apo_zero_unpaired")
    scored = score(reference, made.train_dataset, progress=False)
    row = scored[3]
    assert abs(row["ref_logps"] - exact(reference.eval(), row["prompt_ids"], row["completion_ids"])) <= 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.remove_columns("prompt_ids"), "score takes a datasets.Dataset with prompt_ids and one"),
        (lambda data: data.select_columns("prompt_ids"), "score takes a datasets.Dataset with prompt_ids and one"),
        (lambda data: data.to_dict(), "got dict"),
        (lambda data: data.add_column("ref_chosen_logps", [0.0] * 9), r"has \['ref_chosen_logps'\] already"),
    ],
)
def test_other_data(change, message):
    with pytest.raises(ValueError, match=message):
        score(model(), change(tokens()), progress=False)
    with pytest.raises(ValueError, match="batch_tokens must be a positive number"):
        score(model(), tokens(), batch_tokens=0)
    with pytest.raises(ValueError, match="max_length must be an integer"):
        score(model(), tokens(), max_length=2.5)
