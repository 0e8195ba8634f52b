"""Models inside PEFT: right in value and in the gradient of everything that trains, or refused by name."""

import pytest
import torch
from test_hf import SIZES, V, logps_of, own_logps

import alignloss
from alignloss.hf import UnsupportedModel, check_model, head_call

# of PEFT, about what it is asked for here, and of transformers, about names that PEFT uses
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore:.*(_checkpointing|past_key_values):FutureWarning"
)
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def lora(**options):
    return lambda: peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})


HEAD = {"target_modules": ["q_proj", "lm_head"]}
RIGHT = {
    "LoRA": lora(),
    "DoRA": lora(use_dora=True),
    "every bias": lora(bias="all"),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "norms": lambda: peft.LNTuningConfig(),
    "head saved": lora(modules_to_save=["lm_head"]),
    "head and embedding saved": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "LoRA on the head": lora(**HEAD),
    "rank-stabilised LoRA on the head": lora(**HEAD, use_rslora=True),
    "LoRA on the parameter of the head": lora(target_modules=[], target_parameters=["lm_head.weight"]),
    "trained tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 4], target_modules=["embed_tokens"]),
    "LoRA and trained tokens": lora(trainable_token_indices=[3, 5]),
    "trained rows of the head": lora(trainable_token_indices={"lm_head": [3, 4]}),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt encoder": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
NO_LORA, VARIANT = "carries an adapter that is no LoRA", "carries a variant of LoRA"
REFUSED = {
    "DoRA on the head": (lora(**HEAD, use_dora=True), VARIANT),
    "a bias of LoRA on the head": (lora(**HEAD, lora_bias=True), "has a bias"),
    "IA3 on the head": (lambda: peft.IA3Config(**HEAD, feedforward_modules=[]), NO_LORA),
    "LoHa on the head": (lambda: peft.LoHaConfig(**HEAD), NO_LORA),
    "VeRA on the head": (lambda: peft.VeraConfig(target_modules=["lm_head"]), NO_LORA),
    "AdaLoRA on the head": (lambda: peft.AdaLoraConfig(**HEAD, total_step=10), NO_LORA),
    "OFT on the head": (lambda: peft.OFTConfig(target_modules=["lm_head"], oft_block_size=4), NO_LORA),
}


def adapted(config, tied=False):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()
    model = peft.get_peft_model(model, config()).eval()
    for name, parameter in model.named_parameters():
        # adapters begin as no change, in which a mistake is not seen
        if parameter.requires_grad and any(part in name for part in ("lora", "delta", "ia3", "magnitude")):
            torch.nn.init.normal_(parameter, float("ia3" in name or "magnitude" in name), 0.3)
    return model


def batch():
    ids = torch.randint(3, V, (3, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, alignloss.next_token_labels(ids, ids > 5)


def check(model):
    inputs, labels = batch()
    ours, _ = head_call(model, logps_of(labels), **inputs)
    theirs = own_logps(model(**inputs).logits[:, -7:], labels)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)
    found = []
    for logps in (ours, theirs):
        model.zero_grad()
        if logps.requires_grad:
            logps.double().square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    whole = max((float(gradient.norm()) for gradient in found[1].values()), default=0)
    for name, gradient in found[1].items():
        assert float((found[0][name] - gradient).norm()) <= 5e-5 * (float(gradient.norm()) + 0.01 * whole), name
    return found[0]


@pytest.mark.parametrize("kind", RIGHT)
def test_right(kind):
    assert check(adapted(RIGHT[kind]))


@pytest.mark.parametrize("kind", ["LoRA", "LoRA on the head", "LoRA and trained tokens"])
def test_right_with_a_tied_head(kind):
    assert check(adapted(RIGHT[kind], tied=True))


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    config, message = REFUSED[kind]
    with pytest.raises(UnsupportedModel, match=f"LlamaForCausalLM.*{message}.*leave"):
        check_model(adapted(config))


def test_adapters_that_are_off_merged_or_several():
    model = adapted(lora(**HEAD))
    assert any("lm_head" in name for name in check(model))
    with model.disable_adapter():
        assert not check(model)
    model.merge_adapter()
    check(model)
    model.unmerge_adapter()
    model.add_adapter("other", lora(**HEAD)())
    model.base_model.set_adapter(["default", "other"])
    assert sum("lm_head" in name for name in check(model)) == 4


def test_dropout_of_lora_on_the_head_is_that_of_the_layer():
    model = adapted(lora(**HEAD, lora_dropout=0.5)).train()
    inputs, labels = batch()
    found = []
    for call in (
        lambda: head_call(model, logps_of(labels), **inputs)[0],
        lambda: own_logps(model(**inputs).logits, labels),
    ):
        check_model(model)
        torch.manual_seed(1)
        found.append(call().double().detach())
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-5)


def test_adapters_of_single_samples_are_refused():
    model = adapted(lora(**HEAD))
    model.add_adapter("other", lora(**HEAD)())
    inputs, labels = batch()
    with pytest.raises(UnsupportedModel, match=r"given more than hidden states, \['adapter_names'\]"):
        head_call(model, logps_of(labels), **inputs, adapter_names=["default", "other", "__base__"])
