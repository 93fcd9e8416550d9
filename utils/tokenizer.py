"""The tokenizer of a checkpoint, with the ids that its model was trained with.

Transformers rebuilds a tokenizer from its vocabulary by rules of the class that it picks. Classes and rules differ by
version, and some write spaces or merge pieces as the model never saw them. So ids are compared with what lies beside
the weights: SentencePiece's own where there is a tokenizer.model, else those of tokenizer.json as it is written.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, normalizers
from transformers import (
    AddedToken,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from hyclora.utils.errors import UserError

PROBES = (
    "Tom has 3 pens and buys 12345 more.",
    " Tom starts with a space",
    "two  spaces,   three, at the end  ",
    "12 + 3 = <<12+3=15>>15\n\n#### 1,500.75",
    "\n\tnew lines\r\nand tabs",
    "naïve Œuvre, 日本語, 🙂 and 5€",
)
_JSON, SETTINGS, _SENTENCEPIECE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
TOKENIZER_FILES = (_JSON, SETTINGS, _SENTENCEPIECE, _VOCABULARY, _MERGES)
SUFFICIENT = ((_JSON,), (_SENTENCEPIECE,), (_VOCABULARY, _MERGES))


def load_as_trained(source: str, config: PretrainedConfig) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer of a folder or a hub id, and what was decided, in lines.

    bos comes before a text where the model was trained with it, nothing behind it: a training row gets its own eos. An
    encoder's tokenizer, which has cls and sep, puts these around a text and between two itself. Padding is on the right
    with an existing token: the embedding is never resized. model_max_length is no more than the model has positions.
    UserError if no way to load it gives the ids of the files.
    """
    files = {name: Path(path) for name in TOKENIZER_FILES if (path := _find(source, name))}
    try:
        return _load(source, config, files)
    except (UserError, OSError, KeyboardInterrupt):
        raise
    except (
        BaseException
    ) as error:  # json's and transformers' own for a file that is torn, and a panic of the Rust library
        named = " and ".join(files)
        raise UserError(f"the tokenizer of {source} cannot be read ({error}): copy {named} again") from error


def _load(
    source: str, config: PretrainedConfig, files: dict[str, Path]
) -> tuple[PreTrainedTokenizerBase, list[str]]:  # fmt: skip
    settings = json.loads(files[SETTINGS].read_text(encoding="utf-8")) if SETTINGS in files else {}
    pieces = _read_pieces(files.get(_SENTENCEPIECE))
    # of a large vocabulary it takes a while: once at most
    written = cache(lambda: tokenizers.Tokenizer.from_file(str(files[_JSON])))
    tokenizer, ids = _with_right_ids(source, files, pieces, written)
    if pieces:
        _name_specials(tokenizer, pieces, settings)
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {source} has no eos token: name it in {SETTINGS}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions_of(config))
    padding = f"padding with {tokenizer.pad_token} on the right"
    if tokenizer.cls_token and tokenizer.sep_token:
        around = f"{tokenizer.cls_token} before a text, {tokenizer.sep_token} behind it and between two"
        return tokenizer, [f"tokenizer: {ids}", f"tokenizer: {around}, {padding}"]
    bos, why = _wants_bos(tokenizer, settings, files, pieces, written, config)
    _frame(tokenizer, bos, source)
    before = f"bos {tokenizer.bos_token}" if bos else "no bos"
    after = f"eos {tokenizer.eos_token}, {padding}"
    return tokenizer, [f"tokenizer: {ids}", f"tokenizer: {before} before a text ({why}), {after}"]


def _find(source: str, name: str) -> str | None:
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(source, name, **quiet)


def _read_pieces(file: Path | None):
    """A processor for the SentencePiece file; None without one (Llama 3's tokenizer.model is another format)."""
    if file is None:
        return None
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UserError(f"{file} needs the package sentencepiece: pip install sentencepiece protobuf") from None
    try:
        return SentencePieceProcessor(model_proto=file.read_bytes())
    except RuntimeError:
        return None


def _with_right_ids(
    source: str, files: dict[str, Path], pieces, written: Callable[[], tokenizers.Tokenizer]
) -> tuple[PreTrainedTokenizerBase, str]:
    """The first tokenizer that gives the ids of the files, and how that was found; written reads tokenizer.json."""
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    picked = type(tokenizer).__name__
    if pieces:
        right, theirs = pieces.encode, f"SentencePiece's for {_SENTENCEPIECE}"
    elif _JSON in files:
        right, theirs = lambda text: written().encode(text, add_special_tokens=False).ids, f"those written in {_JSON}"
    else:
        unspaced_mask(tokenizer)
        return tokenizer, f"{picked}, its ids compared with nothing: there is no {_JSON} and no SentencePiece file"
    differing = _differing(tokenizer, right)
    if differing is None:
        return tokenizer, f"{picked}, ids equal to {theirs}"
    # this class takes files as they are
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    if pieces and _differing(tokenizer, right) is not None and _of_these_pieces(tokenizer, pieces):
        _rebuild(tokenizer, pieces.serialized_model_proto())
    if (still := _differing(tokenizer, right)) is None:
        ours = type(tokenizer).__name__
        return tokenizer, f"{ours}, ids equal to {theirs} ({picked} as transformers loads it differs in {differing!r})"
    remedy = f"add the {_JSON} that the model was trained with, and remove {_SENTENCEPIECE}"
    if _JSON in files:
        remedy = f"remove whichever of {_JSON} and {_SENTENCEPIECE} the model was not trained with"
    raise UserError(f"the tokenizer of {source} gives other ids than {theirs} for the text {still!r}: {remedy}")


def unspaced_mask(tokenizer: PreTrainedTokenizerBase):
    """Let the mask stand for a word with the space before it, as in pre-training; a bare vocabulary does not say so."""
    if tokenizer.mask_token is not None:
        mask = AddedToken(tokenizer.mask_token, lstrip=True, special=True)
        tokenizer.add_special_tokens({"mask_token": mask})


def positions_of(config: PretrainedConfig) -> int:
    """The tokens of the longest text; RoBERTa counts its positions from behind the padding's id."""
    unused = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    return config.max_position_embeddings - unused


def _differing(tokenizer: PreTrainedTokenizerBase, right: Callable[[str], list[int]]) -> str | None:
    """The first probe with other ids than the right ones."""
    ours = ((text, tokenizer(text, add_special_tokens=False).input_ids) for text in PROBES)
    return next((text for text, ids in ours if ids != right(text)), None)


def _of_these_pieces(tokenizer: PreTrainedTokenizerFast, pieces) -> bool:
    """Whether its vocabulary, without added tokens, is the SentencePiece file's."""
    file = {pieces.id_to_piece(i): i for i in range(pieces.piece_size())}
    return tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False) == file


def _rebuild(tokenizer: PreTrainedTokenizerFast, model: bytes):
    """Make it encode as the SentencePiece model does, if that merges pairs (BPE); added tokens stay."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(model)
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        return
    backend, spec = tokenizer.backend_tokenizer, proto.normalizer_spec
    backend.model = tokenizers.models.BPE(
        vocab={piece.piece: i for i, piece in enumerate(proto.pieces)},
        merges=_merges(proto),
        unk_token=proto.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        outer, inner = tokenizers.Regex(r"\A +| +\z"), tokenizers.Regex(" {2,}")
        steps += [normalizers.Replace(outer, ""), normalizers.Replace(inner, " ")]
    prefix = [normalizers.Prepend("▁")] if spec.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, *prefix, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    strip = [decoders.Strip(" ", left=1)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _merges(proto) -> list[tuple[str, str]]:
    """Pairs of pieces in the order in which SentencePiece joins them: by the score of what they make, then its id."""
    normal = {piece.piece: (-piece.score, i) for i, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL}
    pairs = ((piece[:cut], piece[cut:]) for piece in normal for cut in range(1, len(piece)))
    known = (pair for pair in pairs if pair[0] in normal and pair[1] in normal)
    return sorted(known, key=lambda pair: (normal[pair[0] + pair[1]], len(pair[0])))


def _name_specials(tokenizer: PreTrainedTokenizerBase, pieces, settings: dict):
    """bos, eos and unk of the SentencePiece file, where nothing else names them."""
    for name, i in (("bos_token", pieces.bos_id()), ("eos_token", pieces.eos_id()), ("unk_token", pieces.unk_id())):
        if i >= 0 and name not in settings and getattr(tokenizer, name) is None:
            setattr(tokenizer, name, pieces.id_to_piece(i))


def _wants_bos(
    tokenizer: PreTrainedTokenizerBase,
    settings: dict,
    files: dict[str, Path],
    pieces,
    written: Callable[[], tokenizers.Tokenizer],
    config: PretrainedConfig,
) -> tuple[bool, str]:
    """Whether the model was trained with bos before each text, and which file says so."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False, "the tokenizer has none"
    if isinstance(stated := settings.get("add_bos_token"), bool):
        return stated, f"add_bos_token in {SETTINGS}"
    if pieces and pieces.bos_id() == config.bos_token_id == bos:
        # LLaMA's and Mistral's code puts it there; a tokenizer.json that transformers saved may have lost it
        return True, f"{_SENTENCEPIECE} and config.json name it"
    if _JSON in files:
        return bos in written().encode(PROBES[0]).ids, f"as {_JSON} does"
    if pieces:
        return False, f"{_SENTENCEPIECE} and config.json do not name the same; add_bos_token in {SETTINGS} would tell"
    return bos in tokenizer(PROBES[0]).input_ids, "as its class does"


def _frame(tokenizer: PreTrainedTokenizerBase, bos: bool, source: str):
    """bos before a text or not, and no eos behind: a prompt has none, and a training row gets its own."""
    wanted = [tokenizer.bos_token_id] * bos

    def framed() -> bool:
        text = PROBES[0]
        return tokenizer(text).input_ids == wanted + tokenizer(text, add_special_tokens=False).input_ids

    if framed():
        return
    tokenizer.add_bos_token, tokenizer.add_eos_token = bos, False
    if not framed():
        raise UserError(
            f"the tokenizer of {source} puts other tokens around a text than {'bos' if bos else 'none'}: correct "
            f"add_bos_token in {SETTINGS}"
        )
