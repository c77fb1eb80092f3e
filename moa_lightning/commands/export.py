"""``moa export``: a run's policy as a plain Hugging Face folder."""

import shutil
from pathlib import Path

from moa_lightning.stages.folders import whole_folder


def export(run: str, output: str, merge: bool = True, overwrite: bool = False) -> None:
    """Write a run's policy so that plain ``transformers`` opens it.

    Args:
        run: folder of a run (it holds ``policy/``), or a policy folder itself.
        output: folder to write.
        merge: fold an adapter into its base model; otherwise the adapter is copied as it is.
        overwrite: replace ``output`` if it holds something already.

    Raises:
        ValueError: there is no policy in ``run``, or ``output`` is in use.
    """
    source = Path(run) / "policy" if (Path(run) / "policy").is_dir() else Path(run)
    if not any((source / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"'{run}' holds no policy; give the folder of a finished run, or a Hugging Face folder")
    with whole_folder(output, overwrite) as target:
        if merge and (source / "adapter_config.json").is_file():
            _merge(source, target)
        else:
            shutil.copytree(source, target, dirs_exist_ok=True)
    print(f"policy written to {output}")


def _merge(source: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    from moa_lightning.models import PolicyConfig
    from moa_lightning.models.loading import load_model
    from moa_lightning.models.value_heads import FILE_NAME

    model = load_model(PolicyConfig(str(source), dtype="auto"))
    merged = model.merge_and_unload()  # type: ignore[operator]  # the folder holds an adapter, so it is a PeftModel
    merged.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    if (source / FILE_NAME).is_file():
        shutil.copy(source / FILE_NAME, target / FILE_NAME)
