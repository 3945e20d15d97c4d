"""The check of a GPU, on the pretended one: every section comes to its end."""

import json
from pathlib import Path

import pytest

from tests.support.forkserver import python_script

GPU_CHECK = Path(__file__).parents[2] / "tools" / "gpu_check.py"


@pytest.mark.long
def test_every_section_ends_on_the_pretended_gpu(tmp_path: Path) -> None:
    readme = GPU_CHECK.parents[1] / "README.md"
    before, out = readme.read_bytes(), tmp_path / "gpu.json"
    done = python_script(GPU_CHECK, "--out", out, "--scratch", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads(out.read_text())["sections"]
    assert sections["bytes"]["same_twice"]
    assert sections["bytes"]["same_after_kill"]
    assert sections["block-8b"]["same_bytes"]
    assert "seconds a block" in done.stdout
    assert readme.read_bytes() == before
