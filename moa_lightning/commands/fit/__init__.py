"""The commands of LightningCLI: ``moa fit``, ``validate``, ``test`` and ``predict``."""
