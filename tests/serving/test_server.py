"""The server as its clients see it: the real `openai` package against 127.0.0.1."""

import asyncio
import http.client
import json
import logging
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest


openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("transformers.cli.serving.server")

from decoders import tiny_decoder  # noqa: E402
from generating import make_family  # noqa: E402
from shared_models import CLASSES, special_ids  # noqa: E402
from throughput import Server as ServerProcess  # noqa: E402

from bd3lm_hf.cli import main, make_verb_parser, run_verb  # noqa: E402
from bd3lm_hf.serving import serve_cli  # noqa: E402
from bd3lm_hf.serving.openai_api import error_content, openai_events  # noqa: E402


KEY = "secret-key-of-a-test"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"


class Server:
    """`bd3lm serve` in a thread."""

    def __init__(self, folder, *flags):
        arguments = make_verb_parser("serve").parse_args([str(folder), "--port", "0", "--name", "tiny", *flags])
        key = serve_cli.check(arguments)
        self.listener = serve_cli.listen(arguments.host, arguments.port)
        self.app = serve_cli.load_app(arguments, key)
        self.port = self.listener.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, key="none"):
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)

    @contextmanager
    def answer(self, method, path, data=None, **headers):
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, data, {"Content-Type": "application/json", **headers})
            yield connection.getresponse()

    def post(self, body, path="/v1/completions", **headers):
        with self.answer("POST", path, body if isinstance(body, str) else json.dumps(body), **headers) as answer:
            return answer.status, json.loads(answer.read())

    def get(self, path):
        with self.answer("GET", path) as answer:
            return answer.status, answer.read().decode()

    def events(self, body, path):
        """Return the content type and the events of a streamed answer, as they are sent."""
        with self.answer("POST", path, json.dumps({**body, "stream": True})) as answer:
            parts = answer.read().decode().split("\n\n")
        assert parts.pop() == "" and all(part.startswith("data: ") for part in parts)
        return answer.getheader("Content-Type"), [part.removeprefix("data: ") for part in parts]

    def close(self):
        self.server.should_exit = True
        self.thread.join(timeout=20)
        self.app.state.batcher.close()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, _tiny_tokenizer_json):
    from conftest import make_tiny_tokenizer

    def make(family="bd3lm", chat=True):
        folder = tmp_path_factory.mktemp(family)
        tokenizer = make_tiny_tokenizer(_tiny_tokenizer_json)
        if chat:
            tokenizer.chat_template = TEMPLATE
        fields = {"vocab_size": len(tokenizer), **special_ids(tokenizer), "eos_token_id": None, "model_length": 32}
        make = make_family if family in CLASSES else tiny_decoder
        make(family, **fields).float().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def server(folder_of):
    with closing(Server(folder_of())) as server:
        yield server


PROMPT, MESSAGES = {"prompt": "The dog"}, {"messages": [{"role": "user", "content": "The dog"}]}


@pytest.mark.parametrize("own_event", [False, True])
@pytest.mark.parametrize(("path", "asked"), [("/v1/completions", PROMPT), ("/v1/chat/completions", MESSAGES)])
def test_events_are_those_of_openai(server, path, asked, own_event):
    body = {**asked, "model": "tiny", "max_tokens": 40, "seed": 7}
    status, whole = server.post(body, path)
    kind, events = server.events({**body, "stream_options": {"include_usage": own_event}}, path)
    assert status == 200 and kind.startswith("text/event-stream") and events.pop() == "[DONE]"
    events = [json.loads(event) for event in events]
    assert {event["model"] for event in events} == {whole["model"]} == {"tiny"}
    assert [event["usage"] for event in events if "usage" in event] == [events[-1]["usage"]] == [whole["usage"]]
    assert bool(events[-1]["choices"]) != own_event
    choices = [choice for event in events for choice in event["choices"]]
    assert len(choices) > 2  # a window of 32 tokens has several rounds
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert {choice["logprobs"] for choice in [*choices, *whole["choices"]]} == {None}
    if asked is PROMPT:
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    else:
        assert choices[0]["delta"] == {"role": "assistant"}
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == whole["choices"][0]["message"]["content"]


def test_an_answer_can_be_sent_back_as_clients_dump_it(server):
    client, messages = server.client(), [{"role": "user", "content": "Hello"}]
    for _ in range(2):  # the window has room for two answers
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, seed=1)
        messages.append(answer.choices[0].message.model_dump())  # with all its null fields
    assert "tool_calls" in messages[-1]


@pytest.mark.parametrize("family", ["bd3lm", "ar", "mdlm", "sedd", "qwen3", "gpt2"])
def test_every_family_completes_and_chats(folder_of, family):
    with closing(Server(folder_of(family))) as server:
        client = server.client()
        options = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "seed": 1}
        answer = client.chat.completions.create(**options)
        chunks = list(client.chat.completions.create(**options, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == answer.choices[0].message.content != ""
        assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason == "length"
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens == 12
        body = {"prompt": "The dog", "max_tokens": 40, "seed": 7}
        (status, answer), (_, again), (_, other) = (server.post({**body, "seed": seed}) for seed in (7, 7, 8))
        assert status == 200 and answer["choices"] == again["choices"] != other["choices"]
        chunks = list(client.completions.create(model="tiny", **body, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == answer["choices"][0]["text"]


def test_transformers_chat_talks_to_the_server(server, monkeypatch, capsys):
    chat = pytest.importorskip("transformers.cli.chat")
    typed = iter(["The dog", "!clear", "A block of text", "!exit"])
    monkeypatch.setattr(chat.RichInterface, "input", lambda self: next(typed))
    monkeypatch.setattr(chat.RichInterface, "confirm", lambda self, message: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # else it makes no calls
    shown, show = [], chat.RichInterface.stream_output

    async def recorded(interface, stream):
        shown.append(await show(interface, stream))
        return shown[-1]

    monkeypatch.setattr(chat.RichInterface, "stream_output", recorded)
    flags = ["max_new_tokens=16", "do_sample=True"]
    chat.Chat("tiny", f"http://127.0.0.1:{server.port}/v1", flags, user="me")
    assert [reason for _, reason in shown] == ["length"] * 2 and all(text for text, _ in shown)
    assert "already loaded" in capsys.readouterr().out


def test_fields_of_generate_come_from_extra_body_and_from_generation_config(server):
    client = server.client()
    options = {"model": "tiny", "prompt": "The", "max_tokens": 8, "seed": 1}
    fields = {"sampler": "confidence", "confidence_threshold": 0.5}
    one = client.completions.create(**options, extra_body=fields)
    two = client.completions.create(**options, extra_body={"generation_config": json.dumps(fields)})
    assert one.choices[0].text == two.choices[0].text
    greedy = [client.completions.create(**{**options, "seed": seed}, temperature=0) for seed in (1, 2)]
    assert greedy[0].choices[0].text == greedy[1].choices[0].text


def test_a_stop_string_is_left_out(server):
    client = server.client()
    options = {"model": "tiny", "prompt": "The dog", "max_tokens": 30, "seed": 7}
    text = client.completions.create(**options).choices[0].text
    assert client.completions.create(**options, stop="").choices[0].text == text
    pieces = [text[at : at + 5] for at in range(3, len(text) - 5, 7)]
    stops = [text[len(text) // 2], *(piece for piece in pieces if "\ufffd" not in piece)]
    assert len(stops) > 1  # the longer ones begin in one token and end in another
    for stop in (*stops, text[-6:]):  # the last one ends with the last token that is allowed
        answer = client.completions.create(**options, stop=["never", stop])
        assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"
        chunks = list(client.completions.create(**options, stop=stop, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
        assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"prompt": "a", "colour": 1}, 422, "colour"),
        ({"prompt": "a", "n": 2}, 400, "n=2"),
        ({"prompt": "a", "logprobs": 3}, 400, "logprobs=3"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature='hot'"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens=0"),
        ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens=1.5"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix='b'"),
        ({"prompt": "a", "logit_bias": {"1": 2}}, 400, "logit_bias"),
        ({"prompt": "a", "stop": 3}, 400, "stop=3"),
        ({"prompt": "a", "stream": "yes"}, 400, "stream='yes'"),
        ({"prompt": "a", "generation_config": {"max_new_tokens": "many"}}, 400, "max_new_tokens='many'"),
        ({"prompt": "a", "generation_config": {"num_beams": 4}}, 400, "num_beams=4"),
        ({"prompt": "a", "generation_config": {"min_new_tokens": 4}}, 400, "min_new_tokens=4"),
        ({"prompt": "a", "seed": "x"}, 400, "seed='x'"),
        ({"prompt": "a", "stop": [1]}, 400, "stop=[1]"),
        ({"prompt": "a", "sampler": "dice"}, 400, "dice"),
        ({"prompt": "a", "generation_config": "{"}, 400, "generation_config"),
        ({"prompt": "a", "generation_config": {"colour": 1}}, 400, "colour"),
        ({"prompt": ["a", "b"]}, 400, "prompt"),
        ({"prompt": "a", "model": "other"}, 400, "other"),
        ({"prompt": "a", "do_sample": "yes"}, 400, "do_sample='yes'"),
        ({"prompt": "a", "top_k": -1}, 400, "top_k"),
        ({"prompt": "a", "top_p": 1.5}, 400, "top_p=1.5"),
        ({"prompt": "a", "min_p": 2}, 400, "min_p"),
        ({"prompt": "a", "repetition_penalty": 0}, 400, "penalty"),
        ({"prompt": "a", "generation_config": {"typical_p": -1}}, 400, "typical_p=-1"),
        ({"prompt": "a", "generation_config": {"bad_words_ids": [[10**6]]}}, 400, "1000000"),
        ({"prompt": "a", "stream_options": 3}, 400, "stream_options=3"),
        ({"prompt": "\ud800"}, 400, "surrogates"),
        ("{", 400, "JSON"),
        ("[]", 400, "object"),
    ],
)
def test_bad_requests_are_refused_by_name(server, body, status, named):
    for request in (body, {"stream": True, **body} if isinstance(body, dict) else body):
        found, answer = server.post(request)
        assert found == status == answer["error"]["code"] and named in answer["error"]["message"]


def test_a_body_that_is_too_large_is_refused(server):
    status, answer = server.post({"prompt": "a" * 30 * 2**20})
    assert status == 413 and "bytes" in answer["error"]["message"]


def test_a_failure_after_the_first_text_is_an_event_and_a_client_that_leaves_closes_the_stream():
    role = {"choices": [{"index": 0, "delta": {"role": "assistant"}}]}
    text = {"choices": [{"index": 0, "delta": {"content": "naïve\n\n"}}]}
    closed = []

    async def stream():  # of transformers' handler
        try:
            yield f"data: {json.dumps(role)}\n\ndata: {json.dumps(text)}\n\n"
            yield f"data: {json.dumps({'error': json.dumps(error_content(400, 'top_k'))})}\n\n"
        finally:
            closed.append(True)

    async def read(count):
        events = await openai_events(stream(), False)
        found = [await anext(events) for _ in range(count)]
        await events.aclose()
        return found, len(closed)

    assert asyncio.run(read(1))[1] == 1
    (role, text, fault, done), _ = asyncio.run(read(4))
    assert json.loads(text.removeprefix("data: "))["choices"][0]["delta"]["content"] == "naïve\n\n"
    assert json.loads(fault.removeprefix("data: "))["error"] == error_content(400, "top_k")
    assert (role.count("\n\n"), text.count("\n\n"), done) == (1, 1, "data: [DONE]\n\n")


def test_invalid_messages_and_a_model_without_a_template_are_refused(server, folder_of):
    user = {"role": "user", "content": "hi"}
    for fields, named in (
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [user, "hi"]}, "messages[1]"),
        ({"messages": [{"content": "hi"}]}, "messages[0]"),
        ({"messages": [{**user, "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{**user, "tool_calls": [3]}]}, "messages[0].tool_calls"),
        ({"messages": [{**user, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "tool_calls"),
        ({"messages": [user], "tools": 3}, "tools=3"),
        ({"messages": [user], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"messages": [user], "chat_template_kwargs": 3}, "chat_template_kwargs=3"),
    ):
        status, answer = server.post(fields, "/v1/chat/completions")
        assert status == 400 and named in answer["error"]["message"]
    with closing(Server(folder_of(chat=False))) as plain:
        status, answer = plain.post({"messages": [user]}, "/v1/chat/completions")
    assert status == 400 and "chat template" in answer["error"]["message"]


def test_a_prompt_beyond_the_window_is_refused_and_a_literal_mask_token_is_text(server):
    for body, path in (
        ({"prompt": "The dog sleeps. " * 40}, "/v1/completions"),
        ({"messages": [{"role": "user", "content": "The dog sleeps. " * 40}]}, "/v1/chat/completions"),
    ):
        for stream in (False, True):
            status, answer = server.post({**body, "max_tokens": 8, "stream": stream}, path)
            assert status == 400 and "window of 32" in answer["error"]["message"]
    status, answer = server.post({"prompt": "A <mask> b", "max_tokens": 8, "seed": 0})
    assert status == 200 and answer["usage"]["completion_tokens"] == 8 and "<mask>" not in answer["choices"][0]["text"]


def test_sixteen_clients_at_once_get_what_each_gets_alone(server):
    def ask(number):
        body = {"prompt": "The " * (number + 1), "max_tokens": 10 + number, "seed": number}
        return server.post(body)[1]["choices"][0]["text"]

    alone = [ask(number) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == alone


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_request(server, stream):
    statistics = server.app.state.batcher.statistics
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        body = json.dumps({"prompt": "a", "max_tokens": 100_000, "stream": stream})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        while not statistics()["requests_running"]:
            time.sleep(0.01)
        if stream:
            with connection.getresponse() as answer:
                assert answer.readline().startswith(b"data: ")
    deadline = time.monotonic() + 30
    while statistics()["requests_running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert statistics()["requests_running"] == 0


def test_models_health_and_metrics_are_served(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == [client.models.retrieve("tiny").id] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.models.retrieve("other")
    batcher = server.app.state.batcher
    batcher.tokens += 12_345_678
    assert f"bd3lm_tokens_generated {batcher.tokens}\n" in server.get("/metrics")[1]
    batcher.tokens -= 12_345_678
    assert "ok" in server.get("/health")[1] and server.get("/reset")[0] == 404


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_worker_has_died_answers_503(folder_of, monkeypatch):
    def broken():
        raise OSError("a fault that no request has caused")

    with closing(Server(folder_of())) as server:
        monkeypatch.setattr(server.app.state.batcher, "_admit", broken)
        assert [server.post({"prompt": "a"})[0] for _ in range(2)] == [500, 503]
        assert server.post({"prompt": "a", "stream": True})[0] == 503
        assert server.get("/health")[0] == 503


def test_a_server_with_a_key_and_a_full_queue(folder_of, monkeypatch, caplog, capfd):
    monkeypatch.setenv("BD3LM_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server = Server(folder_of(), "--max-batch-size", "1", "--max-waiting", "1")
    for key in ("wrong", KEY[:-1], f"{KEY}x", "é"):
        status, answer = server.post({"prompt": "a"}, Authorization=f"Bearer {key}")
        assert status == 401 and KEY not in str(answer)
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").completions.create(model="tiny", prompt="a")
    faults = ({"prompt": "a", "n": 2}, {"prompt": [1]}, {"prompt": "a", "model": "other"}, "{", {"prompt": "a " * 90})
    for fault in faults:
        status, answer = server.post(fault, Authorization=f"bearer {KEY}")
        assert status == 400 and KEY not in str(answer)
    client = server.client(KEY)
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).usage.completion_tokens == 2
    streams = [client.completions.create(model="tiny", prompt="a", max_tokens=100_000, stream=True)]
    next(iter(streams[0]))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.completions.create, model="tiny", prompt="a", max_tokens=2)
        while not server.app.state.batcher.statistics()["requests_waiting"]:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="tiny", prompt="a", max_tokens=2)
        streams[0].close()
        assert waiting.result().usage.completion_tokens == 2
    server.close()
    # The server's own lines: the clients run in this process too, and theirs are not checked.
    lines = [record.getMessage() for record in caplog.records if record.name.startswith(("uvicorn", "transformers"))]
    assert KEY not in "".join((*lines, *capfd.readouterr()))


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        (("--max-waiting", "0"), ()),
        (("--port", "70000"), ()),
        (("--nucleus-p", "2"), ()),
        (("--sampler", "x"), ()),
        (("--host", "0.0.0.0"), ("127.0.0.1", "BD3LM_API_KEY", "--api-key")),
    ],
)
def test_bad_flags_are_refused_before_a_model_is_loaded(capsys, flag, parts):
    assert main(["serve", "no-such-model", *flag]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in (*flag, *parts)) and "***" not in message


def test_a_port_in_use_and_a_field_that_the_model_lacks(server, folder_of):
    with pytest.raises(OSError, match=f"--port {server.port}"):
        run_verb("serve", ["no-such-model", "--port", str(server.port)])
    with pytest.raises(ValueError, match="sampler"):
        run_verb("serve", [str(folder_of("ar")), "--port", "0", "--sampler", "entropy_bound"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_server_starts_again_on_its_port(model_folder, tmp_path, monkeypatch, number):
    monkeypatch.setenv("BD3LM_API_KEY", KEY)
    options, texts, port = {"model": "model", "prompt": "The dog", "max_tokens": 12, "seed": 3}, [], 0
    for _ in range(2):
        with open(tmp_path / "messages", "a") as messages:
            server = ServerProcess(str(model_folder), messages, port)
        port = port or server.port
        assert server.port == port
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=60)
        texts.append(client.completions.create(**options).choices[0].text)
        # It is killed while it generates.
        stream = iter(client.completions.create(**{**options, "max_tokens": 100_000}, stream=True))
        next(stream)
        server.process.send_signal(number)
        server.process.wait(timeout=30)
        with pytest.raises(openai.APIConnectionError):
            client.completions.create(**options)
        assert server.process.stdout is not None
        with server.process.stdout as output:
            assert KEY not in output.read()
    assert texts[0] == texts[1] != ""
    written = (tmp_path / "messages").read_text()
    assert KEY not in written and "Traceback" not in written
