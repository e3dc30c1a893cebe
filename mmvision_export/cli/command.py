"""What every `mmvision` command has beyond typer: examples in its help, and options with several values."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

__all__ = ["MmvisionCommand", "OptionalValueCommand", "add_command", "call", "examples"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_EXAMPLES = "mmvision_examples"


def examples(*lines: str) -> Callable[[_Function], _Function]:
    """Decorates a command with lines to type, which its help shows."""

    def decorate(function: _Function) -> _Function:
        setattr(function, _EXAMPLES, lines)
        return function

    return decorate


def call(context: typer.Context, *arguments: str) -> int:
    """Run another command of the same program, as its user would type it.

    Args:
        context: Of the command that calls it.
        *arguments: Its name, then its options.

    Returns:
        Its exit code.

    Raises:
        MmvisionError: Whatever the command raises.
    """
    program: Any = context.find_root().command
    code = program.main(list(arguments), prog_name="mmvision", standalone_mode=False)
    return code if isinstance(code, int) else 0


class MmvisionCommand(TyperCommand):
    """A command whose repeatable options take several values too, as `--image a.jpg b.jpg`.

    Both forms mean the same: `--image a.jpg --image b.jpg`. Values end at the next option.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `click.Command.parse_args`."""
        return super().parse_args(ctx, self._repeated(args))

    def _repeated(self, args: list[str]) -> list[str]:
        repeatable = {
            name
            for parameter in self.params
            if getattr(parameter, "multiple", False)
            for name in parameter.opts
        }
        result: list[str] = []
        option: str | None = None  # whose values follow
        has_value = False
        for argument in args:
            if argument.startswith("-") and len(argument) > 1:
                name, _, value = argument.partition("=")
                option = name if name in repeatable else None
                has_value = bool(value)
            elif option is not None:
                if has_value:
                    result.append(option)
                has_value = True
            result.append(argument)
        return result

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each in a line of its own however narrow the terminal is."""
        super().format_epilog(ctx, formatter)
        lines = getattr(self.callback, _EXAMPLES, ())
        if lines:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}\n" for line in lines))


class OptionalValueCommand(MmvisionCommand):
    """Reads `--random-weights` with no value as `--random-weights=plain`.

    Typer has no options with optional values.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `click.Command.parse_args`."""
        flag = "--random-weights"
        given = [
            f"{flag}=plain"
            if argument == flag and (following is None or following.startswith("-"))
            else argument
            for argument, following in itertools.zip_longest(args, args[1:])
        ]
        return super().parse_args(ctx, given)


def add_command(
    app: typer.Typer,
    name: str,
    function: Callable[..., Any],
    *,
    cls: type[MmvisionCommand] = MmvisionCommand,
    **options: Any,
) -> None:
    """Add a function to an app as a command."""
    app.command(name, cls=cls, **options)(function)
