"""A few rows of every data format the recipes read. Import it; `samples.py` writes them to data_samples/formats/.

The rows are written by hand and make sense: a reader sees from them what belongs into which field.
"""

import json

ALPACA = [
    {
        "instruction": "Rewrite the sentence in the past tense.",
        "input": "She walks to the market every Saturday.",
        "output": "She walked to the market every Saturday.",
    },
    {
        "instruction": "Give two reasons to keep a backup on another machine.",
        "input": "",
        "output": "A disk can fail together with everything on it, and a stolen machine takes its own backups along.",
    },
    {
        "instruction": "把下面的句子翻译成英语。",
        "input": "下雨了，我们明天再去爬山吧。",
        "output": "It is raining; let us go hiking tomorrow instead.",
    },
    {
        "instruction": "用一句话解释什么是哈希表。",
        "input": "",
        "output": "哈希表用一个函数把键变成数组的位置，因此平均只需一步就能找到对应的值。",
    },
    {
        "instruction": "Sort these numbers from small to large.",
        "input": "14, 3, 27, 9",
        "output": "3, 9, 14, 27",
    },
]

SHAREGPT = [
    {
        "conversations": [
            {"from": "system", "value": "You are a librarian. Be brief."},
            {"from": "human", "value": "Where do I find books about birds?"},
            {"from": "gpt", "value": "On the second floor, shelf 598, next to the other animals."},
            {"from": "human", "value": "And how long may I keep one?"},
            {"from": "gpt", "value": "Four weeks. You may extend it once if nobody waits for it."},
        ]
    },
    {
        "conversations": [
            {"from": "human", "value": "How many minutes are there in a day?"},
            {"from": "gpt", "value": "A day has 24 hours of 60 minutes, so 1440 minutes."},
        ]
    },
    {
        "conversations": [
            {"from": "human", "value": "怎样煮鸡蛋，蛋黄才会是软的？"},
            {"from": "gpt", "value": "水开后放入鸡蛋，煮六分钟，然后马上放进冷水里。"},
            {"from": "human", "value": "如果想要全熟的呢？"},
            {"from": "gpt", "value": "煮十分钟就可以了。"},
        ]
    },
    {
        "conversations": [
            {"from": "system", "value": "你是一位语文老师。"},
            {"from": "human", "value": "请用“虽然……但是……”造一个句子。"},
            {"from": "gpt", "value": "虽然路很远，但是他每天都走着去上学。"},
        ]
    },
]


def function(name: str, description: str, **parameters: str) -> dict:
    """A function in the usual JSON description; every parameter is a string."""
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


WEATHER = function("get_weather", "The weather of a city today.", city="name of the city")
CONVERT = function("convert_money", "An amount in another currency.", amount="how much", source="from", target="to")


def text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


SHAREGPT_TOOLS = [
    {
        "conversations": [
            {"from": "human", "value": "Do I need an umbrella in Oslo?"},
            {"from": "function_call", "value": text({"name": "get_weather", "arguments": {"city": "Oslo"}})},
            {"from": "observation", "value": text({"sky": "rain", "celsius": 7})},
            {"from": "gpt", "value": "Yes, it is raining in Oslo today, at 7 degrees."},
        ],
        "tools": text([WEATHER]),
    },
    {
        "conversations": [
            {"from": "human", "value": "北京今天天气怎么样？"},
            {"from": "function_call", "value": text({"name": "get_weather", "arguments": {"city": "北京"}})},
            {"from": "observation", "value": text({"sky": "晴", "celsius": 18})},
            {"from": "gpt", "value": "北京今天晴，18度。"},
        ],
        "tools": text([WEATHER]),
    },
    {
        "conversations": [
            {"from": "system", "value": "You help a traveller with money."},
            {"from": "human", "value": "What are 50 euros in yen?"},
            {
                "from": "function_call",
                "value": text(
                    {"name": "convert_money", "arguments": {"amount": "50", "source": "EUR", "target": "JPY"}}
                ),
            },
            {"from": "observation", "value": text({"amount": 8100})},
            {"from": "gpt", "value": "About 8100 yen."},
            {"from": "human", "value": "Thank you!"},
            {"from": "gpt", "value": "Have a good trip."},
        ],
        "tools": text([WEATHER, CONVERT]),
    },
    {
        "conversations": [
            {"from": "human", "value": "What can you do for me?"},
            {"from": "gpt", "value": "I can tell you the weather of a city. Which one?"},
        ],
        "tools": text([WEATHER]),
    },
]

MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": "What is a palindrome?"},
            {"role": "assistant", "content": "A word that reads the same backwards, such as level."},
            {"role": "user", "content": "Give me another one."},
            {"role": "assistant", "content": "Radar."},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "回答要简短。"},
            {"role": "user", "content": "水的化学式是什么？"},
            {"role": "assistant", "content": "H₂O。"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Is it warm in Lisbon?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Lisbon"}}}
                ],
            },
            {"role": "tool", "name": "get_weather", "content": text({"sky": "clear", "celsius": 24})},
            {"role": "assistant", "content": "Yes, 24 degrees and a clear sky."},
        ],
        "tools": [WEATHER],
    },
    {
        "messages": [
            {"role": "user", "content": "请把“谢谢”翻译成英语。"},
            {"role": "assistant", "content": "Thank you."},
        ]
    },
]

PROMPT_COMPLETION = [
    {"prompt": "The sun rises in the east and sets in the", "completion": " west."},
    {"prompt": "Ice melts at zero degrees; water boils at", "completion": " a hundred degrees."},
    {"prompt": "春天过去以后，接着来的季节是", "completion": "夏天。"},
    {"prompt": "一星期有七天，所以两星期有", "completion": "十四天。"},
]


def chatml(*turns: tuple[str, str]) -> dict:
    return {"text": "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)}


CHATML = [
    chatml(("user", "Which planet is nearest to the sun?"), ("assistant", "Mercury.")),
    chatml(("system", "Answer with a number only."), ("user", "How many sides has a hexagon?"), ("assistant", "6")),
    chatml(("user", "一年有多少个月？"), ("assistant", "十二个月。")),
    chatml(
        ("system", "你是一位数学老师。"),
        ("user", "三角形的内角和是多少？"),
        ("assistant", "180度。"),
        ("user", "四边形呢？"),
        ("assistant", "360度。"),
    ),
]

DOCUMENTS = [
    {
        "text": "The heron stands in shallow water and waits. When a fish comes near, it strikes with its bill.\n\n"
        "Herons nest together in tall trees, often far from the water."
    },
    {
        "text": "Bread needs flour, water, salt and time. Yeast makes it rise: it eats sugar and gives off gas, "
        "and the gas makes bubbles in the dough."
    },
    {
        "text": "# Tea\n\nGreen and black tea come from one plant. Leaves for black tea are left to turn brown; leaves "
        "for green tea are heated soon, which keeps them green."
    },
    {"text": "苍鹭站在浅水里等待。有鱼游近时，它用长嘴一下子啄住。\n\n苍鹭在高树上成群筑巢。"},
]


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


PREFERENCE = [
    {
        "prompt": "How do I keep bread fresh?",
        "chosen": "Keep it in a paper bag at room temperature, and freeze what you will not eat within two days.",
        "rejected": "Just buy less of it.",
    },
    {
        "prompt": "Name a mammal that lays eggs.",
        "chosen": "The platypus lays eggs.",
        "rejected": "The bat lays eggs.",
    },
    {
        "prompt": "怎样才能睡得更好？",
        "chosen": "每天在同一时间上床，睡前一小时不看手机，房间保持凉爽。",
        "rejected": "早点睡就行了。",
    },
    {
        "prompt": "冬天为什么比夏天冷？",
        "chosen": "冬天太阳照得斜，白天也短，地面得到的热量少。",
        "rejected": "因为冬天地球离太阳更远。",
    },
]

PREFERENCE_MESSAGES = [
    {
        "prompt": [turn("user", row["prompt"])],
        "chosen": [turn("assistant", row["chosen"])],
        "rejected": [turn("assistant", row["rejected"])],
    }
    for row in PREFERENCE
]

SHAREGPT_PREFERENCE = [
    {
        "conversations": [{"from": "human", "value": row["prompt"]}],
        "chosen": {"from": "gpt", "value": row["chosen"]},
        "rejected": {"from": "gpt", "value": row["rejected"]},
    }
    for row in PREFERENCE
]

DIALOGUES = [
    (
        [
            turn("user", "I have flour, milk and eggs. What can I cook?"),
            turn("assistant", "Pancakes."),
            turn("user", "And how?"),
        ],
        "Stir a cup of flour, a cup of milk and two eggs, and fry the batter in a little butter.",
        "In a pan.",
    ),
    (
        [turn("user", "Is it safe to look at the sun through sunglasses?")],
        "No. Sunglasses do not protect your eyes from looking straight into the sun.",
        "Yes, if they are dark enough.",
    ),
    ([turn("user", "“画蛇添足”是什么意思？")], "意思是做了多余的事，反而把事情弄坏。", "意思是画一条蛇。"),
    ([turn("user", "谁写了《红楼梦》？")], "曹雪芹。", "施耐庵。"),
]


def human_assistant(turns: list[dict]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)


DIALOGUE_PREFERENCE = [
    {"chosen": [*prompt, turn("assistant", chosen)], "rejected": [*prompt, turn("assistant", rejected)]}
    for prompt, chosen, rejected in DIALOGUES
]

PROMPT_ANSWER = [
    {"prompt": "A box holds 6 eggs. How many eggs are in 7 boxes?", "answer": "42"},
    {"prompt": "What is half of 3?", "answer": "1.5"},
    {"prompt": "一本书12元，买3本要多少元？", "answer": "36"},
    {"prompt": "100减去58等于多少？", "answer": "42"},
]

QUESTION_ANSWER = [
    {
        "question": "Mia reads 12 pages a day. How many pages does she read in two weeks?",
        "answer": "Two weeks have 14 days.\nShe reads 12 * 14 = <<12*14=168>>168 pages.\n#### 168",
    },
    {
        "question": "A train leaves at 9:40 and arrives at 11:10. How many minutes does it take?",
        "answer": "From 9:40 to 11:10 it is one hour and a half.\nThat is 60 + 30 = <<60+30=90>>90 minutes.\n#### 90",
    },
    {"question": "小明有15颗糖，给了妹妹6颗，还剩几颗？", "answer": "15 - 6 = <<15-6=9>>9\n#### 9"},
    {
        "question": "一个长方形长8米，宽5米，周长是多少米？",
        "answer": "长加宽是 8 + 5 = <<8+5=13>>13 米。\n周长是 13 * 2 = <<13*2=26>>26 米。\n#### 26",
    },
]

PROBLEM_SOLUTION = [
    {
        "problem": "Solve $2x + 3 = 11$ for $x$.",
        "solution": "Subtract 3 and divide by 2: $x = 4$, so the answer is $\\boxed{4}$.",
    },
    {
        "problem": "What is $\\frac{1}{2} + \\frac{1}{3}$?",
        "solution": "$\\frac{3}{6} + \\frac{2}{6} = \\boxed{\\frac{5}{6}}$.",
    },
    {
        "problem": "求方程 $x^2 = 49$ 的正数解。",
        "solution": "因为 $7^2 = 49$，所以正数解是 $\\boxed{7}$。",
    },
    {
        "problem": "一个圆的半径是 $3$，面积是多少？",
        "solution": "面积是 $\\pi r^2 = \\boxed{9\\pi}$。",
    },
]

PROBLEM_ANSWER = [
    {"problem": row["problem"], "answer": answer, "level": level}
    for row, answer, level in zip(PROBLEM_SOLUTION, ["4", "\\frac{5}{6}", "7", "9\\pi"], [1, 2, 1, 2], strict=True)
]

PROMPTS = [
    {"prompt": "Write a Python function add(a, b) that returns the sum.", "tests": ["assert add(2, 3) == 5"]},
    {"prompt": "Write a Python function even(n) that says whether n is even.", "tests": ["assert even(4)"]},
    {"prompt": "写一个 Python 函数 double(x)，返回 x 的两倍。", "tests": ["assert double(4) == 8"]},
    {"prompt": "写一个 Python 函数 last(items)，返回最后一个元素。", "tests": ["assert last([1, 2]) == 2"]},
]

INSTRUCTION = [{"instruction": row["instruction"], "input": row["input"]} for row in ALPACA]

SCORES = [4.5, 1.0, 5.0, 2.0, 3.5]

PROMPT_RATING = [
    {"prompt": row["prompt"], "response": row[answer], "score": score}
    for row, answer, score in zip(PREFERENCE, ("chosen", "rejected", "chosen", "rejected"), SCORES, strict=False)
]

INSTRUCTION_RATING = [
    {"instruction": row["instruction"], "input": row["input"], "response": row["output"], "score": score}
    for row, score in zip(ALPACA, SCORES, strict=True)
]

LABELS = [True, False, True, True, False]


def marked(rows: list[dict], name: str) -> list[dict]:
    """The rows with a column that says whether the last turn is good."""
    return [{**row, name: label} for row, label in zip(rows, LABELS, strict=False)]


ONE_COMPLETION = [
    {"prompt": row["prompt"], "completion": row["chosen" if label else "rejected"]}
    for row, label in zip(PREFERENCE, LABELS, strict=False)
]

INSTRUCTION_PREFERENCE = [
    {"instruction": row["instruction"], "input": row["input"], "chosen": row["output"], "rejected": rejected}
    for row, rejected in zip(
        ALPACA,
        (
            "She is walking to the market every Saturday.",
            "It is safer.",
            "It rains, tomorrow climb mountain.",
            "哈希表是一种表。",
            "27, 14, 9, 3",
        ),
        strict=True,
    )
]

# As in HumanEval: a completion is the rest of the function, and `check` tests the whole.
HUMANEVAL = [
    {
        "task_id": f"sample/{number}",
        "prompt": f'def {name}({arguments}):\n    """{text}"""\n',
        "entry_point": name,
        "canonical_solution": f"    return {body}\n",
        "test": "def check(candidate):\n"
        + "".join(f"    assert candidate({given}) == {right}\n" for given, right in cases),
    }
    for number, (name, arguments, text, body, cases) in enumerate(
        [
            ("add", "a, b", "The sum of two numbers.", "a + b", [("2, 3", "5"), ("-1, 1", "0")]),
            ("is_even", "n", "Whether a number is even.", "n % 2 == 0", [("4", "True"), ("7", "False")]),
            ("reverse", "text", "把字符串倒过来。", "text[::-1]", [("'abc'", "'cba'"), ("''", "''")]),
            ("largest", "numbers", "列表中最大的数。", "max(numbers)", [("[3, 9, 2]", "9"), ("[-5]", "-5")]),
        ]
    )
]

# As in MBPP: the task in words, a program that solves it, and tests.
MBPP = [
    {
        "task_id": number,
        "text": text,
        "code": code,
        "test_setup_code": setup,
        "test_list": tests,
    }
    for number, (text, code, setup, tests) in enumerate(
        [
            (
                "Write a function square(n) that returns the square of a number.",
                "def square(n):\n    return n * n",
                "",
                ["assert square(3) == 9", "assert square(-2) == 4"],
            ),
            (
                "Write a function area(r) for the area of a circle.",
                "import math\n\ndef area(r):\n    return math.pi * r * r",
                "import math",
                ["assert math.isclose(area(1), math.pi)", "assert area(0) == 0"],
            ),
            (
                "写一个函数 count(text, letter)，返回字母在文本中出现的次数。",
                "def count(text, letter):\n    return text.count(letter)",
                "",
                ["assert count('banana', 'a') == 3", "assert count('abc', 'd') == 0"],
            ),
            (
                "写一个函数 unique(items)，去掉列表中重复的元素，保持顺序。",
                "def unique(items):\n    return list(dict.fromkeys(items))",
                "",
                ["assert unique([1, 2, 1]) == [1, 2]", "assert unique([]) == []"],
            ),
        ],
        start=1,
    )
]

# As verl has them: the gold answer in `reward_model`.
VERL = [
    {
        "data_source": "sample",
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "extra_info": {"split": "train", "index": number},
    }
    for number, row in enumerate(PROMPT_ANSWER)
]

# What carries feedback, one file per format and per way to write it.
FEEDBACK = {
    "preference": PREFERENCE,
    "preference-messages": PREFERENCE_MESSAGES,
    "sharegpt-preference": SHAREGPT_PREFERENCE,
    "instruction-preference": INSTRUCTION_PREFERENCE,
    "dialogue-preference": DIALOGUE_PREFERENCE,
    "dialogue-preference-hh": [
        {name: human_assistant(turns) for name, turns in row.items()} for row in DIALOGUE_PREFERENCE
    ],
    "prompt-answer": PROMPT_ANSWER,
    "question-answer": QUESTION_ANSWER,
    "problem-answer": PROBLEM_ANSWER,
    "problem-solution": PROBLEM_SOLUTION,
    "humaneval": HUMANEVAL,
    "mbpp": [{("prompt" if name == "text" else name): value for name, value in row.items()} for row in MBPP],
    "mbpp-text": MBPP,
    "verl": VERL,
    "prompt": PROMPTS,
    "instruction": INSTRUCTION,
    "prompt-rating": PROMPT_RATING,
    "instruction-rating": INSTRUCTION_RATING,
    "messages-label": marked(MESSAGES, "label"),
    "messages-kto-tag": marked(MESSAGES, "kto_tag"),
    "sharegpt-label": marked(SHAREGPT, "label"),
    "sharegpt-kto-tag": marked(SHAREGPT, "kto_tag"),
    "prompt-label": marked(ONE_COMPLETION, "label"),
    "prompt-kto-tag": marked(ONE_COMPLETION, "kto_tag"),
    "alpaca-label": marked(ALPACA, "label"),
    "alpaca-kto-tag": marked(ALPACA, "kto_tag"),
}
