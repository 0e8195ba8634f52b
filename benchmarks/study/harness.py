"""Scores of a model by lm-evaluation-harness, and its answers to MT-Bench's questions."""

import hashlib
import json
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from alignloss.commands.measure import environment
from alignloss.commands.training.checkpoints import write_whole

from .plan import Messages, Plan, as_text

_PATH = re.compile(r"[\w./~-]+\.\w+")


def scores_of(name: str, folder: str, made_of: str, plan: Plan, out: Path) -> dict[str, Any]:
    """The tasks' `scores` of a model, after its answers, in a process that leaves the GPU to the next training.

    What has been written of the same model and questions is taken. Also the `environment` in which they came about.
    """
    path = out / "scores" / f"{name}.json"
    asked = {
        "model": made_of,
        "files": [hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files_of(plan)],
        "tasks": {task: options.model_dump(exclude={"family"}) for task, options in plan.tasks.items()},
        **plan.model_dump(mode="json", include={"limit", "chat_template", "answer_tokens"}),
    }
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("asked") != asked:
        path.parent.mkdir(parents=True, exist_ok=True)
        order = out / "scores" / f"{name}.order"
        write_whole(order, json.dumps([name, folder, asked, plan.model_dump(mode="json"), str(out)]))
        print(f"scoring {name}", flush=True)
        if subprocess.run([sys.executable, "-m", __name__, str(order)]).returncode:
            raise SystemExit(f"{name} could not be scored")
        order.unlink()
        known = json.loads(path.read_text())
    return known


def files_of(plan: Plan) -> list[Path]:
    """What the questions come from here: all that lies beside the tasks, files that these name, and MT-Bench's."""
    found = [path for path in Path(plan.task_folder).rglob("*") if path.is_file()] if plan.task_folder else []
    found = [path for path in found if "__pycache__" not in path.parts]
    named = {Path(name) for path in found if path.suffix == ".yaml" for name in _PATH.findall(path.read_text("utf-8"))}
    found += [path for path in named if path.is_file()]
    return sorted({path.resolve() for path in found + [Path(plan.mt_bench)] * bool(plan.mt_bench)})


def main(order: Path) -> None:
    name, folder, asked, entries, out = json.loads(order.read_text())
    plan = Plan.model_validate(entries)
    model, tokenizer = _loaded(folder)
    if plan.mt_bench:
        answers = Path(out) / "answers" / f"{name}.jsonl"
        answers.parent.mkdir(parents=True, exist_ok=True)
        write_whole(answers, _answers(name, model, tokenizer, plan))
    known = {"asked": asked, "scores": _scores(model, tokenizer, plan), "environment": environment("lm_eval", "torch")}
    write_whole(Path(out) / "scores" / f"{name}.json", json.dumps(known, indent=1))


def _loaded(folder: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to("cuda" if on_gpu else "cpu").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _scores(model: Any, tokenizer: Any, plan: Plan) -> dict[str, float]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=plan.evaluation_batch)
    manager, found = TaskManager(include_path=plan.task_folder), {}
    for task, options in plan.tasks.items():
        results = simple_evaluate(
            model=harness, tasks=[task], num_fewshot=options.examples, limit=plan.limit, task_manager=manager,
            apply_chat_template=plan.chat_template and tokenizer.chat_template is not None,
            bootstrap_iters=0, log_samples=False,
        )["results"][task]  # fmt: skip
        if options.metric not in results:
            raise SystemExit(f"{task} has no metric {options.metric!r}; it has {', '.join(results)}")
        found[task] = float(results[options.metric])
    return found


def _answers(name: str, model: Any, tokenizer: Any, plan: Plan) -> str:
    """Greedy answers to each turn, as JSON lines in the form that FastChat's judge reads."""
    assert plan.mt_bench
    lines = []
    for question in map(json.loads, Path(plan.mt_bench).read_text("utf-8").splitlines()):
        messages: Messages = []
        for turn in question["turns"]:
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": _answer(messages, model, tokenizer, plan.answer_tokens)})
        turns = [message["content"] for message in messages[1::2]]
        line = {
            "question_id": question["question_id"], "answer_id": uuid.uuid4().hex, "model_id": name,
            "choices": [{"index": 0, "turns": turns}], "tstamp": time.time(),
        }  # fmt: skip
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def _answer(messages: Messages, model: Any, tokenizer: Any, tokens: int) -> str:
    import torch

    if tokenizer.chat_template is None:
        inputs = tokenizer(as_text(messages), return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    with torch.no_grad():
        written = model.generate(**inputs.to(model.device), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
