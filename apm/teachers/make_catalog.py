"""Write ``catalog.tsv`` from the installed open_clip: ``python -m apm.teachers.make_catalog``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import asdict, fields

import open_clip
import torch

from apm.teachers.catalog import FILE, QUICKGELU, Entry
from apm.teachers.openclip import quiet


def registry() -> Iterator[Entry]:
    """Yield a row for all weights that open_clip has a tag for; ``-quickgelu`` spellings are no rows of their own."""
    counts: dict[str, int | None] = {}
    for model, tag in open_clip.list_pretrained():
        if model.endswith(QUICKGELU):
            continue
        weights, config = open_clip.get_pretrained_cfg(model, tag), open_clip.get_model_config(model)
        text = config["text_cfg"]
        if model not in counts:
            counts[model] = None if text.get("hf_model_name") else count_parameters(model)
        yield Entry(
            model=model,
            tag=tag,
            location=weights["hf_hub"],
            quick_gelu=bool(weights.get("quick_gelu")),
            needs_transformers=bool(text.get("hf_model_name") or text.get("hf_tokenizer_name")),
            dim=config["embed_dim"],
            image_size=config["vision_cfg"]["image_size"],
            parameters=counts[model],
        )


def count_parameters(model: str) -> int:
    """Count the parameters of one of open_clip's models, without memory for their values."""
    with quiet(), torch.device("meta"):
        built = open_clip.create_model(model, load_weights=False, pretrained_text=False, device="meta")
    return sum(parameter.numel() for parameter in built.parameters())


def main() -> None:
    """Write the file."""
    rows = list(registry())
    with FILE.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# open_clip {open_clip.__version__}\n")
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow([field.name for field in fields(Entry)])
        for row in rows:
            values = asdict(row).values()
            writer.writerow([int(value) if isinstance(value, bool) else value for value in values])


if __name__ == "__main__":
    main()
