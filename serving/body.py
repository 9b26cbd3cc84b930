"""What all bodies of requests have in common: known fields alone, of the types they say."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from pjengine.serving.refusals import REFUSED_FIELDS, Refusal, check_fields


def _document_null(schema: dict[str, Any]) -> None:
    """Null may stand for every field that may be left out."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            kept = {key: field.pop(key) for key in ("title", "default") if key in field}
            kept["anyOf"] = [dict(field), {"type": "null"}]
            field.clear()
            field |= kept


class Body(BaseModel):
    """A JSON object with known fields alone; null stands for the default of a field."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=_document_null)
    refused: ClassVar[Mapping[str, Refusal]] = REFUSED_FIELDS

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, data: Any) -> Any:
        return check_fields(data, cls.model_fields, cls.refused) if isinstance(data, dict) else data
