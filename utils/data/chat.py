"""A chat in the words of the tokenizer's chat template, and which of them are the assistant's."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hyclora.utils.errors import UserError


@dataclass
class Part:
    """Text that is tokenized at once, and its stretches [start, end) of characters that are learned."""

    text: str
    learned: list[tuple[int, int]]


def rendered(messages: list[dict], tokenizer: PreTrainedTokenizerBase, place: str) -> list[Part]:
    """The chat, each assistant turn learned once, from the end of the prompt for it to the end of the turn.

    That is one text, unless the template writes a turn differently once the chat goes on (some leave out its
    reasoning): the turns before and after such a change then need texts of their own, as generation would see them.

    UserError if the template refuses the messages, or asks for a turn in words that the turn does not begin with.
    """

    def render(count: int, ask: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # jinja's own, what a template raises, a template that is not for such messages
            raise UserError(f"{place}: the tokenizer's chat template does not take these messages ({error})") from None

    parts: list[Part] = []
    for count, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, text = render(count, ask=True), render(count + 1, ask=False)
        if not text.startswith(prompt):
            raise UserError(
                f"{place}: the tokenizer's chat template writes message {count + 1} in another way than it asks for it "
                "(its start cannot be told): give prompt and response instead of messages, or change the template"
            )
        learned = [(len(prompt), len(text))]
        if parts and prompt.startswith(parts[-1].text):
            learned = parts.pop().learned + learned
        parts.append(Part(text, learned))
    return parts
