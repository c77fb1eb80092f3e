"""Private names of Lightning: every one that this package calls on Lightning's objects, read in Lightning 2.6.6.

A minor release may change them, so ``pyproject.toml`` asks for ``lightning>=2.6.4,<2.7``. A move of that bound starts
here. Subclasses override or use further ones, which cannot stand here: ``commands/fit/cli.py`` (``_parse_ckpt_path``,
``_set_seed``, ``_instantiate_trainer``, ``_run_subcommand``, ``_get`` of ``LightningCLI``),
``training/run_checkpoint.py`` (``_save_checkpoint``, ``_remove_checkpoint``, ``_should_remove_checkpoint``,
``_save_topk_checkpoint``, ``_last_global_step_saved``, ``_last_checkpoint_saved`` of ``ModelCheckpoint``) and
``training/strategies.py`` (``_process_group_backend``, ``_data_parallel_size``, ``_save_distributed_checkpoint``,
``_checkpoint_io`` of ``ModelParallelStrategy``).
"""

from lightning.pytorch import Trainer


def set_default_root_dir(trainer: Trainer, folder: str) -> None:
    """Name another folder for what the run writes: the Trainer has no setter."""
    trainer._default_root_dir = folder  # type: ignore[attr-defined]  # it is there


def validation_is_due(trainer: Trainer) -> bool:
    """Whether the number of batches so far asks for a validation now.

    Returns:
        False without training batches, and where the clock decides (``val_check_interval`` as a time): by the clock it
        may be due on some processes alone.
    """
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None or getattr(trainer, "_val_check_time_interval", None) is not None:
        return False
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def end_batch(trainer: Trainer) -> None:
    """Close the metrics of a training batch, as Lightning does after its last hook."""
    trainer._logger_connector.on_batch_end()


def is_in_batch(trainer: Trainer) -> bool:
    """Whether the metrics of a training batch are open, so that they can be logged."""
    return trainer._logger_connector._first_loop_iter is not None


def log_training_step(trainer: Trainer) -> None:
    """Log the metrics of the training step now; Lightning does so after its checkpoints."""
    trainer._logger_connector.update_train_step_metrics()
