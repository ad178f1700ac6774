"""A small byte-level tokenizer with a chat template, made on the spot and saved as a model directory."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'pirate' %}{{ raise_exception('No pirates.') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}</>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% if shout is defined %}!{% endif %}{% endif %}"
)
TRAINING = ["hello world, the quick brown fox jumps over the lazy dog", "你好世界 😀😀 héllo wörld"] * 4


def save_text_model(directory: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<eos>", "<sep>"], show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", additional_special_tokens=["<sep>"])
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return directory
