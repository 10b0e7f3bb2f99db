"""`apm prompts`: learned prompts, for the methods coop, cocoop, tpt+coop and tpt+cocoop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .groups import Group
from .options import Debug
from .render import notice, say, say_json

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learned prompts: what CoOp and CoCoOp learn from labelled images, for apm bench.",
)


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="FILE", help="Checkpoint of CoOp's or CoCoOp's code, such as model.pth.tar-50.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where to write. Default: FILE with .safetensors behind it.", metavar="OUT")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line on stdout, nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """Convert a published checkpoint to safetensors. Nothing that the checkpoint carries is run.

    Only the learned context (and CoCoOp's meta-net) is kept: the class names are those of the data set at hand.
    """
    from apm.text.learned_prompt import read_published, write_learned_prompt

    prompt = read_published(checkpoint)
    path = out or checkpoint.with_name(f"{checkpoint.name}.safetensors")
    write_learned_prompt(path, prompt)
    words, width = prompt.context.shape
    method = "coop" if prompt.meta_net is None else "cocoop"
    if as_json:
        say_json(json.dumps({"path": str(path), "method": method, "words": words, "width": width}))
        return
    say(str(path))
    notice(f"{words} word vectors of {width} numbers: apm bench … --method {method}:file={path}")
