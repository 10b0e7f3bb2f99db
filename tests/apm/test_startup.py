"""A quick start leaves out torch's compiler, and whoever wants it finds it as ever."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from apm.startup import collector_paused


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_loading_a_teacher_imports_no_compiler() -> None:
    loaded = run("import sys, apm\napm.load_teacher('embedded')\nprint(*sys.modules)").split()
    assert {"open_clip", "timm", "torchvision"} <= set(loaded)
    assert not {"torch._dynamo", "torch._inductor", "sympy", "triton", "pandas", "sklearn", "datasets"} & set(loaded)


@pytest.mark.slow
def test_the_compiler_is_there_when_it_is_wanted() -> None:
    shown = run(
        "import torch\n"
        "eager = torch.compiler.disable\n"
        "from apm.startup import import_open_clip\n"
        "open_clip = import_open_clip()\n"
        "assert torch.compiler.disable is eager\n"
        "from torchvision.ops import roi_align\n"
        "from torchvision.ops.roi_align import is_compile_supported\n"
        "print(is_compile_supported('cpu'), roi_align(torch.ones(1, 1, 8, 8), [torch.ones(1, 4)], 2).shape)\n"
        "import torch._dynamo.utils as utilities\n"
        "print(utilities.__file__.endswith('utils.py'), utilities.is_compile_supported.__module__)\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())\n"
        "from timm.models.naflexvit import create_attention_mask\n"
        "print(create_attention_mask(torch.ones(1, 2, dtype=torch.bool)).shape[0], open_clip.__name__)\n"
    )
    assert shown.split("\n")[:4] == [
        "True torch.Size([1, 1, 2, 2])",
        "True torch._dynamo.utils",
        "2.0",
        "1 open_clip",
    ]


def test_the_collector_is_as_it_was_before() -> None:
    for on in (True, False):
        (gc.enable if on else gc.disable)()
        try:
            with collector_paused():
                assert not gc.isenabled()
            assert gc.isenabled() == on
        finally:
            gc.enable()


@pytest.mark.slow
def test_what_a_command_imports_is_not_looked_at_again() -> None:
    shown = run(
        "import gc\n"
        "from apm.startup import collector_paused, for_one_command\n"
        "with collector_paused():\n"
        "    import json\n"
        "print(gc.get_freeze_count())\n"
        "for_one_command()\n"
        "with collector_paused():\n"
        "    kept = [[] for _ in range(1000)]\n"
        "print(gc.get_freeze_count() > 1000, gc.isenabled())\n"
        "assert not any(generation for generation in map(len, map(gc.get_objects, (1, 2))))\n"
    )
    assert shown.split() == ["0", "True", "True"]
