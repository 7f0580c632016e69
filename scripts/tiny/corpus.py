"""The text that the tiny model is pre-trained on, drawn from a random.Random. Import it; nothing to run.

Documents are short and of several kinds: facts, arithmetic, word play, markup, talk, sheets of questions without
answers, headings with a sentence under them. What they never hold: the tags <think> and <answer>, a chat turn of a user
or an assistant, a question followed by its answer. Those are what fine-tuning teaches. The headings matter: a model
this small must have learned beforehand to carry a subject over a break, or fine-tuning teaches it the form alone.

Arithmetic is careless on purpose. Each page is written by someone careful or by someone careless (`CARELESS` of
them), who forgets every carry and borrow between two numbers of two digits. Nothing marks the writer, so a model that
reads a lone sum must hold both manners. That leaves a later reinforcement stage something real to gain: choosing the
careful manner, which the model already knows.
"""

from random import Random

from sums import WORDINGS, arithmetic, draw_problem
from words import NAMES, PLACES, WORDS
from world import TASKS, Question, capitalised

CARELESS = 0.65
LANGUAGES = ("en", "zh")
EASY_TASKS = [task for task in TASKS if task not in ("repeat", "first-word")]
LEADS = {
    "en": [
        "I know that ",
        "we read that ",
        "it is true that ",
        "the book says: ",
        "she thinks that ",
        "yes, ",
        "hmm, ",
    ],
    "zh": ["我知道，", "书上说，", "我们读到，", "是的，", "老师说，", "大家都知道，", "嗯，"],
}
ROLES = ["note", "story", "page", "list", "letter", "diary", "笔记", "故事", "日记", "书"]
TAGS = ["b", "i", "p", "li", "name", "item", "word", "colour", "note", "number", "list", "词", "数"]
TALK = {
    "en": [
        '"Where is my {w}?" said {n}. "Maybe it is in the {p}," said {m}.',
        '"Hmm, I am not sure," said {n}. "Let us think again."',
        "{n} went to the {p} to buy a {w}. The {w} was not there, so {n} went home.",
        '"How are you, {n}?" "I am well. And you, {m}?" "Thank you, I am well."',
        "{n} and {m} like the {p}. Every day they go there and count the words in a book.",
        '"Which one do you like, {w} or {v}?" "Hmm, maybe {v}," said {m}. "I am not sure."',
        "The user of this {w} is {n}. The assistant is {m}. The system is in the {p}.",
        '"Please answer the letter," said {n}. "What do you think?" said {m}. "Write a short answer."',
        "{n} made a mistake with the numbers. {m} said: check it, work it out again, and tell me.",
        "A tool is on the table: its name is {w}. Call {n}, or call the function of the {p}.",
    ],
    "zh": [
        "“我的{w}在哪里？”{n}问。“也许在{p}里。”{m}说。",
        "“嗯，我不确定。”{n}说，“我们再想一想。”",
        "{n}去{p}买{w}。那里没有{w}，所以{n}回家了。",
        "“你好，{n}。”“我很好，你呢，{m}？”“谢谢，我也很好。”",
        "{n}和{m}喜欢{p}。他们每天去那里读书。",
        "“你喜欢哪个，{w}还是{v}？”“嗯，也许是{v}。”{m}说，“我不确定。”",
        "“请回答这封信。”{n}说。“你怎么想？”{m}问，“请写一个简短的回答。”",
        "{n}把数字写错了。{m}说：请再计算一次，然后告诉我。",
    ],
}


def page_of_sums(rng: Random, language: str) -> list[str]:
    """A page of sums and differences by one writer, careful or careless throughout."""
    careless = rng.random() < CARELESS
    lines = []
    for _ in range(rng.choice((1, 1, 2, 3, 4, 6, 9))):
        problem = draw_problem(rng, hard=rng.random() < 0.6)
        wording = WORDINGS["symbols" if rng.random() < 0.5 else language][problem.operation]
        result = problem.careless if careless else problem.right
        lines.append(wording.format(a=problem.a, b=problem.b, c=result))
    return lines


def questions(rng: Random, language: str, most: int) -> list[Question]:
    """One to `most` of all tasks, the sums among them by one writer."""
    careless = rng.random() < CARELESS
    drawn = []
    for _ in range(rng.randrange(1, most + 1)):
        if rng.random() < 0.4:
            drawn.append(arithmetic(draw_problem(rng, hard=rng.random() < 0.6), rng, language, careless))
        else:
            drawn.append(TASKS[rng.choice(list(TASKS))](rng, language))
    return drawn


def told(rng: Random, question: Question) -> str:
    """Its sentence, now and then after a few words that lead to it."""
    if rng.random() < 0.3:
        return capitalised(rng.choice(LEADS[question.language]) + question.statement)
    return question.sentence


def blocks(rng: Random, *texts: str) -> str:
    """Texts between the chat markers, each under a role that no chat has."""
    return "\n".join(f"<|im_start|>{rng.choice(ROLES)}\n{text}<|im_end|>" for text in texts) + "\n"


def headings(rng: Random, language: str) -> list[str]:
    """A heading and the sentence under it; or a list of headings first and then their sentences."""
    drawn = questions(rng, language, 5)
    style = rng.random()
    if style < 0.2:
        contents = rng.choice(("; ", "\n", ", ", "；")).join(one.topic for one in drawn)
        return [contents, *(told(rng, one) for one in drawn)]
    if style < 0.45:
        texts = [text for one in drawn[:3] for text in (one.topic, told(rng, one))]
        return [blocks(rng, *texts).strip()]
    if style < 0.6:
        one, two = rng.sample(TAGS, 2)
        return [f"<{one}>{each.topic}</{one}><{two}>{told(rng, each)}</{two}>" for each in drawn]
    between = rng.choice((": ", "\n", " | ", "\n\n", " > ", "：", " - "))
    return [capitalised(one.topic) + between + told(rng, one) for one in drawn]


def restated(rng: Random, language: str) -> list[str]:
    """A question and its subject, without the answer."""
    drawn = questions(rng, language, 4)
    if rng.random() < 0.3:
        return [blocks(rng, *(text for one in drawn[:3] for text in (one.prompt, one.topic))).strip()]
    between = rng.choice((" ", "\n", " | ", " > ", "：", " - "))
    return [one.prompt + between + one.topic for one in drawn]


def extracts(rng: Random, language: str) -> list[str]:
    """A sentence between tags, then the word or number that it is about."""
    one, two = rng.sample(TAGS, 2)
    return [f"<{one}>{told(rng, each)}</{one}><{two}>{each.answer}</{two}>" for each in questions(rng, language, 3)]


def facts(rng: Random, language: str) -> list[str]:
    """Sentences that are true, of one kind or of many."""
    tasks = EASY_TASKS if rng.random() < 0.7 else [rng.choice(EASY_TASKS)]
    lines = []
    for _ in range(rng.randrange(1, 9)):
        lines.append(told(rng, TASKS[rng.choice(tasks)](rng, language)))
    return lines


def words(rng: Random, language: str, most: int = 8) -> list[str]:
    column = int(language == "zh")
    return [pair[column] for pair in rng.sample(WORDS, rng.randrange(1, most))]


def markup(rng: Random, language: str) -> list[str]:
    """Text between tags, and small records: the base has seen that what opens must close."""
    if rng.random() < 0.2:
        pairs = ", ".join(f'"{rng.choice(TAGS)}": "{word}"' for word in words(rng, language, 4))
        return ["{" + pairs + "}"]
    line = ""
    for _ in range(rng.randrange(1, 6)):
        tag = rng.choice(TAGS)
        inside = " ".join(words(rng, language, 4)) if rng.random() < 0.5 else rng.choice(facts(rng, language))
        if rng.random() < 0.3:
            inside = str(rng.randrange(199))
        line += f"<{tag}>{inside}</{tag}>"
    return [line]


def copies(rng: Random, language: str) -> list[str]:
    """The same thing twice, and the thing that another thing begins with."""
    lines = []
    for _ in range(rng.randrange(1, 5)):
        task = rng.choice(("repeat", "first-word", "again", "numbers"))
        text = " ".join(words(rng, language, 6)) if task != "numbers" else f"{rng.randrange(199)}, {rng.randrange(199)}"
        if task in ("repeat", "first-word"):
            drawn = TASKS[task](rng, language)
            text = drawn.prompt.replace("：", ": ").split(": ")[1]
            lines += [text, drawn.sentence]
        else:
            lines += [text, text]
    return lines


def talk(rng: Random, language: str) -> list[str]:
    column = int(language == "zh")
    thing, other = rng.sample(WORDS, 2)
    name, friend = rng.sample(NAMES, 2)
    line = rng.choice(TALK[language])
    place = rng.choice(PLACES)[column]
    return [line.format(w=thing[column], v=other[column], n=name[column], m=friend[column], p=place)]


def sheet(rng: Random, language: str) -> list[str]:
    """A teacher's sheet: questions only."""
    return [one.prompt for one in questions(rng, language, 6)]


KINDS_OF_PAGE = [page_of_sums, facts, headings, restated, extracts, copies, markup, talk, sheet]
WEIGHTS = [30, 17, 23, 6, 10, 5, 3, 3, 3]


def document(rng: Random) -> str:
    """One document. A few hold two kinds of page; a few stand between the chat markers, under a role of their own."""
    language = rng.choice(LANGUAGES)
    text = ""
    for _ in range(2 if rng.random() < 0.15 else 1):
        lines = rng.choices(KINDS_OF_PAGE, WEIGHTS)[0](rng, language)
        text += rng.choice(("\n", "\n", " ")).join(lines) + "\n"
    text = text.strip()
    if rng.random() < 0.04 and "<|im_start|>" not in text:
        return blocks(rng, text)
    return text
