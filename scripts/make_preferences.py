"""Writes alignloss/commands/data/preferences.jsonl: preference pairs made from rules that anyone can check.

    python scripts/make_preferences.py [PATH]

Every family below is one rule. Its rows are enumerated or drawn from a seeded generator (`Random.random` only, whose
sequence Python guarantees), so the file is the same on every machine.
"""

import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import TypeVar

Row = tuple[str, str, str]  # prompt, chosen, rejected
Item = TypeVar("Item")

PATH = Path(__file__).resolve().parent.parent / "alignloss" / "commands" / "data" / "preferences.jsonl"
SEED = 20
PER_FAMILY = 40

CAPITALS = {
    "Argentina": "Buenos Aires",
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Bulgaria": "Sofia",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogota",
    "Croatia": "Zagreb",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "Ethiopia": "Addis Ababa",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Ghana": "Accra",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Iceland": "Reykjavik",
    "India": "New Delhi",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Mongolia": "Ulaanbaatar",
    "Nepal": "Kathmandu",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Romania": "Bucharest",
    "Russia": "Moscow",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "Vietnam": "Hanoi",
}

# right spelling, common misspelling
SPELLINGS = {
    "absence": "absense",
    "accommodate": "accomodate",
    "achieve": "acheive",
    "address": "adress",
    "argument": "arguement",
    "beautiful": "beautifull",
    "because": "becuase",
    "beginning": "begining",
    "believe": "beleive",
    "business": "buisness",
    "calendar": "calender",
    "committee": "commitee",
    "definitely": "definately",
    "embarrass": "embarass",
    "environment": "enviroment",
    "existence": "existance",
    "February": "Febuary",
    "foreign": "foriegn",
    "friend": "freind",
    "government": "goverment",
    "grammar": "grammer",
    "guarantee": "garantee",
    "height": "hieght",
    "immediately": "immediatly",
    "independent": "independant",
    "knowledge": "knowlege",
    "library": "libary",
    "necessary": "neccessary",
    "neighbor": "nieghbor",
    "occurred": "occured",
    "possession": "posession",
    "receive": "recieve",
    "recommend": "recomend",
    "rhythm": "rythm",
    "separate": "seperate",
    "success": "succes",
    "surprise": "suprise",
    "tomorrow": "tommorow",
    "until": "untill",
    "weird": "wierd",
}

# word: (opposite, a word of like meaning)
OPPOSITES = {
    "ancient": ("modern", "old"),
    "angry": ("calm", "furious"),
    "awake": ("asleep", "alert"),
    "beautiful": ("ugly", "pretty"),
    "begin": ("end", "start"),
    "big": ("small", "large"),
    "brave": ("cowardly", "bold"),
    "bright": ("dim", "shiny"),
    "buy": ("sell", "purchase"),
    "cheap": ("expensive", "inexpensive"),
    "clean": ("dirty", "tidy"),
    "close": ("open", "shut"),
    "cold": ("hot", "chilly"),
    "cry": ("laugh", "weep"),
    "damp": ("dry", "moist"),
    "difficult": ("easy", "hard"),
    "empty": ("full", "vacant"),
    "enemy": ("friend", "foe"),
    "fast": ("slow", "quick"),
    "forget": ("remember", "overlook"),
    "generous": ("stingy", "giving"),
    "happy": ("sad", "glad"),
    "heavy": ("light", "weighty"),
    "join": ("separate", "connect"),
    "loud": ("quiet", "noisy"),
    "lower": ("raise", "drop"),
    "noon": ("midnight", "midday"),
    "polite": ("rude", "courteous"),
    "poor": ("rich", "needy"),
    "push": ("pull", "shove"),
    "right": ("wrong", "correct"),
    "rough": ("smooth", "uneven"),
    "safe": ("dangerous", "secure"),
    "strong": ("weak", "powerful"),
    "tall": ("short", "high"),
    "thick": ("thin", "dense"),
    "true": ("false", "correct"),
    "unite": ("divide", "merge"),
    "vanish": ("appear", "disappear"),
    "victory": ("defeat", "win"),
}

# irregular verb: past tense
PAST_TENSES = {
    "become": "became",
    "begin": "began",
    "blow": "blew",
    "break": "broke",
    "bring": "brought",
    "build": "built",
    "buy": "bought",
    "catch": "caught",
    "choose": "chose",
    "come": "came",
    "draw": "drew",
    "drink": "drank",
    "drive": "drove",
    "eat": "ate",
    "fall": "fell",
    "feel": "felt",
    "find": "found",
    "fly": "flew",
    "forget": "forgot",
    "freeze": "froze",
    "give": "gave",
    "go": "went",
    "grow": "grew",
    "hear": "heard",
    "hold": "held",
    "keep": "kept",
    "know": "knew",
    "leave": "left",
    "make": "made",
    "run": "ran",
    "see": "saw",
    "sing": "sang",
    "sleep": "slept",
    "speak": "spoke",
    "stand": "stood",
    "swim": "swam",
    "take": "took",
    "teach": "taught",
    "tell": "told",
    "write": "wrote",
}

# larger unit, smaller unit, how many of the smaller in one of the larger
UNITS = [
    ("metres", "centimetres", 100),
    ("kilometres", "metres", 1000),
    ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
]

# question: the short answer
FACTS = {
    "What color is grass?": "Grass is green.",
    "What color is a clear sky?": "The sky is blue.",
    "What color is snow?": "Snow is white.",
    "What color is a ripe banana?": "A ripe banana is yellow.",
    "What color is coal?": "Coal is black.",
    "What do bees make?": "Bees make honey.",
    "What do cows eat?": "Cows eat grass.",
    "What do plants need to grow?": "Plants need water and light.",
    "What do we breathe?": "We breathe air.",
    "Where do fish live?": "Fish live in water.",
    "Where does the sun rise?": "The sun rises in the east.",
    "Where does the sun set?": "The sun sets in the west.",
    "Where do penguins live?": "Penguins live in the south.",
    "What is ice made of?": "Ice is frozen water.",
    "What is paper made from?": "Paper is made from wood.",
    "What is bread made from?": "Bread is made from flour.",
    "What is cheese made from?": "Cheese is made from milk.",
    "What is a young dog called?": "A young dog is a puppy.",
    "What is a young cat called?": "A young cat is a kitten.",
    "What is a young cow called?": "A young cow is a calf.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "How many legs does a dog have?": "A dog has four legs.",
    "How many legs does an ant have?": "An ant has six legs.",
    "How many wheels does a bicycle have?": "A bicycle has two wheels.",
    "How many sides does a triangle have?": "A triangle has three sides.",
    "How many corners does a square have?": "A square has four corners.",
    "How many fingers are on one hand?": "A hand has five fingers.",
    "When do leaves fall?": "Leaves fall in autumn.",
    "When do owls hunt?": "Owls hunt at night.",
    "When do most people sleep?": "Most people sleep at night.",
    "Who teaches in a school?": "Teachers teach in a school.",
    "Who treats sick animals?": "A vet treats sick animals.",
    "Who bakes bread?": "A baker bakes bread.",
    "Who flies a plane?": "A pilot flies a plane.",
    "What melts in the sun?": "Ice melts in the sun.",
    "What shines at night?": "The moon shines at night.",
    "What keeps us dry in the rain?": "An umbrella keeps us dry.",
    "What tells the time?": "A clock tells the time.",
    "What opens a lock?": "A key opens a lock.",
    "What cuts paper?": "Scissors cut paper.",
}

REQUESTS = {
    "Where is my parcel?": "Your parcel",
    "Where is my refund?": "Your refund",
    "When is my card due?": "Your card",
    "Where is my ticket?": "Your ticket",
    "Where is the plumber?": "The plumber",
    "When is my order due?": "Your order",
    "Where is my book?": "Your book",
    "Where is the repairman?": "The repairman",
}
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October"]
MONTHS += ["November", "December"]
LETTERS = list("ABCDEFGHIJKLMNOPQRSTUV")

GROUPS = {
    "animals": ["cat", "dog", "horse", "sheep", "lion", "bear"],
    "fruits": ["apple", "banana", "cherry", "grape", "lemon", "pear"],
    "colors": ["red", "blue", "green", "yellow", "black", "white"],
    "tools": ["hammer", "saw", "drill", "wrench", "file", "axe"],
    "drinks": ["water", "tea", "milk", "coffee", "juice", "cocoa"],
    "vehicles": ["car", "bus", "train", "truck", "boat", "tram"],
    "clothes": ["shirt", "hat", "coat", "scarf", "dress", "sock"],
    "vegetables": ["carrot", "onion", "potato", "leek", "pea", "bean"],
    "metals": ["iron", "gold", "silver", "copper", "zinc", "lead"],
    "birds": ["robin", "crow", "eagle", "swan", "owl", "goose"],
}


def pick(random: Random, items: list[Item]) -> Item:
    return items[int(random.random() * len(items))]


def shuffled(random: Random, items: list[Item]) -> list[Item]:
    return sorted(items, key=lambda _: random.random())


def arithmetic(random: Random) -> Iterator[Row]:
    """The right result of a sum, difference or product against one that is off by 1, 2, 3 or 10."""
    sums = shuffled(random, [(a, "+", b) for a in range(11, 60) for b in range(11, 40)])
    differences = shuffled(random, [(a, "-", b) for a in range(50, 99) for b in range(11, 40)])
    products = shuffled(random, [(a, "*", b) for a in range(3, 13) for b in range(3, 13)])
    problems = [problem for three in zip(sums, differences, products, strict=False) for problem in three]
    for a, sign, b in problems:
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        wrong = result + pick(random, [-3, -2, -1, 1, 2, 3, 10])
        yield f"What is {a} {sign} {b}?", f"{a} {sign} {b} = {result}.", f"{a} {sign} {b} = {wrong}."


def unit_conversion(random: Random) -> Iterator[Row]:
    """The right number of smaller units against ten times or a tenth of it, or one unit's worth too many."""
    for count in range(2, 6):
        for large, small, factor in UNITS:
            result = count * factor
            wrong = pick(random, [result * 10, result + factor] + [result // 10] * (result % 10 == 0))
            yield f"How many {small} are in {count} {large}?", f"{result} {small}.", f"{wrong} {small}."


def ordering(random: Random) -> Iterator[Row]:
    """Three different numbers from smallest to largest against the same with two neighbors swapped."""
    while True:
        numbers = shuffled(random, list(range(2, 100)))[:3]
        right, wrong = sorted(numbers), sorted(numbers)
        i = pick(random, [0, 1])
        wrong[i], wrong[i + 1] = wrong[i + 1], wrong[i]
        prompt, chosen, rejected = (", ".join(map(str, order)) for order in (numbers, right, wrong))
        if numbers not in (right, wrong):
            yield f"Sort, smallest first: {prompt}.", f"{chosen}.", f"{rejected}."


def capital(random: Random) -> Iterator[Row]:
    """The capital of a country against the capital of another country of the table."""
    for country, city in CAPITALS.items():
        wrong = pick(random, [other for other in CAPITALS.values() if other != city])
        chosen, rejected = (f"The capital of {country} is {name}." for name in (city, wrong))
        yield f"What is the capital of {country}?", chosen, rejected


def spelling(random: Random) -> Iterator[Row]:
    """The right spelling of a word against a common misspelling; the prompt shows both, in either order."""
    for right, wrong in SPELLINGS.items():
        first, second = shuffled(random, [right, wrong])
        yield f'Which spelling is right, "{first}" or "{second}"?', f'"{right}" is right.', f'"{wrong}" is right.'


def opposite(random: Random) -> Iterator[Row]:
    """A word of opposite meaning against a word of like meaning."""
    for word, (other, like) in OPPOSITES.items():
        yield f'What is the opposite of "{word}"?', f'"{other}".', f'"{like}".'


def past_tense(random: Random) -> Iterator[Row]:
    """The irregular past tense of a verb against the regular ending, which is wrong for these verbs."""
    for verb, past in PAST_TENSES.items():
        regular = verb + ("d" if verb.endswith("e") else "ed")
        chosen, rejected = (f'Yesterday I {form}, so "{form}".' for form in (past, regular))
        yield f'What is the past tense of "{verb}"?', chosen, rejected


def concise(random: Random) -> Iterator[Row]:
    """A plain answer against the same answer behind an opening that says nothing."""
    openings = [
        "Well, that is a good question, and I think that ",
        "As you may or may not already know, ",
        "Let me think about this for a moment: ",
        "To be quite honest and fair with you, ",
    ]
    for question, answer in FACTS.items():
        yield f"In short: {question}", answer, pick(random, openings) + answer[0].lower() + answer[1:]


def polite(random: Random) -> Iterator[Row]:
    """The same information with a courteous opening against a rude one."""
    courteous = ["I am sorry for the wait.", "Thank you for asking.", "Thank you for your patience."]
    rude = ["Stop asking me that.", "Not you again.", "Learn to wait.", "Why should I care?"]
    for question, subject in REQUESTS.items():
        for day in WEEKDAYS:
            answer = f"{subject} comes on {day}."
            prompt = f'Customer: "{question}" Say {day}.'
            yield prompt, f"{pick(random, courteous)} {answer}", f"{pick(random, rude)} {answer}"


def list_format(random: Random) -> Iterator[Row]:
    """The same three words in the format that the prompt asks for against another of the four formats."""
    formats: dict[str, Callable[[list[str]], str]] = {
        "separated by commas": ", ".join,
        "in capital letters, with spaces between": lambda words: " ".join(words).upper(),
        "as a numbered list": lambda words: " ".join(f"{i}. {word}" for i, word in enumerate(words, 1)),
        "joined by hyphens": "-".join,
    }
    for group, members in GROUPS.items():
        for name, write in formats.items():
            words = shuffled(random, members)[:3]
            other = pick(random, [f for key, f in formats.items() if key != name])
            yield f"Name three {group}, {name}.", write(words), other(words)


def straight_answer(random: Random) -> Iterator[Row]:
    """What comes next in the week, the year or the alphabet against a reply that evades the question."""
    evasions = ["Hard to say.", "Who knows?", "That depends.", "Ask someone else.", "No idea, sorry."]
    sequences = {"day": [*DAYS, DAYS[0]], "month": [*MONTHS, MONTHS[0]], "letter": LETTERS}
    for what, items in sequences.items():
        for item, after in pairwise(items):
            yield f"Which {what} comes after {item}?", f"After {item} comes {after}.", pick(random, evasions)


FAMILIES = [
    arithmetic,
    unit_conversion,
    ordering,
    capital,
    spelling,
    opposite,
    past_tense,
    concise,
    polite,
    list_format,
    straight_answer,
]


def make_rows() -> dict[str, list[Row]]:
    """The rows of every family, by the name of the family."""
    random = Random(SEED)
    return {family.__name__: list(islice(family(random), PER_FAMILY)) for family in FAMILIES}


def make_text() -> str:
    """The whole file, a JSON object to a line: in every block of lines each family comes once, in a shuffled order."""
    random = Random(SEED)
    families = [shuffled(random, rows) for rows in make_rows().values()]
    rows = [row for block in zip(*families, strict=True) for row in shuffled(random, list(block))]
    keys = ("prompt", "chosen", "rejected")
    return "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make_text().encode())
