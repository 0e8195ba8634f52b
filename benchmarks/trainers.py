"""Whole steps of DPO trainers: TRL's own, ours, and ours with each prompt computed once."""

import statistics
import tempfile
from functools import partial
from typing import Any

import torch

from alignloss.commands.measure import peak_bytes

from .cases import Case
from .measure import Row, interleave, reason
from .steps import Run, build, now

# what a trainer is given beside, by its name
TRAINERS: dict[str, dict[str, Any]] = {"TRL": {}, "alignloss": {}, "alignloss, shared prompts": {"share_prompts": True}}


def make_trainer(case: Case, run: Run, name: str, prompt: int) -> tuple[Any, dict[str, Any], Any]:
    """A DPO trainer of pairs of one length whose first `prompt` tokens are the prompt, a batch, and any optimizer.

    References are computed beforehand and take no part in the step.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, set_seed
    from trl import DPOConfig
    from trl import DPOTrainer as TRL

    from alignloss.trl import DPOTrainer

    set_seed(0)
    pairs, length = case.sequences // 2, case.tokens // case.sequences
    # words of one token each; TRL ends a completion by a token of its own
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, case.vocabulary)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)

    def text(count: int) -> str:
        return "".join(f"w{token} " for token in torch.randint(3, case.vocabulary, (count,)).tolist())

    completion = length - prompt - 1
    data = Dataset.from_list(
        [{"prompt": text(prompt), "chosen": text(completion), "rejected": text(completion)} for _ in range(pairs)]
    )
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=pairs, max_length=None, report_to=[], bf16=False,
        use_cpu=case.device == "cpu", disable_tqdm=True, gradient_checkpointing=False, precompute_ref_log_probs=True,
    )  # fmt: skip
    trained = build(case, run)
    trainer = (TRL if name == "TRL" else DPOTrainer)(
        model=trained.model, args=arguments, train_dataset=data, processing_class=tokenizer, **TRAINERS[name]
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    return trainer, batch, trained.optimizer


def take_step(case: Case, trainer: Any, batch: dict[str, Any], optimizer: Any) -> float:
    """Seconds of loss, backward and optimizer."""
    start = now(case)
    trainer.model.zero_grad(set_to_none=True)
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    if optimizer is not None:
        optimizer.step()
    return now(case) - start


def measure_trainers(case: Case, run: Run, prompt_share: float, rounds: int) -> list[Row]:
    """Seconds, interleaved, and peak bytes of a step, one row for each trainer."""
    length = case.tokens // case.sequences
    prompt = round(prompt_share * length)
    mode = f"{run}, {prompt} of {length} tokens prompt"
    made: dict[str, Any] = {}
    rows: list[Row] = []
    for name in TRAINERS:
        try:
            made[name] = make_trainer(case, run, name, prompt)
        except Exception as error:
            rows.append({"provider": name, "mode": mode, "failed": reason(error)})
    taken, failed = interleave({name: partial(take_step, case, *made[name]) for name in made}, rounds)
    for name in made:
        row: Row = {"provider": name, "mode": mode, "prompt_share": prompt / length}
        rows.append(row)
        if name in failed:
            row["failed"] = failed[name]
            continue
        seconds = taken[name]
        row |= {
            "seconds": statistics.median(seconds),
            "seconds_spread": [min(seconds), max(seconds)],
            # a ratio per round: what disturbs a round disturbs both of its terms
            "of_alignloss": statistics.median(a / b for a, b in zip(seconds, taken["alignloss"], strict=True)),
            "peak_bytes": peak_bytes(partial(take_step, case, *made[name])),
        }
    return rows
