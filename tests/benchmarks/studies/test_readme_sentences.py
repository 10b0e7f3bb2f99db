"""What benchmarks/README.md says in words about its tables is what the records give: each figure, and who helps."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from apm.benchmarks.studies import readme_tables
from apm.benchmarks.studies.study import read_record

Rows = dict[str, dict[str, Any]]


@cache
def record(place: str) -> dict[str, Any]:
    found: dict[str, Any] = read_record(readme_tables.RESULTS / f"evidence-{place}.json")
    return found


def rows(place: str, number: int) -> Rows:
    """By method, the rows of one table of an evidence record; of Tiny ImageNet's, 0 is corrupted and 1 clean."""
    return {row["method"]: row for row in record(place)["tables"][number]["rows"]}


def gain(table: Rows, *methods: str) -> list[str]:
    return [f"{table[name]['gain']:+.1f}".replace("-", "−") for name in methods]


def span(values: Iterable[float], digits: int) -> str:
    values = sorted(values)
    return f"{values[0]:.{digits}f} to {values[-1]:.{digits}f}"


def helped(table: Rows) -> set[str]:
    return {name for name, row in table.items() if row["p"] is not None and row["p"] < 0.05 and row["gain"] > 0}


def first(table: Rows) -> set[str]:
    return {name for name, row in table.items() if row["rank"] == 1}


def phrases() -> dict[int, list[str]]:
    """By the number of the sentence, what it must say."""
    corrupted, clean, tuned_corrupted, tuned = (
        *(rows("features", k) for k in (0, 1)),
        *(rows("tuned", k) for k in (0, 1)),
    )
    methods = [name for name in clean if name != "zero-shot"]
    zero, streams = corrupted["zero"], record("features")["orders"]
    best = (corrupted[name]["gain"] for name in ("onzeta", "tps", "mta", "dpe"))
    cells = [values[1] for orders in streams.values() for cell, values in orders.items() if cell != "clean"]
    apart = gain(clean, "zero", "mta", "tps")
    both = gain(clean, "dpe", "boostadapter") + gain(corrupted, "dpe", "boostadapter")
    return {
        1: [f"ZERO ({apart[0]} points of {clean['zero-shot']['accuracy']:.1f}), MTA ({apart[1]}) and TPS ({apart[2]})"],
        2: [
            f"gain {span(best, 1)} points of {corrupted['zero-shot']['accuracy']:.1f}",
            f"wins {zero['wrong_to_right']} answers and loses {zero['right_to_wrong']}",
        ],
        4: [
            "({} and {}, corrupted {} and {})".format(*both),
            "({}, {} and {})".format(*gain(corrupted, "onzeta", "ecalp", "tda")),
            "on clean ones ({} and {})".format(*gain(clean, "dmn", "dota")),
            "on corrupted ones ({} and {})".format(*gain(corrupted, "dmn", "dota")),
        ],
        5: [
            f"{span((orders['clean'][1] for orders in streams.values()), 1)} points on the clean",
            f"by up to {max(cells):.1f} on 1,000 of one",
        ],
        6: [
            f"{clean['zero-shot']['ece']:.2f} clean and {corrupted['zero-shot']['ece']:.2f} corrupted",
            "theirs {} and {}".format(
                *(span((table[name]["ece"] for name in methods), 2) for table in (clean, corrupted))
            ),
            f"(NLL {clean['ecalp']['nll']:.0f} and {corrupted['ecalp']['nll']:.0f})",
        ],
        7: ["({},".format(*gain(tuned, "rtpt"))],
        9: [
            "it gains {} and {} points".format(
                *(word[1:] for word in gain(tuned, "apm[confident,32]", "apm[mean,32]"))
            ),
            "({:.2f} clean, {:.2f} corrupted)".format(
                *(table["apm[mean,32]"]["ece"] for table in (tuned, tuned_corrupted))
            ),
        ],
    }


def sentences() -> dict[int, str]:
    text = readme_tables.DOCUMENT.read_text(encoding="utf-8").split("## What these data show")[1].split("\n## ")[0]
    return {
        int(number): " ".join(said.split()) for number, said in re.findall(r"(?ms)^(\d+)\. (.*?)(?=^\d+\. |\Z)", text)
    }


def test_every_figure_in_the_sentences_is_that_of_a_record() -> None:
    said, wanted = sentences(), phrases()
    assert list(said) == list(range(1, 11))
    for number, text in said.items():
        for phrase in wanted.get(number, []):
            assert phrase in text, f"sentence {number}: {phrase}"
            text = text.replace(phrase, "")
        assert not re.search(r"\d\.\d", text), f"sentence {number} has a figure that is held to no record: {text}"


def test_who_helps_and_who_ranks_first_is_what_the_tables_say() -> None:
    corrupted, clean = rows("features", 0), rows("features", 1)
    assert first(clean) == {"zero", "mta", "tps"}  # 1
    assert first(corrupted) == {"onzeta", "tps", "mta", "dpe"}  # 2
    assert first(clean) & first(corrupted) == {"mta", "tps"}  # 3
    assert helped(clean) & helped(corrupted) == {"mta", "tps", "dpe", "boostadapter"}  # 4
    assert helped(corrupted) - helped(clean) == {"onzeta", "ecalp", "tda"}
    assert helped(clean) - helped(corrupted) == {"zero", "dmn", "dota"}
    corrupted, clean = rows("tuned", 0), rows("tuned", 1)
    assert helped(clean) == {"rtpt", "zero", "mta", *(f"apm[{target},32]" for target in ("confident", "mean", "mta"))}
    assert first(clean) == helped(clean)  # 7, 9
    assert not helped(corrupted) and first(corrupted) == set(corrupted)  # 9, 10
