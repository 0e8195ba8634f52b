"""A training run, from settings to a trained model in its folder, gone on with where an earlier one stopped.

out/run.json        what the run is made of; another run is refused here
out/references/     log-probabilities of the reference
out/checkpoint-N/   complete where whole.json is there
out/log.jsonl       an entry for each logged step, and for each evaluation
out/curves.png
out/model/          the trained model with its tokenizer, there when the run has ended
"""

import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from ...hf.score import score
from ..errors import UserError, one_line
from .adapters import new_adapters
from .checkpoints import (
    WholeCheckpoints,
    alone,
    explained,
    lacks_memory,
    remove_unfinished,
    state_of,
    to_disk,
    whole,
    write_whole,
)
from .data import Data, dataset_of, read_data, token_fault
from .model import Source, fingerprint, load_model, load_tokenizer
from .rows import REFERENCES, SCORED_LENGTH, read_rows
from .settings import Settings, configured, settle

# fields that may change from one start of a run to the next
CHANGEABLE = {"save_steps", "save_total_limit", "report_to", "disable_tqdm", "run_name"}
DEFAULT_BATCH = 8
# a model that is not supported, fields that do not go together, a package that is not there
REFUSALS = (ValueError, TypeError, ImportError, IndexError, NotImplementedError, RuntimeError)


class Refused(UserError):
    """What the libraries beneath make of a model and of fields."""


@contextmanager
def refusing(fields: dict[str, Any]) -> Iterator[None]:
    """What TRL and transformers do not take, in one line; any error of theirs where fields of theirs are given."""
    try:
        yield
    except (UserError, OSError, SafetensorError):
        raise
    except Exception as error:
        if lacks_memory(error) or not (fields or isinstance(error, REFUSALS)):
            raise
        said = one_line(error)
        if not isinstance(error, REFUSALS):
            said = f"{type(error).__name__}: {said} (with {', '.join(sorted(fields))})"
        elif "index out of range in self" in said:  # of an embedding
            said = "a token or a position is beyond the embeddings of the model: its tokenizer, or --max-length"
        raise Refused(said) from error


def configuration(settings: Settings, source: Source, out: Path, evaluates: bool) -> Any:
    """The trainer's configuration, with what this command decides."""
    objective, given = settings.objective, settings.fields
    fields: dict[str, Any] = {
        "per_device_train_batch_size": DEFAULT_BATCH,
        "logging_steps": 1,
        "save_steps": 100,
        "save_total_limit": 2,
        "report_to": "none",
        "use_cpu": source.on_cpu,
        "bf16": not source.on_cpu,
    }
    if "max_steps" not in given and "num_train_epochs" not in given:
        fields["num_train_epochs"] = 1
    fields |= given
    fields |= {
        "output_dir": str(out),
        "save_strategy": "steps",
        "logging_strategy": "steps",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it logs a loss that is no number as 0
    }
    if evaluates:
        fields = {"eval_strategy": "steps", "eval_steps": fields["save_steps"]} | fields
    if objective.loss is None:
        fields["loss_type"] = "nll"
    else:
        # the trainer's own reference model is not made, even where the loss needs none
        fields["precompute_ref_log_probs"] = not objective.needs_reference_model
    if objective.kind != "paired" and objective.loss is not None and "kl" not in objective.loss.data:
        fields["loss_type"] = "apo_zero_unpaired"  # of TRL, computes no KL
    fields.setdefault("per_device_eval_batch_size", fields["per_device_train_batch_size"])
    if "learning_rate" not in given and source.lora:
        fields["learning_rate"] = 10 * settings.config_class.__dataclass_fields__["learning_rate"].default
    config = configured(settings.config_class, fields)
    if not 0 <= config.learning_rate < math.inf:
        raise UserError(f"--learning-rate must be a number from 0 on, got {config.learning_rate}")
    if not 0 < config.num_train_epochs < math.inf:
        raise UserError(f"--epochs must be a positive number, got {config.num_train_epochs}")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not 0 <= config.seed < 1 << 32:
        raise UserError(f"--seed must lie in [0, 2^32), got {config.seed}")
    if not evaluates and "eval_steps" in given:
        raise UserError("eval_steps belongs to --eval-data")
    if config.save_steps < 1 or config.save_steps % 1 or config.save_steps % config.logging_steps:
        raise UserError(
            f"--save-every must be a multiple of logging_steps, so that a run that goes on logs the same; got "
            f"{config.save_steps:g} and {config.logging_steps:g}"
        )
    return config


# a trainer of TRL stands behind it
_Base: Any = object


class Evaluated(_Base):
    """Beside a trainer: evaluations that leave no trace in the training, and an accuracy for unpaired losses.

    It is the share of held-out pairs whose chosen completion has the higher reward, log pi - log pi_ref of the
    completion; a tie counts half.
    """

    args: Any
    eval_dataset: Any
    model: Any

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():  # whose numbers a data loader takes too
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        data = self.eval_dataset
        if "pair" in data.column_names and "ref_logps" in data.column_names:
            bare = data.select_columns(["prompt_ids", "completion_ids"])
            logps = score(self.model, bare, max_length=self.args.max_length, progress=False)["ref_logps"]
            rewards: dict[bool, dict[int, float]] = {True: {}, False: {}}
            labels = data["label"], data["pair"], logps, data["ref_logps"]
            for label, pair, logp, ref_logp in zip(*labels, strict=True):
                rewards[bool(label)][pair] = logp - ref_logp
            both = rewards[True].keys() & rewards[False].keys()
            hits = [1 + (rewards[True][i] > rewards[False][i]) - (rewards[True][i] < rewards[False][i]) for i in both]
            output.metrics[f"{metric_key_prefix}_rewards/accuracies"] = sum(hits) / (2 * len(hits))
        return output


def make_trainer(
    settings: Settings, source: Source, config: Any, data: Data, tokenizer: Any, share_prompts: bool, references: Path
) -> Any:
    """The trainer, its data tokenized and references scored.

    Raises:
        UserError: for a model that alignloss refuses, and what TRL refuses.
    """
    from transformers import set_seed

    from ... import trl as trainers

    objective = settings.objective
    base: Any = trainers.SFTTrainer
    more: dict[str, Any] = {}
    if objective.loss is not None:
        base = trainers.DPOTrainer if objective.loss.paired else trainers.KTOTrainer
        more = {"loss": objective.loss, "reference_cache": references}
        if share_prompts:
            more["share_prompts"] = True
    set_seed(config.seed)  # of new adapters
    model = load_model(source)
    if objective.needs_reference_model and not source.lora:
        more["ref_model"] = copy.deepcopy(model)
    sets = [None if rows is None else dataset_of(rows, objective, config.seed) for rows in data]
    trainer_class = type(f"Whole{base.__name__}", (WholeCheckpoints, Evaluated, base), {})
    with refusing(settings.fields):
        trainer = trainer_class(
            model=model, args=config, train_dataset=sets[0], eval_dataset=sets[1], processing_class=tokenizer,
            peft_config=new_adapters(source.lora), **more,
        )  # fmt: skip
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise UserError("no parameter of the model trains")
    if source.saved_whole:  # a checkpoint's adapters stand beside something that has no name
        for adapter in trainer.model.peft_config.values():
            adapter.base_model_name_or_path = ""
    if source.lora:  # as a checkpoint brings them back
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer


def identity(
    settings: Settings, source: Source, config: Any, plain: Any, data: Data, share_prompts: bool
) -> dict[str, Any]:
    """What a run is known by: another one does not go on from its checkpoints.

    `plain` is the configuration where no field is given: to say what it says anyway makes no other run.
    """
    objective = settings.objective
    given = {name: getattr(config, name) for name in settings.fields if name not in CHANGEABLE}
    fields = {name: value for name, value in given.items() if value != getattr(plain, name)}
    return {
        "model": source._asdict() | {"cpu": source.on_cpu, "dtype": str(source.torch_dtype)},
        "model_files": fingerprint(source),
        "data": data.digest(),
        "rows": len(data.train.rows),
        "loss": {"name": objective.name, **{k: str(v) for k, v in objective.options.items()}},
        "share_prompts": share_prompts,
        "fields": json.loads(json.dumps(fields, default=str)),
        "seed": config.seed,
    }  # fmt: skip


def earlier_run(out: Path) -> dict[str, Any] | None:
    """What the run in a folder is made of, None for a folder that is free.

    Raises:
        UserError: for a folder that holds a run without saying which.
    """
    known = out / "run.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file")
    if not known.exists():
        ours = [out / name for name in ("model", "log.jsonl", "curves.png", "README.md")]
        taken = [path.name for path in (*ours, *out.glob("checkpoint-*")) if path.exists()]
        if taken:
            raise UserError(f"{out} has {', '.join(taken)} of something else; give another --out")
        return None
    try:
        return dict(json.loads(known.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{known} cannot be read: {one_line(error)}; give another --out") from error


def check_same(out: Path, earlier: dict[str, Any], run: dict[str, Any]) -> None:
    """Whether a folder holds the same run, or another one that came to nothing.

    Raises:
        UserError: that says in what another run differs.
    """
    different = [
        f"{name} ({_short(earlier.get(name))} there, {_short(value)} here)"
        for name, value in run.items()
        if earlier.get(name) != value
    ]
    if different and (whole(out) or (out / "model").exists()):
        raise UserError(f"{out} holds another run, which differs in {'; '.join(different)}: give another --out")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def train(
    settings: Settings, source: Source, data: Path, out: Path, *,
    held_out: Path | None, share_prompts: bool, policy: str, references: Path | None, console: Console,
) -> None:  # fmt: skip
    """Train a model into the folder `out`.

    Raises:
        UserError: for what can be mended; nothing has been written where it concerns data or options.
    """
    earlier = earlier_run(out)
    config = configuration(settings, source, out, held_out is not None)
    tokenizer = load_tokenizer(source)
    rows = read_data(settings.objective, data, held_out, policy, tokenizer, config.max_length)
    for part in rows:
        if part is not None:
            console.print(part.summary(), highlight=False, soft_wrap=True)
    loss = settings.objective.loss
    if rows.train.scored and loss is not None and "kl" in loss.data:
        note = f"the KL of --loss {settings.objective.name} stays one against this model at its start"
        console.print(note, highlight=False, soft_wrap=True)
    plain = configuration(settings._replace(fields={}), source, out, held_out is not None)
    run = identity(settings, source, config, plain, rows, share_prompts)
    if earlier is not None:
        check_same(out, earlier, run)
    if (out / "model").exists():
        console.print(f"this run has ended; the model is in {out / 'model'}", highlight=False, soft_wrap=True)
        return
    fresh = not out.exists()
    try:
        with explained(out):
            out.mkdir(parents=True, exist_ok=True)
            with alone(out):
                folder = references or out / "references"
                trainer = make_trainer(settings, source, config, rows, tokenizer, share_prompts, folder)
                write_whole(out / "run.json", json.dumps(run, indent=2) + "\n")
                with refusing(settings.fields):
                    _fit(trainer, out, console)
                _save(trainer, source, tokenizer, out)
    except Refused:
        # nothing was trained; references that were scored serve another start
        if fresh and not whole(out) and not (out / "references").exists():
            shutil.rmtree(out, ignore_errors=True)
        raise
    console.print(f"the trained model is in {out / 'model'}", highlight=False, soft_wrap=True)


def scored(
    source: Source, data: Path, policy: str, max_length: int, cache: Path | None, console: Console
) -> list[dict[str, Any]]:
    """The rows of a file as they stand there, with the log-probabilities of their completions."""
    tokenizer = load_tokenizer(source)
    rows = read_rows(data, None, policy=policy, fault=token_fault(tokenizer, max_length))
    console.print(rows.summary(), highlight=False, soft_wrap=True)
    paired, names = rows.kind == "paired", REFERENCES[rows.kind]
    settings = settle("dpo" if paired else "npo", {}, set(), {}, {"max_length": max_length})
    with tempfile.TemporaryDirectory() as scratch:
        config = configuration(settings, source, Path(scratch), False)
        config.disable_tqdm = not console.is_terminal
        folder = cache or Path(scratch) / "references"
        trainer = make_trainer(settings, source, config, Data(rows, None), tokenizer, False, folder)
    found = trainer.train_dataset.select_columns([*names, "line"])
    return [
        rows.originals[row["line"]] | {name: row[name] for name in names} | {SCORED_LENGTH: max_length}
        for row in sorted(found, key=lambda row: row["line"])
    ]


def _fit(trainer: Any, out: Path, console: Console) -> None:
    from transformers import PrinterCallback, ProgressCallback, set_seed

    from .progress import LOG, Log, draw, read_log

    remove_unfinished(out, lambda text: console.print(text, highlight=False, soft_wrap=True))
    start = next(iter(whole(out)), None)
    state = None if start is None else state_of(start)
    if state is not None:
        console.print(f"going on from {start}", highlight=False, soft_wrap=True)
        trainer.take_progress(state)
    else:
        trainer.args.eval_on_start = trainer.args.eval_strategy != "no"
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Log(out, console, 0 if state is None else state["tokens"]))
    if state is not None and state["ended"]:
        # the Trainer would add a step
        trainer._load_from_checkpoint(str(start))
    else:
        set_seed(trainer.args.seed)  # whatever was drawn for references that an earlier start had computed
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    draw(read_log(out / LOG), out / "curves.png", out.name)


def _save(trainer: Any, source: Source, tokenizer: Any, out: Path) -> None:
    """The trained model, in its folder in one step."""
    unfinished = out / "model.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    if source.saved_whole:
        merged = trainer.model.merge_and_unload()
        merged.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    else:
        trainer.save_model(str(unfinished))
    (unfinished / "training_args.bin").unlink(missing_ok=True)  # a pickle; run.json says what the run was
    to_disk(unfinished)
    os.replace(unfinished, out / "model")
