"""TRL's trainers with their losses as they are, made in the output projection where the head trains: 3 GEMMs, not 4.

TRL's losses take the model as an argument. So they are given one that returns log-probabilities that are there already:
the model is called with a `loss_fn` that asks TRL's own method for the loss of them.
"""

import copy
import importlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import TrainingArguments
from trl import DPOTrainer as _DPOTrainer
from trl import GRPOTrainer as _GRPOTrainer
from trl import KTOTrainer as _KTOTrainer
from trl import RLOOTrainer as _RLOOTrainer
from trl import SFTTrainer as _SFTTrainer
from trl.trainer import utils

from ..hf.check import check_model
from ..hf.head import Head, head_call, hidden_and_head
from ..hf.prompts import SharedPrompts
from ..hf.score import COLUMNS as REFERENCE_COLUMNS
from ..hf.score import score
from ..hf.takeover import branches, find_head
from ..logprob import LogprobStats, linear_kl, linear_logprob_stats
from ..modules.outputs import METRIC_STATS
from ..modules.own_loss import one_pass_loss
from ..modules.preference import PreferenceLoss
from ..ops.sizes import accumulation_dtype
from ..recipes.baselines import RunningShift
from .prompts import SharedPairs, SharingCollator
from .seam import aligned, patched

# the data of a loss that a trainer makes; any other is a column
TOKEN_KL = {"chosen_seq_kl", "rejected_seq_kl"}
FROM_TRAINER = {"desirable", "kl", "delta", *TOKEN_KL}


class _NoTuner:
    """In place of PEFT's base class of adapters, where TRL refuses one on the head, which is taken or refused here."""


class _OneProcess:
    """An accelerator whose collectives stay at home."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, value: Any, *_: Any, **__: Any) -> Any:
        return value

    gather_for_metrics = reduce = gather


T = TypeVar("T")
# a trainer of TRL stands behind it
_Base: Any = object


class AlignlossTrainer(_Base):
    """What our trainers share: they are built on alignloss, and compute TRL's loss, or another, in the projection.

    Args:
        head_options: backend, workspace_bytes, validate, as in `linear_logprob`.
        loss: a `PreferenceLoss` or `MixtureLoss` in place of TRL's loss, with its own metrics; its data are columns of
            the data set. Scale and softcap are those of the model.
        share_prompts: compute the prompt of a pair once, in DPO's trainer: chosen and rejected behind one prompt
            (`hf.share_prompts`), policy and reference, compared as `SharedPrompts.head_call` does.
        reference_cache: a folder in which log-probabilities of the reference are kept. With
            `precompute_ref_log_probs=True`, `hf.score` computes them there, where TRL's own pass would; one process.
        args, kwargs: TRL's.
    """

    shares_prompts = False
    has_reference = True
    paired: bool | None = None  # of the losses that take TRL's place; None: there are none
    # of TRL
    accelerator: Any
    aux_loss_enabled: Any
    aux_loss_coef: Any  # of CPO and ORPO; the others have router_aux_loss_coef
    data_collator: Any
    model: Any
    precompute_ref_logps: Any
    _compute_kl_logps: Any
    _metrics: Any
    _signature_columns: Any
    _total_train_tokens: Any

    def __init__(
        self,
        *args: Any,
        head_options: dict[str, Any] | None = None,
        loss: PreferenceLoss | None = None,
        share_prompts: bool = False,
        reference_cache: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if share_prompts and not self.shares_prompts:
            raise ValueError(f"{type(self).__name__} has no pairs behind one prompt: share_prompts is for DPOTrainer")
        if loss is not None and (not isinstance(loss, PreferenceLoss) or loss.paired != self.paired):
            kind = {True: "a paired", False: "an unpaired", None: "no"}[self.paired]
            raise ValueError(
                f"{type(self).__name__} takes {kind} PreferenceLoss in place of its own, got {type(loss).__name__}"
            )
        if loss is not None and loss.needs_reference and not self.has_reference:
            needs = f"{type(self).__name__} has no reference, which {loss.function.name} needs"
            raise ValueError(f"{needs}: give it to DPOTrainer")
        if loss is not None and share_prompts and loss.data.keys() >= TOKEN_KL:
            raise ValueError(f"share_prompts has no KL of tokens, which {loss.function.name} needs")
        self._loss, self._reference_cache = loss, reference_cache
        self.shift = RunningShift() if loss is not None and "delta" in loss.data else None
        theirs: Any = next(c for c in type(self).__mro__ if c.__module__.startswith("trl."))
        module: Any = importlib.import_module(theirs.__module__)
        tuner = vars(module).get("BaseTunerLayer")
        if tuner is not None:
            module.BaseTunerLayer = _NoTuner
        self._head_options = head_options or {}
        config = next((a for a in (*args, *kwargs.values()) if isinstance(a, TrainingArguments)), None)
        try:
            with patched(differentiable_entropy=self._entropy_trains(config), **self._head_options):
                super().__init__(*args, **kwargs)
        finally:
            if tuner is not None:
                module.BaseTunerLayer = tuner
        check_model(self.model)  # with its adapters
        columns = [] if loss is None else [name for name in loss.data if name not in FROM_TRAINER]
        if columns:
            self.data_collator = _WithColumns(self.data_collator, columns)
        if share_prompts and self.aux_loss_enabled:
            raise ValueError("a router loss counts each prompt twice, and share_prompts once: leave one of them out")
        if share_prompts:
            self.data_collator = SharingCollator(self.data_collator, () if loss is None else loss.data)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._loss is not None:
            more = [name for name in self._loss.data if name not in self._signature_columns]
            self._signature_columns = [*self._signature_columns, *more]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        needed = self._reference_columns() if self._loss is None or self._loss.needs_reference else set()
        if needed <= set(dataset.column_names or ()):
            return dataset
        if self._reference_cache is not None:
            return self._scored(dataset)
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _reference_columns(self) -> set[str]:
        """Of the data set, for a trainer with a reference."""
        raise NotImplementedError

    def _scored(self, dataset: Any) -> Any:
        """A data set with log-probabilities of the reference, from the cache as far as they are there."""
        if self.accelerator.num_processes > 1:
            raise ValueError("reference_cache is for one process: leave it out, or score the data set before")
        if getattr(self.args, "truncation_mode", "keep_start") != "keep_start":
            raise ValueError("reference_cache cuts rows at their end: leave it or truncation_mode out")
        lacking = {k: v for k, v in REFERENCE_COLUMNS.items() if k in dataset.column_names}
        lacking = {tokens: made for tokens, made in lacking.items() if made not in dataset.column_names}
        columns = [dataset["prompt_ids"], *(dataset[name] for name in lacking)]
        longest = max((len(row[0]) + max(map(len, row[1:])) for row in zip(*columns, strict=True)), default=1)
        longest = min(longest, self.args.max_length or longest)
        with self._reference_alone():
            found = score(
                self.ref_model or self.model,
                dataset.select_columns(["prompt_ids", *lacking]),
                cache_dir=self._reference_cache,
                # no more memory than a step, which keeps activations beside
                batch_tokens=min(16384, longest * self.args.per_device_train_batch_size * (2 if self.paired else 1)),
                max_length=self.args.max_length,
                progress=not self.args.disable_tqdm,
            )
        for made in lacking.values():
            dataset = dataset.add_column(made, list(found[made]))
        return dataset

    @contextmanager
    def _reference_alone(self) -> Iterator[None]:
        """Without gradients, and where the policy has adapters without them, or with those of the reference."""
        adapters: Any = nullcontext()
        policy = self.accelerator.unwrap_model(self.model)
        if self.ref_model is None and hasattr(policy, "peft_config"):
            adapters = utils.use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        with torch.no_grad(), adapters, self.accelerator.autocast():
            yield

    @staticmethod
    def _entropy_trains(config: Any) -> bool:
        return False

    def _head_trains(self) -> bool:
        """Whether a step has a gradient for the head, which one pass makes with a GEMM less."""
        layers = branches(find_head(self.model))
        return torch.is_grad_enabled() and any(p.requires_grad for layer in layers for p in layer.parameters())

    @contextmanager
    def _with(self, **attributes: Any) -> Iterator[None]:
        """Other values of a few attributes."""
        before = {name: self.__dict__[name] for name in attributes if name in self.__dict__}
        self.__dict__.update(attributes)
        try:
            yield
        finally:
            for name in attributes.keys() - before.keys():
                delattr(self, name)
            self.__dict__.update(before)

    def _heard_once(self, loss: Callable[[], T]) -> T:
        """A loss inside of `one_pass_loss`, of whose calls the last one, without gradients, is to be heard."""
        with self._quiet() if torch.is_grad_enabled() else nullcontext():
            return loss()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """A loss without metrics, collectives or anything else that stays."""
        before = dict(self.__dict__)
        self.accelerator = _OneProcess(self.accelerator)
        if hasattr(self, "_metrics"):
            self._metrics = {mode: defaultdict(list) for mode in self._metrics}
        try:
            yield
        finally:
            for name in self.__dict__.keys() - before.keys():
                delattr(self, name)
            self.__dict__.update(before)

    def _in_projection(
        self,
        model: Any,
        inputs: dict[str, Any],  # of the model, with labels
        loss_of: Callable[[Any], Tensor],  # TRL's loss, of a model that returns the log-probabilities that are there
        units: Any,  # as in `one_pass_loss`
    ) -> Tensor:
        def loss_fn(fields: Any) -> Tensor:
            def there(*_: Any, **__: Any) -> Any:
                return fields

            return self._heard_once(lambda: loss_of(there))

        return model(**inputs, fused_lm_head=True, loss_fn=loss_fn, units=units).loss

    def _output(
        self,
        model: Any,
        inputs: dict[str, Any],
        ref_logps: Tensor | None = None,
        prompts: SharedPrompts | None = None,
        **data: Any,
    ) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """Result, loss with that of the routers, and metrics of the loss that takes TRL's place.

        Labels of the inputs are not shifted, or are those of shared prompts.
        """
        own = self._loss
        assert own is not None
        loss = copy.copy(own)
        if own.needs_reference:
            data["ref_logps"] = ref_logps
        for name in own.data.keys() & inputs.keys():
            data[name] = inputs.pop(name)

        reference = self._reference_head(model, inputs) if own.data.keys() >= TOKEN_KL else None

        def evaluated(head: Head, labels: Tensor) -> Any:
            loss.head_options = own.head_options | self._head_options | head.transform
            if reference is not None:
                options = self._head_options | head.transform
                ref = reference.hidden, reference.weight
                kl = linear_kl(head.hidden, head.weight, *ref, labels, head.bias, reference.bias, **options).sum(-1)
                data.update(chosen_seq_kl=kl[: len(kl) // 2], rejected_seq_kl=kl[len(kl) // 2 :])
            return loss(head.hidden, head.weight, labels, head.bias, stats=METRIC_STATS, **data)

        if prompts is not None:
            data |= prompts.layout
            out = prompts.head_call(model, lambda head: evaluated(head, prompts.labels))[0]
            return out, out.loss, out.metrics()
        labels = aligned(inputs.pop("labels"))

        def run(head: Head) -> Any:
            virtual = head.hidden.shape[1] - labels.shape[1]
            return evaluated(head, torch.nn.functional.pad(labels, (virtual, 0), value=-100).to(head.hidden.device))

        if not self.aux_loss_enabled:
            out, _ = head_call(model, run, **inputs, use_cache=False)
            return out, out.loss, out.metrics()
        out, outputs = head_call(model, run, **inputs, output_router_logits=True, use_cache=False)
        weight = getattr(self, "router_aux_loss_coef", None)
        weight = self.aux_loss_coef if weight is None else weight
        return out, out.loss + weight * outputs.aux_loss, out.metrics() | {"aux_loss": outputs.aux_loss.detach()}

    def _reference_head(self, model: Any, inputs: dict[str, Any]) -> Head:
        """What the head of the reference computes from, for losses of more than its log-probabilities."""
        given = {name: value for name, value in inputs.items() if name != "labels"}
        with self._reference_alone():
            return hidden_and_head(self.ref_model or model, given)

    def _logged(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Means over processes, of what TRL logs: a count is no mean."""
        means = {name: value for name, value in metrics.items() if name != "not_finite"}
        return {name: self.accelerator.gather_for_metrics(value).mean().item() for name, value in means.items()}

    def _own_loss(self, model: Any, inputs: dict[str, Any], ref_logps: Tensor | None, **data: Any) -> Tensor:
        """The loss that takes TRL's place, with its metrics."""
        mode, attended = "train" if self.model.training else "eval", inputs["attention_mask"].sum()
        if self.shift is not None:
            data["delta"] = self.shift.delta
        out, loss, metrics = self._output(model, inputs, ref_logps, **data)
        if self.shift is not None and mode == "train":
            self.shift.update(out.rewards.detach(), data["desirable"])
        # TRL averages over batches, of which the last one of an evaluation may be smaller
        count = len(out.losses) if mode == "eval" else 1
        for name, value in self._logged(metrics).items():
            self._metrics[mode][name] += [value] * count
        if mode == "train":
            tokens = self.accelerator.gather_for_metrics(attended).sum().item()
            self._total_train_tokens += tokens // getattr(self, "_tp_size", 1)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return loss


class _WithColumns:
    """A collator that keeps numbers of the examples."""

    def __init__(self, collator: Any, columns: list[str]) -> None:
        self.collator, self.columns = collator, columns

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        for name in self.columns:
            # another collator may have passed it on as a list
            if not isinstance(batch.get(name), Tensor) and all(name in example for example in examples):
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


class DPOTrainer(AlignlossTrainer, _DPOTrainer):
    """TRL's DPOTrainer on alignloss, with `head_options` and `loss`; references that the data set has are taken."""

    paired = True
    shares_prompts = True

    def _reference_columns(self) -> set[str]:
        return {"ref_chosen_logps", "ref_rejected_logps"}

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        own, inputs = self._loss, dict(inputs)
        shared = inputs.pop("shared", None)
        if shared is not None and not return_outputs:
            return self._shared_loss(model, inputs, SharedPairs.of(shared))
        if own is None and (return_outputs or self.aux_loss_enabled or not self._head_trains()):
            return super()._compute_loss(model, inputs, return_outputs)
        if not self.precompute_ref_logps and (own is None or own.needs_reference):
            chosen, rejected = self.compute_ref_log_probs(self.ref_model or model, inputs)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        known = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        given = {name: value for name, value in inputs.items() if name not in known}
        given["labels"] = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        if own is not None:
            ref = [inputs[name] for name in known[1:]] if own.needs_reference else []
            return self._own_loss(model, given, torch.cat(ref) if ref else None)
        pairs = len(given["labels"]) // 2
        units = None if self._couples() else [(i, i + pairs) for i in range(pairs)]
        return self._in_projection(model, given, lambda there: self._trls_loss(there, inputs), units)

    def _couples(self) -> bool:
        return any(loss.startswith("aot") for loss in self.loss_types)

    def _trls_loss(self, there: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss of log-probabilities that are there, of the reference too."""
        with self._with(precompute_ref_logps=True):
            return super()._compute_loss(there, inputs, False)

    def _shared_loss(self, model: Any, inputs: dict[str, Any], pairs: SharedPairs) -> Tensor:
        """The loss of pairs whose prompts are computed once."""
        own, batch, shape = self._loss, pairs.prompts, inputs["input_ids"][:, 1:].shape
        names = (*METRIC_STATS, *(("log_sum_sq_probs",) if self.use_weighting else ()))

        def there(logps: Tensor, stats: LogprobStats) -> Any:
            """A model that gives what is there."""
            found = {name: pairs.scattered(getattr(stats, name), *shape) for name in names}
            fields = utils.FusedCausalLMOutput(log_probs=pairs.scattered(logps, *shape), **found)
            return lambda *_, **__: fields

        def call(head: Head) -> dict[str, Any]:
            return {"bias": head.bias, "stats": names, **head.transform, **self._head_options}

        if not self.precompute_ref_logps and (own is None or own.needs_reference):
            with self._reference_alone():
                ref, _ = batch.head_call(
                    self.ref_model or model,
                    lambda head: linear_logprob_stats(head.hidden, head.weight, batch.labels, **call(head)),
                )
            chosen, rejected = self.compute_ref_log_probs(there(ref.logps, ref), inputs)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        if own is not None:
            ref_logps = None
            if own.needs_reference:
                ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            return self._own_loss(model, inputs, ref_logps, prompts=batch)

        def loss_fn(logps: Tensor, stats: LogprobStats) -> Tensor:
            model = there(logps.to(accumulation_dtype(self.model.dtype)), stats)
            return self._heard_once(lambda: self._trls_loss(model, inputs))

        units = None if self._couples() else pairs.units()
        loss, _ = batch.head_call(
            model,
            lambda head: one_pass_loss(
                head.hidden, head.weight, batch.labels, loss_fn, units=units, **call(head)
            ),
        )  # fmt: skip
        return loss


class KTOTrainer(AlignlossTrainer, _KTOTrainer):
    """TRL's KTOTrainer on alignloss, with `head_options` and `loss`."""

    paired = False

    def _reference_columns(self) -> set[str]:
        return {"ref_logps"} | ({"ref_KL_logps"} if self.calculate_KL else set())

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        own = self._loss
        if own is None and (return_outputs or self.aux_loss_enabled or not self._head_trains()):
            return super()._compute_loss(model, inputs, return_outputs)
        inputs = {
            name: value.to(self.accelerator.device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        if not self.precompute_ref_logps:
            ref, ref_kl = self.compute_ref_log_probs(self.ref_model or model, inputs)
            inputs |= {"ref_logps": ref, "ref_KL_logps": ref_kl}
        divergence = None
        if self.calculate_KL:
            # of all processes, so that it is the same in every call
            mean = (self._compute_kl_logps(model, inputs) - inputs["ref_KL_logps"]).mean().detach()
            divergence = self.accelerator.gather_for_metrics(mean).mean().expand_as(inputs["ref_KL_logps"])
            inputs["ref_KL_logps"] = torch.zeros_like(divergence)
        known = ("completion_mask", "label", "ref_logps")
        given = {name: v for name, v in inputs.items() if name not in known and not name.startswith(("KL_", "ref_KL"))}
        given["labels"] = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        if own is not None:
            data = {"desirable": inputs["label"], "kl": 0.0 if divergence is None else divergence[:1].squeeze(0)}
            data = {name: value for name, value in data.items() if name in own.data}
            ref_logps = inputs["ref_logps"] if own.needs_reference else None
            return self._own_loss(model, given, ref_logps, **data)
        units = [(i,) for i in range(len(given["labels"]))]
        theirs = super()._compute_loss
        with self._with(precompute_ref_logps=True, _compute_kl_logps=lambda *_: divergence):
            return self._in_projection(model, given | {"use_cache": False}, lambda m: theirs(m, inputs, False), units)


class SFTTrainer(AlignlossTrainer, _SFTTrainer):
    """TRL's SFTTrainer on alignloss, with `head_options`."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        full_logits = self.compute_loss_func is not None or self.label_smoother is not None
        parallel = getattr(self.accelerator, "parallelism_config", None)
        split = parallel is not None and getattr(parallel, "sp_enabled", False)
        if return_outputs or self.aux_loss_enabled or full_logits or split or not self._head_trains():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        theirs = super().compute_loss
        labels = inputs["labels"] if inputs.get("shift_labels") is None else inputs["shift_labels"]
        units = [(i,) for i in range(len(labels))]
        given = {**inputs, "use_cache": False}
        return self._in_projection(
            model, given, lambda there: theirs(there, dict(inputs), False, num_items_in_batch), units
        )


class _Online(AlignlossTrainer):
    """GRPO and RLOO, which ask the model for log-probabilities in the middle of their loss."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.aux_loss_enabled or self._couples_rows() or not self._head_trains():
            return super()._compute_loss(model, inputs)
        theirs = super()._compute_loss
        try:
            with self._quiet(), torch.no_grad():
                theirs(_Asked.of, inputs)
            raise AssertionError("TRL's loss did not call the model")
        except _Asked as asked:
            given = {name: value for name, value in asked.arguments.items() if name != "fused_lm_head"}
        units = [(i,) for i in range(len(given["labels"]))]
        with self.accelerator.autocast():
            return self._in_projection(model, given, lambda there: theirs(there, inputs), units)

    def _couples_rows(self) -> bool:
        """Whether the loss needs more than a row and its log-probabilities: a gradient of the entropy, a quantile."""
        return getattr(self, "_entropy_bonus_enabled", False) or getattr(self, "top_entropy_quantile", 1.0) < 1.0


class _Asked(Exception):
    """What a loss would call the model with; nothing else of that call is wanted."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments

    @staticmethod
    def of(**arguments: Any) -> Any:
        raise _Asked(arguments)


class GRPOTrainer(_Online, _GRPOTrainer):
    """TRL's GRPOTrainer on alignloss, with `head_options`."""

    @staticmethod
    def _entropy_trains(config: Any) -> bool:
        return config is not None and (config.entropy_coef != 0.0 or config.use_adaptive_entropy)


class RLOOTrainer(_Online, _RLOOTrainer):
    """TRL's RLOOTrainer on alignloss, with `head_options`."""
