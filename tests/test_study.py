"""The study: a world whose judge can be checked by hand, runs that are had again from their line, claims by numbers."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pandas, stats = pytest.importorskip("pandas"), pytest.importorskip("scipy.stats")
pytest.importorskip("transformers")
from benchmarks.study import claims, generated, methods, schedule, world  # noqa: E402
from benchmarks.study.models import make_model, saved  # noqa: E402
from benchmarks.study.report import runs_of, setting, sizes_of, write_report  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[1]
SUM = world.Question(world.ADD, (world.DIGITS[4], world.DIGITS[9]), (world.DIGITS[3],), ())
RIGHT, WRONG, WORD, END = world.DIGITS[3], world.DIGITS[5], world.FILLERS[0], world.EOS


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ([RIGHT, END], 10),
        ([RIGHT, END, WRONG], 10),  # nothing counts behind the end
        ([WORD, RIGHT, END], 7),
        ([RIGHT], 5),
        ([RIGHT, *[WORD] * 7], 5),
        ([WRONG, END], 2),
        ([WRONG], 0),
        ([RIGHT, WRONG, END], 0),
        ([END], 0),
    ],
)
def test_the_judge(response, score):
    assert world.judge(SUM, response) == score


def test_the_world_splits_its_questions():
    made, again = world.make_world(3), world.make_world(3)
    assert made == again != world.make_world(4)
    assert not {tuple(q.prompt) for q in made.seen} & {tuple(q.prompt) for q in made.held_out}
    assert len(made.held_out) == 33 + 50 + 50 + 32 and len(made.questions) == 100 + 150 + 150 + 96
    dice = world.random.Random(0)
    for question in made.questions:
        assert world.judge(question, world.chosen_response(question)) == 10
        assert all(world.judge(question, world.rejected_response(question, dice)) < 10 for _ in range(5))
        assert len(world.rejected_response(question, dice)) <= world.RESPONSE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A profile of a few steps, run as a whole."""
    out = tmp_path_factory.mktemp("study")
    schedule.run_all(schedule.PROFILES["tiny"], out, processes=1)
    return out


@pytest.mark.nightly
def test_a_run_is_had_again_from_its_line(folder, tmp_path):
    lines = schedule.read_table(folder / "runs.csv")
    assert len(lines) == len(schedule.PROFILES["tiny"].rows()) == 24
    threads = torch.get_num_threads()
    lines = [line for line in lines if line["scenario"] == "after SFT" and line["pairs"] == "32"]
    for line in lines:
        found = schedule.execute("generated", schedule.row_of(line), tmp_path / "starts")  # its start too
        for name, value in found.items():
            if name != "seconds":
                assert float(line[name]) == value, name
    torch.set_num_threads(threads)


@pytest.mark.nightly
@pytest.mark.parametrize("cut", [1, 2, 40])
def test_what_was_cut_off_is_run_again(folder, cut):
    table = folder / "runs.csv"
    whole = schedule.read_table(table)
    table.write_text(table.read_text()[:-cut])
    assert schedule.read_table(table) == whole[:-1]
    lines, failures = schedule.run_all(schedule.PROFILES["tiny"], folder, processes=1)
    timeless = [[{k: v for k, v in line.items() if k != "seconds"} for line in table] for table in (lines, whole)]
    assert sorted(timeless[0], key=str) == sorted(timeless[1], key=str) and not failures
    with open(table, newline="") as file:
        assert len(list(csv.reader(file))) == 25


def damaged(lines, fault):
    """The lines of a table (texts, the first with the columns' names), with a fault in the third run."""
    cells = lines[3].split(",")
    judge = lines[0].split(",").index("judge")
    if fault == "a cell too many":
        return [*lines[:3], lines[3] + ",1", *lines[4:]]
    if fault == "a cell too few":
        return [*lines[:3], ",".join(cells[:-1]), *lines[4:]]
    cells[judge] = {"no number": "abc", "nothing": "", "another judge": "7.77"}[fault]
    return [*lines[: 3 + (fault == "another judge")], ",".join(cells), *lines[4:]]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("a cell too many", "line 4: it has other cells"),
        ("a cell too few", "line 4: it has other cells"),
        ("no number", "line 4: judge is 'abc', not a number"),
        ("nothing", "line 4: judge is '', not a number"),
        ("another judge", "line 5: another line of the same run"),
    ],
)
def test_a_damaged_table_is_refused_and_left_as_it_is(folder, tmp_path, fault, message):
    table = tmp_path / "runs.csv"
    text = "\n".join(damaged((folder / "runs.csv").read_text().splitlines(), fault)) + "\n"
    table.write_text(text)
    with pytest.raises(SystemExit, match=message):
        schedule.run_all(schedule.PROFILES["tiny"], tmp_path, processes=1)
    assert table.read_text() == text


@pytest.mark.nightly
def test_a_table_may_hold_a_line_twice_and_what_is_no_number(folder, tmp_path):
    lines = (folder / "runs.csv").read_text().splitlines()
    place = lines[0].split(",").index("kl")
    cells = lines[3].split(",")
    cells[place] = "nan"  # of a run that diverged
    lines[3] = ",".join(cells)
    (tmp_path / "runs.csv").write_text("\n".join([*lines, lines[5]]) + "\n")
    found, failures = schedule.run_all(schedule.PROFILES["tiny"], tmp_path, processes=1)
    assert len(found) == 24 and not failures
    assert write_report(found, tmp_path, generated.FAMILIES, generated.ABOUT).exists()


def test_a_damaged_start_is_named(tmp_path):
    saved(make_model(0), tmp_path / "pretrained-0-60.pt")
    whole = (tmp_path / "pretrained-0-60.pt").read_bytes()
    assert generated.starting_model("pretrained", 0, 60, tmp_path)
    for content in (b"", whole[:1000], b"x" * 100):
        (tmp_path / "pretrained-0-60.pt").write_bytes(content)
        with pytest.raises(SystemExit, match=r"60\.pt is damaged"):
            generated.starting_model("pretrained", 0, 60, tmp_path)


@pytest.mark.nightly
def test_a_package_that_is_missing_is_named(tmp_path):
    program = "import sys; sys.modules['scipy'] = None; from benchmarks.__main__ import main; main()"
    command = [sys.executable, "-c", program, "study", "--profile", "tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "needs scipy: pip install -e '.[study]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.nightly
def test_the_folder_of_the_results_is_no_file(folder):
    command = [sys.executable, "-m", "benchmarks", "study", "--profile", "tiny", "--out", str(folder / "runs.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "runs.csv is a file" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.nightly
def test_a_run_that_fails_leaves_the_others(folder):
    profile = schedule.PROFILES["tiny"]._replace(methods=("no method", "sft"), sizes=())
    lines, failures = schedule.run_all(profile, folder, processes=1)
    assert {line["method"] for line in lines} == {"sft"} and len(failures) == len(lines) == 3
    assert "KeyError: 'no method'" in failures[0]


@pytest.mark.nightly
def test_a_table_of_something_else_is_left_alone(folder, tmp_path):
    profile, text = schedule.PROFILES["tiny"]._replace(seeds=2), (folder / "runs.csv").read_text()
    commit = schedule.read_table(folder / "runs.csv")[0]["commit"]
    for name, other, message in (
        ("commit", text.replace(commit, "0123456789ab"), "has lines of .*0123456789ab"),
        ("columns", text.replace("learning_rate", "rate"), "a table of something else"),
    ):
        (tmp_path / name).mkdir()
        table = tmp_path / name / "runs.csv"
        table.write_text(other)
        with pytest.raises(SystemExit, match=message):
            schedule.run_all(profile, table.parent, processes=1)
        assert table.read_text() == other
    # what is there may be reported by another commit
    (tmp_path / "commit/runs.csv").write_text(text.replace(commit, "0123456789ab"))
    assert len(schedule.run_all(schedule.PROFILES["tiny"], tmp_path / "commit", processes=1)[0]) == 24


@pytest.mark.nightly
def test_the_report(folder):
    lines = schedule.read_table(folder / "runs.csv")
    page = write_report(lines, folder, generated.FAMILIES, generated.ABOUT).read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page
    again = [line | {"seed": "1", "judge": str(float(line["judge"]) + 1)} for line in lines]
    page = write_report(lines + again, folder, generated.FAMILIES, generated.ABOUT).read_text()
    assert "seeds: 2" in page and "one seed tells nothing" not in page


@pytest.mark.nightly
@pytest.mark.parametrize("method", list(methods.METHODS))
def test_each_method_raises_its_own_objective(folder, method):
    steps, rate = (60, 3e-3) if method == "rlhf" else (24, 1e-3)  # which sees a few samples in a step
    row = methods.Row("after SFT", method, 0, 64, 1.0, rate, steps, 16, 60)
    threads = torch.get_num_threads()
    data = generated.data_of(row, folder / "starts")
    run = methods.Run(row, data)
    methods.METHODS[method](run)
    if method in ("rso", "spin"):  # whose pairs are made on the way: DPO's loss of them
        assert len(run.losses) == (methods.ROUNDS if method == "spin" else 1)
        for losses in run.losses:
            assert losses[0] == pytest.approx(math.log(2)) and sum(losses[-3:]) / 3 < math.log(2)
    else:
        assert methods.objective(run.model, data, row) < methods.objective(data.start, data, row)
    torch.set_num_threads(threads)


def table_of(values):
    """A line for each (scenario, method, seed, beta): its judge."""
    fixed = {"learning_rate": 1e-3, "start_judge": 4.0}
    lines = [
        {"scenario": s, "method": m, "seed": seed, "beta": beta, "judge": judge, **fixed}
        for (s, m, beta), judges in values.items()
        for seed, judge in enumerate(judges)
    ]  # fmt: skip
    return pandas.DataFrame(lines)


def test_a_setting_is_chosen_on_other_seeds():
    table = table_of({("after SFT", "dpo", 1.0): [1, 9, 1], ("after SFT", "dpo", 3.0): [5, 2, 2]})
    best = claims.tuned(table, "judge")
    # seed 0: others say 1.0 (5 > 2), and so it has 1; seed 1: 3.0 (3.5 > 1), 2; seed 2: 1.0 (5 > 3.5), 1
    assert best.set_index("seed")["judge"].to_dict() == {0: 1, 1: 2, 2: 1}
    assert setting(best, table) == "1 at 0.001, 3 at 0.001; end of the sweep of beta"
    assert setting(best.assign(kl=0.0), table).endswith("nothing to learn from")
    one = claims.tuned(table[table["beta"] == 1.0].assign(judge=float("nan")), "judge")  # nothing to choose
    assert len(one) == 3


def test_verdicts_are_those_of_intervals():
    table = table_of(
        {
            ("x", "a", 1.0): [5, 6, 7],
            ("x", "b", 1.0): [2, 3, 4],
            ("x", "c", 1.0): [6, 5, 8],
            ("x", "d", 1.0): [5, 6.01, 7],
        }
    )
    of = claims.difference(table, "x", "c", "a", "judge")
    assert of.name == "c − a" and of.values.tolist() == [1, -1, 1]
    # mean 1/3, standard error 2/3, t of 2 degrees of freedom at 97.5 %, and of two together at 98.75 %
    for many, t in ((1, 4.302653), (2, 6.205347)):
        assert claims.interval(of.values, many) == (pytest.approx(1 / 3), pytest.approx(2 / 3 * t, rel=1e-5))
    above = lambda table, left, *right: claims.above("", table, "x", [left], [*right], "judge").verdict
    near = lambda table, left, right, room: claims.near("", table, "x", [left], [right], "judge", room).verdict
    assert above(table, "c", "a") == claims.NOISE
    assert above(table, "a", claims.START) == claims.NOISE  # 1, 2, 3: 2 ± 2.48
    assert above(table, "a", claims.SFT_MODEL) == claims.NOT_RUN  # as there is no scenario of that name
    assert near(table, "a", "d", 0.1) == claims.HOLDS
    assert near(table, "a", "e", 0.1) == claims.NOT_RUN
    apart = table_of({("x", "a", 1.0): [5, 6, 7], ("x", "b", 1.0): [2, 3, 3.9], ("x", "c", 1.0): [2, 2.5, 3.95]})
    assert above(apart, "a", "b") == claims.HOLDS
    assert above(apart, "b", "a") == claims.FAILS
    assert near(apart, "a", "b", 1.0) == claims.FAILS
    assert above(apart[apart["seed"] == 0], "a", "b") == claims.ONE_SEED
    # 3, 3.5, 3.05: 3.18 ± 0.69 alone, and ± 0.98 beside another one
    assert above(apart, "a", "b", "c") == claims.HOLDS
    assert claims.above("", apart.assign(judge=float("nan")), "x", ["a"], ["b"], "judge").verdict == claims.NOT_RUN


def test_the_sft_model_is_the_start_of_the_first_scenario():
    first, second, _ = methods.SCENARIOS
    table = table_of({(first, "dpo", 1.0): [9, 9, 9], (second, "kto", 1.0): [4.5, 4.4, 4.6]})
    table.loc[table["scenario"] == second, "start_judge"] = 0.0
    assert claims.difference(table, second, "kto", claims.SFT_MODEL, "judge").values.tolist() == pytest.approx(
        [0.5, 0.4, 0.6]
    )
    assert claims.difference(table, second, claims.START, "kto", "judge").values.tolist() == [-4.5, -4.4, -4.6]


@pytest.mark.parametrize(
    ("judges", "smaller", "part"),
    [
        ({30: [5, 6], 300: [6, 7], 3000: [2, 3]}, claims.HOLDS, claims.HOLDS),
        ({30: [2, 3], 300: [6.1, 7.2], 3000: [6, 7]}, claims.NOISE, claims.HOLDS),
        ({30: [2, 3], 300: [4, 5], 3000: [6, 7.01]}, claims.FAILS, claims.FAILS),
        ({30: [2, 6], 300: [4, 8], 3000: [5, 4]}, claims.NOISE, claims.NOISE),
        ({300: [4, 8]}, claims.NOT_RUN, claims.NOT_RUN),
    ],
)
def test_verdicts_on_the_number_of_pairs(judges, smaller, part):
    lines = [
        {"method": "dpo", "seed": seed, "pairs": pairs, "judge": judge}
        for pairs, of in judges.items()
        for seed, judge in enumerate(of)
    ]
    lines += [line | {"method": "rlhf", "judge": 100.0 * line["pairs"]} for line in lines]  # which is not asked
    table = pandas.DataFrame(lines)
    assert claims.smaller("", table, "judge").verdict == smaller
    assert claims.part("", table, "judge", 1.0).verdict == part


def test_the_curve_of_sizes_has_each_method_at_its_own_rate():
    columns = ["scenario", "method", "beta", "learning_rate", "pairs"]
    rows = [("after SFT", "sft", 1.0, 2e-4, pairs) for pairs in (30, 300)]
    rows += [("after SFT", "dpo", 1.0, 5e-6, pairs) for pairs in (30, 300)]
    rows += [("after SFT", "dpo", 1.0, 1e-3, 300), ("after SFT", "dpo", 3.0, 5e-6, 300), ("without SFT", *rows[0][1:])]
    found = sizes_of(pandas.DataFrame(rows, columns=columns), usual=300)
    assert sorted(found.itertuples(index=False, name=None)) == sorted(rows[:4])


def test_a_claim_about_what_is_not_measured_cannot_be_tested():
    table = table_of({("after SFT", method, 1.0): [1, 2] for method in ("kto", "dpo", "ipo", "cpo")})
    sizes = pandas.DataFrame([{"method": "dpo", "seed": 0, "pairs": 30, "judge": 1.0}])
    families = {"judge": "dialogue", "gsm8k": "mathematics"}
    found = {of.claim: of.verdict for of in claims.claims(table, sizes, families)}
    assert found["After SFT, alignment gains (truthfulness)"] == claims.TOO_SMALL
    assert found["After SFT, alignment gains (mathematics)"] == claims.NOT_RUN
    assert found["After SFT, KTO is best (dialogue)"] == claims.NOISE
    assert found["Without SFT, DPO and IPO fall below the SFT model (dialogue)"] == claims.NOT_RUN


def test_the_page_says_what_the_table_of_full_does():
    lines = schedule.read_table(ROOT / "benchmarks/results/study/full/runs.csv")
    assert {schedule.row_of(line) for line in lines} == {*schedule.PROFILES["full"].rows()} and len(lines) == 1560
    page = (ROOT / "docs/study.md").read_text()
    found = runs_of(lines, generated.FAMILIES)
    for claim, verdict, numbers in claims.claims(found.best, found.sizes, generated.FAMILIES):
        assert f"| {claim} | {verdict} | {numbers} |" in page
    for method in methods.METHODS:
        of = [found.best[(found.best["scenario"] == s) & (found.best["method"] == method)] for s in methods.SCENARIOS]
        assert f"| {method} | " + " | ".join(claims.shown(*claims.interval(runs["judge"])) for runs in of) in page


@pytest.mark.nightly
def test_what_the_quick_profile_finds(tmp_path):
    """One seed of what `full` finds with each of five at the same setting."""
    lines, failures = schedule.run_all(schedule.PROFILES["quick"], tmp_path)
    table = pandas.DataFrame(lines)
    table["judge"] = table["judge"].astype(float)
    assert len(table) == 55 and not failures
    without = table[table["scenario"] == "without SFT"].set_index("method")["judge"]
    assert without[["kto", "cpo"]].min() > without[["dpo", "ipo"]].max()
    # ten times the pairs are worth more at first
    after = table[table["scenario"] == "after SFT"].groupby("pairs")["judge"].mean()
    assert after["300"] - after["30"] > after["3000"] - after["300"]
