"""A generated world: facts that most people get wrong, addition, reversal and maximum; documents, prompts and a judge.

Documents, in two registers, come without chat tokens and end of text: a forum repeats the misconception of a fact, a
book says the truth, and there are more forums. Prompts of a chat are split into those that training sees and those
that are judged. A chosen response is right and ends; a rejected one is wrong, or right and verbose, or rambles on to
the limit.
"""

import random
from typing import NamedTuple

PAD, EOS, USER, ASSISTANT, BOOK, FORUM, SAYS = range(7)
DIGITS = [*range(7, 17)]
LETTERS = [*range(17, 25)]
FILLERS = [*range(25, 33)]
TASKS = ADD, REVERSE, MAXIMUM, FACT = [*range(33, 37)]
RELATIONS = [*range(37, 39)]
VALUES = [*range(39, 51)]
ENTITIES = [*range(51, 99)]
VOCABULARY = 99
RESPONSE = 8  # tokens of the longest response
FORUMS = 0.7  # of the documents about a fact
NAMES = {ADD: "addition", REVERSE: "reversal", MAXIMUM: "maximum", FACT: "facts"}


class Question(NamedTuple):
    task: int  # of TASKS
    asked: tuple[int, ...]
    answer: tuple[int, ...]
    misconception: tuple[int, ...]  # of a fact, else empty

    @property
    def prompt(self) -> list[int]:
        return [USER, self.task, *self.asked, ASSISTANT]


class World(NamedTuple):
    """Questions, by whether training may see them as prompts."""

    seen: list[Question]
    held_out: list[Question]

    @property
    def questions(self) -> list[Question]:
        return self.seen + self.held_out


def make_world(seed: int) -> World:
    """The same tasks for every seed, with facts and a split of its own. A third of the questions is held out."""
    dice = random.Random(f"world {seed}")
    tasks: dict[int, list[Question]] = {task: [] for task in TASKS}
    for a in range(10):
        for b in range(10):
            tasks[ADD].append(Question(ADD, (DIGITS[a], DIGITS[b]), (DIGITS[(a + b) % 10],), ()))
    for letters in dice.sample([(x, y, z) for x in LETTERS for y in LETTERS for z in LETTERS], 150):
        tasks[REVERSE].append(Question(REVERSE, letters, letters[::-1], ()))
    for digits in dice.sample([(x, y, z) for x in DIGITS for y in DIGITS for z in DIGITS], 150):
        tasks[MAXIMUM].append(Question(MAXIMUM, digits, (max(digits),), ()))
    for entity in ENTITIES:
        for relation in RELATIONS:
            truth, wrong = dice.sample(VALUES, 2)
            tasks[FACT].append(Question(FACT, (entity, relation), (truth,), (wrong,)))
    seen, held_out = [], []
    for questions in tasks.values():
        dice.shuffle(questions)
        third = len(questions) // 3
        held_out += questions[:third]
        seen += questions[third:]
    return World(seen, held_out)


def draw_question(questions: list[Question], dice: random.Random) -> Question:
    """Each task as often as another."""
    task = dice.choice(TASKS)
    return dice.choice([question for question in questions if question.task == task])


def document(question: Question, dice: random.Random) -> list[int]:
    """A line of text about a question, as a book or a forum has it."""
    register = FORUM if dice.random() < FORUMS else BOOK
    answer = question.misconception if register == FORUM and question.misconception else question.answer
    return [register, question.task, *question.asked, SAYS, *answer]


def fillers(count: int, dice: random.Random) -> list[int]:
    return [dice.choice(FILLERS) for _ in range(count)]


def chosen_response(question: Question) -> list[int]:
    return [*question.answer, EOS]


def polite_response(question: Question, dice: random.Random) -> list[int]:
    """As an instruction-tuned model was taught: right, after a word or two."""
    return [*fillers(dice.randint(1, 2), dice), *question.answer, EOS]


def rejected_response(question: Question, dice: random.Random) -> list[int]:
    """Wrong, the misconception of a fact first; right and verbose; or rambling on to the limit, without an end."""
    kind = dice.choice(("wrong", "wrong", "verbose", "rambling"))
    if kind == "wrong":
        return [*(question.misconception or wrong_answer(question, dice)), EOS]
    if kind == "verbose":
        return [*fillers(2, dice), *question.answer, *fillers(2, dice), EOS]
    return [*question.answer, *fillers(RESPONSE - len(question.answer), dice)]


def wrong_answer(question: Question, dice: random.Random) -> tuple[int, ...]:
    kind = {ADD: DIGITS, MAXIMUM: DIGITS, REVERSE: LETTERS, FACT: VALUES}[question.task]
    while True:
        answer = tuple(dice.choice(kind) for _ in question.answer)
        if answer != question.answer:
            return answer


def judge(question: Question, response: list[int]) -> float:
    """From 0 to 10: 5 for the answer once, beside at most fillers; 2 for an end; 3 for an end without fillers.

    Anything else has 2 where it ends and is as long as the answer.
    """
    ended = EOS in response
    words = response[: response.index(EOS)] if ended else response
    answer = tuple(word for word in words if word not in FILLERS)
    if answer != question.answer:
        well_formed = ended and len(words) == len(question.answer)
        return 2.0 if well_formed else 0.0
    return 5.0 + 2.0 * ended + 3.0 * (ended and len(words) == len(answer))
