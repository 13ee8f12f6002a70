"""Request bodies, as types: what they say is what is accepted."""

import msgspec


class _Native(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that all native embedding calls take. Unknown fields are refused: a misspelt option
    must not pass.
    """

    model: str | None = None
    prompt_name: str | None = None
    dimensions: int | None = None


class EmbedText(_Native, forbid_unknown_fields=True):
    text: str


class EmbedTexts(_Native, forbid_unknown_fields=True):
    texts: list[str]
