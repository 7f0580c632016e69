"""Run a recipe as it is, and write down every answer it samples.

python tests/record_answers.py ANSWERS.jsonl recipes/grpo.py FLAGS...
"""

import json
import runpy
import sys
from pathlib import Path

answers, recipe = sys.argv[1:3]
sys.path.insert(0, str(Path(recipe).parent))
import common.generate  # noqa: E402  from the recipe's folder

sample = common.generate.generate


def sample_and_record(*args, **kwargs):
    said = sample(*args, **kwargs)
    if said:
        with Path(answers).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([[answer.prompt_ids, answer.completion_ids] for answer in said]) + "\n")
    return said


common.generate.generate = sample_and_record
sys.argv = [recipe, *sys.argv[3:]]
runpy.run_path(recipe, run_name="__main__")
