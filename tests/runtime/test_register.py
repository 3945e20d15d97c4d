"""`import streamslr` is quick, and whichever of the two is imported first, transformers knows the format."""

import subprocess
import sys
from pathlib import Path

import pytest

KNOWN = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; assert 'streamslr' in known"


def python(*lines: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=root)


def test_importing_streamslr_imports_neither_torch_nor_transformers() -> None:
    done = python("import streamslr, sys", "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import transformers, streamslr",
        "import streamslr; from transformers import AutoModelForCausalLM",
        "from transformers import PreTrainedModel; import streamslr",
        "import streamslr.model.transformers_compat",
        "import streamslr.model.blockwise",
        "import streamslr.runtime.loader",
        "import transformers.quantizers.auto, streamslr.model.transformers_compat",
    ],
)
def test_transformers_knows_the_format(first: str) -> None:
    done = python(first, KNOWN)
    assert done.returncode == 0, done.stderr
    assert "streamslr" not in done.stderr
