"""`apm prompts`: learned prompts, for the methods coop, cocoop, tpt+coop and tpt+cocoop."""

# ruff: noqa: RUF009  (`setting` makes fields)
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apm.errors import unknown
from apm.settings import at_least, check_values, setting

from .data import load_chosen_teacher
from .groups import command_group
from .options import Debug, flag, options_of
from .render import notice, say, say_json, told_when_interrupted
from .training import TrainingProgress

if TYPE_CHECKING:
    from apm.text.learned_prompt import LearnedPrompt
    from apm.text.prompt_learning import PromptLearner

app = command_group("Learned prompts: what CoOp and CoCoOp learn from labelled images, for apm bench.")
LEARNING, FILES = "Learning", "Files"


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What is learned, and from what."""

    teacher: str | None = setting(None, "As for apm bench. The prompt works only with this teacher.")
    shots: int = setting(16, "Images per class.")
    epochs: int | None = setting(
        None,
        "Passes over the images. Default: coop 200; 50 with 1,000 classes or 1 shot, 100 with 2 to 4 shots; cocoop 10.",
    )
    batch_size: int | None = setting(None, "Images per step. Default: coop 32, cocoop 1.")
    words: int | None = setting(
        None, 'Number of word vectors, initialised at random. Default: the 4 of "a photo of a".'
    )
    lr: float = setting(2e-3, "Peak learning rate of SGD.")
    seed: int = setting(0, "Seed of the choice of images, their order and crops, and the initial weights.")


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where images are read and the prompt is written, and how the work is done.

    Raises:
        UsageError: a value that cannot work.
    """

    root: Path | None = setting(None, "Folder that contains the data sets. Default: APM_DATA.")
    allow_test: bool = setting(False, "Also accept data whose name says that it is for testing.")
    out: Path | None = setting(None, "The learned prompt. Default: METHOD-DATASET-SHOTSshots-seedSEED.safetensors.")
    save_every: int = setting(100, "Steps between checkpoints.", check=at_least(1))
    device: str = setting("auto", "auto, cpu or cuda.")
    workers: int = setting(4, "Number of threads that decode images.", check=at_least(1))

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self, flag)


@app.command()
@options_of(Learning, "learning", LEARNING)
@options_of(Files, "files", FILES)
def learn(
    method: Annotated[str, typer.Argument(metavar="coop|cocoop", help="Method that learns the prompt.")],
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="Labelled TRAINING images: a folder with a folder for each class, a .parquet file (image, label, and "
            "wnid or class_name), or a data set with a split json, whose training part is used.",
        ),
    ],
    learning: Learning,
    files: Files,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")] = False,
    debug: Debug = False,
) -> None:
    """Learn a prompt from a few labelled images, for apm bench --method coop:file=OUT, tpt+coop and so on.

    The teacher is frozen; the word vectors before the class names are learned, and CoCoOp's meta-net. After a kill the
    same command continues and ends with identical bytes.

    Exit code: 0 done, 1 an image cannot be read, 2 wrong usage, 130 interrupted.
    """
    learner = _learner(method, dataset, learning, files, quiet=quiet)
    if learner.step and not quiet:
        notice(
            f"{learner.path}: " + ("learned already" if learner.finished else f"going on from step {learner.step:,}")
        )
    names = {"loss": "cross-entropy"}
    with (
        told_when_interrupted("interrupted; the same command goes on from the last step that was saved"),
        TrainingProgress(learner.steps, "learn", wanted=not quiet, done=learner.step, names=names) as progress,
    ):
        learner.run(save_every=files.save_every, on_step=progress.step)
    _say_learned(learner.path, learner.learned(), method, as_json=as_json)


def _learner(method: str, dataset: str, learning: Learning, files: Files, *, quiet: bool) -> PromptLearner:
    """Open the images, load the teacher, and make the learner: new, or from where it was stopped."""
    from apm.text.prompt_learning import METHODS, LearningConfig, PromptLearner

    if method not in METHODS:
        raise unknown("method", method, METHODS)
    from apm.benchmarks.datasets.training import open_training

    seed = learning.seed
    config = LearningConfig(
        method=method,
        shots=learning.shots,
        epochs=learning.epochs,
        batch_size=learning.batch_size,
        words=learning.words,
        lr=learning.lr,
        seed=seed,
    )
    images = open_training(dataset, root=files.root, shots=learning.shots, seed=seed, allow_test=files.allow_test)
    path = files.out or Path(f"{method}-{images.name.replace('/', '-')}-{learning.shots}shots-seed{seed}.safetensors")
    teacher = load_chosen_teacher(learning.teacher, files.device)
    for note in () if quiet else (*teacher.notes, *images.notes):
        notice(note)
    data = {"data": images.name, "fingerprint": images.fingerprint}
    return PromptLearner(path, teacher, images.class_names, images.samples, config, data=data, workers=files.workers)


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="FILE", help="Checkpoint of CoOp's or CoCoOp's code, such as model.pth.tar-50.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Output file. Default: FILE with .safetensors appended.", metavar="OUT")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """Convert a published checkpoint to safetensors. No code in the checkpoint is run.

    Only the learned context (and CoCoOp's meta-net) is kept; class names come from the data set that is evaluated.
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
    notice(f"{words} word vectors of width {width}: apm bench … --method {method}:file={path}")
