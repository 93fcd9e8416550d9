"""Write a checkpoint of a shape with random bfloat16 weights and a tokenizer of numbered words.

python -m benchmarks.random_checkpoint benchmarks/shapes/llama-2-7b FOLDER
"""

import argparse

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hyclora.utils.disk import to_path
from hyclora.utils.errors import entry_point

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@entry_point
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=to_path, help="folder with config.json")
    parser.add_argument("folder", type=to_path, help="written whole or not at all")
    args = parser.parse_args(argv)
    config = AutoConfig.from_pretrained(args.shape)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    part = args.folder.with_name(args.folder.name + ".part")
    model.save_pretrained(part, max_shard_size="4GB")
    words = [*SPECIAL.values(), *(f"t{i}" for i in range(config.vocab_size - len(SPECIAL)))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<unk>", **SPECIAL).save_pretrained(part)
    part.rename(args.folder)


if __name__ == "__main__":
    main()
