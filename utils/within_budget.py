"""memory_budget in the scripts: the plan for a model's files and for rows that were read, before anything is loaded."""

from transformers import AutoConfig

from hyclora.utils.args import HycloraArguments, LoraArguments, ModelArguments, require
from hyclora.utils.heads import NEXT_TOKEN, Head
from hyclora.utils.planning.budget import available_host, budget_of, choose
from hyclora.utils.planning.fitting import Load
from hyclora.utils.planning.shape import Shape


def settle(
    hyclora: HycloraArguments, model: ModelArguments, lora: LoraArguments, source: str, head: Head, load: Load
) -> None:
    """Have hyclora say what memory_budget chooses; UserError where nothing fits, or what is trained cannot be counted.

    source: the base model's folder, or hub id; load: the largest micro-step of the run.
    """
    require(
        (head.auto, head.whole, head.attention) == (NEXT_TOKEN.auto, (), ""),
        "memory_budget counts adapters on models that predict the next token, and this run trains another head, more "
        "of the model, or by attention within groups: drop memory_budget",
    )
    require(
        model.dtype != "float32",
        "memory_budget counts weights of 16 bit or NF4, and dtype=float32 is set: drop one of both",
    )
    require(
        not hyclora.verify,
        "verify takes the memory of plain LoRA, which is more than memory_budget counts: verify in a run without it",
    )
    config = hyclora.config()
    shape = shape_of(model, lora, source, head)
    hyclora.take(choose(shape, config, load, budget_of(config), available_host()))


def shape_of(model: ModelArguments, lora: LoraArguments, source: str, head: Head = NEXT_TOKEN) -> Shape:
    """The base model in source with its adapters, as far as memory goes. Reads config.json alone."""
    base = "nf4" if model.load_in_4bit else "bf16"
    config = AutoConfig.from_pretrained(source, **head.config)
    return Shape(config, base, lora.lora_rank, lora.target_modules, lora.lora_dropout > 0)
