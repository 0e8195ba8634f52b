"""Every type of causal language model that transformers can build small and offline: right, or refused, never wrong."""

import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from reference import error

import alignloss

transformers = pytest.importorskip("transformers")
from small_models import TYPES, V, small_model  # noqa: E402
from test_hf import logps_of, own_logps  # noqa: E402

from alignloss.commands.errors import UserError  # noqa: E402
from alignloss.commands.training.model import check_causal  # noqa: E402
from alignloss.hf import UnsupportedModel, head_call  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def outcome(model_type: str) -> tuple[str, str]:
    """What happens to a small model of a type, and why."""
    torch.manual_seed(0)
    ids = torch.randint(3, 40, (2, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = alignloss.next_token_labels(ids, torch.ones_like(ids))
    try:
        model = small_model(model_type)
        if model_type == "reformer":
            model.train()  # it refuses to train otherwise
        model(**inputs)
    except Exception as problem:
        return "not built", f"{type(problem).__name__}: {problem}"
    state = torch.get_rng_state()
    found = []
    for ours in (True, False):
        model.zero_grad()
        torch.set_rng_state(state)
        try:
            if ours:
                logps, _ = head_call(model, logps_of(labels), **inputs)
            else:
                logps = own_logps(model(**inputs).logits, labels)
        except UnsupportedModel as refusal:
            return "refused", str(refusal)
        try:
            logps.double().square().sum().backward()
        except RuntimeError as problem:  # of its own layers
            if ours:
                continue
            return "not built", f"its own backward fails: {problem}"
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((logps.detach(), gradients))
    (ours, gradients), (theirs, expected) = found
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    wrong = [
        name
        for name in {*gradients, *expected}
        if name not in gradients or name not in expected or (gradients[name] - expected[name]).norm() > 1e-3 * whole
    ]
    if error(ours, theirs) > 1e-4 or wrong:
        return "wrong", f"log-probabilities by {error(ours, theirs):.1e}, gradients of {wrong[:3]}"
    return "right", f"{error(ours, theirs):.1e}"


def listed(kind: str) -> list[str]:
    """The types that the page lists under a heading."""
    section = re.search(rf"^## {kind}[^\n]*\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.S | re.M).group(1)
    return re.findall(r"`([\w-]+)`", section)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # of a hundred models
def test_every_type_is_right_or_refused():
    kinds, reasons = defaultdict(list), {}
    for model_type in TYPES:
        kind, reasons[model_type] = outcome(model_type)
        kinds[kind].append(model_type)
    for kind, types in kinds.items():
        print(f"\n{kind}: {len(types)} of {len(TYPES)}")
        for model_type in types:
            print(f"    {model_type}: {reasons[model_type][:200]}")
    assert kinds["wrong"] == []
    assert len(kinds["right"]) >= 0.85 * len(TYPES)
    if f"transformers {transformers.__version__}" in PAGE.read_text(encoding="utf-8"):
        assert {kind: listed(kind.capitalize()) for kind in ("right", "refused", "not built")} == {
            kind: kinds[kind] for kind in ("right", "refused", "not built")
        }


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_types_that_see_later_tokens_are_not_trained():
    """Those three see them; encoders are built here as decoders where they can be."""
    refused = []
    for model_type in sorted({*TYPES} - set(listed("Not built"))):
        torch.manual_seed(0)
        try:
            check_causal(small_model(model_type))
        except UserError:
            refused.append(model_type)
    assert refused == ["cpmant", "xlm", "xlnet"]


def test_the_small_models_are_small():
    assert sum(parameter.numel() for parameter in small_model("llama").parameters()) < 50_000
    assert small_model("gemma2").config.vocab_size == V
