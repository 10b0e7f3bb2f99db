"""One step, beside the floor: engine, plain form, published loop and optimiser, in turn in one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .kind import Kind
from .machine import floor, rate_probe, six_products, stream_probe
from .options import Options, Record, images_and_targets, loaded_engine, plain_step
from .profile import (
    ADAM_BYTES,
    measured_flops,
    middle_flops,
    plain_flops,
    published_flops,
    step_flops,
    trained_parameters,
)
from .published_loop import TEXTS, TOWERS, PublishedLoop, random_towers
from .tables import Row, Table, shown
from .timing import Work, interleaved, spread

FORMS = {name: name for name in ("six products", "engine", "optimiser", "plain form")} | {"published": "published loop"}
"""Of a step, as records and readers call them."""


def measure_step(options: Options) -> Record:
    """Record the seconds of a step of every form, and their ratios to the floor of the same round.

    With ``batch`` B the engine steps B students at once, and the rates are those of B; seconds are told per student.
    The published loop is slow, and takes part in the first ``published_rounds`` rounds only (0: in none).
    """
    config, device, batch = options.config, options.device, options.batch
    rounds = options.published_rounds
    settings = {"batch": batch, "published_rounds": rounds, "precisions": list(options.precisions)}
    flops = {"six products": middle_flops(config), "engine": step_flops(config), "optimiser": 0}
    flops["plain form"] = plain_flops(config)
    works: dict[str, Work] = {}
    operations: dict[str, int] = {}
    for precision in options.precisions:
        works[f"rate {precision}"], operations[precision] = rate_probe(config, precision, batch, device)
        works[f"six products {precision}"] = six_products(config, precision, batch, device)
        engine = loaded_engine(config, precision, device, batch=batch)
        works[f"engine {precision}"] = engine.advance
        works[f"optimiser {precision}"] = engine.update
    works["memory"], traffic = stream_probe(config, batch, device)
    works["plain form fp32"] = plain_step(config, device)
    if rounds:
        towers = None if options.quick else random_towers(device)
        works["published fp32"] = PublishedLoop(config, *images_and_targets(config, 1, device), towers=towers).step
        flops["published"] = published_flops(config) + (measured_flops(towers) if towers else 0)
        if towers:
            settings |= {"published_towers": TOWERS, "published_texts": TEXTS}
    times = interleaved(works, device, options.rounds, fewer={"published fp32": rounds})

    summary: dict[str, Any] = {
        "middle_flops": flops["six products"],
        "adam_bytes": ADAM_BYTES * trained_parameters(config),
        "bandwidth": spread([traffic / seconds for seconds in times["memory"]]),
        "auto_precision": options.chosen_precision if options.precision == "auto" else None,
    }
    bounds: dict[str, list[float]] = {}
    for precision in options.precisions:
        rates = [operations[precision] / seconds for seconds in times[f"rate {precision}"]]
        floors = [
            floor(config, rate=rate, bandwidth=traffic / seconds)
            for rate, seconds in zip(rates, times["memory"], strict=True)
        ]
        bounds[precision] = [one["seconds"] for one in floors]
        summary[precision] = {
            "rate": spread(rates),
            "floor": {part: spread([one[part] for one in floors]) for part in ("compute", "memory", "seconds")},
            **_ratios(times, precision, batch),
        }
    return options.found(_rows(times, flops, bounds, batch), summary, **settings)


def _ratios(times: Mapping[str, list[float]], precision: str, batch: int) -> Record:
    """What is compared with the engine; its time is that of all its students."""

    def ratio(above: str, below: str, students: int = 1) -> dict[str, float | int]:
        """Of the rounds that both took part in."""
        return spread([students * a / b for a, b in zip(times[above], times[below], strict=False)])

    found = {
        "optimiser_share": ratio(f"optimiser {precision}", f"engine {precision}"),
        "plain_over_engine": ratio("plain form fp32", f"engine {precision}", batch),
    }
    if "published fp32" in times:
        found["published_ratio"] = ratio("published fp32", f"engine {precision}", batch)
    return found


def _rows(
    times: Mapping[str, list[float]], flops: Mapping[str, int], bounds: Mapping[str, list[float]], batch: int
) -> list[Record]:
    """One row a form and precision, per student."""
    rows = []
    for name, values in times.items():
        form, _, products = name.rpartition(" ")
        if form in flops:
            students = 1 if form in ("plain form", "published") else batch
            each = [value / students for value in values]
            row: Record = {"name": form, "precision": products, "seconds": spread(each), "flops": flops[form]}
            if form != "optimiser" and products in bounds:
                row["ratio_to_floor"] = spread([a / b for a, b in zip(each, bounds[products], strict=False)])
            rows.append(row)
    return rows


def _forms(record: Row) -> list[Record]:
    return [{**row, "form": FORMS[row["name"]]} for row in record["rows"]]


def _rates(record: Row) -> list[Record]:
    return [{"precision": name, **record["summary"][name]} for name in ("fp32", "bf16") if name in record["summary"]]


TABLES = shown(
    Table(
        {
            "one step of one student": "{form}",
            "products in": "{precision}",
            "time": "{seconds}",
            "GFLOP": "{flops:G,.1f}",
            "× floor": "{ratio_to_floor:x}",
        },
        _forms,
    ),
    Table(
        {
            "products in": "{precision}",
            "machine's rate, GFLOP/s": "{rate:G,.0f}",
            "its quartiles": "{rate[q1]:G,.0f}–{rate[q3]:G,.0f}",
            "floor by compute": "{floor[compute]}",
            "floor by memory": "{floor[memory]}",
            "optimiser's share of a step": "{optimiser_share:.0%}",
            "plain form ÷ engine": "{plain_over_engine:x}",
            "published loop ÷ engine": "{published_ratio:x}",
        },
        _rates,
    ),
    "Middle layers: {middle_flops:G.1f} GFLOP a step. Adam: {adam_bytes:M,.0f} MB a step, at {bandwidth:G.1f} GB/s.\n"
    "`auto` chooses {auto_precision} here.\n"
    "Students side by side: {batch}. *six products*: the bare products of the middle layers, forward and backward, "
    "with the engine's layouts.",
    "*published loop*: the same step as the published experiments make it. 8 copies of the image × all locations "
    "are laid out as rows, 16 rows at a time go through the network, the results are joined to the earlier ones after "
    "every chunk, and the teacher's towers ({published_towers}, random weights, one image and {published_texts} texts) "
    "run again at every step.",
)


def _plot(figure: Any, record: Row) -> None:
    rows, axes = record["rows"][::-1], figure.subplots()
    medians = [row["seconds"]["median"] for row in rows]
    errors = [[abs(row["seconds"][end] - row["seconds"]["median"]) for row in rows] for end in ("q1", "q3")]
    names = [f"{FORMS[row['name']]} {row['precision']}" for row in rows]
    axes.barh(names, medians, xerr=errors, color="#4878a8", height=0.6)
    for precision, style in (("fp32", "-"), ("bf16", "--")):
        if precision in record["summary"]:
            bound = record["summary"][precision]["floor"]["seconds"]["median"]
            axes.axvline(bound, color="#c44e52", linestyle=style, linewidth=1, label=f"floor {precision}")
    axes.set(xscale="log", xlabel="seconds per step of one student", xlim=(min(medians) / 2, 1.5 * max(medians)))
    figure.legend(loc="outside lower center", ncols=2)


STEP = Kind(
    name="step",
    question="one step: engine, plain form, published loop, optimiser, beside the machine's own floor (the default)",
    title="One step beside the floor",
    arguments=lambda parser: parser.add_argument(
        "--published-rounds", type=int, default=2, help="rounds of the published loop; 0: leave it out"
    ),
    measure=measure_step,
    table=TABLES,
    plot=_plot,
)
