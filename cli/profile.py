"""`apm profile`: what student and teacher consist of, and what a step costs: parameters, operations, memory, time."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import UsageError

from .options import Debug
from .render import notice_if_slow

if TYPE_CHECKING:
    from apm.benchmarks.speed.profile import StudentProfile, TeacherProfile

ROUNDS = 5


def profile(
    preset: Annotated[str, typer.Option(help="Size of the student: paper or small.")] = "paper",
    dim: Annotated[
        int | None, typer.Option(help="Width of the token. Default: the teacher's, else 512.", show_default=False)
    ] = None,
    readout: Annotated[str, typer.Option(help="query (the object query) or mean.")] = "query",
    precision: Annotated[str, typer.Option(help="Number format of the matrix products: auto, fp32 or bf16.")] = "auto",
    teacher: Annotated[
        str | None, typer.Option(help="Count this teacher as well; see `apm teachers`.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="Where to time a step: auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """Count parameters, floating-point operations and memory, and time a step.

    Parameters and memory are counted from the shapes, and again in a real student. Operations are those of matrix
    products, as torch's own counter sees them.
    """
    if dim is not None and dim < 1:
        raise UsageError(f"--dim must be 1 or more, not {dim}.")

    from typing import get_args

    from apm.benchmarks.speed.options import loaded_engine
    from apm.benchmarks.speed.profile import profile_student, profile_teacher
    from apm.benchmarks.speed.timing import repeated, spread
    from apm.devices import pick_device
    from apm.errors import unknown
    from apm.student.config import APMConfig, Precision
    from apm.student.matmul import measured_precision
    from apm.teachers import load_teacher

    if precision not in get_args(Precision):
        raise unknown("precision", precision, get_args(Precision))
    place = pick_device(device)
    APMConfig.preset(preset, dim=512, readout=readout)  # type: ignore[arg-type]  # names are checked before the slow part
    loaded = None if teacher is None else load_teacher(teacher, device=place)
    config = APMConfig.preset(preset, dim=dim or (loaded.dim if loaded else 512), readout=readout)  # type: ignore[arg-type]
    chosen = measured_precision(place) if precision == "auto" else precision
    notice_if_slow(precision, place)
    student = profile_student(config, precision=chosen)
    counted = None if loaded is None else profile_teacher(loaded)
    engine = loaded_engine(config, "bf16" if chosen == "bf16" else "fp32", place)
    seconds = spread(repeated(engine.advance, place, ROUNDS))
    if as_json:
        typer.echo(json.dumps(record(student, counted, seconds, preset=preset, device=str(place))))
        return
    typer.echo(text(student, counted, seconds, preset=preset, device=str(place)))


def record(
    student: StudentProfile,
    teacher: TeacherProfile | None,
    seconds: dict[str, float | int],
    *,
    preset: str,
    device: str,
) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "preset": preset,
        "device": device,
        "precision": student.precision,
        "student": {
            **asdict(student),
            "config": {**asdict(student.config), "hidden": list(student.config.hidden)},
        },
        "step_seconds": seconds,
        "teacher": None if teacher is None else asdict(teacher),
    }


def text(
    student: StudentProfile,
    teacher: TeacherProfile | None,
    seconds: dict[str, float | int],
    *,
    preset: str,
    device: str,
) -> str:
    """Lay the counts out for people."""
    from rich.table import Table

    from .teachers import as_text

    def table(*titles: str) -> Table:
        view = Table(box=None, pad_edge=False)
        view.add_column(titles[0], no_wrap=True)
        for title in titles[1:]:
            view.add_column(title, justify="right", no_wrap=True)
        return view

    config = student.config
    counts = table("student", "parameters")
    for part, parameters in student.parameters.items():
        counts.add_row(part, f"{parameters:,}")
    counts.add_row("all", f"{sum(student.parameters.values()):,}")
    counts.add_row("really there", f"{student.counted_parameters:,}")
    operations = table("one step, counted by torch", "GFLOP")
    operations.add_row("this package", _giga(student.step))
    operations.add_row("of these, the two middle layers", _giga(student.middle))
    operations.add_row("plain form", _giga(student.plain))
    operations.add_row("published loop", _giga(student.published))
    memory = table("memory of one student", "MB")
    for purpose, size in student.memory.items():
        memory.add_row(purpose, f"{size / 1e6:,.1f}")
    memory.add_row("all", f"{sum(student.memory.values()) / 1e6:,.1f}")
    memory.add_row("really held", f"{student.counted_memory / 1e6:,.1f}")
    median = seconds["median"]
    parts = [
        f"{preset} student: D = {config.dim}, {config.grid} × {config.grid} locations, readout {config.readout}, "
        f"products in {student.precision}",
        as_text(counts),
        as_text(operations),
        as_text(memory),
        f"one step on {device}: {1e3 * median:,.1f} ms (median of {seconds['n']}), "
        f"{student.step / median / 1e9:,.0f} GFLOP/s",
    ]
    if teacher is not None:
        towers = table("teacher", "parameters", "GFLOP")
        towers.add_row("image tower, one image", _count(teacher.image_parameters), _giga(teacher.image_flops))
        towers.add_row("text tower, one text", _count(teacher.text_parameters), _giga(teacher.text_flops))
        parts += [f"{teacher.name}: D = {teacher.dim}, counted by torch", as_text(towers)]
    return "\n\n".join(parts)


def _giga(count: int) -> str:
    return f"{count / 1e9:,.3f}"


def _count(count: int | None) -> str:
    return "–" if count is None else f"{count:,}"
