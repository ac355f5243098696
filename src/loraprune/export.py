"""Export: the pruned model as a checkpoint that transformers loads, of the stock form wherever there is one.

Reads    a merged model, its groups and mask
Gives    a folder: config, safetensors, generation config, tokenizer; the modelling file where layers differ in width
Source   -
Symbols  -
"""

from pathlib import Path

from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraprune.folder import whole_folder
from loraprune.forms import has_stock_form, per_layer_config
from loraprune.records import Mask, ModelGroups
from loraprune.surgery import cut_config, cut_weights


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, groups: ModelGroups, mask: Mask, path: Path
) -> str:
    """Write the cut model to `path`, whole or not at all; return the name of the class that loads it.

    `model` carries no adapters any more. Weights that lose nothing are written bit for bit.
    """
    config = (cut_config if has_stock_form(groups, mask) else per_layer_config)(model.config, groups, mask)
    weights = cut_weights({name: one.detach() for name, one in model.state_dict().items()}, groups, mask)
    with whole_folder(path) as folder:
        # Of tied weights the source is written: readers other than transformers know the head's name only when untied.
        # Left out here: what save_torch_state_dict discards it notes in the header, in an order that is never the same.
        tied = model.all_tied_weights_keys
        save_torch_state_dict({name: one.contiguous() for name, one in weights.items() if name not in tied}, folder)
        config.architectures = config.architectures or [groups.family]
        config.dtype = model.dtype
        config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return config.architectures[0]
