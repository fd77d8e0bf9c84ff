"""Chat templates: the text that transformers makes of them, and templates that misbehave."""

import time

import pytest
from transformers import PreTrainedTokenizerFast

from vptq_jax.lm.chat import conversation_text, render

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße  <b>&amp;\n漢字 {{ 1 }}"},
    {"role": "assistant", "content": "Yes.", "tool_calls": None, "reasoning": "Hm."},
    {"role": "user", "content": "And?", "extra": [1, 2.5, None, {"a": "ü"}]},
]
TEMPLATES = [
    "{% for m in messages %}{{ m.role }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'user' %}\n [INST] {{ m.content | trim }} [/INST]\n"
    " {% else %}{{ m.content }}{{ eos_token }}{% endif %}\n{%- endfor %}",
    "{% set ns = namespace(count=0) %}{% for m in messages %}{% if loop.index is divisibleby 3 %}{% continue %}"
    "{% endif %}{% set ns.count = ns.count + 1 %}{{ m | tojson }}"
    "{{ (m.extra or []) | tojson(indent=2) }}{% endfor %}{{ ns.count }}",
    "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.tool_calls is defined }}\n{% endfor %}"
    "{{ dict.fromkeys(['a', 'b'], 3) }}{% set n = namespace(self=1, a=2) %}{{ n.self + n.a }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% macro one(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}{% for m in messages %}{{ one(m) }}{% endfor %}"
    "{{ dict(a=1) }}{{ tools is none }}{{ tools is defined }}{{ documents is none }}{{ strftime_now('%Y') }}",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_hf):
    return PreTrainedTokenizerFast.from_pretrained(tiny_hf)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_text_is_that_of_transformers(tokenizer, template):
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert conversation_text(tokenizer, MESSAGES) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", "the chat template says: System role not supported$"),
        ("{{ messages[9].content }}", "the chat template fails: UndefinedError"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "fails: TypeError"),
        ("{% if %}", "fails: TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "fails: SecurityError"),
        ("{{ namespace(_a=1) }}", "fails: SecurityError"),
        ("{% set n = namespace(a=1) %}{% set n._b = 1 %}", "fails: SecurityError"),
        ("{{ messages.append(1) }}", "fails: SecurityError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "fails: RecursionError"),
        ("{{ 'a' * 10 ** 10 }}", "fails: .*memory"),
        ("{{ [0] * 10 ** 10 }}", "fails: .*memory"),
        ("{{ 'a'.center(10 ** 10) }}", "fails: .*memory"),
        ("{{ '%10000000000d' % 1 }}", "fails: "),
        ("{{ '{:>9999999999}'.format(1) }}", "fails: "),
        ("{{ 9 ** (9 ** 9) }}", "fails: .*(time|longer|seconds)"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "fails: .*(time|longer)"),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "fails: it writes more than"),
        ("{% set n = namespace(s='a') %}{% for i in range(64) %}{% set n.s = n.s ~ n.s %}{% endfor %}", ".*memory"),
        ("{{ range(10 ** 12) | list }}", "fails: OverflowError"),
        ("{{ lipsum(n=10 ** 7) }}", "fails: "),
    ],
)  # fmt: skip
def test_templates_that_misbehave_end_in_words(template, message):
    started = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        render(template, {"messages": MESSAGES})
    assert time.monotonic() - started < 12
    assert len(str(error.value)) < 600


def test_a_message_that_json_cannot_hold():
    with pytest.raises(ValueError, match="the conversation holds what JSON cannot"):
        render("x", {"messages": [{"role": "user", "content": object()}]})
