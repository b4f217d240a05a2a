"""``python -m eagle.train``: every field of :class:`eagle.train.options.TrainOptions` is a flag."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import types
import typing
from pathlib import Path

from eagle.errors import EagleError
from eagle.train.options import TrainOptions
from eagle.train.run import train


def parser() -> argparse.ArgumentParser:
    """The flags, from the fields of the options and their types."""
    result = argparse.ArgumentParser(prog="python -m eagle.train", description="Train an EAGLE-3 head.")
    hints = typing.get_type_hints(TrainOptions)
    for field in dataclasses.fields(TrainOptions):
        if field.name == "command":
            continue
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        if typing.get_origin(kind) is types.UnionType:
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        required = field.default is dataclasses.MISSING
        if kind is bool:
            result.add_argument(flag, action="store_true")
        elif typing.get_origin(kind) is typing.Literal:
            result.add_argument(flag, choices=typing.get_args(kind), default=field.default)
        else:
            default = None if required else field.default
            result.add_argument(flag, type=kind, required=required, default=default, help=f"default: {default}")
    return result


def recorded(given: list[str]) -> str:
    """The command without the flags that only say how a run was interrupted."""
    kept = [
        a for i, a in enumerate(given) if a not in ("--resume", "--pause-after") and given[i - 1] != "--pause-after"
    ]
    return shlex.join(["python", "-m", "eagle.train", *kept])


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 after an error that the user can mend."""
    given = sys.argv[1:] if arguments is None else arguments
    values = vars(parser().parse_args(given))
    values["out"] = Path(values["out"])
    try:
        train(TrainOptions(**values, command=recorded(given)))
    except EagleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
