"""Data sets of the Hugging Face hub."""

from hyclora.utils.errors import UserError


def download(hub_id: str, name: str, split: str, by_hand: str) -> list[dict]:
    """The rows of a split from the hub, or from its local cache; by_hand: what to do where it cannot be reached."""
    try:
        from datasets import load_dataset
        from huggingface_hub.utils import logging
    except ImportError:
        raise UserError(f"{hub_id} needs the package datasets: pip install datasets, or {by_hand}") from None
    logging.set_verbosity_error()  # its retries would bury the sentence below
    try:
        return load_dataset(hub_id, name, split=split).to_list()
    except Exception as error:  # the hub client raises its own, httpx's, OSError, ... when it cannot connect
        raise UserError(f"{hub_id} cannot be read from the hub ({type(error).__name__}): {by_hand}") from error
