"""Labels are exact: answers with their end-of-turn mark carry loss, prompts never do."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from cgfedllm.config import DataConfig
from cgfedllm.data.encoding import NO_LOSS, RowEncoder
from cgfedllm.errors import ConfigError, DataError

ROW = {"question": "What is two plus two?", "answer": "It is four."}
TURNS = {
    "messages": [
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "user"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "  Because é 日本.\n\n  Really. "},
    ]
}
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
# an answer that is not the last is printed without its thinking block, as Qwen3 does
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def encode(tokenizer, row, **config):
    """The one example of a row: its text, and the text of its labels."""
    encoded = RowEncoder(DataConfig(**config), tokenizer).encode([row])
    (example,) = encoded.examples
    labelled = example.labels != NO_LOSS
    assert (example.labels[labelled] == example.input_ids[labelled]).all()
    return (
        tokenizer.decode(example.input_ids, skip_special_tokens=False),
        tokenizer.decode(example.input_ids[labelled], skip_special_tokens=False),
    )


def test_a_chat_row_is_the_templates_text_and_only_the_answer_is_labelled(tokenizer):
    text, labels = encode(tokenizer, ROW)
    assert text == (
        "<|im_start|>user\nWhat is two plus two?<|im_end|>\n"
        "<|im_start|>assistant\nIt is four.<|im_end|>\n"
    )
    assert labels == "It is four.<|im_end|>"


def test_tokens_are_those_of_the_template_and_the_prompt_those_of_generation(tokenizer):
    (example,) = RowEncoder(DataConfig(), tokenizer).encode([ROW]).examples
    user = {"role": "user", "content": ROW["question"]}
    both = [user, {"role": "assistant", "content": ROW["answer"]}]
    whole = tokenizer.apply_chat_template(both, tokenize=True, return_dict=False)
    prompt = tokenizer.apply_chat_template(
        [user], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert example.input_ids.tolist() == whole
    first = int(np.flatnonzero(example.labels != NO_LOSS)[0])
    assert example.input_ids[:first].tolist() == prompt
    assert example.input_ids.dtype == example.labels.dtype == np.int32


def test_every_assistant_turn_is_labelled_even_when_it_repeats_the_templates_words(tokenizer):
    text, labels = encode(tokenizer, TURNS)
    assert labels == "user<|im_end|>Because é 日本.\n\n  Really.<|im_end|>"
    assert text.count("<|im_start|>") == 4


def test_train_on_all_labels_all_but_the_first_token(tokenizer):
    config = DataConfig(train_on="all")
    (example,) = RowEncoder(config, tokenizer).encode([ROW]).examples
    assert example.labels[0] == NO_LOSS
    assert (example.labels[1:] == example.input_ids[1:]).all()


def test_a_space_before_the_answer_is_made_by_the_model(make_tokenizer):
    tokenizer = make_tokenizer(MISTRAL, bos_token="<s>", eos_token="</s>")
    text, labels = encode(tokenizer, ROW)
    assert text == "<s>[INST] What is two plus two? [/INST] It is four.</s>"
    assert labels == " It is four.</s>"


def test_a_template_that_changes_earlier_turns_is_followed(make_tokenizer):
    _, labels = encode(make_tokenizer(THINKING), TURNS)
    assert labels == "user<|im_end|>Because é 日本.\n\n  Really.<|im_end|>"


def test_a_system_prompt_comes_first_unless_the_row_has_one(tokenizer):
    text, _ = encode(tokenizer, ROW, system_prompt="Be brief.")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    own = {"messages": [{"role": "system", "content": "Sing."}, *TURNS["messages"]]}
    text, _ = encode(tokenizer, own, system_prompt="Be brief.")
    assert "Sing." in text
    assert "Be brief." not in text


def test_where_the_template_takes_no_system_prompt_it_opens_the_first_message(make_tokenizer):
    tokenizer = make_tokenizer(MISTRAL, bos_token="<s>", eos_token="</s>")
    text, _ = encode(tokenizer, ROW, system_prompt="Be brief.")
    assert text.startswith("<s>[INST] Be brief.\n\nWhat is")


def test_the_plain_layout_is_fixed(tokenizer):
    text, labels = encode(tokenizer, ROW, template="plain", system_prompt="Be brief.")
    assert text == (
        "### System:\nBe brief.\n\n### User:\nWhat is two plus two?\n\n"
        "### Assistant:\nIt is four.<|im_end|>"
    )
    assert labels == "It is four.<|im_end|>"
    _, labels = encode(tokenizer, TURNS, template="plain")
    assert labels == "user<|im_end|>Because é 日本.\n\n  Really.<|im_end|>"


def test_without_a_chat_template_chat_is_plain(make_tokenizer):
    bare = make_tokenizer(None)
    assert encode(bare, ROW) == encode(bare, ROW, template="plain")


def test_text_is_all_answer_with_its_end(tokenizer):
    text, labels = encode(tokenizer, {"text": "To be, or not."})
    assert text == "To be, or not.<|im_end|>"
    assert text.endswith(labels)
    (example,) = RowEncoder(DataConfig(), tokenizer).encode([{"text": "To be."}]).examples
    assert (example.labels == NO_LOSS).tolist() == [True] + [False] * (len(example.labels) - 1)


def test_a_tokenizer_that_cannot_tell_characters_gets_segments():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    text, labels = encode(tokenizer, TURNS, template="plain")
    assert labels == "user</s>Because é 日本.\n\n  Really.</s>"
    assert text.startswith("### User:\nassistant\n\n### Assistant:\nuser</s>")


def test_long_rows_keep_their_beginning_and_are_counted(tokenizer):
    rows = [
        ROW,
        {"question": "x", "answer": "word " * 200},
        {"question": "y " * 200, "answer": "z"},
    ]
    config = DataConfig(max_length=64)
    whole = RowEncoder(DataConfig(max_length=5000), tokenizer).encode(rows)
    cut = RowEncoder(config, tokenizer).encode(rows)
    assert (cut.truncated, cut.dropped) == (1, 1)
    assert [len(e.input_ids) for e in cut.examples][1] == 64
    assert (cut.examples[1].input_ids == whole.examples[1].input_ids[:64]).all()
    assert (cut.examples[1].labels == whole.examples[1].labels[:64]).all()
    assert cut.tokens == sum(len(e.input_ids) for e in cut.examples)
    assert cut.label_tokens == sum(int((e.labels != NO_LOSS).sum()) for e in cut.examples)


def test_blank_rows_are_dropped_and_counted(tokenizer):
    encoded = RowEncoder(DataConfig(), tokenizer).encode([{"question": "a", "answer": ""}, ROW])
    assert (len(encoded.examples), encoded.dropped) == (1, 1)
    assert RowEncoder(DataConfig(), tokenizer).encode([]).examples == []


def test_order_is_kept_over_many_rows(tokenizer):
    rows = [{"text": f"row {number}"} for number in range(1100)]
    examples = RowEncoder(DataConfig(), tokenizer).encode(rows).examples
    assert [tokenizer.decode(e.input_ids[:-1]) for e in examples] == [r["text"] for r in rows]


def test_longer_than_the_model_takes_is_refused(tokenizer):
    RowEncoder(DataConfig(max_length=64), tokenizer, 64)
    with pytest.raises(ConfigError, match="max_length is 65, but the model takes 64"):
        RowEncoder(DataConfig(max_length=65), tokenizer, 64)


def test_a_dialogue_the_template_refuses_is_named(make_tokenizer):
    tokenizer = make_tokenizer(MISTRAL, bos_token="<s>", eos_token="</s>")
    late = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "system", "content": "b"},
            {"role": "assistant", "content": "c"},
        ]
    }
    with pytest.raises(DataError, match=r"refuses .* user, system, assistant: no system"):
        encode(tokenizer, late)


def test_a_template_that_hides_answers_is_named(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(DataError, match=r'does not print every assistant message.*"plain"'):
        encode(tokenizer, ROW)
