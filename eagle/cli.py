"""The `eagle` command: it assembles the sub-commands and turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from eagle import __version__
from eagle.commands import bench
from eagle.commands.chat import chat
from eagle.commands.doctor import doctor
from eagle.commands.fetch import fetch, models
from eagle.commands.generate import generate
from eagle.commands.train import train
from eagle.errors import EagleError

USER_ERROR = 2
INTERRUPTED = 130

# click's base of usage errors, by a public way to it: newer typers carry their own copy of click.
_ClickError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(name="eagle", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
# A prompt without quotes comes as several arguments: the command says so itself.
app.command(context_settings={"allow_extra_args": True})(generate)
app.command()(chat)
app.add_typer(bench.app, name="bench")
app.command()(train)
app.command()(fetch)
app.command()(models)
app.command()(doctor)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """EAGLE speculative decoding of Hugging Face language models: the same output, sooner."""
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for what the user can mend, 130 after Ctrl-C."""
    return run(app, "eagle", arguments)


def run(command: typer.Typer, name: str, arguments: list[str] | None = None) -> int:
    """`main` for any command of this package; ``name`` is what its help calls it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console of few characters must not end the run
    try:
        code = typer.main.get_command(command).main(args=arguments, prog_name=name, standalone_mode=False)
    except EagleError as error:
        return _fail(str(error))
    except _ClickError as error:
        context = getattr(error, "ctx", None)
        help_line = f" (see '{context.command_path} --help')" if context is not None else ""
        # some versions put pydantic's words before a choice that does not exist
        return _fail(error.format_message().replace("Value error, ", "").rstrip(".") + help_line)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EPIPE, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more as it ends
        return _fail(f"cannot write the output ({error.strerror}); send it elsewhere")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not worth an import of torch here
            raise
        return _fail(f"out of GPU memory ({error}); take a smaller model, batch, tree or --max-new-tokens")
    if code == INTERRUPTED:  # typer itself makes this of Ctrl-C
        _end_terminal_line()
    return code if isinstance(code, int) else 0


def _end_terminal_line() -> None:
    """Put the shell's prompt on a line of its own; what goes to a file or a pipe stays as it is."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            print(file=stream, flush=True)
            return


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
