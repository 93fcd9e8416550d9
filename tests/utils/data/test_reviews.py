"""The generated reviews: as many as asked for, both kinds, no text in both splits, and a word alone does not tell."""

from hyclora.utils.data.reviews import PRAISE, reviews


def test_reviews_are_different_balanced_and_split_by_their_text():
    train, held_out = reviews(600, "train", 0), reviews(200, "dev", 0)
    assert (len(dict(train)), len(dict(held_out))) == (600, 200)
    assert not dict(train).keys() & dict(held_out).keys()
    assert 0.4 < sum(good for _, good in train) / 600 < 0.6
    assert reviews(50, "train", 0) == train[:50] != reviews(50, "train", 1)


def test_a_not_turns_a_review_over():
    praised = [(text, good) for text, good in reviews(600, "train", 0) if any(word in text for word in PRAISE)]
    assert {good for text, good in praised if " not " in text} == {False}
    assert {good for text, good in praised if " not " not in text} == {True}
