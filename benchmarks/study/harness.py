"""Scores of a model by lm-evaluation-harness, and its answers to MT-Bench's questions."""

import json
import time
import uuid
from pathlib import Path
from typing import Any

from alignloss.commands.training.checkpoints import write_whole

from .plan import Messages, Plan, as_text


def scores_of(name: str, folder: str, plan: Plan, out: Path) -> dict[str, float]:
    """The tasks' scores of a model, and its answers, where they have not been written for these tasks yet."""
    path, answers = out / "scores" / f"{name}.json", out / "answers" / f"{name}.jsonl"
    asked = {"tasks": plan.tasks, "limit": plan.limit}
    known = json.loads(path.read_text()) if path.exists() else {}
    unanswered = bool(plan.mt_bench) and not answers.exists()
    if known.get("asked") == asked and not unanswered:
        return known["scores"]
    model, tokenizer = _loaded(folder)
    if unanswered:
        answers.parent.mkdir(parents=True, exist_ok=True)
        write_whole(answers, _answers(name, model, tokenizer, plan))
    if known.get("asked") != asked:
        known = {"asked": asked, "scores": _scores(model, tokenizer, plan)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(known, indent=1))
    return known["scores"]


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
            model=harness, tasks=[task], num_fewshot=options.get("examples"), limit=plan.limit, task_manager=manager,
            bootstrap_iters=0, log_samples=False,
        )["results"][task]  # fmt: skip
        if options["metric"] not in results:
            raise SystemExit(f"{task} has no metric {options['metric']!r}; it has {', '.join(results)}")
        found[task] = float(results[options["metric"]])
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
    ids = inputs["input_ids"].to(model.device)
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True).strip()
