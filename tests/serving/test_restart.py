"""A killed server starts again on the same port, and never writes its key anywhere."""

import signal

import pytest
from throughput import Server


openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("transformers.cli.serving.server")

KEY = "secret-key-of-a-test"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_server_starts_again_on_its_port(model_folder, tmp_path, monkeypatch, number):
    monkeypatch.setenv("BD3LM_API_KEY", KEY)
    options, texts, port = {"model": "model", "prompt": "The dog", "max_tokens": 12, "seed": 3}, [], 0
    for _ in range(2):
        with open(tmp_path / "messages", "a") as messages:
            server = Server(str(model_folder), messages, port)
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
