"""The lowest versions that `tools/test --oldest` installs."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_oldest_set_holds_the_lower_bounds_of_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(dependency.replace("-", "_").split(">=") for dependency in project["dependencies"])
    lines = (ROOT / "tools/oldest.txt").read_text().splitlines()
    assert dict(line.split("==") for line in lines if not line.startswith("#")) == bounds
