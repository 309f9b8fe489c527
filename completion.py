"""`shortstack completion`: the script that completes commands, options and paths in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_SHELLS = ("bash", "zsh", "fish")
_HELP = """Print the script that completes shortstack's commands, options and paths in a shell.

Run the line of your shell once, then start a new shell:

\b
bash   echo 'eval "$(shortstack completion bash)"' >> ~/.bashrc
zsh    echo 'eval "$(shortstack completion zsh)"' >> ~/.zshrc
fish   shortstack completion fish > ~/.config/fish/completions/shortstack.fish
"""  # \b keeps the lines as they are


@click.command(help=_HELP)
@click.argument("shell", type=click.Choice(_SHELLS), metavar="bash|zsh|fish")
def completion(shell: str) -> None:
    """Print a shell's script."""
    complete = get_completion_class(shell)
    assert complete is not None
    program = click.get_current_context().find_root()
    variable = f"_{program.info_name}_COMPLETE".upper()  # as click derives it from the program's name
    click.echo(complete(program.command, {}, str(program.info_name), variable).source())
