"""``moa export``: a run's policy as a plain Hugging Face folder."""

import shutil
import tempfile
from pathlib import Path


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
    target = Path(output)
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"'{output}' is not empty; choose another folder, or set --overwrite=true")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and moved in one step: an interrupted export leaves no half folder.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        finished = Path(scratch) / "policy"
        if merge and (source / "adapter_config.json").is_file():
            _merge(source, finished)
        else:
            shutil.copytree(source, finished)
        if target.exists():
            shutil.rmtree(target)
        finished.rename(target)
    print(f"policy written to {target}")


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
