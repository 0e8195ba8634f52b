"""Measure time, memory and error of alignloss beside full logits and its peers; print, record and plot.

python -m benchmarks run --shapes smollm2-135m --tokens 1024 2048 --masked 0 0.5
python -m benchmarks step --shapes smollm2-135m --lengths 128 --pairs 4 --masked 0.5
python -m benchmarks step --trainers --shapes smollm2-135m --lengths 256 --pairs 2 --prompts 0.25 0.5 0.75
python -m benchmarks kernels --shapes 1024x32768
python -m benchmarks accuracy --shapes 128x32000 128x131072 128x262144
python -m benchmarks host --shapes smollm2-135m --rounds 300
python -m benchmarks study --profile quick --out study
python -m benchmarks plot benchmarks/results/NAME.json
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch

from alignloss.commands.fit import MODELS
from alignloss.ops.sizes import total_memory

from .accuracy import OFFSETS, PEAKS, SUMMED, Setting, measure_accuracy, summary
from .cases import Case, case
from .kernels import measure_kernels
from .limit import limit, measure_limit
from .measure import (
    Row,
    alone,
    available,
    measure_error,
    measure_longest,
    measure_memory,
    measure_profile,
    measure_time,
)
from .providers import MODES, PROVIDERS
from .report import merge, plot, record, show
from .steps import Run, measure_longest_steps, measure_steps

MEASURES = ("time", "memory", "error", "longest", "profile")
GIB = 1 << 30
MOST = 1 << 20
# what the extras of the study install
STUDY_PACKAGES = {"study": ("pandas", "scipy", "jinja2", "matplotlib", "vaderSentiment")}
STUDY_PACKAGES["paper"] = (*STUDY_PACKAGES["study"], "lm_eval", "pydantic", "yaml", "trl", "peft", "datasets")


def main() -> None:
    arguments = parse()
    if arguments.command == "plot":
        for path in arguments.files:
            if not plot(path):
                print(f"{path}: nothing to draw, neither tokens, vocabulary nor shapes vary")
        return
    if arguments.command == "alone":
        what, chosen, name, *options = arguments.what
        if what == "limit":
            way, *rest = options
            print(json.dumps(limit(Case(*chosen), name, Run(*way), *rest)))
        else:
            print(json.dumps(alone(*arguments.what)))
        return
    if arguments.command == "curves":
        curves(arguments)
        return
    if arguments.command == "study":
        study(arguments)
        return
    check(arguments)
    if arguments.memory is None:
        total = total_memory(torch.device(arguments.device))
        arguments.memory = (total or 8 * GIB) / GIB
    commands = {"run": run, "step": step, "references": references, "kernels": kernels, "host": host}
    commands["accuracy"] = accuracy
    commands[arguments.command](arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--shapes", nargs="+", default=["1024x32768"], help="models, or HxV")
    common.add_argument("--masked", nargs="+", type=float, default=[0.0], help="fraction of positions without a label")
    common.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    common.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    common.add_argument("--rounds", type=int, default=7, help="of the interleaved timing, after one that warms up")
    common.add_argument("--workspace", type=int, default=None, help="MiB of alignloss, in place of its default")
    common.add_argument("--memory", type=float, default=None, help="GiB that the longest may take: those of the GPU")
    common.add_argument("--most", type=int, default=MOST, help="tokens (steps: length) beyond which none is tried")
    common.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    common.add_argument("--name", default="latest", help="of the file in it")

    heads = commands.add_parser("run", parents=[common], help="the loss layer alone, every combination of the cases")
    heads.add_argument("--tokens", nargs="+", type=int, default=[2048], help="positions of all sequences")
    heads.add_argument("--pairs", type=int, default=4)
    heads.add_argument("--vocabulary", nargs="+", type=int, default=[None], help="in place of the shape's own")
    heads.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    heads.add_argument("--measure", nargs="+", default=["time", "memory", "error"], choices=MEASURES)

    steps = commands.add_parser("step", parents=[common], help="whole training steps of randomly initialised models")
    scored = commands.add_parser("references", parents=[common], help="references of a data set, by TRL and `score`")
    scored.add_argument("--examples", type=int, default=32, help="pairs of the data set")
    scored.add_argument("--lengths", nargs="+", type=int, default=[512], help="positions of the longest sequence")
    scored.add_argument("--pairs", type=int, default=2, help="of a batch")
    steps.add_argument("--lengths", nargs="+", type=int, default=[1024], help="positions of a sequence")
    steps.add_argument("--pairs", type=int, default=1)
    steps.add_argument("--train", nargs="+", default=["full"], choices=["full", "lora"])
    steps.add_argument("--checkpointing", action="store_true", help="recompute each layer in the backward")
    steps.add_argument("--optimizer", action="store_true", help="with a step of AdamW")
    steps.add_argument(
        "--limit", nargs="+", choices=["length", "vocabulary"], default=[],
        help="the largest that trains in a process that may grow by --memory, on a CPU in float32",
    )  # fmt: skip
    steps.add_argument("--longest", action="store_true", help="the longest sequences that fit --memory, up to --most")
    steps.add_argument("--trainers", action="store_true", help="TRL's DPO trainer beside ours, whole")
    steps.add_argument("--prompts", nargs="+", type=float, default=[0.75], help="shares of a sequence, with --trainers")

    blocks = commands.add_parser("kernels", parents=[common], help="block sizes of the Triton kernels, beside cuBLAS")
    blocks.add_argument("--tokens", nargs="+", type=int, default=[8192])
    blocks.set_defaults(pairs=4)
    hosts = commands.add_parser("host", parents=[common], help="host time of a call, its launches doing nothing")
    hosts.add_argument("--tokens", nargs="+", type=int, default=[512])
    hosts.set_defaults(pairs=4)

    errors = commands.add_parser("accuracy", parents=[common], help="errors where distributions are sharp and offset")
    errors.add_argument("--tokens", nargs="+", type=int, default=[SUMMED], help="whose log-probabilities are summed")
    errors.add_argument("--peaks", nargs="+", default=list(PEAKS), choices=list(PEAKS))
    errors.add_argument("--offsets", nargs="+", type=float, default=list(OFFSETS), help="of every logit, in nats")
    errors.set_defaults(pairs=1)

    runs = commands.add_parser("curves", help="runs of `alignloss train` with SmolLM2-135M on the bundled pairs")
    runs.add_argument("--losses", nargs="+", default=["dpo", "ipo", "kto", "cpo"])
    runs.add_argument("--train", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    runs.add_argument("--steps", type=int, default=24)
    runs.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    runs.add_argument("--name", default="latest", help="of the files in it")

    studies = commands.add_parser("study", help="methods of alignment in three scenarios, on small models trained here")
    studies.add_argument("--profile", default="quick", choices=["tiny", "quick", "full", "sentiment", "paper"])
    studies.add_argument("--out", type=Path, required=True, help="folder of runs.csv and report.html; gone on with")
    studies.add_argument(
        "--plan", type=Path, default=Path(__file__).parent / "study/paper.yaml", help="YAML, of the profile paper"
    )
    studies.add_argument("--processes", type=int, help="sharing the cores, not of paper  [default: 2; sentiment: 1]")

    drawing = commands.add_parser("plot", help="draw a file that varies tokens, vocabulary or shapes")
    drawing.add_argument("files", nargs="+", type=Path)
    commands.add_parser("alone").add_argument("what", type=json.loads)  # a fresh process
    return parser.parse_args()


def curves(arguments: argparse.Namespace) -> None:
    from .curves import draw, measure_curves

    check_out(arguments)
    result = measure_curves(arguments.losses, arguments.train, arguments.steps)
    path = arguments.out / f"{arguments.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png')}")


def study(arguments: argparse.Namespace) -> None:
    extra = "paper" if arguments.profile == "paper" else "study"
    if missing := [name for name in STUDY_PACKAGES[extra] if find_spec(name) is None]:
        raise SystemExit(f"the study needs {', '.join(missing)}: pip install -e '.[{extra}]'")
    from .study import schedule
    from .study.report import write_report

    failures: list[str] = []
    if arguments.out.exists() and not arguments.out.is_dir():
        raise SystemExit(f"--out is the folder of the results; {arguments.out} is a file")
    try:
        if extra == "paper":
            from .study import paper
            from .study.plan import read_plan

            plan = read_plan(arguments.plan)
            said = plan.families, paper.ABOUT, paper.UNTESTED
            lines = paper.run_all(plan, arguments.out)
        else:
            if arguments.processes is not None and arguments.processes < 1:
                raise SystemExit(f"processes are at least 1; got {arguments.processes}")
            profile = schedule.PROFILES[arguments.profile]
            said = schedule.WORLDS[profile.world].FAMILIES, schedule.WORLDS[profile.world].ABOUT
            lines, failures = schedule.run_all(profile, arguments.out, arguments.processes)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on") from None
    if lines:
        print(f"wrote {write_report(lines, arguments.out, *said)}")
    if failures:
        said = f"{len(failures)} runs failed; the same command tries them again:"
        raise SystemExit("\n".join([said, *failures]))


def check(arguments: argparse.Namespace) -> None:
    """Refuse at the start what would fail after minutes of measuring."""
    if arguments.workspace is not None and arguments.workspace < 1:
        raise SystemExit(f"--workspace is at least 1 MiB; got {arguments.workspace}")
    if arguments.rounds < 1:
        raise SystemExit(f"rounds are at least 1; got {arguments.rounds}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; leave out --device cuda")
    if arguments.command == "accuracy" and (arguments.masked != [0.0] or arguments.most != MOST):
        raise SystemExit("accuracy labels every token and takes as many as --tokens: leave out --masked and --most")
    trainers = getattr(arguments, "trainers", False)
    if getattr(arguments, "limit", ()) and (arguments.device, arguments.dtype) != ("cpu", "float32"):
        raise SystemExit("a limit is set for a process on a CPU, in float32: leave out --device and --dtype")
    if arguments.command in ("step", "references"):
        unknown = [shape for shape in arguments.shapes if shape not in MODELS]
        if unknown:
            raise SystemExit(f"a whole step needs shapes of models, out of {', '.join(MODELS)}; got {unknown}")
        needed = ["transformers", *(["trl"] if trainers or arguments.command == "references" else [])]
        for package in (*needed, *(["peft"] if "lora" in getattr(arguments, "train", ()) else [])):
            if find_spec(package) is None:
                raise SystemExit(f"a whole step needs {package}, which is not installed")
    check_out(arguments)


def check_out(arguments: argparse.Namespace) -> None:
    if Path(arguments.name).name != arguments.name or arguments.name in ("", ".."):
        raise SystemExit(f"--name is that of a file in the folder --out, without folders; got {arguments.name!r}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out is the folder of the results: {error}") from None


def cases(arguments: argparse.Namespace, tokens: list[int], vocabularies: Iterable[int | None] = (None,)) -> list[Case]:
    """Every combination of what was asked for, the shapes outermost."""
    options = {
        "dtype": arguments.dtype,
        "device": arguments.device,
        "sequences": 2 * arguments.pairs,
        "workspace_bytes": None if arguments.workspace is None else arguments.workspace << 20,
    }
    return [
        case(shape, vocabulary, tokens=count, masked=masked, **options)
        for shape, vocabulary, count, masked in product(arguments.shapes, vocabularies, tokens, arguments.masked)
    ]


def measured(arguments: argparse.Namespace, found: Iterable[tuple[Case, Callable[[], list[Row]]]]) -> None:
    """Measure one case after the other; show and record each at once: a run that is cut short keeps what it has."""
    results: list[tuple[Case, list[Row]]] = []
    path = arguments.out / f"{arguments.name}.json"
    command = "python -m benchmarks " + shlex.join(sys.argv[1:])
    for chosen, measure in found:
        rows = measure()
        if not rows:
            print(f"{chosen}: nothing of this was to be measured, or ran")
            continue
        show(chosen, rows)
        results.append((chosen, rows))
        record(path, command, results)
    if results:
        plot(path)


def run(arguments: argparse.Namespace) -> None:
    cases(arguments, arguments.tokens, arguments.vocabulary)  # which refuses bad ones before anything is measured
    runs: dict[bool, list[tuple[str, str]]] = {}  # with a softcap or without

    def measure(chosen: Case) -> list[Row]:
        softcap = chosen.softcap is not None
        if softcap not in runs:
            runs[softcap] = available(chosen, arguments.providers, arguments.modes)
        pairs = runs[softcap]
        work = {
            "time": lambda: measure_time(chosen, pairs, arguments.rounds),
            "memory": lambda: measure_memory(chosen, pairs),
            "error": lambda: measure_error(chosen, pairs),
            "profile": lambda: measure_profile(chosen, pairs),
        }
        return merge(*(work[name]() for name in work if name in arguments.measure))

    def measure_longest_of(chosen: Case, name: str) -> list[Row]:
        pairs = available(chosen, [name], arguments.modes)
        return measure_longest(chosen, pairs, int(arguments.memory * GIB), arguments.most)

    def work() -> Iterator[tuple[Case, Callable[[], list[Row]]]]:
        for chosen in cases(arguments, arguments.tokens, arguments.vocabulary):
            if set(arguments.measure) - {"longest"}:
                yield chosen, lambda chosen=chosen: measure(chosen)
            for name in arguments.providers if "longest" in arguments.measure else ():
                # one after the other, as each takes long
                yield chosen, lambda chosen=chosen, name=name: measure_longest_of(chosen, name)

    measured(arguments, work())


def step(arguments: argparse.Namespace) -> None:
    def measure(chosen: Case, train: str, prompt: float) -> list[Row]:
        way = Run(train, arguments.checkpointing, arguments.optimizer)
        if arguments.trainers:
            from .trainers import measure_trainers

            return measure_trainers(chosen, way, prompt, arguments.rounds)
        names = list(dict.fromkeys(name for name, _ in available(chosen, arguments.providers, ["DPO step"])))
        if arguments.limit:
            memory = int(arguments.memory * GIB)
            found = [measure_limit(chosen, way, vary, names, memory, arguments.most) for vary in arguments.limit]
            return [row for rows in found for row in rows]
        if arguments.longest:
            return measure_longest_steps(chosen, way, names, int(arguments.memory * GIB), arguments.most)
        return measure_steps(chosen, way, names, arguments.rounds)

    found = product(
        cases(arguments, [2 * arguments.pairs * length for length in arguments.lengths]),
        dict.fromkeys(arguments.train),
        arguments.prompts if arguments.trainers else [0.0],
    )
    measured(arguments, ((chosen, lambda chosen=chosen, how=how: measure(chosen, *how)) for chosen, *how in found))


def references(arguments: argparse.Namespace) -> None:
    from .trainers import measure_references

    found = cases(arguments, [2 * arguments.pairs * length for length in arguments.lengths])
    measured(
        arguments,
        (
            (chosen, lambda chosen=chosen: measure_references(chosen, arguments.examples, arguments.rounds))
            for chosen in found
        ),
    )


def kernels(arguments: argparse.Namespace) -> None:
    found = cases(arguments, arguments.tokens)
    measured(arguments, ((chosen, lambda chosen=chosen: measure_kernels(chosen, arguments.rounds)) for chosen in found))


def host(arguments: argparse.Namespace) -> None:
    from .host import measure_host

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("kernels are to be compiled: unset TRITON_INTERPRET")
    found = [chosen._replace(dtype="bfloat16") for chosen in cases(arguments, arguments.tokens)]
    measured(arguments, ((chosen, lambda chosen=chosen: measure_host(chosen, arguments.rounds)) for chosen in found))


def accuracy(arguments: argparse.Namespace) -> None:
    found = cases(arguments, arguments.tokens)
    if not all(0 <= offset <= 1e6 for offset in arguments.offsets):
        raise SystemExit(f"an offset is from 0 to 1e6; got {arguments.offsets}")
    if min(min(chosen.hidden, chosen.vocabulary) for chosen in found) < 2:
        raise SystemExit("H and V are at least 2: a column of H holds the offset")
    modes = ["trainable head", "SFT step"]
    names = list(dict.fromkeys(name for name, _ in available(found[0], arguments.providers, modes)))
    every: list[Row] = []

    def measure(chosen: Case, setting: Setting) -> list[Row]:
        rows = measure_accuracy(chosen, setting, names)
        every.extend({"vocabulary": chosen.vocabulary} | row for row in rows)
        return rows

    settings = [Setting(*each) for each in product(arguments.peaks, arguments.offsets)]
    each = [
        (chosen, lambda chosen=chosen, setting=setting: measure(chosen, setting))
        for chosen, setting in product(found, settings)
    ]
    measured(arguments, [*each, (found[0]._replace(shape="every shape"), lambda: summary(every))])


if __name__ == "__main__":
    main()
