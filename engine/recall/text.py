"""The recall model's language: its words and tokenizer, ledgers of who owns which locker, and questions.

A ledger has lines `locker red-17 belongs to Marta.`; a turn reads `user: who owns locker red-17?` and
`assistant: Marta.`, each on a line of its own. Needs no torch.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_COLOUR_WORDS = (
    "amber azure beige black blue bronze brown coral cream crimson cyan ebony gold green grey indigo "
    "ivory jade lemon lilac lime maroon navy olive orange pink plum purple red silver white yellow"
)
_NAME_WORDS = (
    "Ada Alma Amir Anton Aria Bela Boris Carla Chen Clara Dario Diana Elena Emil Enzo Erik Fatima Felix "
    "Flora Georg Greta Hanna Hugo Ida Igor Ines Iris Ivan Jana Jonas Julia Karim Kira Lars Laura Leila Leon "
    "Linus Lucia Luis Malik Mara Marta Mateo Maya Mila Milo Nadia Nico Nina Noah Olga Oscar Paula Pedro Petra "
    "Rafael Rosa Samir Sofia Stella Tara Victor Yara"
)
COLOURS = tuple(_COLOUR_WORDS.split())
NUMBERS = tuple(f"-{number}" for number in range(10, 42))
NAMES = tuple(_NAME_WORDS.split())
NOBODY = "nobody"
BOS, EOS, PAD, UNKNOWN = "<bos>", "<eos>", "<pad>", "<unk>"
CONTEXT_LENGTH = 65536

_SIGNS = [".", "\n", ":", "?", "user", "assistant", "locker", " locker", " belongs", " to", " who", " owns"]
VOCABULARY = {
    word: index
    for index, word in enumerate(
        [BOS, EOS, PAD, UNKNOWN, *_SIGNS, *(f" {c}" for c in COLOURS), *NUMBERS, *(f" {n}" for n in (*NAMES, NOBODY))]
    )
}
"""Word to token id. Words carry the blank before them, so that text is the plain concatenation of its tokens."""

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content | trim }}\n"
    "{% else %}{{ message.role }}: {{ message.content | trim }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Cuts text into words of VOCABULARY, `<unk>` for others; `<bos>` first."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    words = Regex(r" ?[A-Za-z]+|-?\d+|\n|[^\w\s]|\s+|\w")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, VOCABULARY[BOS])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


@dataclass(frozen=True, slots=True)
class Ledger:
    text: str
    """One line a locker, each ending in a newline; a chat's system message."""
    owners: Mapping[str, str]
    """By locker, such as `red-17`, in the order of the lines."""

    def owner(self, locker: str) -> str:
        """`nobody` for a locker that the ledger does not name."""
        return self.owners.get(locker, NOBODY)


LOCKERS = tuple(colour + number for colour in COLOURS for number in NUMBERS)


def make_ledger(lines: int, seed: int) -> Ledger:
    """A ledger of that many different lockers, at most len(LOCKERS), each with a random owner."""
    generator = random.Random(seed)
    lockers = generator.sample(LOCKERS, lines)
    owners = {locker: generator.choice(NAMES) for locker in lockers}
    text = "".join(f"locker {locker} belongs to {owner}.\n" for locker, owner in owners.items())
    return Ledger(text, MappingProxyType(owners))


def question(locker: str) -> str:
    """A user's message; the model answers ` Marta.` and a newline."""
    return f"who owns locker {locker}?"


def prompt(ledger: Ledger, locker: str) -> str:
    """The same as the chat template makes of the ledger and the question, for plain completion."""
    return f"{ledger.text}user: {question(locker)}\nassistant:"
