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
