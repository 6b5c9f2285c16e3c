"""LLM: the engine without sockets."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from zllm import LLM, SamplingParams
from zllm.errors import ConfigError, EngineError, InvalidRequest, Overloaded
from zllm.runtime.chat_template import ChatTemplate
from zllm.runtime.embedded import EMBEDDED_MODEL


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    made = LLM(device="cpu", num_kv_blocks=512, max_num_seqs=16)
    yield made
    made.close()


def ask(*questions: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": question}] for question in questions]


GREEDY = SamplingParams(temperature=0.0, max_tokens=60)


def test_answers_stand_in_the_order_of_the_questions(llm: LLM) -> None:
    outputs = llm.chat(ask("What is 12 + 7?", "Count from 3 to 9.", "What is 20 - 31?"), GREEDY)
    assert [output.outputs[0].text for output in outputs] == [
        "12 + 7 = 19",
        "3, 4, 5, 6, 7, 8, 9",
        "20 - 31 = -11",
    ]
    assert all(output.outputs[0].finish_reason == "eos" for output in outputs)
    llm.engine.scheduler.check()


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    prompts = ["12 + 7 =", "12 + 7 ="]
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (1, 3)]
    lengths = [len(o.outputs[0].token_ids) for o in llm.generate(prompts, params)]
    assert lengths[0] == 1
    assert lengths[1] >= 2


def test_what_is_left_out_is_as_the_checkpoint_wants_it(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(EMBEDDED_MODEL / name)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.0}')
    greedy = LLM(tmp_path, device="cpu", num_kv_blocks=64)
    outputs = greedy.generate([[7, 8, 9]] * 4, SamplingParams(ignore_eos=True))
    greedy.close()
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1


def test_an_output_says_how_much_of_its_prompt_was_cached(llm: LLM) -> None:
    llm.engine.flush_cache()
    prompt = [40 + token % 50 for token in range(100)]
    found = [llm.generate(prompt, GREEDY)[0].num_cached_tokens for _ in range(2)]
    assert found == [0, 100 // 16 * 16]


def test_the_chat_template_hears_of_tools_and_variables(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate("{{ tools[0].name }}, {{ mood }}: {{ messages[0].content }}")
    monkeypatch.setattr(llm, "chat_template", template)
    variables = {"mood": "calm"}
    (output,) = llm.chat(
        ask("Why?"), GREEDY, tools=[{"name": "weather"}], chat_template_kwargs=variables
    )
    assert output.prompt == "weather, calm: Why?"
    template.close()


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=60, stop="7, 8")
    (output,) = llm.chat(ask("Count from 3 to 12."), params)
    completion = output.outputs[0]
    assert completion.text == "3, 4, 5, 6, "
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "7, 8")


def test_a_stop_token_is_named_and_not_in_the_text(llm: LLM) -> None:
    assert llm.tokenizer is not None
    (comma,) = llm.tokenizer.encode(",")
    params = SamplingParams(temperature=0.0, max_tokens=60, stop_token_ids=[comma])
    (output,) = llm.chat(ask("Count from 3 to 12."), params)
    assert output.outputs[0].text == "3"
    assert output.outputs[0].stop_reason == comma


@pytest.mark.parametrize(("max_tokens", "reason"), [(60, "eos"), (2, "length")])
def test_only_a_stop_has_a_stop_reason(llm: LLM, max_tokens: int, reason: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    (output,) = llm.chat(ask("What is 12 + 7?"), params)
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (reason, None)


def test_an_answer_does_not_end_before_min_tokens(llm: LLM) -> None:
    (plain,) = llm.chat(ask("What is 12 + 7?"), GREEDY)
    assert len(plain.outputs[0].token_ids) < 30
    params = SamplingParams(temperature=0.0, max_tokens=60, min_tokens=30)
    (output,) = llm.chat(ask("What is 12 + 7?"), params)
    assert len(output.outputs[0].token_ids) >= 30


def test_with_min_tokens_fewer_stop_tokens_go_as_the_device_keeps_them(llm: LLM) -> None:
    many = {"stop_token_ids": range(100, 130), "temperature": 0.0, "max_tokens": 4}
    (output,) = llm.chat(ask("What is 12 + 7?"), SamplingParams(**many))
    assert output.outputs[0].finish_reason in ("length", "stop")
    with pytest.raises(InvalidRequest, match="at most 18") as caught:
        llm.chat(ask("What is 12 + 7?"), SamplingParams(min_tokens=1, **many))
    assert caught.value.field == "stopping.stop_token_ids"


def test_a_token_that_ends_it_is_in_the_text_only_where_asked(llm: LLM) -> None:
    (plain,) = llm.chat(ask("What is 12 + 7?"), GREEDY)
    end = plain.outputs[0].token_ids[4]
    assert llm.tokenizer is not None
    for keep in (False, True):
        for stop in ([], ["never"]):
            params = SamplingParams(
                temperature=0.0,
                stop=stop,
                stop_token_ids=[end],
                include_stop_str_in_output=keep,
            )
            (output,) = llm.chat(ask("What is 12 + 7?"), params)
            completion = output.outputs[0]
            assert (completion.finish_reason, completion.stop_reason) == ("stop", end)
            ids = completion.token_ids
            assert ids[-1] == end
            assert completion.text == llm.tokenizer.decode(ids if keep else ids[:-1])


@pytest.mark.parametrize("stop", [[], ["never"]])
@pytest.mark.parametrize(("skip", "end"), [(True, ""), (False, "<|im_end|>")])
def test_special_tokens_are_in_the_text_only_where_asked(
    llm: LLM, skip: bool, end: str, stop: list[str]
) -> None:
    params = SamplingParams(
        temperature=0.0,
        max_tokens=60,
        stop=stop,
        include_stop_str_in_output=True,
        skip_special_tokens=skip,
    )
    (output,) = llm.chat(ask("What is 12 + 7?"), params)
    assert output.outputs[0].text == "12 + 7 = 19" + end


def test_the_same_seed_gives_the_same_tokens_alone_and_in_a_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=2.0, max_tokens=20, seed=7, ignore_eos=True)
    others = SamplingParams(temperature=2.0, max_tokens=20, ignore_eos=True)
    prompt = "Count from 1 to 5."
    (alone,) = llm.generate(prompt, params)
    batch = llm.generate([prompt] * 12, [others] * 5 + [params] + [others] * 6)
    assert batch[5].outputs[0].token_ids == alone.outputs[0].token_ids
    assert batch[4].outputs[0].token_ids != batch[6].outputs[0].token_ids


def test_log_probabilities_add_up(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=3)
    (output,) = llm.generate("12 + 7 =", params)
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids)
    assert completion.cumulative_logprob == sum(each.logprob for each in completion.logprobs)


def test_0_log_probabilities_are_those_of_the_chosen_tokens_alone(llm: LLM) -> None:
    found = []
    for count in (0, 1):
        params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=count)
        (output,) = llm.generate("12 + 7 =", params)
        assert output.outputs[0].logprobs is not None
        found.append(output.outputs[0].logprobs)
    for chosen, with_the_best in zip(*found, strict=True):
        assert (len(chosen.top_ids), len(with_the_best.top_ids)) == (0, 1)
        assert chosen.logprob == pytest.approx(with_the_best.logprob)


@pytest.mark.parametrize(
    ("prompt", "field"), [([], "prompt"), ([5, 10**6], "token_ids"), ([1] * 2048, "prompt")]
)
def test_a_bad_prompt_is_refused(llm: LLM, prompt: list[int], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(["fine", prompt], GREEDY)
    assert caught.value.field == field
    assert not llm.engine.has_work()


@pytest.mark.parametrize(
    "prompt", [[40.5, 41.0], ["12", "13"], [[1, 2], [3, 4]], [[1], [2, 3]], [True], [10**30], None]
)
def test_what_is_neither_text_nor_ids_is_refused_and_not_read_as_ids(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="a text, or a list of integer ids") as caught:
        llm.generate([prompt], GREEDY)
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("params", [[None], {"temperature": 0.0}, [{"temperature": 0.0}]])
def test_what_are_no_parameters_is_told(llm: LLM, params: Any) -> None:
    with pytest.raises(InvalidRequest, match="SamplingParams") as caught:
        llm.generate(["12 + 7 ="], params)
    assert caught.value.field == "sampling"


@pytest.mark.parametrize(
    "messages", ["Why?", ["Why?"], {"role": "user", "content": "Why?"}, [[["Why?"]]]]
)
def test_what_is_no_conversation_is_told_what_one_is(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidRequest, match="a list of messages"):
        llm.chat(messages, GREEDY)


def test_one_conversation_is_known_by_its_messages(llm: LLM) -> None:
    (question,) = ask("What is 12 + 7?")
    for messages in (question, tuple(question), iter(question), [iter(question)]):
        (output,) = llm.chat(messages, GREEDY)  # type: ignore[arg-type]
        assert output.outputs[0].text == "12 + 7 = 19"
    with pytest.raises(InvalidRequest, match="role"):
        llm.chat([{"content": "a message without a role"}], GREEDY)


def test_ids_may_come_in_arrays_and_prompts_from_a_generator(llm: LLM) -> None:
    (expected,) = llm.generate([40, 41, 42], GREEDY)
    ids = np.array([40, 41, 42], np.uint32)
    for prompts in (ids, [ids], (ids for _ in range(1)), (40, 41, 42)):
        (output,) = llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
        assert output.prompt_token_ids == [40, 41, 42]
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids


def test_threads_that_share_it_take_turns(llm: LLM) -> None:
    def answers(_: int) -> list[str]:
        asked = [llm.chat(ask("What is 12 + 7?", "Count from 3 to 9."), GREEDY) for _ in range(5)]
        return [output.outputs[0].text for outputs in asked for output in outputs]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(answers, range(4)))
    assert found == [["12 + 7 = 19", "3, 4, 5, 6, 7, 8, 9"] * 5] * 4
    llm.engine.scheduler.check()


def test_closed_it_refuses_leaves_no_process_and_may_be_closed_again() -> None:
    before = psutil.Process().children()
    made = LLM(device="cpu", num_kv_blocks=64)
    made.chat(ask("What is 12 + 7?"), GREEDY)
    made.close()
    made.close()
    assert psutil.Process().children() == before
    with pytest.raises(EngineError, match="closed"):
        made.generate("12 + 7 =", GREEDY)


def test_a_bad_prompt_gives_up_those_that_run_already(llm: LLM) -> None:
    steps = llm.engine.load().steps
    a_full_step = [[7] * 1000] * (llm.engine.runner.max_num_batched_tokens // 1000 + 1)
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        llm.generate([*a_full_step, [10**6]], GREEDY)
    assert llm.engine.load().steps > steps, "nothing ran when the bad one was read"
    assert not llm.engine.has_work()
    assert llm.engine.load().running_requests == 0


def test_an_error_inside_a_step_is_what_the_caller_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = LLM(device="cpu", num_kv_blocks=64)

    def fail(*_: object) -> None:
        raise RuntimeError("of torch")

    monkeypatch.setattr(broken.engine.runner, "launch", fail)
    with pytest.raises(RuntimeError, match="of torch"):
        broken.generate([[1, 2, 3]] * 60)
    broken.close()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("load_format", "Dummy"),
        ("dtype", "int8"),
        ("device", "CPU"),
        ("kv_cache_dtype", "int8"),
        ("enable_prefix_caching", "false"),
        ("max_num_seqs", 2.5),
        ("num_kv_blocks", 0),
        ("swap_space_gib", float("inf")),
    ],
)
def test_a_bad_option_is_named_with_its_value(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{option} is {value!r}"):
        LLM(**{option: value})


def test_any_number_of_prompts_is_taken(llm: LLM) -> None:
    count = llm.engine.scheduler.stats()["admissions"]
    many = 5000  # more than a server would let wait
    outputs = llm.generate([[token % 500] for token in range(many)], SamplingParams(max_tokens=1))
    assert all(len(output.outputs[0].token_ids) == 1 for output in outputs)
    assert llm.engine.scheduler.stats()["admissions"] == count + many


def test_a_bound_that_the_caller_sets_is_kept() -> None:
    bounded = LLM(device="cpu", num_kv_blocks=64, max_queued_requests=2)
    try:
        with pytest.raises(Overloaded, match="max_queued_requests"):
            bounded.generate([[1], [2], [3]], SamplingParams(max_tokens=1))
    finally:
        bounded.close()


def test_a_folder_without_a_tokenizer_takes_token_ids(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(EMBEDDED_MODEL / name)
    bare = LLM(tmp_path, device="cpu", num_kv_blocks=64)
    (output,) = bare.generate([40, 41, 42], SamplingParams(temperature=0.0, max_tokens=3))
    assert len(output.outputs[0].token_ids) == 3
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        bare.generate("text")


def test_an_unknown_option_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_seqs"):
        LLM(device="cpu", max_seqs=3)
