"""The service's own dialect: POST /embeddings and /embeddings/batch."""

from flask import Blueprint

from api.codec import encode_chunks, encode_vector
from api.endpoint import endpoint
from api.images import refuse_pictures
from api.schemas import BatchEmbeddings, ChunkRequest, Embeddings, EmbedText, EmbedTexts
from api.service import Service
from limits import TextLimits


def blueprint(service: Service, limits: TextLimits) -> Blueprint:
    """The native routes, with limits of their own."""
    routes = Blueprint("native", __name__)

    def embed(
        sent: str | list[str], name: str, options: ChunkRequest
    ) -> tuple[list[object], dict[str, object]]:
        refuse_pictures(service, options.model, sent, name)
        _, embedded = service.embed_texts(
            sent,
            name,
            options.model,
            prompt_name=options.prompt_name,
            dimensions=options.dimensions,
            limits=limits,
        )
        form = options.encoding_format
        chunks = [encode_chunks(embedding, form) for embedding in embedded if options.chunks]
        vectors = [encode_vector(embedding.vector, form) for embedding in embedded]
        return vectors, {"chunks": chunks} if options.chunks else {}

    @routes.post("/embeddings")
    @endpoint(Embeddings, EmbedText)
    def embed_text(body: EmbedText) -> object:
        """Embed one text."""
        vectors, chunks = embed(body.text, "text", body)
        return {"embeddings": vectors, **chunks}

    @routes.post("/embeddings/batch")
    @endpoint(BatchEmbeddings, EmbedTexts)
    def embed_texts(body: EmbedTexts) -> object:
        """Embed several texts, each alone, in order."""
        vectors, chunks = embed(body.texts, "texts", body)
        return {"embeddings": [[vector] for vector in vectors], **chunks}

    return routes
