"""Talk to the model of a run, or to any model, on the terminal.

    make chat RUN=outputs/sft-tiny-1a2b3c4d                        the adapter of a run, on its base
    make chat RUN=outputs/sft-tiny-1a2b3c4d COMPARE=yes            every answer beside that of the base
    make chat RUN=outputs/sft-tiny-1a2b3c4d PROMPT="What is 3 + 4?"     one answer, and it ends
    make chat MODEL=qwen2.5-7b SYSTEM_PROMPT="Answer in one sentence." TEMPERATURE=0

The chat template and the end token are those of training. While it answers, Ctrl-C stops the answer; what came so far
stays in the conversation. At the prompt Ctrl-C or Ctrl-D ends it; arrow keys bring back what was typed before. Lines
that begin with / are commands: /help lists them.

In a pipe every line is one message of the conversation: `printf 'Hello\\nAnd you?\\n' | make chat`.

Left out: images, tools.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import environment
from common.cli import parse_arguments
from common.data.examples import Conversation
from common.errors import InputError, run_command, spell
from common.lm.hub import fetch
from common.lm.load import base_of, load_chat_tokenizer, load_for_inference
from common.lm.render import prompt_texts
from common.run.files import write_json
from common.run.record import adapter_of
from common.run.screen import console, end_live, loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HISTORY = ".cache/chat-history"
HELP = """\
/compare            answer with the base, too, or no longer
/system TEXT        another system prompt, or none; it starts a new conversation
/temperature X      0 takes the likeliest token each time
/undo               take back the last question and its answer
/again              another answer to the last question
/new                a new conversation
/save FILE          write the conversation as a row for SFT
/quit"""


@dataclass(frozen=True)
class Args:
    run: str | None = None
    """The folder of a run that trained an adapter."""
    adapter: str | None = None
    """Or the folder of an adapter."""
    model: str | None = None
    """A model card's name, a local directory or a hub id; by default what the adapter was trained on, or tiny."""
    prompt: str | None = None
    """Answer this, and end."""
    system_prompt: str = ""
    temperature: float = 0.7
    """0 takes the likeliest token each time; as in training there is no top-k and no top-p."""
    max_new_tokens: int = 1024
    compare: bool = False
    """Answer with the base of the adapter, too."""
    load_in_4bit: bool = False
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run: a folder, or org/name@COMMIT of the hub. It can do all that you can."""
    seed: int = 42


def main() -> None:
    args = parse_arguments(Args, __doc__)
    check(args)
    adapter = str(adapter_of(Path(args.run))) if args.run else args.adapter
    base = base_of(args.model, adapter)
    environment.set_variables(models=[base])
    loading(base.name)
    import unsloth  # noqa: F401  first: it changes what is imported after it

    base = fetch(base)
    tokenizer, end = load_chat_tokenizer(base)
    model = load_for_inference(base, adapter, args.load_in_4bit)
    end_live()
    talk = Talk(model, tokenizer, end, adapter is not None, args)
    if args.prompt is not None:
        talk.ask(args.prompt)
        return
    name = f"{base.name} with {adapter}" if adapter else base.name
    if sys.stdin.isatty():
        say(f"{name}. /help lists the commands, Ctrl-D ends.\n")
    for line in lines():
        talk.read(line)


def check(args: Args) -> None:
    if args.run and args.adapter:
        raise InputError("--run and --adapter: give one of the two")
    if args.compare and not (args.run or args.adapter):
        raise InputError("--compare needs an adapter, whose base is the other model: give --run or --adapter")
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt: is empty")
    check_temperature(args.temperature)
    check_text(args.prompt or "")
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {args.max_new_tokens}: give at least 1")


def check_text(text: str) -> None:
    """Raise InputError for text that was not UTF-8 where it was typed; Python reads such bytes as surrogates."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError("the text is not UTF-8: convert it, for example with iconv -t UTF-8")


def check_temperature(temperature: float) -> None:
    if not 0 <= temperature <= 10:
        raise InputError(f"a temperature of {temperature:g}: give a number from 0 to 10")


@dataclass
class Talk:
    """A conversation with one model: its turns, and the settings that commands change."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    end: str  # the end token of an answer
    adapted: bool
    args: Args
    turns: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        import torch

        torch.manual_seed(self.args.seed)
        self.compare, self.temperature = self.args.compare, self.args.temperature
        self.start(self.args.system_prompt)

    def start(self, system: str) -> None:
        check_text(system)
        self.system = system
        self.turns = [{"role": "system", "content": system}] if system else []

    def read(self, line: str) -> None:
        """Carry out a line of the user: a command, or something to answer. What is wrong with it is printed."""
        if not line.strip():
            return
        try:
            if line.startswith("/"):
                name, rest = (*line[1:].split(None, 1), "", "")[:2]
                if name not in COMMANDS:
                    raise InputError(f"/{name}: no such command; /help lists them, and a space before / sends the text")
                COMMANDS[name](self, rest.strip())
            else:
                self.ask(line.strip())
        except InputError as error:
            say(f"{spell(str(error))}\n")

    def ask(self, text: str) -> None:
        """Answer `text`, on the screen and in the conversation. Where it cannot be answered, nothing has changed."""
        check_text(text)
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        try:
            ids = self.prompt()
        except InputError:
            self.turns = before
            raise
        if self.compare:
            say("base  ", style="dim")
            with self.model.disable_adapter():
                self.answer(ids)
            say("tuned ", style="dim")
        self.turns.append({"role": "assistant", "content": self.answer(ids)})

    def prompt(self) -> list[int]:
        """The tokens of the conversation so far, (P,). Raises InputError where the template refuses it or it is too
        long."""
        text = prompt_texts(self.tokenizer, [Conversation("the conversation", self.turns, None)])[0]
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest and len(ids) >= longest:
            raise InputError(
                f"with this question the conversation has {len(ids)} tokens, and the model reads {longest}; the "
                "question was left out. /new starts anew"
            )
        self.room = longest - len(ids) if longest else self.args.max_new_tokens
        return ids

    def answer(self, ids: list[int]) -> str:
        """Print an answer while it is made, and return it: whole, or as far as it came when Ctrl-C stopped it.

        It is made by transformers' generate, for which Unsloth has a fast pass: one answer at a time is faster than one
        reads. `Rollouts` would hold a second copy of the weights, and its first answer waits until it has compiled.
        """
        import torch

        printer = printing(self.tokenizer)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        prompt = torch.tensor([ids], device=self.model.device)  # (1, P)
        limit, stopped = min(self.args.max_new_tokens, self.room), ""
        try:
            tokens = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=limit,
                eos_token_id=self.tokenizer.convert_tokens_to_ids(self.end),
                pad_token_id=self.tokenizer.pad_token_id,
                repetition_penalty=1.0,
                streamer=printer,
                **sampling,
            )  # (1, P + C)
            if tokens.shape[1] - len(ids) == limit and tokens[0, -1] != self.tokenizer.convert_tokens_to_ids(self.end):
                stopped = f" [truncated at {limit} tokens]"
        except KeyboardInterrupt:
            printer.end()
            stopped = " [stopped]"
        say(f"{stopped}\n", style="dim")
        return printer.text


def printing(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """A streamer that prints an answer as its words are whole, and keeps its `text`."""
    from transformers import TextStreamer

    class Printer(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            say(text)

    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def lines() -> Iterator[str]:
    """What the user types, line by line; on a terminal with its history."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        with contextlib.suppress(ImportError):
            remember_lines()
    while True:
        try:
            yield input("> " if on_terminal else "")
        except (EOFError, KeyboardInterrupt):
            if on_terminal:
                say("\n")
            return


def remember_lines() -> None:
    """Edit lines with the arrow keys, and keep the last 1,000 of them for the next time."""
    import atexit
    import readline

    file = environment.ROOT / HISTORY
    with contextlib.suppress(OSError):  # there is none yet, or it is another user's
        readline.read_history_file(file)
    readline.set_history_length(1000)

    def keep() -> None:
        with contextlib.suppress(OSError):
            file.parent.mkdir(exist_ok=True)
            readline.write_history_file(file)

    atexit.register(keep)


def say(text: str, style: str | None = None) -> None:
    console().print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)
    console().file.flush()


def undo(talk: Talk) -> str:
    """Take back the last question with its answer, and return it."""
    questions = [number for number, turn in enumerate(talk.turns) if turn["role"] == "user"]
    if not questions:
        raise InputError("there is no question yet")
    text = talk.turns[questions[-1]]["content"]
    del talk.turns[questions[-1] :]
    return text


def set_compare(talk: Talk, rest: str) -> None:
    if rest:
        raise InputError("/compare takes no word: it turns the base's answers on, and off again")
    if not talk.adapted:
        raise InputError("/compare needs an adapter, whose base is the other model: give --run or --adapter")
    talk.compare = not talk.compare
    say(f"answers {'of base and adapter' if talk.compare else 'of the adapter'}\n", style="dim")


def set_system(talk: Talk, rest: str) -> None:
    talk.start(rest)
    say(f"a new conversation, {'with that' if rest else 'without a'} system prompt\n", style="dim")


def set_temperature(talk: Talk, rest: str) -> None:
    try:
        temperature = float(rest)
    except ValueError:
        raise InputError(
            f"/temperature: {rest or 'nothing'} is no number; give one, such as /temperature 0.7"
        ) from None
    check_temperature(temperature)
    talk.temperature = temperature
    say(f"temperature {talk.temperature:g}\n", style="dim")


def start_anew(talk: Talk, _rest: str) -> None:
    talk.start(talk.system)
    say("a new conversation\n", style="dim")


def save(talk: Talk, rest: str) -> None:
    if not rest:
        raise InputError("/save: give a file, such as /save talk.json")
    if not talk.turns or talk.turns[-1]["role"] != "assistant":
        raise InputError("/save: there is no answer yet")
    file = Path(rest).expanduser()
    if file.exists():
        raise InputError(f"{rest}: is there already; give another file")
    try:
        write_json(file, {"messages": talk.turns})
    except OSError as error:
        raise InputError(f"{rest}: {error.strerror}") from None
    say(f"saved in {rest}\n", style="dim")


def leave(_talk: Talk, _rest: str) -> None:
    raise SystemExit(0)


COMMANDS: dict[str, Callable[[Talk, str], None]] = {
    "help": lambda _talk, _rest: say(HELP + "\n"),
    "compare": set_compare,
    "system": set_system,
    "temperature": set_temperature,
    "undo": lambda talk, _rest: say(f"taken back: {undo(talk)}\n", style="dim"),
    "again": lambda talk, _rest: talk.ask(undo(talk)),
    "new": start_anew,
    "save": save,
    "quit": leave,
}


if __name__ == "__main__":
    run_command(main)
