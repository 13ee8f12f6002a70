"""Scores: POST /rerank in the service's own dialect and in that of text-embeddings-inference, which
share the path; /classify, the service's own; /predict, of text-embeddings-inference.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
from flask import Blueprint

from api.codec import begins, peek
from api.endpoint import endpoint
from api.images import is_picture
from api.schemas import (
    ClassifyText,
    ClassifyTexts,
    Labels,
    Predictions,
    PredictRequest,
    Ranking,
    RerankRequest,
    TEIRank,
    TEIRerankRequest,
)
from api.service import Service
from embeddings import Float32
from engine.errors import InvalidInput, ModalityNotSupported
from limits import TextLimits
from scores import Pair, TextScores
from server.messages import Request


class _Shape(msgspec.Struct):
    """As much of a body as tells which kind it is."""

    text: msgspec.Raw = msgspec.Raw()
    texts: msgspec.Raw = msgspec.Raw()


def _given(sent: msgspec.Raw) -> bool:
    return begins(sent, 5) not in (b"", b"null")


def _rerank_body(request: Request) -> type[RerankRequest | TEIRerankRequest]:
    return TEIRerankRequest if _given(peek(request, _Shape).texts) else RerankRequest


def _classify_body(request: Request) -> type[ClassifyText | ClassifyTexts]:
    return ClassifyTexts if _given(peek(request, _Shape).texts) else ClassifyText


def blueprint(service: Service, limits: TextLimits) -> Blueprint:
    """The routes; `limits` are those of the service's own dialect."""
    routes = Blueprint("scoring", __name__)

    @routes.post("/rerank")
    @endpoint(Ranking | list[TEIRank], RerankRequest, TEIRerankRequest, choose=_rerank_body)
    def rerank(body: RerankRequest | TEIRerankRequest) -> object:
        """Score `documents` for a query, the best first; with `texts` in place of `documents`, as
        text-embeddings-inference does.
        """
        if isinstance(body, TEIRerankRequest):
            return tei_rerank(service, body)
        most = top(body.top_n)
        refuse_pictures(body.documents, "$.documents[{}]")
        scorer, scored = service.rerank(
            body.query, body.documents, "documents", body.model, limits=limits
        )
        results = []
        for index in ranked(scored)[:most]:
            found = scored[index]
            entry: dict[str, object] = {"index": index, "score": _first(scorer.scores(found.raw))}
            if body.chunks:
                values = scorer.scores(found.chunk_raw)[:, 0].tolist()
                entry["chunks"] = [
                    {"start": each.start, "end": each.end, "tokens": each.tokens, "score": value}
                    for each, value in zip(found.chunks, values)
                ]
            results.append(entry)
        return {"results": results}

    @routes.post("/classify")
    @endpoint(Labels, ClassifyText, ClassifyTexts, choose=_classify_body)
    def classify(body: ClassifyText | ClassifyTexts) -> object:
        """Score each label of a text, or of several; a text may be a pair: `[first, second]`."""
        single = isinstance(body, ClassifyText)
        inputs = [body.text] if isinstance(body, ClassifyText) else body.texts
        path = "$.text" if single else "$.texts[{}]"
        refuse_pictures([each if isinstance(each, str) else each[1] for each in inputs], path)
        scorer, scored = service.score(inputs, path, body.model, "classify", limits=limits)
        names = scorer.scorer.labels
        labels = [_labels(names, scorer.scores(found.raw)) for found in scored]
        return {"labels": labels[0] if single else labels}

    @routes.post("/predict")
    @endpoint(Predictions, PredictRequest)
    def predict_inputs(body: PredictRequest) -> object:
        """Score each label of a text or a pair, or of several."""
        return predict(service, body)

    return routes


def refuse_pictures(texts: Sequence[str], path: str) -> None:
    """Refuse pictures among texts: the score of a data URI's characters is of no use.

    Args:
        path: where the texts stand in the body, `{}` for their index.

    Raises: ModalityNotSupported.
    """
    for index, text in enumerate(texts):
        if is_picture(text):
            place = path.format(index)
            raise ModalityNotSupported(f"{place}: this is a picture; scores are made of texts only")


def tei_rerank(service: Service, body: TEIRerankRequest) -> object:
    """text-embeddings-inference's /rerank."""
    refuse_pictures(body.texts, "$.texts[{}]")
    scorer, scored = service.rerank(body.query, body.texts, "texts", body.model, truncate=body.side)
    make = _raw if body.raw_scores else scorer.probabilities
    return [
        {"index": index, "score": _first(make(scored[index].raw))}
        | ({"text": body.texts[index]} if body.return_text else {})
        for index in ranked(scored)
    ]


def predict(service: Service, body: PredictRequest) -> object:
    """text-embeddings-inference's /predict."""
    sent = body.inputs
    batch = isinstance(sent, list) and (not sent or isinstance(sent[0], list))
    rows = sent if isinstance(sent, list) and batch else [sent]
    path = "$.inputs[{}]" if batch else "$.inputs"
    try:
        inputs = [_sequence(row, index) for index, row in enumerate(rows)]
    except InvalidInput as error:
        raise error.at(path) from None
    refuse_pictures([each if isinstance(each, str) else each[1] for each in inputs], path)
    scorer, scored = service.score(
        inputs, path, body.model, "classify", "rerank", truncate=body.side
    )
    make = _raw if body.raw_scores else scorer.probabilities
    labels = [_labels(scorer.scorer.labels, make(found.raw)) for found in scored]
    return labels if batch else labels[0]


def _sequence(sent: object, index: int) -> str | Pair:
    """A text, or a list of one or of two, which are a pair. Raises: InvalidInput."""
    if isinstance(sent, str):
        return sent
    if isinstance(sent, list) and all(isinstance(each, str) for each in sent):
        if len(sent) == 1:
            return str(sent[0])
        if len(sent) == 2:
            return sent[0], sent[1]
        if sent:
            message = f"{len(sent)} texts; one text is classified, or a pair of two. Send several "
            raise InvalidInput(message + "inputs as a list of lists", index)
    raise InvalidInput("expected a text, or a list of one or two texts", index)


def top(top_n: int | None) -> int | None:
    """The number of results that a request asks for; None for all. Raises: InvalidInput."""
    if top_n is not None and top_n < 1:
        raise InvalidInput(f"top_n is {top_n}; it takes 1 or more", field="top_n")
    return top_n


def ranked(scored: Sequence[TextScores]) -> list[int]:
    """The numbers of documents by descending score; of equal ones, the first is first."""
    return sorted(range(len(scored)), key=lambda index: -float(scored[index].raw[0]))


def _first(values: Float32) -> float:
    return float(values[0])


def _raw(values: Float32) -> Float32:
    return values


def _labels(names: Sequence[str], values: Float32) -> list[dict[str, object]]:
    """The highest first; of equal ones, the first is first."""
    order = np.argsort(-values, kind="stable").tolist()
    return [{"label": names[at], "score": float(values[at])} for at in order]
