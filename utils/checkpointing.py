"""Gradient checkpointing: layers that keep their input alone and run again in backward, all or all but one of a few."""

import contextlib

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hyclora.utils.errors import UserError
from hyclora.utils.folder import read_config
from hyclora.utils.heads import Head


def check_checkpointing(source: str, head: Head, leave_out: int | None) -> None:
    """UserError if checkpoint_layers would leave out the only layer of the model in source."""
    if leave_out and read_config(source, **head.config).num_hidden_layers == 1:
        raise UserError(
            f"gradient_checkpointing '{leave_out - 1} of {leave_out}' leaves out the first layer, and {source} has no "
            "other: write all, or off"
        )


def checkpoint_layers(model: PreTrainedModel | PeftModel, leave_out: int | None = None, **options) -> None:
    """Keep the layers' inputs alone and run each layer again in backward; options: transformers' own.

    leave_out: the first and then every such layer keeps what it needs and is not run again.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False}, **options)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[::leave_out] if leave_out else ():
        layer.gradient_checkpointing = False


@contextlib.contextmanager
def checkpointed(model: PreTrainedModel | PeftModel, on: bool):
    """The layers are checkpointed inside, if asked for, and not afterwards."""
    if not on:
        yield
        return
    checkpoint_layers(model)
    try:
        yield
    finally:
        disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        disable()
