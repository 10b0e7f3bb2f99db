"""The data sets and suites, as data: to add a data set, add one entry to `_SPECS` and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from apm.errors import UsageError, unknown

SINGLE_PROMPT = "a photo of a {}."
Reader = Literal["wnid", "integer", "corrupted", "split-json", "aircraft", "folder", "digits"]


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What is known of a data set before anything is read.

    `images` and `classes` are those of the whole set (0: not fixed). `layouts` are folders below the user's root, the
    first that is found wins; each ends at the folder that holds the images (or class folders). An explicit path may
    name that folder itself or any folder on the way to it.
    """

    name: str
    title: str
    reader: Reader
    origin: str
    """Where the data come from, for people."""
    layouts: tuple[str, ...] = ()
    images: int = 0
    classes: int = 0
    label_space: str = ""
    """Set of ImageNet classes for labels and names (`apm.labels.imagenet_subset`); empty: from the data."""
    split_file: str = ""
    """Name of the split json, beside the last folder of a layout or in a folder ``data_splits`` near it."""
    variants: tuple[str, ...] = ()
    """Names of collections of one form, of which a folder may hold any; published numbers are on the first."""
    template: str = SINGLE_PROMPT
    prompts_name: str = "single"
    hub: tuple[str, ...] = ()
    """Repositories of the Hugging Face hub in use for this set, for `hf:REPO`."""

    @property
    def needs_root(self) -> bool:
        """Whether a folder of the user's is needed."""
        return self.reader != "digits"


CORRUPTION_GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
"""The archives of ImageNet-C, and the corruptions that each holds; those of the last are no part of its 15."""

_COOP = "the split json of CoOp (github.com/KaiyangZhou/CoOp, DATASETS.md)"

_SPECS = (
    DatasetSpec(
        name="imagenet",
        title="ImageNet-1k validation",
        reader="wnid",
        label_space="imagenet",
        images=50_000,
        classes=1000,
        layouts=(
            *("imagenet/images/val", "ImageNet/val", "imagenet/val", "imagenet2012/val", "ILSVRC2012/val"),
            *("imagenet-1k/val", "imagenet1k/val", "ILSVRC/Data/CLS-LOC/val", "ILSVRC2012/Data/CLS-LOC/val"),
            *("imagenet/ILSVRC/Data/CLS-LOC/val", "ImageNet/ILSVRC/Data/CLS-LOC/val"),
        ),
        origin="image-net.org (registration), ILSVRC2012_img_val.tar sorted into class folders",
        hub=("ILSVRC/imagenet-1k:validation", "clip-benchmark/wds_imagenet1k:test"),
    ),
    DatasetSpec(
        name="imagenet-a",
        title="ImageNet-A",
        reader="wnid",
        label_space="imagenet-a",
        images=7_500,
        classes=200,
        layouts=("imagenet-adversarial/imagenet-a", "imagenet-a", "ImageNet-A"),
        origin="github.com/hendrycks/natural-adv-examples, imagenet-a.tar",
        hub=("barkermrl/imagenet-a:train", "clip-benchmark/wds_imagenet-a:test"),
    ),
    DatasetSpec(
        name="imagenet-v2",
        title="ImageNet-V2 (matched frequency)",
        reader="integer",
        label_space="imagenet",
        images=10_000,
        classes=1000,
        layouts=(
            "imagenetv2/imagenetv2-matched-frequency-format-val",
            "imagenetv2-matched-frequency-format-val",
            "imagenet-v2/imagenetv2-matched-frequency-format-val",
            "ImageNetV2/imagenetv2-matched-frequency-format-val",
            "ImageNetV2-matched-frequency",
            "imagenet-v2",
        ),
        variants=("matched-frequency", "threshold-0.7", "top-images"),
        origin="github.com/modestyachts/ImageNetV2, imagenetv2-matched-frequency.tar.gz",
        hub=("clip-benchmark/wds_imagenetv2:test",),
    ),
    DatasetSpec(
        name="imagenet-r",
        title="ImageNet-R",
        reader="wnid",
        label_space="imagenet-r",
        images=30_000,
        classes=200,
        layouts=("imagenet-rendition/imagenet-r", "imagenet-r", "ImageNet-R"),
        origin="github.com/hendrycks/imagenet-r, imagenet-r.tar",
        hub=("axiong/imagenet-r:test", "clip-benchmark/wds_imagenet-r:test"),
    ),
    DatasetSpec(
        name="imagenet-sketch",
        title="ImageNet-Sketch",
        reader="wnid",
        label_space="imagenet",
        images=50_889,
        classes=1000,
        layouts=(
            *("imagenet-sketch/images", "ImageNet-Sketch/sketch", "imagenet-sketch/sketch"),
            *("ImageNet-Sketch", "imagenet-sketch"),
        ),
        origin="github.com/HaohanWang/ImageNet-Sketch",
        hub=("clip-benchmark/wds_imagenet_sketch:test",),
    ),
    DatasetSpec(
        name="imagenet-c",
        title="ImageNet-C",
        reader="corrupted",
        label_space="imagenet",
        images=50_000,
        classes=1000,
        layouts=(
            "ImageNet-C/{corruption}/{level}",
            "imagenet-c/{corruption}/{level}",
            "{corruption}/{level}",
            "ImageNet-C/{group}/{corruption}/{level}",
            "imagenet-c/{group}/{corruption}/{level}",
            "{group}/{corruption}/{level}",
        ),
        origin="zenodo.org/records/2235448 (ImageNet-C; Hendrycks & Dietterich 2019), or generated from clean ImageNet",
    ),
    DatasetSpec(
        name="flowers102",
        title="Oxford Flowers 102",
        reader="split-json",
        images=2_463,
        classes=102,
        layouts=("oxford_flowers/jpg", "Flower102/jpg"),
        split_file="split_zhou_OxfordFlowers.json",
        template="a photo of a {}, a type of flower.",
        prompts_name="coop",
        origin=f"www.robots.ox.ac.uk/~vgg/data/flowers/102 and {_COOP}",
        hub=("clip-benchmark/wds_vtab-flowers:test",),
    ),
    DatasetSpec(
        name="dtd",
        title="Describable Textures",
        reader="split-json",
        images=1_692,
        classes=47,
        layouts=("dtd/images", "DTD/images"),
        split_file="split_zhou_DescribableTextures.json",
        template="{} texture.",
        prompts_name="coop",
        origin=f"www.robots.ox.ac.uk/~vgg/data/dtd and {_COOP}",
        hub=("clip-benchmark/wds_vtab-dtd:test",),
    ),
    DatasetSpec(
        name="pets",
        title="Oxford-IIIT Pets",
        reader="split-json",
        images=3_669,
        classes=37,
        layouts=("oxford_pets/images", "OxfordPets/images", "OxfordPets"),
        split_file="split_zhou_OxfordPets.json",
        template="a photo of a {}, a type of pet.",
        prompts_name="coop",
        origin=f"www.robots.ox.ac.uk/~vgg/data/pets and {_COOP}",
        hub=("clip-benchmark/wds_vtab-pets:test",),
    ),
    DatasetSpec(
        name="ucf101",
        title="UCF101 (middle frames)",
        reader="split-json",
        images=3_783,
        classes=101,
        layouts=("ucf101/UCF-101-midframes", "UCF101/UCF-101-midframes", "UCF101"),
        split_file="split_zhou_UCF101.json",
        template="a photo of a person doing {}.",
        prompts_name="coop",
        origin=f"the middle frames of UCF101's videos and {_COOP}",
    ),
    DatasetSpec(
        name="caltech101",
        title="Caltech 101",
        reader="split-json",
        images=2_465,
        classes=100,
        layouts=("caltech-101/101_ObjectCategories", "Caltech101/101_ObjectCategories", "Caltech101"),
        split_file="split_zhou_Caltech101.json",
        origin=f"data.caltech.edu/records/mzrjq-6wc02 and {_COOP}",
        hub=("clip-benchmark/wds_vtab-caltech101:test",),
    ),
    DatasetSpec(
        name="food101",
        title="Food 101",
        reader="split-json",
        images=30_300,
        classes=101,
        layouts=("food-101/images", "Food101/images"),
        split_file="split_zhou_Food101.json",
        template="a photo of {}, a type of food.",
        prompts_name="coop",
        origin=f"data.vision.ee.ethz.ch/cvl/datasets_extra/food-101 and {_COOP}",
        hub=("clip-benchmark/wds_food101:test",),
    ),
    DatasetSpec(
        name="sun397",
        title="SUN397",
        reader="split-json",
        images=19_850,
        classes=397,
        layouts=("sun397/SUN397", "SUN397/SUN397", "SUN397"),
        split_file="split_zhou_SUN397.json",
        origin=f"vision.princeton.edu/projects/2010/SUN and {_COOP}",
        hub=("clip-benchmark/wds_sun397:test",),
    ),
    DatasetSpec(
        name="aircraft",
        title="FGVC Aircraft (variants)",
        reader="aircraft",
        images=3_333,
        classes=100,
        layouts=("fgvc_aircraft/images", "fgvc-aircraft-2013b/data/images"),
        template="a photo of a {}, a type of aircraft.",
        prompts_name="coop",
        origin="www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft, fgvc-aircraft-2013b.tar.gz",
        hub=("clip-benchmark/wds_fgvc_aircraft:test",),
    ),
    DatasetSpec(
        name="eurosat",
        title="EuroSAT (RGB)",
        reader="split-json",
        images=8_100,
        classes=10,
        layouts=("eurosat/2750", "eurosat"),
        split_file="split_zhou_EuroSAT.json",
        template="a centered satellite photo of {}.",
        prompts_name="coop",
        origin=f"github.com/phelber/EuroSAT and {_COOP}",
        hub=("clip-benchmark/wds_vtab-eurosat:test",),
    ),
    DatasetSpec(
        name="folder",
        title="any <class>/ or <wnid>/ folders",
        reader="folder",
        origin="your own pictures: one folder per class, named after the class or by its ImageNet wnid",
    ),
    DatasetSpec(
        name="digits",
        title="scikit-learn's digits, test half",
        reader="digits",
        images=901,
        classes=10,
        template="a handwritten {}.",
        prompts_name="digits",
        origin="comes with scikit-learn",
    ),
)

DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in _SPECS}

SUITES: dict[str, tuple[str, ...]] = {
    "natural-shifts": ("imagenet", "imagenet-a", "imagenet-v2", "imagenet-r", "imagenet-sketch"),
    "cross-dataset": (
        *("flowers102", "dtd", "pets", "ucf101", "caltech101", "food101", "sun397", "aircraft", "eurosat"),
    ),
}
"""Suites, in the order of the tables of Modi & Rawat 2024: Table 1, Table 3."""


def spec_of(name: str) -> DatasetSpec:
    """Return the entry of a data set.

    Raises:
        UsageError: unknown name (the nearest are suggested), or that of a suite.
    """
    if name in SUITES:
        raise UsageError(f"{name} is a suite; name one of its data sets: {', '.join(SUITES[name])}.")
    if name not in DATASETS:
        raise unknown("data set", name, [*DATASETS, *SUITES])
    return DATASETS[name]


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Replace suites by their data sets; each data set once, in the order of first mention.

    Raises:
        UsageError: a name is neither a data set nor a suite.
    """
    expanded = [member for name in names for member in SUITES.get(name, (name,))]
    return tuple(dict.fromkeys(spec_of(name).name for name in expanded))
