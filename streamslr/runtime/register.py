"""Registration of the format with transformers, without importing transformers (seconds) before its user does."""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_QUANTIZERS = "transformers.quantizers.auto"

log = logging.getLogger("streamslr")


def register_with_transformers() -> None:
    """Have `from_pretrained` load compressed folders: at once, or from the moment that transformers is imported."""
    if _QUANTIZERS in sys.modules:
        importlib.import_module("streamslr.runtime.loader")
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Import hook that finds no module; it registers our classes as soon as transformers' quantizers are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return None for every module but the quantizers', whose loader registers our classes at its end."""
        if fullname != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)  # the other finders find it
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            try:
                importlib.import_module("streamslr.runtime.loader")
            except Exception as error:  # transformers itself must stay importable, whatever changes in it
                log.warning("cannot register streamslr's format with transformers (%s); update streamslr", error)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
