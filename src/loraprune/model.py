"""Model: check a checkpoint before it is loaded, load it, attach LoRA.

Reads    a folder or hub name
Gives    config, tokenizer, model, model with adapters
Source   -
Symbols  -
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.utils import logging

from loraprune.config import lora_config
from loraprune.errors import UserError
from loraprune.forms import NEWEST, check_layers, read_model, use_own_code
from loraprune.groups import (
    check_shapes,
    family_of,
    find_groups,
    is_per_layer,
    known_architectures,
    meta_groups,
    projections_of,
)
from loraprune.launch import here
from loraprune.processes import shard
from loraprune.quantised import FORMATS, load_quantised, refuse_without_bitsandbytes
from loraprune.records import AttentionUnit, ModelGroups
from loraprune.settings import PLAIN_BITS, Settings


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' own bars and its notices to developers off the terminal inside this block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def checked_config(name: str, settings: Settings, revision: str = NEWEST) -> PretrainedConfig:
    """Return a checkpoint's config after comparing it with the weights' headers; nothing is loaded in full.

    `revision`: a branch, tag or commit of a hub name; a folder has none.
    """
    config = _config(name, settings, revision)
    family_of(config)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"the weights of {name} are quantised.",
            "a group is cut out of plain weights; cut ones of this format would not be the model's any more.",
            "give the model it was quantised from, in bfloat16 or float32.",
        )
    (check_layers if is_per_layer(config) else check_shapes)(config, weight_shapes(name, revision))
    return config


def _config(name: str, settings: Settings, revision: str) -> PretrainedConfig:
    use_own_code(name, revision)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=settings.trust_remote_code)
    except ValueError as error:
        raise UserError(
            f"the architecture of {name} is not known: {_first_line(error)}",
            "cutting a model whose structure is guessed gives a broken one.",
            f"use a model of one of these: {known_architectures()}; a newer one may need a newer transformers.",
        ) from error
    except OSError as error:
        raise UserError(
            f"there is no model {name}.",
            "a model is a folder with config.json and *.safetensors, or a name on the hub.",
            "correct the path of the model.",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def weight_shapes(name: str, revision: str = NEWEST) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a checkpoint from its headers alone."""
    if not Path(name).is_dir():
        return _hub_shapes(name, revision)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(Path(name)):
        with safe_open(file, framework="pt") as weights:
            shapes |= {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    return shapes


def _hub_shapes(name: str, revision: str) -> dict[str, tuple[int, ...]]:
    try:
        files = get_safetensors_metadata(name, revision=revision).files_metadata.values()
    except (HfHubHTTPError, NotASafetensorsRepoError) as error:
        raise _no_safetensors(name) from error
    return {key: tuple(one.shape) for file in files for key, one in file.tensors.items()}


def weight_files(folder: Path) -> list[Path]:
    """Return a checkpoint's safetensors files; raise UserError when there are none."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.exists():
        return [whole]
    if not index.exists():
        raise _no_safetensors(str(folder))
    return sorted({folder / file for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})


def _no_safetensors(name: str) -> UserError:
    return UserError(
        f"{name} holds no *.safetensors.",
        "weights in other formats are pickles, which run code when they are read.",
        "convert the model to safetensors first.",
    )


def weights_hash(name: str) -> str | None:
    """Return the SHA-256 over a local checkpoint's weight files; None for a hub name."""
    if not Path(name).is_dir():
        return None
    digest = hashlib.sha256()
    for path in weight_files(Path(name)):
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def load_tokenizer(name: str, settings: Settings) -> PreTrainedTokenizerBase:
    """Return a checkpoint's tokenizer; raise UserError when it has none."""
    use_own_code(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{name} has no tokenizer that can be loaded.",
            "without the tokenizer the model was trained with, every number would be about other text.",
            "put tokenizer.json and tokenizer_config.json beside the weights.",
        ) from error
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return what fills short rows; padding is masked, so any token will do."""
    for one in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(one, int):
            return one
    return 0


def device_of(settings: Settings) -> torch.device:
    if settings.device != "auto":
        return torch.device(settings.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_machine(settings: Settings) -> None:
    """Raise UserError when the run asks for a device, a number format or a reporting tool that is not here."""
    refuse_without_bitsandbytes(settings)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, and torch sees no GPU.", "the run cannot start there.", "set --device cpu.")
    for name in settings.report_to:
        if name not in get_available_reporting_integrations():
            known = ", ".join(get_available_reporting_integrations()) or "none"
            raise UserError(
                f"report_to names {name}, which is not installed here; installed: {known}.",
                "the metrics would go nowhere.",
                f"install it (pip install {name}), or leave it out of --report-to.",
            )


def load_model(name: str, settings: Settings) -> Any:
    """Return a causal language model in eval mode on the run's device."""
    return read_model(name, settings).to(device_of(settings))


def load_base(name: str, settings: Settings) -> Any:
    """Return the model that a run trains adapters on: its projections in `base_bits`, the rest in its own format.

    One that is to be sharded, once it has its adapters, waits in the main memory.
    """
    if settings.base_bits != PLAIN_BITS:
        return load_quantised(name, settings, FORMATS[settings.base_bits], device_of(settings))
    return read_model(name, settings) if here().sharded else load_model(name, settings)


def takes_adapters_in(settings: Settings) -> bool:
    """Say whether adapters can be merged into the base: not where it is quantised or sharded."""
    return settings.base_bits == PLAIN_BITS and not here().sharded


def base_groups(base: Any, config: PretrainedConfig, unit: AttentionUnit = "kv_group") -> ModelGroups:
    """Return the groups of a loaded base; a quantised one's weights have other shapes, so the config tells."""
    return meta_groups(config, unit) if getattr(base, "is_quantized", False) else find_groups(base, config, unit)


def load_measured(name: str, settings: Settings) -> Any:
    """Return a model in its own format that is only measured, in eval mode.

    A GPU that was to hold the base in fewer bits may not hold this: layers that do not fit wait in the main memory.
    Where the base is sharded, so is this.
    """
    if here().sharded:
        return shard(read_model(name, settings).requires_grad_(False), device_of(settings))
    if settings.base_bits == PLAIN_BITS or device_of(settings).type == "cpu":
        return load_model(name, settings)
    return read_model(name, settings, device_map="auto", **_own_memory())


def _own_memory() -> dict[str, Any]:
    """Return what of the machine a model may fill where every process of a launch has a GPU of its own."""
    if here().count == 1:
        return {}
    free, _ = torch.cuda.mem_get_info()
    share = psutil.virtual_memory().available // here().count
    return {"max_memory": {torch.cuda.current_device(): int(0.9 * free), "cpu": share}}


def load_pruned(path: str | Path, revision: str = NEWEST, **options: Any) -> Any:
    """Return a written checkpoint in eval mode, whatever its form; code that lies in its folder is not run.

    `path`: a folder or a hub name, with `revision` its branch, tag or commit; `options` go to transformers'
    from_pretrained, such as dtype or device_map. Raises UserError where that is no checkpoint, or where weights or
    modelling file are not what the config says.
    """
    checked_config(str(path), Settings(), revision)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, revision=revision, **{"use_safetensors": True, **options, "trust_remote_code": False}
    )
    return model.eval()


def adapted_projections(settings: Settings, config: PretrainedConfig) -> tuple[str, ...]:
    """Return which of the family's projections carry an adapter; raise UserError where a name is none of them."""
    known = projections_of(config)
    missing = [name for name in settings.target_modules if name not in known]
    if missing:
        raise UserError(
            f"target_modules: {', '.join(missing)} match no projection of {family_of(config).architecture}.",
            "an adapter that is not there neither guides the pruning nor repairs it.",
            f"name some of --target-modules {','.join(known)}, or leave it out: then all of them carry one.",
        )
    return settings.target_modules or known


def attach_lora(model: Any, settings: Settings) -> PeftModel:
    """Return the model with fresh adapters on its projections; the same seed gives the same adapters."""
    torch.manual_seed(settings.seed)
    projections = adapted_projections(settings, model.config)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, lora_config(settings, projections))


def lora_layers(model: PeftModel) -> list[Any]:
    """Return the layers that carry adapters."""
    return [one for one in model.modules() if isinstance(one, LoraLayer)]


@contextmanager
def merged(model: PeftModel) -> Iterator[None]:
    """Run the model with its adapters merged inside this block, rounded as they will be written.

    Afterwards the weights are back bit for bit, which subtracting what was added would not give.
    """
    tuner: Any = model.base_model
    weights = [layer.get_base_layer().weight for layer in lora_layers(model)]
    kept = [one.detach().to("cpu", copy=True) for one in weights]
    tuner.merge_adapter()
    try:
        yield
    finally:
        tuner.unmerge_adapter()
        for weight, before in zip(weights, kept, strict=True):
            weight.data.copy_(before)


def parameter_count(model: torch.nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


def checkpoint_bytes(folder: str) -> int | None:
    """Return the size of a local checkpoint's weight files; None for a hub name."""
    return sum(one.stat().st_size for one in weight_files(Path(folder))) if Path(folder).is_dir() else None
