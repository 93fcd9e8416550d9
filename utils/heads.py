"""What a model is trained to give: the next token, or of a whole text its class or a score."""

from dataclasses import dataclass, field, replace

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainingArguments

from hyclora.utils.errors import UserError
from hyclora.utils.folder import read_config

SCORE = "regression"  # what transformers calls it


@dataclass(frozen=True)
class Head:
    """auto: transformers' class that loads such a model. task_type, pipeline: PEFT's and the hub's names of it. config:
    what is set in the model's configuration.

    trained: names of modules that are drawn anew, and trained and saved whole beside the adapters, never quantized.
    divides_loss: whether the model's loss is a sum over what the Trainer counted in all micro-batches of a step; else
    it is the mean of its own. whole: what names of modules end in that are trained whole too, as they come, beside
    adapters. attention: the name of transformers' implementation, '' for its own choice. rope_scaling: by how much
    rotary positions are closer together than in the checkpoint, and the model has more of them; None where a driver
    does not ask.
    """

    auto: type
    task_type: str
    pipeline: str
    config: dict = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    divides_loss: bool = True
    whole: tuple[str, ...] = ()
    attention: str = ""
    rope_scaling: float | None = None

    def check(self, training: TrainingArguments, hyclora) -> None:
        """UserError for a setting of the training, or of HyC-LoRA, that this head has no use for."""
        if training.label_smoothing_factor and self.config.get("problem_type") == SCORE:
            raise UserError("label_smoothing_factor smooths classes, and this task asks for a score: drop it")
        if self.attention and hyclora.use_hyclora and hyclora.attention == "eager":
            raise UserError("group_size needs attention=flash: attention=eager keeps a map of all tokens")

    def of(self, source: str) -> "Head":
        """The same for the model in source (a folder or a hub id), of which rope_scaling is a matter of configuration.

        Position interpolation (Chen et al. 2023): position p becomes p / rope_scaling. UserError for a model without
        rotary positions, and for one whose positions are stretched in another way already.
        """
        if self.rope_scaling in (None, 1):
            return self
        config = read_config(source, **self.config)
        rope = getattr(config, "rope_parameters", None) or {}
        if (kind := rope.get("rope_type")) not in ("default", "linear"):
            has = f"rotary positions of the kind {kind}" if kind else "no rotary positions"
            raise UserError(f"rope_scaling stretches plain rotary positions, and {source} has {has}: drop it")
        stretched = {
            "rope_parameters": {**rope, "rope_type": "linear", "factor": self.rope_scaling * rope.get("factor", 1.0)},
            "max_position_embeddings": int(config.max_position_embeddings * self.rope_scaling),
        }
        return replace(self, config={**self.config, **stretched})


NEXT_TOKEN = Head(AutoModelForCausalLM, "CAUSAL_LM", "text-generation")


def classifier(n_labels: int, pad_token_id: int) -> Head:
    """A class out of n_labels, or a score for n_labels=1.

    pad_token_id: the tokenizer's. A decoder is read at the last token that is not this one, an encoder at the first.
    """
    kind = SCORE if n_labels == 1 else "single_label_classification"
    config = {"num_labels": n_labels, "problem_type": kind, "pad_token_id": pad_token_id}
    trained = ("classifier", "score")
    return Head(
        AutoModelForSequenceClassification, "SEQ_CLS", "text-classification", config, trained, divides_loss=False
    )
