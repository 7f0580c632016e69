"""The judges that a command can be given: a model on this machine, or a server."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from common.data.examples import Conversation
from common.errors import InputError
from common.lm.hub import Model

from comparison.judge import Judge, Server
from comparison.sampling import Sampling, complete

JUDGE_TOKENS = 256


def server_of(args: Any) -> Server | None:
    """The judge behind the URL that the arguments of a command name, None where they name none.

    Raises InputError for arguments that contradict each other.
    """
    if args.judge and args.judge_url:
        raise InputError("--judge and --judge-url: give one of the two")
    if args.judge_url and not args.judge_model:
        raise InputError("--judge-url needs --judge-model, the name of the model there")
    if args.judge_url and not args.judge_url.startswith(("http://", "https://")):
        raise InputError(f"--judge-url {args.judge_url}: expected a URL such as https://my.host/v1")
    if args.judge_key and not os.environ.get(args.judge_key):
        raise InputError(f"--judge-key {args.judge_key}: no such variable is set in the environment")
    return Server(args.judge_url, args.judge_model, args.judge_key) if args.judge_url and args.judge_model else None


def judge_here(model: Model, sampling: Sampling) -> Judge:
    """A judge that is a model on this machine."""
    greedy = replace(sampling, max_new_tokens=JUDGE_TOKENS, temperature=0.0)

    def judge(requests: Sequence[str]) -> list[str]:
        turns = [Conversation("", [{"role": "user", "content": request}]) for request in requests]
        return [reply.text for reply in complete("the judge", model, None, turns, greedy)]

    return judge
