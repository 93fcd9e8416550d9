"""verify() on a checkpoint and your own rows: how close the gradients are to those of exact LoRA.

    python -m hyclora.fidelity --model FOLDER --data my_rows.jsonl
    python -m hyclora.fidelity --model FOLDER --data my_text.txt --adapters FOLDER --q_bit 2

Rows are read as run_gsm8k.sh reads your own, .txt as run_wikitext2.sh does; demo are generated word problems. Adapters
are those of a folder, or new ones, which are trained exactly for some steps: where lora_B is still 0, the gradient of
lora_A is 0 too, and tells nothing. The settings of HyC-LoRA and of LoRA are those of the drivers. The last line says
how long it took, and what took it: on a small model mostly what is imported.
"""

import hyclora.utils.interrupts

from dataclasses import dataclass
from pathlib import Path

from hyclora import BEGUN, Verification
from hyclora.utils.args import HycloraArguments, LoraArguments, option, parse_arguments, require
from hyclora.utils.errors import RunStopped, entry_point, is_out_of_memory


@dataclass
class FidelityArguments:
    _argument_group_name = "verification"

    model: str = option("", "Checkpoint folder.")
    data: str = option("demo", "demo, a .json, .jsonl or .txt file, or a folder with train.jsonl.")
    adapters: str = option("", "Folder of trained adapters; '' makes new ones.")
    exact_steps: int = option(8, "Steps that new adapters are trained exactly for.")
    batches: int = option(1, "Batches that are measured, after those that calibrate.")
    batch_size: int = option(4, "Rows of a batch.")
    seq_len: int = option(512, "Longest row in tokens.")
    load_in_4bit: bool = option(False, "Keep the frozen linear weights in NF4.")
    bf16: bool | None = option(None, "Compute in bfloat16 under autocast. Default: on a GPU only.")
    device: str = option("auto", "cuda, cpu, or auto: a GPU if there is one.")
    seed: int = option(11, "Of new adapters.")

    def __post_init__(self):
        require(bool(self.model), "say with --model which checkpoint folder it is")
        for name in ("batches", "batch_size"):
            require(getattr(self, name) > 0, f"{name} must be at least 1, not {getattr(self, name)}")
        require(self.seq_len >= 2, f"seq_len must be at least 2, not {self.seq_len}")
        require(self.exact_steps >= 0, f"exact_steps must not be negative, not {self.exact_steps}")
        data = Path(self.data)
        require(self.data == "demo" or data.exists(), f"data {data} does not exist: name a file or a folder")
        train = [data / f"train.{suffix}" for suffix in ("jsonl", "json")]
        require(
            not data.is_dir() or any(file.is_file() for file in train),
            f"{data} has no train.jsonl: put it there, or name a file with --data",
        )
        require(self.device in ("auto", "cuda", "cpu"), f"device must be auto, cuda or cpu, not {self.device}")
        require(
            not self.adapters or (Path(self.adapters) / "adapter_config.json").is_file(),
            f"adapters {self.adapters} has no adapter_config.json: name a folder that save_pretrained has written",
        )


@dataclass
class VerifiedArguments(HycloraArguments):
    """HyC-LoRA's, which this command verifies whatever else they say."""

    verify: bool = option(True, "True: this command does nothing else.")

    def __post_init__(self):
        require(self.use_hyclora, "use_hyclora=False leaves nothing to verify: drop it")
        require(self.verify, "this command verifies, and there is nothing else to do with verify=False: drop it")
        super().__post_init__()
        require(not self.has_budget, "memory_budget does not count exact LoRA, which is verified against: drop it")


GROUPS = (FidelityArguments, LoraArguments, VerifiedArguments)


def check_new_adapters(args: FidelityArguments, lora: LoraArguments) -> None:
    """UserError for settings of new adapters beside a folder of trained ones."""
    new = {**vars(lora), "exact_steps": args.exact_steps, "seed": args.seed}
    left = {**vars(LoraArguments()), "exact_steps": FidelityArguments.exact_steps, "seed": FidelityArguments.seed}
    given = [name for name, value in new.items() if args.adapters and value != left[name]]
    require(not given, f"{', '.join(given)}: of no effect on adapters that are trained: drop that, or --adapters")


@entry_point
def main(argv: list[str] | None = None) -> Verification:
    args, lora, hyclora = parse_arguments(argv, GROUPS)
    check_new_adapters(args, lora)
    from hyclora.utils.fidelity import run  # torch, transformers and PEFT take seconds: mistakes above are told before

    try:
        return run(args, lora, hyclora, BEGUN if argv is None else None)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunStopped(
            "out of memory: exact LoRA, with which gradients are compared, keeps all activations of a batch; lower "
            "--batch_size or --seq_len, or set load_in_4bit=True"
        ) from error


if __name__ == "__main__":
    main()
