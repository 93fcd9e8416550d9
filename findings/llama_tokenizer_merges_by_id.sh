#!/usr/bin/env bash
# transformers' LlamaTokenizer, made from a tokenizer.model alone, gives other ids than SentencePiece for the same file.
#
# transformers 5.24.0, tokenizers 0.23.3, sentencepiece 0.2.3. A byte-pair model of SentencePiece joins first what makes
# the piece of the highest score; the class joins first what makes the piece of the lowest id. Where a file has ids in
# another order than scores, as LLaMA-2's has for runs of spaces, texts get other ids than the model was trained with.
# Here: a small model whose merged pieces stand in the opposite order, each with its own score.
# Fails if the ids become equal.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
cd "$work"
env/bin/python - <<'EOF'
import io

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import LlamaTokenizer

text = ["the cat sat on the mat and the hat", "abab abba baba", "a b c d e f g h i j k l m n o p q r s t u v w x y z"]
written = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text * 20), model_writer=written, vocab_size=60, model_type="bpe", hard_vocab_limit=False,
    minloglevel=2,
)
proto = ModelProto.FromString(written.getvalue())
merged = [i for i, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL and len(piece.piece) > 1]
taken = [(proto.pieces[i].piece, proto.pieces[i].score) for i in reversed(merged)]
for i, (piece, score) in zip(merged, taken):
    proto.pieces[i].piece, proto.pieces[i].score = piece, score
with open("tokenizer.model", "wb") as file:
    file.write(proto.SerializeToString())

theirs = sentencepiece.SentencePieceProcessor(model_file="tokenizer.model")
ours = LlamaTokenizer.from_pretrained(".")
differing = 0
for line in text:
    right, found = theirs.encode(line), ours(line, add_special_tokens=False).input_ids
    print("equal    " if right == found else "different", theirs.encode(line, out_type=str), ours.convert_ids_to_tokens(found))
    differing += right != found
raise SystemExit(0 if differing else "the ids are equal now: this finding is out of date")
EOF
