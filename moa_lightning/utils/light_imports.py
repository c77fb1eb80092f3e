"""Lightning without the libraries that a help text has no use for."""

import importlib.metadata
import sys

_UNUSED = ("matplotlib", "scipy", "transformers")


def import_lightning_for_help() -> None:
    """Import torchmetrics, which Lightning imports whole, as if matplotlib, scipy and transformers were not installed.

    It loads them for plots and metrics that this package does not use: half of the processor time of
    ``moa fit --help``. It remembers what it found, so this is for a process that prints a help text and ends. Nothing
    is done where torchmetrics is imported already. Read in torchmetrics 1.9 and lightning-utilities 0.15.
    """
    if "lightning_utilities" in sys.modules:
        return
    import torch  # noqa: F401  # with everything that it looks for itself

    version = importlib.metadata.version

    def version_of_used(distribution_name: str) -> str:
        if distribution_name in _UNUSED:
            raise importlib.metadata.PackageNotFoundError(distribution_name)
        return version(distribution_name)

    loaded = {name: sys.modules[name] for name in _UNUSED if name in sys.modules}
    importlib.metadata.version = version_of_used
    sys.modules.update(dict.fromkeys(_UNUSED))  # type: ignore[arg-type]  # None: an import finds no such module
    try:
        import lightning_utilities.core.imports as requirements
        import torchmetrics  # noqa: F401

        vars(requirements)["_version"] = version  # its own name for it
    finally:
        importlib.metadata.version = version
        for name in _UNUSED:
            del sys.modules[name]
        sys.modules.update(loaded)
