"""Whole steps of DPO trainers: TRL's own, ours, and ours with each prompt computed once; and their references."""

import copy
import statistics
import tempfile
import uuid
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
    from transformers import set_seed

    set_seed(0)
    pairs, length = case.sequences // 2, case.tokens // case.sequences
    completion = length - prompt - 1
    trained = build(case, run)
    trainer = _trainer(case, trained.model, name, [(prompt, completion, completion)] * pairs)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    return trainer, batch, trained.optimizer


def _trainer(case: Case, model: Any, name: str, lengths: list[tuple[int, int, int]]) -> Any:
    """A DPO trainer of pairs with so many tokens of prompt, chosen and rejected, a token that TRL adds left out."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig
    from trl import DPOTrainer as TRL

    from alignloss.trl import DPOTrainer

    # words of one token each
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, case.vocabulary)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)

    def text(count: int) -> str:
        return "".join(f"w{token} " for token in torch.randint(3, case.vocabulary, (count,)).tolist())

    data = Dataset.from_list(
        [{part: text(n) for part, n in zip(("prompt", "chosen", "rejected"), row, strict=True)} for row in lengths]
    )
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=case.sequences // 2, max_length=None, report_to=[],
        bf16=False, use_cpu=case.device == "cpu", disable_tqdm=True, gradient_checkpointing=False,
        precompute_ref_log_probs=True,
    )  # fmt: skip
    kind: Any = TRL if name == "TRL" else DPOTrainer
    return kind(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, **TRAINERS[name])


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
    steps = {name: partial(take_step, case, *made[name]) for name in made}
    for row in _rows(mode, *interleave(steps, rounds), "alignloss"):
        row["prompt_share"] = prompt / length
        if "failed" not in row:
            row["peak_bytes"] = peak_bytes(steps[row["provider"]])
        rows.append(row)
    return rows


def measure_references(case: Case, examples: int, rounds: int) -> list[Row]:
    """Seconds, interleaved, to compute the reference's log-probabilities of a data set, as each way is called.

    Sequences have an eighth to all of the length of the case, half of it at most prompt; batches at most its tokens.
    """
    from transformers import set_seed

    from alignloss.hf import score

    set_seed(0)
    length = case.tokens // case.sequences
    shares = torch.empty(examples, 3).uniform_(1 / 16, 1 / 2).mul(length).int() - torch.tensor([0, 1, 1])
    lengths = [(prompt, chosen, rejected) for prompt, chosen, rejected in shares.tolist()]
    model = build(case, Run("full", False, False)).model
    columns = ["ref_chosen_logps", "ref_rejected_logps"]
    # each with a model of its own, whose forward it replaces
    made = {name: _trainer(case, copy.deepcopy(model), name, lengths) for name in ("TRL", "alignloss")}
    data = made["TRL"].train_dataset.remove_columns(columns)
    tokens = sum(len(row["prompt_ids"]) + len(row[name]) for row in data for name in ("chosen_ids", "rejected_ids"))

    def by_trainer(trainer: Any) -> Any:
        data._fingerprint = uuid.uuid4().hex  # or it is read from TRL's cache
        return trainer._precompute_ref_logps(data, "train", case.sequences // 2)

    ways: dict[str, Any] = {name: partial(by_trainer, trainer) for name, trainer in made.items()}
    ways["alignloss, score"] = lambda: score(model, data, batch_tokens=case.tokens, progress=False)
    found: dict[str, Any] = {}

    def timed(name: str) -> float:
        start = now(case)
        found[name] = ways[name]()
        return now(case) - start

    mode = f"references of {examples} pairs, {tokens:,} tokens"
    rows = _rows(mode, *interleave({name: partial(timed, name) for name in ways}, rounds), "alignloss, score")
    for row in rows:
        if "failed" not in row:
            row["nats_apart"] = max(
                float((torch.tensor(found[row["provider"]][column]) - torch.tensor(found["TRL"][column])).abs().max())
                for column in columns
            )
    return rows


def _rows(mode: str, taken: dict[str, list[float]], failed: dict[str, str], ours: str) -> list[Row]:
    """A row for each way, with its ratio to one of ours."""
    rows: list[Row] = []
    for name, seconds in taken.items():
        row: Row = {"provider": name, "mode": mode}
        rows.append(row)
        if name in failed:
            row["failed"] = failed[name]
            continue
        row |= {
            "seconds": statistics.median(seconds),
            "seconds_spread": [min(seconds), max(seconds)],
            # a ratio per round: what disturbs a round disturbs both of its terms
            "of_alignloss": statistics.median(a / b for a, b in zip(seconds, taken[ours], strict=True)),
        }
    return rows
