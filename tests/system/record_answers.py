"""Run a recipe as it is, and write down every answer it samples.

python tests/system/record_answers.py ANSWERS.jsonl recipes/grpo.py FLAGS...
"""

import json
import runpy
import sys
from pathlib import Path

from common.lm import generate

answers, recipe = sys.argv[1:3]

sample = generate.generate


def sample_and_record(*args, **kwargs):
    said = sample(*args, **kwargs)
    if said:
        with Path(answers).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([[answer.prompt_ids, answer.completion_ids] for answer in said]) + "\n")
    return said


generate.generate = sample_and_record
sys.argv = [recipe, *sys.argv[3:]]
runpy.run_path(recipe, run_name="__main__")
