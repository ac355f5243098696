"""Causal language models whose layers differ in width: every layer is the family's own, built from its own widths.

Reads    config.json with `per_layer_config`: each layer's WIDTHS
Gives    PerLayer<Family>Config and PerLayer<Family>ForCausalLM for every family of FAMILIES, made when first asked for
Source   -  (this file ships with the checkpoint and needs nothing but transformers and torch)
Symbols  a layer's own widths stand in its LayerConfig; everything else there is the model's config
"""

from importlib import import_module
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig

FAMILIES = {  # transformers' name of a family: how its classes begin
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
}
MODEL_TYPE, CLASS = "per_layer_", "PerLayer"  # what these names begin with here
WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


class LayerConfig:
    """One layer's widths; whatever else is asked for, the model's config answers, as it is at that moment."""

    def __init__(self, config: Any, index: int) -> None:
        self.config = config
        for name in WIDTHS:
            setattr(self, name, getattr(config.per_layer_config[index], name))

    def __getattr__(self, name: str) -> Any:
        if name == "config" or name.startswith("__"):  # not there yet while a copy is being made
            raise AttributeError(name)
        return getattr(self.config, name)


class PerLayerConfig:
    """What the config of every family has in common; stands before the family's own."""

    _auto_class = "AutoConfig"
    per_layer_config: Any

    def validate_architecture(self) -> None:
        """Check each layer's heads; the family's own check may demand more than its layers need."""
        for index, layer in enumerate(self.per_layer_config):
            heads, shared = layer.num_attention_heads, layer.num_key_value_heads
            if heads % shared:
                raise ValueError(f"layer {index}: {heads} query heads do not share {shared} key/value heads evenly")

    def validate_rope(self) -> None:
        """Leave a family's own check out: Phi-3's takes a head to be hidden_size / heads wide, which a cut changes."""
        PreTrainedConfig.validate_rope(self)  # pyright: ignore[reportArgumentType]


class PerLayerForCausalLM:
    """What the model of every family has in common; stands before the family's own."""

    _auto_class = "AutoModelForCausalLM"
    model: Any
    post_init: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config.per_layer_config[0])  # pyright: ignore[reportCallIssue]  # all layers like the first
        config._attn_implementation = self.config._attn_implementation
        self.config = self.model.config = config
        layer, depth = type(self.model.layers[0]), config.num_hidden_layers
        self.model.layers = nn.ModuleList([layer(LayerConfig(config, index), index) for index in range(depth)])
        self.post_init()


def __getattr__(name: str) -> Any:
    for family, stock in FAMILIES.items():
        if name in (f"{CLASS}{stock}Config", f"{CLASS}{stock}ForCausalLM"):
            _define(family, stock)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _define(family: str, stock: str) -> None:
    """Make a family's two classes; `strict` puts our check of the config in the place of the family's."""
    package, own = f"transformers.models.{family}", {"__module__": __name__}
    stock_config = getattr(import_module(f"{package}.configuration_{family}"), f"{stock}Config")
    stock_model = getattr(import_module(f"{package}.modeling_{family}"), f"{stock}ForCausalLM")
    names = {**own, "model_type": MODEL_TYPE + family}
    config = strict(type(f"{CLASS}{stock}Config", (PerLayerConfig, stock_config), names))
    bases = (PerLayerForCausalLM, stock_model)
    model = type(f"{CLASS}{stock}ForCausalLM", bases, {**own, "config_class": config})
    globals().update({one.__name__: one for one in (config, model)})
