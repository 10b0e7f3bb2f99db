"""`apm prompts`: learned prompts, for the methods coop, cocoop, tpt+coop and tpt+cocoop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apm.errors import UsageError, unknown

from .data import load_shared_teacher
from .groups import Group
from .options import Debug
from .render import notice, say, say_json, told_when_interrupted
from .training import TrainingProgress

if TYPE_CHECKING:
    from apm.text.learned_prompt import LearnedPrompt

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learned prompts: what CoOp and CoCoOp learn from labelled images, for apm bench.",
)
LEARNING, FILES = "Learning", "Files"


@app.command()
def learn(
    method: Annotated[str, typer.Argument(metavar="coop|cocoop", help="What learns the prompt.")],
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="Labelled TRAINING images: a folder with a folder for each class, a .parquet file (image, label, and "
            "wnid or class_name), or a data set with a split json, whose training part is taken.",
        ),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(help="As for apm bench. The prompt is for this teacher alone.", rich_help_panel=LEARNING),
    ] = None,
    shots: Annotated[int, typer.Option(help="Images of each class.", rich_help_panel=LEARNING)] = 16,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Default: coop 200; 50 with 1,000 classes or 1 shot, 100 with 2 to 4 shots; cocoop 10.",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images a step. Default: coop 32, cocoop 1.", rich_help_panel=LEARNING)
    ] = None,
    words: Annotated[
        int | None,
        typer.Option(
            help='Number of word vectors, drawn at random. Default: the 4 of "a photo of a".', rich_help_panel=LEARNING
        ),
    ] = None,
    lr: Annotated[float, typer.Option(help="Highest learning rate of SGD.", rich_help_panel=LEARNING)] = 2e-3,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the images taken, their order and crops, and first weights.", rich_help_panel=LEARNING
        ),
    ] = 0,
    root: Annotated[
        Path | None, typer.Option(help="Folder that contains the data sets. Default: APM_DATA.", rich_help_panel=FILES)
    ] = None,
    allow_test: Annotated[
        bool,
        typer.Option("--allow-test", help="Learn also from what is for testing by its name.", rich_help_panel=FILES),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The learned prompt. Default: METHOD-DATASET-SHOTSshots-seedSEED.safetensors.", rich_help_panel=FILES
        ),
    ] = None,
    save_every: Annotated[
        int, typer.Option(help="Steps between the files to go on from.", rich_help_panel=FILES)
    ] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=FILES)] = "auto",
    workers: Annotated[int, typer.Option(help="Number of threads that decode images.", rich_help_panel=FILES)] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line on stdout, nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")] = False,
    debug: Debug = False,
) -> None:
    """Learn a prompt from a few labelled images, for apm bench --method coop:file=OUT, tpt+coop and so on.

    The teacher stays as it is; the word vectors before the class names are learned, and CoCoOp's network of the image.
    The same command after a kill goes on, and comes to the same bytes.

    Exit code: 0 done, 1 an image cannot be read, 2 wrong usage, 130 interrupted.
    """
    from apm.text.prompt_learning import METHODS, LearningConfig, PromptLearner

    if method not in METHODS:
        raise unknown("method", method, METHODS)
    for name, value in (("--save-every", save_every), ("--workers", workers)):
        if value < 1:
            raise UsageError(f"{name} is {value}; it must be 1 or more.")
    from apm.benchmarks.datasets.training import open_training
    from apm.processes import ALONE

    config = LearningConfig(
        method=method, shots=shots, epochs=epochs, batch_size=batch_size, words=words, lr=lr, seed=seed
    )
    images = open_training(dataset, root=root, shots=shots, seed=seed, allow_test=allow_test)
    path = out or Path(f"{method}-{images.name.replace('/', '-')}-{shots}shots-seed{seed}.safetensors")
    loaded = load_shared_teacher(teacher, device, ALONE)
    for note in () if quiet else (*loaded.notes, *images.notes):
        notice(note)
    learner = PromptLearner(
        path,
        loaded,
        images.class_names,
        images.samples,
        config,
        data={"data": images.name, "fingerprint": images.fingerprint},
        workers=workers,
    )
    if learner.step and not quiet:
        notice(f"{path}: " + ("learned already" if learner.finished else f"going on from step {learner.step:,}"))
    names = {"loss": "cross-entropy"}
    with (
        told_when_interrupted("interrupted; the same command goes on from the last step that was saved"),
        TrainingProgress(learner.steps, "learn", wanted=not quiet, done=learner.step, names=names) as progress,
    ):
        learner.run(save_every=save_every, on_step=progress.step)
    _say_learned(path, learner.learned(), method, as_json=as_json)


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
    _say_learned(path, prompt, "coop" if prompt.meta_net is None else "cocoop", as_json=as_json)


def _say_learned(path: Path, prompt: LearnedPrompt, method: str, *, as_json: bool) -> None:
    words, width = prompt.context.shape
    if as_json:
        say_json(json.dumps({"path": str(path), "method": method, "words": words, "width": width}))
        return
    say(str(path))
    notice(f"{words} word vectors of {width} numbers: apm bench … --method {method}:file={path}")
