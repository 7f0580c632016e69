"""The tiny model's world: questions with one right answer, drawn from a random.Random. Import it; nothing to run.

A question carries the sentence that states its answer. Pre-training shows the sentences, supervised fine-tuning puts
them between <think> tags, and held-out sets ask for the answer. Left out: sums and differences (see `sums.py`), and
on purpose anything with two good answers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from words import (
    BABIES,
    COLOURS,
    COUNTRIES,
    DAYS,
    KINDS,
    LEGS,
    MONTHS,
    OPPOSITES,
    SEASONS,
    SOUNDS,
    WORDS,
)


@dataclass(frozen=True)
class Question:
    """One question. `key` names the question whatever the language or wording; held-out splits go by it."""

    task: str
    language: str  # "en" or "zh"
    key: str
    prompt: str
    topic: str  # what it is about, as a heading would say it
    statement: str  # one sentence that holds the answer, as it reads inside another sentence
    answer: str

    @property
    def sentence(self) -> str:
        """The statement standing alone."""
        return capitalised(self.statement) if self.language == "en" else self.statement


def capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


@dataclass(frozen=True)
class Facts:
    """A kind of fact that fills the same sentence for every row: x is the topic of the question, y the answer."""

    prompts: dict[str, list[str]]
    topics: dict[str, str]
    statements: dict[str, str]
    rows: list[tuple[str, str, str, str]]  # English x and y, Chinese x and y


def pairs(rows: list[tuple[str, ...]], a: int, b: int, c: int, d: int) -> list[tuple[str, str, str, str]]:
    return [(row[a], row[b], row[c], row[d]) for row in rows]


def following(rows: list[tuple[str, ...]], step: int) -> list[tuple[str, str, str, str]]:
    """Each row with the one `step` places on, round the circle of days, months or seasons."""
    others = [rows[(i + step) % len(rows)] for i in range(len(rows))]
    return [(here[0], there[0], here[1], there[1]) for here, there in zip(rows, others, strict=True)]


FACTS = {
    "capital": Facts(
        {
            "en": ["What is the capital of {x}?", "Name the capital of {x}.", "Which city is the capital of {x}?"],
            "zh": ["{x}的首都是哪里？", "{x}的首都是什么？", "请说出{x}的首都。"],
        },
        {"en": "the capital of {x}", "zh": "{x}的首都"},
        {"en": "the capital of {x} is {y}.", "zh": "{x}的首都是{y}。"},
        pairs(COUNTRIES, 0, 1, 3, 4),
    ),
    "country": Facts(
        {
            "en": ["{x} is the capital of which country?", "Which country has the capital {x}?"],
            "zh": ["{x}是哪个国家的首都？", "哪个国家的首都是{x}？"],
        },
        {"en": "the country of {x}", "zh": "首都{x}的国家"},
        {"en": "{x} is the capital of {y}.", "zh": "{x}是{y}的首都。"},
        pairs(COUNTRIES, 1, 0, 4, 3),
    ),
    "continent": Facts(
        {
            "en": ["On which continent is {x}?", "Name the continent of {x}.", "Where in the world is {x}?"],
            "zh": ["{x}在哪个洲？", "{x}位于哪个大洲？"],
        },
        {"en": "the continent of {x}", "zh": "{x}所在的洲"},
        {"en": "{x} is in {y}.", "zh": "{x}在{y}。"},
        pairs(COUNTRIES, 0, 2, 3, 5),
    ),
    "colour": Facts(
        {
            "en": ["What colour is {x}?", "Tell me the colour of {x}.", "Which colour does {x} have?"],
            "zh": ["{x}是什么颜色？", "请说出{x}的颜色。"],
        },
        {"en": "the colour of {x}", "zh": "{x}的颜色"},
        {"en": "{x} is {y}.", "zh": "{x}是{y}的。"},
        pairs(COLOURS, 0, 1, 2, 3),
    ),
    "opposite": Facts(
        {
            "en": ["What is the opposite of {x}?", "Name the opposite of {x}.", "Which word is the opposite of {x}?"],
            "zh": ["“{x}”的反义词是什么？", "请说出“{x}”的反义词。"],
        },
        {"en": "the opposite of {x}", "zh": "“{x}”的反义词"},
        {"en": "the opposite of {x} is {y}.", "zh": "“{x}”的反义词是“{y}”。"},
        pairs(OPPOSITES, 0, 1, 2, 3) + pairs(OPPOSITES, 1, 0, 3, 2),
    ),
    "baby": Facts(
        {
            "en": ["What is the baby of {x} called?", "How do we call the young of {x}?"],
            "zh": ["{x}的宝宝叫什么？", "{x}的孩子叫什么？"],
        },
        {"en": "the baby of {x}", "zh": "{x}的宝宝"},
        {"en": "the baby of {x} is called a {y}.", "zh": "{x}的宝宝叫{y}。"},
        pairs(BABIES, 0, 1, 2, 3),
    ),
    "sound": Facts(
        {
            "en": ["What does {x} say?", "What sound does {x} make?"],
            "zh": ["{x}怎么叫？", "{x}的叫声是什么？"],
        },
        {"en": "the sound of {x}", "zh": "{x}的叫声"},
        {"en": "{x} says {y}.", "zh": "{x}的叫声是{y}。"},
        pairs(SOUNDS, 0, 1, 2, 3),
    ),
    "legs": Facts(
        {
            "en": ["How many legs does {x} have?", "Count the legs of {x}."],
            "zh": ["{x}有几条腿？", "{x}有多少条腿？"],
        },
        {"en": "the legs of {x}", "zh": "{x}的腿"},
        {"en": "{x} has {y} legs.", "zh": "{x}有{y}条腿。"},
        pairs(LEGS, 0, 1, 2, 3),
    ),
    "kind": Facts(
        {
            "en": ["What kind of thing is {x}?", "What is {x}?"],
            "zh": ["{x}是哪一种东西？", "{x}是什么东西？"],
        },
        {"en": "the kind of {x}", "zh": "{x}的种类"},
        {"en": "{x} is a kind of {y}.", "zh": "{x}是一种{y}。"},
        pairs(KINDS, 0, 1, 2, 3),
    ),
    "after": Facts(
        {"en": ["What comes after {x}?", "Name what follows {x}."], "zh": ["{x}之后是什么？", "{x}过后是什么？"]},
        {"en": "what follows {x}", "zh": "{x}之后"},
        {"en": "after {x} comes {y}.", "zh": "{x}之后是{y}。"},
        following(DAYS, 1) + following(MONTHS, 1) + following(SEASONS, 1),
    ),
    "before": Facts(
        {"en": ["What comes before {x}?", "Name what goes before {x}."], "zh": ["{x}之前是什么？", "{x}前面是什么？"]},
        {"en": "what goes before {x}", "zh": "{x}之前"},
        {"en": "before {x} comes {y}.", "zh": "{x}之前是{y}。"},
        following(DAYS, -1) + following(MONTHS, -1) + following(SEASONS, -1),
    ),
    "month": Facts(
        {
            "en": ["Which month has the number {x}?", "Name month {x}."],
            "zh": ["第{x}个月是哪个月？", "请说出第{x}个月。"],
        },
        {"en": "month {x}", "zh": "第{x}个月"},
        {"en": "month {x} is {y}.", "zh": "第{x}个月是{y}。"},
        [(str(i), month[0], str(i), month[1]) for i, month in enumerate(MONTHS, 1)],
    ),
    "to-chinese": Facts(
        {
            "en": ["How do you say {x} in Chinese?", "What is {x} in Chinese?"],
            "zh": ["{x} 用中文怎么说？", "{x} 的中文是什么？"],
        },
        {"en": "{x} in Chinese", "zh": "{x} 的中文"},
        {"en": "in Chinese {x} is {y}.", "zh": "{x} 的中文是{y}。"},
        [(english, chinese, english, chinese) for english, chinese in WORDS],
    ),
    "to-english": Facts(
        {
            "en": ["How do you say {x} in English?", "What is {x} in English?"],
            "zh": ["{x}用英语怎么说？", "{x}的英语是什么？"],
        },
        {"en": "{x} in English", "zh": "{x}的英语"},
        {"en": "in English {x} is {y}.", "zh": "{x}的英语是 {y}。"},
        [(chinese, english, chinese, english) for english, chinese in WORDS],
    ),
}


def fact(task: str, rng: Random, language: str) -> Question:
    facts = FACTS[task]
    row = rng.choice(facts.rows)
    x, y = row[:2] if language == "en" else row[2:]
    prompt = rng.choice(facts.prompts[language]).format(x=x)
    prompt = capitalised(prompt) if language == "en" else prompt
    key = "|".join(sorted(row[:2]))  # Paris of France and France of Paris are one fact
    topic, statement = facts.topics[language].format(x=x), facts.statements[language].format(x=x, y=y)
    return Question(task, language, key, prompt, topic, statement, y)


ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
DIGITS = "零一二三四五六七八九"


def number_word(number: int, language: str) -> str:
    """0 to 99 in words: 47 is forty-seven and 四十七."""
    tens, ones = divmod(number, 10)
    if language == "zh":
        if tens == 0:
            return DIGITS[ones]
        return (DIGITS[tens] if tens > 1 else "") + "十" + (DIGITS[ones] if ones else "")
    if number < 20:
        return ONES[number]
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def to_digits(rng: Random, language: str) -> Question:
    number = rng.randrange(100)
    word = number_word(number, language)
    prompt, topic, statement = {
        "en": (f"Write the number {word} in digits.", f"the number {word}", f"the number {word} is {number}."),
        "zh": (f"把{word}写成数字。", f"数字{word}", f"{word}写成数字是{number}。"),
    }[language]
    return Question("to-digits", language, f"number:{number}", prompt, topic, statement, str(number))


def to_words(rng: Random, language: str) -> Question:
    number = rng.randrange(100)
    word = number_word(number, language)
    prompt, topic, statement = {
        "en": (f"Write the number {number} in words.", f"the number {number}", f"the number {number} is {word}."),
        "zh": (f"把{number}写成汉字。", f"数字{number}", f"{number}写成汉字是{word}。"),
    }[language]
    return Question("to-words", language, f"number:{number}", prompt, topic, statement, word)


def larger(rng: Random, language: str) -> Question:
    a, b = rng.sample(range(100), 2)
    most, least = max(a, b), min(a, b)
    prompt, topic, statement = {
        "en": (f"Which number is larger, {a} or {b}?", f"the larger of {a} and {b}", f"{most} is larger than {least}."),
        "zh": (f"{a}和{b}哪个更大？", f"{a}和{b}中更大的", f"{most}比{least}大。"),
    }[language]
    return Question("larger", language, f"larger:{least},{most}", prompt, topic, statement, str(most))


def count(rng: Random, language: str) -> Question:
    first = rng.randrange(95)
    last = first + rng.randrange(2, 5)
    numbers = ", ".join(map(str, range(first, last + 1)))
    prompt, topic, statement = {
        "en": (
            f"Count from {first} to {last}.",
            f"counting from {first} to {last}",
            f"from {first} to {last}: {numbers}",
        ),
        "zh": (f"从{first}数到{last}。", f"从{first}数到{last}", f"从{first}到{last}：{numbers}"),
    }[language]
    return Question("count", language, f"count:{first},{last}", prompt, topic, statement, numbers)


def some_words(rng: Random, language: str) -> list[str]:
    return [pair[language == "zh"] for pair in rng.sample(WORDS, rng.randrange(2, 5))]


def repeat(rng: Random, language: str) -> Question:
    words = " ".join(some_words(rng, language))
    prompt, topic, statement = {
        "en": (f"Repeat these words: {words}", f"the words {words}", f"the words are: {words}"),
        "zh": (f"重复这些词：{words}", f"这些词 {words}", f"这些词是：{words}"),
    }[language]
    return Question("repeat", language, f"repeat:{words}", prompt, topic, statement, words)


def first_word(rng: Random, language: str) -> Question:
    words = some_words(rng, language)
    text = " ".join(words)
    prompt, topic, statement = {
        "en": (f"What is the first word of: {text}", f"the first word of {text}", f"the first word is {words[0]}."),
        "zh": (f"下面第一个词是什么：{text}", f"{text} 的第一个词", f"第一个词是{words[0]}。"),
    }[language]
    return Question("first-word", language, f"first-word:{text}", prompt, topic, statement, words[0])


def change_case(rng: Random, language: str) -> Question:
    small = rng.choice(WORDS)[0].lower()
    capital = small.upper()
    if rng.random() < 0.5:
        prompt, topic, statement = {
            "en": (
                f"Write {small} in capital letters.",
                f"{small} in capital letters",
                f"in capital letters {small} is {capital}.",
            ),
            "zh": (f"把 {small} 写成大写。", f"{small} 的大写", f"{small} 的大写是 {capital}。"),
        }[language]
        return Question("case", language, f"case:{small}", prompt, topic, statement, capital)
    prompt, topic, statement = {
        "en": (
            f"Write {capital} in small letters.",
            f"{capital} in small letters",
            f"in small letters {capital} is {small}.",
        ),
        "zh": (f"把 {capital} 写成小写。", f"{capital} 的小写", f"{capital} 的小写是 {small}。"),
    }[language]
    return Question("case", language, f"case:{small}", prompt, topic, statement, small)


def fact_task(task: str) -> Callable[[Random, str], Question]:
    return lambda rng, language: fact(task, rng, language)


# Every task but arithmetic.
TASKS: dict[str, Callable[[Random, str], Question]] = {task: fact_task(task) for task in FACTS} | {
    "to-digits": to_digits,
    "to-words": to_words,
    "larger": larger,
    "count": count,
    "repeat": repeat,
    "first-word": first_word,
    "case": change_case,
}
