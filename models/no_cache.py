"""What a training forward returns in the place of the cache that stock would have made."""

from transformers.cache_utils import DynamicCache

USED = frozenset(dir(DynamicCache()))


class NoCache:
    """Stands where stock has a cache, and says so to whoever wants to use it: ValueError.

    In training a cache would hold every k and v, so none is made unless use_cache=True asks for it.
    """

    def __repr__(self) -> str:
        return "no cache: pass use_cache=True for one"

    def __getattr__(self, name: str):
        if name in USED:
            refuse()
        raise AttributeError(name)

    def __getitem__(self, index):
        refuse()

    def __len__(self):
        refuse()


def refuse():
    raise ValueError(
        "a patched model makes no cache (past_key_values) in training, unless it is asked for one: call it with "
        "use_cache=True"
    )


NO_CACHE = NoCache()
