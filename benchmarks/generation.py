"""What keeping keys and values is worth while a model writes: utils/generate.py with use_cache on and off.

    python -m benchmarks.generation --model ckpt/smollm2-135m
    python -m benchmarks.generation --model ckpt/smollm2-135m --dtype bfloat16 --batches 1 8 32 --new 128

A JSON line a number of rows: the four test prompts in turn, greedy. Both ways write the same tokens where arithmetic is
exact enough; alike says how many of them are. Seconds are of writing alone, after a first forward; peak_mib and
held_mib are what the GPU had more of than the model, allocated and held; cache_mib are the keys and values at the end.
"""

import argparse
import itertools
from pathlib import Path

import torch

from benchmarks.jobs import number
from benchmarks.record import RESULTS, record
from hyclora.utils.args import LoraArguments, ModelArguments
from hyclora.utils.data.alpaca import TEST_PROMPTS
from hyclora.utils.disk import check_output, to_path
from hyclora.utils.errors import UserError, entry_point
from hyclora.utils.generate import compare_rows
from hyclora.utils.loading import find_base, load_base, load_tokenizer

NAME = "generation"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=to_path, default=Path("ckpt/tiny-llama"), help="checkpoint folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and arithmetic")
    parser.add_argument("--batches", nargs="+", type=number(1), default=[1, 8], help="rows at a time")
    parser.add_argument("--new", type=number(1), default=128, help="tokens to write after each prompt")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries it out")
    parser.add_argument("--output_dir", type=to_path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("this measures GPU memory and time: it needs a GPU (or --device cpu)")
    return args


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check_output(args.output_dir)
    settings = ModelArguments(args.model.name, str(args.model.parent), dtype=args.dtype)
    source = find_base(settings, LoraArguments(), named_by="--model")
    tokenizer = load_tokenizer(source)
    model = load_base(settings, source, torch.device(args.device)).eval()
    prompts = [tokenizer(prompt).input_ids for prompt in TEST_PROMPTS]
    for n in args.batches:
        rows = list(itertools.islice(itertools.cycle(prompts), n))
        found = compare_rows(model, rows, args.new)
        asked = {"model": args.model.name, "dtype": args.dtype, "rows": n, "new": args.new, "device": args.device}
        line = record(NAME, {"setting": None, **found, "arguments": asked}, args.output_dir)
        ways = (f"{way} a cache {line[way]['seconds']:.2f} s" for way in ("with", "without"))
        print(f"{n} rows: {line['alike']} of {line['tokens']} tokens alike, {', '.join(ways)}", flush=True)


if __name__ == "__main__":
    main()
