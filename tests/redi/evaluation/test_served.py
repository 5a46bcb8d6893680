"""`engine: openai` against a real HTTP server that speaks the protocol, well and badly."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import write_jsonl

import redi.evaluation.served
from redi.config import EvalConfig
from redi.errors import RediError
from redi.evaluation.evaluate import evaluate
from redi.evaluation.served import Client, Completion, Unanswered, _retry_after

QUESTIONS = [{"id": f"q{i}", "problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(6)]


class Server(ThreadingHTTPServer):
    """Answers right for the first sample of a problem and wrong for the others, whatever the order;
    `trouble(number of the try, body)` may return something else to do first."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble = lambda attempt, body: None
        self.tries, self.bodies, self.times, self.headers = Counter(), [], [], []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            key = json.dumps(body, sort_keys=True)
            attempt = server.tries[key]
            server.tries[key] += 1
            server.bodies.append((self.path, body))
            server.times.append(time.monotonic())
            server.headers.append(dict(self.headers))
        trouble = server.trouble(attempt, body)
        self.answer(body) if trouble is None else trouble(self)

    def answer(self, body, **changes):
        said = body.get("prompt") or body["messages"][-1]["content"]
        a = int(said.split("+")[0].split()[-1])
        text = changes.pop("text", f"#### {2 * a + body['seed'] % 2}")
        finish = changes.pop("finish_reason", "stop")
        message = changes.pop("message", {"role": "assistant", "content": text})
        choice = {"text": text} if "prompt" in body else {"message": message}
        answer = {
            "choices": [{"index": 0, "finish_reason": finish, **choice}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 7},
        } | changes
        self.send(200, json.dumps(answer))

    def send(self, status, text, **headers):
        data = text.encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(redi.evaluation.served, "FIRST_PAUSE", 0.01)


@pytest.fixture
def config(server, tmp_path):
    data = write_jsonl(tmp_path / "test.jsonl", QUESTIONS)
    return EvalConfig(
        dataset_name=str(data), num_samples=3, engine="openai", base_url=server.url,
        max_new_tokens=50, concurrency=4, max_retries=3, request_timeout=10, num_workers=1,
    )  # fmt: skip


def changed(config, **fields):
    return config.model_copy(update=fields)


def rows(folder):
    return [json.loads(line) for line in (folder / "generations.jsonl").open()]


def test_every_sample_is_asked_once_and_graded(server, config, tmp_path):
    open_requests, most_open = set(), 0

    def overlap(attempt, body):
        # Over before the answer is sent: the client may send its next request while the handler
        # of the last one still winds up.
        nonlocal most_open
        with server.lock:
            open_requests.add(id(body))
            most_open = max(most_open, len(open_requests))
        time.sleep(0.05)
        with server.lock:
            open_requests.remove(id(body))

    server.trouble = overlap
    result = evaluate("some/model", config, tmp_path / "out")
    assert len(server.bodies) == len({json.dumps(b) for _, b in server.bodies}) == 18
    kept = rows(tmp_path / "out")
    assert {(row["id"], row["sample"]) for row in kept} == {
        (q["id"], sample) for q in QUESTIONS for sample in range(3)
    }
    right = sum(body["seed"] % 2 == 0 for _, body in server.bodies)
    assert 0 < right < 18  # or this test shows nothing
    assert result.pass_at_1 == pytest.approx(right / 18)
    assert result.metrics()["mean_tokens"] == 7
    assert 1 < most_open <= 4
    path, body = server.bodies[0]
    assert path == "/v1/chat/completions"
    assert body | {"seed": 0, "messages": 0} == {
        "model": "some/model", "temperature": 0.6, "top_p": 0.95, "max_tokens": 50, "seed": 0,
        "messages": 0,
    }  # fmt: skip
    assert "Authorization" not in server.headers[0]


def test_seeds_belong_to_samples(server, config, tmp_path):
    evaluate("m", config, tmp_path / "a")
    first = {json.dumps(body, sort_keys=True) for _, body in server.bodies}
    server.bodies.clear()
    evaluate("m", config, tmp_path / "b")
    assert {json.dumps(body, sort_keys=True) for _, body in server.bodies} == first
    server.bodies.clear()
    evaluate("m", changed(config, seed=1), tmp_path / "c")
    assert not {json.dumps(body, sort_keys=True) for _, body in server.bodies} & first


def test_prompts_prefix_and_key(server, config, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    config = changed(
        config, system_prompt="hi", prompt_template="add {problem}", answer_prefix="<think>\n",
        api_key_env="MY_KEY", max_problems=1, num_samples=1,
    )  # fmt: skip
    server.trouble = lambda attempt, body: (
        lambda handler: handler.answer({"messages": [{"content": "0+0"}], "seed": 0})
    )
    evaluate("m", config, tmp_path / "out")
    body = server.bodies[0][1]
    assert [m["content"] for m in body["messages"]] == ["hi", "add 0+0", "<think>\n"]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert rows(tmp_path / "out")[0]["text"] == "<think>\n#### 0"


def test_the_completions_api(server, config, tmp_path):
    config = changed(config, api="completions", prompt_template="Q {problem} A", max_problems=1)
    result = evaluate("m", config, tmp_path / "out")
    assert {(path, body["prompt"]) for path, body in server.bodies} == {
        ("/v1/completions", "Q 0+0 A")
    }
    assert result.correct_PN.shape == (1, 3)


def test_unfinished_and_parsed_thinking(server, config, tmp_path):
    def trouble(attempt, body):
        if body["messages"][0]["content"] == "1+1":
            return lambda handler: handler.answer(body, text="#### 2", finish_reason="length")
        message = {"content": "#### 4", "reasoning_content": "2 and 2"}
        return lambda handler: handler.answer(body, message=message)

    server.trouble = trouble
    result = evaluate("m", changed(config, num_samples=1, max_problems=3), tmp_path / "out")
    kept = {row["id"]: row for row in rows(tmp_path / "out")}
    assert (kept["q1"]["finished"], kept["q1"]["verdict"]) == (False, "wrong")
    assert kept["q2"]["text"] == "<think>2 and 2</think>#### 4"
    assert result.correct_PN[:, 0].tolist() == [False, False, True]


def test_half_a_surrogate_pair_can_be_kept(server, config, tmp_path):
    server.trouble = lambda attempt, body: lambda h: h.answer(body, text="\ud83d #### 0")
    evaluate("m", changed(config, num_samples=1, max_problems=1), tmp_path / "out")
    assert rows(tmp_path / "out")[0]["text"] == "? #### 0"


def drop(handler):
    handler.connection.close()


def cut_short(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.wfile.flush()
    handler.connection.close()


def hang(handler):
    time.sleep(60)


TROUBLES = {
    "429": lambda h: h.send(429, "slow down"),
    "500": lambda h: h.send(500, "oops"),
    "503": lambda h: h.send(503, "loading"),
    "dropped": drop,
    "cut short": cut_short,
    "garbage": lambda h: h.send(200, "<html>proxy error</html>"),
    "other json": lambda h: h.send(200, '{"detail": "?"}'),
    "a list": lambda h: h.send(200, "[]"),
    "no choices": lambda h: h.answer({"prompt": "0+0", "seed": 0}, choices=[]),
    "an error as a 200": lambda h: h.send(200, '{"error": {"message": "overloaded"}}'),
    "given up": lambda h: h.answer(
        {"messages": [{"content": "0+0"}], "seed": 0}, finish_reason="abort"
    ),
    "not utf-8": lambda h: h.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe"),
    "hangs": hang,
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_that_passes_changes_nothing(server, config, tmp_path, trouble):
    config = changed(config, max_problems=2, request_timeout=0.7)
    expected = evaluate("m", config, tmp_path / "calm").metrics()
    server.tries.clear()
    server.trouble = lambda attempt, body: TROUBLES[trouble] if attempt < 2 else None
    start = time.monotonic()
    assert evaluate("m", config, tmp_path / "storm").metrics() == expected
    assert set(server.tries.values()) == {3}
    assert time.monotonic() - start < 50


def test_retry_after_is_waited_for(server, config, tmp_path):
    server.trouble = lambda attempt, body: (
        (lambda h: h.send(429, "later", Retry_After="1")) if attempt == 0 else None
    )
    evaluate("m", changed(config, num_samples=1, max_problems=1), tmp_path / "out")
    assert 0.95 < server.times[1] - server.times[0] < 5


def test_retry_after_as_a_date():
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _retry_after("2.5") == 2.5
    assert _retry_after("soon") is _retry_after(None) is None


def test_a_server_that_never_recovers_loses_nothing(server, config, tmp_path):
    asked = [0]

    def dies(attempt, body):
        asked[0] += attempt == 0
        return None if asked[0] <= 7 else TROUBLES["500"]

    server.trouble = dies
    with pytest.raises(RediError, match=r"of 18 samples have no answer.*500.*oops.*are kept"):
        evaluate("m", config, tmp_path / "out")
    kept = rows(tmp_path / "out")
    assert 1 <= len(kept) < 18
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert max(server.tries.values()) == 4  # max_retries, and the first try
    assert len(server.tries) < 18  # it does not try all others in vain

    server.trouble = lambda attempt, body: None
    server.bodies.clear()
    resumed = evaluate("m", config, tmp_path / "out")
    # Distinct ones: the first evaluation's last retries may still be on their way.
    assert len({repr(body) for body in server.bodies}) == 18 - len(kept)
    assert rows(tmp_path / "out")[: len(kept)] == kept
    assert resumed.metrics() == evaluate("m", config, tmp_path / "whole").metrics()


def test_one_poisoned_problem_leaves_the_others_answered(server, config, tmp_path):
    server.trouble = lambda attempt, body: (
        TROUBLES["500"] if body["messages"][0]["content"] == "3+3" else None
    )
    config = changed(config, num_samples=4, concurrency=1)
    with pytest.raises(RediError, match=r"^4 of 24 samples have no answer"):
        evaluate("m", config, tmp_path / "out")
    assert {row["id"] for row in rows(tmp_path / "out")} == {"q0", "q1", "q2", "q4", "q5"}


def test_three_failures_among_many_answers_are_not_three_in_a_row(config, tmp_path, monkeypatch):
    """However many answers come back at once, the order counts."""
    seen = []

    def answers(client, requests):
        seen.append(len(requests))
        got = [Completion("#### 0", True, 7)] * len(requests)
        got[0] = got[4] = got[8] = Unanswered("oops")
        both = [(key, answer) for (key, _), answer in zip(requests, got, strict=True)]
        yield both[:12]
        yield both[12:]

    monkeypatch.setattr(Client, "answers", answers)
    with pytest.raises(RediError, match=r"^3 of 18 samples have no answer"):
        evaluate("m", config, tmp_path / "out")
    assert (seen, len(rows(tmp_path / "out"))) == ([18], 15)


@pytest.mark.parametrize("key", [" sk-secret\r\n", "sk-secret\n", "sk-secret"])
def test_white_space_around_the_key_is_no_part_of_it(server, config, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    Client(config).complete({"messages": [{"content": "4+4"}], "seed": 0})
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize("key", ["sk-\rsecret", "sk-\nsecret", "sk-\u201csecret", "sk-\x7fsecret"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(
    server, config, tmp_path, monkeypatch, key
):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(RediError, match="MY_KEY") as raised:
        evaluate("m", changed(config, api_key_env="MY_KEY"), tmp_path / "out")
    assert "secret" not in str(raised.value)
    assert not server.bodies


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "too long"),
        (401, "OPENAI_API_KEY"),
        (404, "is base_url right"),
        (422, "takes no request"),
    ],
)
def test_a_refusal_ends_it_at_once(server, config, tmp_path, status, words):
    server.trouble = lambda attempt, body: lambda h: h.send(status, "prompt too long")
    pattern = f"{status}.*too long.*{words}|{status}.*{words}|{words}.*{status}"
    with pytest.raises(RediError, match=pattern):
        evaluate("m", config, tmp_path / "out")
    assert max(server.tries.values()) == 1


def test_no_server_at_all(config, tmp_path):
    config = changed(config, base_url="http://127.0.0.1:9/v1", max_retries=1)
    with pytest.raises(RediError, match=r"^18 of 18 samples.*Connection refused"):
        evaluate("m", config, tmp_path / "out")


def test_a_torn_line_is_asked_again(server, config, tmp_path):
    evaluate("m", config, tmp_path / "out")
    file = tmp_path / "out" / "generations.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:10]) + lines[10][:20])
    (tmp_path / "out" / "metrics.json").unlink()
    server.bodies.clear()
    evaluate("m", config, tmp_path / "out")
    assert len(server.bodies) == 8
    assert sorted(map(str, rows(tmp_path / "out"))) == sorted(
        str(json.loads(line)) for line in lines
    )


def test_ctrl_c_waits_for_no_answer(server, config):
    """Python joins every thread at its end but daemons."""
    server.trouble = lambda attempt, body: lambda h: time.sleep(5)
    answers = Client(config).answers([(0, {"prompt": "0+0", "seed": 0})])
    threading.Thread(target=lambda: next(answers), daemon=True).start()
    while not server.bodies:
        time.sleep(0.01)
    joined = [t for t in threading.enumerate() if not t.daemon]
    assert joined == [threading.main_thread()]


def test_a_completion_is_read_as_it_stands(server, config):
    answer = Client(config).complete({"messages": [{"content": "4+4"}], "seed": 0})
    assert answer == Completion("#### 8", True, 7)


def test_settings_that_do_not_fit(config):
    settings = config.model_dump(exclude_unset=True)
    for change, message in (
        ({"base_url": None}, "go together"),
        ({"engine": "transformers"}, "go together"),
        ({"pairs_name": "pairs.jsonl"}, "log-probs"),
    ):
        with pytest.raises(ValueError, match=message):
            EvalConfig.model_validate(settings | change)


# What vLLM, SGLang, TGI, llama.cpp, OpenAI, Mistral, Anthropic's and Vertex' servers say.
@pytest.mark.parametrize(
    ("reason", "is_cut_off", "is_known"),
    [
        *(
            (reason, True, True)
            for reason in ("length", "max_tokens", "MAX_TOKENS", "model_length")
        ),
        *((reason, False, True) for reason in ("stop", "STOP", "eos_token", "stop_sequence")),
        *((reason, False, True) for reason in ("end_turn", "eos")),
        *((reason, False, False) for reason in (None, "", "content_filter", "SAFETY", "refusal")),
        *((reason, False, False) for reason in ("tool_calls", "repetition", "pause_turn")),
    ],
)
def test_only_what_was_cut_off_is_unfinished(
    server, config, tmp_path, capsys, reason, is_cut_off, is_known
):
    server.trouble = lambda attempt, body: lambda h: h.answer(body, finish_reason=reason)
    result = evaluate("m", changed(config, num_samples=4, max_problems=2), tmp_path / "out")
    assert set(result.finished_PN.ravel()) == {not is_cut_off}
    assert (result.pass_at_1 > 0) != is_cut_off
    said = f"8 answers end with finish_reason {reason!r}, which redi does not know"
    assert (said in capsys.readouterr().err) != is_known


@pytest.mark.parametrize("usage", [None, {}, {"completion_tokens": None}, {"prompt_tokens": 5}, []])
def test_tokens_that_nobody_counted_decide_nothing(server, config, tmp_path, usage):
    expected = evaluate("m", config, tmp_path / "counted")
    server.trouble = lambda attempt, body: lambda h: h.answer(body, usage=usage)
    result = evaluate("m", config, tmp_path / "not")
    assert (result.verdict_PN == expected.verdict_PN).all()
    assert result.metrics() == expected.metrics() | {"mean_tokens": None}


TEXT = {"type": "text", "text": "#### "}
PARTS = [
    ([TEXT, {"type": "text", "text": "0"}], {}, "#### 0"),
    (["#### ", "0"], {}, "#### 0"),
    ([TEXT, TEXT | {"text": "0"}], {"reasoning": "so"}, "<think>so</think>#### 0"),
    (
        [{"type": "thinking", "thinking": [{"type": "text", "text": "so"}]}, TEXT],
        {},
        "<think>so</think>#### ",
    ),
    (
        [{"type": "thinking", "thinking": "so", "signature": "x"}, TEXT],
        {},
        "<think>so</think>#### ",
    ),
    (None, {"reasoning_content": "so"}, "<think>so</think>"),
    (None, {"tool_calls": [{}]}, ""),
]


@pytest.mark.parametrize(("content", "more", "text"), PARTS)
def test_content_in_parts(server, config, content, more, text):
    message = {"role": "assistant", "content": content, **more}
    server.trouble = lambda attempt, body: lambda h: h.answer(body, message=message)
    got = Client(config).complete({"messages": [{"content": "0+0"}], "seed": 0})
    assert got.text == text


REFUSALS = {
    "400": lambda h: h.send(400, '{"error": {"message": "too long: 9999 tokens"}}'),
    "422": lambda h: h.send(422, "too long: 9999 tokens"),
    "a 200": lambda h: h.send(200, '{"object": "error", "message": "too long: 9999", "code": 400}'),
}


@pytest.mark.parametrize("how", REFUSALS)
def test_a_problem_that_the_server_refuses_is_named_and_the_rest_goes_on(
    server, config, tmp_path, capsys, how
):
    server.trouble = lambda attempt, body: (
        REFUSALS[how] if body["messages"][0]["content"] == "3+3" else None
    )
    result = evaluate("m", config, tmp_path / "out")
    told = capsys.readouterr().err
    assert "refuses 3 of 18 samples, which count as not solved: q3 (" in told
    assert "too long: 9999" in told
    assert result.verdict_PN[3].tolist() == ["refused"] * 3
    assert "refused" not in result.verdict_PN[[0, 1, 2, 4, 5]]
    assert result.metrics()["verdicts"]["refused"] == 3
    server.bodies.clear()
    assert evaluate("m", config, tmp_path / "out").metrics() == result.metrics()
    assert not server.bodies


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_said_and_takes_no_key_along(server, config, tmp_path, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    other = Server()
    threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
    place = other.url + "/chat/completions"
    server.trouble = lambda attempt, body: lambda h: h.send(status, "", Location=place)
    with pytest.raises(RediError, match=f"{status}.*redirects to {place}.*base_url"):
        evaluate("m", config, tmp_path / "out")
    other.shutdown()
    assert not other.headers
