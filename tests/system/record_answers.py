"""Run a recipe as it is, and write down every completion it samples.

python tests/system/record_answers.py ANSWERS.jsonl recipes/grpo.py FLAGS...
"""

import json
import runpy
import sys
from pathlib import Path

from common.lm.rollout.rollouts import Rollouts

answers, recipe = sys.argv[1:3]

sample = Rollouts.sample


def sample_and_record(*args, **kwargs):
    completions = sample(*args, **kwargs)
    if completions:
        with Path(answers).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([[one.prompt_ids, one.completion_ids] for one in completions]) + "\n")
    return completions


Rollouts.sample = sample_and_record
sys.argv = [recipe, *sys.argv[3:]]
runpy.run_path(recipe, run_name="__main__")
