"""From a folder to a model that is ready to train: base weights (float or NF4), tokenizer, LoRA adapters.

The base comes from `model_dir/model_name`; the hub is asked only if `model_dir` is ''. Base weights are bfloat16 on a
GPU and float32 on a CPU unless told otherwise; adapters are float32, as PEFT makes them, and autocast casts them.
"""

import contextlib
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import cached_file

from hyclora.models.config import HycloraConfig
from hyclora.models.families import FAMILIES
from hyclora.utils.args import ALL_LINEAR, LoraArguments, ModelArguments
from hyclora.utils.errors import UserError
from hyclora.utils.folder import (
    bare_model,
    check_code_of,
    check_family,
    check_settings_of,
    check_tokenizer_of,
    check_weights_of,
    read_config,
)
from hyclora.utils.heads import NEXT_TOKEN, Head
from hyclora.utils.tokenizer import load_as_trained, positions_of
from hyclora.utils.weights import stored_dtypes

_INIT = {"qlora": True, "loftq": True, "gaussian": "gaussian", "pissa": "pissa_niter_16"}
_NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def find_base(
    args: ModelArguments,
    lora: LoraArguments,
    tokenizer: bool = True,
    named_by: str = "--model_dir, --model_name (a hub id with --model_dir '')",
) -> str:
    """Where to load from (a folder or a hub id); settings and files are checked before anything is loaded.

    tokenizer: whether the run reads text and needs one. named_by: the options that a user has for the folder.
    """
    if lora.lora_init_type == "loftq" and (args.random_weights or not (args.load_in_4bit and args.model_dir)):
        raise UserError("lora_init_type loftq corrects quantization: it needs load_in_4bit and a local checkpoint")
    if not args.model_dir:
        return args.model_name
    folder = Path(args.model_dir) / args.model_name
    if not folder.is_dir():
        raise UserError(f"checkpoint folder {folder} does not exist: put the model there, or set {named_by}")
    place = Path(args.tokenizer_dir or folder)
    check_settings_of(folder)
    check_code_of([folder, place], args.ignore_remote_code)
    if tokenizer:
        check_tokenizer_of(place)
    if not args.random_weights:
        check_weights_of(folder)
    return str(folder)


@contextlib.contextmanager
def _reading(source: str):
    """A hub that cannot be read is a mistake with a remedy; a local file that cannot be read is an error."""
    try:
        yield
    except OSError as error:
        if Path(source).is_dir():
            raise
        raise UserError(
            f"{source} cannot be read from the hub ({type(error).__name__}): put config.json, the tokenizer and the "
            "*.safetensors files into a folder and name it with --model_dir and --model_name"
        ) from error


def load_tokenizer(
    source: str, tell: Callable[[str], None] = print, folder: str = ""
) -> PreTrainedTokenizerBase:  # fmt: skip
    """The tokenizer of `load_as_trained`; tell gets what was decided, line by line.

    folder: where it lies if not with the model in source.
    """
    with _reading(source):
        config = read_config(source)
        check_family(config.model_type, source)
        tokenizer, decided = load_as_trained(folder or source, config)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer of {folder or source} has {len(tokenizer)} tokens, the model only {config.vocab_size}: "
            "they do not belong together"
        )
    for line in decided:
        tell(line)
    return tokenizer


def check_model(source: str, head: Head, lora: LoraArguments) -> None:
    """UserError if the model in source cannot have this head, or lacks layers that are to get adapters."""
    config = read_config(source, **head.config)
    if head.task_type == NEXT_TOKEN.task_type and not FAMILIES[config.model_type].causal:
        raise UserError(f"{source} is a {config.model_type} model, which predicts no next token: it is for run_glue.sh")
    base = bare_model(source, config, head.auto)
    if lora.use_lora:
        _check_targets(base, lora)


def _check_targets(base: PreTrainedModel, lora: LoraArguments) -> None:
    present = {name.rpartition(".")[2] for name, _ in base.named_modules()} | {ALL_LINEAR}
    if absent := [name for name in lora.target_modules if name not in present]:
        linear = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
        raise UserError(
            f"target_modules: the model has no layer named {', '.join(absent)}: its linear ones are "
            f"{', '.join(sorted(linear))}; or take {ALL_LINEAR}"
        )


def check_layers(source: str, head: Head, hyclora: HycloraConfig) -> None:
    """ValueError if hyclora.layers is of another number of layers than the model in source has."""
    hyclora.kept(read_config(source, **head.config).num_hidden_layers)


def check_embeddings(source: str, head: Head, lora: LoraArguments, hyclora: HycloraConfig) -> None:
    """UserError if hyclora would have embeddings in host memory that are trained, or the head's weight too."""
    if not hyclora.offload_embeddings:
        return
    base = bare_model(source, read_config(source, **head.config), head.auto)
    embeddings, output = base.get_input_embeddings(), base.get_output_embeddings()
    name = next(path.rpartition(".")[2] for path, module in base.named_modules() if module is embeddings)
    why = f"{name} is trained" if name in {*head.whole, *lora.target_modules} else None
    if output is not None and output.weight is embeddings.weight:
        why = f"{source} has one weight for them and the head, which needs it on the GPU"
    if why:
        raise UserError(f"offload_embeddings=True is for frozen embeddings of their own, and {why}: drop it")


def check_positions(source: str, head: Head, longest: int, option: str = "seq_len") -> None:
    """UserError if a row of so many tokens, as option says, is longer than what the model has positions for."""
    positions = positions_of(read_config(source, **head.config))
    if longest > positions:
        factor = math.ceil(longest / positions * (head.rope_scaling or 1))
        stretch = "" if head.rope_scaling is None else f", or stretch them: --rope_scaling {factor}"
        raise UserError(f"a row has {longest} tokens, {source} only {positions} positions: lower --{option}{stretch}")


def check_windows(source: str, head: Head, seq_len: int) -> None:
    """UserError if rows of so many tokens do not fit into a sliding window of the model, which groups cannot have."""
    config = read_config(source, **head.config)
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = window is not None and window <= seq_len and (kinds is None or "sliding_attention" in kinds)
    if head.attention and slides:
        raise UserError(
            f"group_size: {source} has a sliding window of {window} tokens, no longer than rows of {seq_len}: "
            f"drop group_size, as windows are short attention already, or lower --seq_len below {window}"
        )


def load_base(
    args: ModelArguments,
    source: str,
    device: torch.device,
    head: Head = NEXT_TOKEN,
    tell: Callable[[str], None] = print,
    storage: torch.dtype = torch.uint8,
) -> PreTrainedModel:
    """The frozen model on its device; NF4 if asked for. All of it in one dtype, which `tell` gets with the reason.

    storage: dtype that NF4's bytes have as tensors; fully_shard of torch 2.11 takes float ones alone.
    """
    dtype, why = _dtype_of(args, device)
    loaded = f"{'NF4, the rest and what is computed ' if args.load_in_4bit else ''}{str(dtype).removeprefix('torch.')}"
    if args.random_weights:
        tell(f"base weights: random, {loaded} ({why})")
        return _attending(_random_base(args, source, device, dtype, head, storage), head)
    quantization = None
    if args.load_in_4bit:
        # without names transformers leaves the last module as it is, which is but a part of some heads
        skip = {"llm_int8_skip_modules": list(head.trained)} if head.trained else {}
        bytes_as = {"bnb_4bit_quant_storage": storage}
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **_NF4, **skip, **bytes_as)
    model = _from_files(source, head, dtype=dtype, quantization_config=quantization, device_map={"": device})
    stored = stored_dtypes(Path(cached_file(source, "config.json")).parent)
    tell(f"base weights: {loaded} ({why}){stored and f'; in the checkpoint {stored}'}")
    return _attending(model, head)


def _from_files(source: str, head: Head, **options) -> PreTrainedModel:
    """The model as transformers loads it; UserError if weights are missing, which it would draw at random, or differ.

    But for what of the head is drawn anew anyway.
    """
    safely = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        model, found = head.auto.from_pretrained(source, **head.config, **options, **safely)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"{source}: weights have other shapes than its config.json and this task ask for: take files of one model"
        ) from None
    absent = sorted(name for name in found["missing_keys"] if not set(name.split(".")) & set(head.trained))
    if absent:
        raise UserError(f"{source} has no weights for {absent[0]} (of {len(absent)} that are missing): copy it again")
    return model


def _attending(model: PreTrainedModel, head: Head) -> PreTrainedModel:
    """The model with the attention that is asked for."""
    if head.attention:
        model.set_attn_implementation(head.attention)
    return model


def _dtype_of(args: ModelArguments, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the base weights, whatever the checkpoint has, and why it is that."""
    if args.dtype == "auto":
        on_gpu = device.type == "cuda"
        return torch.bfloat16 if on_gpu else torch.float32, f"dtype auto on a {'GPU' if on_gpu else 'CPU'}"
    return getattr(torch, args.dtype), f"dtype {args.dtype} is set"


def _random_base(
    args: ModelArguments, source: str, device: torch.device, dtype: torch.dtype, head: Head, storage: torch.dtype
) -> PreTrainedModel:
    config = read_config(source, **head.config)
    with device:
        model = head.auto.from_config(config, dtype=dtype)
    if args.load_in_4bit:
        quantize_linears(model, dtype, storage)
    return model


def quantize_linears(model: PreTrainedModel, compute_dtype: torch.dtype, storage: torch.dtype = torch.uint8):
    """Replace the linear layers of the decoder by NF4 ones, one after the other; the head stays as it is.

    storage: as of load_base.
    """
    import bitsandbytes as bnb

    # Names only: a list of the modules would keep the float weights alive.
    for name in [name for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)]:
        linear = model.base_model.get_submodule(name)
        device, bias = linear.weight.device, linear.bias
        kind = {"quant_type": "nf4", "quant_storage": storage}
        packed = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias is not None, compute_dtype, **kind, device="meta"
        )
        # the layer gets the state too, which a gathered weight has not
        packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, module=packed, **kind).to(device)
        packed.bias = bias
        model.base_model.set_submodule(name, packed)
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype, bnb_4bit_quant_storage=storage, **_NF4
    )
    # What PEFT and the Trainer ask a model that was quantized while loading.
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config)
    model.is_loaded_in_4bit = model.is_quantized = True


def load_model(
    args: ModelArguments,
    lora: LoraArguments,
    source: str,
    device: torch.device,
    seed: int,
    head: Head = NEXT_TOKEN,
    tell: Callable[[str], None] = print,
    storage: torch.dtype = torch.uint8,
) -> PeftModel | PreTrainedModel:
    """The base of `find_base` with fresh adapters drawn from `seed`; tell gets what was decided.

    Without LoRA it is the base itself, all of whose weights are trained.

    head: what the model gives; what of it is trained is drawn from `seed` too. storage: as of load_base.
    """
    if lora.lora_init_type == "loftq" and device.type != "cuda":
        raise UserError(f"lora_init_type loftq is computed by PEFT on a GPU only, not on {device.type}: choose another")
    # PiSSA splits the float weights; what is left of them is quantized afterwards.
    float_first = args.load_in_4bit and lora.lora_init_type == "pissa"
    set_seed(seed)
    with _reading(source):
        base_args = replace(args, load_in_4bit=False) if float_first else args
        base = load_base(base_args, source, device, head, tell, storage)
    base.config.use_cache = False
    # what the Trainer asks: whether the loss is divided by what it counts, or else by it
    base.accepts_loss_kwargs = head.divides_loss
    set_seed(seed)
    if not lora.use_lora:
        return base.requires_grad_(True)
    model = add_lora(base, lora, quantize_after=float_first, head=head)
    if lora.lora_init_type == "loftq":
        _compensate_quantization(model, source)
    for module in model.modules():
        # On some CPUs an evaluation would repack NF4 weights into a rounded format that is for inference only.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def add_lora(
    base: PreTrainedModel, lora: LoraArguments, quantize_after: bool = False, head: Head = NEXT_TOKEN
) -> PeftModel:
    """PEFT adapters on the target modules, started as `lora_init_type` says (loftq: as qlora).

    What of the head is trained is float32, as the adapters are.
    """
    targets = ALL_LINEAR if lora.target_modules == [ALL_LINEAR] else lora.target_modules
    _check_targets(base, lora)
    config = LoraConfig(
        task_type=head.task_type,
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        target_modules=targets,
        init_lora_weights=_INIT[lora.lora_init_type],
        modules_to_save=list(head.whole) or None,
    )
    model = _adapted(base, config)
    if not quantize_after:
        return model
    adapters = get_peft_model_state_dict(model)
    residual = model.unload()
    quantize_linears(residual, residual.dtype)
    model = _adapted(residual, replace(config, init_lora_weights=True))
    set_peft_model_state_dict(model, adapters)
    # The saved adapters name the initialisation they need on the original weights.
    model.peft_config["default"].init_lora_weights = config.init_lora_weights
    return model


def _adapted(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT asks whether layers are checkpointed by a name that newer transformers deprecate.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def keep_initial_adapters(model: PeftModel | PreTrainedModel, folder: Path) -> Path | None:
    """Save what PEFT needs to write adapters for the original weights, where the start has changed the weights.

    To be given to `save_pretrained(..., path_initial_model_for_weight_conversion=...)`; None where it is not needed.
    """
    if not isinstance(model, PeftModel) or not str(model.peft_config["default"].init_lora_weights).startswith("pissa"):
        return None
    model.save_pretrained(folder)
    return folder


def _compensate_quantization(model: PeftModel, folder: str):
    """LoftQ: start the adapters at the low-rank part of what quantization took from the weights in `folder`."""
    replace_lora_weights_loftq(model, folder)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_B["default"].weight.data /= layer.scaling["default"]
