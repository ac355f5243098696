"""Forms: the checkpoint form for layers of different width, and how such a checkpoint is read without running its code.

Reads    a mask; a checkpoint's config.json
Gives    has_stock_form, per_layer_config, form_of, use_own_code, read_model, check_layers
Source   -
Symbols  stock = the same widths in every layer, in a class of transformers; per_layer = `per_layer_config` in
         config.json, and the modelling file modeling_per_layer.py beside it
"""

from collections.abc import Mapping
from copy import copy
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils.hub import cached_file

from loraprune import modeling_per_layer as code
from loraprune.errors import UserError
from loraprune.groups import check_shapes, expected_shapes, family_of, head_dim_of, is_per_layer, widths_left
from loraprune.records import Mask, ModelGroups
from loraprune.settings import Settings

Form = Literal["stock", "per_layer"]
CODE_FILE = Path(code.__file__)
NEWEST = "main"  # the revision of a hub name that is read where none is asked for
EARLIER_CODE: tuple[str, ...] = ()  # SHA-256 of the file in releases whose models this one reads just the same


def form_of(config: PretrainedConfig) -> Form:
    """Return the form of the checkpoint that a config belongs to."""
    return "per_layer" if is_per_layer(config) else "stock"


def has_stock_form(groups: ModelGroups, mask: Mask) -> bool:
    """Say whether a stock class holds what the mask keeps: the same in every layer, and heads that it takes."""
    if any(len(set(kept.sum(1).tolist())) > 1 for kept in mask.kept.values()):
        return False
    left = int(mask.kept[groups.attention][0].sum())
    return left == groups.count(groups.attention) or left in groups.allowed_attention


def per_layer_config(config: PretrainedConfig, groups: ModelGroups, mask: Mask) -> PretrainedConfig:
    """Return the config of the cut model with each layer's own widths; saving it writes the modelling file too."""
    own_config, own_model = _classes(config.model_type)
    unit = groups.attention
    attention, channels = (mask.kept[kind].sum(1).tolist() for kind in (unit, "ffn_channel"))
    layers = [widths_left(config, unit, *left) for left in zip(attention, channels, strict=True)]
    left_out = ("model_type", "architectures", "transformers_version", "auto_map")
    values = {name: one for name, one in config.to_dict().items() if name not in left_out}
    # Where one number is asked for, it is that of the widest layer.
    values |= widths_left(config, unit, max(attention), max(channels))
    made = own_config.from_dict(
        values
        | {
            "head_dim": head_dim_of(config),
            "per_layer_config": dict(enumerate(layers)),
            "architectures": [own_model.__name__],
            "auto_map": {one._auto_class: f"{CODE_FILE.stem}.{one.__name__}" for one in (own_config, own_model)},
        }
    )
    made.serialize_explicit_per_layer_config = True
    return made


def _classes(family: str) -> tuple[Any, Any]:
    """Return our config and model class of a family, by transformers' name of it."""
    stock = code.FAMILIES[family]
    return getattr(code, f"{code.CLASS}{stock}Config"), getattr(code, f"{code.CLASS}{stock}ForCausalLM")


# --- reading ----------------------------------------------------------------------------------------------------------


def use_own_code(name: str, revision: str = NEWEST) -> None:
    """Have transformers load a per-layer checkpoint by our copy of its code; the file in the folder is never run.

    Raises UserError where that file is none that this release knows. Other checkpoints are left alone, and what is no
    checkpoint is left to those who load it.
    """
    try:
        values, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError):
        return
    family = str(values.get("model_type", "")).removeprefix(code.MODEL_TYPE)
    if values.get("model_type") != code.MODEL_TYPE + family or family not in code.FAMILIES:
        return
    _refuse_other_code(name, revision)
    config, model = _classes(family)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)


def _refuse_other_code(name: str, revision: str) -> None:
    found = cached_file(
        name,
        CODE_FILE.name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is not None and not _is_known(Path(found).read_bytes()):
        raise UserError(
            f"{CODE_FILE.name} of {name} is not the file that this release of loraprune writes.",
            "it may compute something else, and code that comes with a checkpoint is never run here.",
            "use the release that wrote the checkpoint; if you wrote that file, load it by transformers with "
            "trust_remote_code=True.",
        )


def _is_known(found: bytes) -> bool:
    return found == CODE_FILE.read_bytes() or sha256(found).hexdigest() in EARLIER_CODE


def read_model(name: str, settings: Settings, **options: Any) -> Any:
    """Return a checkpoint's causal language model in eval mode, a per-layer one by our own code.

    `options` go to transformers' from_pretrained beside what the settings say.
    """
    use_own_code(name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        name, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code, use_safetensors=True, **options
    )
    return model.eval()


def check_layers(config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError where a layer's weights contradict its own widths."""
    for index, layer in enumerate(config.per_layer_config):
        own, begin = _as_stock(layer), f"{family_of(config).layer.format(index)}."
        others = {f"{name}.weight": one for name, one in expected_shapes(own).items() if not name.startswith(begin)}
        check_shapes(own, {**shapes, **others})  # leaves this layer alone to be compared


def _as_stock(layer: PretrainedConfig) -> PretrainedConfig:
    """Return the config that a stock model of this layer's widths throughout would have."""
    own = copy(layer)
    own.__dict__["model_type"] = layer.model_type.removeprefix(code.MODEL_TYPE)  # of this instance, not of its class
    own.architectures = [family_of(layer).architecture]
    return own
