"""The model families: what a family calls its modules, one row of FAMILIES each.

family.py       what a family has to name                    llama.py          LLaMA
mistral.py      Mistral, with its sliding window             qwen.py           Qwen2 and Qwen3
roberta.py      RoBERTa, an encoder
"""

from hyclora.models.families.family import Family
from hyclora.models.families.llama import LLAMA
from hyclora.models.families.mistral import MISTRAL
from hyclora.models.families.qwen import QWEN2, QWEN3
from hyclora.models.families.roberta import ROBERTA

# by Hugging Face's model_type
FAMILIES: dict[str, Family] = {
    "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "roberta": ROBERTA
}  # fmt: skip
