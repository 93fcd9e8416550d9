"""Fine-tune on GSM8K, or on generated word problems, with HyC-LoRA; report accuracy and the bytes kept for backward.

    bash run_gsm8k.sh                                          # demo, minutes on a CPU
    model_name=llama-2-7b-hf data_name=gsm8k bash run_gsm8k.sh

The settings are at the top of run_gsm8k.sh; `python run_gsm8k.py --help` lists all of them.
"""

from pathlib import Path

import torch

from hyclora import apply_hyclora, remove_hyclora
from hyclora.utils import results
from hyclora.utils.args import parse_arguments
from hyclora.utils.data.gsm8k import Collator, load_rows, tokenize_rows
from hyclora.utils.disk import check_output
from hyclora.utils.errors import entry_point
from hyclora.utils.loading import find_base, keep_initial_adapters, load_model, load_tokenizer
from hyclora.utils.metrics import evaluate_generation
from hyclora.utils.profiling import buffered_bytes
from hyclora.utils.trainer import HycloraTrainer, find_checkpoint

CORE = ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate")


@entry_point
def main(argv=None):
    groups = parse_arguments(argv)
    model_args, data_args, lora_args, hyclora_args, eval_args, training = groups
    source = find_base(model_args, lora_args)
    train_rows, test_rows = load_rows(data_args, "train"), load_rows(data_args, "test")
    tokenizer = load_tokenizer(source)
    train_set = tokenize_rows(train_rows, tokenizer, data_args.seq_len)

    root = Path(training.output_dir)
    check_output(root)
    tag = training.run_name or tag_of(*groups)
    checkpoint = find_checkpoint(training.resume_from_checkpoint, sorted(root.glob(f"{tag}-*")))
    run = checkpoint.parent if checkpoint else results.start_run(root, tag, training)
    training.output_dir = str(run)

    with results.logged(run.with_name(run.name + ".log"), training):
        results.print_settings(groups[:-1], {name: getattr(training, name) for name in CORE})
        print(train_set)
        clock = results.Clock()
        model = load_model(model_args, lora_args, source, training.device, training.seed)
        clock.lap("load")
        initial = keep_initial_adapters(model, run / "initial_adapters")
        check_output(root, needed=checkpoint_bytes(model, training.save_total_limit))
        accuracy = {}
        if eval_args.evaluate_before and test_rows:
            accuracy["before"], _ = evaluate_generation(model, tokenizer, test_rows, eval_args)
            print(f"accuracy before training: {accuracy['before']:.2%}")
            clock.lap("evaluate before")
        if hyclora_args.use_hyclora:
            print(apply_hyclora(model, hyclora_args.config()))

        collator = Collator(tokenizer.pad_token_id)
        trainer = HycloraTrainer(
            model=model,
            args=training,
            train_dataset=train_set.rows,
            data_collator=collator,
            processing_class=tokenizer,
            compressed=hyclora_args.use_hyclora,
        )
        if training.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trained = trainer.train(checkpoint)
        clock.lap("train")
        peak = torch.cuda.max_memory_allocated() if training.device.type == "cuda" else None
        batch = trainer._prepare_inputs(collator(train_set.rows[: training.per_device_train_batch_size]))
        buffered = measure_buffers(model, batch, hyclora_args.use_hyclora)
        if not training.should_save:
            return
        model.save_pretrained(run, path_initial_model_for_weight_conversion=initial)
        tokenizer.save_pretrained(run)
        if test_rows:
            accuracy["after"], predictions = evaluate_generation(model, tokenizer, test_rows, eval_args)
            clock.lap("evaluate after")
            results.write_json(run / "predictions.json", predictions)

        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        final_loss = losses[-1] if losses else trained.metrics["train_loss"]
        print(closing_table(accuracy, final_loss, int(trainer.masked_batches), buffered, peak))
        results.write_json(
            run.with_name(run.name + ".json"),
            {
                "settings": results.settings(*groups),
                "environment": results.environment(),
                "accuracy": accuracy,
                "final_loss": final_loss,
                "buffered_bytes": buffered,
                "peak_bytes": peak,
                "masked_batches": int(trainer.masked_batches),
                "train": trained.metrics,
                "seconds": clock.seconds,
                "log_history": trainer.state.log_history,
            },
        )
        print(f"results: {run}.json, log: {run}.log, adapters: {run}")


def tag_of(model_args, data_args, lora_args, hyclora_args, *_) -> str:
    """The settings that tell runs apart at a glance."""
    method = f"{hyclora_args.layer_type}-q{hyclora_args.q_bit}" if hyclora_args.use_hyclora else "lora"
    return f"{Path(model_args.model_name).name}-{data_args.data_name}-{method}-r{lora_args.lora_rank}"


def checkpoint_bytes(model, kept: int | None) -> int:
    """Room for the checkpoints that are kept at once: adapters and two Adam moments each, and one being written."""
    adapters = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return 2**26 + 3 * adapters * ((kept or 1) + 1)


def measure_buffers(model, batch, compressed: bool) -> dict[str, int]:
    """Bytes kept for backward on one batch, with and without compression; leaves the model without."""
    buffered = {}
    if compressed:
        buffered["hyclora"] = buffered_bytes(model, batch)
        remove_hyclora(model)
    return buffered | {"lora": buffered_bytes(model, batch)}


def closing_table(
    accuracy: dict[str, float], final_loss: float, masked: int, buffered: dict[str, int], peak: int | None
) -> str:
    rows = [(f"accuracy {when} training", f"{value:.2%}") for when, value in accuracy.items()]
    rows.append(("final loss", f"{final_loss:.4f}"))
    rows += [("batches without a target, skipped", str(masked))] if masked else []
    rows += [(f"MiB kept for backward, {name}", f"{size / 2**20:.2f}") for name, size in buffered.items()]
    if "hyclora" in buffered:
        rows.append(("ratio", f"{buffered['lora'] / buffered['hyclora']:.2f}x"))
    rows += [("MiB at the peak of GPU memory", f"{peak / 2**20:.0f}")] if peak else []
    return results.table(rows)


if __name__ == "__main__":
    main()
