"""What a step of `alignloss train` holds on a CPU, as the allocator counts, is within a tenth of what `fit` expects."""

import json
import random

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from alignloss.commands import __main__ as command
from alignloss.commands.fit import estimate, read_model
from alignloss.commands.measure import most_held
from alignloss.commands.training import run

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
pytest.importorskip("peft")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers
V, LENGTH, PAIRS = 16384, 512, 2
SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
WAYS = {
    "full": [],
    "full, every activation": ["gradient_checkpointing=false"],
    "full, shared prompts": ["--share-prompts", "gradient_checkpointing=false"],
    "LoRA": ["--lora", "16", "gradient_checkpointing=false"],
    "QLoRA": ["--qlora", "gradient_checkpointing=false"],
    "QLoRA, shared prompts, checkpointing": ["--qlora", "--share-prompts"],
}
EACH_DAY = ("QLoRA, shared prompts, checkpointing",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 16 million parameters, and pairs: half prompt, the rejected completion a little shorter."""
    folder = tmp_path_factory.mktemp("fit")
    vocabulary = {name: i for i, name in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(2, V))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(vocab_size=V, num_key_value_heads=3, tie_word_embeddings=True, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    dice = random.Random(0)

    def text(count):
        return "".join(f"w{dice.randrange(2, V)} " for _ in range(count))

    half = LENGTH // 2
    rows = [{"prompt": text(half), "chosen": text(half - 1), "rejected": text(half - 9)} for _ in range(3 * PAIRS)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Held(transformers.TrainerCallback):
    """Bytes of weights and optimizer, and the most that the third step adds to them."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **_):
        if state.global_step == 2:
            assert all(parameter.grad is None for parameter in model.parameters())
            states = [value for s in optimizer.state.values() for value in s.values() if torch.is_tensor(value)]
            scales = [q for p in model.parameters() if (q := getattr(p, "quant_state", None)) is not None]
            tensors = [*model.parameters(), *model.buffers(), *states, *(q.absmax for q in scales)]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            self.between_steps = sum(storages.values())
            self.seen = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
            self.seen.start()

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            self.seen.stop()
            self.most = most_held(self.seen)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way in EACH_DAY else pytest.mark.nightly) for way in WAYS]
)
def test_within_a_tenth(folder, tmp_path, monkeypatch, way):
    options, held, fit = WAYS[way], Held(), run._fit
    qlora, lora = "--qlora" in options, bool({"--lora", "--qlora"} & set(options))
    if qlora:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(run, "_fit", lambda trainer, *rest: (trainer.add_callback(held), fit(trainer, *rest)))
    arguments = ["train", "--model", folder, "--data", folder / "pairs.jsonl", "--out", tmp_path / "run", "--cpu"]
    arguments += ["--steps", 3, "--batch-size", PAIRS, *options]
    monkeypatch.setattr("sys.argv", ["alignloss", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert not ended.value.code
    expected = estimate(
        read_model(str(folder), qlora=qlora), 2 * PAIRS * LENGTH, length=LENGTH, labelled=0.5, lora=lora,
        checkpointing="gradient_checkpointing=false" not in options, share_prompts="--share-prompts" in options,
        precision="fp32", accumulates=False, device="cpu",
    )  # fmt: skip
    assert expected.total() == pytest.approx(held.between_steps + held.most, rel=0.1)
