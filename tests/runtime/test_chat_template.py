"""Renders as transformers does, and no template takes the server with it."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from tests.runtime.test_tokenizer import QWEN3, needs_qwen3
from zllm.errors import InvalidRequest, ModelLoadError
from zllm.runtime.chat_template import ChatTemplate, load_chat_template
from zllm.runtime.embedded import EMBEDDED_MODEL

USER = {"role": "user", "content": "What is 12 + 7?"}
ANSWER = {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n19 & <b>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a <city> & its 'region', \u00e9t\u00e9",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Orl\u00e9ans"}}}],
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "turns": [USER, ANSWER, {"role": "user", "content": "  and\n\n8 + 5? \U0001f600"}],
    "tool answers": [
        USER, CALL, {"role": "tool", "content": "rain"}, {"role": "tool", "content": "sun"},
    ],
    "ends with the assistant": [USER, ANSWER],
    "thinks as a field": [USER, {**ANSWER, "content": "19", "reasoning_content": "Hm."}, USER],
}  # fmt: skip


def _child_of(template: ChatTemplate) -> int:
    assert template._renderer is not None
    return template._renderer._process.pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_whole_group_ends_no_renderer(number: signal.Signals) -> None:
    """A service manager's reaches every process, and what runs is still to be answered."""
    with closing(ChatTemplate("{{ messages[0].content }}")) as template:
        assert template.render([USER]) == USER["content"]
        child = _child_of(template)
        os.kill(child, number)
        assert template.render([USER]) == USER["content"]
        assert _child_of(template) == child


def test_a_renderer_that_is_killed_costs_no_request() -> None:
    with closing(ChatTemplate("{{ messages[0].content }}")) as template:
        template.render([USER])
        os.kill(_child_of(template), signal.SIGKILL)
        assert template.render([USER]) == USER["content"]


@pytest.fixture(scope="module")
def qwen3() -> Iterator[ChatTemplate]:
    template = load_chat_template(QWEN3)
    assert template is not None
    yield template
    template.close()


@needs_qwen3
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
@pytest.mark.parametrize("tools", [None, [WEATHER], [WEATHER, WEATHER]], ids=["0", "1", "2"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_qwen3_renders_as_transformers_does(
    qwen3: ChatTemplate, name: str, tools: list[Any] | None, variables: dict[str, Any]
) -> None:
    source = json.loads((QWEN3 / "tokenizer_config.json").read_text())["chat_template"]
    for generation_prompt in (True, False):
        (expected,), _ = render_jinja_template(
            conversations=[CONVERSATIONS[name]],
            tools=tools,
            chat_template=source,
            add_generation_prompt=generation_prompt,
            **variables,
        )
        made = qwen3.render(
            CONVERSATIONS[name],
            tools=tools,
            variables={**variables, "add_generation_prompt": generation_prompt},
        )
        assert made == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ tools | tojson }} {{ tools | tojson(indent=2) }} {{ messages | tojson }}",
        "{% for m in messages %}\n  {% if loop.first %}\n a\n  {% endif %}\n  b\n{% endfor %}\n",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}x{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% endfor %}{{ ns.n }}{{ missing is defined }}{{ messages[-1].content.split(' ')[1:] }}",
        "{% macro f(x) %}<{{ x | trim | upper }}>{% endmacro %}{{ f(messages[0].content) }}",
        "{{ strftime_now('%Y') }}",
    ],
)
def test_the_environment_is_transformers(source: str) -> None:
    template = ChatTemplate(source)
    (expected,), _ = render_jinja_template(
        conversations=[CONVERSATIONS["turns"]], tools=[WEATHER], chat_template=source
    )
    made = template.render(
        CONVERSATIONS["turns"], tools=[WEATHER], variables={"add_generation_prompt": False}
    )
    template.close()
    assert made == expected


def test_the_embedded_model_speaks_chatml() -> None:
    template = load_chat_template(EMBEDDED_MODEL)
    assert template is not None
    assert template.render([{"role": "system", "content": "Be brief."}, USER]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(InvalidRequest, match="the role robot is none of system, user, assistant"):
        template.render([{"role": "robot", "content": "beep"}])
    template.close()


def test_whole_numbers_of_a_protobuf_struct_are_integers() -> None:
    template = ChatTemplate("{{ budget }} {{ nested.n }} {{ share }}")
    variables = {"budget": 100.0, "nested": {"n": 2.0}, "share": 0.5}
    assert template.render([USER], variables=variables) == "100 2 0.5"
    template.close()


def test_a_variable_cannot_replace_the_conversation() -> None:
    template = ChatTemplate("{{ messages }}")
    with pytest.raises(InvalidRequest, match=r"chat\.template_kwargs: 'messages'"):
        template.render([USER], variables={"messages": []})


@pytest.mark.parametrize("name", ["self", "args", "kwargs", "source", "context", "", "no name"])
def test_a_variable_may_have_any_other_name(name: str) -> None:
    with closing(ChatTemplate("{{ messages[0].content }}")) as template:
        assert template.render([USER], variables={name: 1}) == USER["content"]


HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "one long operation": "{{ (messages | length + 1) ** 99999999 ** 2 }}",
    "a huge string": "{{ 'a' * 10 ** 10 }}",
    "a string that doubles": "{% set ns = namespace(s='aa') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "endless output": "{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "the interpreter": "{{ messages.__class__.__base__.__subclasses__() }}",
    "a change of its arguments": "{{ messages.append(1) }}",
    "a refusal": "{{ raise_exception('only one turn') }}",
    "an undefined name": "{{ nothing.at.all }}",
    "a wrong type": "{{ 1 + 'a' }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_fails_costs_one_request(name: str) -> None:
    template = ChatTemplate("{% if hostile %}" + HOSTILE[name] + "{% endif %}ok", max_seconds=0.3)
    for _ in range(2):
        with pytest.raises(InvalidRequest) as caught:
            template.render([USER], variables={"hostile": True})
        assert caught.value.field == "chat"
        assert template.render([USER]) == "ok"
    template.close()


def test_the_reason_is_told() -> None:
    for name, reason in (
        ("loops", "it took more than 0.3 s"),
        ("a huge string", "it took more than 1024 MiB of memory"),
        ("endless output", "it wrote more than 1000 characters"),
        ("a refusal", "only one turn"),
    ):
        template = ChatTemplate(HOSTILE[name], max_seconds=0.3, max_chars=1000)
        with pytest.raises(InvalidRequest, match=reason):
            template.render([USER])
        template.close()


def test_threads_each_get_their_own_answer() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    wrong = []

    def ask(number: int) -> None:
        for turn in range(50):
            content = f"{number} {turn}"
            if template.render([{"role": "user", "content": content}]) != content:
                wrong.append(content)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    template.close()
    assert wrong == []


def test_a_template_that_does_not_parse_is_found_at_start_up() -> None:
    with pytest.raises(ModelLoadError, match=r"chat template does not parse, line 2"):
        ChatTemplate("\n{% for %}")


def write_config(folder: Path, **config: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def rendered(folder: Path, **kwargs: Any) -> str:
    template = load_chat_template(folder)
    assert template is not None
    text = template.render([USER], **kwargs)
    template.close()
    return text


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    write_config(tmp_path, eos_token="</s>")
    assert load_chat_template(tmp_path) is None


def test_special_tokens_are_known_to_the_template(tmp_path: Path) -> None:
    write_config(
        tmp_path,
        bos_token={"content": "<s>", "lstrip": False},
        eos_token="</s>",
        pad_token=None,
        chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}",
    )
    assert rendered(tmp_path) == "<s>What is 12 + 7?</s>"


def test_named_templates_are_chosen_by_whether_there_are_tools(tmp_path: Path) -> None:
    write_config(
        tmp_path,
        chat_template=[
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "{{ tools[0].function.name }}"},
        ],
    )
    assert rendered(tmp_path) == "plain"
    assert rendered(tmp_path, tools=[WEATHER]) == "weather"


def test_a_jinja_file_goes_before_the_config(tmp_path: Path) -> None:
    write_config(tmp_path, chat_template="config", bos_token="<s>")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
    assert rendered(tmp_path) == "<s>file"


def transformers_files(folder: Path, templates: dict[str, str]) -> Any:
    """What transformers writes for named templates; its tokenizer."""
    saved = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    saved.chat_template = templates
    saved.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["plain", "tools"])
@pytest.mark.parametrize("names", [["default", "tool_use"], ["default", "rag"]], ids=str)
def test_named_templates_may_be_files(
    tmp_path: Path, names: list[str], tools: list[Any] | None
) -> None:
    templates = {name: f"{name} {{{{ tools | tojson }}}}" for name in names}
    reference = transformers_files(tmp_path, templates)
    assert (tmp_path / "additional_chat_templates" / f"{names[1]}.jinja").is_file()
    expected = reference.apply_chat_template([USER], tools=tools, tokenize=False)
    assert rendered(tmp_path, tools=tools) == expected


def test_files_go_before_the_configs_named_templates(tmp_path: Path) -> None:
    transformers_files(tmp_path, {"default": "file", "rag": "rag file"})
    names = [{"name": name, "template": "config"} for name in ("default", "tool_use")]
    write_config(tmp_path, chat_template=names, tokenizer_class="Qwen2Tokenizer")
    reference = AutoTokenizer.from_pretrained(tmp_path)
    expected = reference.apply_chat_template([USER], tools=[WEATHER], tokenize=False)
    assert rendered(tmp_path, tools=[WEATHER]) == expected == "file"


@pytest.mark.parametrize("wrong", [5, {"name": "x"}, [{"name": "default"}], ["text"], [{}]])
def test_what_is_no_template_is_told(tmp_path: Path, wrong: object) -> None:
    write_config(tmp_path, chat_template=wrong)
    with pytest.raises(ModelLoadError, match="chat_template must be a text"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize("name", ["chat_template", "additional_chat_templates/tool_use"])
def test_a_template_that_is_no_text_is_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.jinja"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelLoadError, match=rf"{name}\.jinja cannot be read"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_a_corrupt_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json cannot be read"):
        load_chat_template(tmp_path)
