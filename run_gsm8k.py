"""Fine-tune on GSM8K, generated word problems or your own rows with HyC-LoRA; report what that changed, and its bytes.

    bash run_gsm8k.sh                                          # demo, minutes on a CPU
    model_name=llama-2-7b-hf data_name=gsm8k bash run_gsm8k.sh
    model_name=llama-2-7b-hf data_name=json data_dir=my_rows.jsonl bash run_gsm8k.sh

The settings are at the top of run_gsm8k.sh; `python run_gsm8k.py --help` lists all of them.
"""

from pathlib import Path

import torch

from hyclora import apply_hyclora, remove_hyclora
from hyclora.utils import results
from hyclora.utils.args import parse_arguments
from hyclora.utils.data.tokens import Collator
from hyclora.utils.disk import check_output
from hyclora.utils.errors import entry_point
from hyclora.utils.loading import find_base, keep_initial_adapters, load_model, load_tokenizer
from hyclora.utils.profiling import buffered_bytes
from hyclora.utils.tasks import load_task
from hyclora.utils.trainer import HycloraTrainer, find_checkpoint

CORE = ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate")


@entry_point
def main(argv=None):
    groups = parse_arguments(argv)
    model_args, data_args, lora_args, hyclora_args, eval_args, training = groups
    source = find_base(model_args, lora_args)
    tokenizer = load_tokenizer(source)
    task = load_task(data_args, eval_args, tokenizer)

    root = Path(training.output_dir)
    check_output(root)
    tag = training.run_name or tag_of(*groups)
    checkpoint = find_checkpoint(training.resume_from_checkpoint, sorted(root.glob(f"{tag}-*")))
    run = checkpoint.parent if checkpoint else results.start_run(root, tag, training)
    training.output_dir = str(run)

    with results.logged(run.with_name(run.name + ".log"), training):
        results.print_settings(groups[:-1], {name: getattr(training, name) for name in CORE})
        print(task.summary)
        clock = results.Clock()
        model = load_model(model_args, lora_args, source, training.device, training.seed)
        clock.lap("load")
        initial = keep_initial_adapters(model, run / "initial_adapters")
        check_output(root, needed=checkpoint_bytes(model, training.save_total_limit))
        scores = {}
        if eval_args.evaluate_before and task.test:
            scores["before"], _ = task.evaluate(model)
            print(*map(": ".join, task.shown(scores)))
            clock.lap("evaluate before")
        if hyclora_args.use_hyclora:
            print(apply_hyclora(model, hyclora_args.config()))

        collator = Collator(tokenizer.pad_token_id)
        trainer = HycloraTrainer(
            model=model,
            args=training,
            train_dataset=task.train,
            data_collator=collator,
            processing_class=tokenizer,
            compressed=hyclora_args.use_hyclora,
        )
        if training.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trained = trainer.train(checkpoint)
        clock.lap("train")
        peak = torch.cuda.max_memory_allocated() if training.device.type == "cuda" else None
        batch = trainer._prepare_inputs(collator(task.train[: training.per_device_train_batch_size]))
        buffered = measure_buffers(model, batch, hyclora_args.use_hyclora)
        if not training.should_save:
            return
        model.save_pretrained(run, path_initial_model_for_weight_conversion=initial)
        tokenizer.save_pretrained(run)
        if task.test:
            scores["after"], predictions = task.evaluate(model)
            clock.lap("evaluate after")
            if predictions:
                results.write_json(run / "predictions.json", predictions)

        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        final_loss = losses[-1] if losses else trained.metrics["train_loss"]
        print(closing_table(task.shown(scores), final_loss, int(trainer.masked_batches), buffered, peak))
        results.write_json(
            run.with_name(run.name + ".json"),
            {
                "settings": results.settings(*groups),
                "environment": results.environment(),
                task.metric.replace(" ", "_"): scores,
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
    scores: list[tuple[str, str]], final_loss: float, masked: int, buffered: dict[str, int], peak: int | None
) -> str:
    rows = [*scores, ("final loss", f"{final_loss:.4f}")]
    rows += [("batches without a target, skipped", str(masked))] if masked else []
    rows += [(f"MiB kept for backward, {name}", f"{size / 2**20:.2f}") for name, size in buffered.items()]
    if "hyclora" in buffered:
        rows.append(("ratio", f"{buffered['lora'] / buffered['hyclora']:.2f}x"))
    rows += [("MiB at the peak of GPU memory", f"{peak / 2**20:.0f}")] if peak else []
    return results.table(rows)


if __name__ == "__main__":
    main()
