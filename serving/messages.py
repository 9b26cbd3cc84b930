"""The turns of a conversation."""

from typing import Any, Literal

from pydantic import model_validator

from pjengine.serving.body import Body
from pjengine.serving.errors import ApiError
from pjengine.serving.refusals import REFUSED_MESSAGE_FIELDS, REFUSED_PART_FIELDS
from pjengine.serving.tools import ToolCall

_OF_ASSISTANTS = ("tool_calls", "reasoning", "reasoning_content")


class TextPart(Body):
    refused = REFUSED_PART_FIELDS

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation."""

    refused = REFUSED_MESSAGE_FIELDS

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None  # none: an answer that only called tools
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None  # of the call that the message answers
    reasoning: str | None = None
    reasoning_content: str | None = None  # the same, by its older name

    @model_validator(mode="after")
    def _check_role(self) -> "Message":
        if self.role != "assistant":
            for name in _OF_ASSISTANTS:
                if getattr(self, name) is not None:
                    raise self._error(f"{name} is for the role assistant, got {self.role}", name)
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise self._error("tool_call_id and the role tool go together", "tool_call_id")
        if self.content is None and not (self.tool_calls or self.thought):
            raise self._error(f"a message of the role {self.role} needs content", "messages")
        return self

    def _error(self, text: str, param: str) -> ApiError:
        return ApiError(400, f"messages: {text}", param=param)

    @property
    def thought(self) -> str | None:
        return self.reasoning if self.reasoning is not None else self.reasoning_content

    @property
    def text(self) -> str:
        content = self.content or ""
        return content if isinstance(content, str) else "\n".join(part.text for part in content)

    def for_template(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.thought is not None:  # templates know it by one name or the other
            message["reasoning"] = message["reasoning_content"] = self.thought
        return message
