"""Adapters beside weights of 4 bits train as beside the same weights unpacked, after evaluations too."""

import pytest
import torch
from test_trl import COMPLETIONS, PAIRS, STEPS, arguments, model, tokenizer

from alignloss import linear_logprob, next_token_labels
from alignloss.hf import UnsupportedModel, check_model, head_call, score, share_prompts

transformers, trl = pytest.importorskip("transformers"), pytest.importorskip("trl")
peft, bitsandbytes = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
from datasets import Dataset  # noqa: E402

from alignloss.trl import DPOTrainer, SFTTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers
TOKENS = [[3, 5, 7, 4, 9, 11], [6, 3, 12, 8, 4, 10]]
USES = {
    "not used": lambda model: None,
    "checked": check_model,
    "scored": lambda model: score(
        model, Dataset.from_dict({"prompt_ids": [[3, 4]], "completion_ids": [[5, 6, 7]]}), progress=False
    ),
    "prompts shared": lambda model: share_prompts(
        [{"prompt_ids": [3, 4], "chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]}]
    ).head_call(model, lambda head: head.hidden.sum()),
}


@pytest.fixture
def loaded(tmp_path):
    """A model with 4-bit weights, and its copy with what they stand for in float32; both without adapters."""
    model(hidden_size=64, intermediate_size=128, num_attention_heads=2).save_pretrained(tmp_path / "model")
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    load, path = transformers.AutoModelForCausalLM.from_pretrained, tmp_path / "model"
    packed, plain = load(path, quantization_config=quantization, dtype=torch.float32), load(path, dtype=torch.float32)
    layers = dict(packed.named_modules())
    for name, layer in plain.named_modules():
        if isinstance(layers[name], bitsandbytes.nn.Linear4bit):
            weight = layers[name].weight
            layer.weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return packed, plain


def adapted(base):
    torch.manual_seed(1)
    made = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    for name, parameter in made.named_parameters():
        if "lora_B" in name:  # which begins as no change
            torch.nn.init.normal_(parameter, std=0.1)
        if parameter.requires_grad:  # TRL makes adapters bfloat16 beside 4 bits
            parameter.data = parameter.data.bfloat16().float()
    return made


def gradients(adapted):
    tokens = torch.tensor(TOKENS)
    labels = next_token_labels(tokens, tokens > 0)
    head_call(adapted, lambda head: linear_logprob(head.hidden, head.weight, labels).sum(), input_ids=tokens)[
        0
    ].backward()
    return {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("use", USES)
def test_gradients_are_those_of_unpacked_weights(loaded, use):
    packed, plain = map(adapted, loaded)
    USES[use](packed)
    expected, got = gradients(plain), gradients(packed)
    assert expected.keys() == got.keys() and len(got) == 2 * 2 * 7
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-2, name
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("cls", "config", "data"), [(DPOTrainer, trl.DPOConfig, PAIRS), (SFTTrainer, trl.SFTConfig, COMPLETIONS)]
)
def test_a_trainer_evaluates_between_its_steps(loaded, tmp_path, cls, config, data):
    found = []
    for base in loaded:
        more = {"precompute_ref_log_probs": True} if cls is DPOTrainer else {}
        settings = arguments(config, tmp_path, eval_strategy="steps", eval_steps=1, eval_on_start=True, **more)
        trainer = cls(
            model=adapted(base), args=settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer()
        )
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        trainer.train()
        found.append([e for e in trainer.state.log_history if "loss" in e or "eval_loss" in e])
    assert len(found[0]) == len(found[1]) == 2 * STEPS + 1
    for packed, plain in zip(*found, strict=True):
        for name in {"loss", "grad_norm", "eval_loss"} & plain.keys():
            assert packed[name] == pytest.approx(plain[name], rel=1e-4), name


def test_weights_that_were_packed_before_are_refused(loaded, tmp_path):
    packed = adapted(loaded[0])
    if not any(getattr(layer, "support_avx512bf16_for_cpu", False) for layer in packed.modules()):
        pytest.skip("bitsandbytes packs on a CPU with AVX512-BF16 alone")
    with torch.no_grad():
        packed.eval()(input_ids=torch.tensor(TOKENS))
    settings = arguments(trl.DPOConfig, tmp_path)
    with pytest.raises(UnsupportedModel, match=r"14 weights of 4 bits, .*q_proj.* have been packed"):
        DPOTrainer(model=packed, args=settings, train_dataset=PAIRS, processing_class=tokenizer())
