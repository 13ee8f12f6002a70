"""The service's own dialect: POST /embeddings and /embeddings/batch."""

from flask import Blueprint

from api.codec import encode_chunks, encode_vector
from api.schemas import BatchEmbeddings, ChunkRequest, Embeddings, EmbedText, EmbedTexts
from api.service import Service, endpoint, listed


def blueprint(service: Service) -> Blueprint:
    """The native routes."""
    routes = Blueprint("native", __name__)

    def embed(
        texts: list[str], path: str, options: ChunkRequest
    ) -> tuple[list[object], dict[str, object]]:
        embedder, waiting = service.embedder(options.model, path)
        embedded = embedder.embed(
            texts, **waiting, prompt_name=options.prompt_name, dimensions=options.dimensions
        )
        form = options.encoding_format
        chunks = [encode_chunks(embedding, form) for embedding in embedded if options.chunks]
        vectors = [encode_vector(embedding.vector, form) for embedding in embedded]
        return vectors, {"chunks": chunks} if options.chunks else {}

    @routes.post("/embeddings")
    @endpoint(Embeddings, EmbedText)
    def embed_text(body: EmbedText) -> object:
        """Embed one text."""
        vectors, chunks = embed(*listed(body.text, "text"), body)
        return {"embeddings": vectors, **chunks}

    @routes.post("/embeddings/batch")
    @endpoint(BatchEmbeddings, EmbedTexts)
    def embed_texts(body: EmbedTexts) -> object:
        """Embed several texts, each alone, in order."""
        vectors, chunks = embed(*listed(body.texts, "texts"), body)
        return {"embeddings": [[vector] for vector in vectors], **chunks}

    return routes
