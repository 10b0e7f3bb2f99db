"""One step, beside the floor: engine, plain form, published loop and optimiser, in turn in one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .kind import Kind
from .machine import floor, rate_probe, six_products, stream_probe
from .options import Options, images_and_targets, loaded_engine, plain_step
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
from .tables import ratio_text, table, time_text
from .timing import Work, interleaved, spread

FORMS = {name: name for name in ("six products", "engine", "optimiser", "plain form")} | {"published": "published loop"}
"""Of a step, as records and readers call them."""


def measure_step(options: Options, *, published_rounds: int = 2) -> dict[str, Any]:
    """Record the seconds of a step of every form, and their ratios to the floor of the same round.

    Args:
        options: sizes and device. With ``batch`` B the engine steps B students at once, and its seconds and the rates
            are those of B; seconds are told per student.
        published_rounds: rounds that the published loop takes part in (0: none); it is slow.
    """
    config, device, batch = options.config, options.device, options.batch
    settings: dict[str, Any] = {
        "batch": batch,
        "published_rounds": published_rounds,
        "precisions": list(options.precisions),
    }
    works: dict[str, Work] = {}
    operations: dict[str, int] = {}
    flops = {
        "six products": middle_flops(config),
        "engine": step_flops(config),
        "optimiser": 0,
        "plain form": plain_flops(config),
    }
    for precision in options.precisions:
        run, operations[precision] = rate_probe(config, precision, batch, device)
        works[f"rate {precision}"] = run
        works[f"six products {precision}"] = six_products(config, precision, batch, device)
        engine = loaded_engine(config, precision, device, batch=batch)
        works[f"engine {precision}"] = engine.advance
        works[f"optimiser {precision}"] = engine.update
    run, traffic = stream_probe(config, batch, device)
    works["memory"] = run
    works["plain form fp32"] = plain_step(config, device)
    if published_rounds:
        towers = None if options.quick else random_towers(device)
        published = PublishedLoop(config, *images_and_targets(config, 1, device), towers=towers)
        works["published fp32"] = published.step
        flops["published"] = published_flops(config) + (measured_flops(towers) if towers else 0)
        if towers:
            settings |= {"published_towers": TOWERS, "published_texts": TEXTS}
    times = interleaved(works, device, options.rounds, fewer={"published fp32": published_rounds})

    floors: dict[str, list[dict[str, float]]] = {
        precision: [
            floor(config, rate=operations[precision] / rate, bandwidth=traffic / memory)
            for rate, memory in zip(times[f"rate {precision}"], times["memory"], strict=True)
        ]
        for precision in options.precisions
    }
    rows = list(_rows(times, flops, floors, batch))
    return options.found(rows, _summary(options, times, operations, traffic, floors), **settings)


def _rows(
    times: Mapping[str, list[float]],
    flops: Mapping[str, int],
    floors: Mapping[str, list[dict[str, float]]],
    batch: int,
) -> Iterator[dict[str, Any]]:
    """One row a form and precision, per student."""
    for name, values in times.items():
        kind, _, products = name.rpartition(" ")
        if kind not in flops:
            continue
        students = 1 if kind in ("plain form", "published") else batch
        row: dict[str, Any] = {
            "name": kind,
            "precision": products,
            "seconds": spread([value / students for value in values]),
            "flops": flops[kind],
        }
        if kind != "optimiser" and products in floors:
            bounds = [one["seconds"] for one in floors[products]]
            row["ratio_to_floor"] = spread([a / students / b for a, b in zip(values, bounds, strict=False)])
        yield row


def _summary(
    options: Options,
    times: dict[str, list[float]],
    operations: dict[str, int],
    traffic: int,
    floors: dict[str, list[dict[str, float]]],
) -> dict[str, Any]:
    def ratio(above: str, below: str, students: int = 1) -> dict[str, float | int]:
        """Of the rounds that both took part in; the engine's time is that of all its students."""
        return spread([students * a / b for a, b in zip(times[above], times[below], strict=False)])

    result: dict[str, Any] = {
        "middle_flops": middle_flops(options.config),
        "adam_bytes": ADAM_BYTES * trained_parameters(options.config),
        "bandwidth": spread([traffic / seconds for seconds in times["memory"]]),
        "auto_precision": options.chosen_precision if options.precision == "auto" else None,
    }
    for precision in options.precisions:
        result[precision] = {
            "rate": spread([operations[precision] / seconds for seconds in times[f"rate {precision}"]]),
            "floor": {
                part: spread([one[part] for one in floors[precision]]) for part in ("compute", "memory", "seconds")
            },
            "optimiser_share": ratio(f"optimiser {precision}", f"engine {precision}"),
            "plain_over_engine": ratio("plain form fp32", f"engine {precision}", options.batch),
        }
        if "published fp32" in times:
            result[precision]["published_ratio"] = ratio("published fp32", f"engine {precision}", options.batch)
    return result


def _table(record: Mapping[str, Any]) -> str:
    summary, settings = record["summary"], record["settings"]
    forms = table(
        {
            "one step of one student": lambda row: FORMS[row["name"]],
            "products in": "precision",
            "time": "seconds",
            "GFLOP": lambda row: f"{row['flops'] / 1e9:,.1f}" if row["flops"] else "–",
            "× floor": lambda row: ratio_text(row["ratio_to_floor"]) if "ratio_to_floor" in row else "–",
        },
        record["rows"],
    )
    machine = table(
        {
            "products in": "precision",
            "machine's rate, GFLOP/s": lambda row: f"{row['rate']['median'] / 1e9:,.0f}",
            "its quartiles": lambda row: f"{row['rate']['q1'] / 1e9:,.0f}–{row['rate']['q3'] / 1e9:,.0f}",
            "floor by compute": lambda row: time_text(row["floor"]["compute"]),
            "floor by memory": lambda row: time_text(row["floor"]["memory"]),
            "optimiser's share of a step": lambda row: f"{row['optimiser_share']['median']:.0%}",
            "plain form ÷ engine": lambda row: ratio_text(row["plain_over_engine"]),
            "published loop ÷ engine": (
                lambda row: ratio_text(row["published_ratio"]) if "published_ratio" in row else "–"
            ),
        },
        [{"precision": name, **summary[name]} for name in ("fp32", "bf16") if name in summary],
    )
    auto = f"`auto` chooses {summary['auto_precision']} here. " if summary["auto_precision"] else ""
    published = PUBLISHED.format(**settings) if "published_towers" in settings else ""
    return (
        f"{forms}\n{machine}\n"
        f"Middle layers: {summary['middle_flops'] / 1e9:.1f} GFLOP a step. "
        f"Adam: {summary['adam_bytes'] / 1e6:,.0f} MB a step, at {summary['bandwidth']['median'] / 1e9:.1f} GB/s. "
        f"{auto}Students side by side: {settings['batch']}. "
        f"*six products*: the bare products of the middle layers, forward and backward, with the engine's layouts.\n"
        f"{published}"
    )


PUBLISHED = (
    "\n*published loop*: the same step as the published experiments make it. 8 copies of the image × all locations "
    "are laid out as rows, 16 rows at a time go through the network, the results are joined to the earlier ones after "
    "every chunk, and the teacher's towers ({published_towers}, random weights, one image and {published_texts} texts) "
    "run again at every step.\n"
)


def _plot(figure: Any, record: Mapping[str, Any]) -> None:
    rows = record["rows"][::-1]
    axes = figure.subplots()
    medians = [row["seconds"]["median"] for row in rows]
    low = [row["seconds"]["median"] - row["seconds"]["q1"] for row in rows]
    high = [row["seconds"]["q3"] - row["seconds"]["median"] for row in rows]
    names = [f"{FORMS[row['name']]} {row['precision']}" for row in rows]
    axes.barh(names, medians, xerr=(low, high), color="#4878a8", height=0.6)
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
    measure=lambda given: measure_step(Options.of(given), published_rounds=given.published_rounds),
    table=_table,
    plot=_plot,
)
