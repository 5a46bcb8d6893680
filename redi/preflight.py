"""What a recipe names, looked for before any work: files, folders, names on the Hub.

Nothing here needs torch or transformers, and nothing goes to the network, so that a mistyped path
is said at once. What `is_a_path` takes for a path is never asked of the Hub.
"""

import re
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from redi.config import DataConfig, EvalConfig, TrainConfig
from redi.data.files import find_files, is_hub_name
from redi.errors import RediError
from redi.evaluation.benchmarks import find_benchmark
from redi.grading.verify import check_installed

# Of a model: owner/name, or an old one's name.
_REPOSITORY = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*")

Made = Collection[Path]  # what earlier steps of the same job will have written by then


def check_training(config: TrainConfig, made: Made = ()) -> None:
    """Raises RediError for data, a model, a tokenizer, a template or a checkpoint that is named and
    is not there."""
    check_data("dataset_name", config.dataset_name, made)
    check_data("eval_dataset_name", config.eval_dataset_name, made)
    if config.model_name_or_path is not None:
        check_model("model_name_or_path", config.model_name_or_path, made)
    if config.tokenizer_name_or_path is not None:
        check_folder("tokenizer_name_or_path", config.tokenizer_name_or_path, "tokenizer", made)
    if config.chat_template is not None and not Path(config.chat_template).is_file():
        raise RediError(f"chat_template: {config.chat_template}: no such file")
    checkpoint = config.resume_from_checkpoint
    if isinstance(checkpoint, str) and checkpoint != "auto" and not Path(checkpoint).is_dir():
        raise RediError(f"resume_from_checkpoint: {checkpoint}: no such folder")


def check_plan(config: TrainConfig) -> None:
    """As `check_training`, of what a plan reads: `architecture` and `expected_examples` stand for
    a model and for data that are elsewhere."""
    if not (config.expected_examples or Path(config.dataset_name).exists()):
        raise RediError(
            f"dataset_name: {config.dataset_name}: no such file; "
            "set expected_examples to plan without it"
        )
    if config.model_name_or_path is not None and config.architecture is None:
        check_model("model_name_or_path", config.model_name_or_path)


def check_evaluation(model: str, config: EvalConfig, made: Made = ()) -> None:
    """Raises RediError for a model, problems, pairs or benchmarks that are named and are not
    there."""
    if config.engine == "transformers":  # else a server knows what the name means
        check_model("--model", model, made)
    check_questions(config, made)


def check_questions(config: EvalConfig, made: Made = ()) -> None:
    """Of `check_evaluation`, what does not depend on the model; also that answers can be judged."""
    check_data("dataset_name", config.dataset_name, made)
    check_data("pairs_name", config.pairs_name, made)
    if config.data_dir is not None and not Path(config.data_dir).is_dir():
        raise RediError(f"data_dir: {config.data_dir}: no such folder")
    for name in config.benchmarks or []:
        check_data("benchmarks", find_benchmark(name, config.data_dir))
    check_installed(config.grader)  # nobody knows before what a model will answer


def check_build(config: DataConfig, tokenizer: str | None = None, made: Made = ()) -> None:
    """Raises RediError for data, evaluation sets or a tokenizer that are named and not there."""
    check_data("path", config.path, made)
    for path in config.decontaminate:
        check_data("decontaminate", path, made, mix_splits=True)
    if tokenizer is not None:
        check_folder("--tokenizer", tokenizer, "tokenizer")


def is_a_path(name: str, kind: str = "model") -> bool:
    """Whether `name`, of which there is nothing here, was meant to be here all the same: it is not
    of the form owner/name, or what should be an owner is a folder of this machine. Then the Hub is
    only meant where its model or dataset of that name has been fetched before."""
    owner, slash, _ = name.partition("/")
    if _REPOSITORY.fullmatch(name) is None:
        return True
    return bool(slash) and Path(owner).is_dir() and not _is_fetched(name, kind)


def _is_fetched(name: str, kind: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}").is_dir()


def _or_fetch(name: str, kind: str = "model") -> str:
    """What to do where the Hub's was meant, and a folder here has its owner's name."""
    owner, slash, _ = name.partition("/")
    if not (slash and _REPOSITORY.fullmatch(name) and Path(owner).is_dir()):
        return ""
    kinds = "" if kind == "model" else f" --repo-type {kind}"
    return f"; {owner}/ is a folder here: to use the Hub's, first run hf download {name}{kinds}"


def check_data(field: str, name: str | None, made: Made = (), *, mix_splits: bool = False) -> None:
    """Raises RediError if `name` is neither a file or folder of rows nor a name on the Hub."""
    if name is None or Path(name) in made:
        return
    try:
        if not is_hub_name(name) or find_spec("datasets") is None:
            find_files(
                name, mix_splits=mix_splits
            )  # of a name on the Hub it says, unasked, that `datasets` is missing
        elif is_a_path(bare := re.split("[:@]", name)[0], "dataset"):
            raise RediError(f"{name}: no such file or folder{_or_fetch(bare, 'dataset')}")
    except RediError as error:
        raise RediError(f"{field}: {error}") from None


def check_model(field: str, name: str, made: Made = ()) -> None:
    """Raises RediError if `name` is neither a folder with a model nor a name on the Hub."""
    check_folder(field, name, "model", made)
    folder = Path(name)
    has_config = any((folder / f).is_file() for f in ("config.json", "adapter_config.json"))
    if folder not in made and folder.is_dir() and not has_config:
        raise RediError(f"{field}: {name}: no model could be loaded (no config.json in it)")


def check_folder(field: str, name: str, what: str, made: Made = ()) -> None:
    """Raises RediError if `name` can be neither the folder of a `what` nor its name on the Hub."""
    if Path(name) in made or Path(name).is_dir():
        return
    if Path(name).exists():
        raise RediError(f"{field}: {name}: a file; a folder or a name on the Hub is needed")
    if is_a_path(name):
        raise RediError(
            f"{field}: {name}: no {what} could be loaded (no such folder); correct the path, or "
            f"name one on the Hub as owner/name{_or_fetch(name)}"
        )
