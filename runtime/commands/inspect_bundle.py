"""`shortstack inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from shortstack.command_options import Command
from shortstack.command_paths import BundlePath


@click.command(cls=Command)
@click.argument("bundle", type=BundlePath(path_type=Path))
@click.option(
    "--html",
    "html_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also draw the stack as a picture, on one page that needs no network.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.option("--verify", is_flag=True, help="Hash every file first; takes about a second per gigabyte.")
def inspect(bundle: Path, html_file: Path | None, as_json: bool, verify: bool) -> None:
    """Print what BUNDLE holds: segments, exits, inputs and outputs, who owns which KV, sizes."""
    from shortstack.graphs.bundle import open_bundle
    from shortstack.runtime.inspection.report import build_report

    report = build_report(open_bundle(bundle, verify_hashes=verify), verified=verify)
    if html_file is not None:
        from shortstack.runtime.inspection.page import write_html

        write_html(report, html_file)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
    else:
        from shortstack.runtime.inspection.text import print_report

        print_report(report)
    if html_file is not None:
        click.echo(f"picture: {html_file}", err=True)
