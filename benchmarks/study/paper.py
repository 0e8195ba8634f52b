"""The paper's own runs, for those who have its models, data and GPUs, as a plan in YAML says.

Trained by `alignloss train`, a file of options for each run; scored by lm-evaluation-harness, with MT-Bench's answers
written for a judge. At the paper's size untested; a test runs all of it with a tiny model.
"""

import csv
import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from alignloss.commands.measure import environment
from alignloss.commands.training.checkpoints import write_whole

from .harness import scores_of
from .methods import SCENARIOS
from .plan import MT_BENCH, Messages, Plan, as_text

ABOUT = "Models trained by `alignloss train`, scored by lm-evaluation-harness."
JUDGMENTS = "mt_bench.csv"


class Training(NamedTuple):
    """A run of `alignloss train`."""

    scenario: str  # of SCENARIOS
    method: str
    seed: int
    pairs: int

    @property
    def name(self) -> str:
        return "-".join(str(value).replace(" ", "_") for value in self)


def trainings(plan: Plan) -> list[Training]:
    found = [
        Training(scenario, method, seed, plan.count)
        for seed in plan.seeds
        for scenario in SCENARIOS
        for method in plan.methods
    ]
    found += [
        Training("after SFT", method, seed, pairs)
        for seed in plan.seeds
        for pairs in plan.sizes
        for method in plan.methods
    ]
    return list(dict.fromkeys(found))


def run_all(plan: Plan, out: Path) -> list[dict[str, str]]:
    """Train and score what is not there yet; a line for each run, as those of the small profiles."""
    for seed in plan.seeds:
        _train(_start_name(seed), plan, out, "sft", seed, plan.base, plan.sft or {}, None)
    judged = _judgments(out / JUDGMENTS)
    here = environment("torch", "transformers")
    where = {**here["versions"], "device": here["device"], "commit": here["commit"]}
    lines = []
    for run in trainings(plan):
        start_name, start = _start(run, plan, out)
        model = _train(run.name, plan, out, run.method, run.seed, start, plan.methods[run.method], run.pairs)
        scores: dict[str, float] = {}
        for prefix, name, folder in (("", run.name, str(model)), ("start_", start_name, start)):
            found = scores_of(name, folder, plan, out) | ({MT_BENCH: judged[name]} if name in judged else {})
            scores |= {prefix + task: score for task, score in found.items()}
        rate = plan.methods[run.method]["learning_rate"]
        lines.append({**run._asdict(), "beta": 1.0, "learning_rate": rate, **scores, **where})
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with open(out / "runs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
    return [{name: str(line.get(name, "")) for name in columns} for line in lines]


def _start_name(seed: int) -> str:
    return f"start-{seed}"


def _start(run: Training, plan: Plan, out: Path) -> tuple[str, str]:
    """Name and folder of the model that a run begins with."""
    name = _start_name(run.seed)
    return {
        "after SFT": (name, str(out / "runs" / name / "model")),
        "without SFT": ("base", plan.base),
        "instruction-tuned": ("instruct", plan.instruct),
    }[run.scenario]


def _train(
    name: str, plan: Plan, out: Path, method: str, seed: int, model: str, options: dict[str, Any], pairs: int | None
) -> Path:
    """Write the options of a run and train, where that has not been done; the folder of the model."""
    import yaml

    folder, path = out / "runs" / name, out / "configs" / f"{name}.yaml"
    chat = has_template(plan.instruct if model == plan.instruct else plan.base)  # what came of the base reads its text
    data = _data(plan, out, method, seed, pairs, chat)
    entries = {"model": model, "data": str(data), "out": str(folder), "loss": method, "seed": seed}
    text = yaml.safe_dump({**(plan.train or {}), **options, **entries}, sort_keys=False)
    if path.exists() and path.read_text() != text:
        raise SystemExit(f"{path} has other options than the plan now says: take another --out, or remove {folder} too")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    if not (folder / "model").exists():
        print(name, flush=True)
        subprocess.run([sys.executable, "-m", "alignloss.commands", "train", "--config", str(path)], check=True)
    return folder / "model"


@cache
def has_template(model: str) -> bool:
    """Whether a model reads messages."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model).chat_template is not None


def _data(plan: Plan, out: Path, method: str, seed: int, pairs: int | None, chat: bool) -> Path:
    """The rows of a run: pairs, the chosen ones of them for SFT, or without a number the data of the first SFT."""
    kind = "sft_data" if pairs is None else "chosen" if method == "sft" else "pairs"
    source = plan.sft_data if pairs is None else plan.pairs
    key = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:8]
    path = out / "data" / f"{kind}-{key}-{seed}-{pairs or 'all'}-{'chat' if chat else 'text'}.jsonl"
    if not path.exists():
        rows = list(rows_of(source))
        random.Random(seed).shuffle(rows)
        if pairs is not None and pairs > len(rows):
            raise SystemExit(f"{source['name']} has {len(rows)} pairs; the plan asks for {pairs}")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [_line(*row, kind == "pairs", chat) for row in rows[:pairs]]
        write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def _line(prompt: Messages, chosen: str, rejected: str | None, paired: bool, chat: bool) -> dict[str, Any]:
    def answer(text: str) -> Any:
        return [{"role": "assistant", "content": text}] if chat else " " + text

    line = {"prompt": prompt if chat else as_text(prompt)}
    if not paired:
        return line | {"completion": answer(chosen)}
    if rejected is None:
        raise SystemExit(f"the pairs have a row without a rejected completion: {str(prompt)[:200]}")
    return line | {"chosen": answer(chosen), "rejected": answer(rejected)}


def rows_of(source: dict[str, str]) -> Iterator[tuple[Messages, str, str | None]]:
    """Prompt, chosen completion and, of pairs, the rejected one, of a file or a data set of the Hub."""
    name = source["name"]
    if Path(name).is_file():
        lines = Path(name).read_text("utf-8").splitlines()
        found: Any = (json.loads(line) for line in lines if line.strip())
    else:
        import datasets

        found = datasets.load_dataset(name, split=source.get("split", "train"))
    for row in found:
        chosen, rejected = row.get("chosen") or row.get("messages") or row["completion"], row.get("rejected")
        conversation = isinstance(chosen, list) and len(chosen) > 1  # the whole of it
        prompt = chosen[:-1] if conversation else row["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        yield prompt, _last(chosen), None if rejected is None else _last(rejected)


def _last(completion: str | Messages) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _judgments(path: Path) -> dict[str, float]:
    """What a judge has said of the answers: columns `name` and `score`, from 1 to 10."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {line["name"]: float(line["score"]) for line in csv.DictReader(file)}
