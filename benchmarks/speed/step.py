"""One step, beside the floor: engine, plain form, published loop and optimiser, in turn in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .kind import argument, kind
from .machine import floor, rate_probe, six_products, stream_probe
from .options import Options, Products, Record, images_and_targets, loaded_engine, plain_step
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
from .tables import Row
from .timing import Spread, Work, interleaved, spread, spreads

BATCHED = ("six products", "engine", "optimiser")
"""What has students side by side; the plain form and the published loop have one."""


def _forms(record: Row) -> list[Record]:
    """With the name for readers."""
    return [{**row, "form": row["name"].replace("published", "published loop")} for row in record["rows"]]


def _rates(record: Row) -> list[Record]:
    return [{"precision": name, **record["summary"][name]} for name in ("fp32", "bf16") if name in record["summary"]]


def _bars(axes: Any, record: Row) -> None:
    rows = _forms(record)[::-1]
    medians = [row["seconds"]["median"] for row in rows]
    errors = [[abs(row["seconds"][end] - row["seconds"]["median"]) for row in rows] for end in ("q1", "q3")]
    names = [f"{row['form']} {row['precision']}" for row in rows]
    axes.barh(names, medians, xerr=errors, color="#4878a8", height=0.6)
    for row in _rates(record):
        bound, label = row["floor"]["seconds"]["median"], f"floor {row['precision']}"
        style = "-" if row["precision"] == "fp32" else "--"
        axes.axvline(bound, color="#c44e52", linestyle=style, linewidth=1, label=label)
    axes.set(xscale="log", xlabel="seconds per step of one student", xlim=(min(medians) / 2, 1.5 * max(medians)))
    axes.figure.legend(loc="outside lower center", ncols=2)


@kind(
    (
        _forms,
        """
        | one step of one student | products in | time | GFLOP | × floor |
        | {form} | {precision} | {seconds} | {flops:G,.1f} | {ratio_to_floor:x} |
        """,
    ),
    (
        _rates,
        "| products in | machine's rate, GFLOP/s | its quartiles | floor by compute | floor by memory "
        "| optimiser's share of a step | plain form ÷ engine | published loop ÷ engine |\n"
        "| {precision} | {rate:G,.0f} | {rate[q1]:G,.0f}–{rate[q3]:G,.0f} | {floor[compute]} | {floor[memory]} "
        "| {optimiser_share:.0%} | {plain_over_engine:x} | {published_ratio:x} |",
    ),
    "Middle layers: {middle_flops:G.1f} GFLOP a step. Adam: {adam_bytes:M,.0f} MB a step, at {bandwidth:G.1f} GB/s.\n"
    "`auto` chooses {auto_precision} here.\n"
    "Students side by side: {batch}. *six products*: the bare products of the middle layers, forward and backward, "
    "with the engine's layouts.\n\n"
    "*published loop*: the same step as the published experiments make it. 8 copies of the image × all locations "
    "are laid out as rows, 16 rows at a time go through the network, the results are joined to the earlier ones "
    "after every chunk, and the teacher's towers ({published_towers}, random weights, one image and "
    "{published_texts} texts) run again at every step.",
    title="One step beside the floor",
    own=argument("--batch", "students side by side (default: 1 on a CPU, 16 on a GPU)", type=int)
    | argument("--published-rounds", "rounds of the published loop; 0: leave it out", type=int, default=2),
    panels=[_bars],
)
def step(options: Options) -> Record:
    """One step: engine, plain form, published loop, optimiser, beside the machine's own floor (the default).

    Ratios are to the floor of the same round. With ``batch`` B the engine steps B students at once, and the rates are
    those of B; seconds are told per student. The published loop is slow, and takes part in the first
    ``published_rounds`` rounds only (0: in none).
    """
    config, device, rounds = options.config, options.device, options.published_rounds
    batch = options.batch or (16 if device.type == "cuda" and not options.quick else 1)
    chosen = options.chosen_precision
    both = options.precision == "auto" and chosen == "bf16"  # bf16 where it is worth having
    precisions: Sequence[Products] = ("fp32", "bf16") if both else (chosen,)
    settings = {"batch": batch, "published_rounds": rounds, "precisions": list(precisions)}
    flops = {"six products": middle_flops(config), "engine": step_flops(config), "optimiser": 0}
    flops["plain form"] = plain_flops(config)
    works: dict[str, Work] = {}
    operations: dict[str, int] = {}
    for precision in precisions:
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
    each = {name: values / (batch if name.startswith(BATCHED) else 1) for name, values in times.items()}

    def ratio(above: str, below: str) -> Spread:
        """Of the rounds that both took part in."""
        return spread(each[above] / each[below][: len(each[above])])

    bandwidth, bounds = traffic / times["memory"], {}
    summary: dict[str, Any] = {
        "middle_flops": flops["six products"],
        "adam_bytes": ADAM_BYTES * trained_parameters(config),
        "bandwidth": spread(bandwidth),
        "auto_precision": chosen if options.precision == "auto" else None,
    }
    for precision in precisions:
        rate = operations[precision] / times[f"rate {precision}"]
        bounds[precision] = floor(config, rate=rate, bandwidth=bandwidth)
        summary[precision] = {
            "rate": spread(rate),
            "floor": spreads(bounds[precision]),
            "optimiser_share": ratio(f"optimiser {precision}", f"engine {precision}"),
            "plain_over_engine": ratio("plain form fp32", f"engine {precision}"),
        }
        if rounds:
            summary[precision]["published_ratio"] = ratio("published fp32", f"engine {precision}")
    return options.found(_rows(each, flops, bounds), summary, **settings)


def _rows(each: Mapping[str, Any], flops: Mapping[str, int], bounds: Mapping[Any, Record]) -> list[Record]:
    """One row a form and precision, per student."""
    rows = []
    for name, values in each.items():
        form, _, precision = name.rpartition(" ")
        if form in flops:
            row: Record = {"name": form, "precision": precision, "seconds": spread(values), "flops": flops[form]}
            if form != "optimiser" and precision in bounds:
                row["ratio_to_floor"] = spread(values / bounds[precision]["seconds"][: len(values)])
            rows.append(row)
    return rows
