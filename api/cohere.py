"""Cohere's and Jina's dialect: POST /v1/rerank and /v2/rerank. Its errors' form is in
api/errors.py.

https://docs.cohere.com/reference/rerank and https://api.jina.ai/docs
"""

from typing import Any

from flask import Blueprint

from api.endpoint import endpoint
from api.schemas import CohereRanking, CohereRerankRequest
from api.scoring import ranked, refuse_pictures, top
from api.service import Service
from engine.errors import InvalidInput
from scores import Most
from server.messages import current


def blueprint(service: Service) -> Blueprint:
    """The routes."""
    routes = Blueprint("cohere", __name__)

    @routes.post("/v1/rerank")
    @endpoint(CohereRanking, CohereRerankRequest, further={501: None})
    def rerank_v1(body: CohereRerankRequest) -> object:
        """Score documents for a query, the best first, as Cohere's first version and Jina do."""
        return _rerank(service, body, "1")

    @routes.post("/v2/rerank")
    @endpoint(CohereRanking, CohereRerankRequest, further={501: None})
    def rerank_v2(body: CohereRerankRequest) -> object:
        """Score documents for a query, the best first, as Cohere's second version does."""
        return _rerank(service, body, "2")

    return routes


def _rerank(service: Service, body: CohereRerankRequest, version: str) -> object:
    if body.rank_fields not in (None, ["text"]):
        message = f'rank_fields is {body.rank_fields}; only ["text"] is ranked over'
        raise InvalidInput(message, field="rank_fields")
    count = top(body.top_n)
    try:
        texts = [_text(document, index) for index, document in enumerate(body.documents)]
    except InvalidInput as error:
        raise error.at("$.documents[{}]") from None
    refuse_pictures(texts, "$.documents[{}]")
    most = Most(body.max_tokens_per_doc, body.max_chunks_per_doc)
    scorer, scored = service.rerank(body.query, texts, "documents", body.model, most=most)
    results: list[dict[str, object]] = []
    for index in ranked(scored)[:count]:
        score = float(scorer.probabilities(scored[index].raw)[0])
        entry: dict[str, object] = {"index": index, "relevance_score": score}
        if body.return_documents:
            sent = body.documents[index]
            entry["document"] = {"text": sent} if isinstance(sent, str) else sent
        results.append(entry)
    tokens = sum(each.tokens for each in scored)
    return {
        "id": current.get().id,
        "model": body.model or scorer.manifest.name,
        "object": "list",
        "results": results,
        "meta": {"api_version": {"version": version}},
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _text(document: str | dict[str, Any], index: int) -> str:
    """Raises: InvalidInput for an object without a text."""
    text = document if isinstance(document, str) else document.get("text")
    if not isinstance(text, str):
        raise InvalidInput("an object without a field `text` that is a string", index)
    return text
