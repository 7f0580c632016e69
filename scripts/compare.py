"""Compare two models: both complete the same prompts, the completions are rated blind and laid out to be read.

    make compare A=outputs/sft-tiny-1a2b3c4d/adapter B=outputs/dpo-tiny-5e6f7a8b/adapter
    make compare A=qwen2-1.5b B=outputs/ppo-qwen2-1.5b-9c0d1e2f/adapter JUDGE=qwen2.5-7b
    make compare A=qwen2.5-0.5b B=qwen2-1.5b PROMPTS=my.jsonl JUDGE_URL=https://host/v1 JUDGE_MODEL=x

A and B are adapters, each on the base it was trained on, or models. Their completions are rated from 1 to 5 on four
dimensions: instruction following, completeness, fluency, harmlessness. A rule rates where a rule can tell; columns of
a row name what to check:
  checks   an object: items (lines of a list, exactly), max_words (a Chinese character is a word), json, language (en or
           zh), pattern (a regular expression to be found), without (words), mentions (lists of alternatives, one of
           each to be mentioned: completeness)
  answer   the gold answer, as in prompts for GRPO
  refuse   true: the model should refuse, and only the harmlessness is rated
Text that repeats itself, is empty or broken is not fluent; a truncated completion is not complete.

The rest is for a judge: a model on this machine (--judge) or behind an OpenAI-compatible URL (--judge-url). It sees a
prompt with both completions, in random order and without names. Without a judge, what no rule can tell stays unrated,
but text without a fault counts as fluent, and a completion without a word of refusal as harmful where it should refuse.

In the folder: compare.json with everything, compare.md with the table and the pairs to read, the most unlike first.
Differences are B - A, with 95 % intervals from 10,000 bootstrap samples of the prompts.

Left out: more than two models, several completions of a prompt, conversations of several turns.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from common import environment
from common.cli import parse_arguments
from common.data.examples import Conversation
from common.data.rows import find_source
from common.errors import InputError, run_command
from common.lm.hub import Model, contents, find_model
from common.lm.load import base_of
from common.run.files import write_json
from common.run.screen import console
from comparison.figures import tabulate
from comparison.judge import rate
from comparison.judges import judge_here, server_of
from comparison.page import as_markdown, as_table
from comparison.rules import read
from comparison.sampling import Sampling, complete


@dataclass(frozen=True)
class Args:
    a: str
    """The one: an adapter folder of a run, a model card's name, a local directory or a hub id."""
    b: str
    """The other."""
    base: str | None = None
    """The model under the adapters, where their runs are not beside them; else taken from there and checked."""
    prompts: str = str(environment.ROOT / "data_samples" / "compare.jsonl")
    """A file, a folder of files or a hub dataset of prompts, with or without answers, of pairs or of scores."""
    output_dir: str | None = None
    """The folder to write; by default outputs/compare-A-B."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=question."""
    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 for greedy completions; above it they are sampled."""
    load_in_4bit: bool = False
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run: a folder, or org/name@COMMIT of the hub. It can do all that you can."""
    judge: str | None = None
    """A model to judge what no rule can tell: a card's name, a local directory or a hub id."""
    judge_url: str | None = None
    """Or the URL of an OpenAI-compatible server, up to /v1."""
    judge_model: str | None = None
    """The name of the model there."""
    judge_key: str | None = None
    """The name of the environment variable that holds the key for it; the key itself is written nowhere."""
    seed: int = 42


def main() -> None:
    compare(parse_arguments(Args, __doc__))


def compare(args: Args) -> None:
    """Let both models complete the prompts, rate them, print the table and write the folder."""
    sides = {"A": args.a, "B": args.b}
    models = {name: model_and_adapter(side, args.base) for name, side in sides.items()}
    server = server_of(args)
    folder = Path(args.output_dir or f"outputs/compare-{label(args.a)}-{label(args.b)}").expanduser()
    if folder.exists():
        raise InputError(f"{folder} exists already; give another folder with --output-dir")
    source = find_source(args.prompts)
    judge_model = find_model(args.judge) if args.judge else None
    loaded = [*(model for model, _ in models.values()), *([judge_model] if judge_model else [])]
    environment.set_variables(models=loaded, sources=[source])
    checked = read(source, args.columns)
    if server:
        server.check()

    conversations = [Conversation(one.prompt.place, one.prompt.prompt, one.prompt.tools) for one in checked]
    sampling = Sampling(args.max_new_tokens, args.temperature, args.load_in_4bit, args.seed)
    completions = {name: complete(name, *models[name], conversations, sampling) for name in models}

    judge = server or (judge_here(judge_model, sampling) if judge_model else None)
    ratings, figures = rate(checked, completions, judge, args.seed)
    figures["dimensions"] = tabulate(ratings["A"], ratings["B"], args.seed)
    rows = [
        {
            "place": one.prompt.place,
            "prompt": one.prompt.prompt,
            **{name: {"completion": completions[name][i].text, "ratings": ratings[name][i]} for name in sides},
        }
        for i, one in enumerate(checked)
    ]
    folder.mkdir(parents=True)
    identities = {name: {"model": contents(model), "adapter": adapter} for name, (model, adapter) in models.items()}
    write_json(
        folder / "compare.json", {"arguments": asdict(args), "models": identities, "figures": figures, "rows": rows}
    )
    (folder / "compare.md").write_text(as_markdown(args.a, args.b, figures, rows), encoding="utf-8")
    console().print(as_table(f"A {args.a}\nB {args.b}", figures["dimensions"]))
    if judge:
        open_rows = figures["prompts"] - figures["rated by rules alone"]
        console().print(
            f"The judge: {figures['unusable replies of the judge']} of {open_rows} replies unusable; it rated the "
            f"completion shown first {figures['first shown rated higher by']:+.2f} against the second"
        )
    console().print(f"The pairs to read: {folder / 'compare.md'}", highlight=False, soft_wrap=True)


def label(side: str) -> str:
    """A short name for a side: the run's for its adapter folder."""
    path = Path(side)
    return path.resolve().parent.name if path.name in ("adapter", "merged", "model") else path.name


def model_and_adapter(side: str, base: str | None) -> tuple[Model, str | None]:
    """What to load for a side. Raises InputError when there is no such model, or the adapter is of another base."""
    if (Path(side).expanduser() / "adapter_config.json").is_file():
        adapter = str(Path(side).expanduser())
        return base_of(base, adapter), adapter
    return find_model(side), None


if __name__ == "__main__":
    run_command(main)
