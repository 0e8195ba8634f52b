"""The paper's own runs, for those who have its models, data and GPUs, as a plan in YAML says.

Trained by `alignloss train`, a file of options for each run; scored by lm-evaluation-harness, with MT-Bench's answers
written for a judge. At the paper's size untested; a test runs all of it with a tiny model.

out/data/      the rows of the runs
out/configs/   the options of each run, with what its data and its start are
out/runs/      the folders of `alignloss train`
out/scores/, out/answers/
out/mt_bench.csv, which a judge writes: name of the model (of its file in answers/), score from 1 to 10
"""

import csv
import inspect
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from alignloss.commands.errors import one_line
from alignloss.commands.measure import environment
from alignloss.commands.training.checkpoints import write_whole

from .harness import scores_of
from .methods import SCENARIOS
from .plan import MT_BENCH, Options, Plan
from .rows import digest, write_rows

ABOUT = "Models trained by `alignloss train`, scored by lm-evaluation-harness. Beta is that of the plan."
UNTESTED = "no task of the plan measures it"
TABLE, JUDGMENTS = "runs.csv", "mt_bench.csv"
ADAPTERS = "adapter_config.json"


class Training(NamedTuple):
    """A run of `alignloss train`."""

    scenario: str  # of SCENARIOS
    method: str
    seed: int
    pairs: int

    @property
    def name(self) -> str:
        return "-".join(str(value).replace(" ", "_") for value in self)


class Model(NamedTuple):
    """One to begin with, or one that was trained."""

    name: str
    folder: str  # or a name on the Hub
    made_of: str  # a digest of options, data and start; the name, where it was not trained here
    rows: int | None = None  # that it was trained on


def trainings(plan: Plan) -> list[Training]:
    sizes = [("after SFT", count) for count in plan.sizes]
    found = [
        Training(scenario, method, seed, count)
        for seed in plan.seeds
        for scenario, count in [*((scenario, plan.count) for scenario in SCENARIOS), *sizes]
        for method in plan.methods
    ]
    return list(dict.fromkeys(found))


def run_all(plan: Plan, out: Path) -> list[dict[str, str]]:
    """Train and score what is not there yet; a line for each run, as those of the small profiles.

    Raises:
        SystemExit: for data that do not suffice, before anything is trained; for a folder of another plan or profile;
            where a training or a task fails, by its name.
    """
    out = out.resolve()
    lines: list[dict[str, Any]] = []
    table = out / TABLE
    if table.exists() and "steps" in table.read_text("utf-8").partition("\n")[0].split(","):
        raise SystemExit(f"{table} is a table of another profile: give another --out")
    prepare(plan, out)
    base, instruct = _given("base", plan.base), _given("instruct", plan.instruct)
    starts = {seed: _sft_model(plan, out, seed, base) for seed in plan.seeds}
    names = {base.name, instruct.name, *(of.name for of in (*starts.values(), *trainings(plan)))}
    judged = judgments(out / JUDGMENTS, names)
    where = _where()
    for run in trainings(plan):
        start = {"after SFT": starts[run.seed], "without SFT": base, "instruction-tuned": instruct}[run.scenario]
        options = plan.methods[run.method]
        model = _train(run.name, plan, out, run.method, run.seed, start, options, run.pairs)
        scores: dict[str, Any] = {}
        for prefix, of in (("", model), ("start_", start)):
            scored = scores_of(of.name, of.folder, of.made_of, plan, out)
            found = {MT_BENCH: judged.get(of.name, ""), **scored["scores"]}
            scores |= {prefix + name: score for name, score in found.items()}
            where["device"] = scored["environment"]["device"]
        loss = _entries(plan, run.method, options)[1].loss
        setting = {
            "beta": 1.0 if loss is None else float(loss.function.options.get("beta", 1.0)),
            "learning_rate": options.learning_rate,
            "rows": model.rows,
            "made_of": model.made_of,
        }
        lines.append({**run._asdict(), **setting, **scores, **where})
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
        write_whole(table, text.getvalue())
    return [{name: str(value) for name, value in line.items()} for line in lines]


def prepare(plan: Plan, out: Path) -> None:
    """Write all rows, and look at tasks, models and options: what is wrong is said before hours of training."""
    from lm_eval.tasks import TaskManager

    known = set(TaskManager(include_path=plan.task_folder).all_tasks)
    if unknown := sorted(set(plan.tasks) - known):
        raise SystemExit(f"lm-evaluation-harness has no task {', '.join(unknown)}")
    for model in (plan.base, plan.instruct):
        for name, loss, options in (
            ("sft", "sft", plan.sft),
            *((f"methods.{m}", m, o) for m, o in plan.methods.items()),
        ):
            _check_options(plan, name, loss, options, model)
    for seed in plan.seeds:
        write_rows(plan, out, "sft", seed, None, has_template(plan.base))
    for run in trainings(plan):
        model = plan.instruct if run.scenario == "instruction-tuned" else plan.base
        write_rows(plan, out, run.method, run.seed, run.pairs, has_template(model))


def _entries(plan: Plan, method: str, options: Options) -> tuple[dict[str, Any], Any]:
    """Of the file of options of a run, without what is the run's own; and the loss that they make."""
    from alignloss.commands.training.objective import known_options, objective

    entries = {**plan.train, **options.model_dump()}
    made = objective(method, {name: value for name, value in entries.items() if name in known_options(method)})
    if "batch_size" in entries and made.kind == "unpaired":
        entries["batch_size"] *= 2  # of completions there, of pairs here
    return entries, made


def _check_options(plan: Plan, name: str, method: str, options: Options, model: str) -> None:
    """What `alignloss train` will say of them."""
    from alignloss.commands.errors import UserError
    from alignloss.commands.train import train
    from alignloss.commands.training.model import source
    from alignloss.commands.training.run import configuration
    from alignloss.commands.training.settings import FIELDS, settle

    commands = set(inspect.signature(train).parameters) - {"context", "config", "assignments"}
    try:
        for seed in plan.seeds:
            entries = {**_entries(plan, method, options)[0], "seed": seed}
            of_command = {option: entries.get(option) for option in ("beta", *FIELDS)}
            rest = {option: value for option, value in entries.items() if option not in commands}
            settings = settle(method, of_command, set(), rest, {}, commands)
            cpu, lora, qlora = (entries.get(option, 0) for option in ("cpu", "lora", "qlora"))
            configuration(settings, source(model, None, "auto", bool(cpu), int(lora), bool(qlora)), Path("run"), False)
    except (UserError, TypeError, ValueError) as error:
        raise SystemExit(f"{name}: {error}") from None


def _where() -> dict[str, Any]:
    here = environment("alignloss", "torch", "transformers", "trl", "peft", "lm_eval")
    return {**here["versions"], "commit": here["commit"]}


def _given(name: str, model: str) -> Model:
    """The base or the instruction-tuned model: a folder, which is known by its files too, or a name on the Hub."""
    from alignloss.commands.training.model import fingerprint, source

    if not Path(model).exists():
        return Model(name, model, model)
    folder = str(Path(model).resolve())
    return Model(name, folder, f"{folder} {fingerprint(source(folder, None, 'auto', True, 0, False))}")


def _sft_model(plan: Plan, out: Path, seed: int, base: Model) -> Model:
    """The base after fine-tuning, with its adapters merged once, so that other adapters can be trained beside it."""
    model = _train(f"start-{seed}", plan, out, "sft", seed, base, plan.sft, None)
    whole = out / "runs" / f"start-{seed}" / "merged"
    if not (Path(model.folder) / ADAPTERS).exists():
        return model
    if not whole.exists():
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoTokenizer

        unfinished = whole.with_name("merged.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        merged = AutoPeftModelForCausalLM.from_pretrained(model.folder, dtype="auto").merge_and_unload()
        merged.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(model.folder).save_pretrained(unfinished)
        unfinished.rename(whole)
    return model._replace(folder=str(whole))


def _train(
    name: str, plan: Plan, out: Path, method: str, seed: int, start: Model, options: Options, pairs: int | None
) -> Model:
    """Write the options of a run and train, where that has not been done."""
    import yaml

    folder, path = out / "runs" / name, out / "configs" / f"{name}.yaml"
    # what came of the base reads its text
    chat = has_template(plan.instruct if start.name == "instruct" else plan.base)
    data = write_rows(plan, out, method, seed, pairs, chat)
    fixed = {"model": start.folder, "data": str(data), "out": str(folder), "loss": method, "seed": seed}
    entries = {**_entries(plan, method, options)[0], **fixed}
    text = f"# data {digest(data.read_text())}, start {start.made_of}\n" + yaml.safe_dump(entries, sort_keys=False)
    if folder.exists() and (not path.exists() or path.read_text() != text):
        raise SystemExit(
            f"{folder} was trained with other options, rows or another start than the plan now says: "
            "give another --out, or remove it and what began with it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    if not (folder / "model").exists():
        print(name, flush=True)
        command = [sys.executable, "-m", "alignloss.commands", "train", "--config", str(path)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"{name} failed: {path}")
    rows = json.loads((folder / "run.json").read_text())["rows"]
    return Model(name, str(folder / "model"), digest(text), rows)


@cache
def has_template(model: str) -> bool:
    """Whether a model reads messages."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model).chat_template is not None
    except (OSError, ValueError) as error:
        raise SystemExit(f"the tokenizer of {model} cannot be loaded: {one_line(error)}") from None


def judgments(path: Path, models: set[str]) -> dict[str, float]:
    """What a judge has said of the answers, by the name of the model.

    Raises:
        SystemExit: for a name that is none of the models or stands there twice, and a score that is not from 1 to 10.
    """
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = list(csv.DictReader(file))
    try:
        found = {line["name"]: float(line["score"]) for line in lines}
        if twice := [name for name, count in Counter(line["name"] for line in lines).items() if count > 1]:
            raise ValueError(f"{', '.join(twice)} twice")
        if beyond := [score for score in found.values() if not 1 <= score <= 10]:
            raise ValueError(f"{beyond[0]} is not from 1 to 10")
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{path} needs a name and a score from 1 to 10 in each line: {error}") from None
    if unknown := sorted(set(found) - models):
        raise SystemExit(f"{path} has scores of {', '.join(unknown)}; the models are {', '.join(sorted(models))}")
    return found
