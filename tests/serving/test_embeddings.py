"""POST /v1/embeddings: the engine's embeddings, in OpenAI's form."""

import base64
from typing import Any

import numpy as np
import pytest

from tests.serving.client import Client

PATH = "/v1/embeddings"
TEXTS = ["import os\n", "class Stack:\n    def push(self, item):\n", "x"]


def vectors(client: Client, **body: Any) -> list[np.ndarray]:
    return [np.array(own["embedding"]) for own in client.answer(PATH, **body)["data"]]


def test_an_answer_has_every_field(client: Client) -> None:
    answer = client.answer(PATH, model="demo", input=TEXTS, request_id="mine", user="ann")
    tokenizer = client.service.llm.engine.tokenizer
    num_tokens = sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert answer["usage"] == {
        "prompt_tokens": num_tokens,
        "completion_tokens": 0,
        "total_tokens": num_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert (answer["id"], answer["object"], answer["model"]) == ("embd-mine", "list", "demo")
    assert [(own["index"], own["object"]) for own in answer["data"]] == [(i, "embedding") for i in range(3)]
    width = client.service.llm.engine.model_config.hidden_size
    for own in answer["data"]:
        assert len(own["embedding"]) == width and np.linalg.norm(own["embedding"]) == pytest.approx(1)


def test_texts_token_ids_and_lists_of_them_are_alike(client: Client) -> None:
    tokens = [client.service.llm.engine.tokenizer.encode(text) for text in TEXTS]
    wanted = vectors(client, input=TEXTS)
    for found in (
        vectors(client, input=tokens),
        vectors(client, input=TEXTS[0]) + vectors(client, input=tokens[1]) + vectors(client, input=TEXTS[2]),
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_base64_holds_the_float32s(client: Client) -> None:
    coded = client.answer(PATH, input=TEXTS, encoding_format="base64")["data"]
    found = [np.frombuffer(base64.b64decode(own["embedding"]), "<f4") for own in coded]
    np.testing.assert_allclose(found, vectors(client, input=TEXTS), atol=1e-6)


def test_pooling_layer_and_length_are_the_clients_to_choose(client: Client) -> None:
    last, mean = vectors(client, input=TEXTS[1]), vectors(client, input=TEXTS[1], pooling="mean")
    assert abs(last[0] @ mean[0]) < 0.999
    [raw] = vectors(client, input=TEXTS[1], pooling="mean", normalize=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw), mean[0], atol=1e-5)
    [first] = vectors(client, input=TEXTS[2], layer=0, normalize=False)
    [token] = client.service.llm.engine.tokenizer.encode(TEXTS[2])
    np.testing.assert_allclose(first, client.service.llm.engine.runner.params["embed"][token], atol=1e-6)
    [cut] = vectors(client, input=TEXTS[1] + TEXTS[2], truncate_prompt_tokens=1)
    np.testing.assert_allclose(cut, vectors(client, input=TEXTS[2])[0], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"input": []}, "input", "input is empty"),
        ({"input": ""}, "input", "the prompt is empty"),
        ({"input": [[]]}, "input", "the prompt is empty"),
        ({"input": 5}, "input", "input"),
        ({"input": "x" * 100_000}, "input", "characters"),
        ({"input": [4096]}, None, "token id 4096 is out of the vocabulary of 4096"),
        ({"input": "x", "dimensions": 8}, "dimensions", "dimensions is refused: embeddings have the width"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "x", "pooling": "max"}, "pooling", "'last' or 'mean'"),
        ({"input": "x", "layer": 2}, None, r"layers must be within [-2, 1] with this model, got 2"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ({"input": "x", "temperature": 1}, "temperature", "temperature"),
    ],
)
def test_what_is_not_possible_is_refused_by_name(
    client: Client, body: dict[str, Any], param: str | None, message: str
) -> None:
    status, error = client.error(PATH, **body)
    assert status == 400 and error["param"] == param and message in error["message"]


def test_a_model_that_is_not_served_is_not_found(client: Client) -> None:
    assert client.error(PATH, model="other", input="x")[0] == 404
