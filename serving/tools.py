"""What clients say of tools: which there are, which may be called, and what has been called."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pjengine.serving.body import Body
from pjengine.serving.errors import ApiError

type Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]


class Function(Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema of an object; none: it takes nothing
    strict: bool = False  # the arguments hold to the schema, whatever the model would like

    @property
    def schema_of_arguments(self) -> Mapping[str, Any]:
        nothing = {"type": "object", "properties": {}, "additionalProperties": False}
        return nothing if self.parameters is None else self.parameters


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: Name


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


type ToolChoice = Literal["none", "auto", "required"] | NamedTool


class ToolFields(Body):
    """Of a conversation: what the chat template is told of tools."""

    tools: Annotated[list[Tool], Field(max_length=1024)] | None = None

    @model_validator(mode="after")
    def _check_tools(self) -> "ToolFields":
        if self.tools is None:
            return self
        if not self.tools:
            raise ApiError(400, "tools is empty: name at least one, or leave it out", param="tools")
        names = [tool.function.name for tool in self.tools]
        if len(names) > len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise ApiError(400, f"tools has two functions of the name {twice!r}", param="tools")
        return self


class ToolChoiceFields(ToolFields):
    """Of a request for an answer: which of the tools the answer may call."""

    tool_choice: ToolChoice | None = None  # none given: "auto" where there are tools
    parallel_tool_calls: bool = True  # several calls in one answer

    @model_validator(mode="after")
    def _check_choice(self) -> "ToolChoiceFields":
        choice, names = self.tool_choice, [tool.function.name for tool in self.tools or ()]
        if choice not in (None, "none") and not names:
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ApiError(
                400,
                f"tool_choice names {choice.function.name!r}, of tools there are {', '.join(names)}",
                param="tool_choice",
            )
        return self

    @property
    def way(self) -> Literal["none", "auto", "required", "named"]:
        """How tools may be called."""
        if isinstance(self.tool_choice, NamedTool):
            return "named"
        return self.tool_choice or ("auto" if self.tools else "none")

    @property
    def are_calls_formed(self) -> bool:
        """Whether a grammar has to hold the calls to the schemas of their tools."""
        is_strict = any(tool.function.strict for tool in self.tools or ())
        return self.way in ("required", "named") or (self.way == "auto" and is_strict)

    @property
    def callable_functions(self) -> list[Function]:
        """Those that the answer may call."""
        functions = [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool):
            return [own for own in functions if own.name == self.tool_choice.function.name]
        return [] if self.way == "none" else functions


class CalledFunction(Body):
    name: Annotated[str, Field(min_length=1)]
    arguments: str  # JSON


class ToolCall(Body):
    """A call of an answer, as it is sent back with the next request."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # as it came in a stream; templates know the order

    def for_template(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": self._arguments()}
        return {"id": self.id, "type": self.type, "function": function}

    def _arguments(self) -> dict[str, Any]:
        """As the object that they write: templates write it their way."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            shown = self.function.arguments[:80]
            raise ApiError(
                400,
                f"messages: arguments of a tool call must be a JSON object, got {shown!r}",
                param="messages",
            )
        return arguments
