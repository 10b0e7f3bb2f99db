"""`apm profile`: what student and teacher consist of, and what a step costs: parameters, operations, memory, time."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from apm.errors import unknown
from apm.settings import at_least
from apm.student.config import APMConfig, Precision

from .options import Debug
from .render import notice_if_slow, say, say_json
from .table import print_table

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
    if dim is not None:
        at_least(1)("--dim", dim)
    if precision not in get_args(Precision):
        raise unknown("precision", precision, get_args(Precision))
    APMConfig.preset(preset, dim=512, readout=readout)  # type: ignore[arg-type]  # names, before the slow part

    from apm.benchmarks.speed.options import loaded_engine
    from apm.benchmarks.speed.profile import profile_student, profile_teacher
    from apm.benchmarks.speed.timing import repeated, spread
    from apm.devices import pick_device
    from apm.student.matmul import measured_precision
    from apm.teachers import load_teacher

    place = pick_device(device)
    loaded = None if teacher is None else load_teacher(teacher, device=place)
    config = APMConfig.preset(preset, dim=dim or (loaded.dim if loaded else 512), readout=readout)  # type: ignore[arg-type]
    chosen = measured_precision(place) if precision == "auto" else precision
    notice_if_slow(precision, place)
    student = profile_student(config, precision=chosen)
    counted = None if loaded is None else profile_teacher(loaded)
    engine = loaded_engine(config, "bf16" if chosen == "bf16" else "fp32", place)
    seconds = spread(repeated(engine.advance, place, ROUNDS))
    if as_json:
        say_json(json.dumps(_record(student, counted, seconds, preset=preset, device=str(place))))
    else:
        _print(student, counted, seconds, preset=preset, device=str(place))


def _record(
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


def _print(
    student: StudentProfile,
    teacher: TeacherProfile | None,
    seconds: dict[str, float | int],
    *,
    preset: str,
    device: str,
) -> None:
    """Print the counts for people."""
    config, memory, median = student.config, student.memory, seconds["median"]
    say(
        f"{preset} student: D = {config.dim}, {config.grid} × {config.grid} locations, readout {config.readout}, "
        f"products in {student.precision}\n"
    )
    parts = {**student.parameters, "all": sum(student.parameters.values()), "really there": student.counted_parameters}
    print_table(["student", "parameters"], [[part, f"{count:,}"] for part, count in parts.items()])
    say("")
    operations = {
        "this package": student.step,
        "of these, the two middle layers": student.middle,
        "plain form": student.plain,
        "published loop": student.published,
    }
    print_table(["one step, counted by torch", "GFLOP"], [[form, _giga(count)] for form, count in operations.items()])
    say("")
    held = {**memory, "all": sum(memory.values()), "really held": student.counted_memory}
    print_table(["memory of one student", "MB"], [[use, f"{size / 1e6:,.1f}"] for use, size in held.items()])
    rate = student.step / median / 1e9
    say(f"\none step on {device}: {1e3 * median:,.1f} ms (median of {seconds['n']}), {rate:,.0f} GFLOP/s")
    if teacher is not None:
        say(f"\n{teacher.name}: D = {teacher.dim}, counted by torch\n")
        towers = [
            ["image tower, one image", _count(teacher.image_parameters), _giga(teacher.image_flops)],
            ["text tower, one text", _count(teacher.text_parameters), _giga(teacher.text_flops)],
        ]
        print_table(["teacher", "parameters", "GFLOP"], towers)


def _giga(count: int) -> str:
    return f"{count / 1e9:,.3f}"


def _count(count: int | None) -> str:
    return "–" if count is None else f"{count:,}"
