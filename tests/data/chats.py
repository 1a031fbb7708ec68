"""Tokenizers with chat templates, and conversations for them."""

import copy

GOES_ON = "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
PLAIN = "{% for m in messages %}{{ m.role + ' : ' + m.content + ' [SEP]\\n' }}{% endfor %}" + GOES_ON
"""Without a mark: `[SEP]` ends a turn."""
MARKED = (
    "{% for m in messages %}{{ m.role + ' : ' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + ' [SEP]' }}{% endgeneration %}"
    "{% else %}{{ m.content + ' [SEP]' }}{% endif %}{{ '\\n' }}{% endfor %}"
) + GOES_ON
"""The same text, with a mark around what the assistant says."""
TAILED = PLAIN.replace(GOES_ON, "") + (
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% else %}{{ '[MASK]' }}{% endif %}"
)
"""Appends `[MASK]` once, after a whole conversation, as Phi-3's does the end of a text."""
FORGETFUL = (
    "{% for m in messages %}{{ m.role + ' : ' }}{{ m.content if loop.last or m.role != 'assistant' else 'gone' }}"
    "{{ ' [SEP]\\n' }}{% endfor %}"
) + GOES_ON
"""Renders earlier answers otherwise, as templates that drop earlier thinking do."""
ALTERNATING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}" + PLAIN


def chat(*contents, system=None):
    """Turns of user and assistant."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def with_template(tokenizer, template):
    """A tokenizer that reads conversations by `template`."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def spell(tokenizer, ids):
    """The words of some tokens."""
    return tokenizer.decode(ids).replace(" ##", "")
